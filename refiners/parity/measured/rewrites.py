"""Programs that compute the same function in another order of operations: what `ROUNDING` has to allow.

A rewrite takes the place of a function of torch wherever a model calls it, or runs the whole model otherwise: row by
row, in another memory format, with another number of threads. None of them changes what is computed; all of them change
bits. `refiners.parity.measured.rounding_measured` holds them against the constants of `refiners.parity.rounding`.
"""

# What a function is called with is anything: the rewrites have no types of their arguments.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from refiners.parity.mutants.calls import name_of

Outputs = Mapping[str, Tensor]
Function = Callable[..., Tensor]
Run = Callable[[nn.Module, Tensor], Outputs | None]
"""Runs a model on a batch in its own way; None where it has nothing to do otherwise."""


class Instead(TorchFunctionMode):
    """Some functions of torch are others, by name."""

    def __init__(self, **functions: Function) -> None:
        super().__init__()
        self.functions, self.met = functions, 0

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        other = self.functions.get(name_of(func))
        self.met += other is not None
        return (other or func)(*args, **(kwargs or {}))


def instead(**functions: Function) -> Run:
    """A rewrite of some functions."""

    def run(model: nn.Module, x: Tensor) -> Outputs | None:
        with Instead(**functions) as mode:
            outputs = model(x)
        return outputs if mode.met else None

    return run


def _wide(x: Tensor) -> torch.dtype:
    """In which kernels of half precision compute."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# --- linear maps --------------------------------------------------------------------------------------------------


def addmm(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """One matrix product with the bias added in it."""
    rows = x.reshape(-1, x.shape[-1])
    made = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)
    return made.reshape(*x.shape[:-1], -1)


def matmul_and_add(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A product, rounded, then the bias."""
    made = x @ weight.T
    return made if bias is None else made + bias


def split_sum(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Two products of half the columns each, rounded, then added."""
    half = x.shape[-1] // 2
    return F.linear(x[..., :half], weight[:, :half], bias) + F.linear(x[..., half:], weight[:, half:])


def reversed_sum(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The columns in the other order."""
    return F.linear(x.flip(-1), weight.flip(-1), bias)


def fused(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A part of a product that is three times as wide, as of queries, keys and values together."""
    wide = F.linear(x, torch.cat((weight, weight, weight)), None if bias is None else torch.cat((bias, bias, bias)))
    return wide[..., weight.shape[0] : 2 * weight.shape[0]]


def one_column_at_a_time(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Products with no matrix: each output by itself, summed in the precision of kernels."""
    terms = x.unsqueeze(-2).to(_wide(x)) * weight.to(_wide(x))
    made = terms.sum(-1) if bias is None else terms.sum(-1) + bias.to(_wide(x))
    return made.to(x.dtype)


# --- convolutions -------------------------------------------------------------------------------------------------


def unfold_and_matmul(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """The patches under the kernel as columns of a matrix."""
    assert groups == 1
    columns = F.unfold(x, cast(Any, weight.shape[2:]), dilation, padding, stride)
    made = weight.flatten(1) @ columns
    made = made if bias is None else made + bias[:, None]
    step, edge = (stride, padding) if isinstance(stride, int) else (stride[0], padding[0])
    height = (x.shape[2] + 2 * edge - weight.shape[2]) // step + 1
    return made.unflatten(-1, (height, -1))


def channels_last(x: Tensor, weight: Tensor, *more: Any, **options: Any) -> Tensor:
    """The channels next to each other in memory."""
    last = torch.channels_last
    made = F.conv2d(x.contiguous(memory_format=last), weight.contiguous(memory_format=last), *more, **options)
    return made.contiguous()


def flipped_convolution(x: Tensor, weight: Tensor, *more: Any, **options: Any) -> Tensor:
    """The input channels in the other order."""
    return F.conv2d(x.flip(1), weight.flip(1), *more, **options)


# --- attention ----------------------------------------------------------------------------------------------------


def attention_by_hand(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """Scores, a softmax in the precision of kernels, a product."""
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    scores = scores if attn_mask is None else scores + attn_mask
    return scores.softmax(-1, dtype=_wide(query)).to(query.dtype) @ value


def attention_scaled_first(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """The queries are scaled, not the scores, and baddbmm adds the mask."""
    flat = [x.flatten(0, 1) for x in (query, key, value)]
    scaled = flat[0] * query.shape[-1] ** -0.5
    shape = (*query.shape[:-1], key.shape[-2])
    mask = query.new_zeros(shape) if attn_mask is None else attn_mask.expand(shape)
    scores = torch.baddbmm(mask.flatten(0, 1), scaled, flat[1].transpose(-1, -2))
    return (scores.softmax(-1, dtype=_wide(query)).to(query.dtype) @ flat[2]).unflatten(0, query.shape[:2])


def math_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """Torch's plain kernel instead of the one it prefers."""
    with cast(Any, sdpa_kernel([SDPBackend.MATH])):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask)


# --- norms, activations, sums -------------------------------------------------------------------------------------


def layer_norm_by_hand(x: Tensor, shape: Any, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Mean and variance in two passes."""
    y = x.to(_wide(x))
    y = (y - y.mean(-1, keepdim=True)) * torch.rsqrt(y.var(-1, unbiased=False, keepdim=True) + eps)
    return (y * weight.to(y.dtype) + bias.to(y.dtype)).to(x.dtype)


def group_norm_by_hand(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """The same, of groups of channels."""
    y = x.to(_wide(x)).unflatten(1, (groups, -1)).flatten(2)
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
    shape = (1, -1, *(1,) * (x.ndim - 2))
    return (y.reshape(x.shape) * weight.to(y.dtype).view(shape) + bias.to(y.dtype).view(shape)).to(x.dtype)


def silu_by_hand(x: Tensor, inplace: bool = False) -> Tensor:
    """X times its sigmoid, in the precision of kernels."""
    y = x.to(_wide(x))
    return (y * torch.sigmoid(y)).to(x.dtype)


def gelu_by_hand(x: Tensor, approximate: str = "none") -> Tensor:
    """With erf written out, in the precision of kernels."""
    y = x.to(_wide(x))
    return (0.5 * y * (1 + torch.erf(y / math.sqrt(2)))).to(x.dtype)


# --- whole models -------------------------------------------------------------------------------------------------


def one_by_one(model: nn.Module, x: Tensor) -> Outputs | None:
    """Each item of the batch alone."""
    rows: list[Outputs] = [model(row[None]) for row in x]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def larger_batch(model: nn.Module, x: Tensor) -> Outputs | None:
    """The batch as a part of one that is five times as large."""
    outputs: Outputs = model(torch.cat([x] * 5))
    return {name: tensor[len(x) : 2 * len(x)] for name, tensor in outputs.items()}


def other_kernels(model: nn.Module, x: Tensor) -> Outputs | None:
    """Torch's own kernels instead of oneDNN's."""
    backend = cast(Any, torch.backends.mkldnn)
    before = backend.enabled
    backend.enabled = False
    try:
        return model(x)
    finally:
        backend.enabled = before


@contextmanager
def _threads(count: int) -> Generator[None, None, None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def two_threads(model: nn.Module, x: Tensor) -> Outputs | None:
    """Another number of threads inside an operation."""
    with _threads(2):
        return model(x)


def compiled(model: nn.Module, x: Tensor) -> Outputs | None:
    """Inductor's code. Takes seconds a model, so it is measured when asked for."""
    return cast(Any, torch.compile(model))(x)


REWRITES: Mapping[str, Run] = {
    "addmm": instead(linear=addmm),
    "matmul_and_add": instead(linear=matmul_and_add),
    "split_sum": instead(linear=split_sum),
    "reversed_sum": instead(linear=reversed_sum),
    "fused": instead(linear=fused),
    "one_column": instead(linear=one_column_at_a_time),
    "unfold": instead(conv2d=unfold_and_matmul),
    "channels_last": instead(conv2d=channels_last),
    "flipped_convolution": instead(conv2d=flipped_convolution),
    "attention_by_hand": instead(scaled_dot_product_attention=attention_by_hand),
    "attention_scaled_first": instead(scaled_dot_product_attention=attention_scaled_first),
    "math_attention": instead(scaled_dot_product_attention=math_attention),
    "norm_by_hand": instead(layer_norm=layer_norm_by_hand, group_norm=group_norm_by_hand),
    "activation_by_hand": instead(silu=silu_by_hand, gelu=gelu_by_hand),
    "one_by_one": one_by_one,
    "larger_batch": larger_batch,
    "other_kernels": other_kernels,
    "two_threads": two_threads,
}


def _norm_with_another_eps(x: Tensor, shape: Any, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x, shape, weight, bias, eps * 10)


def _groups_with_another_eps(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    return F.group_norm(x, groups, weight, bias, eps * 10)


def _gelu_through_tanh(x: Tensor, approximate: str = "none") -> Tensor:
    return F.gelu(x, approximate="tanh")


def _linear_with_bias_twice(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, None if bias is None else 2 * bias)


MISTAKES: Mapping[str, Run] = {
    "norm_eps_times_10": instead(layer_norm=_norm_with_another_eps, group_norm=_groups_with_another_eps),
    "gelu_tanh": instead(gelu=_gelu_through_tanh),
    "bias_twice": instead(linear=_linear_with_bias_twice),
}
