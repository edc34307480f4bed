"""`refiners loras`: what is printed, written and refused."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from reference_ports import bert
from refiners import cli
from refiners.conversion.loras import names_of, read_loras, write_loras
from refiners.fluxion.adapters import DeltaSpec

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line as a shell would: exit code, output, errors."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["refiners", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as exit_of:
            cli.main()
        captured = capsys.readouterr()
        return int(exit_of.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A LoRA of rank 2 for two layers of MiniLM, as peft writes it."""
    with torch.device("meta"):
        model = bert.minilm_l6()
    names = names_of(model)
    wanted = [names.paths[f"encoder.layer.{i}.attention.self.query"] for i in (0, 5)]
    tensors = {"down": torch.ones(2, 384), "up": torch.ones(384, 2)}
    specs = {path: DeltaSpec("lora", tensors, alpha=4.0) for path in wanted}
    write_loras(tmp_path / "style", specs, model, layout="peft", metadata={"ss_note": "x" * 100})
    return tmp_path / "style"


def test_show_tells_what_a_file_holds(folder: Path, run: Run) -> None:
    code, output, _ = run("loras", "show", folder)
    assert code == 0
    assert "LoRAs in the layout of peft, 2 layers" in output
    assert "all-MiniLM-L6-v2" in output
    assert "(100 characters)" in output
    assert "lora_alpha" in output


def test_convert_writes_the_same_in_another_layout_and_back(folder: Path, tmp_path: Path, run: Run) -> None:
    kohya, back = tmp_path / "style.safetensors", tmp_path / "back"
    assert run("loras", "convert", folder, "--to", "kohya", "--out", kohya)[0] == 0
    assert run("loras", "convert", kohya, "--to", "peft", "--out", back)[0] == 0
    assert read_loras(kohya).metadata["ss_note"] == "x" * 100
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (back / name).read_bytes() == (folder / name).read_bytes()


def test_convert_refuses_what_it_does_not_know(folder: Path, tmp_path: Path, run: Run) -> None:
    code, _, errors = run("loras", "convert", folder, "--to", "webui", "--out", tmp_path / "x")
    assert (code, "No layout is called" in errors) == (1, True)
    save_file(
        {"fc.lora_A.weight": torch.ones(1, 2), "fc.lora_B.weight": torch.ones(2, 1)}, tmp_path / "odd.safetensors"
    )
    code, _, errors = run("loras", "convert", tmp_path / "odd.safetensors", "--to", "kohya", "--out", tmp_path / "x")
    assert (code, "no published model of this project" in errors) == (1, True)
    assert not (tmp_path / "x").exists()


def test_a_file_that_is_not_there_is_one_message(tmp_path: Path, run: Run) -> None:
    code, _, errors = run("loras", "show", tmp_path / "none.safetensors")
    assert code == 1
    assert "does not exist" in errors
