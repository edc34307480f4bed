"""Parameters of solvers: frozen numbers under the names that papers and published configurations use.

The base classes hold what several solvers share. Each solver adds its own fields and keeps upstream's default values,
since a published configuration leaves out what equals them. A field with `metadata=SAMPLING` is an option of the
sampling, which no published configuration holds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from types import NoneType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from refiners.errors import InputError

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
"""How the noise that one training step adds grows with time; see `reference_ports.solvers.noise`."""

PredictionType = Literal["epsilon", "sample", "v_prediction"]
"""What the denoiser predicts: the noise, the clean sample, or the velocity (arXiv:2202.00512)."""

TimestepSpacing = Literal["linspace", "leading", "trailing"]
"""Where the timesteps stand, as in table 2 of arXiv:2305.08891."""

FinalSigma = Literal["zero", "sigma_min"]
"""Where the last step leads: to no noise, or to the smallest noise of the training."""

SAMPLING: Mapping[str, bool] = {"sampling": True}
"""Metadata of a field that is no part of a published configuration."""


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """What every solver has.

    Raises:
        InputError: a value is not among those that its field allows. Lists all that do not fit.
    """

    foreign_values: ClassVar[Mapping[str, Mapping[str, str | None]]] = {}
    """Values that only other solvers have, and what they stand for when their configuration is read for this one."""

    num_train_timesteps: int = 1000
    """Timesteps of the training are 0 … num_train_timesteps - 1."""

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)!r}, it must be {expected(kind)}"
            for name, kind in kinds_of(type(self)).items()
            if not fits(getattr(self, name), kind)
        ]
        problems += self.problems()
        if problems:
            raise InputError(f"{type(self).__name__} cannot be used: {'; '.join(problems)}.")

    def problems(self) -> list[str]:
        """What does not fit together, one line each."""
        count = self.num_train_timesteps
        return [] if type(count) is not int or count > 0 else [f"num_train_timesteps is {count}, it must be above 0"]


@dataclass(frozen=True, kw_only=True)
class BetaParameters(Parameters):
    """The noise of the training, given by its betas (arXiv:2006.11239)."""

    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: BetaSchedule = "linear"
    trained_betas: tuple[float, ...] | None = None
    """The betas themselves, instead of the three numbers above."""


@dataclass(frozen=True, kw_only=True)
class ZeroTerminalSNRParameters(BetaParameters):
    """Betas that may be moved so that nothing of the sample is left at the last timestep (arXiv:2305.08891)."""

    rescale_betas_zero_snr: bool = False


@dataclass(frozen=True, kw_only=True)
class ClippingParameters(Parameters):
    """Bounds of the predicted sample: none, a fixed one, or dynamic thresholding (arXiv:2205.11487)."""

    clip_sample: bool = True
    clip_sample_range: float = 1.0
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0


@dataclass(frozen=True, kw_only=True)
class SigmaSpacingParameters(Parameters):
    """Noise levels that are spaced by themselves instead of following the timesteps; at most one is true.

    Only `EulerDiscreteScheduler` and `UniPCMultistepScheduler` declare the two bounds. Upstream's other schedulers obey
    those of a file as well, whichever class it was written for.
    """

    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    """The bounds of noise levels that are spaced by themselves; those of the schedule unless given."""

    def problems(self) -> list[str]:
        chosen = [name for name in SPACINGS if getattr(self, name)]
        return [*super().problems(), *([f"{' and '.join(chosen)} exclude one another"] if len(chosen) > 1 else [])]


SPACINGS = tuple(field.name for field in fields(SigmaSpacingParameters) if field.name.startswith("use_"))
"""The names of the kinds of spacing."""


@cache
def kinds_of(cls: type[Parameters]) -> dict[str, Any]:
    """The declared type of each field, in order."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of the kind that a field declares."""
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if kind is float:
        return type(value) in (int, float)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(fits(item, get_args(kind)[0]) for item in value)  # pyright: ignore[reportUnknownVariableType]: any tuple
    alternatives = get_args(kind) if get_origin(kind) is not None else ()
    return any(fits(value, one) for one in alternatives) if alternatives else type(value) is kind


def expected(kind: Any) -> str:
    """What a field takes, in words."""
    names = {int: "a whole number", float: "a number", bool: "true or false", NoneType: "None"}
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(repr, get_args(kind)))}"
    if get_origin(kind) is tuple:
        return f"a tuple, each item {expected(get_args(kind)[0])}"
    if get_origin(kind) is Union or get_args(kind):
        return " or ".join(map(expected, get_args(kind)))
    return names.get(kind, str(kind))
