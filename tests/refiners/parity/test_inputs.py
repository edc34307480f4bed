"""Both sides get the same inputs: values and strides equal, memory apart."""

import pytest
import torch
from torch import Tensor

from refiners.parity.bits import same_bits
from refiners.parity.inputs import (
    copy_exactly,
    copy_for_one_side,
    draw_inputs,
    mutated,
    named_tensors,
    place_inputs,
)
from tests.refiners.parity.toys import make_case


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(2, 3, 4, 5),
        torch.randn(2, 4, 5, 3).permute(0, 3, 1, 2),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.tensor([7.0]).expand(4),
        torch.randn(3, 1, 4).expand(3, 5, 4),
        torch.randn(6, 8)[::2, 1:4],
        torch.tensor(3.0),
        torch.zeros(0, 3),
    ],
    ids=["contiguous", "permuted", "channels_last", "expanded", "expanded_inside", "sliced", "scalar", "empty"],
)
def test_a_copy_keeps_values_strides_and_expands(tensor: Tensor) -> None:
    made = copy_exactly(tensor)
    assert same_bits(made, tensor)
    assert made.stride() == tensor.stride()
    assert not tensor.numel() or made.data_ptr() != tensor.data_ptr()
    rounded = copy_exactly(tensor, dtype=torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    assert rounded.stride() == tensor.stride()
    assert same_bits(rounded, tensor.bfloat16())


def test_only_floating_inputs_take_the_dtype_of_the_lane() -> None:
    inputs = {
        "ids": torch.arange(3),
        "mask": torch.tensor([True]),
        "nested": [torch.ones(2), {"t": (torch.ones(1), 5)}],
    }
    placed = place_inputs(inputs, torch.float16, "cpu")
    kinds = {name: tensor.dtype for name, tensor in named_tensors(placed)}
    assert kinds == {
        "ids": torch.int64,
        "mask": torch.bool,
        "nested.0": torch.float16,
        "nested.1.t.0": torch.float16,
    }
    assert placed["nested"][1]["t"][1] == 5


def test_inputs_are_drawn_in_float64_from_the_seed() -> None:
    first, second = draw_inputs(make_case()), draw_inputs(make_case())
    assert first["x"].dtype == torch.float64
    assert torch.get_default_dtype() == torch.float32
    assert same_bits(first["x"], second["x"])
    assert not same_bits(first["x"], draw_inputs(make_case(seed=1))["x"])


def test_each_side_works_on_its_own_copy() -> None:
    inputs = {"x": torch.randn(2, 3), "ids": torch.arange(3)}
    own = copy_for_one_side(inputs, gradients=True)
    assert own["x"].requires_grad
    assert own["x"].data_ptr() != inputs["x"].data_ptr()
    assert not copy_for_one_side(inputs, gradients=False)["x"].requires_grad


def test_every_kind_of_change_to_an_input_is_seen() -> None:
    pristine = {"x": torch.randn(2, 3), "z": torch.zeros(2), "list": [torch.ones(2)]}

    def own() -> dict[str, object]:
        return copy_for_one_side(pristine, gradients=False)

    assert mutated(own(), pristine) == []
    changed = own()
    changed["z"] = -torch.zeros(2)
    assert mutated(changed, pristine) == ["z"]
    changed = own()
    changed["x"] = pristine["x"].T.contiguous().T
    assert mutated(changed, pristine) == ["x"]
    changed = own()
    del changed["x"]
    changed["list"] = []
    assert mutated(changed, pristine) == ["list.0", "x"]


def test_strides_reach_both_sides() -> None:
    seen: list[tuple[int, ...]] = []

    def run(model: torch.nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(inputs["x"].stride())
        return {"y": model(inputs["x"])}

    case = make_case(
        inputs=lambda generator: {"x": torch.randn(8, 3, generator=generator).T}, run_upstream=run, run_port=run
    )
    from tests.refiners.parity.toys import result_of

    assert result_of(case, "float32").verdict == "BITWISE"
    assert set(seen) == {(1, 3)}
