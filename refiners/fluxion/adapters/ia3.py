"""IA3: a layer learns how strong each of its outputs is, or each of its inputs (arXiv 2205.05638).

Follows `peft.tuners.ia3.layer` of peft 0.21.2. In a feed-forward network the input of its last layer is scaled; in
attention the outputs of keys and values are, with their bias. A new one scales by 1.

    (CHAIN) IA3Adapter()                          (CHAIN) IA3Adapter(feedforward=True)
    ├── Linear(in_features=6, out_features=5)     ├── IA3Scale(features=6)
    └── IA3Scale(features=5)                      └── Linear(in_features=6, out_features=5)

Differs from upstream: the weight is one vector, which peft stores with axes of length 1 around it. Several on one layer
scale one after the other, where peft multiplies their vectors first. Conv1d is taken as well.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from refiners.errors import AdapterTypeError
from refiners.fluxion.adapters.sets import AdapterSet, TunedWeights, TuningAdapter
from refiners.fluxion.selectors import Selection, select


class IA3Scale(TunedWeights):
    """A factor for each feature.

    Receives:
        x: `Float[Tensor, "*shape features *place"]`, with as many axes behind the features as `axes`

    Returns:
        `Float[Tensor, "*shape features *place"]`, of the same dtype
    """

    def __init__(self, features: int, axes: int = 0, **factory: Any) -> None:
        super().__init__()
        self.features = features
        self.axes = axes
        self.weight = nn.Parameter(torch.ones(features, **factory))

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        if not self.enabled:
            return x
        # of shape (features, 1, …)
        return (x * self.weight.view(-1, *(1,) * self.axes)).to(x.dtype)


class IA3Adapter(TuningAdapter):
    """A layer, and the factors of its outputs, or of its inputs.

    Args:
        target: A Linear or a convolution.
        feedforward: Whether the inputs are scaled.

    Raises:
        AdapterTypeError: (a TypeError) The target is another layer.
    """

    def __init__(self, target: Any, feedforward: bool = False) -> None:
        self.feedforward = feedforward
        if isinstance(target, nn.Linear):
            features, axes = (target.in_features if feedforward else target.out_features), 0
        elif isinstance(target, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            features, axes = (target.in_channels if feedforward else target.out_channels), target.weight.ndim - 2
        else:
            raise AdapterTypeError(f"IA3Adapter is not made for {target}, only for a Linear or a convolution.")
        scale = IA3Scale(features, axes, device=target.weight.device, dtype=target.weight.dtype)
        with self.setup_adapter(target):
            super().__init__(*((scale, target) if feedforward else (target, scale)))


def inject_ia3(where: nn.Module | Selection[Any], /, feedforward: Selection[Any] | bool = False) -> AdapterSet:
    """Give each layer of a selection an IA3; all of them, or none if one fails.

    Args:
        where: The layers. A model stands for all its Linear.
        feedforward: Those of them whose inputs are scaled, or all of them. The others' outputs are.

    Returns:
        What holds them all.

    Raises:
        SelectionError: (a LookupError) There is no layer.
        AdapterError: (a ValueError) A layer can take none. The model is as before.

    Example:
        >>> model = fl.Chain(fl.Linear(2, 3), fl.ReLU(), fl.Linear(3, 2))
        >>> ia3 = inject_ia3(model, feedforward=select(model).at("Linear_2"))
        >>> [(key, list(tensor.shape)) for key, tensor in ia3.state_dict().items()]
        [('Linear_1.weight', [3]), ('Linear_2.weight', [3])]
        >>> ia3.eject()
    """
    chosen = {id(layer) for layer in feedforward} if isinstance(feedforward, Selection) else None

    def make(layer: Any, /) -> IA3Adapter:
        return IA3Adapter(layer, feedforward=bool(feedforward) if chosen is None else id(layer) in chosen)

    return AdapterSet.inject(where if isinstance(where, Selection) else select(where).of(nn.Linear), make)
