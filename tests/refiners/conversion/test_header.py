"""Headers of safetensors files, against the library that defines the format."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from refiners.conversion.header import Header
from refiners.errors import FileFormatError

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
]
TENSORS = {
    **{str(dtype): torch.arange(6).reshape(3, 2).to(dtype) for dtype in DTYPES},
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 3),
    "naïve": torch.ones(16),
}


def bytes_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def test_files_of_the_library_are_read_to_the_bit(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    header = Header.read(path)
    assert header.metadata == {"format": "pt"}
    assert header.size == path.stat().st_size
    with path.open("rb") as file:
        for key, tensor in TENSORS.items():
            read = header.read_tensor(file, key)
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(bytes_of(read), bytes_of(tensor))


def test_files_of_a_planned_header_are_read_by_the_library(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    header = Header.plan({key: tensor.to("meta") for key, tensor in TENSORS.items()}, {"port": "toy"})
    with path.open("wb") as file:
        file.write(header.encode())
        for key in header.places:
            file.write(bytes_of(TENSORS[key]).numpy().tobytes())
    read = load_file(path)
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(bytes_of(read[key]), bytes_of(tensor)) for key, tensor in TENSORS.items())
    assert Header.read(path) == header


def test_large_tensors_begin_where_memory_is_aligned() -> None:
    sizes = {"odd": 3, "big": 4096, "scalar": 1, "other": 64, "small": 5}
    header = Header.plan({key: torch.empty(size, dtype=torch.float16, device="meta") for key, size in sizes.items()})
    aligned = [key for key, place in header.places.items() if (header.data_start + place.start) % 64 == 0]
    assert {"big", "other"} <= set(aligned)
    assert header.data_start % 64 == 0
    ends = [place.end for place in header.places.values()]
    assert [place.start for place in header.places.values()] == [0, *ends[:-1]]


@pytest.mark.parametrize("cut", [1, 10, 200])
def test_a_truncated_file_says_what_it_expected_and_found(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(40)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    message = rf"a.safetensors cannot be read.*truncated, expected (at least )?\d+ bytes, found {len(whole) - cut}\."
    with pytest.raises(FileFormatError, match=message):
        Header.read(path)


def test_a_file_that_has_become_shorter_is_told_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(40)}, path)
    header = Header.read(path)
    path.write_bytes(path.read_bytes()[:-8])
    with path.open("rb") as file, pytest.raises(FileFormatError, match="a.safetensors ends before a does"):
        header.read_tensor(file, "a")


def entry(start: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": [2], "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, "corrupted at b"),
        ({"a": entry(0, 8), "b": entry(12, 20)}, "corrupted at b"),
        ({"a": entry(0, 12)}, "corrupted at a"),
        ({"a": entry(0, 8, "F99")}, "F99"),
        ({"a": {"dtype": "F32"}}, "data_offsets"),
        ([1], "corrupted"),
        ({"a": entry(0, 8)}, "expected .* bytes, found"),
    ],
    ids=["overlap", "gap", "length", "type", "no place", "no object", "more than it needs"],
)
def test_a_corrupted_header_is_refused(content: object, message: str, tmp_path: Path) -> None:
    text = json.dumps(content).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(20))
    with pytest.raises(FileFormatError, match=message):
        Header.read(path)
