"""Upstream moved, or we? What upstream computed once, kept as a few numbers, tells which side has changed.

A port that parts from its upstream under another version of it says nothing about who moved. So the outputs of every
case are summarised at the pinned versions, in float64: shape, dtype, norm and a few projections on random vectors. They
are compared by closeness (`rounding.FLOAT64_AGREEMENT`), since bits do not survive another processor; upstream itself
still runs in the same process as the port, and the verdict is theirs alone.

| upstream is as it was | the port is as upstream was | |
|---|---|---|
| yes | no | the port moved |
| no | yes | upstream moved |
| no | no, and both are equal | both moved together: torch, the weights or the inputs did |
| no | no, and they differ | both moved |
| yes | yes, and they differ | bits only: an order of operations, or a cast |

The leaf is found by `refiners.parity.explain`: whichever side did not move is the reference for the other.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from refiners.errors import ParityError
from refiners.parity import rounding
from refiners.parity.case import Case
from refiners.parity.environment import origin_of, package_behind, version_of
from refiners.parity.explain import explain
from refiners.parity.inputs import draw_inputs, named_tensors
from refiners.parity.lanes import Lane, held_equal
from refiners.parity.ledger import Ledger
from refiners.parity.pairing import Kind, truth_tensors
from refiners.parity.result import Result, Verdict
from refiners.parity.runner import CaseRunner
from refiners.parity.side import Observed
from refiners.parity.time_limit import time_limit
from refiners.parity.torch_state import default_dtype, seed_torch
from refiners.parity.weights import generator_for

TRUTH = Lane("float64")
PROJECTIONS = 2


@dataclass(frozen=True)
class Summary:
    """One tensor in a few numbers."""

    shape: tuple[int, ...]
    dtype: str
    finite: int
    """How many of its elements are."""
    norm: float
    projections: tuple[float, ...]
    """Its products with random vectors, which depend on its name alone."""

    @classmethod
    def of(cls, name: str, tensor: Tensor, count: int = PROJECTIONS) -> "Summary":
        """Summarises a tensor by so many projections; elements that are not finite count as zero."""
        values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        values = values.detach().cpu().to(torch.float64).flatten()
        finite = values.isfinite()
        values = torch.where(finite, values, 0.0)
        vectors = (
            torch.randn(values.shape, generator=generator_for(i, name), dtype=torch.float64) for i in range(count)
        )
        projections = tuple(float(values @ vector) for vector in vectors)
        dtype = str(tensor.dtype).removeprefix("torch.")
        return cls(tuple(tensor.shape), dtype, int(finite.sum()), float(values.square().sum().sqrt()), projections)

    def to_json(self) -> list[Any]:
        """Short, for there are thousands."""
        return [list(self.shape), self.dtype, self.finite, self.norm, *self.projections]

    @classmethod
    def from_json(cls, data: Sequence[Any]) -> "Summary":
        """The inverse of `to_json`."""
        shape, dtype, finite, norm, *projections = data
        return cls(tuple(shape), dtype, finite, norm, tuple(projections))

    def apart(self, other: "Summary") -> str:
        """How another tensor differs from this one by more than rounding explains; "" when it does not."""
        if self.shape != other.shape:
            return f"shape {other.shape}, {self.shape} before"
        if self.dtype != other.dtype:
            return f"{other.dtype}, {self.dtype} before"
        if self.finite != other.finite:
            return f"{other.finite} finite elements, {self.finite} before"
        numbers = zip((self.norm, *self.projections), (other.norm, *other.projections), strict=True)
        distance = max(abs(before - after) for before, after in numbers)
        error = distance / self.norm if self.norm else float("inf") if distance else 0.0
        if rounding.agrees_in_float64(rounding.Error(error, error, self.finite)):
            return ""
        return f"off by {error:.2g} of its norm"


@dataclass(frozen=True)
class Stored:
    """What is kept of a case."""

    upstream: str
    """The package that its upstream comes from, with its version."""
    module: str
    """Where the case is listed."""
    drawn: Mapping[str, Summary]
    """Its inputs, and all of its weights together: where they differ, the outputs say nothing."""
    outputs: Mapping[str, Summary]
    """Outputs and taps of upstream."""

    def to_json(self) -> dict[str, Any]:
        """Only strings, numbers, lists and dicts."""
        drawn, outputs = ({name: one.to_json() for name, one in some.items()} for some in (self.drawn, self.outputs))
        return {"upstream": self.upstream, "module": self.module, "drawn": drawn, "outputs": outputs}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Stored":
        """The inverse of `to_json`."""
        drawn, outputs = (
            {name: Summary.from_json(one) for name, one in data[key].items()} for key in ("drawn", "outputs")
        )
        return cls(data["upstream"], data["module"], drawn, outputs)


def load(path: Path) -> dict[str, Stored]:
    """Reads the summaries of all cases.

    Raises:
        ParityError: the file cannot be read.
    """
    try:
        data = cast(dict[str, Any], json.loads(path.read_text(encoding="utf-8")))
        return {case: Stored.from_json(one) for case, one in data["cases"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        told = f"{path} holds no summaries: {type(error).__name__}: {error}."
        raise ParityError(f"{told} Write it with `refiners parity drift --write`.") from error


def save(path: Path, stored: Mapping[str, Stored]) -> None:
    """Writes the summaries, one case a line so that a change is one line of a diff."""
    lines = [
        f"{json.dumps(case)}: {json.dumps(one.to_json(), separators=(',', ':'))}"
        for case, one in sorted(stored.items())
    ]
    path.write_text('{"cases": {\n' + ",\n".join(lines) + "\n}}\n", encoding="utf-8")


class Side(StrEnum):
    """Which side has changed."""

    NONE = "nothing moved"
    UPSTREAM = "upstream moved"
    PORT = "the port moved"
    BOTH = "both moved"
    TOGETHER = "both moved together"
    BITS = "bits only"
    ABSENT = "absent"
    """Upstream's class is not in the installed version."""
    UNKNOWN = "unknown"
    """Nothing is stored of the case, what both sides are made of is not what it was, or upstream raises as it is."""


@dataclass
class Drift:
    """What became of a case under the installed versions."""

    case: str
    side: Side
    upstream: str = ""
    before: str = ""
    reasons: list[str] = field(default_factory=list[str])
    leaves: list[str] = field(default_factory=list[str])
    """The nodes of the port to look at, each with its counterpart upstream."""
    verdicts: dict[str, str] = field(default_factory=dict[str, str])
    """Lane → verdict, as `refiners parity run` gives it."""

    @property
    def is_equal(self) -> bool:
        """Whether the port may stand beside this upstream."""
        return self.side in (Side.NONE, Side.TOGETHER)

    def __str__(self) -> str:
        versions = f" ({self.before} -> {self.upstream})" if self.before != self.upstream and self.upstream else ""
        told = [f"{self.case}: {self.side}{versions}", *(f"    {reason}" for reason in self.reasons)]
        return "\n".join([*told, *(f"    at {leaf}" for leaf in self.leaves)])


class Scene:
    """Both sides of a case in the float64 lane, run once.

    Raises:
        Exception: whatever a side raises; `stage` says which.
    """

    def __init__(self, case: Case) -> None:
        self.case, self.runner = case, CaseRunner(case)
        self.stage = "building upstream"

    def run(self) -> None:
        """Builds, shares, computes."""
        with held_equal(TRUTH), default_dtype(torch.get_default_dtype()), time_limit(self.case.time_limit):
            seed_torch(self.case.seed)
            with default_dtype(TRUTH.dtype):
                self.origin = origin_of(self.case.upstream())
            self.stage = "handing the weights over"
            self.upstream, self.port, _ = self.runner.sides(TRUTH)
            self.stage = "running upstream"
            self.ours = self._summaries(self.upstream, is_port=False)
            self.stage = "running the port"
            self.theirs = self._summaries(self.port, is_port=True)

    def _summaries(self, model: nn.Module, *, is_port: bool) -> dict[str, Summary]:
        seen: Observed = self.runner.look(TRUTH, model, is_port=is_port, gradients=False)
        named = {
            name if kind is Kind.OUTPUT else f"{kind} {name}": tensor
            for (kind, name), tensor in truth_tensors(seen).items()
        }
        return {name: Summary.of(name, tensor) for name, tensor in named.items()}

    def drawn(self) -> dict[str, Summary]:
        """The inputs, and the weights in one."""
        inputs = {f"input {name}": Summary.of(name, tensor) for name, tensor in named_tensors(draw_inputs(self.case))}
        state = self.upstream.state_dict()
        sums = [Summary.of(key, state[key], count=3).projections for key in sorted(state)]
        return {**inputs, f"{len(state)} weights": Summary.of("weights", torch.tensor(sums, dtype=torch.float64))}


def summarise(case: Case, module: str) -> Stored:
    """What is to be kept of a case.

    Raises:
        ParityError: the case cannot be run.
    """
    scene = Scene(case)
    try:
        scene.run()
    except Exception as error:
        raise ParityError(f"{case.id} cannot be summarised: {scene.stage} raised {_line(error)}") from error
    return Stored(scene.origin, module, scene.drawn(), scene.ours)


def look(case: Case, stored: Stored | None, results: list[Result], ledger: Ledger, *, seconds: float = 20.0) -> Drift:
    """Which side of a case has changed, and where.

    Receives:
        case: any.
        stored: what is kept of it.
        results: of its lanes, under the installed versions.
        ledger: what may not be bitwise.
        seconds: of looking for the leaf.
    """
    verdicts = {result.lane: str(result.verdict) for result in results}
    equal = all(ledger.judge(result).accepted for result in results)
    scene = Scene(case)
    before = stored.upstream if stored else ""
    try:
        scene.run()
    except Exception as error:
        side, origin = _blame_for(error, scene, before)
        return Drift(case.id, side, origin, before, [f"{scene.stage} raised {_line(error)}"], verdicts=verdicts)
    if stored is None:
        return Drift(case.id, Side.UNKNOWN, scene.origin, "", ["nothing is stored of it"], verdicts=verdicts)
    found = _blame(scene, stored, equal=equal)
    found.verdicts = verdicts
    if not equal and found.side is not Side.UNKNOWN:
        found.leaves = _leaves(scene, results, seconds)
        found.reasons += [result.reason for result in results if result.verdict is not Verdict.BITWISE][:1]
    return found


def _blame_for(error: Exception, scene: Scene, before: str) -> tuple[Side, str]:
    """Who moved where one side raises, and which upstream is installed: one that is as it was has not moved."""
    package = package_behind(error)
    known = getattr(scene, "origin", "") or package.removesuffix(" is installed")
    origin = known or (version_of(before.partition(" ")[0]) if before else "")
    missing = scene.stage == "building upstream" and isinstance(error, ImportError | AttributeError)
    if missing and package.endswith("is installed"):
        return Side.ABSENT, origin
    if not before:
        return Side.UNKNOWN, origin
    if origin != before:
        return Side.UPSTREAM, origin
    return Side.UNKNOWN if scene.stage.endswith("upstream") else Side.PORT, origin


def _blame(scene: Scene, stored: Stored, *, equal: bool) -> Drift:
    drawn = _moved(stored.drawn, scene.drawn())
    ours, theirs = _moved(stored.outputs, scene.ours), _moved(stored.outputs, scene.theirs)
    told = [f"upstream's {what}" for what in ours] + [f"the port's {what}" for what in theirs]
    if equal:
        side = Side.TOGETHER if ours else Side.NONE
        told = [*drawn, *(f"upstream's {what}" for what in ours)]
    elif drawn:
        side, told = Side.UNKNOWN, [f"{what}: the two versions are not made of the same numbers" for what in drawn]
        side = Side.UPSTREAM if any("weights" in what for what in drawn) and scene.origin != stored.upstream else side
    else:
        side = {
            (True, True): Side.BOTH,
            (True, False): Side.UPSTREAM,
            (False, True): Side.PORT,
            (False, False): Side.BITS,
        }[bool(ours), bool(theirs)]
    return Drift(scene.case.id, side, scene.origin, stored.upstream, told[:4])


def _moved(before: Mapping[str, Summary], after: Mapping[str, Summary]) -> list[str]:
    """What is not as it was, a few words each."""
    told = [f"{name} is gone" for name in before if name not in after]
    told += [f"{name} is new" for name in after if name not in before]
    return told + [
        f"{name}: {why}" for name, one in before.items() if name in after and (why := one.apart(after[name]))
    ]


def _leaves(scene: Scene, results: list[Result], seconds: float) -> list[str]:
    """Where the two sides part: the port's path, and upstream's."""
    lanes = [result.lane for result in results if result.verdict is Verdict.DIFFERENT] or [TRUTH.name]
    lane = Lane(TRUTH.name if TRUTH.name in lanes else lanes[0].removesuffix("-cuda"))
    try:
        with time_limit(2 * seconds):
            found = explain(scene.runner, lane, seconds=seconds)
    except Exception as error:
        return [f"(no leaf was found: {_line(error)})"]
    return [
        f"{fault.finding.port or 'the model'}, upstream {fault.finding.upstream or 'outside of its modules'}"
        + (f": equal {fault.diagnosis}" if fault.diagnosis else "")
        for fault in found.faults[:3]
    ]


def _line(error: BaseException) -> str:
    cause = getattr(error, "error", None) or error.__cause__ or error
    package = package_behind(cause)
    first = next(iter(str(cause).strip().splitlines()), "")
    return f"{type(cause).__name__}: {first}{f' ({package})' if package else ''}"
