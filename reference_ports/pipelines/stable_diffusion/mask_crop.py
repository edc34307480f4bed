"""Inpainting at close range: the surroundings of what a mask hides are cut out, worked on at full size, and put back.

A small hidden part of a large picture then gets all the pixels that the model has, and the rest keeps its own.

Follows: `padding_mask_crop` of the inpainting pipelines of diffusers 0.42.1.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from reference_ports.blocks.pictures import Picture
from refiners.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image
else:
    Image = object  # so that an annotation needs no Pillow


@dataclass(frozen=True)
class MaskCrop:
    """A box of a picture, worked on at another size.

    Receives:
        picture, mask: the whole picture, and what is hidden of it in white.
        box: left, top, right and bottom, in pixels.
        size: width and height to work at.
    """

    picture: Image
    mask: Image
    box: tuple[int, int, int, int]
    size: tuple[int, int]

    @classmethod
    def around(cls, picture: Picture, mask: Picture, height: int, width: int, padding: int) -> Self:
        """The box around what a mask hides, with some pixels more on each side, in the proportions of a size.

        Raises:
            InputError: one of the two is no PIL image, they differ in size, or the mask hides nothing.
        """
        from PIL import Image as pil

        if not isinstance(picture, pil.Image) or not isinstance(mask, pil.Image):
            raise InputError("A crop around the mask needs one PIL image for the picture and one for the mask.")
        if picture.size != mask.size:
            raise InputError(
                f"The picture has {picture.width}x{picture.height} pixels, the mask {mask.width}x{mask.height}: a crop "
                "around the mask needs both of one size."
            )
        if type(padding) is not int or padding < 0:
            raise InputError(f"padding_mask_crop is {padding!r}: it must be a whole number of pixels, 0 or more.")
        hidden = mask.convert("L").getbbox()
        if hidden is None:
            raise InputError("The mask is black all over: it hides nothing that could be made anew.")
        left, top, right, bottom = hidden
        across = max(left - padding, 0), min(right + padding, mask.width)
        along = max(top - padding, 0), min(bottom + padding, mask.height)
        box_width, box_height = across[1] - across[0], along[1] - along[0]
        if box_width / box_height > width / height:
            along = _widened(*along, int(box_width / (width / height) - box_height), mask.height)
        else:
            across = _widened(*across, int(box_height * (width / height) - box_width), mask.width)
        return cls(picture, mask, (across[0], along[0], across[1], along[1]), (width, height))

    def cut(self, image: Image) -> Image:
        """What the box shows of a picture or a mask, fitted into the size. The edges fill what is left over."""
        from PIL import Image as pil

        box = image.crop(self.box)
        width, height = self.size
        inner_width, inner_height = _fitted(box.size, self.size)
        fitted = box.resize((inner_width, inner_height), resample=pil.Resampling.LANCZOS)
        filled = pil.new("RGB", self.size)
        left, top = width // 2 - inner_width // 2, height // 2 - inner_height // 2
        filled.paste(fitted, box=(left, top))
        if top > 0:
            first, last = (0, 0, width, 0), (0, inner_height, width, inner_height)
            filled.paste(fitted.resize((width, top), box=first), box=(0, 0))
            filled.paste(fitted.resize((width, top), box=last), box=(0, top + inner_height))
        if left > 0:
            first, last = (0, 0, 0, height), (inner_width, 0, inner_width, height)
            filled.paste(fitted.resize((left, height), box=first), box=(0, 0))
            filled.paste(fitted.resize((left, height), box=last), box=(left + inner_width, 0))
        return filled

    def put_back(self, image: Image) -> Image:
        """The whole picture, with what was made of the box where the mask hides it."""
        from PIL import Image as pil
        from PIL import ImageOps

        left, top, right, bottom = self.box
        size = right - left, bottom - top
        covering = _fitted(image.size, size, covers=True)
        resized = image.resize(covering, resample=pil.Resampling.LANCZOS)
        made = pil.new("RGB", size)
        made.paste(resized, box=(size[0] // 2 - covering[0] // 2, size[1] // 2 - covering[1] // 2))
        below = pil.new("RGBA", self.picture.size)
        below.paste(made, (left, top))
        below = below.convert("RGB").convert("RGBA")
        shown = pil.new("RGBa", self.picture.size)
        shown.paste(self.picture.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(self.mask.convert("L")))
        below.alpha_composite(shown.convert("RGBA"))
        return below.convert("RGB")


def _widened(start: int, end: int, more: int, limit: int) -> tuple[int, int]:
    """A stretch made longer on both sides, and moved or cut where it would leave 0 … limit."""
    start, end = start - more // 2, end + more - more // 2
    if end >= limit:
        start, end = start - (end - limit), limit
    if start < 0:
        start, end = 0, end - start
    return start, min(end, limit)


def _fitted(inner: tuple[int, int], outer: tuple[int, int], *, covers: bool = False) -> tuple[int, int]:
    """The width and height of the proportions of `inner` that just fit into `outer`, or just cover it.

    Raises:
        InputError: one of them would be nothing.
    """
    own, wanted = inner[0] / inner[1], outer[0] / outer[1]
    by_width = wanted > own if covers else wanted < own
    width, height = (
        (outer[0], inner[1] * outer[0] // inner[0]) if by_width else (inner[0] * outer[1] // inner[1], outer[1])
    )
    if not width or not height:
        raise InputError(
            f"What the mask hides is too narrow: {inner[0]}x{inner[1]} pixels cannot be fitted into {outer[0]}x"
            f"{outer[1]}. Raise padding_mask_crop."
        )
    return width, height
