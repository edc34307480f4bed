"""A mask that is made of one for queries and one for keys: one of the two is missing, or is too much."""

import pytest
import torch
from torch import Tensor, nn

from refiners.parity.explain import Explanation, explain_modules
from refiners.parity.lanes import Lane, held_equal
from refiners.parity.weights import fill_informative

LANE = Lane("float64")
X = torch.linspace(-2, 2, 2 * 6 * 8, dtype=LANE.dtype).sin().view(2, 6, 8)
KEPT = torch.arange(6) < torch.tensor([[6], [4]])
BOTH, KEYS = "queries and keys", "keys"


class Attention(nn.Module):
    """Attention under a mask of whole numbers, of flags, or of what is added."""

    def __init__(self, masks: str, style: str) -> None:
        super().__init__()
        self.masks, self.style = masks, style
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def mask(self, kept: Tensor) -> Tensor:
        keys = kept.long().unsqueeze(1) if self.style == "numbers" else kept.unsqueeze(1)
        if self.masks == KEYS:
            return keys.bool()
        queries = keys.squeeze(1).unsqueeze(-1)
        return (keys * queries).bool() if self.style == "numbers" else keys & queries

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).mT / 8**0.5
        scores = scores.masked_fill(~self.mask(kept), -1e9)
        return self.o(scores.softmax(-1) @ self.v(x))


def explained(upstream_masks: str, port_masks: str, style: str) -> Explanation:
    with held_equal(LANE):
        upstream, port = (Attention(masks, style).to(LANE.dtype).eval() for masks in (upstream_masks, port_masks))
        fill_informative(upstream, 0)
        port.load_state_dict(upstream.state_dict(), assign=True)
        runs = (lambda model=model: {"y": model(X.clone(), KEPT.clone())} for model in (upstream, port))
        return explain_modules(upstream, port, *runs)


@pytest.mark.parametrize(("style", "joins"), [("numbers", "mul(int64"), ("flags", "bitwise_and(bool")])
def test_a_mask_of_queries_that_is_missing_is_named(style: str, joins: str) -> None:
    (fault,) = explained(BOTH, KEYS, style).faults
    assert fault.diagnosis.startswith(f"when it computes `{joins}")
    assert "as well, as upstream does" in fault.diagnosis
    assert "unsqueeze" not in fault.diagnosis


@pytest.mark.parametrize(("style", "joins"), [("numbers", "mul(int64"), ("flags", "bitwise_and(bool")])
def test_a_mask_of_queries_that_is_too_much_is_named(style: str, joins: str) -> None:
    (fault,) = explained(KEYS, BOTH, style).faults
    assert fault.diagnosis.startswith(f"without `{joins}")
    assert "unsqueeze" not in fault.diagnosis
