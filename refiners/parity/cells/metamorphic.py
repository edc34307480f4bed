"""Metamorphic cells: what must hold of a port when its inputs, or it itself, change in a way that changes nothing.

Two models can be equal on the inputs of a case and both depend on what they should not: on the other items of a batch,
on padding, on strides, on having been copied, saved or compiled. Each cell runs a port twice, the second time changed,
and holds both results together:

| cell | the second time |
|---|---|
| `repeats` | the same once more |
| `batch` | each item of the batch alone |
| `padded` | the inputs lengthened by what the case's `pad` adds |
| `strided` | inputs of the same values with other strides: channels last, transposed, every second number |
| `copied` | a deep copy, after the original's weights were changed |
| `saved` | a new model with weights that went through a safetensors file |
| `compiled` | `torch.compile` in one graph, run by the interpreter |
| `checkpointed` | against an upstream that recomputes its activations, gradients included |
| `recomputed` | a `CheckpointAdapter` around its outermost Chains, gradients included |
| `cuda` | on a CUDA device |

A cell compares in float64, where rounding and faults are nine orders of magnitude apart: bits where nothing may change
them (`EXACT`), agreement within `rounding.FLOAT64_AGREEMENT` where a batch, a length or a stride picks another kernel.
A relation that upstream breaks as well is no fault of a port that breaks it equally, bit for bit: `as upstream`.

`compiled` uses a backend that runs the captured graph as it is. It proves that the whole forward is one graph without
Python in it, and that its guards and its captured constants are right. It says nothing about the code that inductor
would generate.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import Tensor, nn

from refiners.conversion import read_state_dict, write_state_dict
from refiners.errors import ParityError
from refiners.parity.bits import same_bits
from refiners.parity.case import Case, Inputs
from refiners.parity.cells.checkpointed import checkpointed, recomputed
from refiners.parity.inputs import map_tensors, place_inputs
from refiners.parity.lanes import Lane, held_equal
from refiners.parity.pairing import Kind, Pair
from refiners.parity.scene import NotApplicable, Outcome, Outputs, Scene, unequal
from refiners.parity.time_limit import time_limit
from refiners.parity.torch_state import default_dtype
from refiners.parity.weights import floating_entries

EXACT = frozenset({"repeats", "copied", "saved", "compiled"})
"""Cells that may not change a bit."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One cell of one case."""

    case: str
    cell: str
    outcome: Outcome
    reason: str = ""
    """Why it is broken or does not apply."""

    @property
    def ok(self) -> bool:
        """Whether it is no fault."""
        return self.outcome is not Outcome.BROKEN

    def __str__(self) -> str:
        return f"{self.case} {self.cell}: {self.outcome}{f': {self.reason}' if self.reason else ''}"


Change = Callable[[Scene, nn.Module, bool], Outputs]
"""Runs a model of a scene in the changed way; the flag says whether it is the port."""


# The changes


def _repeats(scene: Scene, model: nn.Module, is_port: bool) -> Outputs:
    return scene.run(model, is_port=is_port)


def _batch(scene: Scene, model: nn.Module, is_port: bool) -> Outputs:
    axes = _batch_axes(scene)
    sizes = {scene.inputs[name].shape[axis] for name, axis in axes.items()}
    if len(sizes) != 1:
        raise ParityError(f"The inputs {', '.join(axes)} hold different numbers of items: {sorted(sizes)}.")
    count = sizes.pop()
    if count < 2:
        raise NotApplicable("its inputs are a batch of one")

    def item(index: int) -> Inputs:
        return {name: v.narrow(axes[name], index, 1) if name in axes else v for name, v in scene.inputs.items()}

    outputs = [scene.run(model, item(index), is_port=is_port) for index in range(count)]
    whole = scene.first[is_port]
    return {name: _together([output[name] for output in outputs], whole.get(name)) for name in outputs[0]}


def _together(items: list[Tensor], whole: Tensor | None) -> Tensor:
    """An output of single items as the batch has it: one after the other, or, where no axis is theirs, the same."""
    first = items[0]
    is_common = whole is not None and whole.shape == first.shape
    if is_common and all(same_bits(item, first) for item in items):
        return first
    return torch.cat(items) if first.ndim else torch.stack(items)


def _batch_axes(scene: Scene) -> Mapping[str, int]:
    axes = scene.case.batch_axis
    if axes is None:
        raise ParityError("The case has no `batch_axis`: name it, or say in `without_cells` why there is none.")
    if isinstance(axes, int):
        return {name: axes for name, value in scene.inputs.items() if isinstance(value, Tensor)}
    missing = [name for name in axes if name not in scene.inputs]
    if missing:
        told = f"`batch_axis` names {', '.join(missing)}, which is no input. There are: {', '.join(scene.inputs)}."
        raise ParityError(told)
    return axes


def _padded(scene: Scene, model: nn.Module, is_port: bool) -> Outputs:
    if scene.case.pad is None:
        raise ParityError(
            "The case has no `pad`: give a function that lengthens its inputs, or say in `without_cells` why."
        )
    outputs = scene.run(model, scene.case.pad(scene.inputs), is_port=is_port)
    shapes = {name: tensor.shape for name, tensor in scene.first[is_port].items()}
    return {name: tensor[tuple(slice(size) for size in shapes[name])] for name, tensor in outputs.items()}


def _strided(scene: Scene, model: nn.Module, is_port: bool) -> Outputs:
    inputs = {name: map_tensors(value, with_other_strides) for name, value in scene.inputs.items()}
    return scene.run(model, inputs, is_port=is_port)


def with_other_strides(tensor: Tensor) -> Tensor:
    """The same values in another order of memory: channels last, transposed, or every second number of a larger row."""
    if tensor.ndim == 4 and tensor.shape[1] > 1 and tensor.is_contiguous():
        return tensor.contiguous(memory_format=torch.channels_last)
    if tensor.ndim >= 2 and min(tensor.shape[-2:]) > 1:
        return tensor.mT.contiguous().mT if tensor.is_contiguous() else tensor.contiguous()
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


def _copied(scene: Scene, model: nn.Module, is_port: bool) -> Outputs:
    made = copy.deepcopy(model)
    kept = [(entry.tensor, entry.tensor.detach().clone()) for entry in floating_entries(model)]
    try:
        with torch.no_grad():
            for tensor, _ in kept:
                tensor.zero_()
        return scene.run(made, is_port=is_port)
    finally:
        with torch.no_grad():
            for tensor, values in kept:
                tensor.copy_(values)


def _saved(scene: Scene, model: nn.Module, is_port: bool) -> Outputs:
    if not is_port:
        return scene.first[0]
    made = scene.built_anew()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "port.safetensors"
        write_state_dict(path, {key: tensor.detach().contiguous() for key, tensor in model.state_dict().items()})
        made.load_state_dict(read_state_dict(path), strict=True)
    return scene.run(made)


def _compiled(scene: Scene, model: nn.Module, is_port: bool) -> Outputs:
    if not is_port:
        return scene.first[0]
    # A port of which only parts are called (an autoencoder encodes, and decodes) is compiled in parts.
    for paths in ([""], [name for name, _ in model.named_children()]):
        outputs, graphs = _compiled_parts(scene, model, paths)
        if graphs:
            return outputs
    raise NotApplicable("it calls neither the model nor its children, which are what is compiled")


def _compiled_parts(scene: Scene, model: nn.Module, paths: Sequence[str]) -> tuple[Outputs, int]:
    """The outputs with some modules compiled, and the number of graphs that they became."""
    graphs: list[torch.fx.GraphModule] = []

    def interpret(graph: torch.fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    made = copy.deepcopy(model)
    for path in paths:
        cast(Any, made.get_submodule(path)).compile(backend=interpret, fullgraph=True)
    try:
        return scene.run(made), len(graphs)
    finally:
        cast(Any, torch.compiler).reset()


def _cuda(scene: Scene, model: nn.Module, is_port: bool, *, device: str = "cuda") -> Outputs:
    if device == "cuda" and not torch.cuda.is_available():
        raise NotApplicable("torch sees no CUDA device here")
    made = copy.deepcopy(model).to(device)
    outputs = scene.run(made, place_inputs(scene.inputs, scene.lane.dtype, device), is_port=is_port)
    return {name: tensor.to(scene.lane.device) for name, tensor in outputs.items()}


CHANGES: dict[str, Change] = {
    "repeats": _repeats,
    "batch": _batch,
    "padded": _padded,
    "strided": _strided,
    "copied": _copied,
    "saved": _saved,
    "compiled": _compiled,
    "cuda": _cuda,
}
GRADIENTS = {"checkpointed": checkpointed, "recomputed": recomputed}
CELLS = (*CHANGES, *GRADIENTS)


# Judging


def check_cell(case: Case, cell: str) -> Finding:
    """Runs one cell of a case. Whatever goes wrong in it makes it broken.

    Raises:
        ParityError: there is no such cell.
    """
    return next(iter(check_cells(case, [cell])))


def check_cells(case: Case, cells: Sequence[str] = CELLS) -> list[Finding]:
    """Runs cells of a case on one pair of models.

    Raises:
        ParityError: there is no such cell.
    """
    unknown = [cell for cell in (*cells, *case.without_cells) if cell not in CELLS]
    if unknown:
        raise ParityError(f"There is no cell {', '.join(unknown)}. Cells are {', '.join(CELLS)}.")
    lane = Lane("float64")
    if lane.dtype_name not in case.lanes:
        reason = "it has no float64 lane, which alone could tell rounding from a fault"
        return [Finding(case=case.id, cell=cell, outcome=Outcome.NOT_APPLICABLE, reason=reason) for cell in cells]
    scene: list[Scene] = []

    def found(cell: str) -> Finding:
        if cell in case.without_cells:
            outcome, reason = Outcome.NOT_APPLICABLE, case.without_cells[cell]
        else:
            outcome, reason = _outcome(case, cell, scene)
        return Finding(case=case.id, cell=cell, outcome=outcome, reason=reason)

    with held_equal(lane), default_dtype(torch.get_default_dtype()):
        return [found(cell) for cell in cells]


def _outcome(case: Case, cell: str, scenes: list[Scene]) -> tuple[Outcome, str]:
    try:
        with time_limit(case.time_limit):
            if not scenes:
                scenes.append(Scene(case))
            scene = scenes[0]
            return GRADIENTS[cell](scene) if cell in GRADIENTS else _related(scene, cell)
    except NotApplicable as told:
        return Outcome.NOT_APPLICABLE, str(told)
    except Exception as error:  # a port's, a case's or torch's
        cause = getattr(error, "error", error)  # of the stage of a runner
        return Outcome.BROKEN, f"{type(cause).__name__}: {(str(cause).strip().splitlines() or [''])[0]}"


def _related(scene: Scene, cell: str) -> tuple[Outcome, str]:
    change = CHANGES[cell]
    theirs = change(scene, scene.port, True)
    reason = _apart(scene.first[1], theirs, exact=cell in EXACT)
    if not reason:
        return Outcome.HOLDS, ""
    ours = change(scene, scene.upstream, False)
    if _apart(scene.first[0], ours, exact=cell in EXACT) and not _apart(ours, theirs, exact=True):
        return Outcome.AS_UPSTREAM, reason
    return Outcome.BROKEN, reason


def _apart(before: Outputs, after: Outputs, *, exact: bool) -> str:
    """What differs between two runs more than it may; "" when nothing does."""
    if before.keys() != after.keys():
        return f"the outputs are {', '.join(after)}, before {', '.join(before)}"
    pairs = [Pair(name, Kind.OUTPUT, tensor, after[name]) for name, tensor in before.items()]
    return unequal(pairs, exact=exact)
