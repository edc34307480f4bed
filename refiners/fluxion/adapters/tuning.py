"""Norm tuning and bias tuning: a layer gets weights of its own kind in the place of some of its own, which stay.

| adapter | trains | follows |
|---|---|---|
| `NormTuningAdapter` | weight and bias of norms | arXiv 2312.11420, `peft.tuners.ln_tuning.layer` of peft 0.21.2 |
| `BiasTuningAdapter` | the bias of any layer | BitFit, arXiv 2106.10199; what peft trains with `bias="all"` |

Both begin with the layer's values. The layer itself is not touched, so that several tunings of one model can be kept,
and ejecting one gives the model back as it was. A layer takes one of them, and what else adapts it, such as a LoRA, has
to be injected before: the tuning then stands inside, next to the layer.

Differs from upstream: peft's BitFit trains the biases of the model itself.
"""

from typing import Any, ClassVar, cast

from torch import Tensor, nn
from torch.nn import functional

import refiners.fluxion.layers as fl
from refiners.errors import AdapterError, AdapterTypeError
from refiners.fluxion.adapters.sets import AdapterSet, MakesAdapter, TunedWeights, TuningAdapter
from refiners.fluxion.layers.branch import holders_of
from refiners.fluxion.selectors import Selection, select

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, fl.LayerNorm2d)
WITH_BIAS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LayerNorm, nn.GroupNorm, fl.LayerNorm2d)


class TunedCopy(TunedWeights):
    """Copies of some parameters of a layer, under their names."""

    def __init__(self, layer: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = names
        for name in names:
            value = cast(Tensor, getattr(layer, name))
            self.register_parameter(name, nn.Parameter(value.detach().clone()))

    @property
    def device(self) -> Any:
        return getattr(self, self.names[0]).device

    @property
    def dtype(self) -> Any:
        return getattr(self, self.names[0]).dtype


class CopyTuningAdapter(TuningAdapter):
    """A layer that computes with other values for some of its parameters. Abstract: a subclass says which."""

    uses_parameters_of_target = True
    parameter_names: ClassVar[tuple[str, ...]]
    layer_types: ClassVar[tuple[type[nn.Module], ...]]

    def __init__(self, target: nn.Module) -> None:
        names = tuple(name for name in self.parameter_names if isinstance(getattr(target, name, None), nn.Parameter))
        if not isinstance(target, self.layer_types) or not names:
            kinds = ", ".join(kind.__name__ for kind in self.layer_types)
            raise AdapterTypeError(
                f"{type(self).__name__} is not made for {target}, only for one of {kinds} that has a "
                f"{' or a '.join(self.parameter_names)}."
            )
        with self.setup_adapter(target):
            super().__init__(target, TunedCopy(target, names))

    def forward(self, *args: Tensor) -> Tensor:
        layer, tuned = self[0], self[1]
        if not tuned.enabled:
            return layer(*args)
        if layer is not self.target:
            raise AdapterError(f"{layer} was injected into {self}, which stands next to its layer: inject it before.")
        (x,) = args
        weight = tuned.weight if "weight" in tuned.names else layer.weight
        return compute_with(layer, x, weight, self.bias_in_use())

    def bias_in_use(self) -> Tensor | None:
        """The bias that is added. A DoRA around it has to know, since it does not rescale that."""
        tuned = self[1]
        return tuned.bias if tuned.enabled and "bias" in tuned.names else getattr(self.target, "bias", None)


class NormTuningAdapter(CopyTuningAdapter):
    """A norm with a weight and a bias of its own, see `CopyTuningAdapter`."""

    parameter_names = ("weight", "bias")
    layer_types = NORMS


class BiasTuningAdapter(CopyTuningAdapter):
    """A layer with a bias of its own, see `CopyTuningAdapter`."""

    parameter_names = ("bias",)
    layer_types = WITH_BIAS


def compute_with(layer: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """What a layer would give with another weight and bias: the operations of its own forward."""
    if isinstance(layer, nn.Linear):
        return functional.linear(x, cast(Tensor, weight), bias)
    if isinstance(layer, nn.LayerNorm):
        return functional.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)
    if isinstance(layer, nn.GroupNorm):
        return functional.group_norm(x, layer.num_groups, weight, bias, layer.eps)
    if isinstance(layer, nn.RMSNorm):
        return functional.rms_norm(x, layer.normalized_shape, weight, layer.eps)
    if isinstance(layer, fl.LayerNorm2d):
        x = functional.layer_norm(x.permute(0, 2, 3, 1), (layer.channels,), weight, bias, layer.eps)
        return x.permute(0, 3, 1, 2)  # batch channels height width
    # What a convolution of torch calls in its own forward, after padding.
    return layer._conv_forward(x, weight, bias)


def inject_norm_tuning(where: nn.Module | Selection[Any], /) -> AdapterSet:
    """Give each norm of a selection a weight and a bias of its own; all of them, or none if one fails.

    Args:
        where: The norms. A model stands for all of its own that have a weight.

    Raises:
        SelectionError: (a LookupError) There is no norm.
        AdapterError: (a ValueError) A layer is no norm, or has no weight. The model is as before.
    """
    return AdapterSet.inject(_with(where, NORMS, "weight"), _around(NormTuningAdapter))


def inject_bias_tuning(where: nn.Module | Selection[Any], /) -> AdapterSet:
    """Give each layer of a selection a bias of its own; all of them, or none if one fails.

    Args:
        where: The layers. A model stands for all of its own that have a bias.

    Raises:
        SelectionError: (a LookupError) There is no layer.
        AdapterError: (a ValueError) A layer has no bias. The model is as before.

    Example:
        >>> model = fl.Chain(fl.Linear(2, 3), fl.Linear(3, 2, bias=False))
        >>> biases = inject_bias_tuning(model)
        >>> list(biases.state_dict())
        ['Linear_1.bias']
        >>> biases.eject()
    """
    return AdapterSet.inject(_with(where, WITH_BIAS, "bias"), _around(BiasTuningAdapter))


def _with(where: nn.Module | Selection[Any], types: tuple[type[nn.Module], ...], name: str) -> Selection[Any]:
    if isinstance(where, Selection):
        return where
    return select(where).of(*types).outside(CopyTuningAdapter).where(lambda layer: getattr(layer, name) is not None)


def _around(kind: type[CopyTuningAdapter]) -> MakesAdapter:
    def make(layer: Any, /) -> CopyTuningAdapter:
        if any(isinstance(holder, CopyTuningAdapter) and holder.is_injected for holder in holders_of(layer)):
            raise AdapterError(f"{layer} is tuned already: eject that set first, or select other layers.")
        return kind(layer)

    return make
