"""`refiners convert` on models of several parts, and `refiners ports`: what is printed, written and refused."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from refiners import cli, ports
from refiners.conversion import KeyMap, Port, read_state_dict, write_state_dict
from tests.refiners.conversion.toy_bundles import (
    BUNDLES,
    expected,
    net_weights,
    single_weights,
    write_folder,
    write_single_file,
)

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    port = Port(
        name="linear",
        build=lambda: nn.Linear(2, 2),
        key_map=KeyMap({"{p}": "{p}"}),
        from_config=lambda config: nn.Linear(2, config["width"]),
        summary="one layer",
    )
    monkeypatch.setattr(ports, "find_ports", lambda: {"linear": port})
    monkeypatch.setattr(ports, "find_bundles", lambda: BUNDLES)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line as a shell would: exit code, output, errors."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["refiners", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_of:
            cli.main()
        captured = capsys.readouterr()
        return int(exit_of.value.code or 0), captured.out, captured.err

    return call


def refused(result: tuple[int, str, str], *texts: str) -> None:
    code, _, errors = result
    assert code == 1
    assert errors.startswith("Error: ")
    assert "Traceback" not in errors
    for text in texts:
        assert text in errors


def test_what_can_be_converted_is_listed(run: Run) -> None:
    code, output, _ = run("ports")
    assert code == 0
    assert "toy" in output
    assert "net, head" in output
    assert "linear" in output
    assert "stranger" not in output


@pytest.mark.parametrize("kind", [["toy"], []], ids=["said", "recognised"])
def test_a_folder_is_converted_and_verified(kind: list[str], run: Run, tmp_path: Path) -> None:
    source, target = write_folder(tmp_path / "in"), tmp_path / "out"
    code, output, errors = run("convert", *kind, source, target)
    assert (code, errors) == (0, "")
    assert f"{target}: Toy 1, from {source}." in output
    assert [line.split()[:2] for line in output.splitlines()[2:4]] == [
        ["net.safetensors", "6"],
        ["head.safetensors", "1"],
    ]
    assert "left out: checker" in output
    assert run("convert", "--verify", target) == (0, f"{target}: 7 tensors of toy, each as it was written.\n", "")


def test_options_reach_the_conversion(run: Run, tmp_path: Path) -> None:
    source = write_single_file(tmp_path / "in.safetensors", 8)
    configs = write_folder(tmp_path / "configs", 8)
    options = ("--config", configs, "--tokenizer", configs / "tokenizer", "--dtype", "bfloat16")
    assert run("convert", source, tmp_path / "out", *options)[0] == 0
    assert (tmp_path / "out" / "tokenizer" / "vocab.json").is_file()
    read = read_state_dict(tmp_path / "out" / "net.safetensors")
    assert torch.equal(read["Key.weight"], expected(8)["net"]["Key.weight"].bfloat16())


def test_odd_values_are_warned_of(run: Run, tmp_path: Path) -> None:
    weights = {**single_weights(), "head.fc.weight": torch.full((2, 4), float("nan"))}
    write_state_dict(tmp_path / "in.safetensors", weights)
    code, _, errors = run("convert", tmp_path / "in.safetensors", tmp_path / "out")
    assert (code, errors) == (0, "Warning: head: Linear.weight, made of head.fc.weight, holds NaN\n")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a"], "expected [KIND] IN OUT, got 1 names"),
        (["a", "b", "c", "d"], "got 4 names"),
        (["--verify", "a", "b"], "expected --verify DIR, got 2 names"),
    ],
)
def test_a_wrong_number_of_names_is_exit_code_2(names: list[str], message: str, run: Run) -> None:
    code, _, errors = run("convert", *names)
    assert code == 2
    assert message in " ".join(errors.replace("│", " ").split())


def rewrite(file: Path, weights: dict[str, torch.Tensor]) -> None:
    write_state_dict(file, weights, overwrite=True)


def shard(folder: Path, absent: bool = False) -> None:
    """Cuts the weights of the net into two shards; the second one may not be there."""
    weights = list(net_weights().items())
    names = ["diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model-00002-of-00002.safetensors"]
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    for name, part in zip(names, (weights[:3], weights[3:]), strict=True):
        write_state_dict(folder / name, dict(part))
    index = {key: names[number >= 3] for number, (key, _) in enumerate(weights)}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    if absent:
        (folder / names[1]).unlink()


def test_shards_are_converted(run: Run, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in")
    shard(source / "net")
    assert run("convert", "toy", source, tmp_path / "out")[0] == 0
    assert torch.equal(read_state_dict(tmp_path / "out" / "net.safetensors")["Out.bias"], net_weights()["out.bias"])


def spoil_truncated(source: Path) -> tuple[str, ...]:
    shard(source / "net")
    file = source / "net" / "diffusion_pytorch_model-00002-of-00002.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    return str(file), f"expected {len(whole)} bytes, found {len(whole) - 5}"


def spoil_absent(source: Path) -> tuple[str, ...]:
    shard(source / "net", absent=True)
    return "index.json names shards that are not there: diffusion_pytorch_model-00002-of-00002.safetensors", str(source)


def spoil_keys(source: Path) -> tuple[str, ...]:
    weights = net_weights()
    weights["attention.q.bias"] = weights.pop("attn.q.bias")
    rewrite(source / "net" / "diffusion_pytorch_model.safetensors", weights)
    return "1 missing", "1 unexpected", "'attn.q.bias', which is not there; nearest: 'attention.q.bias'", "net:"


def spoil_shape(source: Path) -> tuple[str, ...]:
    rewrite(source / "net" / "diffusion_pytorch_model.safetensors", {**net_weights(), "out.bias": torch.zeros(7)})
    return ("Out.bias: needs (1,), 'out.bias' gives (7,)",)


def spoil_config(source: Path) -> tuple[str, ...]:
    (source / "net" / "config.json").write_text('{"width": 4, "depth": 2}')
    return "depth: is 2, the port does not know this attribute", "net:"


def spoil_web_page(source: Path) -> tuple[str, ...]:
    (source / "net" / "diffusion_pytorch_model.safetensors").write_text("<html>not found</html>")
    return ("it is a web page",)


@pytest.mark.parametrize(
    "spoil", [spoil_truncated, spoil_absent, spoil_keys, spoil_shape, spoil_config, spoil_web_page]
)
def test_a_spoilt_checkpoint_is_one_message_and_nothing_is_written(spoil: Any, run: Run, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in")
    texts = spoil(source)
    refused(run("convert", "toy", source, tmp_path / "out"), *texts)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_another_model_is_named(run: Run, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in")
    refused(run("convert", "twin", source, tmp_path / "out"), "looks like Toy 1, not Twin", "Convert it as toy")
    refused(run("convert", "tou", source, tmp_path / "out"), 'No model and no port is called "tou". Did you mean toy')
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_an_output_that_exists_is_kept_unless_forced(run: Run, tmp_path: Path) -> None:
    source, target = write_folder(tmp_path / "in"), tmp_path / "out"
    assert run("convert", source, target)[0] == 0
    refused(run("convert", source, target), str(target), "exists", "--force")
    assert run("convert", source, target, "--force")[0] == 0


def test_what_cannot_be_read_or_written_is_one_message(run: Run, tmp_path: Path) -> None:
    source = write_folder(tmp_path / "in")
    refused(run("convert", source, tmp_path / "no" / "out"), str(tmp_path / "no"), "does not exist")
    refused(run("convert", tmp_path / "nowhere", tmp_path / "out"), "nowhere does not exist")
    refused(run("convert", "--verify", source), "is no converted model")
    refused(run("convert", source, tmp_path / "out", "--dtype", "int8"), '"int8" is no type for weights', "float16")
    refused(run("convert", "linear", source, tmp_path / "out", "--tokenizer", source), "linear is one port")
    refused(run("convert", source, "/proc/out"), "/proc/out cannot be written")


def test_a_disk_that_fills_up_is_one_message_and_what_is_done_is_kept(run: Run, tmp_path: Path) -> None:
    """Stands for a full disk: the system's limit on the size of a file, which fails in the same place."""
    import resource

    source = write_folder(tmp_path / "in", 400)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, limits[1]))
    try:
        result = run("convert", source, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    refused(result, "out.converting", "cannot be written", "make room and run it again")
    assert not (tmp_path / "out").exists()
    code, _, _ = run("convert", source, tmp_path / "out")
    assert code == 0
    assert torch.equal(
        read_state_dict(tmp_path / "out" / "net.safetensors")["Key.bias"], net_weights(400)["attn.k.bias"]
    )
