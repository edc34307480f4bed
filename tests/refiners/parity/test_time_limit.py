"""The limit on a case's time: it ends what hangs, in any thread, and leaves the process as it was."""

import contextlib
import signal
import threading
import time

import pytest
from torch import nn

from refiners.errors import ParityError
from refiners.parity import FullSize
from refiners.parity.full_size import check_full_size
from refiners.parity.time_limit import TimeIsUp, TimeLimit, time_limit
from tests.refiners.parity.toys import Port, Upstream, make_case


def spin() -> None:
    while True:
        pass


def test_a_loop_in_the_main_thread_ends_and_the_place_is_named() -> None:
    with pytest.raises(TimeLimit, match=r"more than 0\.05 s.*It was at test_time_limit\.py:\d+ in spin") as caught:
        with time_limit(0.05):
            spin()
    assert isinstance(caught.value, ParityError)


def test_a_loop_in_another_thread_ends_too() -> None:
    caught: list[BaseException] = []

    def work() -> None:
        try:
            with time_limit(0.05):
                spin()
        except TimeLimit as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert [type(error) for error in caught] == [TimeLimit]


def test_what_swallows_the_first_alarm_gets_another() -> None:
    def stubborn() -> None:
        try:
            spin()
        except TimeIsUp:
            spin()

    with pytest.raises(TimeLimit):
        with time_limit(0.05):
            stubborn()


def test_no_except_exception_on_the_way_stops_it() -> None:
    def careless() -> None:
        while True:
            with contextlib.suppress(Exception):
                spin()

    with pytest.raises(TimeLimit):
        with time_limit(0.05):
            careless()


def test_what_ends_in_time_leaves_no_alarm_behind() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with time_limit(0.2):
        pass
    time.sleep(0.25)
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_an_outer_limit_goes_on_after_an_inner_one() -> None:
    with pytest.raises(TimeLimit, match="0.2 s"):
        with time_limit(0.2):
            with time_limit(60):
                pass
            spin()


def test_a_full_size_that_hangs_is_one_red_line() -> None:
    def hangs() -> nn.Module:
        spin()
        return Port()

    case = make_case(full_size={"base": FullSize(upstream=Upstream, port=hangs)}, time_limit=0.1)
    found = check_full_size(case, "base")
    assert found.reason.startswith("TimeLimit: it took more than 0.1 s, the case's `time_limit`.")
