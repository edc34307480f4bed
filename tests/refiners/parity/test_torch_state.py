"""Torch's random state as runs change it."""

import pytest
import torch

from refiners.parity.torch_state import seed_torch


def test_what_is_drawn_depends_on_the_seed() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        expected = torch.randn(3)
        seed_torch(5)
        assert torch.equal(torch.randn(3), expected)


def test_without_a_device_nothing_is_noted_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    waiting = len(torch.cuda._queued_calls)
    with torch.random.fork_rng(devices=[]):
        seed_torch(5)
    assert len(torch.cuda._queued_calls) == waiting
