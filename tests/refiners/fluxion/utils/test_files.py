import json
import os
import pickle
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from refiners.errors import FileFormatError, InputError
from refiners.fluxion.utils import load_from_safetensors, load_tensors, save_to_safetensors


def tensors() -> dict[str, Tensor]:
    return {
        "float": torch.randn(3, 4),
        "half": torch.randn(5).half(),
        "bfloat": torch.randn(5).bfloat16(),
        "int": torch.arange(6),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(2.0),
        "empty": torch.empty(0, 3),
    }


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for key in left:
        assert left[key].dtype == right[key].dtype
        assert torch.equal(left[key], right[key]), key


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- safetensors -----------------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    saved = tensors()
    save_to_safetensors(tmp_path / "a.safetensors", saved, metadata={"format": "pt"})
    assert_same(load_from_safetensors(tmp_path / "a.safetensors"), saved)
    assert_same(load_from_safetensors(str(tmp_path / "a.safetensors")), saved)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert files_in(tmp_path) == ["a.safetensors"]


def test_loading_maps_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_to_safetensors(path, {"x": torch.randn(100, 100)})
    loaded = load_from_safetensors(path)["x"]
    address = loaded.data_ptr()
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [(line[0].split("-"), line[-1]) for line in maps]
    holders = [name for (start, end), name in ranges if int(start, 16) <= address < int(end, 16)]
    assert holders == [str(path)]


def test_writing_to_a_loaded_tensor_changes_no_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_to_safetensors(path, {"x": torch.ones(3)})
    before = path.read_bytes()
    load_from_safetensors(path)["x"].zero_()
    assert path.read_bytes() == before
    assert load_from_safetensors(path)["x"].tolist() == [1, 1, 1]


def test_tensors_can_be_loaded_onto_a_device(tmp_path: Path) -> None:
    save_to_safetensors(tmp_path / "a.safetensors", {"x": torch.ones(3)})
    assert load_from_safetensors(tmp_path / "a.safetensors", device=torch.device("cpu"))["x"].device.type == "cpu"


def test_tensors_with_gaps_and_shared_tensors_are_saved_in_full(tmp_path: Path) -> None:
    base = torch.arange(24.0).view(4, 6)
    saved = {
        "base": base,
        "transposed": base.t(),
        "columns": base[:, ::2],
        "rows": base[1:3],
        "again": base,
        "expanded": torch.ones(1).expand(5),
        "conjugate": torch.complex(base, base).conj(),
        "weight": nn.Parameter(base),
    }
    copies = {key: tensor.detach().clone() for key, tensor in saved.items()}
    save_to_safetensors(tmp_path / "a.safetensors", saved)
    assert_same(load_from_safetensors(tmp_path / "a.safetensors"), copies)


def test_what_was_loaded_can_be_saved_over_its_own_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    saved = tensors()
    save_to_safetensors(path, saved)
    loaded = load_from_safetensors(path)
    save_to_safetensors(path, loaded)
    assert_same(loaded, saved)
    assert_same(load_from_safetensors(path), saved)


def test_a_saved_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    save_to_safetensors(tmp_path / "a.safetensors", {})
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "a.safetensors").chmod(0o640)
    save_to_safetensors(tmp_path / "a.safetensors", {})
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o640


def test_saving_to_a_link_replaces_what_it_points_at(tmp_path: Path) -> None:
    save_to_safetensors(tmp_path / "a.safetensors", {"x": torch.zeros(1)})
    (tmp_path / "link").symlink_to(tmp_path / "a.safetensors")
    save_to_safetensors(tmp_path / "link", {"x": torch.ones(1)})
    assert (tmp_path / "link").is_symlink()
    assert load_from_safetensors(tmp_path / "a.safetensors")["x"].item() == 1


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for name in ("missing/a.safetensors", "file/a.safetensors", "folder"):
        with pytest.raises(FileFormatError, match=f"{name} cannot be written") as caught:
            save_to_safetensors(tmp_path / name, {"x": torch.ones(1)})
        assert isinstance(caught.value, OSError)
    assert files_in(tmp_path) == ["file", "folder"]
    assert files_in(tmp_path / "folder") == []


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    save_to_safetensors(path, {"x": torch.zeros(1)})

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("refiners.fluxion.utils.files.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_to_safetensors(path, {"x": torch.ones(1)})
    assert load_from_safetensors(path)["x"].item() == 0
    assert files_in(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({3: torch.ones(1)}, "got 3: Tensor"),
        ({"x": 1.0}, "got 'x': float"),
        ({"x": torch.empty(2, device="meta")}, '"x" is on the meta device'),
        ({"x": torch.eye(2).to_sparse()}, "sparse"),
    ],
    ids=["key", "value", "meta", "sparse"],
)
def test_what_the_format_cannot_hold_is_refused_before_anything_is_written(
    tmp_path: Path, bad: dict[Any, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        save_to_safetensors(tmp_path / "a.safetensors", bad)
    with pytest.raises(InputError, match="metadata"):
        save_to_safetensors(tmp_path / "a.safetensors", {}, metadata={"steps": 3})  # type: ignore[dict-item]  bad
    assert files_in(tmp_path) == []


def broken_files() -> dict[str, tuple[bytes, str]]:
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    length = len(header).to_bytes(8, "little")
    return {
        "empty": (b"", "it is empty"),
        "cut in the data": (length + header + bytes(4), "truncated or corrupted"),
        "cut in the header": (length + header[:20], "truncated: its header alone"),
        "broken header": (length + header.replace(b":", b";") + bytes(8), "truncated or corrupted"),
        "unknown dtype": (length + header.replace(b"F32", b"F33") + bytes(8), "truncated or corrupted"),
        "a zip of torch": (b"", "it is a pickle"),
        "a pickle": (pickle.dumps({"x": 1}), "it is a pickle"),
        "a pointer of git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        "a web page": (b"<!DOCTYPE html><html>404</html>", "web page"),
        "text": (b"hello, this is some text", "another format"),
        "three bytes": (b"abc", "another format"),
    }


@pytest.mark.parametrize("name", broken_files())
def test_a_file_that_is_no_safetensors_is_explained(tmp_path: Path, name: str) -> None:
    content, message = broken_files()[name]
    path = tmp_path / "a.safetensors"
    if name == "a zip of torch":
        torch.save({"x": torch.ones(1)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(FileFormatError, match=message) as caught:
        load_from_safetensors(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    for load in (load_from_safetensors, load_tensors):
        with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors does not exist"):
            load(tmp_path / "nothing.safetensors")
        with pytest.raises(IsADirectoryError, match="is a folder"):
            load(tmp_path)


# --- files of torch.save ---------------------------------------------------------------------------------------------


def test_load_tensors_loads_what_torch_saved(tmp_path: Path) -> None:
    saved = tensors()
    torch.save(saved, tmp_path / "a.pt")
    assert_same(load_tensors(tmp_path / "a.pt"), saved)
    assert load_tensors(tmp_path / "a.pt", device="meta")["float"].is_meta


def test_load_tensors_takes_a_state_dict(tmp_path: Path) -> None:
    layer = nn.Linear(2, 3)
    torch.save(layer.state_dict(), tmp_path / "a.pt")
    assert_same(load_tensors(tmp_path / "a.pt"), dict(layer.state_dict()))


@pytest.mark.parametrize(
    ("content", "message"),
    [([torch.ones(1)], "holds a list"), ({"x": 1.0}, "'x': float"), ({3: torch.ones(1)}, "3: Tensor")],
    ids=["list", "value", "key"],
)
def test_load_tensors_refuses_other_contents(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(AssertionError, match=message) as caught:
        load_tensors(tmp_path / "a.pt")
    assert isinstance(caught.value, FileFormatError)


def test_load_tensors_runs_no_code_of_a_pickled_model(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 3), tmp_path / "a.pt")
    with pytest.raises(pickle.UnpicklingError, match="could run code") as caught:
        load_tensors(tmp_path / "a.pt")
    assert isinstance(caught.value, FileFormatError)


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("/tmp/refiners_ran_code_of_a_file",)


def test_load_tensors_runs_no_code_of_a_pickle(tmp_path: Path) -> None:
    torch.save({"x": Malicious()}, tmp_path / "a.pt")
    with pytest.raises(pickle.UnpicklingError):
        load_tensors(tmp_path / "a.pt")
    assert not Path("/tmp/refiners_ran_code_of_a_file").exists()


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.95])
def test_load_tensors_explains_a_truncated_file(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "a.pt"
    torch.save(tensors(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if kept < 1 else int(kept)])
    with pytest.raises(FileFormatError, match=r"a\.pt"):
        load_tensors(path)
