"""What the tasks promise: seeds, sizes, strengths, masks, and what they refuse."""

from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from reference_ports.pipelines.stable_diffusion import (
    LatentDiffusionModel,
    image_to_image,
    inpaint,
    text_to_image,
)
from refiners.errors import ChainError, InputError
from refiners.fluxion.utils import no_grad

PROMPT, OTHER = "a photo of a cat", "two dogs"
Call = dict[str, Any]


def seeded(*seeds: int) -> Any:
    made = [Generator().manual_seed(seed) for seed in seeds]
    return made if len(made) > 1 else made[0]


@no_grad()
def test_a_generation_gives_the_latents_after_each_step(model: LatentDiffusionModel, call: Call) -> None:
    generation = text_to_image(model, PROMPT, **call, generator=seeded(0))
    assert len(generation) == 2
    latents = list(generation)
    assert [one.shape for one in latents] == [(1, 4, 16, 16)] * 2
    assert not torch.equal(*latents)
    assert len(generation) == 0
    assert torch.equal(generation.run(), latents[-1])


@no_grad()
def test_pictures_are_tensors_or_images(model: LatentDiffusionModel, call: Call) -> None:
    generation = text_to_image(model, [PROMPT, OTHER], **call, height=32, width=48, generator=seeded(0))
    pixels = generation.pixels()
    assert pixels.shape == (2, 3, 32, 48)
    assert 0 <= pixels.min() < pixels.max() <= 1
    assert [image.size for image in generation.images()] == [(48, 32)] * 2


@no_grad()
def test_a_seed_gives_a_picture(model: LatentDiffusionModel, call: Call) -> None:
    first, again, other = (text_to_image(model, PROMPT, **call, generator=seeded(n)).run() for n in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_generator_for_each_prompt_draws_what_it_draws_alone(model: LatentDiffusionModel, call: Call) -> None:
    both = text_to_image(model, [PROMPT, OTHER], **call, generator=seeded(1, 2)).latents
    alone = [text_to_image(model, PROMPT, **call, generator=seeded(n)).latents for n in (1, 2)]
    assert torch.equal(both, torch.cat(alone))


@no_grad()
def test_pictures_of_one_prompt_follow_one_another(model: LatentDiffusionModel, call: Call) -> None:
    several = text_to_image(model, [PROMPT, OTHER], **call, num_images_per_prompt=2, generator=seeded(1, 2, 3, 4)).run()
    repeated = text_to_image(model, [PROMPT, PROMPT, OTHER, OTHER], **call, generator=seeded(1, 2, 3, 4)).run()
    assert torch.equal(several, repeated)


@no_grad()
def test_inpainting_goes_on_from_latents_that_another_model_has_begun(model: LatentDiffusionModel, call: Call) -> None:
    begun, mask = torch.randn(1, 4, 16, 16, generator=seeded(0)), torch.ones(1, 1, 32, 32)
    mask[..., :8] = 0
    call |= {"num_inference_steps": 5, "denoising_start": 0.4, "denoising_end": 0.8}
    generation = inpaint(model, PROMPT, begun, mask, **call, generator=seeded(0))
    assert torch.equal(generation.latents, begun)
    assert len(generation) == 2
    made = generation.run()
    assert torch.equal(made[..., :4], begun[..., :4])
    assert not torch.equal(made[..., 4:], begun[..., 4:])


def test_inpainting_refuses_latents_of_another_size(model: LatentDiffusionModel, call: Call) -> None:
    with pytest.raises(InputError, match=r"shape \(1, 4, 8, 8\), .* need \(1, 4, 16, 16\)"):
        inpaint(model, PROMPT, torch.zeros(1, 4, 8, 8), torch.ones(32, 32), **call)


@no_grad()
def test_the_prompts_decide(model: LatentDiffusionModel, call: Call) -> None:
    def run(*prompts: str, **more: Any) -> Tensor:
        return text_to_image(model, *prompts, **{**call, **more}, generator=seeded(0)).run()

    assert not torch.equal(run(PROMPT), run(OTHER))
    assert not torch.equal(run(PROMPT), run(PROMPT, "ugly"))
    assert torch.equal(run(PROMPT), run(PROMPT, ""))
    assert torch.equal(run(PROMPT, condition_scale=1.0), run(PROMPT, "ugly", condition_scale=1.0))


@no_grad()
def test_a_generation_can_be_run_twice_by_one_model(model: LatentDiffusionModel, call: Call) -> None:
    pixels = torch.rand(1, 3, 32, 32)
    first = image_to_image(model, PROMPT, pixels, **call, generator=seeded(0)).run()
    text_to_image(model, PROMPT, **call, generator=seeded(0)).run()
    assert torch.equal(image_to_image(model, PROMPT, pixels, **call, generator=seeded(0)).run(), first)


@pytest.mark.parametrize(("strength", "steps"), [(1.0, 10), (0.5, 5), (0.1, 1)])
def test_a_strength_takes_a_share_of_the_steps(strength: float, steps: int, model: LatentDiffusionModel) -> None:
    call = {"strength": strength, "num_inference_steps": 10, "generator": seeded(0)}
    assert len(image_to_image(model, PROMPT, torch.rand(1, 3, 32, 32), **call)) == steps


def test_a_picture_is_cut_to_what_latents_can_hold(model: LatentDiffusionModel, call: Call) -> None:
    generation = image_to_image(model, PROMPT, torch.rand(1, 3, 33, 51), **call, generator=seeded(0))
    assert generation.latents.shape == (1, 4, 16, 25)


@no_grad()
def test_where_a_mask_hides_nothing_the_picture_stays(model: LatentDiffusionModel, call: Call) -> None:
    pixels, mask = torch.rand(1, 3, 32, 32), torch.zeros(1, 1, 32, 32)
    made = inpaint(model, PROMPT, pixels, mask, **call, generator=seeded(0)).run()
    assert torch.equal(made, model.encode(2 * pixels - 1, seeded(0)))


@no_grad()
def test_only_what_a_mask_hides_is_made_anew(model: LatentDiffusionModel, call: Call) -> None:
    pixels, mask = torch.rand(1, 3, 32, 32), torch.zeros(1, 1, 32, 32)
    mask[..., 16:] = 1
    made = inpaint(model, PROMPT, pixels, mask, **call, generator=seeded(0)).run()
    known = model.encode(2 * pixels - 1, seeded(0))
    assert torch.equal(made[..., :8], known[..., :8])
    assert not torch.equal(made[..., 8:], known[..., 8:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps is 0: .* from 1 to 1000"),
        ({"num_inference_steps": -3}, "num_inference_steps is -3"),
        ({"height": 30}, "30x32 pixels cannot be made: height and width must be multiples of 8"),
        ({"width": -8}, "32x-8 pixels cannot be made"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, r"shape \(1, 4, 8, 8\), .* need \(1, 4, 16, 16\)"),
        ({"prompt": []}, "A prompt is a text, or a list"),
        ({"prompt": None}, "A prompt is a text, or a list"),
        ({"prompt": [PROMPT, 3]}, "A prompt is a text, or a list"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
        ({"clip_skip": 3}, "has 2 layers: 3 of them cannot be skipped"),
        ({"clip_skip": -1}, "-1 of them cannot be skipped"),
        ({"generator": [Generator(), Generator()]}, "2 generators for a batch of 1"),
        ({"denoising_end": 1.5}, "denoising_end is 1.5"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"num_images_per_prompt": 1.5}, "num_images_per_prompt is 1.5"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_makes_no_sense_is_refused(
    changes: dict[str, Any], message: str, model: LatentDiffusionModel, call: Call
) -> None:
    with pytest.raises(InputError, match=message):
        text_to_image(model, **{"prompt": PROMPT, **call, "generator": seeded(0), **changes})


def test_pictures_that_do_not_fit_the_prompts_are_refused(model: LatentDiffusionModel, call: Call) -> None:
    with pytest.raises(InputError, match="2 pictures for 3 prompts"):
        image_to_image(model, [PROMPT] * 3, torch.rand(2, 3, 32, 32), **call, generator=seeded(0))


def test_one_picture_stands_for_all_prompts(model: LatentDiffusionModel, call: Call) -> None:
    generation = image_to_image(model, [PROMPT, OTHER], torch.rand(1, 3, 32, 32), **call, generator=seeded(0, 1))
    assert generation.latents.shape[0] == 2
    assert not torch.equal(*generation.latents)


def test_a_condition_that_is_missing_is_named(model: LatentDiffusionModel) -> None:
    with pytest.raises(InputError, match="clip_text_embedding is missing.*compute_conditions"):
        model.predict(torch.zeros(1, 4, 16, 16), {}, 0)


def test_a_text_embedding_of_another_width_is_refused(model: LatentDiffusionModel) -> None:
    with pytest.raises(InputError, match=r"takes \(batch, sequence_length, 32\)"):
        model(torch.zeros(1, 4, 16, 16), 0, clip_text_embedding=torch.zeros(1, 77, 768))


def test_latents_of_other_channels_are_refused(model: LatentDiffusionModel) -> None:
    with pytest.raises(ChainError, match=r"takes \(batch, 4"):
        model(torch.zeros(1, 5, 16, 16), 0, clip_text_embedding=torch.zeros(1, 77, 32))
