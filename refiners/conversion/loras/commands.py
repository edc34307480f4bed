"""What `refiners loras` prints: what a LoRA file holds, and what a conversion has written."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from refiners.conversion.loras.file import LoraEntry, LoraFile
from refiners.conversion.loras.matching import LoraSpecs, specs_for
from refiners.conversion.loras.names import LoraNames
from refiners.conversion.loras.reading import METADATA, read_loras
from refiners.conversion.loras.recognition import by_sight, models_of, recognise_part
from refiners.conversion.loras.writing import LAYOUTS, lora_file, write_file
from refiners.conversion.workplace import size_of
from refiners.errors import ConversionError

_SHOWN = 60


def show(path: Path) -> None:
    """Prints what a file holds: its layout, and for each part the model, the methods, ranks and alphas."""
    file = read_loras(path)
    console = Console(highlight=False)
    nbytes = sum(tensor.nbytes for tensor in file.tensors.values())
    console.print(f"{path}: LoRAs in the layout of {file.layout}, {len(file)} layers, {size_of(nbytes)}", markup=False)
    table = Table("part", "made for", "layers", "method", "rank", "alpha", "type", box=None, header_style="bold")
    for part in file.parts:
        table.add_row(part or "-", title_of(file, part), *_row(file.of_part(part)))
    console.print(table)
    for title, entries in (("metadata", described(file.metadata)), (CONFIG_TITLE, described(_said(file)))):
        if entries:
            table = Table(title, "", box=None, header_style="bold")
            for name, text in entries.items():
                table.add_row(name, text)
            console.print("", table)


CONFIG_TITLE = "configuration"


def _said(file: LoraFile) -> dict[str, str]:
    """What peft's configuration says, without what is empty."""
    return {name: str(value) for name, value in sorted((file.config or {}).items()) if value not in (None, {}, [], "")}


def _row(entries: list[LoraEntry]) -> list[str]:
    specs = [entry.spec for entry in entries]
    alphas = (f"{spec.alpha:g}" if spec.alpha is not None else "none" for spec in specs)
    kinds = (str(tensor.dtype).removeprefix("torch.") for spec in specs for tensor in spec.tensors.values())
    return [
        str(len(entries)),
        _common(spec.method for spec in specs),
        _common(str(spec.rank or "full") for spec in specs),
        _common(alphas),
        _common(kinds),
    ]


def _common(values: Iterable[str]) -> str:
    """The values, the most frequent first, and how many there are of each where there are several."""
    counts = Counter(values).most_common()
    if len(counts) == 1:
        return counts[0][0]
    shown = [f"{value} (x{count})" for value, count in counts[:4]]
    return ", ".join(shown + ([f"… {len(counts) - 4} more"] if len(counts) > 4 else []))


def title_of(file: LoraFile, part: str) -> str:
    """What a part of a file is made for, in words."""
    return recognise_part(file, part) or by_sight(file) or "unknown"


def described(metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata to be shown: long entries are cut off, since kohya's scripts keep whole tables there."""
    return {
        key: text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({len(text)} characters)"
        for key, text in sorted(metadata.items())
    }


def convert(path: Path, layout: str, target: Path, force: bool = False) -> None:
    """Writes a file in another layout, under the names of the model that it is made for, and prints what was written.

    Raises:
        ConversionError: no known model fits the file, or the layout has no place for it. Lists all.
    """
    if layout not in LAYOUTS:
        raise ConversionError(f'No layout is called "{layout}". There are {", ".join(LAYOUTS)}.')
    file = read_loras(path)
    specs: dict[str, LoraSpecs] = {}
    names: dict[str, LoraNames] = {}
    for part in file.parts:
        found = model_of(file, part)
        named = part or found.part
        specs[named], names[named] = specs_for(file, found, part=part), found
    converted = lora_file(specs, names, layout=layout, metadata=kept(file))
    write_file(target, converted, force)
    parts = ", ".join(f"{len(converted.of_part(part))} layers of {part or 'one model'}" for part in converted.parts)
    Console(highlight=False).print(f"{target}: {parts}, in the layout of {layout}.", markup=False, soft_wrap=True)


def kept(file: LoraFile) -> dict[str, str]:
    """The metadata that stays true in another layout."""
    return {key: text for key, text in file.metadata.items() if key != METADATA}


def model_of(file: LoraFile, part: str) -> LoraNames:
    """The names of the layers of the published model that one part of a file is made for.

    Raises:
        ConversionError: none fits.
    """
    found = models_of(file, part)
    if found:
        return found[0].names
    looks = recognise_part(file, part) or by_sight(file)
    raise ConversionError(
        f"{file.title}: no published model of this project has the layers of its part {part or '-'!r}"
        + (f"; it looks like a LoRA of {looks}. " if looks else ". ")
        + "Nothing was written. From Python, give the model: write_loras(path, file.specs_for(model), model)."
    )
