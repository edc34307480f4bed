"""What the values of both sides say about a fault by themselves, in words.

A diagnosis that was run is worth more. These are for faults that no edit of a node reaches, and for the words in which
two operations are told apart.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from refiners.parity.operations import Operation, Slot, Trace, fill_template

_WORDS = {
    "_upsample_bilinear2d_aa": "bilinear, antialias=True",
    "_upsample_bicubic2d_aa": "bicubic, antialias=True",
    "upsample_bilinear2d": "bilinear, antialias=False",
    "upsample_bicubic2d": "bicubic, antialias=False",
    "upsample_nearest2d": "nearest",
    "_upsample_nearest_exact2d": "nearest-exact",
    "_softmax": "softmax",
    "_safe_softmax": "softmax",
    "native_layer_norm": "a layer norm",
    "native_group_norm": "a group norm",
}
_PARTS = ("split", "split_with_sizes", "chunk", "unbind", "tensor_split")


@dataclass(frozen=True)
class _Tensor:
    number: int


def name_of(operation: Operation) -> str:
    """The name of an operation for people."""
    name = operation.name.removeprefix("aten.")
    return "scaled_dot_product_attention" if name.startswith("_scaled_dot_product") else name


def told(operation: Operation) -> str:
    """An operation with its arguments, and in words where its name says too little."""
    words = _WORDS.get(operation.name.removeprefix("aten."), "")
    return f"`{name_of(operation)}{operation.arguments}`{f' ({words})' if words else ''}"


def number(value: Any) -> str:
    """A value, and where it may come from: 6.2146… is ln(500)."""
    if not isinstance(value, float) or len(repr(value)) < 8 or not 1e-30 < abs(value) < 1e30:
        return repr(value)
    sign, size = "-" if value < 0 else "", abs(value)
    power = math.exp(size) if size < 20 else 0.0
    if abs(power - round(power)) < 1e-6 * power and round(power) >= 10 and round(power) % 10 == 0:
        return f"{value!r} = {sign}ln({round(power)})"
    square = size**-2 if size < 1 else size**2
    if 1 < square < 1e5 and abs(square - round(square)) < 1e-9 * square:
        return f"{value!r} = {sign}{'1/' if size < 1 else ''}√{round(square)}"
    return repr(value)


def _arguments(operation: Operation) -> dict[str, Any]:
    """Names of arguments → what was given or is the default, tensors as the numbers of their values."""

    def of_slot(slot: Slot) -> _Tensor:
        return _Tensor(operation.inputs[slot.place])

    schema = operation.function._schema.arguments
    args, kwargs = fill_template(operation.template, Slot, of_slot)
    given = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    given |= {**dict(zip([argument.name for argument in schema], args, strict=False)), **kwargs}
    return {name: value for name, value in given.items() if value is not None}


def arguments(operation: Operation) -> dict[str, Any]:
    """Names of arguments → what was given or is the default, where no tensor is in it."""

    def has_tensor(value: Any) -> bool:
        if isinstance(value, list | tuple):
            return any(map(has_tensor, cast("list[Any]", value)))
        return isinstance(value, _Tensor)

    return {name: value for name, value in _arguments(operation).items() if not has_tensor(value)}


def default_scale(operation: Operation) -> float | None:
    """What attention scales by where nothing is said; None of other operations."""
    return float(operation.tensors[0][1][-1] ** -0.5) if "scaled_dot_product" in operation.name else None


def unlike(ours: Operation, theirs: Operation) -> str:
    """In what arguments the port's operation differs from upstream's, completing "equal …"."""
    if ours.function is not theirs.function:
        return f"when it computes {told(theirs)} in place of {told(ours)}"
    here, there = _arguments(ours), _arguments(theirs)
    apart = [name for name in dict.fromkeys([*there, *here]) if here.get(name) != there.get(name)]
    if len(apart) > 1 and default_scale(ours) == here.get("scale", there.get("scale")):
        apart = [name for name in apart if name != "scale"]  # given on one side, and the default on the other
    if not apart:
        return f"when it computes {told(theirs)}"
    exchanged = _exchanged(apart, here, there)
    if exchanged:
        return f"when in `{name_of(ours)}` {exchanged}"
    return f"when in `{name_of(ours)}` {' and '.join(_argument(n, here.get(n), there.get(n)) for n in apart)}"


def not_given(ours: Operation, theirs: Operation) -> str:
    """The one tensor that upstream gives to an operation and the port does not, if that is all."""
    if ours.function is not theirs.function:
        return ""
    here, there = _arguments(ours), _arguments(theirs)
    apart = [name for name in {**there, **here} if type(here.get(name)) is not type(there.get(name))]
    if default_scale(ours) == here.get("scale", there.get("scale")):
        apart = [name for name in apart if name != "scale"]  # given on one side, and the default on the other
    is_one = len(apart) == 1 and isinstance(there.get(apart[0]), _Tensor) and apart[0] not in here
    return f"when in `{name_of(ours)}` {_argument(apart[0], None, there[apart[0]])}" if is_one else ""


def _exchanged(names: list[str], here: dict[str, Any], there: dict[str, Any]) -> str:
    """The same tensors, at other places."""
    one = names[0]
    if len(names) == 1 and isinstance(here.get(one), list | tuple) and isinstance(there.get(one), list | tuple):
        given, right = list(here[one]), list(there[one])
        if _tensors(given) and sorted(map(str, given)) == sorted(map(str, right)):
            order = [given.index(item) + 1 for item in right]
            return "the two tensors are exchanged" if order == [2, 1] else f"the tensors stand in the order {order}"
    given, right = [here.get(name) for name in names], [there.get(name) for name in names]
    if len(names) > 1 and _tensors(given) and _tensors(right) and sorted(map(str, given)) == sorted(map(str, right)):
        return f"{' and '.join(f'`{name}`' for name in names)} are exchanged"
    return ""


def _tensors(values: Iterable[Any]) -> bool:
    return all(isinstance(value, _Tensor) for value in values)


def _argument(name: str, given: Any, right: Any) -> str:
    if isinstance(right, _Tensor):
        return f"`{name}` is upstream's tensor" + (", which the port does not give" if given is None else "")
    if isinstance(given, _Tensor):
        return f"`{name}` is {number(right)}, not a tensor"
    return f"`{name}` is {number(right)}, not {number(given)}"


# Operations too many and too few


def extra(ours: Operation, theirs: Operation, port: Trace) -> bool:
    """Whether the port does something first that upstream does not do, and then what upstream does."""
    if len(set(ours.inputs) - port.weights) != 1 or not set(ours.inputs) & set(theirs.inputs):
        return False
    if ours.is_view:
        return False  # views are made in any order
    return any(
        set(op.inputs) & set(ours.outputs) and _same_work(op, theirs) for op in port.operations[ours.index + 1 :]
    )


def lacking(ours: Operation, theirs: Operation, upstream: Trace) -> bool:
    """Whether upstream does something first that the port does not do, and then what the port does."""
    if len(set(theirs.inputs) - upstream.weights) != 1 or not set(ours.inputs) & set(theirs.inputs):
        return False
    if theirs.is_view and (not ours.is_view or theirs.function is ours.function):
        return False  # views are made in any order
    later = upstream.operations[theirs.index + 1 :]
    return any(set(op.inputs) & set(theirs.outputs) and _same_work(op, ours) for op in later)


def _same_work(first: Operation, second: Operation) -> bool:
    return first.function is second.function or (first.is_view and second.is_view)


def is_residual(operation: Operation) -> bool:
    """Whether an operation adds two values of one shape."""
    shapes = [shape for _, shape in operation.tensors]
    return operation.name == "aten.add" and len(shapes) == 2 and shapes[0] == shapes[1]


def is_parting(operation: Operation) -> bool:
    """Whether an operation cuts a tensor in pieces."""
    last = operation.name.rsplit("→", 1)[-1].strip().removeprefix("aten.")
    return last in _PARTS and len(operation.outputs) > 1


def origin(trace: Trace, number: int, leaves: Iterable[str]) -> str:
    """Where a value of one side comes from, in words; "" if nobody made it."""
    known = set(leaves)
    made = next((op for op in trace.operations if number in op.outputs and number not in op.inputs), None)
    call = next((call for call in trace.calls if call.path in known and number in call.outputs), None)
    if call is None and made is not None and not is_parting(made) and _is_often(trace, made):
        makers = [call for call in trace.calls if call.path and number in call.outputs and number not in call.inputs]
        call = max(makers, key=lambda one: len(one.path), default=None)
    if call is not None:
        return f"{_which(call.outputs, number)}what `{call.path}` returns"
    if made is not None:
        return (
            f"{_which(made.outputs, number) if is_parting(made) else ''}what `{name_of(made)}` at {made.source} returns"
        )
    given = next((call for call in trace.calls if number in call.inputs), None)
    return f"what `{given.path}` is given" if given and given.path else "what the model is given" if given else ""


def _is_often(trace: Trace, operation: Operation) -> bool:
    """Whether its line runs several times, so that it does not say which value is meant."""
    return sum(op.name == operation.name and op.source == operation.source for op in trace.operations) > 1


def _which(values: Sequence[int | None], number: int) -> str:
    """Which of several values one is."""
    return f"number {values.index(number) + 1} of {len(values)} of " if len(values) > 1 else ""


# Shapes of a region


def rope_layouts(port: Sequence[Operation], upstream: Sequence[Operation]) -> str:
    """Both sides turn pairs of elements, and pair them in another way."""
    ours, theirs = _pairs(port), _pairs(upstream)
    if not ours or not theirs or ours == theirs:
        return ""
    words = {
        "halves": "element i with element i + half (half-split, as in GPT-NeoX)",
        "neighbours": "neighbours (interleaved, as in GPT-J)",
    }
    return f"when rotary positions pair {words[theirs]}: the port pairs {words[ours]}"


def turns(operations: Sequence[Operation]) -> bool:
    """Whether operations may turn pairs of elements."""
    return bool(_pairs(operations))


def _pairs(operations: Sequence[Operation]) -> str:
    names = {step.strip().removeprefix("aten.") for op in operations for step in op.name.split("→")}
    if not {"neg", "view_as_complex"} & names and not {"sub", "add", "mul"} <= names:
        return ""
    if "view_as_complex" in names or any(map(_takes_neighbours, operations)):
        return "neighbours"
    return "halves" if "cat" in names else ""


def _takes_neighbours(operation: Operation) -> bool:
    """Whether an operation takes every second element, or parts pairs that lie side by side."""
    last, arguments = operation.name.rsplit("→", 1)[-1].strip().removeprefix("aten."), operation.template[0]
    if last == "slice":
        return len(arguments) > 4 and arguments[4] == 2
    if last != "unbind" or not operation.tensors:
        return False
    shape = operation.tensors[0][1]
    axis = arguments[1] if len(arguments) > 1 else 0
    return shape[axis] == 2 and axis % len(shape) == len(shape) - 1
