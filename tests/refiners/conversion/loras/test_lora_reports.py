"""LoRA files that cannot be read as a whole: told in one error, or in a report of what was left out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import refiners.fluxion.layers as fl
from refiners.conversion import KeyMap
from refiners.conversion.loras import LoraNames, read_loras, write_loras
from refiners.errors import ConversionError, FileFormatError
from refiners.fluxion.adapters import inject_loras

KEYS = KeyMap({"blocks.{i}": "Linear_{i+1}"}, name="a toy")


def pair(name: str) -> dict[str, Tensor]:
    return {f"{name}.lora_A.weight": torch.ones(2, 4), f"{name}.lora_B.weight": torch.ones(4, 2)}


def build() -> fl.Chain:
    return fl.Chain(*[fl.Linear(4, 4) for _ in range(5)])


@pytest.fixture
def broken() -> dict[str, Tensor]:
    """Of five layers, one is sound."""
    state = {key: tensor for i in range(5) for key, tensor in pair(f"blocks.{i}").items()}
    del state["blocks.1.lora_A.weight"]
    state["blocks.2.diff_b"] = torch.ones(4)
    state["blocks.3.lora_down.weight"] = torch.ones(2, 4)
    state["blocks.4.lora_A.weight"] = torch.full((2, 4), torch.nan)
    return {**state, **pair("blocks.7")}


def test_one_error_tells_what_cannot_be_read_and_what_does_not_fit(broken: dict[str, Tensor]) -> None:
    model = build()
    with pytest.raises(ConversionError) as caught:
        read_loras(broken, strict=False).specs_for(model, KEYS)
    for told in ("misses down", "blocks.2.diff_b", "another spelling", "not finite", "blocks.7"):
        assert told in str(caught.value)
    with pytest.raises(ConversionError, match="misses down"):
        read_loras(broken)


def test_what_is_left_out_is_reported_and_the_rest_is_injected(broken: dict[str, Tensor], tmp_path: Path) -> None:
    model = build()
    file = read_loras(broken, strict=False)
    specs = file.specs_for(model, KEYS, strict=False)
    assert list(specs) == ["Linear_1"]
    assert specs.left_out.keys() == {
        "blocks.1",
        "blocks.2.diff_b",
        "blocks.3.lora_down.weight",
        "blocks.4",
        "blocks.7",
    }
    loras = inject_loras(model, specs, name="style", strict=False)
    assert loras.left_out == specs.left_out
    with pytest.raises(ConversionError, match="not read as a whole"):
        write_loras(tmp_path / "again.safetensors", file)


def test_a_file_without_anything_sound_is_refused_even_if_things_may_be_left_out() -> None:
    file = read_loras({"blocks.0.lora_A.weight": torch.ones(2, 4)}, strict=False)
    with pytest.raises(ConversionError, match="misses up"):
        file.specs_for(build(), KEYS, strict=False)


def test_a_file_is_injected_with_what_fits_in_one_call(broken: dict[str, Tensor]) -> None:
    class File:
        def specs_for(self, model: Any, /, *, strict: bool = True) -> Any:
            return read_loras(broken, strict=strict).specs_for(model, KEYS, strict=strict)

    loras = inject_loras(build(), File(), name="style", strict=False)
    assert len(loras) == 1
    with pytest.raises(ConversionError):
        inject_loras(build(), File(), name="style")


@pytest.mark.parametrize("size", [0, 1])
def test_a_rank_of_0_is_refused(size: int) -> None:
    state = {"fc.lora_A.weight": torch.ones(size, 4), "fc.lora_B.weight": torch.ones(4, size)}
    if size:
        assert read_loras(state).specs["fc"].rank == 1
        return
    with pytest.raises(ConversionError, match="holds no values"):
        read_loras(state)


@pytest.mark.parametrize("attribute", [{"rank_pattern": {"(": 2}}, {"target_modules": "("}, {"exclude_modules": "("}])
def test_an_expression_that_is_none_is_refused_by_name(attribute: dict[str, Any]) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, **attribute}
    state = {f"base_model.model.{key}": tensor for key, tensor in pair("blocks.0").items()}
    with pytest.raises(ConversionError, match=next(iter(attribute))):
        read_loras(state, config)


@pytest.mark.parametrize("state", [{"fc.lora_A.weight": 3}, {3: torch.ones(2)}])
def test_what_is_no_state_dict_is_refused(state: Any) -> None:
    with pytest.raises(FileFormatError, match="no name and tensor"):
        read_loras(state)


def test_values_that_are_not_finite_do_not_suggest_another_model() -> None:
    names = LoraNames.of(build(), KEYS)
    state = pair("blocks.0")
    state["blocks.0.lora_B.weight"][0, 0] = torch.inf
    with pytest.raises(ConversionError) as caught:
        read_loras(state).specs_for(names)
    assert "looks like" not in str(caught.value)
