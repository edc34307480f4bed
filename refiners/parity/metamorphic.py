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
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from refiners.conversion import read_state_dict, write_state_dict
from refiners.errors import ParityError
from refiners.parity import rounding
from refiners.parity.case import Case, Inputs
from refiners.parity.influence import matches
from refiners.parity.inputs import copy_for_one_side, draw_inputs, map_tensors, place_inputs
from refiners.parity.lanes import Lane, held_equal
from refiners.parity.modules import modules
from refiners.parity.pairing import Kind, Pair, pair_gradients, pair_outputs
from refiners.parity.runner import CaseRunner
from refiners.parity.side import Observed, observe
from refiners.parity.time_limit import time_limit
from refiners.parity.torch_state import default_dtype, seed_torch
from refiners.parity.verdict import compare
from refiners.parity.weights import floating_entries

Outputs = Mapping[str, Tensor]
EXACT = frozenset({"repeats", "copied", "saved", "compiled"})
"""Cells that may not change a bit."""


class Outcome(StrEnum):
    """What became of a cell."""

    HOLDS = "holds"
    AS_UPSTREAM = "as upstream"
    """The relation holds on neither side, and both break it equally."""
    BROKEN = "BROKEN"
    NOT_APPLICABLE = "not applicable"


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


class _NotApplicable(Exception):
    """A cell has nothing to say about a case; the text says why."""


class Scene:
    """A case with both of its sides, ready to be run and changed.

    Receives:
        case: whose sides are built, with one set of weights.
    """

    def __init__(self, case: Case) -> None:
        self.case, self.lane = case, Lane("float64")
        self.runner = CaseRunner(case)
        self.upstream, self.port = self.runner.sides(self.lane)[:2]
        self.inputs: Inputs = place_inputs(draw_inputs(case), self.lane.dtype, self.lane.device)

    def run(self, model: nn.Module, inputs: Inputs | None = None, *, is_port: bool = True) -> Outputs:
        """The outputs of a model, which may be another than that of the scene, as tensors of their own."""
        run = self.case.run_port if is_port else self.case.run_upstream
        seed_torch(self.case.seed)
        with torch.no_grad():
            outputs = run(model, copy_for_one_side(self.inputs if inputs is None else inputs, gradients=False))
        return {name: tensor.detach().clone() for name, tensor in outputs.items()}

    @cached_property
    def first(self) -> tuple[Outputs, Outputs]:
        """What upstream and the port compute, unchanged."""
        return self.run(self.upstream, is_port=False), self.run(self.port)

    def built_anew(self) -> nn.Module:
        """The port as its builder makes it, with weights of its own and another seed."""
        seed_torch(self.case.seed + 1)
        with default_dtype(self.lane.dtype):
            return self.case.port().eval()


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
        raise _NotApplicable("its inputs are a batch of one")

    def item(index: int) -> Inputs:
        return {name: v.narrow(axes[name], index, 1) if name in axes else v for name, v in scene.inputs.items()}

    outputs = [scene.run(model, item(index), is_port=is_port) for index in range(count)]
    return {name: torch.cat([output[name] for output in outputs]) for name in outputs[0]}


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
    graphs: list[int] = []

    def interpret(graph: torch.fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    made = copy.deepcopy(model)
    cast(Any, made).compile(backend=interpret, fullgraph=True)
    try:
        outputs = scene.run(made)
    finally:
        cast(Any, torch.compiler).reset()
    if not graphs:
        raise _NotApplicable("it runs parts of the model only, never the model that is compiled")
    return outputs


def _cuda(scene: Scene, model: nn.Module, is_port: bool, *, device: str = "cuda") -> Outputs:
    if device == "cuda" and not torch.cuda.is_available():
        raise _NotApplicable("torch sees no CUDA device here")
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
CELLS = (*CHANGES, "checkpointed")


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
            return _checkpointed(scene) if cell == "checkpointed" else _related(scene, cell)
    except _NotApplicable as told:
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
    return _unequal(pairs, exact=exact)


def _unequal(pairs: Sequence[Pair], *, exact: bool = False) -> str:
    for pair in pairs:
        found = compare(pair, None)
        rounded = found.difference is not None and not found.fault and rounding.agrees_in_float64(found.difference)
        if not found.bitwise and (exact or not rounded):
            why = f": {found.fault}" if found.fault else ""
            return f"{pair} changes{why}{f' ({found.worst})' if found.worst else ''}"
    return ""


def _checkpointed(scene: Scene) -> tuple[Outcome, str]:
    """Upstream recomputing its activations, against the port, which does so too where it can."""
    case = scene.case
    if not case.gradients:
        raise _NotApplicable("the case compares no gradients")
    if not callable(getattr(scene.upstream, "gradient_checkpointing_enable", None)):
        raise _NotApplicable("upstream has no gradient checkpointing")
    plain = _calls(scene, scene.upstream)[1]
    ours, recomputed = _calls(scene, _checkpointing(scene.upstream))
    if recomputed <= plain:
        raise _NotApplicable("upstream recomputes nothing with its gradient checkpointing on")
    can = callable(getattr(scene.port, "gradient_checkpointing_enable", None))
    theirs, _ = _calls(scene, _checkpointing(scene.port) if can else scene.port, is_port=True)
    pairs, faults = pair_outputs(ours, theirs)
    gradients, more = pair_gradients(ours, theirs, (scene.upstream, scene.port), case.key_map)
    pairs += [pair for pair in gradients if not any(matches(noise, pair.name) for noise in case.without_influence)]
    reason = "; ".join([*faults, *more]) or _unequal(pairs)
    return (Outcome.BROKEN, reason) if reason else (Outcome.HOLDS, "")


def _checkpointing(model: nn.Module) -> nn.Module:
    """A copy that trains, as recomputing asks for, without dropping anything."""
    made = copy.deepcopy(model).train()
    for module in modules(made):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    cast(Any, made).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return made


def _calls(scene: Scene, model: nn.Module, *, is_port: bool = False) -> tuple[Observed, int]:
    """Outputs and gradients of a model, and how many modules were called on the way, the backward pass included."""
    case, called = scene.case, [0]

    def count(_: nn.Module, __: Any) -> None:
        called[0] += 1

    handle = register_module_forward_pre_hook(count)
    try:
        run = case.run_port if is_port else case.run_upstream
        dtype = scene.lane.dtype
        seen = observe(model, run, scene.inputs, taps={}, gradients=True, seed=case.seed, rounded_to=dtype)
    finally:
        handle.remove()
    return seen, called[0]
