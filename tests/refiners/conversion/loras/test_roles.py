"""What the keys of LoRA files say."""

import pytest

from refiners.conversion.loras.roles import layouts_of, read_keys, split_end


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("unet.mid.to_q.lora_A.weight", ("unet.mid.to_q", "lora_A.weight")),
        ("mid.attn1.processor.to_out_lora.up.weight", ("mid.attn1.processor.to_out", "lora.up.weight")),
        ("encoder.q_proj.lora_linear_layer.down.weight", ("encoder.q_proj", "lora_linear_layer.down.weight")),
        ("base_model.model.fc.lora_A.default.weight", ("base_model.model.fc", "lora_A.weight")),
        ("base_model.model.fc.lokr_w1.default", ("base_model.model.fc", "lokr_w1")),
        ("unet.mid.to_q_lora.alpha", ("unet.mid.to_q", "alpha")),
        ("lora_te1_fc.hada_w1_a", ("lora_te1_fc", "hada_w1_a")),
        ("fc.weight", ("", "")),
    ],
)
def test_the_end_of_a_key_says_which_tensor_it_is(key: str, expected: tuple[str, str]) -> None:
    assert split_end(key) == expected


@pytest.mark.parametrize(
    ("key", "layouts"),
    [
        ("unet.fc.lora_A.weight", ["diffusers"]),
        ("diffusion_model.fc.lora_up.weight", ["diffusers"]),
        ("lora_unet_fc.lora_down.weight", ["kohya"]),
        ("base_model.model.fc.lora_A.weight", ["peft"]),
        ("fc.weight", []),
    ],
)
def test_the_layout_is_told_from_the_keys(key: str, layouts: list[str]) -> None:
    assert layouts_of([key]) == layouts


@pytest.mark.parametrize(
    ("key", "part", "module"),
    [
        ("unet.mid.attn1.processor.to_q_lora.up.weight", "unet", "mid.attn1.to_q"),
        ("text_encoder_2.fc.lora_A.weight", "text_encoder_2", "fc"),
        ("unetwork.fc.lora_A.weight", "", "unetwork.fc"),
        ("diffusion_model.input_blocks.1.1.proj_in.lora_up.weight", "unet", "input_blocks.1.1.proj_in"),
        ("text_encoders.clip_l.transformer.text_model.fc.lora_up.weight", "text_encoder", "text_model.fc"),
        ("text_encoders.clip_g.transformer.text_model.fc.lora_up.weight", "text_encoder_2", "text_model.fc"),
    ],
)
def test_a_prefix_says_which_model_a_layer_is_of(key: str, part: str, module: str) -> None:
    (read,) = read_keys([key], "diffusers")
    assert (read.part, read.module) == (part, module)
