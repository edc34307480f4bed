"""The header of a safetensors file: what is where in it, read and written without touching a tensor.

The format is 8 bytes that say how long the header is, the header as JSON, and the bytes of all tensors one after the
other. All is known of a file before its first tensor is: so it can be written piece by piece, in any order, and read
piece by piece without mapping it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from refiners.errors import FileFormatError

_NAMES: Mapping[str, str] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}
_DTYPES: Mapping[str, torch.dtype] = {name: getattr(torch, torch_name) for name, torch_name in _NAMES.items()}
CODES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in _DTYPES.items()}
"""What a type is called in the header."""
_LIMIT = 100_000_000
_ALIGNMENT = 64


@dataclass(frozen=True)
class Place:
    """A tensor in a file: its type and shape, and its bytes, counted from the end of the header."""

    dtype: torch.dtype
    shape: torch.Size
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """How many bytes the tensor has."""
        return self.end - self.start


@dataclass(frozen=True)
class Header:
    """What is where in a safetensors file.

    Attributes:
        places: where each tensor is, in the order of the header.
        metadata: what the file says about itself.
        data_start: where the bytes of the tensors begin.

    Example:
        >>> header = Header.plan({"bias": torch.empty(3, device="meta")})
        >>> header.places["bias"].nbytes, header.size - header.data_start
        (12, 12)
    """

    places: Mapping[str, Place]
    metadata: Mapping[str, str] = field(default_factory=lambda: MappingProxyType(dict[str, str]()))
    data_start: int = 0

    @property
    def size(self) -> int:
        """How many bytes the whole file has."""
        return self.data_start + max((place.end for place in self.places.values()), default=0)

    @classmethod
    def plan(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> "Header":
        """The header of a file with tensors of these shapes and types, which may be on the meta device.

        Tensors whose length is a multiple of 64 bytes come first. So all but the smallest begin at such a multiple:
        where a tensor begins in memory can decide the last bit of what is computed from it.
        """
        order = sorted(tensors, key=lambda key: (tensors[key].nbytes % _ALIGNMENT > 0, -tensors[key].itemsize))
        places: dict[str, Place] = {}
        start = 0
        for key in order:
            tensor = tensors[key]
            places[key] = Place(tensor.dtype, tensor.shape, start, start + tensor.nbytes)
            start += tensor.nbytes
        header = cls(places, dict(metadata or {}))
        return cls(places, header.metadata, len(header.encode()))

    def encode(self) -> bytes:
        """The first bytes of the file: the length of the header, and the header, filled up with spaces."""
        content: dict[str, Any] = {"__metadata__": dict(self.metadata)} if self.metadata else {}
        for key, place in self.places.items():
            offsets = [place.start, place.end]
            content[key] = {"dtype": CODES[place.dtype], "shape": list(place.shape), "data_offsets": offsets}
        text = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-(8 + len(text)) % _ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    @classmethod
    def read(cls, path: Path) -> "Header":
        """The header of a file, checked against its size.

        Raises:
            FileFormatError: the file is of another format, corrupted or truncated; the message says how many bytes
                were expected and found.
        """
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= _LIMIT:
                raise FileFormatError(f"{path} cannot be read as safetensors: it is of another format.")
            text = file.read(length)
        if len(text) < length:
            raise FileFormatError(_truncated(path, f"at least {8 + length}", size))
        try:
            content: dict[str, Any] = json.loads(text, object_pairs_hook=_unique)
            metadata: dict[str, str] = content.pop("__metadata__", {})
            places = {key: _place(entry) for key, entry in content.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FileFormatError(
                f"{path} cannot be read as safetensors: its header is corrupted ({error!r}). Download it again."
            ) from error
        header = cls(places, metadata, 8 + length)
        header._check(path, size)
        return header

    def _check(self, path: Path, size: int) -> None:
        if size < self.size:
            raise FileFormatError(_truncated(path, str(self.size), size))
        end = 0
        for key, place in sorted(self.places.items(), key=lambda item: (item[1].start, item[1].end)):
            if place.start != end or place.nbytes != place.shape.numel() * place.dtype.itemsize:
                raise FileFormatError(
                    f"{path} cannot be read as safetensors: its header is corrupted at {key}. Download it again."
                )
            end = place.end
        if size > self.size:
            raise FileFormatError(
                f"{path} cannot be read as safetensors: expected {self.size} bytes, found {size}. Download it again."
            )

    def read_tensor(self, file: BinaryIO, key: str) -> Tensor:
        """One tensor of the opened file, copied into memory of its own: nothing is mapped.

        Raises:
            FileFormatError: the file has become shorter since its header was read.
        """
        place = self.places[key]
        if not place.nbytes:
            return torch.empty(place.shape, dtype=place.dtype)
        buffer = bytearray(place.nbytes)
        file.seek(self.data_start + place.start)
        if file.readinto(buffer) != place.nbytes:  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType] because BinaryIO leaves it out
            raise FileFormatError(f"{getattr(file, 'name', 'The file')} ends before {key} does. Download it again.")
        return torch.frombuffer(buffer, dtype=place.dtype).view(place.shape)

    def meta(self) -> dict[str, Tensor]:
        """All tensors of the file on the meta device."""
        return {key: torch.empty(place.shape, dtype=place.dtype, device="meta") for key, place in self.places.items()}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, in which a name may stand once only: of two tensors of one name, one would be lost."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise KeyError(f"{next(name for name in names if names.count(name) > 1)} is there twice")
    return content


def _place(entry: Mapping[str, Any]) -> Place:
    start, end = (int(offset) for offset in entry["data_offsets"])
    return Place(_DTYPES[entry["dtype"]], torch.Size(entry["shape"]), start, end)


def _truncated(path: Path, expected: str, found: int) -> str:
    return (
        f"{path} cannot be read as safetensors: it is truncated, expected {expected} bytes, found {found}. "
        "Download it again."
    )
