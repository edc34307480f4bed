"""Edits of a tree that are all done, or none of them: design.md §4 "injection is a transaction"."""

from typing import Any

import pytest

import refiners.fluxion.layers as fl
from refiners.fluxion.layers.journal import all_or_nothing
from tests.refiners.fluxion.interrupts import interrupted_at


def three() -> fl.Chain:
    return fl.Chain(fl.Identity(), fl.ReLU(), fl.SiLU())


def kinds(chain: fl.Chain) -> list[str]:
    return [type(module).__name__ for module in chain]


def picture(root: fl.Chain) -> list[Any]:
    parents = [(id(m), id(m.parent)) for m, _ in root.walk(fl.ContextModule, recurse=True)]
    return [[(name, id(m)) for name, m in root.named_modules(remove_duplicate=False)], parents]


def test_a_transaction_undoes_all_its_edits_when_it_fails() -> None:
    root = fl.Chain(fl.Chain(fl.Linear(1, 1), fl.Chain()), fl.ReLU(), fl.Linear(1, 1))
    other = fl.Chain(fl.Chain())
    before, before_other = picture(root), picture(other)

    @all_or_nothing
    def fail_half_way() -> None:
        root.append(other[0])
        root.pop(0)
        root.insert(0, fl.Sin())
        root.replace(root[1], fl.Cos())
        root.remove(root[0])
        root.append(fl.Linear(1, 1))
        raise KeyError

    with pytest.raises(KeyError):
        fail_half_way()
    assert picture(root) == before
    assert picture(other) == before_other


def test_a_transaction_that_succeeds_keeps_its_edits() -> None:
    root = three()

    @all_or_nothing
    def edit() -> None:
        root.pop(0)
        all_or_nothing(root.append)(fl.Sin())

    edit()
    assert kinds(root) == ["ReLU", "SiLU", "Sin"]


def test_a_transaction_is_undone_on_keyboard_interrupt() -> None:
    root = three()

    @all_or_nothing
    def interrupted() -> None:
        root.pop(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert kinds(root) == ["Identity", "ReLU", "SiLU"]


def test_a_failed_inner_transaction_that_is_caught_keeps_the_outer_edits() -> None:
    root = three()

    @all_or_nothing
    def fail() -> None:
        raise KeyError

    @all_or_nothing
    def edit() -> None:
        root.pop(0)
        with pytest.raises(KeyError):
            fail()
        root.append(fl.Sin())

    edit()
    assert kinds(root) == ["ReLU", "SiLU", "Sin"]


# --- interrupts ---------------------------------------------------------------------------------------------------


class Fault(Exception):
    pass


@all_or_nothing
def edited_in_vain(root: fl.Chain) -> None:
    root.pop(0)
    root.append(fl.Sin())
    root.insert(0, fl.Chain(fl.Cos()))
    raise Fault


def test_an_interrupt_at_any_step_of_what_is_all_or_nothing_undoes_all_of_it() -> None:
    root, steps = three(), 0
    before = picture(root)
    while True:
        try:
            is_interrupted = interrupted_at(steps, lambda: edited_in_vain(root))
        except Fault:
            break
        assert is_interrupted
        assert picture(root) == before, f"interrupted at step {steps}"
        steps += 1
    assert picture(root) == before
    assert steps > 100


def test_after_an_interrupt_the_next_transaction_is_one_of_its_own() -> None:
    root = three()
    assert interrupted_at(5, lambda: edited_in_vain(root))
    all_or_nothing(root.pop)(0)
    with pytest.raises(Fault):
        edited_in_vain(root)
    assert kinds(root) == ["ReLU", "SiLU"]


def test_inner_calls_that_are_all_or_nothing_join_the_outer_one() -> None:
    root = three()

    @all_or_nothing
    def outer() -> None:
        root.pop(0)
        with pytest.raises(Fault):
            edited_in_vain(root)
        raise KeyError

    with pytest.raises(KeyError):
        outer()
    assert kinds(root) == ["Identity", "ReLU", "SiLU"]
