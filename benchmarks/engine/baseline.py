"""What a device gave before, and what differs now.

A baseline is a run that was complete, on a device that the key describes to the driver. There is no second best: a
similar device is another device, and a run on it is compared with nothing, which is not green.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from benchmarks.engine.device import difference
from benchmarks.engine.figures import PRECISION
from benchmarks.engine.runfile import RunFileError, read_run, without_samples, write_json


class Outcome(StrEnum):
    """What became of a benchmark since its baseline."""

    SAME = "SAME"
    FASTER = "FASTER"
    SLOWER = "SLOWER"
    UNDECIDED = "UNDECIDED"
    CHANGED = "CHANGED"
    """A count or a size is another one, or the benchmark measures something else."""
    NEW = "NEW"
    MISSING = "MISSING"
    ERROR = "ERROR"
    THROTTLED = "THROTTLED"
    MISSED = "MISSED"
    """Its own limit, whatever the baseline says."""
    TOLD = "TOLD"
    """Seconds are noted and not judged: ratios are."""

    @property
    def is_green(self) -> bool:
        return self in (Outcome.SAME, Outcome.FASTER, Outcome.TOLD)


class BaselineError(RunFileError):
    """A run that cannot be compared with a baseline, or made one."""


@dataclass(frozen=True)
class Finding:
    """What became of one benchmark."""

    name: str
    outcome: Outcome
    told: str = ""


# What makes a benchmark another one although its name stays.
SHAPE = ("dtype", "shapes", "threads")


def key_of(run: Mapping[str, Any]) -> dict[str, str]:
    device = run["device"]
    return {"kind": device["kind"], "name": device["name"], **device["properties"]}


def baseline_for(run: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The baseline of exactly the device of a run.

    Raises:
        BaselineError: There is none; the message says in what the nearest differs. Or a file of the folder is broken.
    """
    ours, nearest = key_of(run), list[tuple[int, str]]()
    for path in sorted(folder.glob("*.json")):
        other = read_run(path)
        differs = difference(ours, key_of(other))
        if not differs:
            return other
        nearest.append((len(differs), f"{path.name} is of another: {'; '.join(differs)}"))
    told = f" {min(nearest)[1]}." if nearest else ""
    raise BaselineError(
        f"There is no baseline of this device ({ours['name']}), so nothing was compared.{told} "
        "Record one from a commit that is known to be good: `python -m benchmarks.baselines --record FIGURES`."
    )


def record(run: Mapping[str, Any], folder: Path, slug: str) -> Path:
    """Make a run the baseline of its device.

    Raises:
        BaselineError: It was interrupted, throttled, or something failed in it.
    """
    problems = [f"{name} failed: {error}" for name, error in run["errors"].items()]
    problems += [] if run["complete"] else ["it was interrupted"]
    problems += [f"the device was throttled: {reason}" for reason in throttles(run)]
    problems += [
        f"{name} is {figure['verdict']}"
        for name, figure in run["figures"].items()
        if figure["verdict"] in ("MISSED", "UNDECIDED")
    ]
    if problems or not run["figures"]:
        raise BaselineError(f"This run is no baseline: {'; '.join(problems[:8]) or 'it holds no figures'}.")
    # The raw samples stay with the run: a baseline is read by people, in a diff.
    slim = {name: without_samples(figure) for name, figure in run["figures"].items()}
    path = folder / f"{slug}.json"
    write_json(path, {**json.loads(json.dumps(run)), "figures": slim})
    return path


def throttles(run: Mapping[str, Any]) -> list[str]:
    """Why the clock was low at some time of the run."""
    return list(dict.fromkeys(reason for state in run.get("states", []) for reason in state["throttled"]))


def judge(run: Mapping[str, Any], baseline: Mapping[str, Any]) -> list[Finding]:
    """What became of every benchmark of either, the bad news first.

    Raises:
        BaselineError: They are of different devices.
    """
    differs = difference(key_of(run), key_of(baseline))
    if differs:
        raise BaselineError(f"The baseline is of another device: {'; '.join(differs)}. Nothing was compared.")
    findings = [Finding(name, Outcome.ERROR, error) for name, error in run["errors"].items()]
    reasons = ", ".join(throttles(run))
    for name, figure in run["figures"].items():
        before = baseline["figures"].get(name)
        findings.append(
            Finding(name, Outcome.NEW, "no baseline has it") if before is None else _judge(name, figure, before)
        )
    for name in baseline["figures"]:
        if name not in run["figures"] and name not in run["errors"]:
            why = "not measured" if run["complete"] else "the run was interrupted"
            findings.append(Finding(name, Outcome.MISSING, f"{why}: deleted or renamed?"))
    if reasons:
        findings = [
            Finding(each.name, Outcome.THROTTLED, reasons) if each.outcome is not Outcome.ERROR else each
            for each in findings
        ]
    return sorted(findings, key=lambda finding: finding.outcome.is_green)


def _judge(name: str, figure: Mapping[str, Any], before: Mapping[str, Any]) -> Finding:
    was, now = ({key: each["facts"].get(key) for key in SHAPE} for each in (before, figure))
    if was != now or figure["unit"] != before["unit"]:
        return Finding(name, Outcome.CHANGED, f"measures something else: {now} for {was}")
    if figure["verdict"] == "MISSED":
        return Finding(name, Outcome.MISSED, f"its limit is {figure['limit']:g}")
    old, new = before["interval"], figure["interval"]
    told = f"{old['median']:.4g} → {new['median']:.4g} {figure['unit']}"
    if new["low"] == new["high"] and old["low"] == old["high"]:
        return Finding(name, Outcome.SAME if new == old else Outcome.CHANGED, told)
    if figure["unit"] == "s":
        return Finding(name, Outcome.TOLD, told)
    if new["low"] > old["high"]:
        return Finding(name, Outcome.SLOWER, told)
    if new["high"] < old["low"]:
        return Finding(name, Outcome.FASTER, told)
    widths = [(each["high"] - each["low"]) / (2 * each["median"]) for each in (old, new)]
    # Both intervals stop at 1 %, give or take the last doubling.
    is_narrow = max(widths) <= 2 * PRECISION
    return Finding(name, Outcome.SAME if is_narrow else Outcome.UNDECIDED, told)


def as_markdown(findings: list[Finding], run: Mapping[str, Any]) -> str:
    """A table for the summary of a job."""
    green = sum(finding.outcome.is_green for finding in findings)
    lines = [
        f"### Benchmarks on {run['device']['name']}: {green} of {len(findings)} green",
        "",
        "| benchmark | outcome | |",
        "|---|---|---|",
        *(f"| {each.name} | {each.outcome} | {each.told} |" for each in findings),
    ]
    return "\n".join(lines) + "\n"
