import pytest
import torch
from PIL import Image

from reference_ports.clip.image_processor import (
    MEAN,
    STANDARD_DEVIATION,
    CLIPImageProcessor,
    crop_middle,
    flatten_to_rgb,
    resize_shorter_side,
)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((640, 480), (298, 224)), ((480, 640), (224, 298)), ((100, 100), (224, 224)), ((1, 3), (224, 672))],
)
def test_the_shorter_side_gets_the_size(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert resize_shorter_side(Image.new("RGB", size), 224).size == expected


def test_the_middle_is_cut_out() -> None:
    levels = torch.arange(5 * 6).reshape(1, 5, 6)
    assert crop_middle(levels, (3, 2)).tolist() == [[[8, 9], [14, 15], [20, 21]]]


def test_a_crop_that_reaches_past_the_picture_is_filled_with_black() -> None:
    levels = torch.ones(1, 2, 2)
    assert crop_middle(levels, (2, 4)).tolist() == [[[0, 1, 1, 0], [0, 1, 1, 0]]]
    assert crop_middle(levels, (3, 2)).tolist() == [[[0, 0], [1, 1], [1, 1]]]


def test_what_is_transparent_becomes_white() -> None:
    assert flatten_to_rgb(Image.new("RGBA", (1, 1), (10, 20, 30, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert flatten_to_rgb(Image.new("RGBA", (1, 1), (10, 20, 30, 255))).getpixel((0, 0)) == (10, 20, 30)


def test_one_colour_becomes_one_number_a_channel() -> None:
    pixels = CLIPImageProcessor(size=8)(Image.new("RGB", (20, 10), (255, 0, 51)))
    assert pixels.shape == (1, 3, 8, 8)
    for channel, level in enumerate((1.0, 0.0, 0.2)):
        expected = (level - MEAN[channel]) / STANDARD_DEVIATION[channel]
        assert {f"{value:.5f}" for value in pixels[0, channel].flatten().tolist()} == {f"{expected:.5f}"}


def test_several_pictures_make_one_batch() -> None:
    pictures = [Image.new("L", (20, 10)), Image.new("RGBA", (9, 30))]
    assert CLIPImageProcessor(size=8)(pictures).shape == (2, 3, 8, 8)
