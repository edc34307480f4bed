"""Pictures to pixels and back."""

from typing import Any

import pytest
import torch
from PIL import Image

from reference_ports.blocks.pictures import mask_to_tensor, picture_to_pixels, pixels_to_images, pixels_to_unit
from refiners.errors import InputError


def test_levels_lie_between_minus_1_and_1() -> None:
    image = Image.new("RGB", (16, 8))
    image.putpixel((0, 0), (255, 0, 255))
    pixels = picture_to_pixels(image)
    assert pixels.shape == (1, 3, 8, 16)
    assert pixels[0, :, 0, 0].tolist() == [1, -1, 1]


def test_sides_are_lowered_to_multiples() -> None:
    image = Image.new("RGB", (47, 33))
    assert picture_to_pixels(image).shape == (1, 3, 32, 40)
    assert picture_to_pixels(image, multiple=16).shape == (1, 3, 32, 32)
    assert picture_to_pixels(image, height=70, width=20).shape == (1, 3, 64, 16)
    assert mask_to_tensor(image).shape == (1, 1, 32, 40)


def test_a_picture_comes_back_as_it_was() -> None:
    noise = torch.randint(0, 256, (16, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    image = Image.frombytes("RGB", (24, 16), bytes(noise.flatten().tolist()))
    (back,) = pixels_to_images(picture_to_pixels(image))
    assert (back.mode, back.size, back.tobytes()) == ("RGB", image.size, image.tobytes())


def test_pixels_of_images_lie_pixel_by_pixel_in_memory() -> None:
    assert picture_to_pixels(Image.new("RGB", (16, 8))).is_contiguous(memory_format=torch.channels_last)


def test_what_lies_beyond_the_levels_is_cut_off() -> None:
    assert pixels_to_unit(torch.tensor([-3.0, -1, 0, 1, 3])).tolist() == [0, 0, 0.5, 1, 1]


def test_a_mask_is_white_from_one_half_on() -> None:
    shares = torch.tensor([0.0, 0.49, 0.5, 1.0]).repeat(8, 2)
    assert mask_to_tensor(shares)[0, 0, 0].tolist() == [0, 0, 1, 1] * 2


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ([], "got nothing"),
        ("cat.png", "got str"),
        ([Image.new("RGB", (8, 8)), torch.zeros(3, 8, 8)], "got Image, Tensor"),
        (Image.new("CMYK", (8, 8)), "one mode, L, RGB, RGBA; got CMYK"),
        ([Image.new("RGB", (8, 8)), Image.new("L", (8, 8))], "got L, RGB"),
        (Image.new("RGB", (8, 7)), "less than 8 on a side"),
        (torch.zeros(8, 8), "got "),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 8, 16)], "of one size"),
    ],
)
def test_what_is_no_picture_is_refused(wrong: Any, told: str) -> None:
    with pytest.raises(InputError, match=told):
        picture_to_pixels(wrong)


def test_a_mask_of_several_channels_is_refused() -> None:
    with pytest.raises(InputError, match="A mask has one channel"):
        mask_to_tensor(torch.zeros(1, 3, 8, 8))


def test_pixels_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(InputError, match="NaN"):
        pixels_to_images(torch.full((1, 3, 8, 8), float("nan")))
