"""Mutation: faults planted in a port that is right, to see whether its case tells.

A case whose port and upstream are equal is run again and again, each time with one small mistake in the port, planted
after both sides share their weights and taken back afterwards. A mutant that the case calls equal *survives*: the case
could not tell such a mistake in a real port either. `refiners.parity.mutants.kills` gathers what all cases of a family
tell.

Mutants run in the float64 lane, where rounding hides nothing that is larger than 1e-16: an eps of 1e-11 for 1e-12
changes no bit of a float32 norm. Mistakes of precision that it does not tell are tried in bfloat16 as well; most hide
better there, since many a kernel computes in float32 by itself.
"""

import copy
import re
import time
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from refiners.errors import ParityError
from refiners.parity import verdict
from refiners.parity.bits import same_bits
from refiners.parity.case import Case, Inputs, Outputs
from refiners.parity.inputs import copy_for_one_side, draw_inputs, named_tensors, place_inputs
from refiners.parity.lanes import Lane, held_equal
from refiners.parity.mutants import call_operators, formula_operators, image_operators
from refiners.parity.mutants.calls import record
from refiners.parity.mutants.operators import OPERATORS, Operator, Site, sites
from refiners.parity.mutants.planting import Edit, Snapshot, Undo
from refiners.parity.pairing import Kind, Pair, pair_gradients, pair_outputs, truth_tensors
from refiners.parity.result import Verdict
from refiners.parity.runner import CaseRunner
from refiners.parity.side import Observed

_ = call_operators, formula_operators, image_operators  # they register their operators when they are imported


class Outcome(StrEnum):
    """What became of a mutant."""

    KILLED = "killed"
    SURVIVED = "survived"
    INERT = "inert"
    """The operator changed nothing at all: a fault of the operator."""


class How(StrEnum):
    """What told that a mutant is one: the first of these that did."""

    OUTPUT = "output"
    """An output is further away than rounding explains."""
    TAP = "tap"
    GRADIENT = "gradient"
    LEAF = "leaf"
    """A leaf did not run, or something else that no port may do."""
    BITS = "bits"
    """Bits differ, by no more than rounding explains. Red all the same: the bar is BITWISE."""
    EXCEPTION = "exception"
    """The port raised: it never came to a comparison."""


@dataclass(frozen=True)
class Mutant:
    """One fault at one node of one case's port."""

    case: str
    operator: str
    path: str
    parameter: str
    edit: Edit = field(compare=False, repr=False)
    site: Site = field(compare=False, repr=False)

    @property
    def id(self) -> str:
        """`case::operator::path::parameter`: plants the same fault again."""
        return f"{self.case}::{self.fault}"

    @property
    def fault(self) -> str:
        """The id without the case: the same fault in the ports of several cases."""
        return f"{self.operator}::{self.path}::{self.parameter}"

    @property
    def role(self) -> str:
        """The fault without the numbers of layers: `Layer_1.Linear_2` and `Layer_3.Linear_2` play one role."""
        *above, last = self.path.split(".")
        segments = [_unnumbered(name) for name in above] + [last if self.site.is_leaf else _unnumbered(last)]
        return f"{self.operator}::{'.'.join(segments)}::{self.parameter}"


def _unnumbered(name: str) -> str:
    return re.sub(r"_?\d+$", "", name)


@dataclass(frozen=True)
class Trial:
    """One mutant, run."""

    case: str
    fault: str
    role: str
    lane: str
    outcome: Outcome
    how: How | None = None
    detail: str = ""
    seconds: float = 0.0

    @property
    def id(self) -> str:
        """That of the mutant."""
        return f"{self.case}::{self.fault}"


class Bench:
    """A case built once in one lane, on which mutants are tried one after the other.

    Receives:
        case: it must be BITWISE in that lane.
        lane: where.

    Raises:
        ParityError: the case is not equal even without a fault.
    """

    def __init__(self, case: Case, lane: Lane) -> None:
        self.case, self.lane = case, lane
        self._runner = CaseRunner(case)
        self.upstream, self.port, _ = self._runner.sides(lane)
        self._inputs = place_inputs(draw_inputs(case), lane.dtype, lane.device)
        self._forward = self._outputs(self.upstream)
        self._backward: Observed | None = None
        self._snapshot = Snapshot(self.port)
        started = time.process_time()
        self.require_equal()
        self.seconds = time.process_time() - started
        self._snapshot.settle()
        """What one forward of the port costs, compared."""
        self.seen = record(self.port, lambda: self._run(self.port))

    def _run(self, model: nn.Module, inputs: Inputs | None = None) -> Outputs:
        run = self.case.run_port if model is self.port else self.case.run_upstream
        return run(model, copy_for_one_side(self._inputs if inputs is None else inputs, gradients=False))

    def _outputs(self, model: nn.Module, inputs: Inputs | None = None) -> Observed:
        """Outputs and taps, and nothing else: most mutants need no more to be told."""
        seen = Observed()
        torch.default_generator.manual_seed(self.case.seed)
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for path, other in self.case.taps.items():
                calls = seen.taps.setdefault(path, [])

                def keep(module: nn.Module, args: Any, output: Any, calls: list[Tensor] = calls) -> None:
                    calls.extend([tensor.clone() for _, tensor in named_tensors(output)][:1])

                tapped = model.get_submodule(path if model is self.port else other)
                stack.callback(tapped.register_forward_hook(keep).remove)
            seen.outputs = dict(self._run(model, inputs))
        return seen

    def _look(self, model: nn.Module) -> Observed:
        """Everything that the engine looks at, gradients among it."""
        return self._runner.look(self.lane, model, is_port=model is self.port, gradients=True)

    def require_equal(self) -> None:
        """Makes sure that the port without a fault equals upstream, bit for bit.

        Raises:
            ParityError: it does not.
        """
        how, detail = self._compare(gradients=False)
        if how is not None:
            raise ParityError(f"{self.case.id}[{self.lane.name}] is not equal without any fault: {detail}")

    def mutants(self, operators: Mapping[str, Operator] = OPERATORS) -> Iterator[Mutant]:
        """Every fault that the operators can plant in this port, node by node in the order of the tree."""
        for site in sites(self.port, self.seen):
            for name, operator in operators.items():
                for parameter, edit in operator.find(site):
                    yield Mutant(self.case.id, name, site.path, parameter, edit, site)

    def mutants_of_lane(self) -> list[Mutant]:
        """Those whose operator belongs in this lane."""
        return [mutant for mutant in self.mutants() if self.lane in lanes_of(mutant.operator, self.case)]

    @contextmanager
    def planted(self, mutant: Mutant) -> Generator[bool, None, None]:
        """The port has the fault inside, and is what it was afterwards. Gives whether anything was changed.

        Raises:
            ParityError: undoing the fault did not restore the port.
        """
        undo: Undo = mutant.edit()
        try:
            yield any(True for _ in self._snapshot.differences())
        finally:
            undo()
            self._snapshot.require_unchanged(mutant.id)

    def try_out(self, mutant: Mutant) -> Trial:
        """Plants a fault, runs the port, compares, takes the fault back."""
        started = time.perf_counter()
        how: How | None = None
        detail = ""
        with self.planted(mutant) as changed:
            if changed:
                try:
                    how, detail = self._compare(gradients=False)
                    if how is None and self.case.gradients:
                        how, detail = self._compare(gradients=True)
                except Exception as error:
                    how, detail = How.EXCEPTION, _first_line(error)
                finally:
                    self.port.zero_grad(set_to_none=True)
        outcome = Outcome.INERT if not changed else Outcome.SURVIVED if how is None else Outcome.KILLED
        seconds = round(time.perf_counter() - started, 4)
        return Trial(self.case.id, mutant.fault, mutant.role, self.lane.name, outcome, how, detail, seconds)

    def misses(self, name: str) -> bool:
        """Whether the case tells a port that does not read one of the inputs."""
        inputs = {key: value for key, value in self._inputs.items() if key != name}
        try:
            pairs, faults = pair_outputs(self._forward, self._outputs(self.port, inputs))
        except Exception:
            return True
        return _how(pairs, faults, self._forward, self.lane)[0] is not None

    def verdict_on(self, mutant: Mutant, truth: Observed, float64: Verdict | None) -> Verdict:
        """What the law says about the outputs of a port with a fault; DIFFERENT where it raises.

        Receives:
            truth: upstream in float64 on this lane's weights and inputs.
            float64: the verdict on the same fault in the float64 lane; it is not read in that lane.
        """
        right = truth_tensors(truth)
        with self.planted(mutant):
            try:
                pairs, faults = pair_outputs(self._forward, self._outputs(self.port))
            except Exception:
                return Verdict.DIFFERENT
            compared = [verdict.compare(pair, right.get((pair.kind, pair.name))) for pair in pairs]
            return verdict.judge(compared, faults, self.lane, float64_verdict=float64)[0]

    def truth(self) -> Observed:
        """Upstream's outputs in float64, on this lane's weights and inputs."""
        exact = copy.deepcopy(self.upstream).to(torch.float64)
        return self._outputs(exact, place_inputs(self._inputs, torch.float64, self.lane.device))

    def _compare(self, *, gradients: bool) -> tuple[How | None, str]:
        if not gradients:
            theirs = self._outputs(self.port)
            pairs, faults = pair_outputs(self._forward, theirs)
            return _how(pairs, faults, self._forward, self.lane)
        ours, theirs = self._upstream_gradients(), self._look(self.port)
        pairs, faults = pair_outputs(ours, theirs)
        found, unpaired = pair_gradients(ours, theirs, (self.upstream, self.port), self.case.key_map)
        faults += [*unpaired, *theirs.faults]
        faults += [f"never ran: {', '.join(sorted(theirs.silent_leaves))}"] if theirs.silent_leaves else []
        return _how([*pairs, *found], faults, ours, self.lane)

    def _upstream_gradients(self) -> Observed:
        if self._backward is None:
            self._backward = self._look(self.upstream)
            self.upstream.zero_grad(set_to_none=True)
        return self._backward


def _how(pairs: Sequence[Pair], faults: Sequence[str], ours: Observed, lane: Lane) -> tuple[How | None, str]:
    """The first thing that tells, and what it tells."""
    truth: Mapping[Any, Tensor] = truth_tensors(ours) if lane.is_truth else {}
    kinds = (
        (How.OUTPUT, [pair for pair in pairs if pair.kind is Kind.OUTPUT]),
        (How.TAP, [pair for pair in pairs if pair.kind is Kind.TAP]),
        (How.GRADIENT, [pair for pair in pairs if pair.kind.is_gradient]),
    )
    bits = ""
    for how, some in kinds:
        for pair in some:
            if pair.upstream.dtype == pair.port.dtype and same_bits(pair.upstream, pair.port):
                continue
            compared = verdict.compare(pair, truth.get((pair.kind, pair.name)))
            told, reasons = verdict.judge([compared], (), lane, float64_verdict=Verdict.BITWISE)
            if compared.fault or (lane.is_truth and told is Verdict.DIFFERENT):
                return how, reasons[0]
            bits = bits or str(compared.worst)
    if faults:
        return How.LEAF, faults[0]
    return (How.BITS, bits) if bits else (None, "")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"


@contextmanager
def bench(case: Case, lane: Lane) -> Generator[Bench, None, None]:
    """A `Bench`, with everything held equal that changes bits without being a fault."""
    with held_equal(lane), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield Bench(case, lane)


def lanes_of(operator: str, case: Case) -> list[Lane]:
    """Where the mutants of an operator are tried, one after the other: nowhere without a float64 lane."""
    if "float64" not in case.lanes:
        return []
    is_half = OPERATORS[operator].lanes == "half" and "bfloat16" in case.lanes
    return [Lane("float64"), Lane("bfloat16")] if is_half else [Lane("float64")]
