"""What adapters of layers are built from."""

from functools import cache
from typing import Any, NamedTuple, TypedDict, TypeVar, Unpack, cast

import torch
from torch import Tensor, nn

from refiners.errors import AdapterTypeError
from refiners.fluxion.adapters.merging import parameters_of
from refiners.fluxion.layers.factory import Factory
from refiners.fluxion.layers.linear import Linear

T = TypeVar("T", bound=nn.Module)


class Weight(NamedTuple):
    """Where a tensor of an adapter is, and which of its axes are as long as the rank."""

    module: nn.Module
    name: str
    rank_axes: tuple[int, ...] = ()

    @property
    def tensor(self) -> nn.Parameter:
        """The parameter."""
        # Past torch's `__getattr__`, which takes longer than all else that is asked of a parameter.
        parameter = parameters_of(self.module).get(self.name)
        return cast(nn.Parameter, getattr(self.module, self.name)) if parameter is None else parameter

    def put(self, parameter: nn.Parameter) -> None:
        """Put another parameter there, as long as nobody else has seen the adapter."""
        parameters_of(self.module)[self.name] = parameter


class Strength(TypedDict, total=False):
    """How strong an adapter is, see `Delta`."""

    scale: float
    alpha: float | None
    rank_stabilized: bool


def require_rank(rank: int, adapter: object, name: str) -> None:
    """Nothing, if a rank is one.

    Raises:
        AdapterTypeError: It is less than 1.
    """
    if rank < 1:
        raise AdapterTypeError(f"{type(adapter).__name__} {name!r} has rank {rank}: the rank is 1 or more.")


def placed_like(target: nn.Module, device: torch.device | str | None, dtype: torch.dtype | None) -> Factory:
    """The device and the dtype that are given, or else those of a layer's weight, if it is a floating one."""
    weight = cast(Tensor, target.weight)
    if dtype is None and weight.is_floating_point():
        dtype = weight.dtype
    return Factory(device=device or weight.device, dtype=dtype)


@cache
def _a_linear() -> tuple[dict[str, Any], list[tuple[str, type[Any]]]]:
    """What torch gives a Linear: values that all may share, and containers of which each has its own."""
    given = vars(Linear(1, 1, bias=False, device="meta"))
    containers: dict[str, type[Any]] = {key: type(value) for key, value in given.items() if hasattr(value, "__len__")}
    return {key: value for key, value in given.items() if key not in containers}, list(containers.items())


def linear_without_initial_weights(
    in_features: int, out_features: int, bias: bool, **factory: Unpack[Factory]
) -> Linear:
    """As `without_initial_weights`, of what LoRAs are mostly made of: in less than half of the time.

    It has whatever torch gives a Linear, with sizes and parameters of its own.
    """
    layer = object.__new__(Linear)
    own = vars(layer)
    values, containers = _a_linear()
    own.update(values, in_features=in_features, out_features=out_features)
    for name, container in containers:
        own[name] = container()
    parameters = own["_parameters"]
    parameters["weight"] = nn.Parameter(torch.empty((out_features, in_features), **factory))
    parameters["bias"] = nn.Parameter(torch.empty(out_features, **factory)) if bias else None
    return layer


def in_mode_of(layer: nn.Module, module: T) -> T:
    """A module that was just built, in the training mode of a layer: `train(layer.training)` in less time."""
    if layer.training:
        return module  # as everything that is just built
    waiting: list[nn.Module] = [module]
    while waiting:
        own = vars(waiting.pop())
        own["training"] = layer.training
        waiting.extend(own["_modules"].values())
    return module


def without_initial_weights(kind: type[T], *args: Any, **kwargs: Any) -> T:
    """Build a layer whose weights are not drawn, since others are about to be put there.

    Drawing them would take most of the time, above all on the meta device, where there is nothing to draw.
    """
    layer = object.__new__(kind)
    # Found before the method of the class, which the constructor calls.
    layer.__dict__["reset_parameters"] = lambda: None
    kind.__init__(layer, *args, **kwargs)
    del layer.__dict__["reset_parameters"]
    return layer
