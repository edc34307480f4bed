"""What all LoRAs have in common, whatever the kind of layer they change (arXiv 2106.09685)."""

from collections.abc import Mapping
from itertools import islice
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from refiners.errors import AdapterTypeError
from refiners.fluxion.adapters.lora.building import Strength, Weight, require_rank
from refiners.fluxion.adapters.lora.delta import Delta
from refiners.fluxion.adapters.lora.files import pair_weights
from refiners.fluxion.adapters.lora.spec import DeltaSpec
from refiners.fluxion.layers.basics import Multiply
from refiners.fluxion.layers.observation import PASS_THROUGH, calls_are_observed

T = TypeVar("T", bound=nn.Module)


class Lora(Delta[T], Generic[T]):
    """The change that one LoRA adds to the output of a layer of type T. Abstract: a kind of layer is a subclass.

    Its children are `down`, `up` and the multiplication by `scaling`, which is `scale`, or `scale · alpha / rank` with
    an alpha. A new LoRA changes nothing, since `up` is zero.

    Args:
        name: What it is called among the LoRAs of a layer.
        rank: How many values there are between `down` and `up`.
        scale: How strong it is, 1.0 being as strong as it was trained.
        alpha: The strength it was trained with, as files of LoRAs tell it.
        rank_stabilized: Whether that strength is alpha / sqrt(rank) instead of alpha / rank (arXiv 2312.03732).
        bias: Whether `up` has a bias, which files call the bias of a LoRA.
    """

    method = "lora"

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
        rank_stabilized: bool = False,
        bias: bool = False,
    ) -> None:
        require_rank(rank, self, name)
        # Past torch's `__setattr__`, as in `Delta`.
        self.__dict__.update(name=name, rank=rank, bias=bias)
        layers = self.lora_layers(device=device, dtype=dtype)
        strength = Strength(scale=scale, alpha=alpha, rank_stabilized=rank_stabilized)
        super().__init__(name, *layers, Multiply(), rank=rank, **strength)

    def lora_layers(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> tuple[nn.Module, ...]:
        """Build `down` and `up`. Whatever their weights are, `reset_parameters` overwrites them."""
        raise AdapterTypeError(f"{type(self).__name__} is abstract: use LinearLora, Conv2dLora, or Lora.for_target.")

    def reset_parameters(self) -> None:
        """Draw new weights for `down`, and make those of `up` zero."""
        weights = self.weights()
        if not weights["down"].tensor.is_meta:
            # Without a history, which takes less time than a block that keeps none, as in `torch.nn.init`.
            weights["down"].tensor.detach().normal_(std=1 / self.rank)
            for role in ("up", "up_bias"):
                if role in weights:
                    weights[role].tensor.detach().zero_()

    def weights(self) -> dict[str, Weight]:
        down, up = islice(self.__dict__["_modules"].values(), 2)
        weights = {"down": Weight(down, "weight", (0,)), "up": Weight(up, "weight", (1,))}
        return {**weights, "up_bias": Weight(self.up, "bias")} if self.bias else weights

    @classmethod
    def settings_of(cls, spec: DeltaSpec, layer: nn.Module) -> dict[str, Any]:
        return {"bias": True} if "up_bias" in spec.tensors else {}

    @classmethod
    def from_weights(
        cls, name: str, /, down: Tensor, up: Tensor, scale: float = 1.0, *, alpha: float | None = None
    ) -> "Lora[Any]":
        """A LoRA with these weights, which are not copied: 2-D ones for Linear, 4-D ones for Conv2d.

        Raises:
            AdapterTypeError: (a ValueError) The two do not belong together.
        """
        forms = [form for form in cls._forms() if issubclass(form, Lora)]
        kind = next((kind for kind in forms if kind.is_pair(down, up)), None)
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

    def forward(self, *args: Any) -> Any:
        # What a Chain does, in less time where nobody watches: LoRAs are many, small, and next to every layer. A
        # multiplication by 1 changes no bit.
        modules = self.__dict__["_modules"]
        if (
            not torch.compiler.is_dynamo_compiling()
            and len(modules) == 3
            and self._children_are_plain
            and self._provider is None
            and not calls_are_observed()
        ):
            down, up, factor = modules.values()
            if not (_is_watched(down) or _is_watched(up) or _is_watched(factor)):
                try:
                    y = up.forward(down.forward(*args))
                    return y if factor.scale == 1 and factor.bias == 0 else factor.forward(y)
                except PASS_THROUGH:
                    raise
                except Exception:  # once more, as a Chain, which says where it was
                    return super().forward(*args)
        return super().forward(*args)

    @property
    def down(self) -> Any:
        """The layer that leads to `rank` values."""
        return next(iter(self.__dict__["_modules"].values()))

    @property
    def up(self) -> Any:
        """The layer that leads from `rank` values to the output."""
        return self[1]

    @property
    def _factor(self) -> Multiply:
        return next(reversed(self.__dict__["_modules"].values()))

    @property
    def scaling(self) -> float:
        # As `Delta` has it, in one step instead of three: it is read in each call.
        return next(reversed(self.__dict__["_modules"].values())).scale

    @property
    def _dtype_of_weights(self) -> torch.dtype:
        down = next(iter(self.__dict__["_modules"].values()))
        weight = down._parameters.get("weight")  # see WeightedModule
        return (down.weight if weight is None else weight).dtype

    def delta_bias(self) -> Tensor | None:
        return self.up.bias * self.scaling if self.bias else None


def _is_watched(module: Any) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
    )
