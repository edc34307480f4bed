"""What all LoRAs have in common, whatever the kind of layer they change."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, Unpack, cast

import torch
from torch import Tensor, nn

from refiners.errors import AdapterTypeError
from refiners.fluxion.adapters.lora.files import pair_weights
from refiners.fluxion.layers.basics import Multiply
from refiners.fluxion.layers.chain import Chain
from refiners.fluxion.layers.factory import Factory
from refiners.fluxion.layers.module import WeightedModule

if TYPE_CHECKING:
    from refiners.fluxion.adapters.lora.adapter import LoraAdapter

T = TypeVar("T", bound=nn.Module)


class Lora(Chain, Generic[T]):
    """The change that one LoRA adds to the output of a layer of type T. Abstract: a kind of layer is a subclass.

    Its children are `down`, `up` and the multiplication by `scaling`, which is `scale`, or `scale · alpha / rank` with
    an alpha. A new LoRA changes nothing, since `up` is zero.

    Args:
        name: What it is called among the LoRAs of a layer.
        rank: How many values there are between `down` and `up`.
        scale: How strong it is, 1.0 being as strong as it was trained.
        alpha: The strength it was trained with, as files of LoRAs tell it.
    """

    # The kind of layer a subclass is for; a subclass without is found by nobody but its user.
    layer_type: ClassVar[type[nn.Module] | None] = None
    _kinds: ClassVar[list[type["Lora[Any]"]]] = []

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__dict__.get("layer_type") is not None:
            Lora._kinds.append(cls)

    def __init__(
        self,
        name: str,
        /,
        rank: int = 16,
        scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        alpha: float | None = None,
    ) -> None:
        if rank < 1:
            raise AdapterTypeError(f"{type(self).__name__} {name!r} has rank {rank}: the rank is 1 or more.")
        self.name = name
        self.rank = rank
        self.alpha = alpha
        super().__init__(*self.lora_layers(device=device, dtype=dtype), Multiply(self._scaling_at(scale)))
        self._factor.__dict__["strength"] = scale
        self.reset_parameters()

    def lora_layers(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> tuple[WeightedModule, WeightedModule]:
        """Build `down` and `up`. Whatever their weights are, `reset_parameters` overwrites them."""
        raise AdapterTypeError(f"{type(self).__name__} is abstract: use LinearLora, Conv2dLora, or Lora.for_target.")

    def reset_parameters(self) -> None:
        """Draw new weights for `down`, and make those of `up` zero."""
        if not self.down.weight.is_meta:
            nn.init.normal_(self.down.weight, std=1 / self.rank)
            nn.init.zeros_(self.up.weight)

    @classmethod
    def _forms(cls) -> list[type["Lora[Any]"]]:
        return Lora._kinds if cls.layer_type is None else [cls]

    @classmethod
    def for_target(
        cls,
        name: str,
        /,
        target: nn.Module,
        rank: int = 16,
        scale: float = 1.0,
        *,
        alpha: float | None = None,
        **factory: Unpack[Factory],
    ) -> "Lora[Any]":
        """A new LoRA of the right kind and shape for a layer, in its training mode.

        Args:
            name: What the LoRA is called.
            target: The layer.
            rank: See `Lora`.
            scale: See `Lora`.
            alpha: See `Lora`.
            **factory: The device and the dtype, those of the layer's weight unless given.

        Raises:
            AdapterTypeError: (a TypeError) No LoRA is defined for that layer.
        """
        kind = next((kind for kind in cls._forms() if isinstance(target, cast(type, kind.layer_type))), None)
        if kind is None:
            layers = ", ".join(kind.__name__ for kind in Lora._kinds)
            raise AdapterTypeError(f"{cls.__name__} is not made for {target}. The kinds of LoRA are {layers}.")
        weight = cast(Tensor, target.weight)
        placed = Factory(
            device=factory.get("device") or weight.device,
            dtype=factory.get("dtype") or (weight.dtype if weight.is_floating_point() else None),
        )
        lora = kind.like_layer(name, target, rank=rank, scale=scale, alpha=alpha, **placed)
        return lora if target.training else lora.eval()

    @classmethod
    def like_layer(cls, name: str, /, layer: Any, **settings: Any) -> "Lora[Any]":
        """Build a LoRA with the shape of a layer of `layer_type`. A kind of layer defines it."""
        raise NotImplementedError

    @classmethod
    def from_weights(
        cls, name: str, /, down: Tensor, up: Tensor, scale: float = 1.0, *, alpha: float | None = None
    ) -> "Lora[Any]":
        """A LoRA with these weights, which are not copied: 2-D ones for Linear, 4-D ones for Conv2d.

        Raises:
            AdapterTypeError: (a ValueError) The two do not belong together.
        """
        kind = next((kind for kind in cls._forms() if kind.is_pair(down, up)), None)
        if kind is None or not down.is_floating_point():
            raise AdapterTypeError(
                f"down of shape {list(down.shape)} ({down.dtype}) and up of shape {list(up.shape)} are no pair for "
                f"{cls.__name__}. A Linear takes [rank, in] and [out, rank], a Conv2d [rank, in, height, width] and "
                "[out, rank, height, width]."
            )
        lora = kind.like_weights(name, down.shape, up.shape, scale=scale, alpha=alpha, device="meta", dtype=down.dtype)
        lora.down.weight = nn.Parameter(down.detach())
        lora.up.weight = nn.Parameter(up.detach())
        return lora

    @classmethod
    def is_pair(cls, down: Tensor, up: Tensor) -> bool:
        """Whether two weights are those of one LoRA of this kind. A kind of layer defines it."""
        return False

    @classmethod
    def like_weights(cls, name: str, /, down: torch.Size, up: torch.Size, **settings: Any) -> "Lora[Any]":
        """Build a LoRA with weights of these shapes. A kind of layer defines it."""
        raise NotImplementedError

    @classmethod
    def from_dict(cls, name: str, /, state_dict: Mapping[str, Tensor]) -> "dict[str, Lora[Any]]":
        """The LoRAs of a state dict, by the key of the layer that each is for.

        The key is what stands before the last two parts: `encoder.Linear.down.weight` is for `encoder.Linear`. Up and
        down are told apart by name (`down`, `lora_down`, `lora_A`; `up`, `lora_up`, `lora_B`), or where the names say
        nothing by order, down first. `encoder.Linear.alpha` is the alpha.

        Raises:
            ConversionError: (a ValueError) Tensors that belong to no pair, or pairs that miss one. All are listed.
        """
        pairs = pair_weights(state_dict)
        return {key: cls.from_weights(name, down, up, alpha=alpha) for key, (down, up, alpha) in pairs.items()}

    def load_weights(self, down: Tensor, up: Tensor) -> None:
        """Copy these weights in. A compiled model needs no compilation for that.

        Raises:
            AdapterTypeError: (an AssertionError) They have other shapes than those they replace.
        """
        for weight, new, role in ((self.down.weight, down, "down"), (self.up.weight, up, "up")):
            if weight.shape != new.shape:
                raise AdapterTypeError(
                    f"{self} has a {role} weight of shape {list(weight.shape)}, got {list(new.shape)}. For another "
                    "rank build a new LoRA with from_weights."
                )
        if self.down.weight.is_meta or self.up.weight.is_meta:
            raise AdapterTypeError(f"{self} is on the meta device, where no values can be loaded. Use from_weights.")
        with torch.no_grad():
            self.down.weight.copy_(down)
            self.up.weight.copy_(up)

    @property
    def down(self) -> Any:
        """The layer that leads to `rank` values."""
        return self[0]

    @property
    def up(self) -> Any:
        """The layer that leads from `rank` values to the output."""
        return self[1]

    @property
    def scale(self) -> float:
        """How strong it is. May be set at any time, in a compiled model too."""
        factor = self._factor
        # Kept beside the factor, so that copies of this node, which share it, tell the same.
        return factor.scale if self.alpha is None else factor.__dict__["strength"]

    @scale.setter
    def scale(self, value: float) -> None:
        factor = self._factor
        factor.scale = self._scaling_at(value)
        factor.__dict__["strength"] = value

    @property
    def scaling(self) -> float:
        """The number that the output is multiplied by: `scale`, times alpha / rank if there is an alpha."""
        return self._factor.scale

    def _scaling_at(self, scale: float) -> float:
        return scale if self.alpha is None else scale * self.alpha / self.rank

    @property
    def _factor(self) -> Multiply:
        return self[2]

    def is_compatible(self, layer: nn.Module, /) -> bool:
        """Whether a layer gives outputs that this LoRA can be added to."""
        raise NotImplementedError

    def fit(self, layer: nn.Module, /) -> None:
        """Take over from a compatible layer what the weights alone do not tell. Nothing, for most kinds."""

    def auto_attach(
        self, target: Chain, include: list[str] | None = None, exclude: list[str] | None = None
    ) -> "tuple[LoraAdapter, Chain | None] | None":
        """Find the first compatible layer below `target`, in walk order, that has no LoRA of this name.

        Args:
            target: Where to search.
            include: Names of classes; if given, one of them must be above the layer.
            exclude: Names of classes; none of them may be above the layer.

        Returns:
            None without such a layer. If the layer has an adapter of LoRAs already, that adapter, which this LoRA was
            added to, and None; otherwise a new adapter and the Chain to inject it into.
        """
        from refiners.fluxion.adapters.lora.adapter import LoraAdapter
        from refiners.fluxion.adapters.lora.attach import find_places

        for place in find_places(target, include, exclude):
            if self.name not in place.names and self.is_compatible(place.layer):
                if isinstance(place.parent, LoraAdapter):
                    place.parent.add_lora(self)
                    return place.parent, None
                return LoraAdapter(place.layer, self), place.parent
        return None


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
