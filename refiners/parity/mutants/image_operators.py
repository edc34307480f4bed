"""Operators of mutation for what convolutional networks are made of: kernels, groups, sizes, halves, lists of skips.

As in `refiners.parity.mutants.call_operators`, each looks at a call or a node and knows no model.
"""

# What a call is made with is anything: the lambdas below have no types.
# pyright: reportUnknownLambdaType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false
# pyright: reportUnknownVariableType=false, reportUnknownParameterType=false
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from refiners.fluxion.layers.context_access import SetContext, UseContext
from refiners.parity.mutants.call_operators import Changes, call_operator
from refiners.parity.mutants.calls import Call, named, with_arguments
from refiners.parity.mutants.operators import Site, Ways, cut_off, operator
from refiners.parity.mutants.planting import with_forward

CONVOLUTIONS = "conv1d conv2d"


def _sides(value: int | Sequence[int], count: int) -> list[int]:
    """One number for each axis of pixels."""
    return [value] * count if isinstance(value, int) else [*value] * (count // len(value))


@call_operator("geometry", CONVOLUTIONS)
def geometry(call: Call, given: Mapping[str, Any]) -> Changes:
    """Padding lies on one side only or repeats the edge, a stride begins one pixel later, a kernel is spread."""
    axes = given["weight"].ndim - 2
    padding, stride = given.get("padding", 0), _sides(given.get("stride", 1), axes)
    kernel = given["weight"].shape[2:]
    if isinstance(padding, str):
        return
    sides = _sides(padding, axes)
    if any(sides):
        for name, pad in (("before", (2, 0)), ("behind", (0, 2))):
            amounts = [side * one for side in reversed(sides) for one in pad]
            yield f"all padding {name}", _padded_by(amounts, "constant")
        amounts = [side for side in reversed(sides) for _ in range(2)]
        for mode in ("reflect", "replicate", "circular"):
            if _fits(mode, call.args[0], sides):
                yield f"padding mode {mode}", _padded_by(amounts, mode)
        spread = [side * 2 for side in sides]
        if all(k == 2 * side + 1 for k, side in zip(kernel, sides, strict=True)) and given.get("dilation", 1) in (
            1,
            (1,) * axes,
        ):
            yield "dilation 2", with_arguments(lambda given: {"dilation": 2, "padding": tuple(spread)})
    if any(step > 1 for step in stride):
        yield "begins one pixel later", with_arguments(lambda given: {"input": given["input"].roll(-1, -1)})
    if axes == 2 and kernel[-2] > 1:
        yield "kernel upside down", with_arguments(lambda given: {"weight": given["weight"].flip(-2)})


def _fits(mode: str, x: Tensor, sides: Sequence[int]) -> bool:
    """Whether a picture is large enough to be padded in that way, and small enough not to look the same."""
    less = 1 if mode == "reflect" else 0
    return all(side <= size - less for side, size in zip(sides, x.shape[2:], strict=True)) and x.numel() > 0


def _padded_by(amounts: Sequence[int], mode: str) -> Any:
    def change(given: dict[str, Any]) -> Mapping[str, Any]:
        return {"input": functional.pad(given["input"], list(amounts), mode=mode), "padding": 0}

    return with_arguments(change)


@call_operator("group-count", "group_norm")
def group_count(call: Call, given: Mapping[str, Any]) -> Changes:
    """A norm has another number of groups, or its groups are made of every n-th channel."""
    own, channels = given["num_groups"], given["input"].shape[1]
    for count in dict.fromkeys((2 * own, own // 2, 1)):
        if count > 0 and count != own and channels % count == 0:
            yield f"{own} to {count}", with_arguments(lambda given, count=count: {"num_groups": count})
    if 1 < own < channels:

        def interleaved(func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
            call = named("group_norm", args, kwargs)
            x: Tensor = call.pop("input").unflatten(1, (-1, own)).transpose(1, 2).flatten(1, 2)
            made = functional.group_norm(x, call["num_groups"], eps=call["eps"])
            made = made.unflatten(1, (own, -1)).transpose(1, 2).flatten(1, 2)
            shape = (1, -1, *(1,) * (made.ndim - 2))
            return made * call["weight"].view(shape) + call["bias"].view(shape)

        if given.get("weight") is not None and given.get("bias") is not None:
            yield "every n-th channel", interleaved


@call_operator("resize", "interpolate")
def resize(call: Call, given: Mapping[str, Any]) -> Changes:
    """A picture is resized to its nearest pixels from another corner, or by its size instead of a factor."""
    source, made = given["input"], call.output
    whole = all(new % old == 0 for old, new in zip(source.shape[2:], made.shape[2:], strict=True))
    if given.get("mode", "nearest") == "nearest":
        if not whole:
            yield "nearest to nearest-exact", with_arguments(lambda given: {"mode": "nearest-exact"})
        yield "one pixel further", lambda func, args, kwargs: func(*args, **kwargs).roll(1, -1)
    if made.shape[2:] != source.shape[2:] and whole:
        yield "tiled", lambda func, args, kwargs: _tiled(args[0], func(*args, **kwargs))


def _tiled(source: Tensor, made: Tensor) -> Tensor:
    times = [new // old for old, new in zip(source.shape, made.shape, strict=True)]
    return source.repeat(*times)


@call_operator("padding", "pad")
def padding(call: Call, given: Mapping[str, Any]) -> Changes:
    """What is padded lies on the other side, is another number, or repeats the edge."""
    amounts = list(given["pad"])
    pairs = [amounts[i : i + 2] for i in range(0, len(amounts), 2)]
    if any(first != second for first, second in pairs):
        other = [one for first, second in pairs for one in (second, first)]
        yield "on the other side", with_arguments(lambda given: {"pad": other})
    if given.get("mode", "constant") == "constant":
        yield "with 1", with_arguments(lambda given: {"value": 1.0})
        if given["input"].ndim > len(pairs) and len(pairs) <= 3:
            yield "with the edge", with_arguments(lambda given: {"mode": "replicate", "value": None})


@call_operator("pieces", "chunk split unbind tensor_split")
def pieces(call: Call, given: Mapping[str, Any]) -> Changes:
    """Pieces of a tensor are taken in another order, or are made of every n-th element."""
    parts: Sequence[Tensor] = call.output
    shapes = {part.shape for part in parts}
    if len(shapes) == 1 and len(parts) > 1:
        yield "reversed", lambda func, args, kwargs: tuple(func(*args, **kwargs))[::-1]
        for at in range(len(parts) - 1) if len(parts) > 2 else ():

            def exchanged(func: Any, args: Any, kwargs: Any, at: int = at) -> tuple[Tensor, ...]:
                made = list(func(*args, **kwargs))
                made[at], made[at + 1] = made[at + 1], made[at]
                return tuple(made)

            yield f"{at} and {at + 1} exchanged", exchanged
    if call.name == "chunk" and len(shapes) == 1 and parts[0].shape[given.get("dim", 0)] > 1:

        def interleaved(func: Any, args: Any, kwargs: Any) -> tuple[Tensor, ...]:
            call = named("chunk", args, kwargs)
            dim = call.get("dim", 0)
            return tuple(call["input"].unflatten(dim, (-1, call["chunks"])).unbind(dim + 1 if dim >= 0 else dim))

        yield "every n-th", interleaved


@call_operator("reading-order", "reshape view unflatten flatten")
def reading_order(call: Call, given: Mapping[str, Any]) -> Changes:
    """An axis is cut into two, or two are joined, in the other order."""
    source, made = call.args[0], call.output
    if not isinstance(source, Tensor) or not isinstance(made, Tensor):
        return
    if (cut := _joined(made.shape, source.shape)) is not None:
        yield "cut", lambda func, args, kwargs: _cut(func(*args, **kwargs), cut)
    elif (joined := _joined(source.shape, made.shape)) is not None:
        yield "joined", lambda func, args, kwargs: _join(args[0], func(*args, **kwargs), joined)


def _cut(made: Tensor, axis: int) -> Tensor:
    first, second = made.shape[axis : axis + 2]
    return made.reshape(*made.shape[:axis], second, first, *made.shape[axis + 2 :]).transpose(axis, axis + 1)


def _join(source: Tensor, made: Tensor, axis: int) -> Tensor:
    return source.transpose(axis, axis + 1).reshape(made.shape)


def _joined(long: Sequence[int], short: Sequence[int]) -> int | None:
    """The axis that is cut in two where one shape has an axis more than another; None for any other change."""
    if len(long) != len(short) + 1:
        return None
    for axis in range(len(short)):
        first, second = long[axis : axis + 2]
        rest = [*long[:axis], first * second, *long[axis + 2 :]]
        if first > 1 and second > 1 and rest == list(short):
            return axis
    return None


# --- what nodes hand to one another through contexts --------------------------------------------------------------

Value = Callable[[Any], Any]


@operator("used-value")
def used_value(site: Site) -> Ways:
    """A value that is read from a context is that of the first item, or comes in another order, or lacks a part."""
    if not isinstance(site.module, UseContext):
        return
    for name, way in _misread(site.seen.output):
        yield name, with_forward(site.module, lambda original, *args, way=way: way(original(*args)))


def _misread(value: Any) -> Iterator[tuple[str, Value]]:
    if isinstance(value, Tensor) and value.ndim and value.shape[0] > 1:
        yield "of the first item", lambda x: x[:1].expand(x.shape)
        yield "of the item before", lambda x: x.roll(1, 0)
    if isinstance(value, list | tuple) and len(value) > 1:
        yield "reversed", lambda values: type(values)(values[::-1]) if type(values) in (list, tuple) else values[::-1]


@operator("stored-value")
def stored_value(site: Site) -> Ways:
    """A value that is stored in a context is not, or cannot be trained through."""
    if isinstance(site.module, SetContext) and site.inputs:
        yield "zeros", with_forward(site.module, _instead(site, torch.zeros_like))
        if site.inputs[0].is_floating_point():
            yield "detached", with_forward(site.module, _instead(site, cut_off))


def _instead(site: Site, change: Callable[[Tensor], Tensor]) -> Any:
    def forward(original: Any, x: Tensor) -> Tensor:
        original(change(x))
        return x

    return forward
