"""LoRA files for whole models: one call reads a file, one object holds what it put into the denoiser and the encoders.

    style = model.load_loras("style.safetensors", name="style", scale=0.8)
    style.scale = 0.5
    style.eject()

Follows: `load_lora_weights`, `set_adapters` and `delete_adapters` of the pipelines of diffusers 0.42.1.

Differs from upstream:
- A file that does not fit is refused before the model is touched. Upstream passes over what it does not know, such as
  a file without a key for the denoiser.
- LoHa, LoKr and DoRA in kohya's layout are honoured. Upstream refuses the first two, and drops the scales of the last.
- The alphas of kohya's files count layer by layer. Upstream gives all projections of attentions that of most layers.
- `add_embedding` of Stable Diffusion XL counts under diffusers' names in kohya's layout too. Upstream loses it.
"""

from collections.abc import Generator as Iterates
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from refiners.conversion.loras import LoraFile, read_loras, specs_for_parts, write_loras
from refiners.fluxion.adapters import LoraSet, inject_loras
from refiners.fluxion.layers.journal import all_or_nothing

PARTS = ("unet", "text_encoder", "text_encoder_2")
"""What of a model a LoRA file can be for."""


class ModelLoras:
    """The LoRAs that one file has put into a model, as one object.

    Attributes:
        name: what they are called.
        sets: those of each part.
        file: where they are from.
    """

    def __init__(self, name: str, sets: Mapping[str, LoraSet], file: LoraFile) -> None:
        self.name = name
        self.sets = dict(sets)
        self.file = file

    def __len__(self) -> int:
        return sum(len(loras) for loras in self.sets.values())

    def __repr__(self) -> str:
        parts = ", ".join(f"{len(loras)} layers of {part}" for part, loras in self.sets.items())
        return f"ModelLoras({self.name!r}, {parts})"

    @property
    def scale(self) -> float:
        """How strong they are, 1.0 being as trained; for one part alone, set `sets[part].scale`.

        Raises:
            AdapterError: (a ValueError) read, while parts or layers differ from one another.
        """
        scales = {loras.scale for loras in self.sets.values()}
        return scales.pop() if len(scales) == 1 else min(self.sets.values(), key=len).scale

    @scale.setter
    def scale(self, value: float) -> None:
        for loras in self.sets.values():
            loras.scale = value

    @property
    def enabled(self) -> bool:
        """Whether they count. False is, bit by bit, the model without them."""
        return all(loras.enabled for loras in self.sets.values())

    @enabled.setter
    def enabled(self, value: bool) -> None:
        for loras in self.sets.values():
            loras.enabled = value

    @contextmanager
    def disabled(self) -> Iterates[None]:
        """The model without them, while the block runs."""
        before = {part: loras.enabled for part, loras in self.sets.items()}
        self.enabled = False
        try:
            yield
        finally:
            for part, loras in self.sets.items():
                loras.enabled = before[part]

    def parameters(self) -> Iterator[nn.Parameter]:
        """The weights, for an optimizer."""
        for loras in self.sets.values():
            yield from loras.parameters()

    @all_or_nothing
    def eject(self) -> None:
        """Takes them out of all parts, or out of none if one fails.

        Raises:
            AdapterError: (a ValueError) they were ejected already.
        """
        for loras in self.sets.values():
            loras.eject()

    def write(self, path: Path | str, layout: str = "diffusers", overwrite: bool = False) -> None:
        """Writes them to a file, with what the file they came from said about itself. See `write_loras`.

        Raises:
            ConversionError: the layout has no place for them.
            FileFormatError: the path is there already, or cannot be written to.
        """
        specs = {part: loras.specs() for part, loras in self.sets.items()}
        models = {part: loras.root for part, loras in self.sets.items()}
        write_loras(path, specs, models, layout=layout, metadata=self.file.metadata, overwrite=overwrite)


@all_or_nothing
def load_loras(
    model: nn.Module,
    source: Path | str | Mapping[str, Tensor] | LoraFile,
    name: str = "lora",
    scale: float = 1.0,
    *,
    strict: bool = True,
) -> ModelLoras:
    """Puts the LoRAs of a file into all parts of a model, or changes nothing if anything fails.

    Receives:
        model: what has the parts `unet`, and perhaps `text_encoder` and `text_encoder_2`.
        source: a LoRA file in any layout, a folder of diffusers, a state dict, or what `read_loras` has read.
        name: what the LoRAs are called.
        scale: how strong they are.
        strict: False leaves out what does not fit; `specs_for` of the file tells what.

    Raises:
        FileFormatError: the file is truncated, corrupted, a pickle or of another format.
        ConversionError: it does not fit the model. Lists what is wrong in any part, and says which model it looks made
            for.
        AdapterError: the model has LoRAs of that name already, or these would change nothing.
    """
    file = source if isinstance(source, LoraFile) else read_loras(source, strict=False)
    trees = {part: getattr(model, part) for part in PARTS if isinstance(getattr(model, part, None), nn.Module)}
    specs = specs_for_parts(file, trees, strict=strict)
    changes = any(not spec.changes_nothing() for found in specs.values() for spec in found.values())
    sets = {
        part: inject_loras(trees[part], found, name=name, scale=scale, allow_no_change=changes)
        for part, found in specs.items()
    }
    return ModelLoras(name, sets, file)
