"""Pictures to pixels and back, beside `VaeImageProcessor` of diffusers: the same bits, in the same order in memory."""

from typing import Any

import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from parity_tests.test_image_processor import MODES, picture
from reference_ports.blocks.pictures import mask_to_tensor, picture_to_pixels, pixels_to_images, pixels_to_unit
from refiners.errors import InputError
from refiners.parity.bits import same_bits

SIZES = ((64, 64), (97, 41))
WANTED: tuple[dict[str, int], ...] = ({}, {"height": 50, "width": 33})
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MASKS = {"do_normalize": False, "do_binarize": True, "do_convert_grayscale": True}


def shares(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    assert same_bits(ours, theirs)
    # An axis of one has no order.
    strides = [[stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1] for x in (ours, theirs)]
    assert strides[0] == strides[1]
    formats = [x.is_contiguous(memory_format=torch.channels_last) for x in (ours, theirs)]
    assert formats[0] == formats[1]


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
@pytest.mark.parametrize("multiple", [8, 16])
def test_images_become_the_pixels_of_upstream(mode: str, multiple: int) -> None:
    processor = VaeImageProcessor(vae_scale_factor=multiple)
    for size in SIZES:
        several = [picture(mode, size), picture(mode, (size[0] + 5, size[1]))]
        for wanted in WANTED:
            for given in (several[0], several):
                expected = processor.preprocess(given, **wanted)
                assert_equal(picture_to_pixels(given, **wanted, multiple=multiple), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_become_the_pixels_of_upstream(dtype: torch.dtype) -> None:
    processor = VaeImageProcessor()
    one, batch = shares(3, 41, 97, dtype=dtype), shares(2, 3, 41, 97, dtype=dtype)
    given: list[Any] = [one, batch, [one, 1 - one], batch.to(memory_format=torch.channels_last)]
    for x in given:
        for wanted in WANTED:
            assert_equal(picture_to_pixels(x, **wanted), processor.preprocess(x, **wanted))


def test_tensors_between_minus_1_and_1_stay_as_they_are() -> None:
    given = 2 * shares(1, 3, 16, 24) - 1
    with pytest.warns(FutureWarning, match="range"):
        expected = VaeImageProcessor().preprocess(given)
    assert_equal(picture_to_pixels(given), expected)


def test_latents_are_returned_as_they_are() -> None:
    latents = shares(1, 4, 13, 7) - 0.5
    assert picture_to_pixels(latents) is latents
    assert_equal(picture_to_pixels(latents), VaeImageProcessor().preprocess(latents))
    sixteen = shares(1, 16, 13, 7)
    expected = VaeImageProcessor(vae_latent_channels=16).preprocess(sixteen)
    assert_equal(picture_to_pixels(sixteen, latent_channels=16), expected)


@pytest.mark.parametrize("mode", MODES)
def test_masks_of_any_mode_become_those_of_upstream(mode: str) -> None:
    processor = VaeImageProcessor(**MASKS)
    for size in SIZES:
        for wanted in WANTED:
            mask = picture(mode, size)
            try:
                expected = processor.preprocess(mask, **wanted)
            except ValueError:  # Pillow has no such filter for this mode
                with pytest.raises(ValueError):
                    mask_to_tensor(mask, **wanted)
                continue
            assert_equal(mask_to_tensor(mask, **wanted), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(40, 56), (1, 40, 56), (3, 40, 56), (2, 1, 40, 56)])
def test_masks_that_are_tensors_become_those_of_upstream(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    processor = VaeImageProcessor(**MASKS)
    mask = shares(*shape, dtype=dtype)
    mask.view(-1)[::7] = 0.5
    for wanted in WANTED:
        assert_equal(mask_to_tensor(mask, **wanted), processor.preprocess(mask.clone(), **wanted))
        if len(shape) == 2:
            both = [mask, 1 - mask]
            assert_equal(mask_to_tensor(both, **wanted), processor.preprocess([x.clone() for x in both], **wanted))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_become_the_pictures_of_upstream(channels: int, dtype: torch.dtype) -> None:
    processor = VaeImageProcessor()
    # Beyond both ends, and every level with its two neighbours.
    levels = torch.linspace(-1.2, 1.2, 2 * channels * 32 * 32, dtype=torch.float64)
    pixels = levels[torch.randperm(len(levels), generator=torch.Generator().manual_seed(0))]
    pixels = pixels.view(2, channels, 32, 32).to(dtype)
    assert same_bits(pixels_to_unit(pixels), processor.postprocess(pixels, output_type="pt"))
    ours, theirs = pixels_to_images(pixels), processor.postprocess(pixels, output_type="pil")
    assert [image.mode for image in ours] == [image.mode for image in theirs]
    assert [image.tobytes() for image in ours] == [image.tobytes() for image in theirs]


def test_what_is_no_picture_is_refused() -> None:
    small = Image.new("RGB", (7, 64))
    wrong: list[Any] = [
        [],
        "cat.png",
        [picture("RGB", (64, 64)), shares(3, 64, 64)],
        [shares(3, 64, 64), shares(3, 64, 56)],
        shares(64, 64),
        picture("P", (64, 64)),
        [picture("RGB", (64, 64)), picture("L", (64, 64))],
        small,
    ]
    for given in wrong:
        with pytest.raises(InputError):
            picture_to_pixels(given)
    with pytest.raises(InputError, match="one channel"):
        mask_to_tensor(shares(1, 3, 16, 16))
