"""safetensors files written byte by byte as the library writes them, or as they were before they were read.

The library orders tensors by type and name, and fills the header up to 8 bytes. It keeps the entries of the metadata in
a hash map, so their order differs from run to run: written by it, a file that was read would not come out the same.
Written here it does, since the order is that of the file that was read, or that of the mapping.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refiners.conversion.files import check_writable
from refiners.conversion.header import CODES, Header
from refiners.conversion.writing import memory_of, writing_to
from refiners.errors import InputError

# From the last to the first, as safetensors 0.8 sorts them.
_ORDER = ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64")
_LAST = ("F64", "I64", "U64")
_RANKS = {code: rank for rank, code in enumerate((*_ORDER, *_LAST))}
_PADDING = 8


def write_as_library(
    path: Path | str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    like: Header | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a file that appears whole or not at all.

    Receives:
        path: where to write.
        tensors: what to write.
        metadata: what the file shall say about itself.
        like: the header of the file that was read; kept if it is of the same tensors and metadata.
        overwrite: whether a file of that name may be replaced.

    Raises:
        FileFormatError: the path is there already, or cannot be written to.
        InputError: a tensor has no values to write.
    """
    check_writable(path, overwrite)
    empty = [key for key, tensor in tensors.items() if tensor.is_meta]
    if empty:
        raise InputError(f"{len(empty)} tensors, {empty[0]!r} first, are on the meta device and have no values.")
    order, size = _order(tensors, like), 0
    if like is not None and order == list(like.places) and dict(metadata) == dict(like.metadata):
        metadata, size = like.metadata, like.data_start
    header = _encode(tensors, order, metadata, size)
    target = Path(path)
    beside = target.with_name(f".{target.name}.part")
    with writing_to(target):
        try:
            with beside.open("wb") as file:
                file.write(header)
                for key in order:
                    file.write(memory_of(tensors[key].detach().cpu().contiguous()))
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)


def _order(tensors: Mapping[str, Tensor], like: Header | None) -> list[str]:
    if like is not None and _places(tensors) == {key: (p.dtype, p.shape) for key, p in like.places.items()}:
        return sorted(like.places, key=lambda key: like.places[key].start)
    return sorted(tensors, key=lambda key: (-_RANKS[CODES[tensors[key].dtype]], key))


def _places(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {key: (tensor.dtype, tensor.shape) for key, tensor in tensors.items()}


def _encode(tensors: Mapping[str, Tensor], order: list[str], metadata: Mapping[str, str], size: int) -> bytes:
    """Receives: the size to fill the header up to, if it is not smaller."""
    content: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for key in order:
        end = start + tensors[key].nbytes
        shape = list(tensors[key].shape)
        content[key] = {"dtype": CODES[tensors[key].dtype], "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * max(-len(text) % _PADDING, size - 8 - len(text))
    return len(text).to_bytes(8, "little") + text
