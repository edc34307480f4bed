"""A token that is padding sees itself upstream: told for each way in which a mask reaches the scores."""

import pytest
import torch
from torch import Tensor, nn

from tests.refiners.parity.toys import explained_pair

SEEN = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], dtype=torch.bool)
X = torch.linspace(-2, 2, 2 * 6 * 8, dtype=torch.float64).sin().view(2, 6, 8)
FORMS = ("masked_fill", "where", "add", "added to attention", "seen by attention")


class Attention(nn.Module):
    """Attention of one head, with a mask in one of several forms."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.query, self.key, self.value, self.merge = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        visible = seen[:, None].expand(2, 6, 6)
        q, k, v = self.query(x), self.key(x), self.value(x)
        added = 1e30 * (visible.to(x.dtype) - 1)
        if "attention" in self.form:
            mask = visible if "seen" in self.form else added
            return self.merge(nn.functional.scaled_dot_product_attention(q, k, v, mask))
        scores = q @ k.mT / 8**0.5
        if self.form == "masked_fill":
            scores = scores.masked_fill(~visible, -1e30)
        elif self.form == "where":
            scores = torch.where(visible, scores, torch.tensor(-1e30, dtype=x.dtype))
        else:
            scores = scores + added
        return self.merge(scores.softmax(-1) @ v)


class CountsItself(Attention):
    """Upstream, which counts what speaks for a token: one that is padding sees itself."""

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        reasons = seen.to(x.dtype)[:, None] + torch.eye(6, dtype=x.dtype)
        scores = torch.einsum("bid,bjd->bij", self.query(x), self.key(x)) / 8**0.5
        scores = scores - 1e30 * (reasons < 0.5).to(x.dtype)
        return self.merge(torch.einsum("bij,bjd->bid", scores.softmax(-1), self.value(x)))


@pytest.mark.parametrize("form", FORMS)
def test_a_mask_that_hides_a_token_from_itself_is_named(form: str) -> None:
    upstream, port = CountsItself(form), Attention(form)
    (fault,) = explained_pair(upstream, port, {key: key for key in upstream.state_dict()}, (X, SEEN)).faults
    assert fault.diagnosis.endswith("hides no position from itself")
