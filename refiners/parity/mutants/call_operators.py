"""Operators of mutation that spoil what a leaf calls; see `operators` and `calls` beside it.

Each looks at one call of a function of torch that a leaf made, and tells how that call could have been written wrongly.
"""

# What a call is made with is anything: the lambdas below have no types.
# pyright: reportUnknownLambdaType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false
# pyright: reportUnknownVariableType=false, reportUnknownParameterType=false
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from refiners.parity.mutants.calls import KNOWN, Call, Change, named, with_arguments, with_call
from refiners.parity.mutants.operators import Lanes, Site, Ways, operator

Changes = Iterator[tuple[str, Change]]
FindInCall = Callable[[Call, Mapping[str, Any]], Changes]
"""Called with a call and its arguments by name."""


def call_operator(name: str, functions: str, lanes: Lanes = "any") -> Callable[[FindInCall], FindInCall]:
    """Registers an operator that spoils calls of some functions, named with a space between them."""
    names = functions.split()

    def register(find: FindInCall) -> FindInCall:
        def find_in_leaf(site: Site) -> Ways:
            told: set[str] = set()
            for call in site.seen.calls if site.is_leaf else ():
                if call.name not in names:
                    continue
                given = named(call.name, call.args, call.kwargs) if call.name in KNOWN else {}
                for parameter, change in find(call, given):
                    place = call.name if not call.occurrence else f"{call.name} {call.occurrence + 1}"
                    way = f"{place}, {parameter}" if parameter else place
                    if way not in told:
                        told.add(way)
                        yield way, with_call(site.module, call, change)

        find_in_leaf.__doc__ = find.__doc__
        operator(name, lanes)(find_in_leaf)
        return find

    return register


def _given(**changes: Callable[[dict[str, Any]], Any]) -> Change:
    """A change of some arguments, each by a function of all of them."""
    return with_arguments(lambda given: {name: change(given) for name, change in changes.items()})


def _constant(value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda given: value


# --- attention ----------------------------------------------------------------------------------------------------

ATTENTION = "scaled_dot_product_attention"


@call_operator("attention-scale", ATTENTION)
def attention_scale(call: Call, given: Mapping[str, Any]) -> Changes:
    """The scores are scaled by another number."""
    query: Tensor = given["query"]
    width, num_heads = query.shape[-1], query.shape[1] if query.ndim == 4 else 1
    own = given.get("scale")
    own = 1 / math.sqrt(width) if own is None else own
    others = {"1": 1.0, "1/d": 1 / width, "twice": 2 * own, "of the whole width": (width * num_heads) ** -0.5}
    for name, scale in others.items():
        if scale != own:
            yield name, _given(scale=_constant(scale))
    for name, scale in {"1/sqrt(d)": 1 / math.sqrt(width), "d**-0.5": width**-0.5}.items():
        if scale != own:
            yield f"{name}, which rounds differently", _given(scale=_constant(scale))


@call_operator("mask", ATTENTION)
def mask(call: Call, given: Mapping[str, Any]) -> Changes:
    """The attention mask is dropped, misread or misplaced."""
    own = given.get("attn_mask")
    if not isinstance(own, Tensor):
        return
    yield "dropped", _given(attn_mask=_constant(None))
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "flipped": lambda m: ~m if m.dtype == torch.bool else -m,
        "one further": lambda m: m.roll(1, -1),
        "one back": lambda m: m.roll(-1, -1),
    }
    if own.shape[-1] == own.shape[-2]:
        ways["of queries, not keys"] = lambda m: m.transpose(-1, -2)
    if own.shape[0] > 1:
        ways["of the first of the batch"] = lambda m: m[:1].expand(m.shape)
    if own.dtype == torch.bool:
        ways["added as 0 and 1"] = lambda m: m.to(torch.get_default_dtype())
    for name, way in ways.items():
        yield name, _given(attn_mask=lambda given, way=way: _placed(way(given["attn_mask"]), given["query"]))


def _placed(made: Tensor, query: Tensor) -> Tensor:
    return made if made.dtype == torch.bool else made.to(query.dtype)


@call_operator("causal", ATTENTION)
def causal(call: Call, given: Mapping[str, Any]) -> Changes:
    """Each token sees those after it as well, or no longer does."""
    if given.get("attn_mask") is None:
        yield "toggled", _given(is_causal=lambda given: not given.get("is_causal", False))
        return

    def with_triangle(given: dict[str, Any]) -> Tensor:
        own: Tensor = given["attn_mask"]
        seen = torch.ones(own.shape[-2:], dtype=torch.bool, device=own.device).tril()
        return own & seen if own.dtype == torch.bool else own.masked_fill(~seen, -torch.inf)

    yield "on top of the mask", _given(attn_mask=with_triangle)


@call_operator("attention-inputs", ATTENTION)
def attention_inputs(call: Call, given: Mapping[str, Any]) -> Changes:
    """Queries, keys and values are mixed up inside the attention."""
    if given["query"].shape == given["key"].shape == given["value"].shape:
        for one, other in (("query", "key"), ("query", "value"), ("key", "value")):
            yield f"{one} and {other}", with_arguments(lambda given, a=one, b=other: {a: given[b], b: given[a]})
    if given["value"].ndim == 4 and given["value"].shape[1] > 1:
        yield "heads of the values rolled", _given(value=lambda given: given["value"].roll(1, 1))


@call_operator("attention-precision", ATTENTION, lanes="half")
def attention_precision(call: Call, given: Mapping[str, Any]) -> Changes:
    """The attention computes in float32."""

    def change(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        wide = [_float(value) for value in args]
        return func(*wide, **{key: _float(value) for key, value in kwargs.items()}).to(given["query"].dtype)

    yield "float32", change


def _float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


# --- norms and linear maps ----------------------------------------------------------------------------------------

NORMS = "layer_norm group_norm rms_norm"


@call_operator("eps", f"{NORMS} normalize")
def eps(call: Call, given: Mapping[str, Any]) -> Changes:
    """Another number that keeps a norm from dividing by zero."""
    own = given.get("eps")
    if isinstance(own, float):
        for name, other in {f"{eps:g}": eps for eps in (10 * own, own / 10, 1e-12, 1e-6, 1e-5, 1e-3)}.items():
            if name != f"{own:g}":
                yield f"{own:g} to {name}", _given(eps=_constant(other))


@call_operator("bias", f"{NORMS} linear conv1d conv2d conv_transpose2d")
def bias(call: Call, given: Mapping[str, Any]) -> Changes:
    """A bias is dropped or added twice."""
    if isinstance(given.get("bias"), Tensor):
        yield "dropped", _given(bias=_constant(None))
        yield "twice", _given(bias=lambda given: 2 * given["bias"])


@call_operator("gain", NORMS)
def gain(call: Call, given: Mapping[str, Any]) -> Changes:
    """A norm forgets its weight, or adds 1 to it."""
    if isinstance(given.get("weight"), Tensor):
        yield "dropped", _given(weight=_constant(None))
        yield "1 + weight", _given(weight=lambda given: 1 + given["weight"])


@call_operator("transpose-weight", "linear conv1d conv2d")
def transpose_weight(call: Call, given: Mapping[str, Any]) -> Changes:
    """A square matrix or kernel is read transposed."""
    weight: Tensor = given["weight"]
    if weight.shape[-1] == weight.shape[-2] > 1:
        yield "", _given(weight=lambda given: given["weight"].transpose(-1, -2).contiguous())


@call_operator("convolution", "conv1d conv2d")
def convolution(call: Call, given: Mapping[str, Any]) -> Changes:
    """The kernel, the channels or the padding are misread."""
    if given["weight"].shape[-1] > 1:
        yield "kernel flipped", _given(weight=lambda given: given["weight"].flip(-1))
    if given["input"].shape[1] > 1:
        yield "channels reversed", _given(input=lambda given: given["input"].flip(1))
    own = given.get("padding", 0)
    if own == "same" and set(given["weight"].shape[2:]) == {3}:
        own = 1
    if own not in (1, (1,), (1, 1)):
        yield "padding 1", _given(padding=_constant(1))
    if own not in (0, (0,), (0, 0)):
        yield "no padding", _given(padding=_constant(0))


# --- places and pieces --------------------------------------------------------------------------------------------


@call_operator("index", "__getitem__")
def index(call: Call, given: Mapping[str, Any]) -> Changes:
    """An index or a slice is off by one."""
    source, key = call.args[0], call.args[1]
    parts = key if isinstance(key, tuple) else (key,)
    for at, part in enumerate(parts):
        for name, other in _off_by_one(part, source.shape):

            def change(func: Any, args: Any, kwargs: Any, at: int = at, other: Any = other) -> Any:
                parts = list(args[1]) if isinstance(args[1], tuple) else [args[1]]
                parts[at] = other(parts[at]) if callable(other) else other
                return func(args[0], tuple(parts))

            yield f"axis {at} {name}", change


def _off_by_one(part: Any, shape: torch.Size) -> Iterator[tuple[str, Any]]:
    if isinstance(part, bool):
        return
    if isinstance(part, int):
        yield f"{part} to {part + 1}", part + 1
        yield f"{part} to {part - 1}", part - 1
    elif isinstance(part, slice) and (part.start is not None or part.stop is not None):
        if isinstance(part.start, int):
            yield "start one further", slice(part.start + 1, part.stop, part.step)
        if isinstance(part.stop, int):
            yield "stop one further", slice(part.start, part.stop + 1, part.step)
    elif isinstance(part, Tensor) and not part.is_floating_point() and part.dtype != torch.bool:
        yield "one before", lambda own: own - 1


@call_operator("position", "arange")
def position(call: Call, given: Mapping[str, Any]) -> Changes:
    """Counting begins at 1."""
    yield "from 1", lambda func, args, kwargs: func(*args, **kwargs) + 1


@call_operator("lookup", "embedding")
def lookup(call: Call, given: Mapping[str, Any]) -> Changes:
    """A table is read one row further."""
    yield "one further", _given(input=lambda given: (given["input"] + 1) % given["weight"].shape[0])
    if given.get("padding_idx") is not None:
        yield "padding is trained", _given(padding_idx=_constant(None))
    elif given["weight"].shape[0] > 1:
        yield "row 0 is not trained", _given(padding_idx=_constant(0))


@call_operator("maximum", "argmax")
def maximum(call: Call, given: Mapping[str, Any]) -> Changes:
    """Of several equal maxima the last one, or the smallest number."""

    def last(func: Any, args: Any, kwargs: Any) -> Tensor:
        return args[0].shape[-1] - 1 - func(args[0].flip(-1), *args[1:], **kwargs)

    yield "the last one", last
    yield "of the negative", lambda func, args, kwargs: func(-args[0], *args[1:], **kwargs)


@call_operator("axis", "sum mean normalize softmax flatten cat argmax stack")
def axis(call: Call, given: Mapping[str, Any]) -> Changes:
    """An operation works along another axis."""
    source = given.get("input", given.get("tensors"))
    rank = (source[0] if isinstance(source, list | tuple) else source).ndim
    name = "start_dim" if call.name == "flatten" else "dim"
    own = given.get(name, 0)
    for other in range(rank):
        if isinstance(own, int) and other != own % rank:
            yield f"{name} {own} to {other}", _given(**{name: _constant(other)})


@call_operator("exchange-axes", "transpose permute t")
def exchange_axes(call: Call, given: Mapping[str, Any]) -> Changes:
    """Axes that were exchanged stay as they are."""
    source = call.args[0]
    yield "not exchanged", lambda func, args, kwargs: args[0]
    if call.output.shape != source.shape:
        yield "read as if", lambda func, args, kwargs: args[0].reshape(func(*args, **kwargs).shape)


@call_operator("concatenation", "cat concat stack")
def concatenation(call: Call, given: Mapping[str, Any]) -> Changes:
    """Parts are concatenated in the other order."""
    yield "reversed", _given(tensors=lambda given: list(given["tensors"])[::-1])


@call_operator("interpolation", "interpolate")
def interpolation(call: Call, given: Mapping[str, Any]) -> Changes:
    """Pictures are resized in another way."""
    own = given.get("mode", "nearest")
    sizes = zip(given["input"].shape[2:], call.output.shape[2:], strict=True)
    is_repeated = own == "nearest" and all(new % old == 0 for old, new in sizes)
    for other in ("bicubic", "bilinear", "nearest", "area"):
        if other != own and not (other == "area" and is_repeated):
            corners = given.get("align_corners") if other in ("bicubic", "bilinear") else None
            yield f"{own} to {other}", _given(mode=_constant(other), align_corners=_constant(corners))
    if own in ("bicubic", "bilinear"):
        yield "align_corners", _given(align_corners=lambda given: not given.get("align_corners"))
        yield "antialias", _given(antialias=lambda given: not given.get("antialias", False))
    size = given.get("size")
    if isinstance(size, tuple | list):
        yield "height and width exchanged", _given(size=lambda given: tuple(given["size"])[::-1])


# --- arithmetic ---------------------------------------------------------------------------------------------------


@call_operator("constant", "mul add sub div pow __rmul__ __radd__ __rsub__ __rdiv__ __rpow__ rsub add_ mul_ sub_ div_")
def constant(call: Call, given: Mapping[str, Any]) -> Changes:
    """A number in a formula is another."""
    for at, value in enumerate(call.args[:2]):
        if isinstance(value, int | float) and not isinstance(value, bool):
            other = value * 1.01 if value else 1.0
            yield f"{value:g} to {other:g}", _with_number(at, value, other)
            if isinstance(value, int) and value > 2:
                yield f"{value} to {value - 1}", _with_number(at, value, value - 1)


def _with_number(at: int, own: float, other: float) -> Change:
    """Another number, in those forwards in which it is that one."""

    def change(func: Any, args: Any, kwargs: Any) -> Any:
        is_it = not isinstance(args[at], Tensor) and args[at] == own
        return func(*args[:at], other, *args[at + 1 :], **kwargs) if is_it else func(*args, **kwargs)

    return change


COMPUTING = "exp log tanh sigmoid sqrt rsqrt square erf normalize softmax div matmul"
"""Functions that compute numbers; those that only choose among them are the same in any precision."""


@call_operator("skip", f"{COMPUTING} abs relu clamp clip mul add sub pow")
def skip(call: Call, given: Mapping[str, Any]) -> Changes:
    """One operation inside a leaf is missing."""
    source = call.args[0]
    if isinstance(source, Tensor) and isinstance(call.output, Tensor) and source.shape == call.output.shape:
        yield "missing", lambda func, args, kwargs: args[0].to(call.output.dtype)


@call_operator("downcast", COMPUTING, lanes="half")
def downcast(call: Call, given: Mapping[str, Any]) -> Changes:
    """A number is kept in float32 between two operations."""

    def change(func: Any, args: Any, kwargs: Any) -> Any:
        output = func(*map(_float, args), **kwargs)
        return output.to(call.output.dtype)

    if isinstance(call.output, Tensor) and call.output.is_floating_point():
        yield "float32", change


@call_operator("cast", "to float double type type_as int long", lanes="half")
def cast_missing(call: Call, given: Mapping[str, Any]) -> Changes:
    """A cast is missing. To move to a device is none."""
    asked = (*call.args[1:], *call.kwargs.values())
    moves = call.name == "to" and all(isinstance(one, torch.device | str | int) for one in asked)
    if isinstance(call.args[0], Tensor) and not moves:
        yield "missing", lambda func, args, kwargs: args[0]


@call_operator("zero", "zeros_like ones zeros ones_like")
def zero(call: Call, given: Mapping[str, Any]) -> Changes:
    """What is looked up by default is 1 instead of 0, or 0 instead of 1."""
    yield "1 - it", lambda func, args, kwargs: 1 - func(*args, **kwargs)
