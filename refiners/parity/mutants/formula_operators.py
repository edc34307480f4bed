"""Operators of mutation for formulas and tables: embeddings of time, schedules of noise, the steps of a solver.

As in `refiners.parity.mutants.call_operators`, each looks at a call or a leaf and knows no model. What a constructor
computes is there when a fault is planted; so the tables that a leaf keeps and reads are spoilt themselves.
"""

# What a call is made with is anything: the lambdas below have no types.
# pyright: reportUnknownLambdaType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false
# pyright: reportUnknownVariableType=false, reportUnknownParameterType=false
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, cast, get_args, get_type_hints

import torch
from torch import Tensor, nn

from refiners.parity.mutants.call_operators import Changes, call_operator
from refiners.parity.mutants.calls import Call, with_arguments
from refiners.parity.mutants.operators import Site, Ways, operator
from refiners.parity.mutants.planting import Edit, Undo, with_attribute

FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "sin": torch.cos,
    "cos": torch.sin,
    "lt": torch.le,
    "le": torch.lt,
    "gt": torch.ge,
    "ge": torch.gt,
    "maximum": torch.minimum,
    "minimum": torch.maximum,
    "floor": torch.ceil,
    "ceil": torch.floor,
    "round": torch.floor,
    "trunc": torch.round,
    "exp": torch.expm1,
    "cumprod": torch.cumsum,
    "cumsum": torch.cumprod,
    "add": torch.sub,
    "sub": torch.add,
    "mul": torch.div,
    "div": torch.mul,
    "sqrt": torch.square,
    "rsqrt": torch.sqrt,
}


@call_operator("function", " ".join(FUNCTIONS))
def function(call: Call, given: Mapping[str, Any]) -> Changes:
    """A formula uses the neighbour of a function: the cosine for the sine, minus for plus, less for less or equal."""
    other = FUNCTIONS[call.name]
    if isinstance(call.args[0], Tensor) and call.output is not NotImplemented:
        yield f"as {other.__name__}", lambda func, args, kwargs: other(*args, **kwargs)


@call_operator("operands", "sub div pow matmul bmm where lerp __rsub__ __rdiv__")
def operands(call: Call, given: Mapping[str, Any]) -> Changes:
    """The two sides of a formula are exchanged."""
    first, second = (1, 2) if call.name == "where" else (0, 1)
    values = call.args[:3]
    if len(values) <= second:
        return
    one, other = values[first], values[second]
    shapes = [getattr(value, "shape", None) for value in (one, other)]
    if shapes[0] == shapes[1] or None in shapes:

        def exchanged(func: Any, args: Any, kwargs: Any) -> Any:
            swapped = list(args)
            swapped[first], swapped[second] = swapped[second], swapped[first]
            return _FORWARD[call.name](*swapped, **kwargs)

        yield "exchanged", exchanged


_FORWARD: Mapping[str, Callable[..., Any]] = {
    "sub": torch.sub,
    "div": torch.div,
    "pow": torch.pow,
    "matmul": torch.matmul,
    "bmm": torch.bmm,
    "where": torch.where,
    "lerp": torch.lerp,
    "__rsub__": lambda other, one: one - other,
    "__rdiv__": lambda one, other: other / one,
}
"""What each of them is as a function that takes a number before a tensor as well: methods of tensors do not."""


@call_operator("complement", "sqrt rsqrt log log1p square")
def complement(call: Call, given: Mapping[str, Any]) -> Changes:
    """The share of noise is taken for that of the signal."""
    if isinstance(call.args[0], Tensor):
        yield "of 1 - x", lambda func, args, kwargs: func(1 - args[0], *args[1:], **kwargs)


@call_operator("limits", "clamp clip clamp_min clamp_max hardtanh")
def limits(call: Call, given: Mapping[str, Any]) -> Changes:
    """A limit is another."""
    names = ("min_val", "max_val") if call.name == "hardtanh" else ("min", "max")
    for at, name in enumerate(names, start=1):
        own = given.get(name, call.args[at] if len(call.args) > at else None)
        if isinstance(own, int | float) and not isinstance(own, bool):
            other = own * 1.01 if own else 0.01

            def change(func: Any, args: Any, kwargs: Any, at: int = at, name: str = name, other: float = other) -> Any:
                if len(args) > at:
                    return func(*args[:at], other, *args[at + 1 :], **kwargs)
                return func(*args, **{**kwargs, name: other})

            yield f"{name} {own:g} to {other:g}", change


@call_operator("spacing", "linspace arange")
def spacing(call: Call, given: Mapping[str, Any]) -> Changes:
    """Evenly spaced numbers leave out their end, come in the other order, or lie closer together."""
    if call.output.numel() < 2:
        return
    yield "reversed", lambda func, args, kwargs: func(*args, **kwargs).flip(0)
    if call.name == "linspace":

        def without_end(given: dict[str, Any]) -> Mapping[str, Any]:
            step = (given["end"] - given["start"]) / given["steps"]
            return {"end": given["end"] - step}

        yield "without its end", with_arguments(without_end)


@call_operator("order", "flip roll sort argsort")
def order(call: Call, given: Mapping[str, Any]) -> Changes:
    """Numbers stay in the order in which they are."""
    if isinstance(call.output, Tensor) and call.output.numel() > 1:
        if call.name == "argsort":
            yield "missing", lambda func, args, kwargs: torch.arange(args[0].shape[-1]).expand(args[0].shape)
        else:
            yield "missing", lambda func, args, kwargs: args[0]


@call_operator("running", "cumprod cumsum")
def running(call: Call, given: Mapping[str, Any]) -> Changes:
    """A running product or sum is one step late."""
    if call.output.ndim == 1 and call.output.numel() > 1:
        yield "one step late", lambda func, args, kwargs: func(*args, **kwargs).roll(1, 0)


@call_operator("repetition", "repeat repeat_interleave tile")
def repetition(call: Call, given: Mapping[str, Any]) -> Changes:
    """Items are repeated one by one instead of all together, or the other way round."""
    source, made = call.args[0], call.output
    if not isinstance(source, Tensor) or source.ndim != made.ndim:
        return
    axes = [d for d, (old, new) in enumerate(zip(source.shape, made.shape, strict=True)) if 1 < old < new]
    if len(axes) == 1:
        (axis,) = axes
        count = made.shape[axis] // source.shape[axis]
        if call.name == "repeat_interleave":
            times = [count if d == axis else 1 for d in range(source.ndim)]
            yield "all together", lambda func, args, kwargs: args[0].repeat(*times)
        else:
            yield "one by one", lambda func, args, kwargs: args[0].repeat_interleave(count, dim=axis)


@call_operator("lookup-index", "gather index_select take searchsorted bucketize")
def lookup_index(call: Call, given: Mapping[str, Any]) -> Changes:
    """A place in a table is one further."""
    if call.name in ("searchsorted", "bucketize"):
        yield "one further", lambda func, args, kwargs: func(*args, **kwargs) + 1
    elif isinstance(call.args[-1], Tensor):
        size = call.args[0].shape[call.args[1]] if isinstance(call.args[1], int) else call.args[0].numel()
        yield "one further", lambda func, args, kwargs: func(*args[:-1], (args[-1] + 1) % size, **kwargs)


# --- the tables that a leaf keeps ---------------------------------------------------------------------------------

Table = Callable[[Tensor], Tensor]
TABLES: Mapping[str, Table] = {
    "one further": lambda x: x.roll(-1, 0),
    "one before": lambda x: x.roll(1, 0),
    "reversed": lambda x: x.flip(0),
}
NUMBERS: Mapping[str, Table] = {
    "1 % larger": lambda x: x * 1.01,
    "1 - it": lambda x: 1 - x,
    "its root": lambda x: x.abs().sqrt(),
    "its square": lambda x: x.square(),
}


@operator("table")
def table(site: Site) -> Ways:
    """A table that a leaf keeps and reads begins elsewhere, runs backwards, or holds other numbers."""
    if not site.is_leaf:
        return
    for name, value in _kept(site.module):
        if name not in site.seen.reads:
            continue
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            ways = _ways_of_tensor(value)
        elif isinstance(value, list | tuple) and len(cast(Sequence[Any], value)) > 1:
            ways = _ways_of_rows(cast(Sequence[Any], value))
        else:
            continue
        for told, made in ways:
            yield f"{name}, {told}", _with_kept(site.module, name, made)


def _kept(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Buffers and plain attributes."""
    yield from module.__dict__["_buffers"].items()
    yield from module.__dict__.items()


def _ways_of_tensor(held: Tensor) -> Iterator[tuple[str, Tensor]]:
    ways = dict(TABLES) if held.ndim and held.shape[0] > 1 else {}
    if held.is_floating_point():
        ways |= NUMBERS
    elif held.dtype != torch.bool:
        ways["1 more"] = lambda x: x + 1
    for told, way in ways.items():
        if not torch.equal(way(held), held):
            yield told, way(held)


def _ways_of_rows(rows: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Those that change the list of numbers, or the list of the numbers of each step."""
    return ((told, made) for told, made in _all_ways_of_rows(rows) if not _same_rows(made, rows))


def _same_rows(made: Sequence[Any], rows: Sequence[Any]) -> bool:
    return all(_same(one, other) for one, other in zip(made, rows, strict=True))


def _same(one: Any, other: Any) -> bool:
    """Whether two numbers are the same, or two nestings of them."""
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        own, others = cast(Sequence[Any], one), cast(Sequence[Any], other)
        return len(own) == len(others) and _same_rows(own, others)
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return bool(one == other)


def _all_ways_of_rows(rows: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    made: Callable[[Sequence[Any]], Any] = tuple if isinstance(rows, tuple) else list
    if not all(_is_number(row) or hasattr(row, "_fields") for row in rows):
        return
    yield "one further", made([*rows[1:], rows[0]])
    yield "one before", made([rows[-1], *rows[:-1]])
    if all(map(_is_number, rows)):
        yield "1 % larger", made([row * 1.01 for row in rows])
        return
    names: tuple[str, ...] = rows[0]._fields
    for at, name in enumerate(names):
        if not all(_is_number(row[at]) for row in rows):
            continue
        yield f"{name} 1 % larger", made([row._replace(**{name: row[at] * 1.01}) for row in rows])
        yield f"{name} 0", made([row._replace(**{name: row[at] * 0}) for row in rows])
        following = [*rows[1:], rows[0]]
        pairs = zip(rows, following, strict=True)
        yield f"{name} of the next step", made([row._replace(**{name: other[at]}) for row, other in pairs])
        if at + 1 < len(names) and all(_is_number(row[at + 1]) for row in rows):
            other = names[at + 1]
            exchanged = [row._replace(**{name: row[at + 1], other: row[at]}) for row in rows]
            yield f"{name} and {other} exchanged", made(exchanged)


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 0 and value.is_floating_point()
    return isinstance(value, int | float) and not isinstance(value, bool)


def _with_kept(module: nn.Module, name: str, made: Any) -> Edit:
    buffers = cast(dict[str, Any], module.__dict__["_buffers"])
    if name not in buffers:
        return with_attribute(module, name, made)

    def edit() -> Undo:
        before = buffers[name]
        buffers[name] = made

        def undo() -> None:
            buffers[name] = before

        return undo

    return edit


@operator("parameter")
def parameter(site: Site) -> Ways:
    """A field of the parameters that a leaf reads while it runs is another."""
    for name, value in site.module.__dict__.items() if site.is_leaf else ():
        if not is_dataclass(value) or isinstance(value, type):
            continue
        for one in fields(value):
            if f"{name}.{one.name}" not in site.seen.reads:
                continue
            for other in _others(getattr(value, one.name), type(value), one.name):
                made = copy.copy(value)
                object.__setattr__(made, one.name, other)
                yield f"{name}.{one.name} to {other}", with_attribute(site.module, name, made)


def _others(value: Any, kind: type, name: str) -> Iterator[Any]:
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, value - 1)
    elif isinstance(value, float):
        yield value * 1.01 if value else 0.01
    elif isinstance(value, str):
        hint = get_type_hints(kind).get(name)
        yield from (other for other in get_args(hint) if isinstance(other, str) and other != value)
