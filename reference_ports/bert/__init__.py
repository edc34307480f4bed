"""BERT, and the sentence encoders made of it. See README.md beside this file."""

from reference_ports.bert.convert import (
    BERT_KEYS,
    ENCODER_KEYS,
    KEY_MAPS,
    PORTS,
    SENTENCE_ENCODER_KEYS,
    bert_from_config,
    encoder_from_config,
    sentence_encoder_from_config,
)
from reference_ports.bert.loras import lora_names
from reference_ports.bert.model import BERT, BERTEncoder, SentenceEncoder, bert_base, bert_large, minilm_l6

__all__ = [
    "BERT",
    "BERT_KEYS",
    "ENCODER_KEYS",
    "KEY_MAPS",
    "PORTS",
    "SENTENCE_ENCODER_KEYS",
    "BERTEncoder",
    "SentenceEncoder",
    "bert_base",
    "bert_from_config",
    "bert_large",
    "encoder_from_config",
    "lora_names",
    "minilm_l6",
    "sentence_encoder_from_config",
]
