"""Published weights and configurations of BERT, for the trees of `reference_ports.bert.model`.

`BERT_KEYS`, `ENCODER_KEYS` and `SENTENCE_ENCODER_KEYS` map the keys of `transformers.BertModel` 5.23.0. They also read
older files: with the prefix `bert.`, with `gamma` and `beta` in the norms, with stored position ids, and with the heads
of the pre-training tasks, which are left out.
"""

from collections.abc import Mapping
from typing import Any, Unpack

import torch
from torch import Tensor

import refiners.fluxion.layers as fl
from reference_ports.bert.model import BERT, BERTEncoder, BERTNumbers, SentenceEncoder, bert_base, bert_large, minilm_l6
from reference_ports.blocks.activations import ACTIVATIONS
from refiners.conversion import TRANSFORMERS_NEUTRAL, TRANSFORMERS_ONLY, ConfigReader, KeyMap, Port, Recomputed

_EMBEDDINGS = "Embeddings.TokenEmbeddings"
_ATTENTION = "TransformerLayer_{i+1}.AttentionResidual.SelfAttention"
_FEED_FORWARD = "TransformerLayer_{i+1}.FeedForwardResidual.FeedForward"


def _counting(shape: torch.Size) -> Tensor:
    return torch.arange(shape[-1]).expand(shape)


def _zeros(shape: torch.Size) -> Tensor:
    return torch.zeros(shape, dtype=torch.long)


ENCODER_KEYS = KeyMap(
    {
        "embeddings.word_embeddings": f"{_EMBEDDINGS}.WordEncoder",
        "embeddings.token_type_embeddings": f"{_EMBEDDINGS}.TokenTypeEncoder.Embedding",
        "embeddings.position_embeddings": f"{_EMBEDDINGS}.PositionalEncoder.Embedding",
        "embeddings.LayerNorm": "Embeddings.LayerNorm",
        "encoder.layer.{i}.attention.self.query": f"{_ATTENTION}.Projections.Query",
        "encoder.layer.{i}.attention.self.key": f"{_ATTENTION}.Projections.Key",
        "encoder.layer.{i}.attention.self.value": f"{_ATTENTION}.Projections.Value",
        "encoder.layer.{i}.attention.output.dense": f"{_ATTENTION}.Linear",
        "encoder.layer.{i}.attention.output.LayerNorm": "TransformerLayer_{i+1}.LayerNorm_1",
        "encoder.layer.{i}.intermediate.dense": f"{_FEED_FORWARD}.Linear_1",
        "encoder.layer.{i}.output.dense": f"{_FEED_FORWARD}.Linear_2",
        "encoder.layer.{i}.output.LayerNorm": "TransformerLayer_{i+1}.LayerNorm_2",
    },
    ignore={
        "embeddings.position_ids": Recomputed("0, 1, 2, …: the port counts by itself", _counting),
        "embeddings.token_type_ids": Recomputed("zeros, the segment of a token where none is given", _zeros),
        "cls.{rest}": "the heads of the pre-training tasks are no part of BertModel",
    },
    aliases={
        "bert.{rest}": "{rest}",
        "{rest}.gamma": "{rest}.weight",
        "{rest}.beta": "{rest}.bias",
    },
    name="BERT",
)
"""The keys of `BertModel` without its pooler, for `BERTEncoder`."""

BERT_KEYS = ENCODER_KEYS | KeyMap({"pooler.dense": "StatesAndPooled.Pooler.Linear"})
"""The keys of `BertModel`, for `BERT`."""

SENTENCE_ENCODER_KEYS = (
    ENCODER_KEYS | KeyMap({}, ignore={"pooler.dense": "a sentence encoder averages the tokens instead"})
).named("the sentence encoder")
"""The keys of `BertModel`, for `SentenceEncoder` and for a `BERTEncoder` that is read from a file with a pooler."""

KEY_MAPS = {"bert": BERT_KEYS, "bert-encoder": ENCODER_KEYS, "sentence-encoder": SENTENCE_ENCODER_KEYS}

_ONLY = {**TRANSFORMERS_ONLY, "model_type": "bert", "position_embedding_type": "absolute"}
_NO_DROPOUT = "dropout acts in training only, and the port has none"
_TENSORFLOW = "left behind by the original TensorFlow checkpoints"
_NEUTRAL = {
    **TRANSFORMERS_NEUTRAL,
    "attention_probs_dropout_prob": _NO_DROPOUT,
    "hidden_dropout_prob": _NO_DROPOUT,
    "classifier_dropout": _NO_DROPOUT,
    "bos_token_id": "the ids are given ready-made",
    "eos_token_id": "the ids are given ready-made",
    "sep_token_id": "the ids are given ready-made",
    "pad_token_id": "read where it is a number; null means that no word's vector is frozen",
    "tie_word_embeddings": "concerns the language-modelling head, which the port does not have",
    "directionality": _TENSORFLOW,
    "pooler_fc_size": _TENSORFLOW,
    "pooler_num_attention_heads": _TENSORFLOW,
    "pooler_num_fc_layers": _TENSORFLOW,
    "pooler_size_per_head": _TENSORFLOW,
    "pooler_type": _TENSORFLOW,
}


def _numbers(config: Mapping[str, Any]) -> BERTNumbers:
    with ConfigReader(config, "BERT", only=_ONLY, neutral=_NEUTRAL) as read:
        no_padding = "pad_token_id" in config and not read.has("pad_token_id")
        numbers: BERTNumbers = {
            "vocabulary_size": read.integer("vocab_size", 30_522),
            "embedding_dim": read.integer("hidden_size", 768),
            "num_layers": read.integer("num_hidden_layers", 12),
            "num_heads": read.integer("num_attention_heads", 12),
            "feedforward_dim": read.integer("intermediate_size", 3072),
            "num_positions": read.integer("max_position_embeddings", 512),
            "num_token_types": read.integer("type_vocab_size", 2),
            "activation": read.choice("hidden_act", ACTIVATIONS, "gelu"),
            "layer_norm_eps": read.number("layer_norm_eps", 1e-12),
            "padding_id": None if no_padding else read.integer("pad_token_id", 0),
        }
    return numbers


def bert_from_config(config: Mapping[str, Any], **factory: Unpack[fl.Factory]) -> BERT:
    """`BERT`, the model with its pooler, of a `BertConfig` as a dict.

    Raises:
        ConversionError: the configuration has attributes, or values of them, that the port does not handle. Lists all.
    """
    return BERT(**_numbers(config), **factory)


def encoder_from_config(config: Mapping[str, Any], **factory: Unpack[fl.Factory]) -> BERTEncoder:
    """`BERTEncoder`, upstream's `BertModel(config, add_pooling_layer=False)`, of a `BertConfig` as a dict.

    Raises:
        ConversionError: the configuration has attributes, or values of them, that the port does not handle. Lists all.
    """
    return BERTEncoder(**_numbers(config), **factory)


def sentence_encoder_from_config(config: Mapping[str, Any], **factory: Unpack[fl.Factory]) -> SentenceEncoder:
    """`SentenceEncoder` of the `BertConfig` of a sentence-transformers model with mean pooling, as a dict.

    Raises:
        ConversionError: the configuration has attributes, or values of them, that the port does not handle. Lists all.
    """
    return SentenceEncoder(**_numbers(config), **factory)


PORTS: Mapping[str, Port] = {
    port.name: port
    for port in (
        Port(
            name="bert",
            build=BERTEncoder,
            key_map=SENTENCE_ENCODER_KEYS,
            from_config=encoder_from_config,
            summary="BERT without a head; of base size unless a config says otherwise",
        ),
        Port(
            name="bert-base",
            build=bert_base,
            key_map=BERT_KEYS,
            from_config=bert_from_config,
            summary="BERT base, uncased: 12 layers of 768, with its pooler",
        ),
        Port(
            name="bert-large",
            build=bert_large,
            key_map=BERT_KEYS,
            from_config=bert_from_config,
            summary="BERT large, uncased: 24 layers of 1024, with its pooler",
        ),
        Port(
            name="minilm",
            build=minilm_l6,
            key_map=SENTENCE_ENCODER_KEYS,
            from_config=sentence_encoder_from_config,
            summary="all-MiniLM-L6-v2: a sentence in, a vector of length 1 out",
        ),
    )
}
