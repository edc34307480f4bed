"""`refiners generate` on directories that diffusers writes and reads: the pictures have its pixels."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
)
from PIL import Image

from parity_tests import tiny_pipelines
from reference_ports import BUNDLES
from reference_ports.pipelines.stable_diffusion import (
    PromptTooLongWarning,
    SequentialGuidance,
    from_directory,
    image_to_image,
    text_to_image,
)
from reference_ports.pipelines.stable_diffusion.command import generate
from refiners.conversion import commands

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of numpy, for what diffusers does
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of diffusers, for what it will drop
]
PROMPT = "a photo of a cat"
CALL = {"prompt": PROMPT, "num_inference_steps": 2, "guidance_scale": 5.0}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tiny model, as diffusers writes it."""
    root = tmp_path_factory.mktemp("models")

    def of(kind: str) -> Path:
        if not (root / kind).is_dir():
            assert tiny_pipelines.main([kind, str(root / kind)]) == 0
        return root / kind

    return of


def picture(path: Path, mode: str = "RGB") -> Image.Image:
    """A picture of soft colours, or a mask."""
    values = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    image = Image.fromarray(values).resize((40, 32), Image.Resampling.BICUBIC).convert(mode)
    image.save(path)
    return image


def upstream(auto: Any, directory: Path, **call: Any) -> Image.Image:
    return upstreams(auto, directory, **call)[0]


def upstreams(auto: Any, directory: Path, **call: Any) -> list[Image.Image]:
    pipeline: DiffusionPipeline = auto.from_pretrained(directory)
    pipeline.set_progress_bar_config(disable=True)
    if "scheduler" in call:
        pipeline.scheduler = call.pop("scheduler").from_config(pipeline.scheduler.config)
    return pipeline(**CALL, **call, generator=torch.Generator().manual_seed(3)).images


def generated(directory: Path, path: Path, **options: Any) -> Image.Image:
    told = generate(model=directory, prompt=PROMPT, output=path, steps=2, seed=3, guidance=5.0, **options)
    assert told.startswith(f"{path}: ")
    with Image.open(path) as image:
        return image.copy()


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_a_picture_of_a_text_has_the_pixels_of_upstream(
    kind: str, directory: Callable[[str], Path], tmp_path: Path
) -> None:
    expected = upstream(AutoPipelineForText2Image, directory(kind), negative_prompt="ugly", height=32, width=48)
    made = generated(directory(kind), tmp_path / "cat.png", negative_prompt="ugly", height=32, width=48)
    assert np.array_equal(made, expected)


def test_another_solver_reads_the_noise_of_the_model(directory: Callable[[str], Path], tmp_path: Path) -> None:
    expected = upstream(AutoPipelineForText2Image, directory("sd1"), scheduler=EulerAncestralDiscreteScheduler)
    assert np.array_equal(generated(directory("sd1"), tmp_path / "cat.png", solver="euler-a"), expected)


def test_half_precision_has_the_pixels_of_upstream(directory: Callable[[str], Path], tmp_path: Path) -> None:
    pipeline = AutoPipelineForText2Image.from_pretrained(directory("sd1"), torch_dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(**CALL, generator=torch.Generator().manual_seed(3)).images[0]
    assert np.array_equal(generated(directory("sd1"), tmp_path / "cat.png", dtype="bfloat16"), expected)


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "sdxl-refiner"])
def test_a_picture_of_a_picture_has_the_pixels_of_upstream(
    kind: str, directory: Callable[[str], Path], tmp_path: Path
) -> None:
    image = picture(tmp_path / "in.png")
    expected = upstream(AutoPipelineForImage2Image, directory(kind), image=image, strength=0.6)
    made = generated(directory(kind), tmp_path / "out.png", image=tmp_path / "in.png", strength=0.6)
    assert np.array_equal(made, expected)


@pytest.mark.parametrize("kind", ["sd1", "sd1-inpainting"])
def test_what_a_mask_hides_is_made_with_the_pixels_of_upstream(
    kind: str, directory: Callable[[str], Path], tmp_path: Path
) -> None:
    image, mask = picture(tmp_path / "in.png"), picture(tmp_path / "mask.png", "L")
    size = {"height": 32, "width": 40}
    expected = upstream(AutoPipelineForInpainting, directory(kind), image=image, mask_image=mask, strength=1.0, **size)
    made = generated(directory(kind), tmp_path / "out.png", image=tmp_path / "in.png", mask=tmp_path / "mask.png")
    assert np.array_equal(made, expected)


def test_several_pictures_have_the_pixels_of_upstream(directory: Callable[[str], Path], tmp_path: Path) -> None:
    expected = upstreams(AutoPipelineForText2Image, directory("sd1"), num_images_per_prompt=2)
    options = {"model": directory("sd1"), "prompt": PROMPT, "steps": 2, "seed": 3, "guidance": 5.0}
    generate(**options, output=tmp_path / "cat.png", count=2)
    for number, one in enumerate(expected, start=1):
        with Image.open(tmp_path / f"cat-{number}.png") as made:
            assert np.array_equal(made, one)


def test_the_box_around_a_mask_is_made_anew_with_the_pixels_of_upstream(
    directory: Callable[[str], Path], tmp_path: Path
) -> None:
    image, mask = picture(tmp_path / "in.png"), Image.new("L", (40, 32))
    mask.paste(255, (20, 8, 31, 15))
    mask.save(tmp_path / "mask.png")
    given = {"image": image, "mask_image": mask, "strength": 1.0, "padding_mask_crop": 2}
    expected = upstream(AutoPipelineForInpainting, directory("sd1-inpainting"), **given, height=32, width=32)
    files = {"image": tmp_path / "in.png", "mask": tmp_path / "mask.png", "mask_crop": 2}
    assert np.array_equal(generated(directory("sd1-inpainting"), tmp_path / "out.png", **files), expected)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_converted_model_is_the_same_model_and_makes_pictures(
    kind: str, directory: Callable[[str], Path], tmp_path: Path
) -> None:
    commands.convert_bundle(BUNDLES(), None, directory(kind), tmp_path / "converted", commands.Options())
    # Weights, not pixels: in another file they lie at other addresses, on which the last bit of a product depends.
    models = [from_directory(path) for path in (directory(kind), tmp_path / "converted")]
    first, second = (model.state_dict() for model in models)
    assert list(first) == list(second)
    assert [key for key, tensor in first.items() if not torch.equal(tensor, second[key])] == []
    assert str(models[0].solver) == str(models[1].solver)
    assert models[0].default_size == models[1].default_size
    assert generated(tmp_path / "converted", tmp_path / "cat.png").size == (32, 32)


def test_a_base_model_hands_over_to_a_refiner_as_upstream_does(directory: Callable[[str], Path]) -> None:
    call, scale = {"prompt": PROMPT, "num_inference_steps": 4}, 5.0  # upstream's own scale for XL
    pipelines = [DiffusionPipeline.from_pretrained(directory(kind)) for kind in ("sdxl", "sdxl-refiner")]
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)
    draws = torch.Generator().manual_seed(3)
    begun = pipelines[0](**call, denoising_end=0.5, output_type="latent", generator=draws).images
    expected = pipelines[1](**call, image=begun, denoising_start=0.5, output_type="pt", generator=draws).images

    base, refiner = (from_directory(directory(kind)) for kind in ("sdxl", "sdxl-refiner"))
    draws = torch.Generator().manual_seed(3)
    with torch.no_grad():
        first = text_to_image(base, **call, denoising_end=0.5, generator=draws, condition_scale=scale)
        assert len(first) == 2
        latents = first.run()
        second = image_to_image(
            refiner, image=latents, **call, denoising_start=0.5, generator=draws, condition_scale=scale
        )
        assert len(second) == 2
        assert torch.equal(latents, begun)
        assert torch.equal(second.pixels(), expected)


def test_sequential_guidance_asks_for_one_prediction_after_the_other(directory: Callable[[str], Path]) -> None:
    pipeline = DiffusionPipeline.from_pretrained(directory("sd1"))
    pipeline.set_progress_bar_config(disable=True)
    forward = pipeline.unet.forward

    def one_by_one(latents: Any, timestep: Any, encoder_hidden_states: Any, **more: Any) -> Any:
        rows = zip(latents.split(1), encoder_hidden_states.split(1), strict=True)
        return (torch.cat([forward(x, timestep, text, return_dict=False)[0] for x, text in rows]),)

    pipeline.unet.forward = one_by_one
    expected = pipeline(**CALL, output_type="pt", generator=torch.Generator().manual_seed(3)).images
    model = from_directory(directory("sd1"))
    model.guidance = SequentialGuidance()
    options = {"num_inference_steps": 2, "condition_scale": 5.0, "generator": torch.Generator().manual_seed(3)}
    with torch.no_grad():
        made = text_to_image(model, PROMPT, **options).pixels()
    assert torch.equal(made, expected)


@pytest.mark.parametrize("clip_skip", [1, 2])
def test_clip_skip_leaves_out_layers_and_keeps_the_norm(clip_skip: int, directory: Callable[[str], Path]) -> None:
    pipeline, model = DiffusionPipeline.from_pretrained(directory("sd1")), from_directory(directory("sd1"))
    ids = pipeline.tokenizer(PROMPT, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        states = pipeline.text_encoder(ids, output_hidden_states=True).hidden_states
        expected = pipeline.text_encoder.final_layer_norm(states[-(clip_skip + 1)])
        assert torch.equal(model.compute_clip_text_embedding(PROMPT, is_guided=False, clip_skip=clip_skip), expected)


@pytest.mark.parametrize("kind", ["sd2", "sdxl"])
def test_a_prompt_that_is_too_long_is_cut_as_upstream_cuts_it(kind: str, directory: Callable[[str], Path]) -> None:
    prompt = "a very long walk through the woods, " * 15
    pipeline, model = DiffusionPipeline.from_pretrained(directory(kind)), from_directory(directory(kind))
    with torch.no_grad():
        expected = pipeline.encode_prompt(
            prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        with pytest.warns(PromptTooLongWarning, match="77 tokens.*walk through the woods , a very long walk"):
            found = model.compute_conditions(prompt, is_guided=False)
    assert torch.equal(found["clip_text_embedding"], expected[0])
    if kind == "sdxl":
        assert torch.equal(found["pooled_text_embedding"], expected[2])
