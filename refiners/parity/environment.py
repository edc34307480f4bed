"""What a result was measured with: versions, device, driver."""

import importlib.metadata
import platform
import sys
from functools import cache
from typing import Any

import torch
from torch import nn

# Each result names a version, and reading the metadata of a package takes as long as running a small model.
_version_in_metadata = cache(importlib.metadata.version)


def _installed(package: str) -> str:
    """The version of an importable package, or an empty string."""
    try:
        return _version_in_metadata(package)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        # Distributions may be named otherwise than what they install; then only the module itself can tell.
        return str(getattr(sys.modules.get(package), "__version__", ""))


def version_of(package: str) -> str:
    """ "transformers 5.23.0" for the package `transformers`; the bare name where no version is known."""
    return f"{package} {_installed(package)}".strip()


def origin_of(model: nn.Module) -> str:
    """The package a model's class comes from, with its version.

    A module that only holds what is upstream's, such as a scheduler, names the package in `upstream_package`.
    """
    return version_of(getattr(type(model), "upstream_package", type(model).__module__.split(".")[0]))


def package_behind(error: BaseException) -> str:
    """The installed version of the package that an import or attribute error is about; "" when it is about none."""
    chain: list[BaseException] = []
    while error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__ or error
    for found in chain:
        name = ""
        if isinstance(found, ImportError):
            name = found.name or ""
        elif isinstance(found, AttributeError):
            name = getattr(found.obj, "__module__", None) or getattr(found.obj, "__name__", None) or ""
        top = str(name).split(".")[0]
        if top and _installed(top):
            return f"{version_of(top)} is installed"
        if isinstance(found, ModuleNotFoundError) and top:
            return f"{top} is not installed"
    return ""


def environment() -> dict[str, Any]:
    """Versions and devices, as they stand in `parity.json`."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.cuda.is_available():
        found["cuda"] = {
            "device": torch.cuda.get_device_name(),
            "capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "runtime": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": _driver(),
        }
    return found


def _driver() -> str:
    try:
        with open("/proc/driver/nvidia/version") as file:
            return file.readline().strip()
    except OSError:
        return "unknown"
