import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from refiners.conversion import open_state_dict, read_state_dict, write_state_dict
from refiners.errors import FileFormatError

TENSORS = {
    "a.weight": torch.arange(6.0).reshape(2, 3),
    "a.bias": torch.tensor([float("nan"), -0.0]),
    "b": torch.ones(2, 2, dtype=torch.bfloat16),
    "ids": torch.arange(4),
}


def sharded(folder: Path) -> Path:
    """An index of two shards."""
    keys = list(TENSORS)
    names = {key: f"model-0000{1 + index // 2}-of-00002.safetensors" for index, key in enumerate(keys)}
    for name in sorted(set(names.values())):
        write_state_dict(folder / name, {key: TENSORS[key] for key in keys if names[key] == name})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
    return index


def assert_same(one: dict[str, Tensor]) -> None:
    assert set(one) == set(TENSORS)
    for key, tensor in TENSORS.items():
        assert one[key].dtype == tensor.dtype
        assert torch.equal(one[key].view(torch.uint8), tensor.view(torch.uint8))


def test_what_is_written_is_read_back_to_the_bit(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_state_dict(path, TENSORS, metadata={"port": "toy"})
    assert_same(read_state_dict(path))
    assert_same(read_state_dict(tmp_path))
    files = open_state_dict(path)
    assert_same(dict(files))
    assert files.metadata == {"port": "toy"}
    assert files.shapes["a.weight"] == (2, 3)
    assert len(files) == 4
    assert files.files == (path,)


def test_shards_are_read_through_their_index_or_their_folder(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    assert_same(read_state_dict(index))
    assert_same(read_state_dict(tmp_path))
    assert len(open_state_dict(index).files) == 2


def test_writing_needs_leave_to_replace_a_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_state_dict(path, TENSORS)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="exists. Nothing was written."):
        write_state_dict(path, {"other": torch.zeros(1)})
    assert path.read_bytes() == before
    write_state_dict(path, {"other": torch.zeros(1)}, overwrite=True)
    assert set(read_state_dict(path)) == {"other"}


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="does not exist"):
        write_state_dict(tmp_path / "absent" / "model.safetensors", TENSORS)
    with pytest.raises(FileFormatError, match="is a folder"):
        write_state_dict(tmp_path, TENSORS, overwrite=True)
    with pytest.raises(TypeError):
        write_state_dict(tmp_path / "model.safetensors", {"a": torch.zeros(1, device="meta")})
    assert list(tmp_path.iterdir()) == []


def test_tensors_in_the_same_memory_are_written_in_full(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    write_state_dict(tmp_path / "a.safetensors", {"one": tensor, "two": tensor, "three": tensor.t()})
    read = read_state_dict(tmp_path)
    assert torch.equal(read["one"], read["two"])
    assert torch.equal(read["three"], tensor.t())


@pytest.mark.parametrize("content", [b"", b"\x80\x02}", b"PK\x03\x04 a zip", b"\x10\x00\x00\x00\x00\x00\x00\x00{}"])
def test_a_file_of_another_format_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    for read in (read_state_dict, open_state_dict):
        with pytest.raises(FileFormatError, match="cannot be read as safetensors"):
            read(path)


def test_a_truncated_file_is_refused_before_a_tensor_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_state_dict(path, TENSORS)
    whole = path.read_bytes()
    for length in (4, 9, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(FileFormatError):
            open_state_dict(path)


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    torch.save(TENSORS, path)
    with pytest.raises(FileFormatError, match="pickle"):
        read_state_dict(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for name in ("model.safetensors", "model.safetensors.index.json"):
        with pytest.raises(FileNotFoundError):
            read_state_dict(tmp_path / name)


def test_a_folder_without_a_model_or_with_several_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="holds no safetensors file"):
        read_state_dict(tmp_path)
    sharded(tmp_path)
    write_state_dict(tmp_path / "other.safetensors", TENSORS)
    with pytest.raises(FileFormatError, match=r"several models: model.safetensors.index.json, other.safetensors"):
        read_state_dict(tmp_path)


def test_an_index_that_does_not_agree_with_its_shards_is_refused(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    content = json.loads(index.read_text())
    shards = content["weight_map"]

    def refused(message: str, **changes: str) -> None:
        index.write_text(json.dumps({"weight_map": shards | changes}))
        with pytest.raises(FileFormatError, match=message):
            read_state_dict(index)

    refused("names shards that are not there: model-3.safetensors", c="model-3.safetensors")
    refused("not in its own folder: ../x.safetensors", c="../x.safetensors")
    refused("c is not in model-00001", c="model-00001-of-00002.safetensors")
    del shards["ids"]
    refused("ids in model-00002-of-00002.safetensors is not in the index")
    index.write_text("[1]")
    with pytest.raises(FileFormatError, match="is no index of shards"):
        read_state_dict(index)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    write_state_dict(tmp_path / "model-00002-of-00002.safetensors", TENSORS, overwrite=True)
    with pytest.raises(FileFormatError, match=r"a.bias is in model-00001.* and in model-00002"):
        read_state_dict(index)
