import copy
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from refiners.errors import InputError
from refiners.fluxion.layers.attentions import Attention, ScaledDotProductAttention, SelfAttention, SelfAttention2d
from refiners.fluxion.layers.basics import GetArg, Identity
from refiners.fluxion.layers.chain import Chain
from refiners.fluxion.layers.combinators import Distribute, Parallel
from refiners.fluxion.layers.context_access import UseContext
from refiners.fluxion.layers.functions import Lambda
from refiners.fluxion.layers.linear import Linear

NUM_HEADS, BATCH = 2, 3


def inputs(queries: int = 40, keys: int = 33, dim: int = 16, value_dim: int = 16, dtype: torch.dtype = torch.float32):
    shapes = ((BATCH, queries, dim), (BATCH, keys, dim), (BATCH, keys, value_dim))
    return tuple(torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)


def truth(
    query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Attention in float64, one head and one query at a time, from its definition."""
    query, key, value = query.double(), key.double(), value.double()
    outputs = torch.empty(query.shape[0], query.shape[1], value.shape[2], dtype=torch.float64)
    dim, value_dim = query.shape[2] // NUM_HEADS, value.shape[2] // NUM_HEADS
    for b in range(query.shape[0]):
        for h in range(NUM_HEADS):
            for i in range(query.shape[1]):
                q = query[b, i, h * dim : (h + 1) * dim]
                scores = (key[b, :, h * dim : (h + 1) * dim] * q).sum(1)
                scores = scores * (1 / math.sqrt(dim) if scale is None else scale)
                if allowed is not None:
                    scores = scores[allowed[b, h, i]]
                weights = scores.exp() / scores.exp().sum()
                values = value[b, :, h * value_dim : (h + 1) * value_dim]
                values = values if allowed is None else values[allowed[b, h, i]]
                outputs[b, i, h * value_dim : (h + 1) * value_dim] = (weights[:, None] * values).sum(0)
    return outputs


def error(x: Tensor, true: Tensor) -> float:
    assert x.shape == true.shape
    return ((x.double() - true).abs().max() / true.abs().max()).item()


def random_mask(*shape: int) -> Tensor:
    mask = torch.rand(shape) > 0.4
    mask[..., 0] = True  # no query without a key
    return mask


def lower_triangle(queries: int, keys: int) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool).tril()


VARIANTS = {
    "optimized": {},
    "eager": {"is_optimized": False},
    "optimized, sliced": {"slice_size": 16},
    "eager, sliced": {"is_optimized": False, "slice_size": 16},
    "optimized, sliced by 1": {"slice_size": 1},
    "eager, sliced by 7": {"is_optimized": False, "slice_size": 7},
}
BOUNDS = {torch.float64: 2.0**-48, torch.float32: 2.0**-20, torch.bfloat16: 2.0**-5}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_attention_is_its_definition(variant: str, dtype: torch.dtype) -> None:
    q, k, v = inputs(dtype=dtype)
    output = ScaledDotProductAttention(NUM_HEADS, **VARIANTS[variant])(q, k, v)
    assert output.dtype == dtype
    assert error(output, truth(q, k, v)) < BOUNDS[dtype]


@pytest.mark.parametrize("variant", VARIANTS)
def test_causal_attention_sees_no_later_key(variant: str) -> None:
    q, k, v = inputs(queries=40, keys=40)
    output = ScaledDotProductAttention(NUM_HEADS, is_causal=True, **VARIANTS[variant])(q, k, v)
    allowed = lower_triangle(40, 40).expand(BATCH, NUM_HEADS, 40, 40)
    assert error(output, truth(q, k, v, allowed)) < BOUNDS[torch.float32]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(40, 33), (BATCH, 1, 40, 33), (BATCH, 1, 1, 33), (1, NUM_HEADS, 40, 33)], ids=str)
@pytest.mark.parametrize("additive", [False, True], ids=["boolean", "additive"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
def test_a_mask_hides_keys(variant: str, shape: tuple[int, ...], additive: bool, is_causal: bool) -> None:
    q, k, v = inputs()
    mask = random_mask(*shape)
    allowed = mask.expand(BATCH, NUM_HEADS, 40, 33)
    if is_causal:
        allowed = allowed & lower_triangle(40, 33)
    given = torch.zeros(shape).masked_fill(~mask, torch.finfo(torch.float32).min) if additive else mask
    output = ScaledDotProductAttention(NUM_HEADS, is_causal=is_causal, **VARIANTS[variant])(q, k, v, given)
    assert error(output, truth(q, k, v, allowed)) < BOUNDS[torch.float32]


@pytest.mark.parametrize("variant", VARIANTS)
def test_values_may_have_another_dimension_than_queries(variant: str) -> None:
    q, k, v = inputs(dim=16, value_dim=24)
    output = ScaledDotProductAttention(NUM_HEADS, **VARIANTS[variant])(q, k, v)
    assert error(output, truth(q, k, v)) < BOUNDS[torch.float32]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_scale_may_be_given(variant: str) -> None:
    q, k, v = inputs()
    output = ScaledDotProductAttention(NUM_HEADS, scale=1.0, **VARIANTS[variant])(q, k, v)
    assert error(output, truth(q, k, v, scale=1.0)) < BOUNDS[torch.float32]


def test_optimized_attention_has_the_bits_of_torchs_kernel() -> None:
    q, k, v = inputs()
    heads = [x.view(BATCH, -1, NUM_HEADS, 8).transpose(1, 2) for x in (q, k, v)]
    expected = functional.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(BATCH, 40, 16)
    assert torch.equal(ScaledDotProductAttention(NUM_HEADS)(q, k, v), expected)
    expected = functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).reshape(BATCH, 40, 16)
    assert torch.equal(ScaledDotProductAttention(NUM_HEADS, is_causal=True)(q, k, v), expected)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("softmax_in_float32", [False, True], ids=["", "softmax in float32"])
def test_eager_attention_has_the_bits_of_its_operations(dtype: torch.dtype, softmax_in_float32: bool) -> None:
    q, k, v = inputs(dtype=dtype)
    mask = torch.zeros(BATCH, 1, 1, 33, dtype=dtype)
    mask = mask.masked_fill(~random_mask(BATCH, 1, 1, 33), torch.finfo(dtype).min)
    query, key, value = (x.view(BATCH, -1, NUM_HEADS, 8).transpose(1, 2) for x in (q, k, v))
    scores = torch.matmul(query, key.transpose(2, 3)) * 8**-0.5 + mask
    weights = functional.softmax(scores, dim=-1, dtype=torch.float32 if softmax_in_float32 else None).to(dtype)
    expected = torch.matmul(weights, value).transpose(1, 2).reshape(BATCH, 40, 16)
    attention = ScaledDotProductAttention(NUM_HEADS, is_optimized=False, softmax_in_float32=softmax_in_float32)
    assert torch.equal(attention(q, k, v, mask), expected)
    assert torch.equal(attention(q, k, v, mask == 0), expected)


@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
def test_slices_of_eager_attention_have_the_bits_of_the_whole(is_causal: bool) -> None:
    q, k, v = inputs(queries=96, keys=96)
    whole = ScaledDotProductAttention(NUM_HEADS, is_causal=is_causal, is_optimized=False)(q, k, v)
    for slice_size in (16, 32, 48, 96, 1000):
        sliced = ScaledDotProductAttention(NUM_HEADS, is_causal, is_optimized=False, slice_size=slice_size)(q, k, v)
        assert torch.equal(sliced, whole)


def test_slices_of_optimized_attention_have_the_bits_of_the_whole() -> None:
    q, k, v = inputs(queries=96, keys=96)
    whole = ScaledDotProductAttention(NUM_HEADS)(q, k, v)
    for slice_size in (16, 32, 48, 96, 1000):
        assert torch.equal(ScaledDotProductAttention(NUM_HEADS, slice_size=slice_size)(q, k, v), whole)


def test_a_query_that_may_see_no_key_gives_no_nan() -> None:
    q, k, v = inputs()
    mask = torch.ones(40, 33, dtype=torch.bool)
    mask[5] = False
    for variant in VARIANTS.values():
        assert not ScaledDotProductAttention(NUM_HEADS, **variant)(q, k, v, mask).isnan().any()


@pytest.mark.parametrize("is_optimized", [True, False], ids=["optimized", "eager"])
def test_causality_on_top_of_padding_never_shows_a_later_key(is_optimized: bool) -> None:
    """With padding on the left, the first queries see padding only. That must not open the future to them."""
    q, k, v = inputs(queries=8, keys=8)
    padding = torch.zeros(BATCH, 1, 1, 8)
    padding[..., :3] = torch.finfo(torch.float32).min
    attention = ScaledDotProductAttention(NUM_HEADS, is_causal=True, is_optimized=is_optimized)
    before = attention(q, k, v, padding)
    v[:, 4:] += 1
    assert torch.equal(attention(q, k, v, padding)[:, :4], before[:, :4])


BAD_INPUTS = {
    "three axes": ((2, 4), (2, 4), (2, 4), None),
    "multiple of num_heads=2": ((1, 3, 5), (1, 3, 5), (1, 3, 5), None),
    "query and key must have the same last axis": ((1, 3, 4), (1, 3, 6), (1, 3, 4), None),
    "key and value must have the same length": ((1, 3, 4), (1, 3, 4), (1, 2, 4), None),
    "the mask needs the axes": ((1, 3, 4), (1, 3, 4), (1, 3, 4), (1, 3, 3)),
}


@pytest.mark.parametrize("problem", BAD_INPUTS)
def test_shapes_that_do_not_fit_are_named(problem: str) -> None:
    *shapes, mask_shape = BAD_INPUTS[problem]
    mask = None if mask_shape is None else torch.zeros(mask_shape)
    with pytest.raises(InputError, match=problem):
        ScaledDotProductAttention(2)(*(torch.zeros(shape) for shape in shapes), mask)


def test_a_slice_size_below_one_is_refused() -> None:
    with pytest.raises(InputError, match="slice_size"):
        ScaledDotProductAttention(slice_size=0)


# --- Attention and its relatives -------------------------------------------------------------------------------------


def test_attention_is_three_projections_the_dot_product_and_one_projection() -> None:
    attention = Attention(8, num_heads=2, key_embedding_dim=6, value_embedding_dim=4, inner_dim=12, use_bias=False)
    assert [type(layer) for layer in attention] == [Distribute, ScaledDotProductAttention, Linear]
    shapes = {key: tuple(tensor.shape) for key, tensor in attention.state_dict().items()}
    assert shapes == {
        "Distribute.Linear_1.weight": (12, 8),
        "Distribute.Linear_2.weight": (12, 6),
        "Distribute.Linear_3.weight": (12, 4),
        "Linear.weight": (8, 12),
        "Linear.bias": (8,),
    }
    output = attention(torch.randn(2, 5, 8), torch.randn(2, 7, 6), torch.randn(2, 7, 4))
    assert output.shape == (2, 5, 8)


def test_attention_passes_its_choices_to_the_dot_product() -> None:
    attention = Attention(8, num_heads=2, is_causal=True, is_optimized=False, scale=0.5)
    product = attention.ensure_find(ScaledDotProductAttention)
    chosen = (product.num_heads, product.is_causal, product.is_optimized, product.scale)
    assert chosen == (2, True, False, 0.5)


def test_attention_refuses_heads_that_do_not_divide_its_dimension() -> None:
    with pytest.raises(InputError, match="inner_dim=8.*num_heads=3"):
        Attention(8, num_heads=3)


def test_a_mask_enters_an_attention_by_one_edit() -> None:
    attention = Attention(8, num_heads=2)
    x = torch.randn(2, 5, 8)
    mask = torch.tensor([True, True, False, True, False]).expand(2, 1, 1, 5)
    attention.insert(1, Parallel(GetArg(0), GetArg(1), GetArg(2), UseContext("attention", "mask")))
    attention.set_context("attention", {"mask": mask})
    before = attention(x, x, x)
    hidden = x.clone()
    hidden[:, [2, 4]] += 1
    assert torch.equal(attention(x, hidden, hidden), before)


def test_self_attention_gives_its_input_to_all_three() -> None:
    attention = SelfAttention(8, inner_dim=12, num_heads=2)
    assert [type(layer) for layer in attention] == [Parallel, Distribute, ScaledDotProductAttention, Linear]
    assert [type(layer) for layer in attention[0]] == [Identity] * 3
    x = torch.randn(2, 5, 8)
    assert torch.equal(attention(x), attention[1:](x, x, x))


def test_self_attention_2d_attends_between_pixels() -> None:
    attention = SelfAttention2d(8, num_heads=2)
    assert [type(layer) for layer in attention] == [
        Lambda,
        Parallel,
        Distribute,
        ScaledDotProductAttention,
        Linear,
        Lambda,
    ]
    x = torch.randn(2, 8, 3, 5)
    sequence = attention[1:-1](x.flatten(2).transpose(1, 2))
    assert torch.equal(attention(x), sequence.transpose(1, 2).reshape(2, 8, 3, 5))


def test_self_attention_2d_forgets_the_size_after_each_forward() -> None:
    attention = SelfAttention2d(8)
    assert attention(torch.randn(1, 8, 3, 5)).shape == (1, 8, 3, 5)
    assert attention.use_context("reshape") == {"height": None, "width": None}
    assert attention(torch.randn(1, 8, 2, 7)).shape == (1, 8, 2, 7)


def test_copies_of_self_attention_2d_keep_sizes_of_their_own() -> None:
    attention = SelfAttention2d(8, num_heads=2)
    x = torch.randn(1, 8, 3, 5)
    for clone in (copy.deepcopy(attention), attention.structural_copy(), Chain(attention).structural_copy()):
        assert torch.equal(clone(x), attention(x))


@pytest.mark.parametrize("is_optimized", [True, False], ids=["optimized", "eager"])
def test_attentions_compile_and_export_without_a_break(is_optimized: bool) -> None:
    attention = SelfAttention(8, num_heads=2, is_causal=True, is_optimized=is_optimized)
    attention.ensure_find(ScaledDotProductAttention).slice_size = 3
    x = torch.randn(2, 7, 8)
    torch.compiler.reset()
    assert torch.equal(torch.compile(attention, backend="eager", fullgraph=True)(x), attention(x))
    assert torch.equal(torch.export.export(attention, (x,), strict=True).module()(x), attention(x))


def test_self_attention_2d_compiles_without_a_break() -> None:
    attention = SelfAttention2d(8, num_heads=2)
    x = torch.randn(2, 8, 3, 5)
    torch.compiler.reset()
    assert torch.equal(torch.compile(attention, backend="eager", fullgraph=True)(x), attention(x))
