from typing import Any

import pytest
import torch

from reference_ports.bert import (
    BERT_KEYS,
    ENCODER_KEYS,
    KEY_MAPS,
    PORTS,
    SENTENCE_ENCODER_KEYS,
    BERTEncoder,
    bert_from_config,
    encoder_from_config,
    sentence_encoder_from_config,
)
from reference_ports.bert.model import WordEncoder
from refiners.errors import ConversionError

TINY: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
}


def test_the_numbers_of_a_configuration_reach_the_tree() -> None:
    model = bert_from_config({**TINY, "type_vocab_size": 3, "layer_norm_eps": 1e-5})
    assert isinstance(model, BERTEncoder)
    assert (model.vocabulary_size, model.embedding_dim, model.num_layers, model.num_heads) == (50, 16, 2, 4)
    assert (model.feedforward_dim, model.num_positions, model.num_token_types) == (24, 12, 3)
    assert model.layer_norm_eps == 1e-5


def test_what_a_configuration_leaves_out_is_that_of_bert_base() -> None:
    with torch.device("meta"):
        assert repr(bert_from_config({})) == repr(PORTS["bert-base"].build())


@pytest.mark.parametrize(("given", "expected"), [({}, 0), ({"pad_token_id": 7}, 7), ({"pad_token_id": None}, None)])
def test_the_padding_id_reaches_the_embedding(given: dict[str, Any], expected: int | None) -> None:
    model = encoder_from_config({**TINY, **given})
    assert model.ensure_find(WordEncoder).padding_idx == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("is_decoder", True),
        ("add_cross_attention", True),
        ("position_embedding_type", "relative_key"),
        ("chunk_size_feed_forward", 2),
        ("model_type", "roberta"),
        ("hidden_act", "gelu_accurate"),
        ("layer_norm_eps", "small"),
        ("hidden_size", 16.5),
        ("embedding_size", 8),
    ],
)
def test_what_the_port_does_not_do_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ConversionError, match=name):
        sentence_encoder_from_config({**TINY, name: value})


def test_everything_refused_is_in_one_error() -> None:
    with pytest.raises(ConversionError) as caught:
        bert_from_config({**TINY, "is_decoder": True, "hidden_act": "step", "unheard_of": 1})
    for name in ("is_decoder", "hidden_act", "unheard_of"):
        assert name in str(caught.value)


@pytest.mark.parametrize("name", KEY_MAPS)
def test_a_key_map_inverts_exactly(name: str) -> None:
    build = {"bert": bert_from_config, "bert-encoder": encoder_from_config}.get(name, sentence_encoder_from_config)
    model = build(TINY)
    state = model.state_dict()
    key_map = KEY_MAPS[name]
    back = key_map.convert(key_map.invert(state), model)
    assert list(back) == list(state)
    assert all(back[key].data_ptr() == state[key].data_ptr() for key in state)


def test_a_missing_key_is_named() -> None:
    model = bert_from_config(TINY)
    weights = BERT_KEYS.invert(model.state_dict())
    del weights["encoder.layer.1.attention.self.value.bias"]
    with pytest.raises(ConversionError, match=r"encoder.layer.1.attention.self.value.bias"):
        BERT_KEYS.convert(weights, model)


def test_a_pooler_is_refused_where_nothing_reads_it() -> None:
    weights = BERT_KEYS.invert(bert_from_config(TINY).state_dict())
    with pytest.raises(ConversionError, match="pooler"):
        ENCODER_KEYS.convert(weights, encoder_from_config(TINY))
    assert SENTENCE_ENCODER_KEYS.convert(weights, encoder_from_config(TINY))


def test_the_registered_ports_name_themselves() -> None:
    assert all(name == port.name and port.summary for name, port in PORTS.items())
