"""What `refiners convert` and `refiners ports` print: progress while bytes move, then what was written."""

import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from refiners.conversion.bundle import Bundle
from refiners.conversion.convert import convert_file
from refiners.conversion.directory import convert_directory, verify_directory
from refiners.conversion.opening import MANIFEST
from refiners.conversion.port import Port
from refiners.conversion.workplace import size_of
from refiners.conversion.writing import Progress as Step
from refiners.errors import ConversionError, FileFormatError

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


class Bars:
    """A bar for what is written, and one for what is read again, in a terminal; nothing elsewhere."""

    def __init__(self, console: Console) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._tasks: dict[bool, TaskID] = {}

    def begin(self, nbytes: int, writes: bool = True) -> None:
        """Shows the bars, for this many bytes."""
        if writes:
            self._tasks[False] = self.progress.add_task("writing", total=nbytes)
        self._tasks[True] = self.progress.add_task("verifying", total=nbytes)

    def report(self, step: Step) -> None:
        """Moves the bar on by one tensor."""
        what = "verifying" if step.verified else "kept" if step.kept else "writing"
        if (task := self._tasks.get(step.verified)) is not None:
            self.progress.update(task, advance=step.nbytes, description=f"{what} {step.part}")


@contextmanager
def bars(console: Console) -> Generator[Bars, None, None]:
    """Bars while the block runs."""
    shown = Bars(console)
    with shown.progress:
        yield shown


@dataclass(frozen=True)
class Options:
    """What the command line says beside the names. See `refiners convert --help`."""

    config: Path | None = None
    tokenizer: Path | None = None
    variant: str | None = None
    dtype: str | None = None
    force: bool = False


def convert_port(port: Port, source: Path, target: Path, options: Options) -> None:
    """Converts for one port, and prints what was written."""
    if options.tokenizer is not None:
        raise ConversionError(f"--tokenizer is for models of several parts, and {port.name} is one port.")
    if target.is_file() and not options.force:
        raise FileFormatError(f"{target} exists. Nothing was written. Choose another path, or replace it with --force.")
    with bars(Console(stderr=True)) as shown:
        result = convert_file(
            port,
            source,
            target,
            config=options.config,
            overwrite=options.force,
            variant=options.variant,
            dtype=dtype_of(options.dtype),
            report=shown.report,
            begin=shown.begin,
        )
    kept = f" ({result.kept} of them kept from before)" if result.kept else ""
    say(f"{target}: {result.tensors} tensors of {port.name}, from {source}{kept}.")
    warn(result.warnings)


def convert_bundle(
    bundles: Mapping[str, Bundle], kind: str | None, source: Path, target: Path, options: Options
) -> None:
    """Converts a model of several parts, and prints what was written."""
    with bars(Console(stderr=True)) as shown:
        result = convert_directory(
            source,
            target,
            bundles,
            kind,
            variant=options.variant,
            dtype=dtype_of(options.dtype),
            configs=options.config,
            tokenizer=options.tokenizer,
            overwrite=options.force,
            report=shown.report,
            begin=shown.begin,
        )
    say(f"{target}: {bundles[result.kind].title}, from {source}.")
    table = Table("file", "tensors", "size", "", box=None, header_style="bold")
    for part in result.parts.values():
        kept = f"{part.kept} kept from before" if part.kept else ""
        table.add_row(part.path.name, str(part.tensors), size_of(part.nbytes), kept)
    Console(highlight=False).print(table)
    for note in result.notes:
        say(note)
    warn(result.warnings)


def verify(path: Path) -> None:
    """Reads a converted model again, and says that it is what was written."""
    if not (path / MANIFEST).is_file():
        raise FileFormatError(
            f"{path} is no converted model: it holds no {MANIFEST}. Give the folder that was written."
        )
    with bars(Console(stderr=True)) as shown:
        shown.begin(sum(file.stat().st_size for file in path.glob("*.safetensors")), writes=False)
        count = verify_directory(path, shown.report)
    kind = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["kind"]
    say(f"{path}: {count} tensors of {kind}, each as it was written.")


def list_all(ports: Mapping[str, Port], bundles: Mapping[str, Bundle]) -> None:
    """Prints the names that `refiners convert` takes."""
    console = Console()
    table = Table("model", "what it is", "its parts", box=None, header_style="bold")
    for name, bundle in bundles.items():
        if bundle.parts:
            table.add_row(name, bundle.summary, ", ".join(part.name for part in bundle.parts))
    if table.row_count:
        console.print(table, "")
    table = Table("port", "what it is", box=None, header_style="bold")
    for name, port in ports.items():
        table.add_row(name, port.summary)
    console.print(table)


def dtype_of(name: str | None) -> torch.dtype | None:
    """The type of that name.

    Raises:
        ConversionError: there is none.
    """
    if name is None:
        return None
    if name not in _DTYPES:
        raise ConversionError(f'"{name}" is no type for weights. Choose one of {", ".join(_DTYPES)}.')
    return _DTYPES[name]


def warn(warnings: tuple[str, ...]) -> None:
    """Prints what is odd about the weights, on the error stream."""
    console = Console(stderr=True)
    for warning in warnings[:20]:
        console.print(Text.assemble(("Warning: ", "bold yellow"), warning), soft_wrap=True)
    if len(warnings) > 20:
        console.print(f"Warning: … and {len(warnings) - 20} more", soft_wrap=True)


def say(text: str) -> None:
    """Prints one line as it is."""
    Console(highlight=False, markup=False).print(text, soft_wrap=True)
