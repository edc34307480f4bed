from typing import Any

import pytest
import torch

from reference_ports import clip
from reference_ports.clip.text import FirstId, HighestId
from refiners.errors import ConversionError

TEXT: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
    "projection_dim": 6,
}
IMAGE: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "image_size": 32,
    "patch_size": 8,
    "num_channels": 1,
    "projection_dim": 6,
}
WHOLE: dict[str, Any] = {"model_type": "clip", "projection_dim": 9, "text_config": TEXT, "vision_config": IMAGE}
BUILDERS = {
    "clip": (clip.clip_from_config, WHOLE),
    "clip-text-encoder": (clip.text_encoder_from_config, TEXT),
    "clip-text-model": (clip.text_model_from_config, TEXT),
    "clip-text-projection": (clip.text_projection_from_config, TEXT),
    "clip-image-encoder": (clip.image_encoder_from_config, IMAGE),
    "clip-image-model": (clip.image_model_from_config, IMAGE),
    "clip-image-projection": (clip.image_projection_from_config, IMAGE),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_a_key_map_inverts_exactly(name: str) -> None:
    build, config = BUILDERS[name]
    model, key_map = build(config), clip.KEY_MAPS[name]
    state = model.state_dict()
    back = key_map.convert(key_map.invert(state), model)
    assert list(back) == list(state)
    assert all(back[key].data_ptr() == state[key].data_ptr() for key in state)


def test_there_is_a_builder_for_every_key_map() -> None:
    assert set(BUILDERS) == set(clip.KEY_MAPS)


@pytest.mark.parametrize(("eos", "kind"), [(2, HighestId), (49, FirstId), (None, FirstId)])
def test_the_rule_for_the_end_of_a_text_is_read(eos: int | None, kind: type[HighestId | FirstId]) -> None:
    model = clip.text_model_from_config(TEXT if eos is None else {**TEXT, "eos_token_id": eos})
    end = model.ensure_find(kind)
    if isinstance(end, FirstId):
        assert end.token_id == (eos or 49_407)


def test_the_halves_of_a_whole_configuration_project_to_its_own_width() -> None:
    config = {"model_type": "clip", "projection_dim": 9, "text_config": TEXT, "vision_config": IMAGE}
    assert clip.text_projection_from_config(config).projection_dim == 9
    assert clip.image_projection_from_config(config).projection_dim == 9


@pytest.mark.parametrize("name", [name for name in BUILDERS if name != "clip"])
@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("hidden_act", "gelu_accurate"),
        ("model_type", "siglip_text_model"),
        ("is_decoder", True),
        ("num_attention_heads", 5),
        ("unheard_of", 1),
    ],
)
def test_what_the_port_does_not_do_is_refused(name: str, attribute: str, value: Any) -> None:
    build, config = BUILDERS[name]
    with pytest.raises(ConversionError, match=attribute.replace("num_attention_heads", "num_heads=5")):
        build({**config, attribute: value})


def test_what_no_part_of_a_whole_configuration_knows_is_refused() -> None:
    with pytest.raises(ConversionError, match="unheard_of"):
        clip.clip_from_config({**WHOLE, "unheard_of": 1})
    with pytest.raises(ConversionError, match="unheard_of"):
        clip.clip_from_config({**WHOLE, "vision_config": {**IMAGE, "unheard_of": 1}})


@pytest.mark.parametrize("attribute", ["image_size", "patch_size"])
def test_oblong_sizes_are_refused(attribute: str) -> None:
    with pytest.raises(ConversionError, match=attribute):
        clip.image_model_from_config({**IMAGE, attribute: [32, 16]})


def test_several_ends_of_text_are_refused() -> None:
    with pytest.raises(ConversionError, match="eos_token_id"):
        clip.text_model_from_config({**TEXT, "eos_token_id": [2, 49]})


def test_an_encoder_reads_the_file_of_the_model_with_projection() -> None:
    whole = clip.text_projection_from_config(TEXT)
    weights = clip.TEXT_PROJECTION_KEYS.invert(whole.state_dict())
    encoder = clip.text_encoder_from_config(TEXT)
    encoder.load_state_dict(clip.TEXT_ENCODER_KEYS.convert(weights, encoder))
    ids = torch.tensor([[1, 2, 49]])
    assert torch.equal(encoder(ids), whole(ids)[0])


def test_a_weight_of_another_shape_is_named() -> None:
    model = clip.image_model_from_config(IMAGE)
    weights = clip.IMAGE_MODEL_KEYS.invert(model.state_dict())
    weights["pre_layrnorm.bias"] = torch.zeros(17)
    with pytest.raises(ConversionError, match="pre_layrnorm.bias"):
        clip.IMAGE_MODEL_KEYS.convert(weights, model)


def test_the_registered_ports_name_themselves() -> None:
    assert all(name == port.name and port.summary for name, port in clip.PORTS.items())
