"""An explanation as plain data: strings and numbers that can be written to a file or sent from another process."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from refiners.parity.explain import Explanation
from refiners.parity.explained import plain
from refiners.parity.operations import Operation
from refiners.parity.reasons.alike import Alike, Look, alike
from refiners.parity.reasons.faults import Fault
from refiners.parity.reasons.teacher import Where

_MOST_OPERATIONS = 3
_LONGEST = 240


@dataclass(frozen=True, kw_only=True)
class ToldOperation:
    """An operation of one side and the line that asked for it."""

    what: str
    where: str
    code: str


@dataclass(frozen=True, kw_only=True)
class ToldFault:
    """One place at which the sides part."""

    port: str
    """Path in the port; "" is its root."""
    upstream: str
    headline: str
    diagnosis: str
    """What makes both sides equal; "" when nothing that was tried does."""
    was_run: bool
    upstream_operations: tuple[ToldOperation, ...] = ()
    port_operations: tuple[ToldOperation, ...] = ()
    suspects: tuple[str, ...] = ()
    shows_in: str = ""
    shapes: tuple[str, str] = ("", "")
    worst: str = ""


@dataclass(frozen=True, kw_only=True)
class LeafError:
    """How far the port is from upstream behind one leaf, when nothing is taught."""

    port: str
    upstream: str
    error: float | None
    """Root mean square of the difference, relative to upstream's values; None where it is not finite."""
    mark: str = ""
    """`equal`, `introduces` or `propagates`."""


@dataclass(frozen=True, kw_only=True)
class Told:
    """Where and why a port differs from its upstream in one lane."""

    title: str
    lane: str
    text: str
    """The explanation as a terminal shows it."""
    command: str = ""
    faults: tuple[ToldFault, ...] = ()
    depth: tuple[LeafError, ...] = ()
    """The paired leaves in the order of the port's forward."""
    notes: tuple[str, ...] = ()

    @property
    def kinds(self) -> list[Alike[ToldFault]]:
        """The faults, those of like leaves with the same words together."""
        return alike(self.faults, _look)

    def to_json(self) -> dict[str, Any]:
        """Only strings, numbers, lists and dicts."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Told":
        """The inverse of `to_json`."""
        faults = tuple(_fault_from(fault) for fault in data["faults"])
        depth = tuple(LeafError(**error) for error in data["depth"])
        given: dict[str, Any] = {**data, "faults": faults, "depth": depth, "notes": tuple(data["notes"])}
        return cls(**given)


def _look(fault: ToldFault) -> Look:
    operations = (*fault.upstream_operations, *fault.port_operations)
    lines = () if fault.diagnosis else tuple((operation.where, operation.code) for operation in operations)
    return Look(fault.port, fault.diagnosis, (fault.was_run, fault.headline, lines))


def _fault_from(data: dict[str, Any]) -> ToldFault:
    sides: dict[str, Any] = {
        name: tuple(ToldOperation(**operation) for operation in data[name])
        for name in ("upstream_operations", "port_operations")
    }
    sides |= {"suspects": tuple(data["suspects"]), "shapes": tuple(data["shapes"])}
    return ToldFault(**{**data, **sides})


@dataclass
class Depth:
    """What was seen of the error along the forward; empty where it could not be looked at."""

    errors: list[LeafError] = field(default_factory=list[LeafError])
    note: str = ""


def tell(explanation: Explanation, lane: str, depth: Depth) -> Told:
    """The explanation as data.

    Receives:
        lane: in which the verdict was given; the explanation may have turned to float64.
        depth: the error along the forward.
    """
    notes = [*explanation.notes, *([depth.note] if depth.note else [])]
    return Told(
        title=explanation.title,
        lane=lane,
        text=plain(explanation),
        command=explanation.command,
        faults=tuple(_tell_fault(fault, explanation.port) for fault in explanation.faults),
        depth=tuple(depth.errors),
        notes=tuple(notes),
    )


def _tell_fault(fault: Fault, port: nn.Module) -> ToldFault:
    finding, point = fault.finding, fault.finding.point
    if point.agrees:
        headline = "computes the same values as upstream in other dtypes"
    elif point.where is Where.OUTPUT and point.shapes[1] == "nothing":
        headline = f"does not return the output `{point.port}`"
    elif finding.is_leaf:
        headline = "receives what upstream's leaf receives, and returns something else"
    elif finding.port_operations:
        headline = "computes something else than upstream from the same values"
    else:
        headline = "passes on a value that upstream changes first"
    return ToldFault(
        port=finding.port,
        upstream=finding.upstream,
        headline=headline,
        diagnosis=fault.diagnosis,
        was_run=fault.was_run,
        upstream_operations=_operations(finding.upstream_operations),
        port_operations=_operations(finding.port_operations),
        suspects=tuple(finding.suspects[:6]),
        shows_in=f"the output `{point.port}`" if point.where is Where.OUTPUT else f"what {point.port} {point.where}",
        shapes=point.shapes,
        worst=str(point.worst).removeprefix(point.worst.tensor) if point.worst else "",
    )


def _operations(operations: Sequence[Operation]) -> tuple[ToldOperation, ...]:
    return tuple(
        ToldOperation(
            what=_shortened(str(operation)),
            where=str(operation.source or ""),
            code=_shortened(operation.source.code) if operation.source else "",
        )
        for operation in operations[:_MOST_OPERATIONS]
    )


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
