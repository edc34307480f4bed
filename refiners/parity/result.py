"""What a run says: one `Result` for each case and lane, readable by people and by machines."""

from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any

from refiners.parity.bits import Worst


class Verdict(StrEnum):
    """How equal a port is to its upstream in one lane."""

    BITWISE = "BITWISE"
    """Every compared tensor has the same shape, dtype and bits."""
    ROUNDING = "ROUNDING"
    """Equal in float64 to within rounding, and no further from the truth than upstream's own rounding explains."""
    DIFFERENT = "DIFFERENT"
    """Anything else, including what could not be compared."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """The verdict on one case in one lane, and what it rests on."""

    case: str
    lane: str
    verdict: Verdict
    besides_dtypes: Verdict | None = None
    """For a result that is DIFFERENT because a dtype computes elsewhere: the verdict on the values alone."""
    reasons: tuple[str, ...] = ()
    """Why it is not BITWISE, the weightiest first."""
    notes: tuple[str, ...] = ()
    """What is worth knowing and is no fault."""
    tensors: int = 0
    """Compared tensors: outputs, taps and gradients."""
    elements: int = 0
    """Their elements."""
    elements_by_kind: dict[str, int] = field(default_factory=dict[str, int])
    """The same, of outputs, taps and gradients apart."""
    leaves: int = 0
    """Leaves of the port that hold parameters and ran."""
    worst: Worst | None = None
    """The element that differs most, in the outputs if they differ, else in the gradients."""
    error_upstream: float | None = None
    """Relative error of upstream's outputs against float64, root mean square; None where there is no truth."""
    error_port: float | None = None
    """The same of the port's outputs."""
    gradient_error_upstream: float | None = None
    gradient_error_port: float | None = None
    without_gradient: float | None = None
    """Share of upstream's weights whose gradient is exactly zero."""
    upstream: str = ""
    """The package that upstream's class comes from, with its version."""
    seconds: float = 0.0
    traceback: str = ""

    @property
    def id(self) -> str:
        """`case[lane]`, the name of its test."""
        return f"{self.case}[{self.lane}]"

    @property
    def reason(self) -> str:
        """The weightiest reason, or an empty string."""
        return self.reasons[0] if self.reasons else ""

    def to_json(self) -> dict[str, Any]:
        """Only strings, numbers, lists and dicts."""
        data = {**asdict(self), "verdict": str(self.verdict), "reasons": list(self.reasons), "notes": list(self.notes)}
        if data.pop("besides_dtypes"):
            data["besides_dtypes"] = str(self.besides_dtypes)
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Result":
        """The inverse of `to_json`; keys of later versions are left out."""
        known: dict[str, Any] = {own.name: data[own.name] for own in fields(cls) if own.name in data}
        worst: dict[str, Any] = dict(known.get("worst") or {})
        known["verdict"] = Verdict(known["verdict"])
        if known.get("besides_dtypes"):
            known["besides_dtypes"] = Verdict(known["besides_dtypes"])
        known["reasons"], known["notes"] = tuple(known.get("reasons", ())), tuple(known.get("notes", ()))
        if worst:
            worst["index"] = tuple(worst["index"])
            known["worst"] = Worst(**worst)
        return cls(**known)
