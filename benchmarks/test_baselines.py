"""What is compared with a baseline, what is not, and how each is told: on devices that are made up."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.baselines import __main__ as command
from benchmarks.engine.baseline import BaselineError, Outcome, baseline_for, judge, record
from benchmarks.engine.device import Device, DeviceError, State, ask_nvidia_smi, read_device, read_state
from benchmarks.engine.figures import Figure, Interval, exact
from benchmarks.engine.runfile import RunFile, RunFileError, read_run

H200 = Device("cuda", "NVIDIA H200", {"capability": "sm90", "driver": "560.1", "torch": "2.13.0", "power limit": "700"})
READINGS = {"clocks.sm": "1980", "clocks.mem": "3201", "temperature.gpu": "41", "power.draw": "120"}


def ratio(median: float, half: float = 0.005, **facts: Any) -> Figure:
    interval = Interval(median, median * (1 - half), median * (1 + half))
    return Figure(interval, limit=None, samples=(median, median), facts={"dtype": "float32", **facts})


FIGURES = {"unet": ratio(0.9), "lora": ratio(1.1), "bytes": exact(4096, limit=None, unit="bytes")}


def run_of(path: Path, figures: Mapping[str, Figure] = FIGURES, device: Device = H200) -> dict[str, Any]:
    run = RunFile(path, device, commit="abc")
    for name, figure in figures.items():
        run.add(name, figure)
    run.close()
    return read_run(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Baselines, with one of the device."""
    folder = tmp_path / "baselines"
    folder.mkdir()
    record(run_of(tmp_path / "first.json"), folder, H200.slug)
    return folder


def outcomes(run: Mapping[str, Any], folder: Path) -> dict[str, Outcome]:
    return {finding.name: finding.outcome for finding in judge(run, baseline_for(run, folder))}


def test_the_same_run_again_is_the_same(tmp_path: Path, folder: Path) -> None:
    assert set(outcomes(run_of(tmp_path / "run.json"), folder).values()) == {Outcome.SAME}


@pytest.mark.parametrize(
    ("figure", "outcome"),
    [
        (ratio(0.95), Outcome.SLOWER),
        (ratio(0.85), Outcome.FASTER),
        (ratio(0.902), Outcome.SAME),
        (ratio(0.92, half=0.1), Outcome.UNDECIDED),
        (ratio(0.9, shapes=[1, 2]), Outcome.CHANGED),
    ],
    ids=["slower", "faster", "same", "undecided", "another shape"],
)
def test_an_interval_decides_about_a_ratio(tmp_path: Path, folder: Path, figure: Figure, outcome: Outcome) -> None:
    run = run_of(tmp_path / "run.json", {**FIGURES, "unet": figure})
    assert outcomes(run, folder)["unet"] is outcome


def test_a_byte_more_is_told(tmp_path: Path, folder: Path) -> None:
    run = run_of(tmp_path / "run.json", {**FIGURES, "bytes": exact(4097, limit=None, unit="bytes")})
    assert outcomes(run, folder)["bytes"] is Outcome.CHANGED


def test_a_renamed_benchmark_is_missing_and_new_and_neither_is_green(tmp_path: Path, folder: Path) -> None:
    figures = {**FIGURES, "unet five times slower": ratio(4.5)}
    del figures["unet"]
    found = outcomes(run_of(tmp_path / "run.json", figures), folder)
    assert (found["unet"], found["unet five times slower"]) == (Outcome.MISSING, Outcome.NEW)
    assert not any(found[name].is_green for name in ("unet", "unet five times slower"))


def test_a_contestant_that_failed_is_an_error_and_the_others_are_compared(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "run.json"
    run = RunFile(path, H200)
    run.fail("unet", "OutOfMemoryError: CUDA out of memory")
    run.add("lora", FIGURES["lora"])
    run.add("bytes", FIGURES["bytes"])
    run.close()
    found = outcomes(read_run(path), folder)
    assert (found["unet"], found["lora"]) == (Outcome.ERROR, Outcome.SAME)


def test_an_interrupted_run_keeps_what_it_has_and_is_not_green(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "run.json"
    RunFile(path, H200).add("unet", FIGURES["unet"])
    found = outcomes(read_run(path), folder)
    assert found["unet"] is Outcome.SAME
    assert found["lora"] is Outcome.MISSING
    with pytest.raises(BaselineError, match="interrupted"):
        record(read_run(path), folder, "new")


def test_a_throttled_run_is_not_green(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "run.json"
    run = RunFile(path, H200)
    for name, figure in FIGURES.items():
        run.add(name, figure)
    run.note(State({"clock": "990"}, ("power cap",)))
    run.close()
    assert set(outcomes(read_run(path), folder).values()) == {Outcome.THROTTLED}
    with pytest.raises(BaselineError, match="throttled: power cap"):
        record(read_run(path), folder, "new")


@pytest.mark.parametrize("name", ["driver", "torch", "power limit", "capability"])
def test_another_device_is_compared_with_nothing(tmp_path: Path, folder: Path, name: str) -> None:
    other = Device("cuda", H200.name, {**H200.properties, name: "other"})
    with pytest.raises(BaselineError, match=f"no baseline of this device.*{name} other for"):
        baseline_for(run_of(tmp_path / "run.json", device=other), folder)


def test_a_baseline_of_another_device_is_refused(tmp_path: Path) -> None:
    other = Device("cuda", "NVIDIA A100", H200.properties)
    runs = [run_of(tmp_path / "one.json"), run_of(tmp_path / "other.json", device=other)]
    with pytest.raises(BaselineError, match="another device: name NVIDIA H200 for NVIDIA A100"):
        judge(*runs)


@pytest.mark.parametrize(
    ("text", "told"),
    [("{", "is broken"), ("{}", "holds no figures"), ('{"machine_info": {}}', "holds no figures")],
    ids=["cut", "empty", "foreign"],
)
def test_a_file_that_is_no_run_is_told(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(RunFileError, match=told):
        read_run(path)


def test_a_broken_baseline_is_told_and_not_skipped(tmp_path: Path, folder: Path) -> None:
    (folder / "a-broken-one.json").write_text("{")
    with pytest.raises(RunFileError, match="a-broken-one.json is broken"):
        baseline_for(run_of(tmp_path / "run.json"), folder)


def test_a_missing_file_says_how_to_measure_one(tmp_path: Path) -> None:
    with pytest.raises(RunFileError, match="nox -s benchmarks -- --figures"):
        read_run(tmp_path / "run.json")


def test_the_command_records_compares_and_writes_a_summary(tmp_path: Path) -> None:
    folder, run, summary = tmp_path / "baselines", tmp_path / "run.json", tmp_path / "summary.md"
    folder.mkdir()
    run_of(run)
    assert command.main(["--compare", str(run), "--summary", str(summary)], folder) == 1
    assert "There is no baseline of this device" in summary.read_text()
    assert command.main(["--record", str(run)], folder) == 0
    assert command.main(["--compare", str(run), "--summary", str(summary)], folder) == 0
    assert "3 of 3 green" in summary.read_text()


def test_a_recorded_baseline_holds_no_raw_samples(folder: Path) -> None:
    (path,) = folder.iterdir()
    assert all(figure["samples"] == [] for figure in json.loads(path.read_text())["figures"].values())


def test_judging_changes_neither_of_them(tmp_path: Path, folder: Path) -> None:
    run = run_of(tmp_path / "run.json")
    baseline = baseline_for(run, folder)
    before = copy.deepcopy((run, baseline))
    judge(run, baseline)
    assert (run, baseline) == before


# Readings


def answer(reasons: str = "0x0000000000000000") -> Any:
    values = {**READINGS, "clocks_throttle_reasons.active": reasons}
    return lambda names: [values[name] for name in names]


def test_a_quiet_gpu_is_not_throttled() -> None:
    assert read_state("cuda", answer("0x0000000000000001")).throttled == ()


def test_a_throttled_gpu_says_why() -> None:
    assert read_state("cuda", answer("0x0000000000000024")).throttled == ("power cap", "too hot (driver)")


def test_readings_that_nobody_understands_are_told() -> None:
    with pytest.raises(DeviceError, match="no mask"):
        read_state("cuda", answer("[N/A]"))


def test_no_gpu_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(DeviceError, match="no GPU"):
        read_device("cuda")


def test_no_nvidia_smi_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(DeviceError, match="no nvidia-smi"):
        ask_nvidia_smi(["clocks.sm"])


def test_a_cpu_is_known_by_its_name_and_cores() -> None:
    device = read_device("cpu")
    assert device.name
    assert int(device.properties["cores"]) >= 1
