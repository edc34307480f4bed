import copy
import pickle

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from refiners.errors import InputError, TreeIndexError
from refiners.fluxion.layers.basics import (
    Cos,
    Flatten,
    GetArg,
    Identity,
    Multiply,
    Parameter,
    Permute,
    Reshape,
    Sin,
    Slicing,
    Squeeze,
    Transpose,
    Unflatten,
    Unsqueeze,
)
from refiners.fluxion.layers.chain import Chain
from refiners.fluxion.layers.linear import Linear

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def bits(x: Tensor) -> list[int]:
    return x.contiguous().view(torch.uint8).flatten().tolist()


def test_identity_returns_the_same_object() -> None:
    x = torch.randn(2)
    assert Identity()(x) is x


def test_get_arg_picks_an_input_by_position() -> None:
    x, y = torch.zeros(1), torch.ones(1)
    assert GetArg(1)(x, y) is y
    assert GetArg(-2)(x, y) is x


def test_get_arg_says_how_many_inputs_there_were() -> None:
    with pytest.raises(TreeIndexError, match="index=2.* got 2 inputs"):
        GetArg(2)(torch.zeros(1), torch.zeros(1))
    with pytest.raises(IndexError):
        GetArg(-3)(torch.zeros(1), torch.zeros(1))


def test_flatten_joins_all_axes_by_default() -> None:
    x = torch.randn(2, 3, 4)
    assert Flatten()(x).shape == (24,)
    assert Flatten(1)(x).shape == (2, 12)
    assert Flatten(0, 1)(x).shape == (6, 4)


def test_unflatten_takes_its_sizes_as_an_input() -> None:
    x = torch.randn(2, 12)
    assert torch.equal(Unflatten(1)(x, torch.Size([3, 4])), x.reshape(2, 3, 4))
    assert Unflatten(dim=1)(x, (3, -1)).shape == (2, 3, 4)


def test_reshape_keeps_the_batch() -> None:
    x = torch.randn(2, 12)
    assert torch.equal(Reshape(3, 4)(x), x.reshape(2, 3, 4))
    assert Reshape(-1, 2)(x).shape == (2, 6, 2)


def test_transpose_and_permute_move_axes() -> None:
    x = torch.randn(2, 3, 4)
    assert torch.equal(Transpose(1, 2)(x), x.transpose(1, 2))
    assert torch.equal(Permute(2, 0, 1)(x), x.permute(2, 0, 1))


def test_squeeze_and_unsqueeze_undo_each_other() -> None:
    x = torch.randn(2, 3)
    assert Unsqueeze(1)(x).shape == (2, 1, 3)
    assert torch.equal(Squeeze(1)(Unsqueeze(1)(x)), x)


def test_sin_and_cos_are_those_of_torch() -> None:
    x = torch.randn(10)
    assert torch.equal(Sin()(x), x.sin())
    assert torch.equal(Cos()(x), x.cos())


# --- Slicing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("start", [-20, -3, 0, 2, 20])
@pytest.mark.parametrize("end", [None, -20, -1, 0, 4, 20])
@pytest.mark.parametrize("step", [1, 2, 7])
def test_slicing_means_what_a_python_slice_means(dim: int, start: int, end: int | None, step: int) -> None:
    x = torch.arange(6 * 6 * 6, dtype=torch.int16).view(6, 6, 6)
    axes = [slice(None)] * 3
    axes[dim] = slice(start, end, step)
    sliced = Slicing(dim=dim, start=start, end=end, step=step)(x)
    assert torch.equal(sliced, x[tuple(axes)])
    assert sliced.dtype == torch.int16


def test_slicing_to_zero_is_empty_and_keeps_the_dtype() -> None:
    empty = Slicing(dim=1, end=0)(torch.ones(2, 3, dtype=torch.bfloat16))
    assert empty.shape == (2, 0)
    assert empty.dtype == torch.bfloat16


def test_slicing_to_none_reaches_the_end() -> None:
    assert Slicing(start=1)(torch.arange(4)).tolist() == [1, 2, 3]


def test_slicing_refuses_a_step_that_is_not_positive() -> None:
    with pytest.raises(InputError, match="step=-1"):
        Slicing(step=-1)


# --- Multiply --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("scale", [0.1, -3.0, 1 / 3, 1e-4])
def test_multiply_has_the_bits_of_a_product_with_a_python_number(dtype: torch.dtype, scale: float) -> None:
    x = torch.randn(1000).to(dtype).requires_grad_()
    y = x.detach().clone().requires_grad_()
    ours, theirs = Multiply(scale)(x), y * scale
    assert bits(ours.detach()) == bits(theirs.detach())
    cotangent = torch.randn(1000).to(dtype)
    ours.backward(cotangent)
    theirs.backward(cotangent)
    assert x.grad is not None
    assert y.grad is not None
    assert bits(x.grad) == bits(y.grad)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_multiply_adds_its_bias_after_scaling(dtype: torch.dtype) -> None:
    x = torch.randn(1000).to(dtype)
    assert torch.equal(Multiply(0.3, bias=0.7)(x), x * 0.3 + 0.7)


@pytest.mark.parametrize(
    "x", [torch.tensor(3), torch.tensor(3.0), torch.arange(4), torch.tensor(2.0, dtype=torch.half)]
)
def test_multiply_keeps_the_dtype_that_a_python_number_would(x: Tensor) -> None:
    for scale, bias in ((2, 0), (0.5, 0), (0.5, 1.5)):
        expected = x * scale + bias if bias else x * scale
        assert Multiply(scale, bias)(x).dtype == expected.dtype
        assert torch.equal(Multiply(scale, bias)(x), expected)


def test_multiply_without_bias_keeps_negative_zero() -> None:
    assert bits(Multiply(2.0)(torch.tensor([-0.0]))) == bits(torch.tensor([-0.0]))


def test_setting_scale_and_bias_counts_at_once() -> None:
    multiply = Multiply()
    multiply.scale = 3
    multiply.bias = 1.5
    assert multiply(torch.tensor([2.0])).tolist() == [7.5]
    assert (multiply.scale, multiply.bias) == (3, 1.5)
    assert str(multiply) == "Multiply(scale=3, bias=1.5)"


def test_setting_the_scale_recompiles_nothing() -> None:
    torch.compiler.reset()
    counter = CompileCounter()
    multiply = Multiply(2.0)
    compiled = torch.compile(multiply, backend=counter, fullgraph=True)
    x = torch.randn(4)
    for scale in (2.0, 3.0, 0.0, 1.0, -0.1):
        multiply.scale = scale
        assert torch.equal(compiled(x), x * scale)
    assert counter.frame_count == 1


def test_multiply_adds_nothing_to_the_state_dict() -> None:
    assert Multiply(2.0).state_dict() == {}


def test_multiply_works_whatever_the_default_device() -> None:
    with torch.device("meta"):
        multiply = Multiply(2.0)
        assert multiply(torch.ones(3)).is_meta
    assert multiply(torch.ones(1)).item() == 2.0


def test_copies_of_multiply_have_numbers_of_their_own() -> None:
    multiply = Multiply(2.0)
    for clone in (copy.deepcopy(multiply), pickle.loads(pickle.dumps(multiply))):
        clone.scale = 5.0
        assert clone(torch.ones(1)).item() == 5.0
        assert multiply(torch.ones(1)).item() == 2.0


def test_multiply_refuses_what_is_no_number() -> None:
    with pytest.raises(InputError, match=r"Multiply\.scale is a number, got Tensor"):
        Multiply(torch.ones(3))  # type: ignore[arg-type]  the point of the test
    multiply = Multiply(2.0)
    with pytest.raises(TypeError):
        multiply.scale = "3"  # type: ignore[assignment]  the point of the test
    assert multiply(torch.ones(1)).item() == 2.0


# --- Parameter -------------------------------------------------------------------------------------------------------


def test_parameter_is_its_weight_for_each_element_of_the_batch() -> None:
    parameter = Parameter(3, 4)
    output = parameter(torch.randn(2, 7))
    assert output.shape == (2, 3, 4)
    assert torch.equal(output[0], parameter.weight)
    assert torch.equal(output[1], parameter.weight)


def test_parameter_may_be_frozen_and_thawed() -> None:
    parameter = Parameter(3, requires_grad=False)
    assert not parameter.weight.requires_grad
    parameter.requires_grad = True
    assert parameter.requires_grad
    assert parameter.weight.requires_grad


def test_parameter_gives_its_chain_a_device_and_a_dtype() -> None:
    chain = Chain(Identity(), Parameter(3, device="meta", dtype=torch.float64))
    assert chain.device == torch.device("meta")
    assert chain.dtype == torch.float64
    assert str(chain[1]) == "Parameter(dims=(3,), device=meta, dtype=float64)"


def test_basics_compile_and_export_without_a_break() -> None:
    chain = Chain(
        Linear(4, 6),
        Slicing(dim=1, start=1),
        Reshape(-1, 2),
        Transpose(1, 2),
        Flatten(1),
        Unsqueeze(0),
        Permute(1, 0, 2),
        Squeeze(1),
        Multiply(0.5, bias=1.0),
        Sin(),
        Cos(),
    )
    x = torch.randn(3, 5, 4)
    torch.compiler.reset()
    assert torch.equal(torch.compile(chain, backend="eager", fullgraph=True)(x), chain(x))
    assert torch.equal(torch.export.export(chain, (x,), strict=True).module()(x), chain(x))
