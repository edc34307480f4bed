"""What all methods have in common that change a layer by adding to its output: a `Delta`."""

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from refiners.errors import AdapterTypeError
from refiners.fluxion.adapters.lora.building import Strength, Weight, in_mode_of, placed_like, require_rank
from refiners.fluxion.adapters.lora.forms import axes_of, with_axes
from refiners.fluxion.adapters.lora.spec import DeltaSpec
from refiners.fluxion.adapters.lora.switch import Switch
from refiners.fluxion.layers.basics import Multiply
from refiners.fluxion.layers.chain import Chain
from refiners.fluxion.layers.journal import note_undo

if TYPE_CHECKING:
    from refiners.fluxion.adapters.lora.adapter import LoraAdapter

T = TypeVar("T", bound=nn.Module)


class Delta(Chain, Generic[T]):
    """The change that one adapter makes to the output of a layer of type T. Abstract: a method is a subclass, and a
    kind of layer a subclass of that.

    Args:
        name: What it is called among the adapters of a layer.
        rank: How many values its low-rank products have in between.
        scale: How strong it is, 1.0 being as strong as it was trained.
        alpha: The strength it was trained with. Without it the scale alone counts.
        rank_stabilized: Whether that strength is alpha / sqrt(rank) instead of alpha / rank (arXiv 2312.03732).
    """

    # What specs call the method.
    method: ClassVar[str]
    # The kind of layer a subclass is for; a subclass without is found by nobody but its user.
    layer_type: ClassVar[type[nn.Module] | None] = None
    # Whether it is called with (x, the layer's output so far, the layer's weight, the layer's bias), and gives the new
    # output, instead of being called with x and giving what is added.
    rewrites_output: ClassVar[bool] = False
    # How many axes the weight of the layer has, where its tensors have as many; see `forms`.
    weight_axes: int | None = None
    _kinds: ClassVar[list[type["Delta[Any]"]]] = []

    name: str
    rank: int
    alpha: float | None
    rank_stabilized: bool
    # How many axes the tensors had that it was made from.
    given_axes: int | None = None
    # Whether it runs; shared by structural copies.
    switch: Switch

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__dict__.get("layer_type") is not None:
            Delta._kinds.append(cls)

    def __init__(
        self,
        name: str,
        /,
        *layers: nn.Module,
        rank: int,
        scale: float = 1.0,
        alpha: float | None = None,
        rank_stabilized: bool = False,
    ) -> None:
        require_rank(rank, self, name)
        # Past torch's `__setattr__`, which would take longer than to build a layer.
        self.__dict__.update(name=name, rank=rank, alpha=alpha, rank_stabilized=rank_stabilized, switch=Switch())
        super().__init__(*layers)
        self.scale = scale
        self.reset_parameters()

    # --- a method defines ------------------------------------------------------------------------------------------

    def reset_parameters(self) -> None:
        """Draw new weights, with which the layer computes what it did before. On the meta device there are none."""
        raise NotImplementedError

    def weights(self) -> dict[str, Weight]:
        """The parameters by role, see `DeltaSpec`."""
        raise NotImplementedError

    def is_compatible(self, layer: nn.Module, /) -> bool:
        """Whether a layer gives outputs that this adapter can be added to."""
        raise NotImplementedError

    def fit(self, layer: nn.Module, /) -> None:
        """Take over from a compatible layer what the weights alone do not tell. Nothing, for most kinds."""

    @classmethod
    def like_layer(cls, name: str, /, layer: Any, **settings: Any) -> "Delta[Any]":
        """Build one with the shape of a layer of `layer_type`. A kind of layer defines it."""
        raise NotImplementedError

    @classmethod
    def settings_of(cls, spec: DeltaSpec, layer: nn.Module) -> dict[str, Any]:
        """The arguments of `like_layer` that give tensors of the spec's roles and shapes."""
        return {}

    @property
    def _factor(self) -> Multiply:
        """What multiplies by `scaling`."""
        raise NotImplementedError

    def delta_weight(self) -> Tensor:
        """What it adds to the weight of its layer when it is merged, `scaling` included.

        The operations are those of peft 0.21.2, which computes in float32 what is half precision on the CPU.

        Returns:
            `Float[Tensor, "*shape"]`, of the shape of the layer's weight and in the dtype of the adapter's.

        Raises:
            AdapterTypeError: (a TypeError) No change of the weight does the same, as for a LoRA of a grouped Conv2d.
        """
        raise NotImplementedError

    def inputs_from(self, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """The inputs of the layer in the dtype of this adapter."""
        dtype = self._dtype_of_weights
        x = inputs[0]
        return inputs if x.dtype == dtype or not x.is_floating_point() else (x.to(dtype), *inputs[1:])

    @property
    def _dtype_of_weights(self) -> torch.dtype:
        raise NotImplementedError

    def delta_bias(self) -> Tensor | None:
        """What it adds to the bias of its layer when it is merged; None if nothing."""
        return None

    def merged_weight(self, weight: Tensor, base: Tensor | None = None) -> Tensor:
        """The weight of the layer with this adapter in it; a copy of the weight if `scaling` is 0.

        Args:
            weight: The weight so far, perhaps with other adapters merged into it.
            base: The weight without any. Only a DoRA asks for it, and takes `weight` without it.

        Returns:
            A new tensor of the dtype of `weight`.
        """
        return weight + self.delta_weight().to(weight.dtype) if self.scaling else weight.clone()

    # --- strength --------------------------------------------------------------------------------------------------

    @property
    def scale(self) -> float:
        """How strong it is. May be set at any time, in a compiled model too."""
        factor = self._factor
        # Kept beside the factor, so that copies of this node, which share it, tell the same.
        return factor.scale if self.alpha is None else factor.__dict__["strength"]

    @scale.setter
    def scale(self, value: float) -> None:
        factor, scaling = self._factor, self._scaling_at(value)
        if factor.__dict__["scale"] != scaling or type(scaling) is not float:
            factor.scale = scaling
        factor.__dict__["strength"] = value
        self.switch.changed()

    @property
    def scaling(self) -> float:
        """The number it is multiplied by: `scale`, times alpha / rank (or / sqrt(rank)) if there is an alpha."""
        return self._factor.scale

    @property
    def is_active(self) -> Tensor:
        """Whether `scaling` is another number than 0, as a tensor that compiled code reads anew in each call."""
        return self._factor.number != 0

    def _scaling_at(self, scale: float) -> float:
        if self.alpha is None:
            return scale
        return scale * self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    # --- building --------------------------------------------------------------------------------------------------

    @classmethod
    def of_method(cls, method: str) -> type["Delta[Any]"]:
        """The class of a method: "lora", "dora", "locon", "loha" or "lokr".

        Raises:
            AdapterTypeError: (a ValueError) There is none of that name.
        """
        for kind in Delta._kinds:
            if kind.method == method:
                # The class above the kinds, which finds the one for a layer.
                return next(above for above in kind.__mro__ if "method" in above.__dict__)
        known = sorted({kind.method for kind in Delta._kinds})
        raise AdapterTypeError(f"The method {method!r} is unknown: choose from {', '.join(known)}.")

    @classmethod
    def _forms(cls) -> list[type["Delta[Any]"]]:
        if cls.layer_type is not None:
            return [cls]
        method = getattr(cls, "method", None)
        return [kind for kind in Delta._kinds if method is None or kind.method == method]

    @classmethod
    def _kind_for(cls, target: nn.Module) -> type["Delta[Any]"]:
        kind = _kind_of_layer(cls, type(target), len(Delta._kinds))
        if kind is None:
            method = getattr(cls, "method", "")
            layers = ", ".join(sorted(kind.__name__ for kind in Delta._kinds if method in ("", kind.method)))
            kinds = {"lora": "LoRA", "dora": "DoRA", "locon": "LoCon", "loha": "LoHa", "lokr": "LoKr"}.get(
                method, "adapter"
            )
            raise AdapterTypeError(f"{cls.__name__} is not made for {target}. The kinds of {kinds} are {layers}.")
        return kind

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
        rank_stabilized: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> "Delta[Any]":
        """A new one of the right kind and shape for a layer, in its training mode. It changes nothing yet.

        Args:
            name: What it is called.
            target: The layer.
            rank: See `Delta`.
            scale: See `Delta`.
            alpha: See `Delta`.
            rank_stabilized: See `Delta`.
            device: That of the layer's weight unless given.
            dtype: That of the layer's weight unless given.
            **settings: What else the method has: `bias` of a LoRA, `tucker` of a LoHa, `factor`, `decompose_both` and
                `tucker` of a LoKr.

        Raises:
            AdapterTypeError: (a TypeError) The method is not defined for that layer.
        """
        kind = cls._kind_for(target)
        placed = placed_like(target, device, dtype)
        strength = Strength(scale=scale, alpha=alpha, rank_stabilized=rank_stabilized)
        delta = kind.like_layer(name, target, rank=rank, **strength, **placed, **settings)
        delta.start_from(target)
        return in_mode_of(target, delta)

    def start_from(self, layer: nn.Module, /) -> None:
        """Take over what a new adapter begins with from a layer. Nothing, for most methods."""

    @classmethod
    def from_spec(
        cls,
        name: str,
        /,
        spec: DeltaSpec,
        target: nn.Module,
        scale: float = 1.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "Delta[Any]":
        """One for a layer with the weights of a spec, which are copied. `spec.method` says which class it is of.

        Args:
            name: What it is called.
            spec: The weights.
            target: The layer.
            scale: See `Delta`.
            device: That of the layer's weight unless given.
            dtype: That of the layer's weight unless given.

        Raises:
            AdapterTypeError: (a ValueError) The spec is not sound, or does not fit the layer.
        """
        problems = spec.validate()
        if problems:
            raise AdapterTypeError(f"The {spec.method} {name!r} for {target} is not sound: {'; '.join(problems)}.")
        return cls.from_sound_spec(name, spec, target, scale, device=device, dtype=dtype)

    @classmethod
    def from_sound_spec(
        cls, name: str, /, spec: DeltaSpec, target: Any, scale: float = 1.0, **placed: Any
    ) -> "Delta[Any]":
        """What `from_spec` gives of a spec that `DeltaSpec.validate` was content with."""
        family = cls if getattr(cls, "method", None) == spec.method else Delta.of_method(spec.method)
        kind = family._kind_for(target)
        strength = Strength(scale=scale, alpha=spec.alpha, rank_stabilized=spec.rank_stabilized)
        if spec.rank is None and spec.alpha is not None:
            raise AdapterTypeError(f"No tensor of {name!r} tells its rank, which its alpha is divided by: declare it.")
        given, spec = axes_of(spec), spec if kind.weight_axes is None else with_axes(spec, target.weight.ndim)
        settings = kind.settings_of(spec, target)
        empty = kind.like_layer(name, target, rank=spec.rank or 1, **strength, **settings, device="meta")
        empty._check_shapes(spec, target)
        empty.given_axes = given
        factory = placed_like(target, placed.get("device"), placed.get("dtype"))
        for role, weight in empty.weights().items():
            tensor = spec.tensors[role].detach()
            weight.put(nn.Parameter(tensor.to(**factory, copy=True).contiguous()))
        return in_mode_of(target, empty)

    def _check_shapes(self, spec: DeltaSpec, target: nn.Module) -> None:
        shapes = {role: weight.tensor.shape for role, weight in self.weights().items()}
        given = {role: tensor.shape for role, tensor in spec.tensors.items()}
        if shapes != given:
            wrong = [role for role in {**shapes, **given} if shapes.get(role) != given.get(role)]
            had, needed = ({role: list(size) for role, size in sizes.items()} for sizes in (given, shapes))
            lines = "; ".join(f"{role} is {had.get(role)}, has to be {needed.get(role)}" for role in wrong)
            raise AdapterTypeError(f"The {spec.method} {self.name!r} does not fit {target}: {lines}.")

    # --- weights ---------------------------------------------------------------------------------------------------

    def spec(self) -> DeltaSpec:
        """This adapter as data. The tensors share the memory of the parameters."""
        tensors: dict[str, Tensor] = {}
        for role, (module, name, axes) in self.weights().items():
            tensor = getattr(module, name).detach()
            for axis in axes:
                tensor = tensor.narrow(axis, 0, self.rank)
            tensors[role] = tensor
        spec = DeltaSpec(self.method, tensors, self.alpha, self.rank_stabilized, self.rank)
        return spec if self.given_axes is None else with_axes(spec, self.given_axes)

    def load_spec(self, spec: DeltaSpec) -> None:
        """Copy the weights of a spec into the parameters that are there, filled up with zeros if its rank is smaller.

        Alpha and rank become the spec's, and the scale stays. A compiled model needs no compilation for that.

        Raises:
            AdapterTypeError: (a ValueError) The spec is not sound, is of another method, or does not fit. Nothing was
                loaded.
        """
        from refiners.fluxion.adapters.lora.swapping import misfits, write_spec

        problems = misfits(self, self.in_own_form(spec), self.weights())
        if problems:
            raise AdapterTypeError(f"The weights cannot go into {self}: {'; '.join(problems)}. Nothing was loaded.")
        write_spec(self, spec)

    def in_own_form(self, spec: DeltaSpec) -> DeltaSpec:
        """The spec with tensors of as many axes as its own; see `forms`."""
        return spec if self.weight_axes is None else with_axes(spec, self.weight_axes)

    def set_strength(self, spec: DeltaSpec, scale: float) -> None:
        """Take over from a spec what says how strong its weights are."""
        own = self.__dict__
        own["given_axes"] = axes_of(spec)
        own["rank"] = spec.rank or self.rank
        own["alpha"], own["rank_stabilized"] = spec.alpha, spec.rank_stabilized
        self.scale = scale

    def note_strength(self) -> None:
        """Let a transaction undo a `set_strength`, but for what others have computed from it: they see to that."""
        own, factor = self.__dict__, self._factor
        before = {name: getattr(self, name) for name in ("rank", "alpha", "rank_stabilized", "given_axes")}
        scaling, strength = factor.scale, factor.__dict__["strength"]

        def undo() -> None:
            own.update(before)
            factor.scale = scaling
            factor.__dict__["strength"] = strength

        note_undo(undo)

    # --- places ----------------------------------------------------------------------------------------------------

    def auto_attach(
        self, target: Chain, include: list[str] | None = None, exclude: list[str] | None = None
    ) -> "tuple[LoraAdapter, Chain | None] | None":
        """Find the first compatible layer below `target`, in walk order, that has no adapter of this name.

        Args:
            target: Where to search.
            include: Names of classes; if given, one of them must be above the layer.
            exclude: Names of classes; none of them may be above the layer.

        Returns:
            None without such a layer. If the layer has an adapter of LoRAs already, that adapter, which this one was
            added to, and None; otherwise a new adapter and the Chain to inject it into.
        """
        from refiners.fluxion.adapters.lora.attach import attach_to_first

        return attach_to_first(self, target, include, exclude)


@lru_cache(maxsize=256)
def _kind_of_layer(family: type[Delta[Any]], layer: type[nn.Module], known: int) -> type[Delta[Any]] | None:
    """The first kind of a family that is made for a class of layers, of as many kinds as are known."""
    forms = family._forms()  # pyright: ignore[reportPrivateUsage] (part of the class above)
    return next((kind for kind in forms if issubclass(layer, cast(type, kind.layer_type))), None)
