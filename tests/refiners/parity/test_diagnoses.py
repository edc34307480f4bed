"""The classic mistakes of porting, each in a plain module that was written apart from upstream's, are told by name."""

import pytest
import torch

from refiners.parity.explain import Explanation, explain_modules
from tests.refiners.parity.classic_faults import FAULTS, both


def explained(name: str, dtype: torch.dtype = torch.float64) -> Explanation:
    upstream, port, x = both(name, dtype)
    return explain_modules(
        upstream, port, lambda: {"y": upstream(x)}, lambda: {"y": port(x)}, right_weights=upstream.state_dict()
    )


@pytest.mark.parametrize("name", FAULTS)
def test_a_classic_mistake_is_found_and_named(name: str) -> None:
    *_, path, words = FAULTS[name]
    first = explained(name).faults[0]
    assert first.finding.port == path
    assert all(word in first.diagnosis for word in words), first.diagnosis


@pytest.mark.parametrize("name", [name for name in FAULTS if name != "norm-order"])
def test_nothing_else_is_blamed(name: str) -> None:
    assert len(explained(name, torch.float32).faults) == 1
