"""The usual suspects: what is wrong in most ports that are wrong, as edits that would put it right.

Each function proposes hypotheses for one node, the likeliest first. They are guesses: the diagnosis runs each, and
only one that makes the node equal to upstream's is ever told.
"""

import math
from collections.abc import Callable, Iterator
from enum import Enum
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from refiners.parity.reasons import edits
from refiners.parity.reasons.edits import Hypothesis
from refiners.parity.reasons.weight_faults import how_weights_differ

EPS_NAMES = ("eps", "epsilon", "variance_epsilon", "layer_norm_eps", "norm_eps")
EPS = (1e-12, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-15, 1e-10, 1e-9, 0.0)
NUMBERS = (0.5, 1.0, 2.0, 1e-6, 1e-5, 1e-12, 0.0)

AS_UPSTREAM = "when it computes as upstream's "
"""Of a leaf of which no more is known."""

_ROOT = math.sqrt(2.0 / math.pi)


def _tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(_ROOT * (x + 0.044715 * torch.pow(x, 3.0))))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu with tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "quick gelu, x · sigmoid(1.702 x)": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": functional.silu,
    "relu": functional.relu,
    "gelu_new, written out with tanh": _tanh_gelu,
    "gelu_fast, written out with tanh": lambda x: (
        0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))
    ),
    "gelu written out with erf": lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu, squared": lambda x: torch.square(functional.relu(x)),
    "leaky_relu": functional.leaky_relu,
    "leaky_relu of slope 0.2": lambda x: functional.leaky_relu(x, 0.2),
    "elu": functional.elu,
    "mish": functional.mish,
    "softplus": functional.softplus,
    "hardswish": functional.hardswish,
    "relu6": functional.relu6,
    "the identity": lambda x: x,
}


def is_number(value: Any) -> bool:
    """Whether a value is one that a constructor takes."""
    if isinstance(value, tuple):
        return all(is_number(item) for item in cast(tuple[Any, ...], value))
    return value is None or isinstance(value, bool | int | float | str)


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that are numbers, flags, strings or choices."""
    return {
        name: value
        for name, value in module.__dict__.items()
        if not name.startswith("_") and name != "training" and (is_number(value) or isinstance(value, Enum))
    }


def _is(name: str, value: Any) -> str:
    return f"when `{name}` is {value.value if isinstance(value, Enum) else value!r}"


def of_leaf(port: nn.Module, upstream: nn.Module, weights: dict[str, Tensor]) -> Iterator[Hypothesis]:
    """For a leaf with weights.

    Receives:
        port, upstream: the two leaves.
        weights: all of upstream's weights by key, to tell those of another layer.
    """
    yield from _weights(port, upstream, weights)
    yield from _upstreams_attributes(port, upstream)
    for name in EPS_NAMES:
        if name in port.__dict__:
            yield from (Hypothesis(_is(name, eps), edits.attribute(port, name, eps)) for eps in EPS)
    yield from _norms(port)
    yield from _precision(port)
    yield from of_inputs_and_outputs(port)
    yield from of_attributes(port, upstream)
    kind: Any = type(upstream)
    yield Hypothesis(
        f"{AS_UPSTREAM}{kind.__name__} does, with the weights and attributes that it has",
        edits.instead(port, lambda x: kind.forward(port, x)),
        is_vague=True,
    )


def _weights(port: nn.Module, upstream: nn.Module, weights: dict[str, Tensor]) -> Iterator[Hypothesis]:
    ours = {**dict(upstream.named_parameters(recurse=False)), **dict(upstream.named_buffers(recurse=False))}
    theirs = {**dict(port.named_parameters(recurse=False)), **dict(port.named_buffers(recurse=False))}
    wrong: list[tuple[str, edits.Edit]] = []
    for name, right in ours.items():
        held = theirs.get(name)
        if name in theirs or name in ("weight", "bias"):
            text = how_weights_differ(name, right, held, weights)
            if text:
                wrong.append((text, edits.weight(port, name, right)))
    wrong += [
        (f"without `{name}`, which upstream does not have", edits.weight(port, name, None))
        for name in theirs
        if name not in ours
    ]
    yield from (Hypothesis(text, edit) for text, edit in wrong)
    if len(wrong) > 1:
        together = [edit for _, edit in wrong]
        yield Hypothesis("; ".join(text for text, _ in wrong), lambda: edits.all_of(together))
    for name, right in ours.items():
        if name in theirs and right.ndim == 2 and right.shape[0] == right.shape[1] and type(port) is not type(upstream):
            yield Hypothesis(f"when `{name}` is transposed", edits.weight(port, name, right.T))


def _upstreams_attributes(port: nn.Module, upstream: nn.Module) -> Iterator[Hypothesis]:
    ours, theirs = plain_attributes(upstream), plain_attributes(port)
    unlike = {name: ours[name] for name in ours if name in theirs and ours[name] != theirs[name]}
    eps = [ours[name] for name in EPS_NAMES if name in ours]
    unlike |= {name: eps[0] for name in EPS_NAMES if eps and name in theirs and theirs[name] != eps[0]}
    for name, value in unlike.items():
        yield Hypothesis(_is(name, value), edits.attribute(port, name, value))
    if len(unlike) > 1:
        together = [edits.attribute(port, name, value) for name, value in unlike.items()]
        yield Hypothesis(" and ".join(_is(n, v) for n, v in unlike.items()), lambda: edits.all_of(together))


def _norms(port: nn.Module) -> Iterator[Hypothesis]:
    weight = cast(Tensor | None, getattr(port, "weight", None))
    groups = port.__dict__.get("num_groups")
    if isinstance(groups, int):
        channels = weight.shape[0] if weight is not None else groups
        for other in (n for n in range(1, channels + 1) if channels % n == 0):
            yield Hypothesis(_is("num_groups", other), edits.attribute(port, "num_groups", other))
    if "Norm" not in type(port).__name__ or weight is None or weight.ndim != 1:
        return
    yield Hypothesis("when its weight counts from 1", edits.weight(port, "weight", weight.detach() + 1))
    eps = next((port.__dict__[name] for name in EPS_NAMES if name in port.__dict__), None)
    shape, bias = tuple(weight.shape), getattr(port, "bias", None)
    for value in EPS if eps is None else (eps, *EPS):
        told = "" if value == eps else f" with an eps of {value}"
        yield Hypothesis(
            f"as an RMS norm{told}",
            edits.instead(port, lambda x, e=value: functional.rms_norm(x, shape, weight, e)),
        )
        yield Hypothesis(
            f"as a layer norm{told}",
            edits.instead(port, lambda x, e=value: functional.layer_norm(x, shape, weight, bias, e)),
        )


def _precision(port: nn.Module) -> Iterator[Hypothesis]:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        state = [(n, t) for n, t in port.named_parameters(recurse=False) if t.is_floating_point()]
        casts = [edits.weight(port, n, t.detach().to(dtype)) for n, t in state if t.dtype != dtype]
        if not casts:
            continue

        def run(original: Any, x: Tensor, to: torch.dtype = dtype, back: torch.dtype = state[0][1].dtype) -> Tensor:
            return original(x.to(to) if x.is_floating_point() else x).to(back)

        together = [*casts, edits.forward(port, run)]
        yield Hypothesis(f"when it computes in {name}", lambda together=together: edits.all_of(together))


def of_inputs_and_outputs(node: nn.Module) -> Iterator[Hypothesis]:
    """What comes in or goes out is shifted, scaled or in another order."""

    before, after = partial(edits.before, node), partial(edits.after, node)
    for offset in (-2, -1, 1, 2):
        yield Hypothesis(f"when its input is {offset:+d}", before(lambda x, k=offset: x + k))
        yield Hypothesis(f"when its output is {offset:+d}", after(lambda x, k=offset: x + k))
    for factor in (-1.0, 0.5, 2.0, 0.0, 0.25, 4.0):
        yield Hypothesis(f"when its output is times {factor:g}", after(lambda x, k=factor: x * k))
        yield Hypothesis(f"when its input is times {factor:g}", before(lambda x, k=factor: x * k))
    for factor in ("√", "1/√"):
        for axis in (-1, -2):

            def scale(x: Tensor, kind: str = factor, axis: int = axis) -> Tensor:
                size = math.sqrt(x.shape[axis])
                return x * (size if kind == "√" else 1 / size)

            yield Hypothesis(f"when its output is times {factor}(size of axis {axis})", after(scale))
    for shift in (-1, 1):
        yield Hypothesis(f"when its output is rolled by {shift} along axis 1", after(lambda x, k=shift: x.roll(k, 1)))
    yield Hypothesis("when the last two axes of its output are exchanged", after(lambda x: x.transpose(-1, -2)))
    for axis in (1, -1):
        yield Hypothesis(f"when its output is reversed along axis {axis}", after(lambda x, d=axis: x.flip(d)))
    yield Hypothesis(
        "when the halves of its output are exchanged", after(lambda x: torch.cat(x.chunk(2, -1)[::-1], -1))
    )


def of_attributes(port: nn.Module, upstream: nn.Module | None) -> Iterator[Hypothesis]:
    """Every number, flag and choice of a node with the values it may take."""
    theirs = plain_attributes(upstream) if upstream is not None else {}
    for name, value in plain_attributes(port).items():
        for other in _others(value, theirs):
            yield Hypothesis(_is(name, other), edits.attribute(port, name, other))


def _others(value: Any, upstream: dict[str, Any]) -> list[Any]:
    match value:
        case Enum():
            found: list[Any] = [member for member in type(value) if member is not value]
        case bool():
            found = [not value]
        case int():
            ints = [v for v in upstream.values() if isinstance(v, int) and not isinstance(v, bool)]
            found = [*ints, *(n for n in (value + 1, value - 1, value * 2, value // 2, value * 4, value // 4) if n > 0)]
        case float():
            found = [*(v for v in upstream.values() if isinstance(v, float)), *NUMBERS, -value]
        case _:
            found = []
    return [other for i, other in enumerate(found) if other != value and other not in found[:i]]


def of_activation(node: nn.Module) -> Iterator[Hypothesis]:
    """A node of one input is an activation."""
    for name, function in ACTIVATIONS.items():
        yield Hypothesis(f"when it is {name}", edits.instead(node, function))


def of_attention(node: nn.Module) -> Iterator[Hypothesis]:
    """Queries, keys, values, mask and scale of `scaled_dot_product_attention` inside a node."""
    attend = functional.scaled_dot_product_attention

    def given(text: str, change: Callable[[dict[str, Any]], None]) -> Hypothesis:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")

        def call(function: Any, *args: Any, **kwargs: Any) -> Any:
            settings = {**dict(zip(names, args, strict=False)), **kwargs}
            change(settings)
            return function(settings.pop("query"), settings.pop("key"), settings.pop("value"), **settings)

        return Hypothesis(text, edits.calls(node, attend, call))

    def put(name: str, make: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], None]:
        return lambda settings: settings.__setitem__(name, make(settings))

    def exchange(a: str, b: str) -> Callable[[dict[str, Any]], None]:
        return lambda s: s.update({a: s[b], b: s[a]})

    yield given("when query and key are exchanged", exchange("query", "key"))
    yield given("when key and value are exchanged", exchange("key", "value"))
    yield given("when query and value are exchanged", exchange("query", "value"))
    yield given("when the scale of attention is 1/√(head size)", put("scale", lambda s: s["query"].shape[-1] ** -0.5))
    yield given("when attention takes its default scale", put("scale", lambda s: None))
    yield given("when the scale of attention is 1", put("scale", lambda s: 1.0))
    yield given("when the scale of attention is 1/(head size)", put("scale", lambda s: 1 / s["query"].shape[-1]))
    yield given(
        "when the scale of attention is 1/√(embedding size)",
        put("scale", lambda s: (s["query"].shape[-1] * s["query"].shape[1]) ** -0.5),
    )
    yield given("when the mask is inverted", put("attn_mask", lambda s: _inverted(s["attn_mask"])))
    yield given("when attention is not causal", put("is_causal", lambda s: False))
    yield given("when attention is causal", lambda s: s.update(is_causal=True, attn_mask=None))
    yield given("when attention ignores its mask", put("attn_mask", lambda s: None))
    yield given("when the mask is transposed", put("attn_mask", lambda s: s["attn_mask"].transpose(-1, -2)))
    yield given("when the mask is causal too", put("attn_mask", lambda s: s["attn_mask"].tril()))
    for shift in (-1, 1):
        yield given(
            f"when the mask is shifted by {shift}", put("attn_mask", lambda s, k=shift: s["attn_mask"].roll(k, -1))
        )
    for names in (("query", "key", "value"), ("value",), ("query", "key")):

        def heads_last(settings: dict[str, Any], names: tuple[str, ...] = names) -> None:
            for name in names:
                settings[name] = _interleaved(settings[name])

        yield given(f"when the heads of {', '.join(names)} are interleaved", heads_last)
        yield given(
            f"when the heads of {', '.join(names)} are not interleaved",
            lambda s, names=names: s.update(
                {name: _interleaved(s[name].transpose(1, 3)).transpose(1, 3) for name in names}
            ),
        )


def _inverted(mask: Tensor) -> Tensor:
    return ~mask if mask.dtype == torch.bool else -mask


def _interleaved(heads: Tensor) -> Tensor:
    """Batch heads sequence size, of which size counts faster: the same of which heads count faster."""
    batch, count, sequence, size = heads.shape
    flat = heads.transpose(1, 2).reshape(batch, sequence, size, count)
    return flat.permute(0, 3, 1, 2)


def of_residual(node: nn.Module) -> Iterator[Hypothesis]:
    """What a node received is added, once more or not at all."""
    yield Hypothesis(
        "when its input is added to its output (a missing residual)",
        edits.forward(node, _with_residual),
    )
    own = type(node)
    if getattr(own, "_finish", None) is not None:
        yield Hypothesis("without its residual", edits.kind(node, type(own.__name__, (own,), {"_finish": None})))


def _with_residual(original: Callable[..., Any], *args: Any) -> Any:
    return original(*args) + args[0]
