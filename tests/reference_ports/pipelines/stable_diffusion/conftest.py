"""The tiny Stable Diffusion model of docs/examples, written to a directory and read from there."""

from collections.abc import Callable
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest

from reference_ports.pipelines.stable_diffusion import LatentDiffusionModel, from_directory

EXAMPLE = Path(__file__).parents[4] / "docs" / "examples" / "tiny_stable_diffusion.py"


@pytest.fixture(scope="session")
def write() -> Callable[..., Path]:
    """Writes a tiny model to a directory."""
    return run_path(str(EXAMPLE))["write"]


@pytest.fixture(scope="session")
def directory(write: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny model, not to be changed."""
    return write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def model(directory: Path) -> LatentDiffusionModel:
    """A tiny model of one's own."""
    return from_directory(directory)


@pytest.fixture
def call() -> dict[str, Any]:
    """What makes a generation short."""
    return {"num_inference_steps": 2, "condition_scale": 3.0}
