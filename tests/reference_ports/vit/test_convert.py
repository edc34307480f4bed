from typing import Any

import pytest
import torch
from torch import nn

import refiners.fluxion.layers as fl
from reference_ports import vit
from refiners.errors import ConversionError

CONFIG: dict[str, Any] = {
    "model_type": "vit",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "image_size": 32,
    "patch_size": 8,
    "num_channels": 1,
}
BUILDERS = {
    "vit": vit.vit_from_config,
    "vit-encoder": vit.encoder_from_config,
    "vit-masked-encoder": vit.masked_encoder_from_config,
}
OLD = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
"""Names of a layer's parts in transformers 5 → in transformers 4."""


@pytest.mark.parametrize("name", BUILDERS)
def test_a_key_map_inverts_exactly(name: str) -> None:
    model, key_map = BUILDERS[name](CONFIG), vit.KEY_MAPS[name]
    state = model.state_dict()
    back = key_map.convert(key_map.invert(state), model)
    assert list(back) == list(state)
    assert all(back[key].data_ptr() == state[key].data_ptr() for key in state)


def test_there_is_a_builder_for_every_key_map() -> None:
    assert set(BUILDERS) == set(vit.KEY_MAPS)


@pytest.mark.parametrize("prefix", ["", "vit."])
def test_the_names_of_published_files_are_read(prefix: str) -> None:
    model = vit.vit_from_config(CONFIG)
    weights = {}
    for key, tensor in vit.VIT_KEYS.invert(model.state_dict()).items():
        old = key.replace("layers.", "encoder.layer.", 1)
        for new, name in OLD.items():
            old = old.replace(new, name)
        weights[f"{prefix}{old}"] = tensor
    weights["classifier.weight"] = torch.zeros(10, 16)
    assert "encoder.layer.0.attention.attention.query.weight" in {key.removeprefix(prefix) for key in weights}
    assert list(vit.VIT_KEYS.convert(weights, model)) == list(model.state_dict())


def test_an_encoder_reads_the_file_of_a_model_with_a_pooler_and_a_mask_token() -> None:
    weights = vit.VIT_KEYS.invert(vit.vit_from_config(CONFIG).state_dict())
    weights["embeddings.mask_token"] = torch.zeros(1, 1, 16)
    encoder = vit.encoder_from_config(CONFIG)
    assert list(vit.ENCODER_KEYS.convert(weights, encoder)) == list(encoder.state_dict())


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize(
    ("attribute", "value"),
    [
        ("hidden_act", "gelu_accurate"),
        ("model_type", "deit"),
        ("is_decoder", True),
        ("num_attention_heads", 5),
        ("unheard_of", 1),
        ("head_dim", 3),
        ("image_size", [32, 16]),
        ("patch_size", [8, 4]),
        ("qkv_bias", 1),
    ],
)
def test_what_the_port_does_not_do_is_refused(name: str, attribute: str, value: Any) -> None:
    with pytest.raises(ConversionError, match=attribute.replace("num_attention_heads", "num_heads=5")):
        BUILDERS[name]({**CONFIG, attribute: value})


@pytest.mark.parametrize(
    ("given", "width"), [({}, 16), ({"pooler_output_size": None}, 16), ({"pooler_output_size": 5}, 5)]
)
def test_the_width_of_the_pooler_is_read(given: dict[str, Any], width: int) -> None:
    assert vit.vit_from_config({**CONFIG, **given})(torch.zeros(1, 1, 32, 32))[1].shape == (1, width)


@pytest.mark.parametrize(("given", "kind"), [("tanh", nn.Tanh), ("relu", fl.ReLU)])
def test_the_activation_of_the_pooler_is_read(given: str, kind: type[nn.Module]) -> None:
    model = vit.vit_from_config({**CONFIG, "pooler_act": given})
    assert len(list(model.layers(kind, recurse=True))) == 1


def test_projections_without_a_bias_are_read() -> None:
    model = vit.vit_from_config({**CONFIG, "qkv_bias": False})
    keys = [key for key in model.state_dict() if ".Projections." in key]
    assert len(keys) == 2 * 3
    assert all(key.endswith(".weight") for key in keys)
