"""Attention: each query reads the values whose keys resemble it (arXiv 1706.03762).

`ScaledDotProductAttention` is the leaf that computes; `Attention` is the Chain that projects to queries, keys and
values before it, and back after it. A Chain of ready-made parts stays editable: a mask enters `Attention` by one edit,

    attention.insert(1, fl.Parallel(fl.GetArg(0), fl.GetArg(1), fl.GetArg(2), fl.UseContext("attention", "mask")))

An attention mask is one of two things, here as in torch: of booleans, True where a query may look; or of floats,
added to the scores. Its shape is (query_length, key_length), or four axes that broadcast to
(batch, num_heads, query_length, key_length).
"""

from typing import Unpack

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional

from refiners.errors import InputError
from refiners.fluxion.context import Contexts
from refiners.fluxion.layers.basics import Identity
from refiners.fluxion.layers.chain import Chain
from refiners.fluxion.layers.combinators import Distribute, Parallel
from refiners.fluxion.layers.factory import Factory
from refiners.fluxion.layers.functions import Lambda
from refiners.fluxion.layers.linear import Linear
from refiners.fluxion.layers.module import Module


class ScaledDotProductAttention(Module):
    """Softmax of the scaled products of queries and keys, times the values, for each of `num_heads` heads.

    Args of the constructor:
        num_heads: the last axis of queries, keys and values is cut into that many heads.
        is_causal: query i sees the keys 0 … i only. Also counts on top of a mask.
        is_optimized: use torch's fused kernel. Otherwise the scores are spelled out, operation by operation as
            upstream's "eager" attention does.
        slice_size: compute that many queries at a time, to bound the memory of the scores. The result is the same:
            a query does not depend on the others. (To the last bit wherever the matrix product of a few rows rounds
            as that of many; on CPU that is so from 16 rows on, most of the time.)
        scale: what the products are multiplied by. None: 1/√head_dim, computed as the kernel in use does (torch's
            fused one as `1 / sqrt(head_dim)`, upstream's eager one as `head_dim ** -0.5`; for some dimensions, 32
            among them, these are two different float64 numbers, and upstream models that hand `head_dim ** -0.5`
            to the fused kernel need it given here).
        softmax_in_float32: compute the softmax in float32 whatever the dtype, as the eager attention of many
            upstream models does. Only without `is_optimized`.

    Receives:
        query: `Float[Tensor, "batch query_length num_heads*head_dim"]`
        key: `Float[Tensor, "batch key_length num_heads*head_dim"]`
        value: `Float[Tensor, "batch key_length num_heads*value_head_dim"]`
        mask: see the module; optional

    Returns:
        `Float[Tensor, "batch query_length num_heads*value_head_dim"]`

    Raises:
        InputError: (an AssertionError) shapes that do not fit, or a `slice_size` below 1.
    """

    def __init__(
        self,
        num_heads: int = 1,
        is_causal: bool = False,
        is_optimized: bool = True,
        slice_size: int | None = None,
        scale: float | None = None,
        softmax_in_float32: bool = False,
    ) -> None:
        super().__init__()
        if slice_size is not None and slice_size < 1:
            raise InputError(f"slice_size is a number of queries, 1 or more, or None; got {slice_size}.")
        self.num_heads = num_heads
        self.is_causal = is_causal
        self.is_optimized = is_optimized
        self.slice_size = slice_size
        self.scale = scale
        self.softmax_in_float32 = softmax_in_float32

    def forward(
        self,
        query: Float[Tensor, "batch query_length query_dim"],
        key: Float[Tensor, "batch key_length query_dim"],
        value: Float[Tensor, "batch key_length value_dim"],
        mask: Shaped[Tensor, "..."] | None = None,
    ) -> Float[Tensor, "batch query_length value_dim"]:
        self._check(query, key, value, mask)
        query, key, value = self._split_heads(query), self._split_heads(key), self._split_heads(value)
        length = query.shape[-2]
        size = self.slice_size
        if size is None or length <= size:
            output = self._attend(query, key, value, mask, first=None)
        else:
            slices = [
                self._attend(query[:, :, i : i + size], key, value, slice_rows(mask, i, size), first=i)
                for i in range(0, length, size)
            ]
            output = torch.cat(slices, dim=2)
        return output.transpose(1, 2).flatten(2)  # batch query_length num_heads*value_head_dim

    def _check(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
        shapes = query.shape, key.shape, value.shape
        heads = self.num_heads
        problem = None
        if not len(shapes[0]) == len(shapes[1]) == len(shapes[2]) == 3:
            problem = "query, key and value need three axes: batch, length, dim"
        elif shapes[0][2] % heads or shapes[1][2] % heads or shapes[2][2] % heads:
            problem = f"the last axis of each must be a multiple of num_heads={heads}"
        elif shapes[0][2] != shapes[1][2]:
            problem = "query and key must have the same last axis"
        elif shapes[1][1] != shapes[2][1]:
            problem = "key and value must have the same length"
        elif mask is not None and mask.ndim not in (2, 4):
            problem = "the mask needs the axes (query, key) or (batch, head, query, key)"
        if problem is not None:
            query_shape, key_shape, value_shape = map(tuple, shapes)
            raise InputError(
                f"ScaledDotProductAttention: {problem}. Got query {query_shape}, key {key_shape}, value {value_shape}"
                + (f", mask {tuple(mask.shape)}." if mask is not None else ".")
            )

    def _split_heads(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        x = x.reshape(batch, length, self.num_heads, dim // self.num_heads)
        return x.transpose(1, 2)  # batch num_heads length head_dim

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, first: int | None) -> Tensor:
        """Attention of some queries, in heads. `first` is the position of the first one when they are a slice."""
        is_causal = self.is_causal
        if is_causal and (mask is not None or first is not None or not self.is_optimized):
            # The fused kernel knows the causal mask only for all queries at once and with no other mask.
            mask = with_causality(mask, first or 0, query, key)
            is_causal = False
        if self.is_optimized:
            return functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=is_causal, scale=self.scale
            )
        return self._attend_eagerly(query, key, value, mask)

    def _attend_eagerly(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
        scores = query @ key.transpose(-1, -2) * scale  # batch num_heads query_length key_length
        if mask is not None:
            scores = scores + as_additive(mask, query.dtype)
        weights = scores.softmax(dim=-1, dtype=torch.float32 if self.softmax_in_float32 else None)
        return weights.to(query.dtype) @ value


def slice_rows(mask: Tensor | None, start: int, size: int) -> Tensor | None:
    """The part of a mask that concerns `size` queries from `start` on."""
    if mask is None or mask.shape[-2] == 1:
        return mask
    return mask[..., start : start + size, :]


def with_causality(mask: Tensor | None, first: int, query: Tensor, key: Tensor) -> Tensor:
    """Forbid, on top of a mask, every key that comes after its query; `first` is the position of the first query."""
    queries = torch.arange(first, first + query.shape[-2], device=query.device)
    keys = torch.arange(key.shape[-2], device=query.device)
    causal = queries[:, None] >= keys[None, :]  # query_length key_length
    if mask is None:
        return causal
    if mask.dtype == torch.bool:
        return mask & causal
    return mask.masked_fill(~causal, -torch.inf)


def as_additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add to the scores. The lowest finite number, as upstream: a row with no key allowed gives no NaN."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


class Attention(Chain):
    """Attention between three learned projections, and a fourth one of its result.

    `use_bias` concerns the first three; the last always has a bias.

    Receives:
        query: `Float[Tensor, "batch query_length embedding_dim"]`
        key: `Float[Tensor, "batch key_length key_embedding_dim"]`
        value: `Float[Tensor, "batch key_length value_embedding_dim"]`

    Returns:
        `Float[Tensor, "batch query_length embedding_dim"]`

    Raises:
        InputError: (an AssertionError) `inner_dim` is not a multiple of `num_heads`.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int = 1,
        key_embedding_dim: int | None = None,
        value_embedding_dim: int | None = None,
        inner_dim: int | None = None,
        use_bias: bool = True,
        is_causal: bool = False,
        is_optimized: bool = True,
        scale: float | None = None,
        **factory: Unpack[Factory],
    ) -> None:
        self.embedding_dim = embedding_dim
        self.num_heads = num_heads
        self.key_embedding_dim = embedding_dim if key_embedding_dim is None else key_embedding_dim
        self.value_embedding_dim = embedding_dim if value_embedding_dim is None else value_embedding_dim
        self.inner_dim = embedding_dim if inner_dim is None else inner_dim
        self.heads_dim = self.inner_dim // num_heads
        self.use_bias = use_bias
        self.is_causal = is_causal
        self.is_optimized = is_optimized
        self.scale = scale
        if self.inner_dim % num_heads:
            raise InputError(
                f"{type(self).__name__}: inner_dim={self.inner_dim} (embedding_dim unless given) cannot be cut into "
                f"num_heads={num_heads} equal heads. Choose a multiple."
            )
        super().__init__(
            Distribute(
                Linear(self.embedding_dim, self.inner_dim, bias=use_bias, **factory),
                Linear(self.key_embedding_dim, self.inner_dim, bias=use_bias, **factory),
                Linear(self.value_embedding_dim, self.inner_dim, bias=use_bias, **factory),
            ),
            ScaledDotProductAttention(num_heads, is_causal=is_causal, is_optimized=is_optimized, scale=scale),
            Linear(self.inner_dim, self.embedding_dim, **factory),
        )


class SelfAttention(Attention):
    """Attention of a sequence to itself.

    Receives:
        x: `Float[Tensor, "batch sequence_length embedding_dim"]`

    Returns:
        `Float[Tensor, "batch sequence_length embedding_dim"]`
    """

    def __init__(
        self,
        embedding_dim: int,
        inner_dim: int | None = None,
        num_heads: int = 1,
        use_bias: bool = True,
        is_causal: bool = False,
        is_optimized: bool = True,
        scale: float | None = None,
        **factory: Unpack[Factory],
    ) -> None:
        super().__init__(
            embedding_dim,
            num_heads=num_heads,
            inner_dim=inner_dim,
            use_bias=use_bias,
            is_causal=is_causal,
            is_optimized=is_optimized,
            scale=scale,
            **factory,
        )
        self.insert(0, Parallel(Identity(), Identity(), Identity()))


class SelfAttention2d(SelfAttention):
    """Attention of the pixels of an image to one another. The size of the image waits in the context "reshape".

    Receives:
        x: `Float[Tensor, "batch channels height width"]`

    Returns:
        `Float[Tensor, "batch channels height width"]`
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        use_bias: bool = True,
        is_causal: bool = False,
        is_optimized: bool = True,
        scale: float | None = None,
        **factory: Unpack[Factory],
    ) -> None:
        self.channels = channels
        super().__init__(
            channels,
            num_heads=num_heads,
            use_bias=use_bias,
            is_causal=is_causal,
            is_optimized=is_optimized,
            scale=scale,
            **factory,
        )
        self.insert(0, Lambda(self._image_to_sequence))
        self.append(Lambda(self._sequence_to_image))

    def init_context(self) -> Contexts:
        return {"reshape": {"height": None, "width": None}}

    def _image_to_sequence(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        self.set_context("reshape", {"height": height, "width": width})
        return x.flatten(2).transpose(1, 2)  # batch height*width channels

    def _sequence_to_image(self, x: Tensor) -> Tensor:
        size = self.use_context("reshape")
        return torch.unflatten(x.transpose(1, 2), 2, (size["height"], size["width"]))  # batch channels height width
