"""LoRA: a layer learns a change of low rank, beside weights that stay as they are (arXiv 2106.09685).

A `Lora` is the change alone: it leads down to `rank` values and up again, and is multiplied by a scale. A `LoraAdapter`
is the sum of a layer and of its LoRAs; injected, it stands in the place of the layer:

    (SUM) LoraAdapter()
    ├── Linear(in_features=768, out_features=768, …)
    └── (CHAIN) LinearLora(name=style, in_features=768, out_features=768, rank=4)
        ├── Linear(in_features=768, out_features=4, bias=False, …)
        ├── Linear(in_features=4, out_features=768, bias=False, …)
        └── Multiply(scale=0.5)

`inject_loras` puts a whole set of them into a model in one call. The operations and their order are those of peft
0.21.2 (`peft.tuners.lora.layer`), unmerged and without dropout, so outputs and gradients are the same to the last bit.

Differs from upstream: `down` of a convolution also takes over the dilation and the padding mode of its target, without
which it would have another size than the target, or other borders. `alpha` is optional; without it the scale alone
counts, and new weights of `down` are drawn from N(0, 1/rank) instead of a uniform distribution.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar, Unpack, cast

import torch
from torch import Tensor, nn

from refiners.errors import AdapterTypeError, LoraNameError
from refiners.fluxion.adapters.lora_files import pair_weights
from refiners.fluxion.layers.adapter import Adapter
from refiners.fluxion.layers.basics import Multiply
from refiners.fluxion.layers.chain import Chain
from refiners.fluxion.layers.combinators import Sum
from refiners.fluxion.layers.conv import Conv2d, PaddingMode
from refiners.fluxion.layers.factory import Factory
from refiners.fluxion.layers.linear import Linear
from refiners.fluxion.layers.module import ContextModule, WeightedModule

T = TypeVar("T", bound=nn.Module)
TLora = TypeVar("TLora", bound="Lora[Any]")

# A number for both axes of an image, or one for each.
Pair = int | tuple[int, int]


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
        super().__init__(*self.lora_layers(device=device, dtype=dtype), Multiply())
        self.scale = scale
        self.reset_parameters()

    def lora_layers(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> tuple[WeightedModule, WeightedModule]:
        """Build `down` and `up`. Their weights are overwritten, so any values will do."""
        raise AdapterTypeError(f"{type(self).__name__} is abstract: use LinearLora, Conv2dLora, or Lora.for_target.")

    def reset_parameters(self) -> None:
        """Draw new weights for `down`, and make those of `up` zero."""
        if not self.down.weight.is_meta:
            nn.init.normal_(self.down.weight, std=1 / self.rank)
            nn.init.zeros_(self.up.weight)

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
        kind = _kind_for(target)
        if not issubclass(kind, cls):
            raise AdapterTypeError(f"{cls.__name__} cannot adapt {target}: {kind.__name__} does.")
        weight = cast(Tensor, target.weight)
        placed = Factory(
            device=factory.get("device") or weight.device,
            dtype=factory.get("dtype") or (weight.dtype if weight.is_floating_point() else None),
        )
        lora = kind._shaped_as(name, target, rank=rank, scale=scale, alpha=alpha, **placed)
        return lora if target.training else lora.eval()

    @classmethod
    def _shaped_as(cls, name: str, target: Any, **settings: Any) -> "Lora[Any]":
        raise NotImplementedError

    @classmethod
    def from_weights(
        cls, name: str, /, down: Tensor, up: Tensor, scale: float = 1.0, *, alpha: float | None = None
    ) -> "Lora[Any]":
        """A LoRA with these weights, which are not copied: 2-D ones for Linear, 4-D ones for Conv2d.

        Raises:
            AdapterTypeError: (a ValueError) The two do not belong together.
        """
        kind = cls if cls is not Lora else {2: LinearLora, 4: Conv2dLora}.get(down.ndim)
        if kind is None or not down.is_floating_point() or not kind._are_a_pair(down, up):
            raise AdapterTypeError(
                f"Weights of shapes {list(down.shape)} (down, {down.dtype}) and {list(up.shape)} (up, {up.dtype}) are no "
                f"pair for {cls.__name__}. Linear takes [rank, in] and [out, rank], Conv2d [rank, in, height, width] and "
                "[out, rank, height, width]."
            )
        lora = kind._from_shapes(name, down.shape, up.shape, scale=scale, alpha=alpha, device="meta", dtype=down.dtype)
        lora.down.weight = nn.Parameter(down.detach())
        lora.up.weight = nn.Parameter(up.detach())
        return lora

    @classmethod
    def _are_a_pair(cls, down: Tensor, up: Tensor) -> bool:
        raise NotImplementedError

    @classmethod
    def _from_shapes(cls: type[TLora], name: str, down: torch.Size, up: torch.Size, **settings: Any) -> TLora:
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
                    f"{self} has a {role} weight of shape {list(weight.shape)}, got {list(new.shape)}. For another rank "
                    "build a new LoRA with from_weights."
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
        factor.scale = value if self.alpha is None else value * self.alpha / self.rank
        factor.__dict__["strength"] = value

    @property
    def scaling(self) -> float:
        """The number that the output is multiplied by: `scale`, times alpha / rank if there is an alpha."""
        return self._factor.scale

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
        from refiners.fluxion.adapters.lora_attach import find_places

        for place in find_places(target, include, exclude):
            if self.name not in place.names and self.is_compatible(place.layer):
                if isinstance(place.parent, LoraAdapter):
                    place.parent.add_lora(self)
                    return place.parent, None
                return LoraAdapter(place.layer, self), place.parent
        return None


class LinearLora(Lora[Linear]):
    """The LoRA of a Linear.

    Receives:
        x: `Float[Tensor, "*shape in_features"]`

    Returns:
        `Float[Tensor, "*shape out_features"]`

    Example:
        >>> lora = LinearLora("style", in_features=320, out_features=128, rank=4, alpha=8)
        >>> lora.scaling
        2.0
    """

    def __init__(
        self,
        name: str,
        /,
        in_features: int,
        out_features: int,
        rank: int = 16,
        scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        alpha: float | None = None,
    ) -> None:
        self.in_features = in_features
        self.out_features = out_features
        super().__init__(name, rank=rank, scale=scale, device=device, dtype=dtype, alpha=alpha)

    def lora_layers(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Linear, Linear]:
        factory = Factory(device=device, dtype=dtype)
        return (
            Linear(self.in_features, self.rank, bias=False, **factory),
            Linear(self.rank, self.out_features, bias=False, **factory),
        )

    @classmethod
    def _shaped_as(cls, name: str, target: nn.Linear, **settings: Any) -> "LinearLora":
        return cls(name, in_features=target.in_features, out_features=target.out_features, **settings)

    @classmethod
    def _are_a_pair(cls, down: Tensor, up: Tensor) -> bool:
        return down.ndim == up.ndim == 2 and down.shape[0] == up.shape[1]

    @classmethod
    def _from_shapes(cls, name: str, down: torch.Size, up: torch.Size, **settings: Any) -> "LinearLora":
        return cls(name, in_features=down[1], out_features=up[0], rank=down[0], **settings)

    def is_compatible(self, layer: nn.Module, /) -> bool:
        return (
            isinstance(layer, nn.Linear)
            and layer.in_features == self.in_features
            and layer.out_features == self.out_features
        )


class Conv2dLora(Lora[Conv2d]):
    """The LoRA of a Conv2d. Kernel size, stride, padding and dilation are pairs: of `down`, and of `up`.

    Either may be one number, or (height, width). Without a padding, the outputs keep the size of the inputs if the
    stride is 1 and the kernels are odd.

    Args:
        name: See `Lora`.
        in_channels: Those of the layer.
        out_channels: Those of the layer.
        rank: See `Lora`; a multiple of `groups`.
        scale: See `Lora`.
        kernel_size: Of `down` and `up`.
        stride: Of `down` and `up`.
        padding: Of `down` and `up`.
        device: Of the weights.
        dtype: Of the weights.
        dilation: Of `down` and `up`.
        groups: Of `up`; `down` sees all channels.
        padding_mode: What lies beyond the border for the convolution that has the kernel of the layer.
        alpha: See `Lora`.

    Receives:
        x: `Float[Tensor, "batch in_channels in_height in_width"]`

    Returns:
        `Float[Tensor, "batch out_channels out_height out_width"]`
    """

    # Whether stride, padding and dilation are only a guess from the shapes of the weights.
    _geometry_is_guessed = False

    def __init__(
        self,
        name: str,
        /,
        in_channels: int,
        out_channels: int,
        rank: int = 16,
        scale: float = 1.0,
        kernel_size: tuple[Pair, Pair] = (1, 3),
        stride: tuple[Pair, Pair] = (1, 1),
        padding: tuple[Pair | str, Pair | str] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        dilation: tuple[Pair, Pair] = (1, 1),
        groups: int = 1,
        padding_mode: PaddingMode = "zeros",
        alpha: float | None = None,
    ) -> None:
        if rank % groups:
            raise AdapterTypeError(
                f"Conv2dLora {name!r} has rank {rank} for a layer of {groups} groups: choose a multiple of {groups}."
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = kernel_size
        self.stride = stride
        self.dilation = dilation
        self.padding = padding or (
            _same_padding(kernel_size[0], dilation[0]),
            _same_padding(kernel_size[1], dilation[1]),
        )
        self.groups = groups
        self.padding_mode: PaddingMode = padding_mode
        super().__init__(name, rank=rank, scale=scale, device=device, dtype=dtype, alpha=alpha)

    def lora_layers(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Conv2d, Conv2d]:
        factory = Factory(device=device, dtype=dtype)
        modes: list[PaddingMode] = ["zeros", "zeros"]
        modes[self._main] = self.padding_mode
        down, up = (
            Conv2d(
                channels[0],
                channels[1],
                kernel_size=self.kernel_size[i],
                stride=self.stride[i],
                padding=self.padding[i],
                dilation=self.dilation[i],
                groups=self.groups if i == 1 else 1,
                padding_mode=modes[i],
                use_bias=False,
                **factory,
            )
            for i, channels in enumerate([(self.in_channels, self.rank), (self.rank, self.out_channels)])
        )
        return down, up

    @property
    def _main(self) -> int:
        """Which of the two has the kernel of the layer: 0 for `down`, unless only `up` has more than one pixel."""
        return 1 if _both(self.kernel_size[0]) == (1, 1) != _both(self.kernel_size[1]) else 0

    @classmethod
    def _shaped_as(cls, name: str, target: nn.Conv2d, **settings: Any) -> "Conv2dLora":
        padding = target.padding if isinstance(target.padding, str) else _short(target.padding)
        return cls(
            name,
            in_channels=target.in_channels,
            out_channels=target.out_channels,
            kernel_size=(_short(target.kernel_size), 1),
            stride=(_short(target.stride), 1),
            padding=(padding, 0),
            dilation=(_short(target.dilation), 1),
            groups=target.groups,
            padding_mode=cast(PaddingMode, target.padding_mode),
            **settings,
        )

    @classmethod
    def _are_a_pair(cls, down: Tensor, up: Tensor) -> bool:
        return down.ndim == up.ndim == 4 and down.shape[0] % up.shape[1] == 0

    @classmethod
    def _from_shapes(cls, name: str, down: torch.Size, up: torch.Size, **settings: Any) -> "Conv2dLora":
        lora = cls(
            name,
            in_channels=down[1],
            out_channels=up[0],
            rank=down[0],
            kernel_size=(_short(down[2:]), _short(up[2:])),
            groups=down[0] // up[1],
            **settings,
        )
        lora._geometry_is_guessed = True
        return lora

    def is_compatible(self, layer: nn.Module, /) -> bool:
        if not isinstance(layer, nn.Conv2d):
            return False
        channels = (layer.in_channels, layer.out_channels)
        kernel = [a + b - 1 for a, b in zip(self.down.kernel_size, self.up.kernel_size, strict=True)]
        stride = [a * b for a, b in zip(self.down.stride, self.up.stride, strict=True)]
        return (
            channels == (self.in_channels, self.out_channels)
            and kernel == list(layer.kernel_size)
            and (self._geometry_is_guessed or stride == list(layer.stride))
        )

    def fit(self, layer: nn.Module, /) -> None:
        main: Conv2d = self[self._main]
        if self._geometry_is_guessed and isinstance(layer, nn.Conv2d) and main.kernel_size == layer.kernel_size:
            for name in ("stride", "padding", "dilation", "padding_mode", "_reversed_padding_repeated_twice"):
                setattr(main, name, getattr(layer, name))


def _kind_for(target: nn.Module) -> type[Lora[Any]]:
    if isinstance(target, nn.Linear):
        return LinearLora
    if isinstance(target, nn.Conv2d):
        return Conv2dLora
    raise AdapterTypeError(f"No LoRA is defined for {type(target).__name__}, only for Linear and Conv2d: {target}.")


def _both(size: Pair) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _short(size: Any) -> Pair:
    height, width = size
    return height if height == width else (height, width)


def _same_padding(kernel_size: Pair, dilation: Pair) -> Pair:
    pairs = zip(_both(kernel_size), _both(dilation), strict=True)
    return _short([step * (size - 1) // 2 for size, step in pairs])


class LoraAdapter(Sum, Adapter[nn.Module]):
    """A layer and its LoRAs: the output of the layer, plus what each LoRA adds to it, one after the other.

    LoRAs may be of another dtype than the layer: they receive its input in theirs, and the sum is given in the dtype
    of the layer's output.

    Example:
        >>> model = fl.Chain(fl.Linear(2, 2))
        >>> adapter = LoraAdapter(model.Linear, LinearLora("style", 2, 2, rank=1)).inject(model)
        >>> adapter.scale = {"style": 0.5}
        >>> adapter.scales
        {'style': 0.5}
        >>> adapter.eject()
    """

    def __init__(self, target: nn.Module, /, *loras: Lora[Any]) -> None:
        with self.setup_adapter(target):
            super().__init__(target)
        for lora in loras:
            self.add_lora(lora)

    def _share(self, args: tuple[Any, ...]) -> Any:
        # Lazily: the input is converted after the layer has run and once for all LoRAs, since gradients add up in the
        # reverse order of the operations.
        for module in self:
            if isinstance(module, Lora):
                dtype = cast(Any, module[0]).weight.dtype
                if args[0].dtype != dtype:
                    args = (args[0].to(dtype), *args[1:])
            yield args

    def _fold(self, folded: Any, output: Any) -> Any:
        if folded is None:
            total = super()._fold(None, output)
            return total.dtype, total
        return folded[0], super()._fold(folded[1], output)

    def _result(self, folded: Any) -> Any:
        dtype, total = folded
        return total if total.dtype == dtype else total.to(dtype)

    @property
    def lora_layers(self) -> Iterator[Lora[Any]]:
        """The LoRAs of the layer, in the order in which they are added."""
        # Children only: another adapter of LoRAs may stand inside, around the same layer.
        return (module for module in self if isinstance(module, Lora))

    @property
    def names(self) -> list[str]:
        """The names of the LoRAs."""
        return [lora.name for lora in self.lora_layers]

    @property
    def loras(self) -> dict[str, Lora[Any]]:
        """The LoRAs by name."""
        return {lora.name: lora for lora in self.lora_layers}

    @property
    def scales(self) -> dict[str, float]:
        """The scales by name."""
        return {lora.name: lora.scale for lora in self.lora_layers}

    @property
    def scale(self) -> dict[str, float]:
        """The scales by name. What is set may hold some of the names only.

        Raises:
            LoraNameError: (a KeyError) There is no LoRA of such a name. No scale was set.
        """
        return self.scales

    @scale.setter
    def scale(self, values: Mapping[str, float]) -> None:
        loras = self.loras
        unknown = [name for name in values if name not in loras]
        if unknown:
            raise LoraNameError(f"No LoRA is called {', '.join(map(repr, unknown))} in {self}. There are: {list(loras)}.")
        for name, value in values.items():
            loras[name].scale = value

    def add_lora(self, lora: Lora[Any], /) -> None:
        """Add a LoRA behind the others.

        Raises:
            LoraNameError: (an AssertionError) There is one of that name.
            AdapterTypeError: (a TypeError) The LoRA does not fit the layer.
        """
        if lora.name in self.names:
            raise LoraNameError(f"{self} has a LoRA called {lora.name!r} already: remove it, or choose another name.")
        target = self.target
        # What a Chain in the place of a layer makes of its input is not known.
        if not isinstance(target, ContextModule):
            if not lora.is_compatible(target):
                raise AdapterTypeError(f"{lora} does not fit {target}.")
            lora.fit(target)
        self.append(lora)
        for twin in self._twins:
            cast(LoraAdapter, twin).append(lora.structural_copy())

    def remove_lora(self, name: str, /) -> Lora[Any] | None:
        """Take the LoRA of that name out, and return it; None if there is none."""
        lora = self.loras.get(name)
        if lora is not None:
            self.remove(lora)
        for twin in self._twins:
            cast(LoraAdapter, twin).remove_lora(name)
        return lora
