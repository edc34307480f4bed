"""Inpainting at close range: which box is cut out, and that the rest of the picture keeps its pixels."""

from typing import Any

import pytest
import torch
from PIL import Image

from reference_ports.pipelines.stable_diffusion import LatentDiffusionModel, inpaint
from reference_ports.pipelines.stable_diffusion.mask_crop import MaskCrop
from refiners.errors import InputError
from refiners.fluxion.utils import no_grad


def picture(width: int = 60, height: int = 40) -> Image.Image:
    return Image.effect_noise((width, height), 80).convert("RGB")


def mask(*box: int, width: int = 60, height: int = 40) -> Image.Image:
    made = Image.new("L", (width, height))
    made.paste(255, box or (0, 0, width, height))
    return made


@pytest.mark.parametrize(
    ("hidden", "padding", "box"),
    [
        ((20, 10, 30, 20), 0, (20, 10, 30, 20)),
        ((20, 10, 30, 20), 5, (15, 5, 35, 25)),
        ((20, 10, 40, 20), 0, (20, 5, 40, 25)),  # made as high as it is wide
        ((0, 0, 4, 20), 0, (0, 0, 20, 20)),  # moved to where there is some picture
        ((50, 38, 60, 40), 2, (48, 28, 60, 40)),
        ((0, 0, 60, 40), 9, (0, 0, 60, 40)),  # a square of 60 would leave the picture
    ],
)
def test_the_box_has_the_proportions_of_the_result_where_the_picture_lets_it(
    hidden: tuple[int, ...], padding: int, box: tuple[int, ...]
) -> None:
    assert MaskCrop.around(picture(), mask(*hidden), 32, 32, padding).box == box


def test_what_is_cut_out_fills_the_size_and_is_put_back_where_it_was() -> None:
    whole = picture()
    crop = MaskCrop.around(whole, mask(20, 10, 30, 20), 40, 40, padding=5)
    assert crop.cut(whole).size == (40, 40)
    made = crop.put_back(Image.new("RGB", (40, 40), "red"))
    assert made.crop((20, 10, 30, 20)).getcolors() == [(100, (255, 0, 0))]
    made.paste(whole.crop((20, 10, 30, 20)), (20, 10))
    assert made.tobytes() == whole.tobytes()


@no_grad()
def test_a_generation_gives_the_whole_picture_back(model: LatentDiffusionModel, call: dict[str, Any]) -> None:
    whole, hidden = picture(), mask(20, 10, 30, 20)
    generation = inpaint(model, "a hat", whole, hidden, **call, padding_mask_crop=4, num_images_per_prompt=2)
    first, second = generation.images()
    assert first.size == second.size == whole.size
    assert first.tobytes() != second.tobytes()
    assert first.crop((0, 0, 60, 10)).tobytes() == whole.crop((0, 0, 60, 10)).tobytes()
    assert generation.pixels().shape == (2, 3, 32, 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": mask(0, 0, 0, 0)}, "black all over"),
        ({"mask": mask(1, 1, 5, 5, width=50)}, "60x40 pixels, the mask 50x40"),
        ({"mask": torch.ones(40, 60)}, "needs one PIL image"),
        ({"padding_mask_crop": -1}, "padding_mask_crop is -1"),
        ({"padding_mask_crop": 0, "mask": mask(3, 3, 4, 40), "width": 32 * 8, "height": 8}, None),
        ({"padding_mask_crop": 0, "image": picture(60, 1), "mask": mask(height=1), "height": 64}, "too narrow"),
    ],
)
def test_what_cannot_be_cut_out_is_refused(
    changes: dict[str, Any], message: str | None, model: LatentDiffusionModel, call: dict[str, Any]
) -> None:
    given = {"image": picture(), "mask": mask(20, 10, 30, 20), "padding_mask_crop": 4, **call, **changes}
    if message is None:
        assert len(inpaint(model, "a hat", **given)) == 2
        return
    with pytest.raises(InputError, match=message):
        inpaint(model, "a hat", **given)
