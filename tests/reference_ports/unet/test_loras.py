"""What LoRA files call the layers of UNets, and what is recognised, at published sizes on the meta device."""

from functools import cache

import pytest
import torch
from torch import nn

import refiners.fluxion.layers as fl
from reference_ports import clip
from reference_ports.unet import SD1UNet, SD2UNet, SDXLRefinerUNet, SDXLUNet, UNet, lora_names
from refiners.conversion.loras import LoraFile, lora_file, names_of, read_loras, recognise
from refiners.errors import ConversionError
from refiners.fluxion.adapters import DeltaSpec

UNETS: dict[str, type[UNet]] = {"1": SD1UNet, "2": SD2UNet, "XL": SDXLUNet, "XL's refiner": SDXLRefinerUNet}


@cache
def unet(version: str) -> UNet:
    with torch.device("meta"):
        return UNETS[version]()


def shapes(version: str) -> dict[str, DeltaSpec]:
    """A LoRA of rank 1 for all projections of texts."""
    names = lora_names(unet(version))
    specs: dict[str, DeltaSpec] = {}
    with torch.device("meta"):
        for name, path in names.paths.items():
            layer = names.layers[path]
            if isinstance(layer, nn.Linear) and ".attn2." in name:
                tensors = {"down": torch.empty(1, layer.in_features), "up": torch.empty(layer.out_features, 1)}
                specs[path] = DeltaSpec("lora", tensors)
    return specs


def file(version: str, layout: str) -> LoraFile:
    """Read again from its tensors alone, as from a file without metadata."""
    made = lora_file({"unet": shapes(version)}, {"unet": lora_names(unet(version))}, layout=layout)
    return read_loras({key: torch.zeros(tensor.shape) for key, tensor in made.tensors.items()})


@pytest.mark.parametrize("version", UNETS)
def test_every_linear_and_convolution_has_a_name_of_its_own_in_each_spelling(version: str) -> None:
    names = lora_names(unet(version))
    layers = {path for path, layer in names.layers.items() if isinstance(layer, nn.Linear | nn.Conv2d)}
    assert layers == {path for path, layer in names.layers.items() if isinstance(layer, fl.Linear | fl.Conv2d)}
    assert len(layers) == sum(isinstance(layer, nn.Linear | nn.Conv2d) for layer in unet(version).modules())
    for spelling in names.spellings(joined=True):
        assert len(names.find(spelling, joined=True)) == 1


@pytest.mark.parametrize(
    ("version", "kohya", "name"),
    [
        ("1", "down_blocks_0_attentions_1_transformer_blocks_0_attn2_to_out_0", None),
        ("1", "mid_block_resnets_1_time_emb_proj", None),
        ("2", "up_blocks_1_attentions_2_proj_in", None),
        (
            "XL",
            "input_blocks_4_1_transformer_blocks_1_ff_net_0_proj",
            "down_blocks.1.attentions.0.transformer_blocks.1",
        ),
        ("XL", "input_blocks_0_0", "conv_in"),
        ("XL", "input_blocks_3_0_op", "down_blocks.0.downsamplers.0.conv"),
        ("XL", "middle_block_1_transformer_blocks_9_attn1_to_q", "mid_block.attentions.0.transformer_blocks.9"),
        ("XL", "output_blocks_2_2_conv", "up_blocks.0.upsamplers.0.conv"),
        ("XL", "output_blocks_8_0_skip_connection", "up_blocks.2.resnets.2.conv_shortcut"),
        ("XL", "label_emb_0_2", "add_embedding.linear_2"),
        ("XL", "out_2", "conv_out"),
    ],
)
def test_the_names_of_kohya_lead_to_the_layers_of_diffusers(version: str, kohya: str, name: str | None) -> None:
    names = lora_names(unet(version))
    found = names.find(kohya, joined=True)
    assert len(found) == 1
    assert names.joined_name(found[0]) == kohya
    assert names.names[found[0]].startswith(name or kohya.split("_")[0])


def test_kohya_has_the_names_of_the_original_code_for_xl_alone() -> None:
    assert next(iter(file("XL", "kohya").entries)).startswith("lora_unet_input_blocks_4_1_")
    assert next(iter(file("1", "kohya").entries)).startswith("lora_unet_down_blocks_0_attentions_0_")


def test_comfyui_has_the_names_of_the_original_code_with_dots() -> None:
    keys = [f"diffusion_model.input_blocks.4.1.proj_in.lora_{end}.weight" for end in ("down", "up")]
    specs = read_loras({key: torch.zeros(640, 1) for key in keys} | {keys[0]: torch.zeros(1, 640)}).specs_for(
        unet("XL")
    )
    assert list(specs) == [lora_names(unet("XL")).paths["down_blocks.1.attentions.0.proj_in"]]


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("version", UNETS)
def test_what_a_file_is_for_is_recognised(version: str, layout: str) -> None:
    assert recognise(file(version, layout)) == f"the UNet of Stable Diffusion {version}"


def test_a_file_for_another_unet_is_told_by_name() -> None:
    with pytest.raises(ConversionError, match="It looks like a LoRA of the UNet of Stable Diffusion XL"):
        file("XL", "kohya").specs_for(unet("1"))


def test_a_file_for_a_text_encoder_is_told_by_name() -> None:
    with torch.device("meta"):
        encoder = clip.CLIPTextEncoderL()
    names = names_of(encoder)
    path = names.paths["encoder.layers.3.mlp.fc1"]
    specs = {path: DeltaSpec("lora", {"down": torch.zeros(2, 768), "up": torch.zeros(3072, 2)})}
    made = lora_file({"text_encoder": specs}, {"text_encoder": names}, layout="kohya")
    assert list(made.entries) == ["lora_te_text_model_encoder_layers_3_mlp_fc1"]
    with pytest.raises(ConversionError, match=r"its parts are 'text_encoder'.*CLIP's text encoder L"):
        made.specs_for(unet("1"))
    assert list(made.specs_for(encoder)) == [path]


def test_a_file_of_flux_is_told_by_sight() -> None:
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    flux = read_loras({f"{key}.lora_down.weight": torch.ones(1, 8), f"{key}.lora_up.weight": torch.ones(8, 1)})
    with pytest.raises(ConversionError, match="It looks like a LoRA of Flux"):
        flux.specs_for(unet("1"))
