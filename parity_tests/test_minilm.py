"""all-MiniLM-L6-v2 with its real weights and its real tokenizer: an external fact that no random weights can fake.

That the port equals upstream on these sentences in every dtype is the case `bert/minilm`.
"""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, BertModel

from parity_tests.cases.bert import minilm_config
from parity_tests.published import minilm_directory
from parity_tests.sentences import SENTENCES, SIMILAR
from reference_ports.bert import (
    BERT,
    BERT_KEYS,
    PORTS,
    SENTENCE_ENCODER_KEYS,
    SentenceEncoder,
    bert_from_config,
    minilm_l6,
    sentence_encoder_from_config,
)
from refiners.conversion import convert_file, read_state_dict

PUBLISHED_SIMILARITIES = ["0.6660", "0.1046", "0.1411"]
"""As printed in the documentation of sentence-transformers, for the pairs 1-2, 1-3 and 2-3 of `SIMILAR`."""


@pytest.fixture(scope="module")
def encoder() -> SentenceEncoder:
    model = minilm_l6(device="meta")
    weights = read_state_dict(minilm_directory() / "model.safetensors")
    model.load_state_dict(SENTENCE_ENCODER_KEYS.convert(weights, model), assign=True)
    return model.eval()


def tokens(*sentences: str) -> Mapping[str, Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(minilm_directory())
    return tokenizer(list(sentences), padding=True, return_tensors="pt")


def encode(model: SentenceEncoder, inputs: Mapping[str, Tensor]) -> Tensor:
    model.set_attention_mask(inputs["attention_mask"])
    model.set_token_type_ids(inputs["token_type_ids"])
    with torch.no_grad():
        return model(inputs["input_ids"])


def test_the_published_similarities_come_out(encoder: SentenceEncoder) -> None:
    vectors = encode(encoder, tokens(*SIMILAR))
    similarities = vectors @ vectors.T
    pairs = [similarities[0, 1], similarities[0, 2], similarities[1, 2]]
    assert [f"{similarity.item():.4f}" for similarity in pairs] == PUBLISHED_SIMILARITIES


def test_upstream_gives_the_same_bits_sentence_by_sentence(encoder: SentenceEncoder) -> None:
    upstream = BertModel.from_pretrained(minilm_directory(), attn_implementation="sdpa").eval()
    states = encoder[: encoder.num_layers + 1]
    for sentence in SENTENCES:
        inputs = tokens(sentence)
        with torch.no_grad():
            expected = upstream(**inputs).last_hidden_state
            states.set_attention_mask(inputs["attention_mask"])
            assert torch.equal(states(inputs["input_ids"]), expected), sentence


def test_every_sentence_gets_a_vector_of_length_one_of_its_own(encoder: SentenceEncoder) -> None:
    vectors = encode(encoder, tokens(*SENTENCES))
    assert vectors.shape == (len(SENTENCES), 384)
    similarities = vectors @ vectors.T
    assert {f"{similarity:.4f}" for similarity in similarities.diagonal().tolist()} == {"1.0000"}
    assert similarities.argmax(dim=1).tolist() == list(range(len(SENTENCES)))


def test_padding_does_not_turn_a_sentence(encoder: SentenceEncoder) -> None:
    alone = encode(encoder, tokens(SENTENCES[0]))
    padded = encode(encoder, tokens(*SENTENCES))[:1]
    assert f"{(alone @ padded.T).item():.4f}" == "1.0000"


def test_the_published_file_holds_the_pooler_that_bert_needs_and_the_sentence_encoder_does_not() -> None:
    weights = read_state_dict(minilm_directory() / "model.safetensors")
    assert len(weights) == 104
    with torch.device("meta"):
        bert, sentences = bert_from_config(minilm_config()), sentence_encoder_from_config(minilm_config())
    assert isinstance(bert, BERT)
    assert len(BERT_KEYS.convert(weights, bert)) == 103  # all but the position ids
    assert len(SENTENCE_ENCODER_KEYS.convert(weights, sentences)) == 101


def test_the_converted_file_loads_and_gives_the_same_bits(encoder: SentenceEncoder, tmp_path: Path) -> None:
    converted = tmp_path / "minilm.safetensors"
    assert convert_file(PORTS["minilm"], minilm_directory(), converted).tensors == 101
    copy = minilm_l6()
    copy.load_from_safetensors(converted)
    inputs = tokens(*SIMILAR)
    assert torch.equal(encode(copy.eval(), inputs), encode(encoder, inputs))
