"""Solvers from published configurations, and by the names that a command line gives them.

A `scheduler_config.json` of diffusers names its class and holds the values that differ from the class's defaults. It
is usual to read one class's file with another class, and files of Stable Diffusion hold attributes of several: so those
that only other solvers have are left aside, as upstream does. Attributes that no solver has are refused.
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin

from reference_ports.solvers.consistency import LCM, TCD
from reference_ports.solvers.ddim import DDIM
from reference_ports.solvers.ddpm import DDPM
from reference_ports.solvers.dpm import DPMMultistep, DPMSingleStep
from reference_ports.solvers.euler import Euler, EulerAncestral
from reference_ports.solvers.flow_euler import FlowEuler
from reference_ports.solvers.parameters import Parameters, kinds_of
from reference_ports.solvers.pndm import PNDM
from reference_ports.solvers.solver import Solver
from reference_ports.solvers.two_calls import KDPM2, Heun, KDPM2Ancestral
from reference_ports.solvers.unipc import UniPC
from refiners.conversion import DIFFUSERS_NEUTRAL, ConfigReader
from refiners.errors import ConversionError, InputError

P = TypeVar("P", bound=Parameters)
AnySolver = Solver[Any]

CLASSES: Mapping[str, type[AnySolver]] = {
    "DDIMScheduler": DDIM,
    "DDPMScheduler": DDPM,
    "DPMSolverMultistepScheduler": DPMMultistep,
    "DPMSolverSinglestepScheduler": DPMSingleStep,
    "EulerAncestralDiscreteScheduler": EulerAncestral,
    "EulerDiscreteScheduler": Euler,
    "FlowMatchEulerDiscreteScheduler": FlowEuler,
    "HeunDiscreteScheduler": Heun,
    "KDPM2AncestralDiscreteScheduler": KDPM2Ancestral,
    "KDPM2DiscreteScheduler": KDPM2,
    "LCMScheduler": LCM,
    "PNDMScheduler": PNDM,
    "TCDScheduler": TCD,
    "UniPCMultistepScheduler": UniPC,
}
"""The solver for each class of diffusers."""


@dataclass(frozen=True)
class Recipe:
    """A solver with some of its parameters."""

    solver: type[AnySolver]
    changes: Mapping[str, Any]


KARRAS = {"use_karras_sigmas": True}
SDE = {"algorithm_type": "sde-dpmsolver++"}

SOLVERS: Mapping[str, Recipe] = {
    "ddim": Recipe(DDIM, {}),
    "ddpm": Recipe(DDPM, {}),
    "pndm": Recipe(PNDM, {}),
    "dpm++2m": Recipe(DPMMultistep, {}),
    "dpm++2m-karras": Recipe(DPMMultistep, KARRAS),
    "dpm++2m-sde": Recipe(DPMMultistep, SDE),
    "dpm++2m-sde-karras": Recipe(DPMMultistep, {**SDE, **KARRAS}),
    "dpm++3m": Recipe(DPMMultistep, {"solver_order": 3}),
    "dpm++2s": Recipe(DPMSingleStep, {}),
    "dpm++2s-karras": Recipe(DPMSingleStep, KARRAS),
    "euler": Recipe(Euler, {}),
    "euler-karras": Recipe(Euler, KARRAS),
    "euler-a": Recipe(EulerAncestral, {}),
    "heun": Recipe(Heun, {}),
    "heun-karras": Recipe(Heun, KARRAS),
    "kdpm2": Recipe(KDPM2, {}),
    "kdpm2-karras": Recipe(KDPM2, KARRAS),
    "kdpm2-a": Recipe(KDPM2Ancestral, {}),
    "lcm": Recipe(LCM, {}),
    "tcd": Recipe(TCD, {}),
    "unipc": Recipe(UniPC, {}),
    "unipc-karras": Recipe(UniPC, KARRAS),
    "flow-euler": Recipe(FlowEuler, {}),
}
"""The solvers that a command line can name."""

_ONLY = {"solver_p": None}
_OTHERS = "belongs to other solvers, and upstream leaves it aside as well"


def from_config(
    config: Mapping[str, Any],
    num_inference_steps: int | None = None,
    *,
    solver: str | None = None,
    first_step: int = 0,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
    **changes: Any,
) -> AnySolver:
    """The solver of a scheduler_config.json, or another one with the noise of that configuration.

    Receives:
        config: the attributes of the file.
        num_inference_steps, first_step, timesteps, sigmas: see `Solver`.
        solver: a name of `SOLVERS`; the class that the configuration names unless given.
        changes: parameters that differ from the configuration, by name.

    Raises:
        ConversionError: the configuration has attributes, or values of them, that are not handled. Lists all.
        InputError: there is no such solver, or the schedule cannot be made.
    """
    recipe = Recipe(class_of(config), {}) if solver is None else recipe_of(solver)
    kind = recipe.solver.parameters_type
    parameters = parameters_from_config(kind, config, **{**recipe.changes, **changes})
    return recipe.solver(num_inference_steps, parameters, first_step=first_step, timesteps=timesteps, sigmas=sigmas)


def recipe_of(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        InputError: there is none.
    """
    if name not in SOLVERS:
        raise InputError(f"There is no solver {name!r}. There are {', '.join(SOLVERS)}.")
    return SOLVERS[name]


def class_of(config: Mapping[str, Any]) -> type[AnySolver]:
    """The solver that a configuration names.

    Raises:
        ConversionError: it names none, or one that is not here.
    """
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in CLASSES:
        raise ConversionError(
            f"The configuration is of {name!r}, there are solvers for {', '.join(CLASSES)}. "
            "Name one of `SOLVERS` to read the configuration with it."
        )
    return CLASSES[name]


def parameters_from_config(kind: type[P], config: Mapping[str, Any], **changes: Any) -> P:
    """The parameters that a configuration holds.

    Receives:
        kind: the dataclass of the solver's parameters.
        config: the attributes of a scheduler_config.json.
        changes: parameters that differ from the configuration, by name.

    Raises:
        ConversionError: attributes, or values of them, are not handled. Lists all.
        InputError: a change is no parameter, or no value of it.
    """
    own = {field.name: field for field in fields(kind) if not field.metadata.get("sampling")}
    if unknown := sorted(changes.keys() - {field.name for field in fields(kind)}):
        raise InputError(f"{kind.__name__} has no {', '.join(unknown)}.")
    defaults = config.get("_use_default_values") or ()
    skipped = {
        "_use_default_values",
        *defaults,
        *(n for n, value in config.items() if value is None and _may_be_null(kind, n)),
    }
    given = {name: value for name, value in config.items() if name not in skipped}
    neutral = {**DIFFUSERS_NEUTRAL, **dict.fromkeys(_all_names() - own.keys(), _OTHERS)}
    neutral |= dict.fromkeys(own.keys() & {"trained_betas"}, "numbers of one's own, checked below")
    with ConfigReader(given, kind.__name__.removesuffix("Parameters"), only=_ONLY, neutral=neutral) as read:
        values = {name: _read(read, kinds_of(kind)[name], field, kind.foreign_values) for name, field in own.items()}
    if "trained_betas" in given and "trained_betas" in own:
        values["trained_betas"] = tuple(given["trained_betas"])
    return kind(**{**values, **changes})


def _may_be_null(kind: type[Parameters], name: str) -> bool:
    """Whether null is a value of a parameter: None, or False as upstream reads it."""
    declared = kinds_of(kind).get(name)
    return declared is bool or NoneType in get_args(declared)


def _all_names() -> set[str]:
    kinds = {solver.parameters_type for solver in CLASSES.values()}
    return {field.name for kind in kinds for field in fields(kind) if not field.metadata.get("sampling")}


def _read(read: ConfigReader, kind: Any, field: Field[Any], foreign: Mapping[str, Mapping[str, str | None]]) -> Any:
    name, default = field.name, None if field.default is MISSING else field.default
    options = [option for option in get_args(kind) if option is not NoneType] if NoneType in get_args(kind) else [kind]
    if name == "trained_betas" or (default is None and name not in read.config):
        return default
    kind = options[0]
    if get_origin(kind) is Literal:
        choices = {**{value: value for value in get_args(kind)}, **foreign.get(name, {})}
        return read.choice(name, choices, **({} if default is None else {"default": default}))
    if get_origin(kind) is tuple:
        return read.integers(name, default or ())
    reader = {bool: read.flag, int: read.integer, float: read.number}[kind]
    return reader(name, *(() if default is None else (default,)))
