"""A case with both of its sides, ready to be run and changed: the stage of `refiners.parity.cells.metamorphic`."""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from functools import cached_property

import torch
from torch import Tensor, nn

from refiners.parity import rounding
from refiners.parity.case import Case, Inputs
from refiners.parity.inputs import copy_for_one_side, draw_inputs, place_inputs
from refiners.parity.lanes import Lane
from refiners.parity.pairing import Pair
from refiners.parity.runner import CaseRunner
from refiners.parity.torch_state import default_dtype, seed_torch
from refiners.parity.verdict import compare

Outputs = Mapping[str, Tensor]


class Outcome(StrEnum):
    """What became of a cell."""

    HOLDS = "holds"
    AS_UPSTREAM = "as upstream"
    """The relation holds on neither side, and both break it equally."""
    BROKEN = "BROKEN"
    NOT_APPLICABLE = "not applicable"


class NotApplicable(Exception):
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


def unequal(pairs: Sequence[Pair], *, exact: bool = False) -> str:
    """What differs more than rounding explains, or at all where it has to be exact; "" when nothing does."""
    for pair in pairs:
        found = compare(pair, None)
        rounded = found.difference is not None and not found.fault and rounding.agrees_in_float64(found.difference)
        if not found.bitwise and (exact or not rounded):
            why = f": {found.fault}" if found.fault else ""
            return f"{pair} changes{why}{f' ({found.worst})' if found.worst else ''}"
    return ""
