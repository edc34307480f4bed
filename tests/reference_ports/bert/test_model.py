import pytest
import torch

import refiners.fluxion.layers as fl
from reference_ports.bert.model import BERT, BERTEncoder, BERTNumbers, SentenceEncoder, TransformerLayer, WordEncoder
from refiners.errors import InputError

NUMBERS: BERTNumbers = {
    "vocabulary_size": 50,
    "embedding_dim": 16,
    "num_layers": 3,
    "num_heads": 4,
    "feedforward_dim": 24,
    "num_positions": 12,
}
IDS = torch.tensor([[2, 7, 9, 3], [2, 8, 3, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])


def test_bert_returns_states_and_the_pooled_token() -> None:
    states, pooled = BERT(**NUMBERS)(IDS)
    assert states.shape == (2, 4, 16)
    assert pooled.shape == (2, 16)


def test_a_slice_is_a_hidden_state() -> None:
    model = BERT(**NUMBERS)
    states = model.with_hidden_states()(IDS)
    assert len(states) == 4
    for i, state in enumerate(states):
        assert torch.equal(model[: i + 1](IDS), state)
    assert torch.equal(model(IDS)[0], states[-1])


def test_the_copy_that_keeps_hidden_states_shares_the_weights() -> None:
    model = BERTEncoder(**NUMBERS)
    kept = model.with_hidden_states()
    assert {id(p) for p in kept.parameters()} == {id(p) for p in model.parameters()}
    assert list(kept.state_dict()) == list(model.state_dict())


def test_the_mask_holds_for_one_forward() -> None:
    model = BERTEncoder(**NUMBERS)
    plain = model(IDS)
    model.set_attention_mask(MASK)
    masked = model(IDS)
    assert not torch.equal(masked[1], plain[1])
    assert torch.equal(model(IDS), plain)


def test_padding_has_no_influence_on_the_text() -> None:
    model = BERTEncoder(**NUMBERS)
    other = IDS.clone()
    other[1, 3] = 11
    outputs: list[torch.Tensor] = []
    for ids in (IDS, other):
        model.set_attention_mask(MASK)
        outputs.append(model(ids)[1, :3])
    assert torch.equal(*outputs)


def test_segments_and_positions_default_to_the_first_and_to_counting() -> None:
    model = BERTEncoder(**NUMBERS)
    plain = model(IDS)
    model.set_token_type_ids(torch.zeros_like(IDS))
    model.set_position_ids(torch.arange(4)[None])
    assert torch.equal(model(IDS), plain)
    model.set_token_type_ids(torch.ones_like(IDS))
    assert not torch.equal(model(IDS), plain)


def test_a_sequence_longer_than_the_table_is_refused() -> None:
    with pytest.raises(fl.ChainError, match="13 tokens and the model has 12 positions") as caught:
        BERTEncoder(**NUMBERS)(torch.zeros(1, 13, dtype=torch.long))
    assert isinstance(caught.value.__cause__, InputError)


def test_the_vector_of_padding_is_not_trained() -> None:
    model = BERTEncoder(**NUMBERS)
    model(IDS).sum().backward()
    gradient = model.ensure_find(WordEncoder).weight.grad
    assert gradient is not None
    assert not gradient[0].any()
    assert gradient[2].any()


def test_a_sentence_is_a_vector_of_length_one_that_padding_does_not_touch() -> None:
    encoder = SentenceEncoder(**NUMBERS)
    encoder.set_attention_mask(MASK)
    vectors = encoder(IDS)
    assert [f"{length:.5f}" for length in vectors.norm(dim=1)] == ["1.00000", "1.00000"]
    other = IDS.clone()
    other[1, 3] = 11
    encoder.set_attention_mask(MASK)
    assert torch.equal(encoder(other), vectors)


def test_without_a_mask_every_token_counts() -> None:
    encoder = SentenceEncoder(**NUMBERS)
    plain = encoder(IDS)
    encoder.set_attention_mask(torch.ones_like(IDS))
    assert torch.equal(encoder(IDS), plain)


def test_a_finished_mask_cannot_say_what_to_average() -> None:
    encoder = SentenceEncoder(**NUMBERS)
    encoder.set_attention_mask(torch.zeros(2, 1, 4, 4))
    with pytest.raises(fl.ChainError, match="Mean pooling needs a mask of 1 for text"):
        encoder(IDS)


def test_a_head_is_built_where_the_encoder_is() -> None:
    model = BERT(**NUMBERS, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}


def test_the_model_computes_on_meta() -> None:
    model = BERT(**NUMBERS, device="meta")
    model.set_attention_mask(MASK.to("meta"))
    states, pooled = model(IDS.to("meta"))
    assert (states.shape, pooled.shape) == ((2, 4, 16), (2, 16))


def test_one_layer_has_no_number() -> None:
    model = BERT(**{**NUMBERS, "num_layers": 1})
    assert isinstance(model.layer("TransformerLayer"), TransformerLayer)


def test_it_compiles_without_a_graph_break() -> None:
    model = SentenceEncoder(**NUMBERS).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for mask in (None, MASK):
        model.set_attention_mask(mask)
        expected = model(IDS)
        model.set_attention_mask(mask)
        assert torch.equal(compiled(IDS), expected)
