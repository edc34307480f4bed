"""Several predictions become one: formulas on a denoiser that gives its condition back."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from reference_ports.pipelines.stable_diffusion import (
    ClassifierFreeGuidance,
    EditGuidance,
    EmbeddedGuidance,
    Guidance,
    SequentialGuidance,
)
from reference_ports.pipelines.stable_diffusion.guidance import embed_scale
from refiners.errors import InputError

LATENTS = torch.zeros(2, 1, 2, 2)
POSITIVE, NEGATIVE = torch.tensor([[4.0], [6.0]]), torch.tensor([[1.0], [2.0]])
calls: list[int] = []


def predict(latents: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
    calls.append(len(latents))
    return latents + conditions["text"][:, :, None, None]


def guided(guidance: Guidance, scale: float = 3.0) -> list[float]:
    calls.clear()
    found = guidance(predict, LATENTS, {"text": guidance.arrange(NEGATIVE, POSITIVE)}, scale)
    assert found.shape == LATENTS.shape
    return found[:, 0, 0, 0].tolist()


def test_guidance_goes_from_the_negative_prompt_to_the_prompt_and_further() -> None:
    assert guided(ClassifierFreeGuidance()) == [1 + 3 * (4 - 1), 2 + 3 * (6 - 2)]
    assert calls == [4]


def test_sequential_guidance_makes_the_same_of_two_smaller_passes() -> None:
    assert guided(SequentialGuidance()) == guided(ClassifierFreeGuidance())
    guided(SequentialGuidance())
    assert calls == [2, 2]


def test_edits_have_two_scales() -> None:
    # text - image is POSITIVE - NEGATIVE; image - nothing is 0, for both have the negative prompt.
    assert guided(EditGuidance(image_scale=2.0)) == [1 + 3 * (4 - 1), 2 + 3 * (6 - 2)]
    assert calls == [6]


@pytest.mark.parametrize("guidance", [ClassifierFreeGuidance(), SequentialGuidance(), EditGuidance()])
def test_conditions_of_the_prompts_alone_take_one_plain_pass(guidance: Guidance) -> None:
    calls.clear()
    assert guidance(predict, LATENTS, {"text": POSITIVE}, 3.0)[:, 0, 0, 0].tolist() == [4, 6]
    assert calls == [2]


def test_other_numbers_of_rows_are_refused() -> None:
    with pytest.raises(InputError, match=r"2 latents need 2 rows, or 4 .* have \{'text': 3\}"):
        ClassifierFreeGuidance()(predict, LATENTS, {"text": torch.ones(3, 1)}, 3.0)


def test_rescaling_in_full_gives_the_deviation_of_the_prompts_prediction() -> None:
    positive = torch.arange(8.0).reshape(1, 2, 2, 2)

    def both(latents: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([positive.flip(1), positive])

    conditions = {"text": torch.ones(2, 1)}
    found = ClassifierFreeGuidance(rescale=1.0)(both, torch.zeros(1, 2, 2, 2), conditions, 5.0)
    without = ClassifierFreeGuidance()(both, torch.zeros(1, 2, 2, 2), conditions, 5.0)
    assert round(float(found.std()), 4) == round(float(positive.std()), 4) < float(without.std())


def test_a_scale_up_to_one_uses_no_guidance() -> None:
    assert not ClassifierFreeGuidance().is_used(1.0)
    assert ClassifierFreeGuidance().is_used(1.01)
    assert not EditGuidance(image_scale=0.5).is_used(7.5)


def test_an_embedded_scale_is_one_more_condition() -> None:
    seen: dict[str, Tensor] = {}

    def keep(latents: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        seen.update(conditions)
        return latents

    guidance = EmbeddedGuidance(8)
    assert not guidance.is_used(7.5)
    guidance(keep, LATENTS.double(), {"text": POSITIVE}, 7.5)
    assert seen["timestep_condition"].shape == (2, 8)
    assert seen["timestep_condition"].dtype == torch.float64


def test_an_embedding_of_odd_width_ends_with_zeros() -> None:
    embedding = embed_scale(torch.tensor([0.0, 1.0]), 5)
    assert embedding[0].tolist() == [0, 0, 1, 1, 0]
    assert embedding[1, -1] == 0
