"""Loading a safetensors file into a module."""

from pathlib import Path

import pytest
import torch

import refiners.fluxion.layers as fl
from refiners.errors import FileFormatError, WeightsError
from refiners.fluxion import save_to_safetensors


def model() -> fl.Chain:
    return fl.Chain(fl.Linear(4, 8), fl.ReLU(), fl.Linear(8, 2))


def saved(tmp_path: Path, chain: fl.Chain) -> Path:
    path = tmp_path / "weights.safetensors"
    save_to_safetensors(path, chain.state_dict())
    return path


def mapped_files() -> str:
    return Path("/proc/self/maps").read_text()


def address_is_in(path: Path, tensor: torch.Tensor) -> bool:
    for line in mapped_files().splitlines():
        if line.endswith(str(path)):
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            if start <= tensor.data_ptr() < end:
                return True
    return False


def test_loading_gives_the_saved_weights_and_returns_the_module(tmp_path: Path) -> None:
    source, target = model(), model()
    assert target.load_from_safetensors(saved(tmp_path, source)) is target
    for key, weight in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], weight)


def test_weights_of_the_same_dtype_are_the_mapped_file_and_the_parameters_stay_the_same_objects(tmp_path: Path) -> None:
    target = model()
    before = list(target.parameters())
    path = saved(tmp_path, model())
    target.load_from_safetensors(path)
    assert all(a is b for a, b in zip(before, target.parameters(), strict=True))
    assert all(address_is_in(path, weight) for weight in target.parameters())


def test_training_a_loaded_model_does_not_change_the_file(tmp_path: Path) -> None:
    path = saved(tmp_path, model())
    before = path.read_bytes()
    target = model().load_from_safetensors(path)
    with torch.no_grad():
        for weight in target.parameters():
            weight += 1
    assert path.read_bytes() == before


def test_weights_of_another_dtype_are_converted_to_the_dtype_of_the_module(tmp_path: Path) -> None:
    source, target = model(), model().to(dtype=torch.bfloat16)
    target.load_from_safetensors(saved(tmp_path, source))
    assert torch.equal(target.Linear_1.weight, source.Linear_1.weight.to(torch.bfloat16))


def test_a_module_on_the_meta_device_comes_to_life(tmp_path: Path) -> None:
    source = model()
    with torch.device("meta"):
        target = model()
    path = saved(tmp_path, source)
    target.load_from_safetensors(path)
    x = torch.randn(3, 4)
    assert torch.equal(target(x), source(x))
    assert all(address_is_in(path, weight) for weight in target.parameters())


def test_all_that_does_not_fit_is_one_error_and_nothing_changes(tmp_path: Path) -> None:
    target = model()
    before = {key: weight.clone() for key, weight in target.state_dict().items()}
    path = saved(tmp_path, fl.Chain(fl.Linear(4, 8), fl.Linear(8, 3), fl.Linear(2, 2)))
    with pytest.raises(WeightsError) as caught:
        target.load_from_safetensors(path)
    message = str(caught.value)
    assert isinstance(caught.value, RuntimeError)
    assert "2 unexpected" in message
    assert "Linear_3.weight" in message
    assert "Linear_2.weight: (3, 8) instead of (2, 8)" in message
    assert all(torch.equal(weight, before[key]) for key, weight in target.state_dict().items())


def test_without_strict_other_keys_are_left_alone_but_shapes_have_to_fit(tmp_path: Path) -> None:
    source = fl.Chain(fl.Linear(4, 8), fl.Linear(8, 2), fl.Linear(2, 2))
    target = model().load_from_safetensors(saved(tmp_path, source), strict=False)
    assert torch.equal(target.Linear_1.weight, source.Linear_1.weight)
    with pytest.raises(WeightsError, match="of another shape"):
        target.load_from_safetensors(saved(tmp_path, fl.Chain(fl.Linear(3, 8), fl.Linear(8, 2))), strict=False)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, model())
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(FileFormatError):
        model().load_from_safetensors(path)
