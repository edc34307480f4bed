from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from refiners.conversion import (
    ConfigReader,
    KeyMap,
    Port,
    convert_file,
    open_state_dict,
    read_state_dict,
    write_state_dict,
)
from refiners.errors import ConversionError, FileFormatError


def build(width: int = 3) -> nn.Module:
    assert torch.empty(0).is_meta
    return nn.ModuleDict({"Linear": nn.Linear(width, 2)})


def from_config(config: Mapping[str, Any]) -> nn.Module:
    with ConfigReader(config, "toy") as read:
        width = read.integer("width")
    return build(width)


PORT = Port(name="toy", build=build, key_map=KeyMap({"fc": "Linear"}), from_config=from_config, summary="a toy")


def published(folder: Path, width: int = 3) -> tuple[Path, Path]:
    path = folder / "published.safetensors"
    write_state_dict(path, {"fc.weight": torch.randn(2, width), "fc.bias": torch.randn(2)})
    return path, folder / "ours.safetensors"


def test_a_published_file_becomes_the_weights_of_the_port(tmp_path: Path) -> None:
    source, target = published(tmp_path)
    assert convert_file(PORT, source, target).tensors == 2
    given, made = read_state_dict(source), read_state_dict(target)
    assert torch.equal(made["Linear.weight"], given["fc.weight"])
    assert open_state_dict(target).metadata["port"] == "toy"
    nn.ModuleDict({"Linear": nn.Linear(3, 2)}).load_state_dict(made)


def test_a_configuration_says_which_size_of_the_family_it_is(tmp_path: Path) -> None:
    source, target = published(tmp_path, width=5)
    with pytest.raises(ConversionError, match=r"Linear.weight: needs \(2, 3\)"):
        convert_file(PORT, source, target)
    convert_file(PORT, source, target, config={"width": 5})
    path = tmp_path / "config.json"
    path.write_text('{"width": 5, "depth": 2}')
    with pytest.raises(ConversionError, match="depth"):
        convert_file(PORT, source, target, config=path, overwrite=True)


def test_nothing_is_written_when_the_weights_do_not_fit(tmp_path: Path) -> None:
    source, target = published(tmp_path)
    write_state_dict(source, {"fc.weight": torch.zeros(2, 3), "gate": torch.zeros(1)}, overwrite=True)
    with pytest.raises(ConversionError, match="gate"):
        convert_file(PORT, source, target)
    assert [path.name for path in tmp_path.iterdir()] == ["published.safetensors"]


def test_a_file_that_exists_stays_as_it_was(tmp_path: Path) -> None:
    source, target = published(tmp_path)
    target.write_bytes(b"precious")
    with pytest.raises(FileFormatError, match="exists"):
        convert_file(PORT, source, target)
    assert target.read_bytes() == b"precious"
    convert_file(PORT, source, target, overwrite=True)
    assert len(open_state_dict(target)) == 2
