import subprocess
import sys

import pytest
import torch
from PIL import Image

from refiners.errors import InputError
from refiners.fluxion.utils import image_to_tensor, images_to_tensor, tensor_to_image, tensor_to_images

CHANNELS = {"L": 1, "RGB": 3, "RGBA": 4}


def random_image(mode: str, width: int = 5, height: int = 4) -> Image.Image:
    pixels = torch.randint(0, 256, (height * width * CHANNELS[mode],), dtype=torch.uint8)
    return Image.frombytes(mode, (width, height), bytes(pixels.tolist()))


@pytest.mark.parametrize("mode", CHANNELS)
def test_an_image_becomes_a_tensor_between_zero_and_one(mode: str) -> None:
    image = random_image(mode)
    x = image_to_tensor(image)
    assert x.shape == (1, CHANNELS[mode], 4, 5)
    assert x.dtype == torch.float32
    pixel = image.getpixel((3, 2))
    expected = torch.tensor([pixel] if mode == "L" else pixel, dtype=torch.float32) / 255
    assert torch.equal(x[0, :, 2, 3], expected)


@pytest.mark.parametrize("mode", CHANNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_an_image_survives_the_way_there_and_back(mode: str, dtype: torch.dtype) -> None:
    every = bytes(range(256)) * CHANNELS[mode]
    image = Image.frombytes(mode, (16, 16), every)
    back = tensor_to_image(image_to_tensor(image, dtype=dtype))
    assert back.mode == mode
    assert back.tobytes() == image.tobytes()


def test_pixels_are_divided_in_float32_and_then_cast() -> None:
    image = random_image("RGB")
    assert torch.equal(image_to_tensor(image, dtype=torch.bfloat16), image_to_tensor(image).bfloat16())
    assert image_to_tensor(image, device="meta").is_meta


def test_several_images_become_one_batch_and_back() -> None:
    images = [random_image("RGB") for _ in range(3)]
    batch = images_to_tensor(images)
    assert batch.shape == (3, 3, 4, 5)
    assert [image.tobytes() for image in tensor_to_images(batch)] == [image.tobytes() for image in images]


def test_values_out_of_range_are_clamped_and_others_rounded() -> None:
    x = torch.tensor([-1.0, 0.4 / 255, 0.6 / 255, 254.6 / 255, 7.0]).view(1, 1, 1, 5)
    assert list(tensor_to_image(x).tobytes()) == [0, 0, 1, 255, 255]


def test_a_tensor_that_requires_gradients_becomes_an_image() -> None:
    assert tensor_to_image(torch.zeros(1, 3, 2, 2, requires_grad=True)).size == (2, 2)


def test_other_modes_and_mixed_images_are_refused() -> None:
    with pytest.raises(InputError, match="mode CMYK"):
        image_to_tensor(Image.new("CMYK", (2, 2)))
    with pytest.raises(InputError, match="2 images"):
        images_to_tensor([random_image("RGB"), random_image("L")])
    with pytest.raises(AssertionError):
        images_to_tensor([])


@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 2, 4, 5)], ids=str)
def test_tensors_that_are_no_images_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError):
        tensor_to_images(torch.zeros(shape))


def test_one_image_is_not_several() -> None:
    with pytest.raises(InputError, match="tensor_to_images"):
        tensor_to_image(torch.zeros(2, 3, 4, 5))


def test_nan_is_refused() -> None:
    with pytest.raises(InputError, match="NaN"):
        tensor_to_image(torch.full((1, 1, 2, 2), torch.nan))


def test_without_pillow_the_error_says_how_to_get_it() -> None:
    program = """
import sys
sys.modules["PIL"] = None
import torch
from refiners.fluxion.utils import tensor_to_image
try:
    tensor_to_image(torch.zeros(1, 1, 2, 2))
except ImportError as error:
    assert "pip install" in str(error), error
else:
    raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-c", program], check=True)
