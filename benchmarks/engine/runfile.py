"""The figures of a run in a file, from which the report, the docs and the baselines are made.

Each figure is written as soon as it is known, so that a run that is interrupted keeps what it has. A contestant that
fails, for want of memory say, is an error in the file, and the others go on.
"""

import json
import os
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.engine.device import Device, State
from benchmarks.engine.figures import Figure

FORMAT = "refiners-benchmarks-1"


class RunFileError(ValueError):
    """A file that holds no figures of these benchmarks."""


class RunFile:
    """The figures of this run, in a file that is whole at every moment."""

    def __init__(self, path: Path, device: Device, commit: str = "") -> None:
        self.path = path
        self.told: dict[str, Any] = {
            "format": FORMAT,
            "device": device.as_json(),
            "commit": commit,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "complete": False,
            "states": [],
            "figures": {},
            "errors": {},
        }
        self.write()

    def add(self, name: str, figure: Figure) -> None:
        self.told["figures"][name] = figure.as_json()
        self.write()

    def fail(self, name: str, error: str) -> None:
        self.told["errors"][name] = error
        self.write()

    def note(self, state: State) -> None:
        """How the device is now."""
        if state.readings:
            self.told["states"].append(asdict(state))
            self.write()

    def close(self, with_samples: bool = True) -> None:
        """The run has come to its end. Without the raw samples, the file is small enough to be committed."""
        self.told["complete"] = True
        if not with_samples:
            self.told["figures"] = {name: without_samples(figure) for name, figure in self.told["figures"].items()}
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.told)


def without_samples(figure: dict[str, Any]) -> dict[str, Any]:
    """A figure with the number of its draws in place of them."""
    return {**figure, "samples": [], "draws": len(figure["samples"])}


def write_json(path: Path, told: Any) -> None:
    """To a temporary file first: a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_run(path: Path) -> dict[str, Any]:
    """The figures of a file.

    Raises:
        RunFileError: It is missing, broken, or of something else.
    """
    if not path.is_file():
        raise RunFileError(f"There is no file {path}. Measure one: `nox -s benchmarks -- --figures {path}`.")
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunFileError(f"{path} is broken: {error}. Restore it from git, or measure anew.") from error
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        raise RunFileError(f"{path} holds no figures of these benchmarks: its format is not {FORMAT!r}.")
    missing = [name for name in ("device", "figures", "errors", "complete") if name not in told]
    if missing:
        raise RunFileError(f"{path} is incomplete: it has no {', '.join(missing)}.")
    return told
