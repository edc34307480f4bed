"""CLIP's image preprocessing: a picture to the pixels that its image encoders read.

The shorter side is resized to the size of the model, the middle is cut out as a square, the 256 levels become numbers
in [0, 1], and each channel is centred and scaled with the statistics of CLIP's training set.

Follows: `transformers.CLIPImageProcessorPil` 5.23.0.

Differs from upstream:
- Pictures come as PIL images only, and always become RGB.
- One picture or many give one tensor; lists of arrays are not offered.
"""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

MEAN = (0.48145466, 0.4578275, 0.40821073)
STANDARD_DEVIATION = (0.26862954, 0.26130258, 0.27577711)


class CLIPImageProcessor:
    """Turns pictures into the pixels that CLIP's image encoders read.

    Receives:
        size: the length of the shorter side after resizing, in pixels.
        crop_size: height and width of what is cut out of the middle, in pixels; `size` for both when not given. Where
            it reaches past the picture, black is added.
        mean, standard_deviation: one number a channel, for levels in [0, 1].

    Example:
        >>> picture = Image.new("RGB", (640, 480), "orange")
        >>> CLIPImageProcessor(size=224)(picture).shape
        torch.Size([1, 3, 224, 224])
    """

    def __init__(
        self,
        size: int = 224,
        crop_size: tuple[int, int] | None = None,
        mean: Sequence[float] = MEAN,
        standard_deviation: Sequence[float] = STANDARD_DEVIATION,
    ) -> None:
        self.size = size
        self.crop_size = (size, size) if crop_size is None else crop_size
        self.mean = tuple(mean)
        self.standard_deviation = tuple(standard_deviation)

    def __call__(self, pictures: Image.Image | Sequence[Image.Image]) -> Tensor:
        """Pictures of any size and mode to pixels: Float32[Tensor, "batch 3 height width"]."""
        several = [pictures] if isinstance(pictures, Image.Image) else pictures
        return torch.stack([self._process(picture) for picture in several])

    def _process(self, picture: Image.Image) -> Tensor:
        resized = resize_shorter_side(flatten_to_rgb(picture), self.size)
        levels = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8)
        levels = levels.reshape(resized.height, resized.width, 3).permute(2, 0, 1)  # 3 height width
        levels = crop_middle(levels, self.crop_size)
        # The product is rounded twice, from float64 to float32, as upstream's is.
        pixels = (levels.to(torch.float64) * (1 / 255)).to(torch.float32)
        mean = torch.tensor(self.mean, dtype=torch.float32).reshape(3, 1, 1)
        standard_deviation = torch.tensor(self.standard_deviation, dtype=torch.float32).reshape(3, 1, 1)
        return (pixels - mean) / standard_deviation


def flatten_to_rgb(picture: Image.Image) -> Image.Image:
    """The picture in RGB, laid on white where it is transparent."""
    if "A" not in picture.getbands() and picture.info.get("transparency") is None:
        return picture.convert("RGB")
    transparent = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", transparent.size, "white"), transparent).convert("RGB")


def resize_shorter_side(picture: Image.Image, size: int) -> Image.Image:
    """Resizes with PIL's bicubic filter so that the shorter side measures `size`; the longer one is rounded down."""
    width, height = picture.size
    if width <= height:
        return picture.resize((size, int(size * height / width)), resample=Image.Resampling.BICUBIC)
    return picture.resize((int(size * width / height), size), resample=Image.Resampling.BICUBIC)


def crop_middle(levels: Tensor, crop_size: tuple[int, int]) -> Tensor:
    """Cuts the middle out of Tensor "channels height width", with zeros where the crop reaches past it."""
    height, width = levels.shape[-2:]
    # In a larger frame, half a pixel more goes above and to the left; in a smaller one, below and to the right.
    top_pad, left_pad = (max(crop - side + 1, 0) // 2 for crop, side in zip(crop_size, (height, width), strict=True))
    frame_height, frame_width = max(crop_size[0], height), max(crop_size[1], width)
    frame = levels.new_zeros(*levels.shape[:-2], frame_height, frame_width)
    frame[..., top_pad : top_pad + height, left_pad : left_pad + width] = levels
    top = (height - crop_size[0]) // 2 + top_pad
    left = (width - crop_size[1]) // 2 + left_pad
    return frame[..., max(0, top) : top + crop_size[0], max(0, left) : left + crop_size[1]]
