"""What a denoiser reads of a prompt; that it is upstream's, bit for bit, is shown in parity_tests."""

import pytest
import torch

from reference_ports.clip import CLIPTextEncoder, CLIPTextModelWithProjection, CLIPTokenizer
from reference_ports.pipelines.stable_diffusion import PromptTooLongWarning, StableDiffusion_1
from reference_ports.pipelines.stable_diffusion.size import AestheticCondition, SizeCondition, time_ids
from reference_ports.pipelines.stable_diffusion.text import (
    PenultimateTextEncoder,
    last_states,
    negative_prompts,
    penultimate_states,
    tokenize,
)
from reference_ports.pipelines.stable_diffusion.xl import in_float32
from refiners.fluxion.adapters import LinearLora, LoraAdapter
from refiners.fluxion.utils import no_grad

PROMPTS = ["a cat", "two dogs"]


@pytest.fixture
def tokenizer(model: StableDiffusion_1) -> CLIPTokenizer:
    return model.tokenizer


@pytest.fixture
def encoder(model: StableDiffusion_1) -> CLIPTextEncoder:
    return model.text_encoder


@no_grad()
def test_skipped_layers_are_left_out_and_the_norm_stays(encoder: CLIPTextEncoder, tokenizer: CLIPTokenizer) -> None:
    ids = tokenizer(PROMPTS).ids
    assert torch.equal(last_states(encoder, tokenizer, PROMPTS), encoder(ids))
    norm = encoder[-1]
    assert torch.equal(last_states(encoder, tokenizer, PROMPTS, clip_skip=1), norm(encoder[:-2](ids)))
    assert torch.equal(last_states(encoder, tokenizer, PROMPTS, clip_skip=2), norm(encoder[:1](ids)))
    assert len(encoder) == 4


@no_grad()
def test_the_states_before_the_last_layer_and_the_embedding_come_from_one_forward() -> None:
    model = CLIPTextModelWithProjection(6, embedding_dim=8, num_layers=3, num_heads=2, feedforward_dim=16)
    ids = torch.tensor([[49_406, 5, 49_407]])
    for skipped in (1, 2):
        states, embedding = PenultimateTextEncoder(model, skipped)(ids)
        assert torch.equal(states, model.encoder[: -1 - skipped](ids))
        assert torch.equal(embedding, model(ids)[1])
    assert len(model.encoder) == 5


@no_grad()
def test_an_adapter_of_the_encoder_is_read_too(encoder: CLIPTextEncoder, tokenizer: CLIPTokenizer) -> None:
    before = penultimate_states(encoder, tokenizer, PROMPTS)
    linear = encoder[1].AttentionResidual.SelfAttention.Projections.Value
    lora = LinearLora("style", linear.in_features, linear.out_features)
    torch.nn.init.ones_(lora.up.weight)
    adapter = LoraAdapter(linear, lora).inject(encoder)
    assert not torch.equal(penultimate_states(encoder, tokenizer, PROMPTS), before)
    adapter.eject()
    assert torch.equal(penultimate_states(encoder, tokenizer, PROMPTS), before)


def test_what_is_cut_off_is_told(encoder: CLIPTextEncoder, tokenizer: CLIPTokenizer) -> None:
    with pytest.warns(PromptTooLongWarning, match=r"77 tokens .* cut off: \['end'\]"):
        assert tokenize(tokenizer, ["x" * 75 + "end", "short"], encoder).shape == (2, 77)


def test_one_negative_prompt_stands_for_all() -> None:
    assert negative_prompts(None, 2) == ["", ""]
    assert negative_prompts("ugly", 2) == ["ugly", "ugly"]
    assert negative_prompts(["ugly", "dark"], 2) == ["ugly", "dark"]


def test_sizes_are_told_height_first() -> None:
    size = SizeCondition(original_size=(1, 2), crop=(3, 4), target_size=(5, 6))
    assert time_ids(size, 2).tolist() == [[1, 2, 3, 4, 5, 6]] * 2
    beauty = AestheticCondition(original_size=(1, 2), crop=(3, 4), aesthetic_score=2.5)
    assert time_ids(beauty, 1, dtype=torch.float64).tolist() == [[1, 2, 3, 4, 2.5]]


def test_a_model_that_computed_in_float32_has_the_very_same_weights_again() -> None:
    module = torch.nn.Linear(2, 2, dtype=torch.bfloat16)
    before = [(parameter, parameter.data_ptr()) for parameter in module.parameters()]
    with pytest.raises(ZeroDivisionError), in_float32(module):
        assert module(torch.ones(1, 2)).dtype == torch.float32
        1 / 0  # noqa: B018 because it shall fail
    assert [(parameter, parameter.data_ptr()) for parameter in module.parameters()] == before
    assert module.weight.dtype == torch.bfloat16
