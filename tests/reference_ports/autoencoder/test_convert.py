"""Published configurations and files of autoencoders."""

from typing import Any

import pytest
import torch
from torch import Tensor

from reference_ports import autoencoder
from reference_ports.autoencoder import AutoencoderKL, AutoencoderTiny
from refiners.errors import ConversionError

SD1: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
SDXL = {
    **SD1,
    "_name_or_path": "../sdxl-vae/",
    "force_upcast": True,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
    "latents_mean": None,
    "latents_std": None,
    "shift_factor": None,
}
FLUX = {
    **SDXL,
    "latent_channels": 16,
    "mid_block_add_attention": True,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
SMALL = {
    **SD1,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
PUBLISHED = {"sd1": SD1, "sdxl": SDXL, "flux": FLUX}
OF = {"sd1": autoencoder.SD1Autoencoder, "sdxl": autoencoder.SDXLAutoencoder, "flux": autoencoder.FluxAutoencoder}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_is_the_class_of_that_name(name: str) -> None:
    with torch.device("meta"):
        read, named = autoencoder.from_config(PUBLISHED[name]), OF[name]()
    assert isinstance(read, AutoencoderKL)
    assert {k: v.shape for k, v in read.state_dict().items()} == {k: v.shape for k, v in named.state_dict().items()}
    assert (read.scaling, read.tile_size, read.force_upcast) == (named.scaling, named.tile_size, named.force_upcast)


def test_a_configuration_that_asks_for_more_is_refused_in_full() -> None:
    config = {
        **SMALL,
        "act_fn": "mish",
        "down_block_types": ["AttnDownEncoderBlock2D", "DownEncoderBlock2D"],
        "sample_size": [64, 64],
        "latents_mean": [1.0],
        "norm_type": "spatial",
    }
    with pytest.raises(ConversionError) as raised:
        autoencoder.from_config(config)
    for name in ("act_fn", "down_block_types", "sample_size", "latents_mean", "norm_type"):
        assert name in str(raised.value)


def test_a_tiny_configuration_that_asks_for_more_is_refused_in_full() -> None:
    config = {
        "_class_name": "AutoencoderTiny",
        "upsample_fn": "bilinear",
        "encoder_block_out_channels": [64, 32, 64, 64],
        "act_fn": "tanh",
        "latent": 1,
    }
    with pytest.raises(ConversionError) as raised:
        autoencoder.from_config(config)
    for name in ("upsample_fn", "encoder_block_out_channels", "act_fn", "latent:"):
        assert name in str(raised.value)


@pytest.mark.parametrize("read", [autoencoder.from_config, autoencoder.key_map_for])
def test_another_class_is_refused(read: Any) -> None:
    with pytest.raises(ConversionError, match="one of AutoencoderKLWan"):
        read({"_class_name": "AutoencoderKLWan"})


def upstream_state(model: AutoencoderKL) -> dict[str, Tensor]:
    return dict(autoencoder.KEYS.invert(model.state_dict()))


def test_files_with_the_old_names_of_attention_are_read() -> None:
    model = autoencoder.from_config(SMALL)
    assert isinstance(model, AutoencoderKL)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state: dict[str, Tensor] = {}
    for key, tensor in upstream_state(model).items():
        for new_name, old_name in old.items():
            key = key.replace(f".{new_name}.", f".{old_name}.")
        state[key] = tensor
    assert sum(".proj_attn." in key for key in state) == 4
    converted = autoencoder.KEYS.convert(state, model)
    assert all(torch.equal(converted[key], tensor) for key, tensor in model.state_dict().items())


def test_a_file_without_the_convolution_beside_the_latents_is_refused() -> None:
    model = autoencoder.from_config(SMALL)
    assert isinstance(model, AutoencoderKL)
    state = upstream_state(model)
    del state["quant_conv.weight"]
    with pytest.raises(ConversionError, match=r"Encoder\.QuantConvolution\.weight"):
        autoencoder.KEYS.convert(state, model)


@pytest.mark.parametrize(
    ("encoder_blocks", "decoder_blocks"),
    [((1,), (2,)), ((1, 1), (1, 1)), ((2, 0, 1), (0, 2, 0)), ((1, 3, 3, 3), (3, 3, 3, 1))],
)
def test_the_keys_of_a_tiny_autoencoder_follow_its_blocks(
    encoder_blocks: tuple[int, ...], decoder_blocks: tuple[int, ...]
) -> None:
    config = {
        "_class_name": "AutoencoderTiny",
        "num_encoder_blocks": list(encoder_blocks),
        "num_decoder_blocks": list(decoder_blocks),
        "encoder_block_out_channels": [4] * len(encoder_blocks),
        "decoder_block_out_channels": [4] * len(decoder_blocks),
    }
    model = autoencoder.from_config(config)
    assert isinstance(model, AutoencoderTiny)
    keys = autoencoder.key_map_for(config)
    upstream = keys.invert(model.state_dict())
    layers = [int(key.split(".")[2]) for key in upstream if key.startswith("encoder.")]
    assert sorted(set(layers)) == list(range(len(encoder_blocks) + sum(encoder_blocks) + 1))
    assert list(keys.convert(upstream, model)) == list(model.state_dict())
