"""Weights that torch.save wrote, read tensor by tensor, without running what is in them."""

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from refiners.conversion import open_weights
from refiners.conversion.pickled import PickledWeights
from refiners.errors import FileFormatError, NotTensorsError, PickledModelError

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.tensor([1, 2])}


class Dangerous:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A class of pytorch_lightning, as checkpoints of Stable Diffusion hold it."""
    module = ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    exec("class ModelCheckpoint:\n    def __init__(self): self.best = 3", module.__dict__)
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    return module.__dict__["ModelCheckpoint"]


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("nested", [True, False], ids=["under state_dict", "flat"])
def test_tensors_are_read_one_by_one(nested: bool, new_format: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    content = {"state_dict": TENSORS, "global_step": 3} if nested else TENSORS
    torch.save(content, path, _use_new_zipfile_serialization=new_format)
    weights = open_weights(path)
    assert weights.files == (path,)
    assert weights.shapes["a.weight"] == (2, 3)
    assert weights.meta()["a.bias"].dtype == torch.int64
    assert {key: tensor.tolist() for key, tensor in weights.items()} == {k: t.tolist() for k, t in TENSORS.items()}


def test_the_state_of_a_trainer_is_passed_over(trainer: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": TENSORS, "callbacks": {trainer: {"best": 1}}, "last": trainer()}, path)
    assert list(open_weights(path)) == list(TENSORS)


@pytest.mark.parametrize("content", [{"state_dict": TENSORS, "x": Dangerous()}, Dangerous()], ids=["beside", "alone"])
def test_code_is_not_run(content: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, "model.bin")
    with pytest.raises(PickledModelError, match="holds Python objects.*Nothing was run"):
        open_weights("model.bin")
    assert not Path("ran").exists()


def test_what_holds_no_tensors_is_refused(tmp_path: Path) -> None:
    for content, message in (([1], "holds a list"), ({"a": 1, **TENSORS}, "1 entries that are not a tensor.*'a'")):
        torch.save(content, tmp_path / "model.pt")
        with pytest.raises(NotTensorsError, match=message):
            open_weights(tmp_path / "model.pt")


@pytest.mark.parametrize("length", [0, 10, -20])
def test_a_truncated_pickle_is_refused(length: int, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save(TENSORS, path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(FileFormatError, match=str(path)):
        open_weights(path)


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    for shard, key in enumerate(TENSORS):
        torch.save({key: TENSORS[key]}, tmp_path / f"pytorch_model-0000{shard}-of-00002.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text('{"weight_map": {"a.weight": "pytorch_model-00000-of-00002.bin", "a.bias": "other.bin"}}')
    with pytest.raises(FileFormatError, match="names shards that are not there: other.bin"):
        open_weights(tmp_path)
    index.write_text(index.read_text().replace("other.bin", "pytorch_model-00001-of-00002.bin"))
    assert list(open_weights(tmp_path)) == list(TENSORS)


@pytest.mark.parametrize(("kept", "count"), [(0, 4), (2**20, 1)])
def test_files_are_let_go_of_while_they_are_read(
    kept: int, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.bin"
    torch.save(TENSORS, path)
    opened: list[Path] = []
    load = torch.load
    monkeypatch.setattr("refiners.conversion.pickled._KEPT_MAPPED", kept)
    monkeypatch.setattr(torch, "load", lambda file, **options: opened.append(file) or load(file, **options))
    weights = PickledWeights(path, [path])
    opened.clear()
    read = [weights[key] for _ in range(2) for key in TENSORS]
    assert len(opened) == count
    assert all(torch.equal(one, other) for one, other in zip(read, [*TENSORS.values()] * 2, strict=True))
