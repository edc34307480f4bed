"""The command line: what it prints, what it writes, and how it says what went wrong."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

import refiners
import refiners.fluxion.layers as fl
from refiners import cli, ports
from refiners.conversion import KeyMap
from refiners.conversion.port import Port

UPSTREAM = {"encoder.fc.weight": torch.arange(6.0).reshape(3, 2), "encoder.fc.bias": torch.arange(3.0)}


class TinyEncoder(fl.Chain):
    """A port that is small enough to read."""

    def __init__(self, in_features: int = 2) -> None:
        self.in_features = in_features
        super().__init__(fl.Linear(in_features, 3), fl.Residual(fl.Linear(3, 3), fl.ReLU()))


class TinyProjection(fl.Chain):
    """A port with one weight."""

    def __init__(self, in_features: int = 2) -> None:
        super().__init__(fl.Linear(in_features, 3))


def tiny_projection(config: Any) -> TinyProjection:
    return TinyProjection(config["hidden_size"])


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    key_map = KeyMap({"encoder.fc": "Linear"})
    found = {
        "tiny": Port(name="tiny", build=TinyProjection, key_map=key_map, from_config=tiny_projection, summary="small"),
        "deep": Port(name="deep", build=TinyEncoder, key_map=key_map, from_config=tiny_projection, summary="deeper"),
    }
    monkeypatch.setattr(ports, "find_ports", lambda: found)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    path = tmp_path / "published.safetensors"
    save_file(UPSTREAM, path)
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line as a shell would: exit code, output, errors."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["refiners", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_of:
            cli.main()
        captured = capsys.readouterr()
        return int(exit_of.value.code or 0), captured.out, captured.err

    return call


Run = Callable[..., tuple[int, str, str]]


def helped(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, [*arguments, "--help"])


@pytest.mark.parametrize(
    "command", [(), ("tree",), ("convert",), ("generate",), ("parity",), ("parity", "run"), ("parity", "show")]
)
def test_help_teaches_with_examples(command: tuple[str, ...]) -> None:
    result = helped(*command)
    assert result.exit_code == 0
    assert f"refiners {' '.join(command)}".strip() in result.output.replace("Usage: refiners", "")


def test_help_does_not_wait_for_torch() -> None:
    program = "import sys, refiners.cli; refiners.cli.app(['-h'], standalone_mode=False); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "False"


def test_the_version_is_the_package_s(run: Run) -> None:
    assert run("--version") == (0, f"refiners {refiners.__version__}\n", "")


def test_ports_are_listed_with_what_they_are(run: Run) -> None:
    code, output, _ = run("tree")
    assert code == 0
    assert [line.split() for line in output.splitlines()[1:]] == [["tiny", "small"], ["deep", "deeper"]]


def test_a_tree_is_printed_from_the_meta_device(run: Run) -> None:
    code, output, _ = run("tree", "deep", "--plain")
    with torch.device("meta"):
        assert (code, output) == (0, f"{TinyEncoder()!r}\n")


def test_a_tree_is_cut_at_the_depth_that_is_asked_for(run: Run) -> None:
    _, whole, _ = run("tree", "deep", "--plain", "--depth", 0)
    _, cut, _ = run("tree", "deep", "--plain", "--depth", 1)
    assert "ReLU" in whole
    assert "ReLU" not in cut
    assert "Residual" in cut


def test_a_tree_without_a_terminal_holds_no_colours(run: Run) -> None:
    code, output, _ = run("tree", "deep")
    assert code == 0
    assert "Residual" in output
    assert "\x1b[" not in output


def test_an_unknown_port_is_one_message_with_the_names(run: Run) -> None:
    code, output, errors = run("tree", "tinny")
    assert (code, output) == (1, "")
    assert errors == 'Error: No port is called "tinny". Did you mean tiny? The ports are: tiny, deep.\n'


def test_weights_are_converted_and_written(run: Run, published: Path, tmp_path: Path) -> None:
    target = tmp_path / "ours.safetensors"
    code, output, _ = run("convert", "tiny", published, target)
    assert code == 0
    assert f"{target}: 2 tensors of tiny, from {published}." in output
    converted = load_file(target)
    assert set(converted) == {"Linear.weight", "Linear.bias"}
    assert torch.equal(converted["Linear.weight"], UPSTREAM["encoder.fc.weight"])


def test_a_published_configuration_replaces_the_port_s_own(run: Run, tmp_path: Path) -> None:
    source, target, config = tmp_path / "in.safetensors", tmp_path / "out.safetensors", tmp_path / "config.json"
    save_file({"encoder.fc.weight": torch.zeros(3, 5), "encoder.fc.bias": torch.zeros(3)}, source)
    config.write_text(json.dumps({"hidden_size": 5}))
    assert run("convert", "tiny", source, target)[0] == 1
    assert run("convert", "tiny", source, target, "--config", config)[0] == 0
    assert load_file(target)["Linear.weight"].shape == (3, 5)


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[1]", "holds a JSON list, not an object")])
def test_a_configuration_that_is_none_is_refused(
    text: str, message: str, run: Run, published: Path, tmp_path: Path
) -> None:
    config, target = tmp_path / "config.json", tmp_path / "ours.safetensors"
    config.write_text(text)
    code, _, errors = run("convert", "tiny", published, target, "--config", config)
    assert code == 1
    assert message in errors
    assert str(config) in errors
    assert not target.exists()


def test_weights_that_do_not_fit_are_all_named_and_nothing_is_written(run: Run, tmp_path: Path) -> None:
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file({"encoder.fc.weight": torch.zeros(3, 2), "pooler.weight": torch.zeros(1)}, source)
    code, _, errors = run("convert", "tiny", source, target)
    assert code == 1
    assert "pooler.weight" in errors
    assert "bias" in errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == [source]


def test_an_output_that_exists_is_kept_unless_forced(run: Run, published: Path, tmp_path: Path) -> None:
    target = tmp_path / "ours.safetensors"
    target.write_text("precious")
    code, _, errors = run("convert", "tiny", published, target)
    assert code == 1
    assert str(target) in errors
    assert "--force" in errors
    assert target.read_text() == "precious"
    assert run("convert", "tiny", published, target, "--force")[0] == 0
    assert set(load_file(target)) == {"Linear.weight", "Linear.bias"}


def test_an_output_that_cannot_be_written_is_one_message(run: Run, published: Path, tmp_path: Path) -> None:
    target = tmp_path / "no" / "such" / "folder" / "ours.safetensors"
    code, _, errors = run("convert", "tiny", published, target)
    assert code == 1
    assert str(target.parent) in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x04K\x01.", b"\xff" * 64, b"PK\x03\x04"], ids=["empty", "pickle", "noise", "zip"]
)
def test_a_file_that_is_no_safetensors_is_one_message(content: bytes, run: Run, tmp_path: Path) -> None:
    source = tmp_path / "in.safetensors"
    source.write_bytes(content)
    code, _, errors = run("convert", "tiny", source, tmp_path / "out.safetensors")
    assert code == 1
    assert str(source) in errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == [source]


def test_a_truncated_file_is_one_message(run: Run, published: Path, tmp_path: Path) -> None:
    published.write_bytes(published.read_bytes()[:-4])
    code, _, errors = run("convert", "tiny", published, tmp_path / "out.safetensors")
    assert code == 1
    assert str(published) in errors


def test_a_source_that_is_not_there_is_one_message(run: Run, tmp_path: Path) -> None:
    code, _, errors = run("convert", "tiny", tmp_path / "nowhere.safetensors", tmp_path / "out.safetensors")
    assert code == 1
    assert "nowhere.safetensors" in errors
    assert "Traceback" not in errors


CASE_MODULE = """
import torch
from torch import nn
from refiners.conversion import KeyMap
from refiners.parity import Case

CASES = [
    Case(
        id=f"linear/{name}",
        upstream=lambda: nn.ModuleDict({"fc": nn.Linear(2, 3)}),
        port=lambda bias=bias: nn.ModuleDict({"ours": nn.Linear(2, 3)}),
        key_map=KeyMap({"fc": "ours"}),
        inputs=lambda generator: {"x": torch.randn(4, 2, generator=generator)},
        run_upstream=lambda model, inputs: {"y": model["fc"](inputs["x"])},
        run_port=lambda model, inputs, bias=bias: {"y": model["ours"](inputs["x"]) + bias},
        summary="one linear layer",
    )
    for name, bias in {"equal": 0.0, "shifted": 0.5}.items()
]
"""


@pytest.fixture
def cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module with one case that is equal and one that is not."""
    (tmp_path / "planted_cases.py").write_text(CASE_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "planted_cases"
    sys.modules.pop("planted_cases", None)


def test_cases_of_another_repository_are_listed(run: Run, cases: str) -> None:
    code, output, _ = run("parity", "list", "--cases", cases)
    assert code == 0
    assert "linear/equal" in output
    assert "linear/shifted" in output


@pytest.mark.parametrize("only", [["equal"], ["-k", "equal"]], ids=["as argument", "as option"])
def test_a_run_of_equal_cases_is_exit_code_zero_and_leaves_its_results(
    only: list[str], run: Run, cases: str, tmp_path: Path
) -> None:
    results = tmp_path / "parity.json"
    code, output, _ = run("parity", "run", *only, "--cases", cases, "--lanes", "float32", "--json", results)
    assert code == 0
    assert "BITWISE" in output
    assert [row["verdict"] for row in json.loads(results.read_text())["results"]] == ["BITWISE"]


def test_a_run_of_a_case_that_differs_is_exit_code_one(run: Run, cases: str) -> None:
    code, output, _ = run("parity", "run", "--cases", cases, "--lanes", "float32")
    assert code == 1
    assert "DIFFERENT" in output


def test_one_case_is_shown_in_full(run: Run, cases: str) -> None:
    code, output, _ = run("parity", "show", "linear/equal", "--cases", cases, "--lanes", "float32")
    assert code == 0
    assert "linear/equal[float32]: BITWISE" in output


def test_an_unknown_case_is_one_message_with_the_nearest(run: Run, cases: str) -> None:
    code, _, errors = run("parity", "show", "linear/equall", "--cases", cases)
    assert code == 1
    assert errors.startswith("Error: ")
    assert "linear/equal" in errors


def test_a_wrong_option_is_exit_code_two(run: Run) -> None:
    code, _, errors = run("tree", "tiny", "--deep")
    assert code == 2
    assert "--deep" in errors
