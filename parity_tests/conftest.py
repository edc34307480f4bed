"""What holds for the whole suite."""

import gc

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """Give each process of pytest-xdist its share of the cores: threads that outnumber them spin for one another."""
    processes: int = getattr(config, "workerinput", {}).get("workercount", 1)
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))


def pytest_collection_finish() -> None:
    """Let Python search for garbage less often: it would look through the millions of objects of upstream.

    They are not frozen, since counting what is frozen walks through all of it, and some code asks for that.
    """
    gc.set_threshold(20_000, 20, 50)
