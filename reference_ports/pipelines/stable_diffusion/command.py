"""What `refiners generate` does: a picture of a text, made by a model on disk, with its progress.

Everything that can be wrong is checked before the model is read; what cannot is told when it happens, in one message.
"""

import errno
import math
import warnings
from collections.abc import Callable, Mapping
from collections.abc import Generator as Iterates
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from torch import Generator

from reference_ports.pipelines.stable_diffusion.directory import from_directory
from reference_ports.pipelines.stable_diffusion.extra_channels import EditingModel, ExtraChannelsModel
from reference_ports.pipelines.stable_diffusion.generation import Generation
from reference_ports.pipelines.stable_diffusion.inpainting import inpaint
from reference_ports.pipelines.stable_diffusion.model import LatentDiffusionModel
from reference_ports.pipelines.stable_diffusion.tasks import edit, image_to_image, text_to_image
from reference_ports.pipelines.stable_diffusion.text import PromptTooLongWarning
from reference_ports.solvers import SOLVERS
from refiners.conversion.files import check_writable
from refiners.errors import FileFormatError, InputError
from refiners.fluxion.utils import str_to_dtype

if TYPE_CHECKING:
    from PIL.Image import Image
else:
    Image = object  # so that an annotation needs no Pillow


SUFFIXES: Mapping[str, str] = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""How the file may end → its format."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line was asked for; see `refiners generate --help`."""

    model: Path
    prompt: str
    output: Path
    negative_prompt: str | None = None
    image: Path | None = None
    mask: Path | None = None
    mask_crop: int | None = None
    strength: float | None = None
    solver: str | None = None
    steps: int = 30
    seed: int | None = None
    count: int = 1
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    loras: tuple[str, ...] = ()
    overwrite: bool = False

    @property
    def outputs(self) -> list[Path]:
        """Where the pictures go: the output, or numbered names beside it for several."""
        if self.count == 1:
            return [self.output]
        return [self.output.with_stem(f"{self.output.stem}-{number}") for number in range(1, self.count + 1)]

    def check(self) -> None:
        """Checks what can be checked without the model.

        Raises:
            InputError: an option is out of range, or needs another one.
            FileFormatError: the output cannot be written.
        """
        if self.count < 1:
            raise InputError(f"--count is {self.count}: at least one picture has to be made.")
        for path in self.outputs:
            check_output(path, self.overwrite)
        if self.steps < 1:
            raise InputError(f"--steps is {self.steps}: at least one step is needed.")
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise InputError(f"--seed is {self.seed}: it must fit into 64 bits.")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise InputError(f"--guidance is {self.guidance}: it must be a finite number.")
        if self.solver is not None and self.solver not in SOLVERS:
            raise InputError(f"There is no solver {self.solver!r}. There are {', '.join(SOLVERS)}.")
        if self.mask is not None and self.image is None:
            raise InputError("--mask says which part of a picture to make anew: give the picture with --image.")
        if self.mask_crop is not None and self.mask is None:
            raise InputError("--mask-crop works on what a mask hides: give one with --mask.")
        if self.mask_crop is not None and self.mask_crop < 0:
            raise InputError(f"--mask-crop is {self.mask_crop}: it is a number of pixels, 0 or more.")
        if self.strength is not None and self.image is None:
            raise InputError("--strength says how much of a picture to change: give the picture with --image.")
        if self.image is not None and self.mask is None and (self.height or self.width):
            raise InputError("A picture of a picture has its size: leave --height and --width out.")
        for name, length in (("--height", self.height), ("--width", self.width)):
            if length is not None and (length < 8 or length % 8):
                raise InputError(f"{name} is {length}: it must be a multiple of 8.")
        if not str_to_dtype(self.dtype).is_floating_point:
            raise InputError(f"--dtype is {self.dtype}: models compute in float32, float16, bfloat16 or float64.")
        check_device(self.device)
        for lora in self.loras:
            lora_of(lora)


def generate(**options: Any) -> str:
    """Makes the pictures, writes them, and says what was made.

    Raises:
        InputError: an option cannot be honoured, or the memory does not suffice.
        ConversionError: the model is none of these, or its configuration cannot be honoured.
        FileFormatError: a file cannot be read or written.
    """
    request, console = Request(**options), Console(stderr=True)
    request.check()
    picture, mask = (None if path is None else open_picture(path) for path in (request.image, request.mask))
    seed = torch.seed() % 2**32 if request.seed is None else request.seed
    with torch.no_grad(), warnings_shown(console), enough_memory(request):
        with console.status(f"Loading {request.model}"):
            dtype = str_to_dtype(request.dtype)
            model = from_directory(request.model, solver=request.solver, device=request.device, dtype=dtype)
            for number, (file, scale) in enumerate(map(lora_of, request.loras)):
                model.load_loras(file, name=f"lora_{number}", scale=scale)
        generation = begin(model, request, picture, mask, torch.Generator().manual_seed(seed))
        count = len(generation)
        take_steps(generation, console)
        with console.status("Decoding"):
            images = generation.images()
    for image, path in zip(images, request.outputs, strict=True):
        write_picture(image, path)
    size, solver = f"{images[0].width}x{images[0].height} pixels", type(model.solver).__name__
    where = f"{request.output}: {size}"
    if len(images) > 1:
        where = f"{request.outputs[0]} to {request.outputs[-1].name}: {len(images)} pictures of {size}"
    return f"{where}, {count} step{'' if count == 1 else 's'} of {solver}, seed {seed}."


def lora_of(text: str) -> tuple[Path, float]:
    """A file and a scale, of `FILE` or `FILE:SCALE`. A name that ends like a scale is told from one by being there.

    Raises:
        InputError: the scale is no finite number.
        FileNotFoundError: there is no such file.
    """
    name, colon, last = text.rpartition(":")
    if not colon or Path(text).exists():
        name, last = text, "1"
    try:
        scale = float(last)
    except ValueError as error:
        raise InputError(f"--lora is {text!r}: behind the colon stands the scale, a number such as 0.8.") from error
    if not math.isfinite(scale):
        raise InputError(f"--lora is {text!r}: the scale must be a finite number.")
    if not Path(name).exists():
        raise FileNotFoundError(errno.ENOENT, "There is no such LoRA file", name)
    return Path(name), scale


def begin(
    model: LatentDiffusionModel, request: Request, picture: Image | None, mask: Image | None, generator: Generator
) -> Generation:
    """The task that the options ask for.

    Raises:
        InputError: the model is for another task.
    """
    prompts = {"prompt": request.prompt, "negative_prompt": request.negative_prompt}
    options: dict[str, Any] = {
        "num_inference_steps": request.steps,
        "condition_scale": request.guidance,
        "generator": generator,
        "num_images_per_prompt": request.count,
    }
    if request.strength is not None:
        options["strength"] = request.strength
    if picture is None:
        if isinstance(model, ExtraChannelsModel):
            raise InputError(f"{request.model} works on pictures: give one with --image, and for inpainting a --mask.")
        return text_to_image(model, **prompts, height=request.height, width=request.width, **options)
    if mask is not None:
        height, width = (length - length % 8 for length in (picture.height, picture.width))
        if request.mask_crop is not None:  # the picture keeps its size: the box is worked on at that of the model
            height, width = model.default_size
        size = {"height": request.height or height, "width": request.width or width}
        return inpaint(
            model, **prompts, image=picture, mask=mask, padding_mask_crop=request.mask_crop, **size, **options
        )
    if isinstance(model, EditingModel):
        return edit(model, **prompts, image=picture, **options)
    if isinstance(model, ExtraChannelsModel):
        raise InputError(f"{request.model} fills in what a mask hides: give one with --mask.")
    return image_to_image(model, **prompts, image=picture, **options)


def take_steps(generation: Generation, console: Console) -> None:
    """Takes all steps of a generation, and shows how far it is.

    Raises:
        InputError: the latents are no numbers any more, so that the picture would be black.
    """
    columns = (TextColumn("Denoising"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(generation))
        for latents in generation:
            progress.advance(task)
            if not latents.isfinite().all():
                raise InputError(_why_not_finite(generation.model, step=int(progress.tasks[task].completed)))


def _why_not_finite(model: LatentDiffusionModel, step: int) -> str:
    spoilt = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    problem = f"After step {step} the latents hold NaN or infinity: the picture would be black."
    if spoilt:
        more = f" and {len(spoilt) - 3} more" if len(spoilt) > 3 else ""
        return f"{problem} So do weights of the model: {', '.join(spoilt[:3])}{more}. Fetch the checkpoint again."
    return f"{problem} Compute in another precision (--dtype bfloat16 or float32); this was {model.dtype}."


def check_output(output: Path, overwrite: bool) -> None:
    """Checks where the picture shall go, before the work.

    Raises:
        FileFormatError: it is there already, its folder is not, or its format is unknown.
    """
    if output.is_file() and not overwrite:
        raise FileFormatError(f"{output} exists. Nothing was made. Choose another path, or replace it with --force.")
    check_writable(output, overwrite)
    if output.suffix.lower() not in SUFFIXES:
        raise FileFormatError(
            f"{output}: the format is told from the name, which has to end with {', '.join(SUFFIXES)}."
        )


def check_device(name: str) -> None:
    """Checks that a device is there.

    Raises:
        InputError: it is not.
    """
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"The device {name!r} cannot be used: {str(error).splitlines()[0]}") from error


def open_picture(path: Path) -> Image:
    """A picture from a file.

    Raises:
        FileFormatError: the file holds no picture.
        FileNotFoundError: there is no such file.
    """
    from PIL import Image as pil
    from PIL import UnidentifiedImageError

    try:
        with pil.open(path) as image:
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise FileFormatError(f"{path} holds no picture that Pillow can read.") from error


def write_picture(image: Image, path: Path) -> None:
    """Writes a picture beside its path and renames it, so that it appears whole or not at all."""
    beside = path.with_name(f".{path.name}.part")
    try:
        image.save(beside, format=SUFFIXES[path.suffix.lower()])
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def warnings_shown(console: Console) -> Iterates[None]:
    """Prints warnings as messages, without the line of code that they come from."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        console.print(Text.assemble(("Warning: ", "bold yellow"), str(message)), soft_wrap=True)

    with warnings.catch_warnings():
        warnings.simplefilter("always", PromptTooLongWarning)
        warnings.showwarning = show
        yield


@contextmanager
def enough_memory(request: Request) -> Iterates[None]:
    """Says what to do when the memory does not suffice.

    Raises:
        InputError: it does not.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(
            f"The memory of {request.device} does not suffice. Make a smaller picture (--height, --width), or compute "
            f"in half precision (--dtype bfloat16); this was {request.dtype}."
        ) from error


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, says that there is no memory left."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error):
            return True
        error = error.__cause__
    return False


COMMANDS: Mapping[str, Callable[..., str]] = {"generate": generate}
"""What the command line finds through the entry point `refiners.commands`."""
