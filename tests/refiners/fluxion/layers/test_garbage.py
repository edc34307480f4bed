"""No search for garbage among what is being built, and the collector as it was before, whatever happens."""

import gc
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, cast

import pytest

import refiners.fluxion.layers as fl
from refiners.fluxion.adapters import inject_loras
from refiners.fluxion.layers.garbage import makes_no_garbage

# Several times as many as set off a search.
MANY = 20_000


@contextmanager
def searches() -> Generator[list[int]]:
    """The generations that were searched while this was open."""
    found: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            found.append(info["generation"])

    gc.callbacks.append(note)
    try:
        yield found
    finally:
        gc.callbacks.remove(note)


def build() -> list[Any]:
    return [[] for _ in range(MANY)]


def test_nothing_is_searched_while_it_builds() -> None:
    with searches() as found:
        built = makes_no_garbage(build)()
        assert not found
        assert len(build()) == len(built)
        assert found  # as ever, outside


def test_what_was_built_is_not_searched_with_the_next_object() -> None:
    gc.collect()
    with searches() as found:
        built = makes_no_garbage(build)()
        more = [[] for _ in range(100)]
        assert not found
    assert len(built) == MANY
    assert len(more) == 100


@pytest.mark.parametrize("was_enabled", [True, False])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, None])
def test_the_collector_is_as_it_was(was_enabled: bool, error: type[BaseException] | None) -> None:
    def act() -> None:
        assert not gc.isenabled()
        if error is not None:
            raise error

    if not was_enabled:
        gc.disable()
    try:
        if error is None:
            makes_no_garbage(act)()
        else:
            with pytest.raises(error):
                makes_no_garbage(act)()
        assert gc.isenabled() is was_enabled
        assert not gc.get_freeze_count()
    finally:
        gc.enable()


def test_what_somebody_has_frozen_stays_so() -> None:
    gc.collect()
    gc.freeze()
    try:
        count = gc.get_freeze_count()
        makes_no_garbage(build)()
        assert gc.get_freeze_count() == count
    finally:
        gc.unfreeze()


def test_one_inside_of_another_does_not_end_the_pause() -> None:
    def outer() -> bool:
        makes_no_garbage(build)()
        return gc.isenabled()

    assert not makes_no_garbage(outer)()
    assert gc.isenabled()


def test_garbage_that_was_there_is_still_found() -> None:
    class Knot:
        alive = 0

        def __init__(self) -> None:
            self.itself = self
            Knot.alive += 1

        def __del__(self) -> None:
            Knot.alive -= 1

    gc.collect()
    Knot()
    makes_no_garbage(build)()
    assert Knot.alive == 1
    gc.collect()
    assert Knot.alive == 0


@pytest.mark.parametrize(
    ("inject", "is_searched"), [(inject_loras, False), (cast(Any, inject_loras).__wrapped__, True)], ids=["it", "bare"]
)
def test_an_injection_is_not_searched(inject: Callable[..., Any], is_searched: bool) -> None:
    model = fl.Chain(*[fl.Linear(2, 2) for _ in range(200)])
    gc.collect()
    with searches() as found:
        loras = inject(model, name="style", rank=1)
        assert bool(found) is is_searched
    loras.eject()
