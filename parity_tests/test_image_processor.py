"""CLIP's image preprocessing beside transformers' PIL processor, to the last bit."""

import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from reference_ports.clip.image_processor import CLIPImageProcessor

MODES = ("RGB", "RGBA", "RGBa", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr", "HSV", "I", "I;16", "F")
SIZES = ((224, 224), (640, 480), (480, 640), (225, 224), (33, 31), (7, 300), (1, 1))
SETTINGS = {
    "published": ({}, {}),
    "crop inside": (
        {"size": 60, "crop_size": (48, 31)},
        {"size": {"shortest_edge": 60}, "crop_size": {"height": 48, "width": 31}},
    ),
    "crop reaches past": (
        {"size": 30, "crop_size": (41, 34)},
        {"size": {"shortest_edge": 30}, "crop_size": {"height": 41, "width": 34}},
    ),
    "other statistics": (
        {"mean": (0.5, 0.4, 0.3), "standard_deviation": (0.1, 0.2, 0.3)},
        {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1, 0.2, 0.3]},
    ),
}


def picture(mode: str, size: tuple[int, int]) -> Image.Image:
    """Noise of all channels, alpha included, brought into a mode."""
    width, height = size
    noise = torch.randint(0, 256, (height, width, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(width))
    image = Image.frombytes("RGBA", size, bytes(noise.flatten().tolist()))
    match mode:
        case "RGBA" | "RGBa" | "LA":
            return image.convert(mode)
        case "PA":
            return image.convert("P").convert("PA")
        case "I" | "F":
            return image.convert("L").convert(mode)
        case "I;16":
            return image.convert("L").convert("I").convert("I;16")
        case _:
            return image.convert("RGB").convert(mode)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("mode", MODES)
def test_pixels_equal_those_of_upstream(mode: str, settings: str) -> None:
    ours, theirs = SETTINGS[settings]
    processor, upstream = CLIPImageProcessor(**ours), CLIPImageProcessorPil(**theirs)
    for size in SIZES:
        image = picture(mode, size)
        expected = upstream(image, return_tensors="pt")["pixel_values"]
        pixels = processor(image)
        assert pixels.dtype == expected.dtype
        assert torch.equal(pixels, expected), size


def test_a_transparent_colour_of_a_palette_becomes_white() -> None:
    image = Image.new("P", (50, 40))
    image.info["transparency"] = 0
    expected = CLIPImageProcessorPil()(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(CLIPImageProcessor()(image), expected)


def test_several_pictures_make_one_batch() -> None:
    images = [picture("RGB", size) for size in SIZES]
    expected = CLIPImageProcessorPil()(images, return_tensors="pt")["pixel_values"]
    assert torch.equal(CLIPImageProcessor()(images), expected)
