"""The exact text of a tree: api.md §4."""

from typing import Any

import pytest
import torch
from torch import nn

import refiners.fluxion.layers as fl


def lines(*text: str) -> str:
    return "\n".join(text)


class Named(fl.Chain):
    """A subclass with a number."""

    def __init__(self, *modules: Any, size: int = 1) -> None:
        self.size = size
        super().__init__(*modules)


def test_the_example_of_the_contract_is_exact() -> None:
    chain = fl.Chain(fl.Linear(1, 1), fl.Linear(1, 1), fl.Chain(fl.Linear(1, 1), fl.Linear(2, 1)))
    assert repr(chain) == lines(
        "(CHAIN)",
        "    ├── Linear(in_features=1, out_features=1, device=cpu, dtype=float32) (x2)",
        "    └── (CHAIN)",
        "        ├── Linear(in_features=1, out_features=1, device=cpu, dtype=float32) #1",
        "        └── Linear(in_features=2, out_features=1, device=cpu, dtype=float32) #2",
    )


@pytest.mark.parametrize(
    ("cls", "line"),
    [
        (fl.Chain, "(CHAIN)"),
        (fl.Parallel, "(PAR)"),
        (fl.Distribute, "(DISTR)"),
        (fl.Passthrough, "(PASS)"),
        (fl.Sum, "(SUM)"),
        (fl.Residual, "(RES) Residual()"),
        (fl.Concatenate, "(CAT)"),
    ],
)
def test_a_plain_class_shows_its_tag_and_a_residual_its_name_too(cls: Any, line: str) -> None:
    assert repr(cls(fl.Identity())) == lines(line, "    └── Identity()")


def test_a_matmul_shows_its_name() -> None:
    assert repr(fl.Matmul(fl.Identity(), fl.Sin())).splitlines()[0] == "(MATMUL) Matmul()"


def test_a_subclass_shows_its_tag_name_and_attributes() -> None:
    class MySum(fl.Sum):
        pass

    assert repr(Named()) == "(CHAIN) Named()"
    assert repr(Named(size=3)) == "(CHAIN) Named(size=3)"
    assert repr(MySum()) == "(SUM) MySum()"


def test_identical_neighbours_fold_also_when_they_are_chains() -> None:
    chain = fl.Chain(fl.Chain(fl.ReLU()), fl.Chain(fl.ReLU()), fl.Chain(fl.SiLU()))
    assert repr(chain) == lines(
        "(CHAIN)",
        "    ├── (CHAIN) (x2) #1",
        "    │   └── ReLU()",
        "    └── (CHAIN) #2",
        "        └── SiLU()",
    )


def test_equal_modules_that_are_no_neighbours_do_not_fold() -> None:
    assert repr(fl.Chain(fl.ReLU(), fl.SiLU(), fl.ReLU())) == lines(
        "(CHAIN)", "    ├── ReLU() #1", "    ├── SiLU()", "    └── ReLU() #2"
    )


def test_a_different_dtype_or_device_does_not_fold() -> None:
    chain = fl.Chain(fl.Linear(1, 1), fl.Linear(1, 1, dtype=torch.float64), fl.Linear(1, 1, device="meta"))
    assert repr(chain) == lines(
        "(CHAIN)",
        "    ├── Linear(in_features=1, out_features=1, device=cpu, dtype=float32) #1",
        "    ├── Linear(in_features=1, out_features=1, device=cpu, dtype=float64) #2",
        "    └── Linear(in_features=1, out_features=1, device=meta, dtype=float32) #3",
    )


def test_a_tree_is_cut_below_seven_levels() -> None:
    chain: Any = fl.Identity()
    for _ in range(9):
        chain = fl.Chain(chain)
    text = repr(chain).splitlines()
    assert len(text) == 8
    assert text[-1].endswith("(CHAIN) ... ")
    assert "Identity" not in repr(chain)


def test_a_tree_of_seven_levels_is_not_cut() -> None:
    chain: Any = fl.Identity()
    for _ in range(7):
        chain = fl.Chain(chain)
    assert "Identity()" in repr(chain)
    assert "..." not in repr(chain)


def test_use_context_quotes_its_names_alone_and_not_inside_a_tree() -> None:
    assert repr(fl.UseContext("a", "b")) == "UseContext(context='a', key='b')"
    assert repr(fl.SetContext("a", "b")) == "SetContext(context='a', key='b')"
    assert repr(fl.Chain(fl.UseContext("a", "b"))) == lines("(CHAIN)", "    └── UseContext(context=a, key=b)")


def test_lines_of_the_last_and_of_other_branches_are_drawn() -> None:
    chain = fl.Chain(fl.Residual(fl.ReLU()), fl.Chain(fl.Sum(fl.ReLU(), fl.SiLU())))
    assert repr(chain) == lines(
        "(CHAIN)",
        "    ├── (RES) Residual()",
        "    │   └── ReLU()",
        "    └── (CHAIN)",
        "        └── (SUM)",
        "            ├── ReLU()",
        "            └── SiLU()",
    )


def test_a_leaf_that_occurs_twice_is_drawn_twice() -> None:
    leaf = fl.ReLU()
    assert repr(fl.Chain(leaf, leaf)) == lines("(CHAIN)", "    └── ReLU() (x2)")
    assert repr(fl.Chain(leaf, fl.Sin(), leaf)).count("ReLU") == 2


def test_plain_modules_are_drawn_with_their_children() -> None:
    text = repr(fl.Chain(nn.Sequential(nn.Linear(1, 1, bias=False), fl.Chain(fl.ReLU()))))
    assert [line.strip(" │├└─") for line in text.splitlines()] == [
        "(CHAIN)",
        "Sequential()",
        "Linear(in_features=1, out_features=1, bias=False)",
        "(CHAIN)",
        "ReLU()",
    ]


def test_a_compiled_child_is_one_line_and_its_module_another() -> None:
    text = repr(fl.Chain(torch.compile(fl.ReLU(), backend="eager")))
    assert [line.strip(" │├└─") for line in text.splitlines()] == ["(CHAIN)", "OptimizedModule()", "ReLU()"]


def test_str_of_a_chain_is_its_own_line_only() -> None:
    assert str(fl.Chain(fl.ReLU())) == "Chain()"
    assert str(Named(fl.ReLU(), size=2)) == "Named(size=2)"


def test_the_named_child_is_marked_in_the_tree() -> None:
    chain = fl.Chain(fl.Linear(1, 1), fl.Chain(fl.Linear(1, 1)), fl.Linear(2, 1))
    assert chain._show_error_in_tree("Linear_2") == lines(
        "(CHAIN)",
        "    ├── Linear(in_features=1, out_features=1, device=cpu, dtype=float32) #1",
        "    ├── (CHAIN)",
        "    │   └── Linear(in_features=1, out_features=1, device=cpu, dtype=float32)",
        "    └── >>> Linear(in_features=2, out_features=1, device=cpu, dtype=float32) | Linear_2",
    )


def test_a_name_that_matches_no_child_marks_nothing() -> None:
    chain = fl.Chain(fl.Linear(1, 1), fl.Linear(1, 1), fl.Chain(fl.Linear(1, 1), fl.Linear(2, 1)))
    assert chain._show_error_in_tree("Chain.Linear_2") == repr(chain)


def test_the_marked_tree_has_at_most_the_lines_it_is_told() -> None:
    chain = fl.Chain(fl.Linear(1 + i, 1) for i in range(50))
    text = chain._show_error_in_tree("Linear_25", max_lines=9)
    assert len(text.splitlines()) <= 9
    assert text.count(">>> ") == 1
    assert len(chain._show_error_in_tree("Linear_25").splitlines()) <= 20


@pytest.mark.parametrize("position", [0, 1, 49])
def test_the_marker_is_always_among_the_lines(position: int) -> None:
    chain = fl.Chain(fl.Linear(1, 1) for _ in range(50))
    assert chain._show_error_in_tree(f"Linear_{position + 1}").count(">>> ") == 1
