"""Edits of a tree that are all done, or none of them: design.md §4 "injection is a transaction"."""

from typing import Any

import pytest

import refiners.fluxion.layers as fl
from refiners.fluxion.layers.journal import transaction


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

    def fail_half_way() -> None:
        with transaction():
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
    with transaction():
        root.pop(0)
        with transaction():
            root.append(fl.Sin())
    assert kinds(root) == ["ReLU", "SiLU", "Sin"]


def test_a_transaction_is_undone_on_keyboard_interrupt() -> None:
    root = three()

    def interrupted() -> None:
        with transaction():
            root.pop(0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert kinds(root) == ["Identity", "ReLU", "SiLU"]


def test_a_failed_inner_transaction_that_is_caught_keeps_the_outer_edits() -> None:
    root = three()
    with transaction():
        root.pop(0)
        with pytest.raises(KeyError), transaction():
            raise KeyError
        root.append(fl.Sin())
    assert kinds(root) == ["ReLU", "SiLU", "Sin"]
