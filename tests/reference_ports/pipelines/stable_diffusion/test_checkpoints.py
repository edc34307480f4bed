"""The published models of Stable Diffusion are recognised, in both layouts, and so is what they are not."""

from collections.abc import Mapping
from functools import cache

import pytest
import torch

from reference_ports import BUNDLES
from reference_ports.pipelines.stable_diffusion.recognition import Traits
from refiners.conversion import Part

KINDS = [name for name, bundle in BUNDLES().items() if bundle.parts]
SAME_WEIGHTS = {"sd21": ["sd21", "sd21-base"], "sd21-base": ["sd21", "sd21-base"]}
Shapes = Mapping[str, torch.Size]


def prefix_of(part: Part, kind: str) -> str:
    own = [prefix for prefix in part.prefixes if prefix.startswith("conditioner.")]
    if not own or not kind.startswith("sdxl"):
        return part.prefixes[0]
    return own[-1] if kind == "sdxl-refiner" else own[0]


@cache
def shapes_of(kind: str, layout: str) -> Shapes:
    """Keys and shapes of a published model, made of its ports on the meta device."""
    shapes: dict[str, torch.Size] = {}
    for part in BUNDLES()[kind].parts:
        with torch.device("meta"):
            port = part.build(part.config)
        published = part.keys(part.config).invert(port.state_dict())
        assert part.single_file is not None
        if layout == "folder":
            shapes |= {f"{part.folder}/{key}": tensor.shape for key, tensor in published.items()}
        else:
            single = part.single_file(part.config).invert(published)
            shapes |= {prefix_of(part, kind) + key: tensor.shape for key, tensor in single.items()}
    return shapes


@pytest.mark.parametrize("layout", ["folder", "single file"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_published_model_is_recognised_as_itself_alone(kind: str, layout: str) -> None:
    shapes = shapes_of(kind, layout)
    found = [name for name, bundle in BUNDLES().items() if bundle.recognises(shapes)]
    assert found == SAME_WEIGHTS.get(kind, [kind])


@pytest.mark.parametrize(
    ("keys", "title"),
    [
        (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "SD 3"),
        (["double_blocks.0.img_attn.qkv.weight"], "Flux"),
        (["control_model.input_blocks.0.0.weight", "control_model.time_embed.0.bias"], "a ControlNet"),
        (["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"], "a LoRA"),
        (["unet.mid_block.attentions.0.proj_in.lora_A.weight"], "a LoRA"),
        (["encoder.conv_in.weight", "decoder.conv_in.weight", "quant_conv.weight"], "an autoencoder alone"),
        (["conv_in.weight", "down_blocks.0.resnets.0.conv1.weight", "time_embedding.linear_1.bias"], "a UNet alone"),
        (["text_model.final_layer_norm.weight"], "a text encoder alone"),
    ],
)
def test_what_is_no_whole_model_is_known_by_sight(keys: list[str], title: str) -> None:
    shapes = dict.fromkeys(keys, torch.Size([4, 4]))
    assert [bundle.title for bundle in BUNDLES().values() if bundle.recognises(shapes)] == [title]


def test_the_upscaler_is_no_stable_diffusion_2() -> None:
    key = "model.diffusion_model.input_blocks.0.0.weight"
    shapes = {**shapes_of("sd21", "single file"), key: torch.Size([256, 7, 3, 3])}
    titles = [bundle.title for bundle in BUNDLES().values() if bundle.recognises(shapes)]
    assert titles == ["the x4 upscaler of SD 2"]


@pytest.mark.parametrize("missing", ["unet/", "text_encoder/"])
def test_a_model_without_a_part_has_no_traits(missing: str) -> None:
    shapes = {key: shape for key, shape in shapes_of("sd15", "folder").items() if not key.startswith(missing)}
    assert Traits.of(shapes) is None


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizers_and_schedulers_are_known_for_single_files(kind: str) -> None:
    bundle = BUNDLES()[kind]
    encoders = [part.name for part in bundle.parts if part.name.startswith("text_encoder")]
    assert bundle.tokenizers == tuple(name.replace("text_encoder", "tokenizer") for name in encoders)
    assert bundle.scheduler["_class_name"].endswith("Scheduler")
    assert bundle.prediction_type == ("v_prediction" if kind == "sd21" else "epsilon")
