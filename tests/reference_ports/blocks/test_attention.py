import pytest
import torch

import refiners.fluxion.layers as fl
from reference_ports.blocks.attention import MaskedAttention, SelfAttention, prepare_attention_mask
from refiners.errors import ConversionError, InputError
from refiners.fluxion.context import Contexts


class Attention(fl.Chain):
    def init_context(self) -> Contexts:
        return {"attention": {"mask": None}}


def test_a_mask_of_ones_is_no_mask() -> None:
    assert prepare_attention_mask(torch.ones(2, 5), is_causal=True) is None
    assert prepare_attention_mask(None, is_causal=False) is None


def test_padding_is_hidden_from_every_query() -> None:
    mask = prepare_attention_mask(torch.tensor([[1, 1, 0]]), is_causal=False)
    assert mask is not None
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[[[True, True, False]] * 3]]


def test_a_causal_mask_hides_what_comes_after_too() -> None:
    mask = prepare_attention_mask(torch.tensor([[0, 1, 1]]), is_causal=True)
    assert mask is not None
    assert mask.tolist() == [[[[False, False, False], [False, True, False], [False, True, True]]]]


def test_a_finished_mask_is_taken_as_it_is() -> None:
    mask = torch.randn(2, 1, 5, 5)
    assert prepare_attention_mask(mask, is_causal=True) is mask


@pytest.mark.parametrize("shape", [(5,), (2, 5, 5), (1, 1, 1, 5, 5)])
def test_a_mask_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="Give one row of ones and zeros"):
        prepare_attention_mask(torch.zeros(shape), is_causal=False)


def test_a_mask_on_meta_is_prepared_without_a_look_at_its_values() -> None:
    mask = prepare_attention_mask(torch.ones(2, 5, device="meta"), is_causal=False)
    assert mask is not None
    assert mask.shape == (2, 1, 5, 5)


def test_heads_that_do_not_divide_the_embedding_are_refused() -> None:
    with pytest.raises(ConversionError, match="num_heads=3"):
        SelfAttention(32, 3)


def test_what_is_masked_has_no_influence() -> None:
    attention = Attention(SelfAttention(8, 2))
    x = torch.randn(1, 4, 8)
    changed = x.clone()
    changed[:, 3] += 1
    outputs: list[torch.Tensor] = []
    for states in (x, changed):
        attention.set_context("attention", {"mask": prepare_attention_mask(torch.tensor([[1, 1, 1, 0]]), False)})
        outputs.append(attention(states)[:, :3])
    assert torch.equal(*outputs)
    assert not torch.equal(attention(x)[:, :3], attention(changed)[:, :3])


def test_a_causal_attention_does_not_look_ahead() -> None:
    attention = Attention(SelfAttention(8, 2, is_causal=True))
    x = torch.randn(1, 4, 8)
    changed = x.clone()
    changed[:, 3] += 1
    assert torch.equal(attention(x)[:, :3], attention(changed)[:, :3])


def test_attention_without_a_context_above_says_so() -> None:
    with pytest.raises(fl.ChainError, match='Context "attention" does not exist'):
        fl.Chain(fl.Parallel(fl.Identity(), fl.Identity(), fl.Identity()), MaskedAttention(2))(torch.zeros(1, 3, 8))
