"""A published model converted to a folder of its ports' weights: what `refiners convert sd15 DIR out/` does.

The folder holds one safetensors file a part, in the port's own keys, the tokenizers' files, and refiners.json: the
configurations, and the SHA-256 of every tensor. It is written tensor by tensor and read again at the end; interrupted,
the same conversion goes on where it was; until all is done nothing stands under its name.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refiners.conversion.config import read_config
from refiners.conversion.files import read_header
from refiners.conversion.header import Header
from refiners.conversion.lazy import ConvertedWeights
from refiners.conversion.opening import MANIFEST, OpenedModel, open_directory
from refiners.conversion.recognise import Bundles
from refiners.conversion.workplace import sources_of, tidy, workplace
from refiners.conversion.writing import Progress, Report, StreamedFile, differing, digest_of, writing_to
from refiners.errors import FileFormatError

FORMAT = 1


@dataclass(frozen=True)
class ConvertedPart:
    """One file that a conversion wrote.

    Attributes:
        name: the part, such as `unet`.
        path: its file.
        tensors: how many tensors it holds.
        nbytes: how long it is.
        kept: how many tensors an interrupted conversion had written before.
        not_finite: the tensors with values that are no numbers, and what they are.
    """

    name: str
    path: Path
    tensors: int
    nbytes: int
    kept: int
    not_finite: Mapping[str, str]


@dataclass(frozen=True)
class ConvertedModel:
    """What a conversion wrote.

    Attributes:
        path: the folder.
        kind: the name of the bundle.
        parts: its files by part.
        warnings: what is odd about the weights, one line each.
        notes: what was left out, or is not there, one line each.
    """

    path: Path
    kind: str
    parts: Mapping[str, ConvertedPart]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]


def convert_directory(
    in_path: Path | str,
    out_path: Path | str,
    bundles: Bundles,
    kind: str | None = None,
    *,
    variant: str | None = None,
    dtype: torch.dtype | None = None,
    configs: Path | str | None = None,
    tokenizer: Path | str | None = None,
    overwrite: bool = False,
    report: Report | None = None,
    begin: Callable[[int], None] | None = None,
) -> ConvertedModel:
    """Converts a published model, in a folder or a single file, to a folder of its ports' weights.

    Receives:
        in_path: the model.
        out_path: the folder to write, which may be there if it is empty.
        bundles: what the model may be.
        kind: the name of its bundle; recognised from keys and shapes by default.
        variant: which of several sets of weights in a folder to take, such as `fp16`.
        dtype: the type of the floating-point weights; that of the file by default.
        configs: for a single file of other sizes than the published ones, a folder with `unet/config.json` and so on.
        tokenizer: for a single file, a folder with the tokenizer's files, or with `tokenizer` folders.
        overwrite: whether an earlier conversion at `out_path` may be replaced.
        report: called after each tensor.
        begin: called with the number of bytes to write, before the first is written.

    Raises:
        ConversionError: the weights are those of another model, or do not fit. Lists all that does not.
        FileFormatError: a file cannot be read or written.
    """
    target = Path(out_path)
    if target.is_symlink():
        target = target.resolve()  # a link stays one: what it points at is written
    _check_target(target, overwrite)
    model = open_directory(in_path, bundles, kind, variant, configs)
    tokenizers = _tokenizers(model, tokenizer)
    headers = {name: _header(part.weights.meta(), dtype) for name, part in model.parts.items()}
    unread = [
        f"{name}: {line}"
        for name, part in model.parts.items()
        if isinstance(part.weights, ConvertedWeights)
        for line in part.weights.check_values()
    ]
    nbytes = sum(header.size for header in headers.values())
    beside = sum(file.stat().st_size for source in tokenizers.values() for file in _files(source))
    with workplace(target, _plan(model, headers, dtype), nbytes + beside, overwrite) as folder:
        if begin is not None:
            begin(nbytes)
        written: dict[str, StreamedFile] = {}
        parts: dict[str, ConvertedPart] = {}
        for name, part in model.parts.items():
            written[name] = StreamedFile(folder, f"{name}.safetensors", headers[name])
            parts[name] = _write(name, written[name], part.weights, target, report)
        with writing_to(target):
            _copy(tokenizers, folder)
            _write_manifest(folder, model, written, tokenizers, dtype)
            tidy(folder)
            _rename(folder, target)
    warnings = [
        f"{name}: {key}, made of {' and '.join(model.parts[name].weights.origin(key))}, holds {what}"
        for name, part in parts.items()
        for key, what in part.not_finite.items()
    ]
    return ConvertedModel(target, model.kind, parts, tuple(warnings + unread), tuple(_notes(model, tokenizers)))


def _plan(model: OpenedModel, headers: Mapping[str, Header], dtype: torch.dtype | None) -> dict[str, Any]:
    """What is being converted: an interrupted conversion goes on if all of it is still the same."""
    files = dict.fromkeys(file for part in model.parts.values() for file in part.stored.files)
    return {
        "format": FORMAT,
        "kind": model.kind,
        "dtype": None if dtype is None else str(dtype),
        "headers": {name: hashlib.sha256(header.encode()).hexdigest() for name, header in headers.items()},
        "sources": sources_of(list(files)),
    }


def verify_directory(path: Path | str, report: Report | None = None) -> int:
    """Reads all of a converted folder again and compares it with the digests in its refiners.json.

    Returns:
        the number of tensors.

    Raises:
        FileFormatError: a file is missing, or holds other bytes than it did. Lists all that differs.
    """
    folder = Path(path)
    manifest = read_config(folder / MANIFEST)
    problems: list[str] = []
    count = 0
    try:
        for name, entry in manifest["parts"].items():
            problems += _differing_part(folder, name, entry, report)
            count += len(entry["tensors"])
        for name, files in manifest["tokenizers"].items():
            paths = {folder / name / file: digest for file, digest in files.items()}
            problems += [f"{p} is not there" for p in paths if not p.is_file()]
            problems += [f"{p} holds other bytes" for p, d in paths.items() if p.is_file() and digest_of(p) != d]
    except (KeyError, TypeError, AttributeError) as error:
        raise FileFormatError(f"{folder / MANIFEST} lacks {error}. Convert the model again.") from error
    if problems:
        lines = "\n  ".join(problems[:12]) + (f"\n  … and {len(problems) - 12} more" if len(problems) > 12 else "")
        raise FileFormatError(
            f"{folder} is not what was converted, {len(problems)} differences:\n  {lines}\nConvert the model again."
        )
    return count


def _differing_part(folder: Path, name: str, entry: Mapping[str, Any], report: Report | None) -> list[str]:
    file = folder / entry["file"]
    digests: Mapping[str, str] = entry["tensors"]
    try:
        header = read_header(file)
    except (FileFormatError, FileNotFoundError) as error:
        return [str(error)]
    if hashlib.sha256(header.encode()).hexdigest() != entry["header"]:
        return [f"{file} has another header: other keys, shapes or types"]
    return [f"{name}: {key} holds other bytes" for key in differing(file, header, digests, name, report)]


def _header(meta: Mapping[str, Tensor], dtype: torch.dtype | None) -> Header:
    """What the file will hold: the port's weights, floating-point ones in the wanted type."""
    wanted = {key: t.to(dtype) if dtype is not None and t.is_floating_point() else t for key, t in meta.items()}
    return Header.plan(wanted, {"format": "pt"})


def _write(
    name: str, file: StreamedFile, weights: Mapping[str, Tensor], target: Path, report: Report | None
) -> ConvertedPart:
    kept = len(file.finished)
    if not file.complete:
        file.write(weights, name, report)
    elif report is not None:
        for key, place in file.header.places.items():
            for verified in (False, True):
                report(Progress(name, key, place.nbytes, kept=True, verified=verified))
    path = target / file.path.name
    return ConvertedPart(name, path, len(file.digests), file.header.size, kept, file.not_finite)


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        parent = target.absolute().parent
        if not parent.is_dir():
            raise FileFormatError(f"{target} cannot be written: the folder {parent} does not exist. Create it first.")
        return
    if not target.is_dir():
        raise FileFormatError(f"{target} is a file. Give the folder to write: a model has several files.")
    if next(target.iterdir(), None) is None:
        return
    if not overwrite:
        raise FileFormatError(
            f"{target} exists. Nothing was written. Choose another folder, or replace it with --force."
        )
    if not (target / MANIFEST).is_file():
        raise FileFormatError(
            f"{target} holds something else than a converted model, and is not replaced. Choose another folder."
        )


def _rename(folder: Path, target: Path) -> None:
    old = target.with_name(f"{target.name}.replaced")
    if target.exists() and next(target.iterdir(), None) is not None:
        target.rename(old)
    folder.rename(target)
    if old.exists():
        shutil.rmtree(old)


def _tokenizers(model: OpenedModel, given: Path | str | None) -> dict[str, Path]:
    """The folders to copy tokenizer files from, by the name of the folder to copy them to."""
    if given is None:
        return dict(model.tokenizers)
    folder = Path(given)
    if not folder.is_dir():
        raise FileFormatError(f"{folder} is no folder. Give the one with the tokenizer's files, such as vocab.json.")
    found = {name: folder / name if (folder / name).is_dir() else folder for name in model.bundle.tokenizers}
    empty = [str(path) for path in found.values() if not _files(path)]
    if empty:
        raise FileFormatError(f"{', '.join(empty)} holds no files of a tokenizer, such as vocab.json and merges.txt.")
    return found


def _files(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.iterdir()) if file.is_file() and file.suffix in (".json", ".txt", ".gz")]


def _copy(tokenizers: Mapping[str, Path], folder: Path) -> None:
    for name, source in tokenizers.items():
        (folder / name).mkdir(exist_ok=True)
        for file in _files(source):
            shutil.copyfile(file, folder / name / file.name)


def _write_manifest(
    folder: Path,
    model: OpenedModel,
    written: Mapping[str, StreamedFile],
    tokenizers: Mapping[str, Path],
    dtype: torch.dtype | None,
) -> None:
    parts = {
        name: {
            "file": file.path.name,
            "config": dict(model.parts[name].config),
            "header": file.header_digest,
            "tensors": file.digests,
            "not_finite": file.not_finite,
        }
        for name, file in written.items()
    }
    manifest = {
        "format": FORMAT,
        "kind": model.kind,
        "source": model.path.name,
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        "scheduler": dict(model.scheduler),
        "pipeline": dict(model.pipeline),
        "tokenizers": {name: {file.name: digest_of(file) for file in _files(folder / name)} for name in tokenizers},
        "parts": parts,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _notes(model: OpenedModel, tokenizers: Mapping[str, Path]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for key, reason in model.left_out.items():
        reasons.setdefault(reason, []).append(key)
    notes = [
        f"left out: {keys[0]}{f' and {len(keys) - 1} more' if len(keys) > 1 else ''} ({reason})"
        for reason, keys in reasons.items()
    ]
    absent = [name for name in model.bundle.tokenizers if name not in tokenizers]
    if absent:
        notes.append(f"without {' and '.join(absent)}, which {model.path} does not hold: give one with --tokenizer")
    return notes
