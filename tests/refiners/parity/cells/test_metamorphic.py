"""Each metamorphic cell, and for each a planted fault that turns it red."""

import io
import itertools
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import refiners.fluxion.layers as fl
from refiners.errors import ParityError
from refiners.parity import Case
from refiners.parity.cells import metamorphic
from refiners.parity.cells.cell_report import run_cells
from refiners.parity.cells.metamorphic import CELLS, Outcome, check_cell, check_cells, with_other_strides
from tests.refiners.parity.broken_ports import Counts, IgnoresStrides, scaled_gradient
from tests.refiners.parity.toys import Port, Upstream, make_case


class Sentences(Upstream):
    """The mean of a sequence where its mask is 1."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        return y if mask is None else (y * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


class Recomputing(Sentences):
    """Can forget its activations and compute them again."""

    again = False

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any]) -> None:
        self.again = not gradient_checkpointing_kwargs["use_reentrant"]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.again:
            x = x + checkpoint(lambda y: 0 * self.norm_1(y), x, use_reentrant=False)
        return super().forward(x, mask)


def texts(generator: torch.Generator) -> dict[str, Any]:
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    return {"x": torch.randn(3, 4, 8, generator=generator), "mask": mask}


def read(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    return {"y": model(inputs["x"], inputs["mask"])}


def longer(inputs: Mapping[str, Any]) -> dict[str, Any]:
    x, mask = inputs["x"], inputs["mask"]
    return {"x": torch.cat([x, torch.ones_like(x)], 1), "mask": torch.cat([mask, torch.zeros_like(mask)], 1)}


def sentences(port: Callable[[], nn.Module] = Recomputing, **changes: Any) -> Case:
    given: dict[str, Any] = {
        "upstream": Recomputing,
        "inputs": texts,
        "run_upstream": read,
        "run_port": read,
        "batch_axis": 0,
        "pad": longer,
    }
    return make_case(port, **{**given, **changes})


class Mixes(Sentences):
    """Lets the items of a batch see each other."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x, mask)
        return y + 1e-6 * y.mean(0)


class SeesPadding(Sentences):
    """Divides by the whole length."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        assert mask is not None
        return super().forward(x, mask) * mask.sum(1, keepdim=True) / x.shape[1]


class HoldsItsOrigin(Sentences):
    """Holds a function of the very object it was built as; a copy calls the original."""

    def __init__(self) -> None:
        super().__init__()
        self.first = lambda x: self.norm_1(x)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x + self.first(x), mask)


class DrawnWhenBuilt(Sentences):
    """Has a number that no state dict holds and that is another in every instance."""

    count = itertools.count()

    def __init__(self) -> None:
        super().__init__()
        self.number = next(self.count)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x + self.number * x[..., :1] ** 2, mask)


class OtherWhenCompiled(Sentences):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x, mask)
        return y + 1e-6 if torch.compiler.is_compiling() else y


class BreaksTheGraph(Sentences):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        torch._dynamo.graph_break()
        return super().forward(x, mask)


class OtherWhenMoved(Sentences):
    moved = 0

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.moved += 1
        return super()._apply(fn, recurse)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask) + 1e-6 * self.moved


class ScalesItsGradient(Sentences):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return scaled_gradient(super().forward(x, mask))


class CountsSentences(Counts):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        del mask
        return super().forward(x)


class StridedSentences(IgnoresStrides):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        del mask
        return Port.forward(self, x.as_strided(x.shape, (32, 8, 1)))


def test_every_cell_holds_for_a_sound_port() -> None:
    found = {finding.cell: finding for finding in check_cells(sentences())}
    assert list(found) == list(CELLS)
    assert {cell for cell, finding in found.items() if finding.outcome is not Outcome.HOLDS} <= {"cuda", "recomputed"}


@pytest.mark.parametrize(
    ("cell", "port", "words"),
    [
        ("repeats", CountsSentences, "output `y` changes (y["),
        ("batch", Mixes, "output `y` changes (y["),
        ("padded", SeesPadding, "output `y` changes (y["),
        ("strided", StridedSentences, "output `y` changes (y["),
        ("copied", HoldsItsOrigin, "output `y` changes (y["),
        ("saved", DrawnWhenBuilt, "output `y` changes (y["),
        ("compiled", OtherWhenCompiled, "output `y` changes (y["),
        ("compiled", BreaksTheGraph, "graph_break"),
        ("checkpointed", ScalesItsGradient, "gradient `norm_1.weight` changes (gradient norm_1.weight["),
    ],
)
def test_a_planted_fault_turns_its_cell_red(cell: str, port: type[nn.Module], words: str) -> None:
    found = check_cell(sentences(port), cell)
    assert found.outcome is Outcome.BROKEN
    assert words in found.reason
    assert "\n" not in found.reason


class InParts(nn.Module):
    """Is never called itself: its one part is."""

    def __init__(self, part: type[nn.Module]) -> None:
        super().__init__()
        self.part = part()


def read_part(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    return read(model.get_submodule("part"), inputs)


@pytest.mark.parametrize(
    ("part", "outcome"), [(Recomputing, Outcome.HOLDS), (OtherWhenCompiled, Outcome.BROKEN)], ids=["sound", "planted"]
)
def test_a_port_of_which_only_parts_are_called_is_compiled_in_parts(part: type[nn.Module], outcome: Outcome) -> None:
    case = sentences(
        lambda: InParts(part), upstream=lambda: InParts(Recomputing), run_upstream=read_part, run_port=read_part
    )
    assert check_cell(case, "compiled").outcome is outcome


class Steady(fl.Residual):
    """A node that can be computed again."""

    def __init__(self) -> None:
        super().__init__(fl.LayerNorm(8), fl.Linear(8, 8), self.last())

    def last(self) -> nn.Module:
        return fl.GeLU()


class Forgetful(fl.Module):
    """Computes something else when it is run again before its gradient was taken."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return x * (1 + 1e-6 * self.runs)


class Unsteady(Steady):
    def last(self) -> nn.Module:
        return Forgetful()


def tree_of(node: type[nn.Module]) -> Callable[[], fl.Chain]:
    return lambda: fl.Chain(node(), node())


@pytest.mark.parametrize(("node", "outcome"), [(Steady, Outcome.HOLDS), (Unsteady, Outcome.BROKEN)])
def test_a_port_computes_the_same_with_checkpoints_in_it(node: type[nn.Module], outcome: Outcome) -> None:
    found = check_cell(make_case(upstream=tree_of(node), port=tree_of(node)), "recomputed")
    assert found.outcome is outcome, str(found)


class RecomputingTree(fl.Chain):
    """A tree that can forget its activations."""

    again = False

    def __init__(self) -> None:
        super().__init__(Steady(), Steady())

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Mapping[str, Any]) -> None:
        self.again = not gradient_checkpointing_kwargs["use_reentrant"]

    def forward(self, *args: Any) -> Any:
        return checkpoint(super().forward, *args, use_reentrant=False) if self.again else super().forward(*args)


def test_no_cell_sees_the_gradients_of_another() -> None:
    case = make_case(upstream=RecomputingTree, port=tree_of(Steady))
    found = check_cells(case, ["checkpointed", "recomputed", "checkpointed"])
    assert [str(finding) for finding in found if finding.outcome is not Outcome.HOLDS] == []


def test_a_device_that_changes_the_result_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without CUDA: the same code, for a move to where the model is already."""
    here = partial(metamorphic.CHANGES["cuda"], device="cpu")
    monkeypatch.setitem(metamorphic.CHANGES, "cuda", here)
    assert check_cell(sentences(), "cuda").outcome is Outcome.HOLDS
    found = check_cell(sentences(OtherWhenMoved), "cuda")
    assert (found.outcome, found.reason[:19]) == (Outcome.BROKEN, "output `y` changes ")


def test_a_port_that_breaks_a_relation_as_its_upstream_does_is_no_fault() -> None:
    found = check_cell(sentences(Mixes, upstream=Mixes), "batch")
    assert found.outcome is Outcome.AS_UPSTREAM
    assert found.ok
    assert check_cell(sentences(Sentences, upstream=Mixes), "batch").outcome is Outcome.HOLDS


@pytest.mark.parametrize(("depends", "outcome"), [(False, Outcome.HOLDS), (True, Outcome.BROKEN)])
def test_an_output_for_all_items_is_the_same_for_each(depends: bool, outcome: Outcome) -> None:
    def with_levels(model: nn.Module, inputs: Mapping[str, Any], *, depends: bool = False) -> dict[str, Tensor]:
        levels = torch.arange(5) + (inputs["x"].sum() if depends else 0)
        return {**read(model, inputs), "levels": levels, "mean": levels.sum()}

    found = check_cell(sentences(run_upstream=with_levels, run_port=partial(with_levels, depends=depends)), "batch")
    assert found.outcome is outcome, str(found)


@pytest.mark.parametrize(
    ("changes", "cell", "words"),
    [
        ({"batch_axis": None}, "batch", "The case has no `batch_axis`: name it, or say in `without_cells`"),
        ({"batch_axis": {"z": 0}}, "batch", "`batch_axis` names z, which is no input. There are: x, mask."),
        ({"batch_axis": {"x": 1, "mask": 0}}, "batch", "hold different numbers of items: [3, 4]"),
        ({"pad": None}, "padded", "The case has no `pad`"),
        ({"pad": lambda inputs: 1 / 0}, "padded", "ZeroDivisionError: division by zero"),
        ({"port": lambda: None}, "repeats", "must return a torch.nn.Module, got NoneType"),
    ],
)
def test_what_is_not_declared_or_does_not_run_is_red(changes: dict[str, Any], cell: str, words: str) -> None:
    found = check_cell(sentences(**changes), cell)
    assert found.outcome is Outcome.BROKEN
    assert words in found.reason


@pytest.mark.parametrize(
    ("changes", "cell", "words"),
    [
        ({"without_cells": {"padded": "pictures"}}, "padded", "pictures"),
        ({"inputs": lambda g: {k: v[:1] for k, v in texts(g).items()}}, "batch", "its inputs are a batch of one"),
        ({"lanes": ("float32",)}, "repeats", "it has no float64 lane"),
        ({"upstream": Sentences}, "checkpointed", "upstream has no gradient checkpointing"),
        ({"gradients": False}, "checkpointed", "the case compares no gradients"),
    ],
)
def test_what_does_not_apply_says_why(changes: dict[str, Any], cell: str, words: str) -> None:
    found = check_cell(sentences(**changes), cell)
    assert found.outcome is Outcome.NOT_APPLICABLE
    assert words in found.reason


def test_a_cell_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(ParityError, match="There is no cell paded. Cells are repeats, batch, padded"):
        check_cells(sentences(), ["paded"])
    with pytest.raises(ParityError, match="There is no cell padding"):
        check_cells(sentences(without_cells={"padding": "none"}))
    with pytest.raises(ParityError, match="no reason is given for `padded` in `without_cells`"):
        sentences(without_cells={"padded": " "})


@pytest.mark.parametrize(
    "tensor",
    [torch.randn(2, 3, 4, 5), torch.randn(3, 4), torch.randn(3, 4).T, torch.arange(5), torch.ones(3, 1)],
    ids=["image", "matrix", "transposed", "row", "column"],
)
def test_other_strides_hold_the_same_values(tensor: Tensor) -> None:
    other = with_other_strides(tensor)
    assert torch.equal(other, tensor)
    assert other.stride() != tensor.stride()


def test_the_weights_are_as_before_when_the_cells_are_done() -> None:
    scene = metamorphic.Scene(sentences())
    before = {key: tensor.clone() for key, tensor in scene.upstream.state_dict().items()}
    for change in (metamorphic.CHANGES[cell] for cell in CELLS if cell in metamorphic.CHANGES and cell != "cuda"):
        change(scene, scene.port, True)
    assert all(torch.equal(tensor, before[key]) for key, tensor in scene.upstream.state_dict().items())


MODULE = """
from tests.refiners.parity.cells.test_metamorphic import SeesPadding, sentences

CASES = [sentences(), sentences(SeesPadding, id="toy/broken")]
"""


def test_the_command_prints_a_table_and_what_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cases_with_cells.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    console = Console(file=io.StringIO(), width=100)
    cells = "repeats, padded,cuda"
    assert run_cells("cases_with_cells", cells=cells, console=console) == 1
    assert run_cells("cases_with_cells", keyword="tower", cells=cells, console=console) == 0
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "✗ toy/broken padded: BROKEN: output `y` changes" in text
    assert re.search(r"padded +│ +1 │ +0 │ +1 │ +0", text)
    with pytest.raises(ParityError, match="No case id contains 'nothing'"):
        run_cells("cases_with_cells", keyword="nothing", console=console)
