import math

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from refiners.errors import InputError, RefinersError
from refiners.fluxion.utils import (
    device_has_bfloat16,
    gaussian_blur,
    interpolate,
    manual_seed,
    no_grad,
    norm,
    normalize,
    pad,
    str_to_dtype,
    summarize_tensor,
)


def test_norm_is_the_root_of_the_sum_of_squares() -> None:
    assert norm(torch.tensor([[3.0, 4.0]])).item() == 5.0


def test_manual_seed_repeats_random_numbers() -> None:
    manual_seed(3)
    first = torch.randn(4)
    manual_seed(3)
    assert torch.equal(torch.randn(4), first)


def test_no_grad_works_as_a_context_and_as_a_decorator() -> None:
    x = torch.ones(1, requires_grad=True)

    @no_grad()
    def double(x: Tensor) -> Tensor:
        return x * 2

    with no_grad():
        assert not (x * 2).requires_grad
    assert not double(x).requires_grad
    assert (x * 2).requires_grad


def test_pad_and_interpolate_are_those_of_torch() -> None:
    x = torch.arange(4.0).view(1, 1, 2, 2)
    assert pad(x, (1, 0, 0, 1), value=9.0).tolist() == [[[[9, 0, 1], [9, 2, 3], [9, 9, 9]]]]
    assert pad(x, (1, 1, 1, 1), mode="reflect").shape == (1, 1, 4, 4)
    assert interpolate(x, torch.Size([2, 4])).tolist() == [[[[0, 0, 1, 1], [2, 2, 3, 3]]]]


def test_normalize_works_per_channel() -> None:
    x = torch.randn(2, 3, 4, 5)
    mean, std = [0.5, 0.25, 0.0], [2.0, 4.0, 1.0]
    expected = torch.stack([(x[:, i] - mean[i]) / std[i] for i in range(3)], dim=1)
    assert torch.equal(normalize(x, mean, std), expected)


def test_normalize_refuses_integers_few_axes_and_a_std_of_zero() -> None:
    with pytest.raises(InputError, match="dtype=uint8"):
        normalize(torch.zeros(3, 2, 2, dtype=torch.uint8), [0.0], [1.0])
    with pytest.raises(AssertionError):
        normalize(torch.zeros(3, 2), [0.0], [1.0])
    with pytest.raises(ValueError, match="std of 0"):
        normalize(torch.zeros(3, 2, 2), [0.0], [0.0])


# --- gaussian_blur ---------------------------------------------------------------------------------------------------
# Compared with torchvision 0.29.2's function on 480 combinations of dtype, shape, kernel and sigma when it was written:
# equal to the last bit. torchvision is not installed here, so these tests go back to the formula.


def blurred(x: Tensor, sizes: tuple[int, int], sigmas: tuple[float, float]) -> Tensor:
    """The blur in float64, one axis after the other, by sums over shifted images."""
    for dim, size, sigma in ((-1, sizes[0], sigmas[0]), (-2, sizes[1], sigmas[1])):
        radius, length = size // 2, x.shape[dim]
        weights = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-radius, radius + 1)]
        total = torch.zeros_like(x)
        for offset, weight in zip(range(-radius, radius + 1), weights, strict=True):
            reflected = [abs(i + offset) for i in range(length)]
            reflected = [i if i < length else 2 * (length - 1) - i for i in reflected]
            total += x.index_select(dim, torch.tensor(reflected)) * (weight / sum(weights))
        x = total
    return x


@pytest.mark.parametrize("shape", [(2, 3, 20, 31), (1, 33, 17)], ids=str)
@pytest.mark.parametrize("sizes", [(1, 1), (3, 7), (9, 5)], ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 2.0**-50), (torch.float32, 2.0**-21)], ids=str)
def test_gaussian_blur_is_its_formula(
    shape: tuple[int, ...], sizes: tuple[int, int], dtype: torch.dtype, bound: float
) -> None:
    x = torch.rand(shape, dtype=torch.float64)
    true = blurred(x, sizes, (0.8, 2.0))
    assert (gaussian_blur(x.to(dtype), sizes, (0.8, 2.0)).double() - true).abs().max().item() < bound


def test_gaussian_blur_chooses_sigma_by_the_size_of_the_kernel() -> None:
    x = torch.rand(1, 1, 12, 12)
    assert torch.equal(gaussian_blur(x, 5), gaussian_blur(x, (5, 5), 5 * 0.15 + 0.35))
    assert torch.equal(gaussian_blur(x, (5, 3)), gaussian_blur(x, [5, 3], [5 * 0.15 + 0.35, 3 * 0.15 + 0.35]))


def test_gaussian_blur_rounds_integers_and_keeps_their_dtype() -> None:
    x = torch.randint(0, 256, (3, 9, 9), dtype=torch.uint8)
    assert torch.equal(gaussian_blur(x, 3), gaussian_blur(x.float(), 3).round().to(torch.uint8))


def test_gaussian_blur_refuses_kernels_and_sigmas_that_make_no_sense() -> None:
    x = torch.rand(1, 1, 12, 12)
    with pytest.raises(InputError, match="kernel_size=4"):
        gaussian_blur(x, 4)
    with pytest.raises(ValueError, match="sigma=0"):
        gaussian_blur(x, 3, 0)
    with pytest.raises(InputError, match=r"\(12, 12\)"):
        gaussian_blur(x[0, 0], 3)


# --- names -----------------------------------------------------------------------------------------------------------


def test_summarize_tensor_tells_shape_dtype_device_and_statistics() -> None:
    summary = summarize_tensor(torch.tensor([[3.0, -4.0]], requires_grad=True))
    assert summary == (
        "Tensor(shape=(1, 2), dtype=float32, device=cpu, "
        "min=-4.00, max=3.00, mean=-0.50, std=3.50, norm=5.00, grad=True)"
    )


@pytest.mark.parametrize(
    "tensor",
    [
        torch.empty(0),
        torch.tensor(True),
        torch.arange(3),
        torch.randn(2, dtype=torch.complex64),
        torch.randn(2).bfloat16(),
        torch.randn(2).to(torch.float8_e4m3fn),
        torch.tensor([math.nan, math.inf]),
        torch.eye(2).to_sparse(),
        torch.empty(2, 3, device="meta"),
    ],
    ids=["empty", "bool", "int", "complex", "bfloat16", "float8", "nan", "sparse", "meta"],
)
def test_summarize_tensor_never_raises(tensor: Tensor) -> None:
    assert summarize_tensor(tensor).startswith(f"Tensor(shape=({', '.join(map(str, tensor.shape))}), dtype=")


def test_summarize_tensor_takes_a_tensor_without_values() -> None:
    with FakeTensorMode():
        assert summarize_tensor(torch.empty(2)).startswith("Tensor(shape=(2), dtype=float32, device=cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64], ids=str)
def test_str_to_dtype_reads_what_torch_prints(dtype: torch.dtype) -> None:
    assert str_to_dtype(str(dtype)) is dtype
    assert str_to_dtype(str(dtype).removeprefix("torch.")) is dtype


def test_str_to_dtype_knows_the_short_names() -> None:
    assert str_to_dtype("half") is torch.float16
    assert str_to_dtype("Float") is torch.float32
    assert str_to_dtype("bf16") is torch.bfloat16


def test_str_to_dtype_refuses_other_names() -> None:
    for name in ("float31", "nn", ""):
        with pytest.raises(ValueError, match="Unknown dtype") as caught:
            str_to_dtype(name)
        assert isinstance(caught.value, RefinersError)


def test_a_cpu_has_bfloat16() -> None:
    assert device_has_bfloat16(torch.device("cpu"))
    assert device_has_bfloat16("meta")
