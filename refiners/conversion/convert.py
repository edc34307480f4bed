"""A published file turned into the weights of a port: what `refiners convert clip-text-l IN OUT` does."""

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from refiners.conversion.config import read_config
from refiners.conversion.files import check_writable
from refiners.conversion.header import Header
from refiners.conversion.port import Port
from refiners.conversion.variants import open_weights
from refiners.conversion.workplace import sources_of, workplace
from refiners.conversion.writing import Report, StreamedFile, writing_to


@dataclass(frozen=True)
class ConvertedFile:
    """What a conversion wrote.

    Attributes:
        path: the file.
        tensors: how many tensors it holds.
        nbytes: how long it is.
        kept: how many tensors an interrupted conversion had written before.
        digests: the SHA-256 of the bytes of each tensor.
        not_finite: the tensors with values that are no numbers, and what they are.
        warnings: what is odd about the weights, one line each.
    """

    path: Path
    tensors: int
    nbytes: int
    kept: int
    digests: Mapping[str, str]
    not_finite: Mapping[str, str]
    warnings: tuple[str, ...]


def convert_file(
    port: Port,
    in_path: Path | str,
    out_path: Path | str,
    config: Mapping[str, Any] | Path | str | None = None,
    overwrite: bool = False,
    *,
    variant: str | None = None,
    dtype: torch.dtype | None = None,
    report: Report | None = None,
    begin: Callable[[int], None] | None = None,
) -> ConvertedFile:
    """Converts a published checkpoint to a file that the port loads. Everything is checked before a byte is written.

    Receives:
        port: what to convert for.
        in_path: the published weights: a safetensors file or a pickle, an index of shards, or a folder that holds one
            of them.
        out_path: the safetensors file to write.
        config: the published configuration, or its config.json, when it is not the one that the port is named after.
        overwrite: whether a file at `out_path` may be replaced.
        variant: which of several sets of weights in a folder to take, such as `fp16`.
        dtype: the type of the floating-point weights; that of the file by default.
        report: called after each tensor.
        begin: called with the number of bytes to write, before the first is written.

    Returns:
        what was written.

    Raises:
        ConversionError: weights or configuration do not fit the port.
        FileFormatError: a file cannot be read or written.
    """
    check_writable(out_path, overwrite)
    target = Path(out_path).resolve()  # a link stays one: what it points at is written
    if isinstance(config, str | Path):
        config = read_config(config)
    with torch.device("meta"):
        model = port.build() if config is None else port.from_config(config)
    stored = open_weights(in_path, variant)
    weights = port.weights(stored, model)
    unread = weights.check_values()
    meta = weights.meta()
    wanted = {key: t.to(dtype) if dtype is not None and t.is_floating_point() else t for key, t in meta.items()}
    header = Header.plan(wanted, {"format": "pt", "port": port.name})
    plan = {"header": hashlib.sha256(header.encode()).hexdigest(), "sources": sources_of(stored.files)}
    with workplace(target, plan, header.size, overwrite) as folder:
        if begin is not None:
            begin(header.size)
        file = StreamedFile(folder, target.name, header)
        kept = len(file.finished)
        if not file.complete:
            file.write(weights, port.name, report)
        with writing_to(target):
            file.path.replace(target)
            shutil.rmtree(folder)
    odd = file.not_finite
    warnings = [f"{key}, made of {' and '.join(weights.origin(key))}, holds {what}" for key, what in odd.items()]
    return ConvertedFile(
        Path(out_path), len(header.places), header.size, kept, file.digests, odd, tuple(warnings + unread)
    )
