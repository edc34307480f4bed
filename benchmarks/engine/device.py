"""The device that is measured: what it is, and the state it is in. Everything is read, nothing is set."""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

# The reasons for a lower clock that make a timing worthless, by their bits in NVML's mask. Idle (1) and the clocks that
# somebody set (2) are none.
THROTTLES = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "too hot (driver)",
    0x40: "too hot (hardware)",
    0x80: "power brake",
}
# What has to be equal for two runs to be compared, as nvidia-smi calls it.
_KEY = {
    "driver": "driver_version",
    "power limit": "power.limit",
    "persistence": "persistence_mode",
    "application clock": "clocks.applications.graphics",
    "memory clock": "clocks.applications.memory",
}
_STATE = {
    "clock": "clocks.sm",
    "memory clock": "clocks.mem",
    "temperature": "temperature.gpu",
    "power": "power.draw",
    "reasons": "clocks_throttle_reasons.active",
}
Ask = Callable[[list[str]], list[str]]


class DeviceError(RuntimeError):
    """A device that is not there, or cannot be read."""


@dataclass(frozen=True)
class State:
    """A device at a moment."""

    readings: dict[str, str] = field(default_factory=dict[str, str])
    throttled: tuple[str, ...] = ()
    """Why its clock is lower than it could be."""


@dataclass(frozen=True)
class Device:
    """What two runs must share to be compared."""

    kind: str
    """cpu or cuda."""
    name: str
    properties: dict[str, str]

    @property
    def key(self) -> dict[str, str]:
        return {"kind": self.kind, "name": self.name, **self.properties}

    @property
    def slug(self) -> str:
        """The name of its file: what people call it by. The key in the file decides."""
        parts = [self.name, *(self.properties.get(name, "") for name in ("capability", "driver", "torch"))]
        return re.sub(r"[^a-z0-9.]+", "-", "-".join(filter(None, parts)).lower()).strip("-")

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def difference(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """In what two keys differ: `driver 560.1 for 550.2`."""
    names = {**theirs, **ours}
    return [
        f"{name} {ours.get(name, 'none')} for {theirs.get(name, 'none')}"
        for name in names
        if ours.get(name) != theirs.get(name)
    ]


def ask_nvidia_smi(names: list[str]) -> list[str]:
    """One reading of the first GPU for each name.

    Raises:
        DeviceError: nvidia-smi is not there, or fails.
    """
    if shutil.which("nvidia-smi") is None:
        raise DeviceError("There is no nvidia-smi, so the clocks and the throttling of a GPU cannot be read.")
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    values = [value.strip() for value in done.stdout.strip().splitlines()[0].split(",")] if done.stdout.strip() else []
    if done.returncode != 0 or len(values) != len(names):
        raise DeviceError(f"`{' '.join(command)}` failed: {done.stderr.strip() or done.stdout.strip()}")
    return values


def read_device(kind: str = "cpu", ask: Ask = ask_nvidia_smi) -> Device:
    """The device of this machine.

    Raises:
        DeviceError: There is no GPU, or it cannot be read.
    """
    common = {"torch": torch.__version__, "python": ".".join(platform.python_version_tuple()[:2])}
    if kind == "cpu":
        return Device("cpu", processor(), {**common, "cores": str(_cores())})
    if not torch.cuda.is_available():
        raise DeviceError("no GPU: PyTorch finds none that it can use, so nothing was measured on CUDA")
    properties = torch.cuda.get_device_properties(0)
    readings = dict(zip(_KEY, ask([*_KEY.values()]), strict=True))
    cuda = {
        "capability": f"sm{properties.major}{properties.minor}",
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
    }
    return Device("cuda", properties.name, {**cuda, **readings, **common})


def read_state(kind: str = "cpu", ask: Ask = ask_nvidia_smi) -> State:
    """How a device is now; a CPU says nothing."""
    if kind == "cpu":
        return State()
    readings = dict(zip(_STATE, ask([*_STATE.values()]), strict=True))
    try:
        mask = int(readings["reasons"], 16)
    except ValueError as error:
        raise DeviceError(f"The reasons of throttling cannot be read: {readings['reasons']!r} is no mask.") from error
    return State(readings, tuple(told for bit, told in THROTTLES.items() if mask & bit))


def processor() -> str:
    """The name of the CPU."""
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
