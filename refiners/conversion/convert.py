"""A published file turned into the weights of a port: what `refiners convert` does."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from refiners.conversion.config import read_config
from refiners.conversion.files import check_writable, read_state_dict, write_state_dict
from refiners.conversion.port import Port


def convert_file(
    port: Port,
    in_path: Path | str,
    out_path: Path | str,
    config: Mapping[str, Any] | Path | str | None = None,
    overwrite: bool = False,
) -> int:
    """Converts a published checkpoint to a file that the port loads. Everything is checked before a byte is written.

    Receives:
        port: what to convert for.
        in_path: the published weights: a safetensors file, an index of shards, or a folder that holds one of them.
        out_path: the safetensors file to write.
        config: the published configuration, or its config.json, when it is not the one that the port is named after.
        overwrite: whether a file at `out_path` may be replaced.

    Returns:
        the number of tensors written.

    Raises:
        ConversionError: weights or configuration do not fit the port.
        FileFormatError: a file cannot be read or written.
    """
    check_writable(out_path, overwrite)
    if isinstance(config, str | Path):
        config = read_config(config)
    with torch.device("meta"):
        target = port.build() if config is None else port.from_config(config)
    tensors = port.key_map.convert(read_state_dict(in_path), target)
    write_state_dict(out_path, tensors, metadata={"format": "pt", "port": port.name}, overwrite=overwrite)
    return len(tensors)
