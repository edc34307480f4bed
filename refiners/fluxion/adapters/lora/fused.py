"""Fused LoRAs: all that stand on one layer run as one pair of products, of the sum of their ranks.

    (SUM) LoraAdapter()
    ├── Linear(…)
    ├── (CHAIN) LinearLora(name=a, …)         not run by itself
    ├── (CHAIN) LinearLora(name=b, …)         not run by itself
    └── FusedLoras(names=('a', 'b'), rank=32)

`x · [down_a | down_b]ᵀ`, each column times the scaling of its LoRA, is multiplied by `[up_a | up_b]ᵀ` and added to the
output of the layer in the same operation. The sum is the same up to rounding; LoRAs that are not fused are, to the last
bit, what peft computes.

The weights of the LoRAs lie side by side in the fused matrices, so fusing takes no memory, and what is written into the
weights of one in place is seen at once. Scales may be set at any time. Where gradients of the weights are asked for,
the matrices are put together in the graph, and each LoRA gets its own.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from refiners.fluxion.adapters.lora.base import Lora
from refiners.fluxion.layers.journal import note_undo
from refiners.fluxion.layers.module import Module

# What is computed from the weights and the scales.
_COMPUTED = ("_down", "_transposed", "_up", "_scales", "_common_scale", "is_silent")


class FusedLoras(Module):
    """What several LoRAs of one layer add to its output, in one pair of products.

    Receives:
        x: `Float[Tensor, "..."]`, what the layer receives
        output: `Float[Tensor, "..."]`, what is there so far
        may_overwrite: whether nobody else has seen that output

    Returns:
        `Float[Tensor, "..."]`, the output with the LoRAs in it
    """

    _down: Tensor
    _transposed: Tensor
    _up: Tensor
    _scales: Tensor
    _common_scale: float | None

    def __init__(self, *loras: Lora[Any]) -> None:
        super().__init__()
        self.training = loras[0].training
        self.names = tuple(lora.name for lora in loras)
        self.rank = sum(_rows(lora) for lora in loras)
        # Not children: the adapter holds them.
        self.__dict__["_loras"] = loras
        self.is_linear = isinstance(loras[0].down, nn.Linear)
        # A structural copy shares this node, and must not run it any longer than the original does.
        self.is_live = True
        self.is_silent = False
        self._put_side_by_side()
        self.refresh()

    @property
    def loras(self) -> tuple[Lora[Any], ...]:
        """The LoRAs, in the order of their ranks."""
        return self.__dict__["_loras"]

    def has(self, delta: Any) -> bool:
        """Whether this runs an adapter, or one of which that is a structural copy."""
        return self.is_live and any(lora.switch is delta.switch for lora in self.loras)

    def forward(self, x: Tensor, output: Tensor, may_overwrite: bool = False) -> Tensor:
        if not self.is_live:
            return output
        if (
            may_overwrite
            and not torch.compiler.is_compiling()
            and not torch.is_grad_enabled()
            and self._common_scale is not None
            and self.is_linear
            and x.dtype == output.dtype
            and output.is_contiguous()
        ):
            # What the rest comes to as a rule, in as few steps as it can be: it runs next to every layer.
            number = self._common_scale
            if number:
                up = self._up
                inner = torch.mm(x.reshape(-1, x.shape[-1]), self._transposed)
                output.view(-1, up.shape[1]).addmm_(inner, up, alpha=number)
            return output
        is_trained = torch.is_grad_enabled() and any(
            weight.requires_grad for lora in self.loras for weight in (lora.down.weight, lora.up.weight)
        )
        if torch.compiler.is_compiling():
            changed = self._add(x, output, is_trained, in_place=False)
            # A number that decides what runs would be compiled anew whenever it is set.
            return torch.where(self._scales.any(), changed, output)
        if self.is_silent and not is_trained:
            return output
        return self._add(x, output, is_trained, in_place=may_overwrite and not torch.is_grad_enabled())

    def _add(self, x: Tensor, output: Tensor, is_trained: bool, in_place: bool) -> Tensor:
        if not self.is_linear:
            return self._add_images(x, output, *(self._joined() if is_trained else (self._down, self._up)))
        if is_trained:
            down, up = self._joined()
            return self._add_products(x, output, down.t(), up, in_place)
        return self._add_products(x, output, self._transposed, self._up, in_place)

    def _add_products(self, x: Tensor, output: Tensor, down: Tensor, up: Tensor, in_place: bool) -> Tensor:
        inner = torch.mm(x.reshape(-1, down.shape[0]), down)
        # A number would be compiled into the code.
        number = None if torch.compiler.is_compiling() else self._common_scale
        if number is None:
            inner, number = inner * self._scales, 1.0
        if inner.dtype == output.dtype:
            if in_place and output.is_contiguous():
                output.view(-1, up.shape[1]).addmm_(inner, up, alpha=number)
                return output
            return torch.addmm(output.reshape(-1, up.shape[1]), inner, up, alpha=number).view(output.shape)
        return output + (torch.mm(inner, up) * number).view(output.shape)

    def _add_images(self, x: Tensor, output: Tensor, down: Tensor, up: Tensor) -> Tensor:
        first = self.loras[0]
        inner = first.down._conv_forward(x, down, None)
        inner = inner * self._scales.view(-1, *[1] * (down.ndim - 2))
        return output + first.up._conv_forward(inner, up, None)

    def refresh(self) -> None:
        """Read the scales of the LoRAs again, and their weights if these have been moved or replaced.

        A transaction can undo it.
        """
        own = self.__dict__
        before = {name: own[name] for name in _COMPUTED if name in own}
        note_undo(lambda: own.update(before))
        if not self._is_side_by_side():
            self._put_side_by_side()
        numbers: list[float] = []
        for lora in self.loras:
            runs = lora.switch.enabled and not lora.switch.merged
            numbers += [lora.scaling if runs else 0.0] * _rows(lora)
        # A new tensor rather than new values in the old one, which another thread may be reading.
        self.__dict__["_scales"] = torch.tensor(numbers, dtype=self._down.dtype, device=self._down.device)
        # Mostly there is one, and then the last operation multiplies by it too.
        self._common_scale = numbers[0] if len(set(numbers)) == 1 else None
        self.is_silent = not any(numbers)

    def _joined(self) -> tuple[Tensor, Tensor]:
        downs = [lora.down.weight for lora in self.loras]
        ups = [lora.up.weight for lora in self.loras]
        if self.is_linear:
            return torch.cat(downs), torch.cat([up.t() for up in ups])
        return torch.cat(downs), torch.cat(ups, dim=1)

    def _put_side_by_side(self) -> None:
        """Make one matrix of all `down`, and one of all `up`, of which the LoRAs' weights are parts from now on."""
        with torch.no_grad():
            self.__dict__["_down"], self.__dict__["_up"] = self._joined()
        self.__dict__["_transposed"] = self._down.t() if self.is_linear else self._down
        start = 0
        for lora in self.loras:
            rows = slice(start, start + _rows(lora))
            _set_data(lora.down.weight, self._down[rows])
            _set_data(lora.up.weight, self._up[rows].t() if self.is_linear else self._up[:, rows])
            start = rows.stop

    def take_apart(self) -> None:
        """Give each LoRA memory of its own again."""
        for lora in self.loras:
            for weight in (lora.down.weight, lora.up.weight):
                _set_data(weight, weight.data.clone(memory_format=torch.contiguous_format))
        _set(self, "is_live", False)

    def _is_side_by_side(self) -> bool:
        start = 0
        for lora in self.loras:
            rows = slice(start, start + _rows(lora))
            parts = (self._down[rows], self._up[rows] if self.is_linear else self._up[:, rows])
            for weight, part in zip((lora.down.weight, lora.up.weight), parts, strict=True):
                if (weight.data_ptr(), weight.dtype, weight.device) != (part.data_ptr(), part.dtype, part.device):
                    return False
            start = rows.stop
        return True

    # The LoRAs stand before this node, so they were converted or loaded just before it is.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if self.is_live:
            self.refresh()
        return super()._apply(fn, recurse)  # pyright: ignore[reportUnknownMemberType] (torch does not annotate it)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # Not `refresh` of this very object, which may be a view that serves to load only.
        for lora in self.loras[:1]:
            lora.switch.changed()
        super()._load_from_state_dict(*args, **kwargs)  # pyright: ignore[reportUnknownMemberType] (as above)


def fuse_loras(loras: Iterable[Lora[Any]]) -> list[FusedLoras]:
    """Fuse the LoRAs of one layer, or those among them that can be. A transaction can undo it."""
    groups: dict[Any, list[Lora[Any]]] = {}
    for lora in loras:
        shape = _shape(lora)
        if shape is not None:
            groups.setdefault(shape, []).append(lora)
    return [_fused(group) for group in groups.values()]


def _fused(loras: list[Lora[Any]]) -> FusedLoras:
    fused = FusedLoras(*loras)
    for lora in loras:
        _set_fused(lora, fused, value=True)
    return fused


def unfuse_loras(fused: FusedLoras) -> None:
    """The inverse: each LoRA has memory of its own, and runs by itself."""
    fused.take_apart()
    for lora in fused.loras:
        _set_fused(lora, fused, value=False)


def _set_fused(lora: Lora[Any], fused: FusedLoras, value: bool) -> None:
    switch, acts = lora.switch, lora.switch.on_change

    def undo() -> None:
        switch.on_change = acts
        switch.set("fused", not value)

    note_undo(undo)
    switch.on_change = (*acts, fused.refresh) if value else tuple(act for act in acts if act != fused.refresh)
    switch.set("fused", value)


def _rows(lora: Lora[Any]) -> int:
    return lora.down.weight.shape[0]


def _shape(delta: Any) -> Any:
    """What LoRAs must share to be fused; None for what cannot be."""
    if not isinstance(delta, Lora) or delta.method != "lora" or delta.switch.merged or delta.switch.fused:
        return None  # what is fused is so in a structural copy, whose matrices hold its weights
    down: Any = delta.down
    up: Any = delta.up
    weight = down.weight
    if up.bias is not None or weight.is_meta:
        return None
    kind: tuple[Any, ...] = (down.__class__, weight.shape[1:], up.weight.shape[0], weight.dtype, weight.device)
    if isinstance(down, nn.Linear):
        return kind
    if not isinstance(down, nn.Conv1d | nn.Conv2d | nn.Conv3d) or up.groups != 1:
        return None
    geometry = [(m.kernel_size, m.stride, m.padding, m.dilation, m.padding_mode) for m in (down, up)]
    return (*kind, *geometry)


def _set_data(parameter: nn.Parameter, tensor: Tensor) -> None:
    before = parameter.data
    note_undo(lambda: setattr(parameter, "data", before))
    parameter.data = tensor


def _set(module: Any, name: str, value: Any) -> None:
    before = getattr(module, name)
    note_undo(lambda: setattr(module, name, before))
    setattr(module, name, value)
