"""LoRA files for whole models: all parts in one call, out again without a trace, or nothing at all."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from reference_ports.pipelines.stable_diffusion import LatentDiffusionModel
from reference_ports.pipelines.stable_diffusion.command import generate
from refiners.conversion.loras import names_of, read_loras, write_loras
from refiners.errors import AdapterError, ConversionError, InputError
from refiners.fluxion.adapters import DeltaSpec
from refiners.parity.bits import same_bits

PARTS = ("unet", "text_encoder")


def some_specs(model: nn.Module, seed: int, alpha: float | None = 2.0) -> dict[str, DeltaSpec]:
    """A LoRA of rank 2 for every second Linear."""
    generator = torch.Generator().manual_seed(seed)
    layers = [(path, layer) for path, layer in names_of(model).layers.items() if isinstance(layer, nn.Linear)]
    return {
        path: DeltaSpec(
            "lora",
            {
                "down": torch.randn(2, layer.in_features, generator=generator),
                "up": torch.randn(layer.out_features, 2, generator=generator),
            },
            alpha,
        )
        for path, layer in layers[::2]
    }


@pytest.fixture
def file(model: LatentDiffusionModel, tmp_path: Path) -> Path:
    """A LoRA file in kohya's layout for both parts of the model."""
    models: dict[str, nn.Module] = {part: getattr(model, part) for part in PARTS}
    specs = {part: some_specs(models[part], seed) for seed, part in enumerate(PARTS)}
    write_loras(tmp_path / "style.safetensors", specs, models, layout="kohya", metadata={"ss_output_name": "style"})
    return tmp_path / "style.safetensors"


def outputs(model: LatentDiffusionModel) -> tuple[Tensor, Tensor]:
    """What the text encoder and the denoiser compute."""
    with torch.no_grad():
        text = model.compute_conditions("a cat")["clip_text_embedding"]
        latents = torch.ones(1, 4, 4, 4)
        return text, model.predict(latents, {"clip_text_embedding": text[:1]}, 0)


def test_one_object_holds_what_is_in_all_parts(model: LatentDiffusionModel, file: Path) -> None:
    before = outputs(model)
    keys = list(model.state_dict())
    loras = model.load_loras(file, "style")
    assert set(loras.sets) == set(PARTS)
    assert all(not same_bits(a, b) for a, b in zip(outputs(model), before, strict=True))
    with loras.disabled():
        assert all(same_bits(a, b) for a, b in zip(outputs(model), before, strict=True))
    loras.scale = 0.5
    assert loras.scale == 0.5
    assert {lora_set.scale for lora_set in loras.sets.values()} == {0.5}
    loras.eject()
    assert all(same_bits(a, b) for a, b in zip(outputs(model), before, strict=True))
    assert list(model.state_dict()) == keys


def test_a_file_is_written_again_from_the_model_with_its_metadata(
    model: LatentDiffusionModel, file: Path, tmp_path: Path
) -> None:
    model.load_loras(file).write(tmp_path / "again.safetensors", "kohya")
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()
    assert read_loras(tmp_path / "again.safetensors").metadata == {"ss_output_name": "style"}


def test_two_files_stack_and_leave_in_any_order(model: LatentDiffusionModel, file: Path) -> None:
    before = outputs(model)
    first, second = model.load_loras(file, "first"), model.load_loras(file, "second", scale=0.5)
    first.eject()
    second.eject()
    assert all(same_bits(a, b) for a, b in zip(outputs(model), before, strict=True))


def test_what_does_not_fit_one_part_keeps_all_parts_untouched(
    model: LatentDiffusionModel, file: Path, tmp_path: Path
) -> None:
    tensors = dict(read_loras(file).tensors)
    key = next(key for key in tensors if key.startswith("lora_te_") and key.endswith("lora_down.weight"))
    tensors[key] = tensors[key][:, 1:].contiguous()
    save_file(tensors, tmp_path / "odd.safetensors")
    keys = list(model.state_dict())
    with pytest.raises(ConversionError, match="1 shape"):
        model.load_loras(tmp_path / "odd.safetensors")
    assert list(model.state_dict()) == keys
    assert len(model.load_loras(tmp_path / "odd.safetensors", strict=False)) == len(read_loras(file)) - 1


def test_what_does_not_fit_any_part_is_told_in_one_error(model: LatentDiffusionModel, file: Path) -> None:
    tensors = dict(read_loras(file).tensors)
    text = next(key for key in tensors if key.startswith("lora_te_") and key.endswith("lora_down.weight"))
    image = next(key for key in tensors if key.startswith("lora_unet_") and key.endswith("lora_down.weight"))
    tensors[text] = tensors[text][:, 1:].contiguous()
    tensors[image] = tensors[image] * torch.nan
    for name in ("lora_te_nowhere", "lora_unet_nowhere", "lora_te2_text_projection"):
        tensors |= {f"{name}.lora_down.weight": torch.ones(1, 8), f"{name}.lora_up.weight": torch.ones(8, 1)}
    keys = list(model.state_dict())
    with pytest.raises(ConversionError) as caught:
        model.load_loras(tensors)
    message = str(caught.value)
    assert all(count in message.splitlines()[0] for count in ("3 unexpected", "1 shape", "1 value"))
    for told in (text, image):
        assert told.removesuffix(".lora_down.weight") in message
    for told in ("lora_te_nowhere", "lora_unet_nowhere", "holds 1 LoRAs for text_encoder_2, and the model has unet"):
        assert told in message
    assert list(model.state_dict()) == keys


def test_a_name_that_is_taken_keeps_the_model_as_it_is(model: LatentDiffusionModel, file: Path) -> None:
    model.load_loras(file, "style")
    keys = list(model.state_dict())
    with pytest.raises(AdapterError, match="'style'"):
        model.load_loras(file, "style")
    assert list(model.state_dict()) == keys


def test_a_file_that_changes_nothing_is_refused(model: LatentDiffusionModel, file: Path, tmp_path: Path) -> None:
    save_file(
        {key: torch.zeros_like(tensor) for key, tensor in read_loras(file).tensors.items()}, tmp_path / "0.safetensors"
    )
    with pytest.raises(AdapterError, match="change nothing"):
        model.load_loras(tmp_path / "0.safetensors")


def test_a_part_that_the_model_lacks_is_told(model: LatentDiffusionModel) -> None:
    tensors = {"lora_te2_text_projection.lora_down.weight": torch.ones(1, 8)}
    tensors["lora_te2_text_projection.lora_up.weight"] = torch.ones(8, 1)
    with pytest.raises(ConversionError, match="LoRAs for text_encoder_2, and the model has unet, text_encoder only"):
        model.load_loras(tensors)


def test_the_command_draws_with_a_lora(directory: Path, file: Path, tmp_path: Path) -> None:
    options = {"model": directory, "prompt": "a cat", "steps": 1, "seed": 5}
    generate(**options, output=tmp_path / "plain.png")
    generate(**options, output=tmp_path / "styled.png", loras=(f"{file}:0.8", str(file)))
    generate(**options, output=tmp_path / "zero.png", loras=(f"{file}:0",))
    plain, styled, zero = ((tmp_path / f"{name}.png").read_bytes() for name in ("plain", "styled", "zero"))
    assert (styled == plain, zero == plain) == (False, True)


@pytest.mark.parametrize(
    ("lora", "error"),
    [("{}:much", InputError), ("{}:nan", InputError), ("none.safetensors", FileNotFoundError)],
    ids=["text", "nan", "absent"],
)
def test_a_lora_that_cannot_be_loaded_is_refused_before_the_model_is(
    lora: str, error: type[Exception], file: Path, tmp_path: Path
) -> None:
    with pytest.raises(error):
        generate(model=tmp_path, prompt="a cat", output=tmp_path / "cat.png", loras=(lora.format(file),))
