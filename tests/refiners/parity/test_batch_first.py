"""A port with the batch first, where upstream has the moments first: ids, rows and scores stand in another order."""

import pytest
import torch
from torch import Tensor, nn

from refiners.parity.explain import Explanation
from refiners.parity.reasons.axes import Orders
from tests.refiners.parity.toys import explained_pair

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])
KINDS = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0, 0]])
SEEN = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]])


class Weights(nn.Module):
    """What both sides hold."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.norm = nn.Embedding(11, 8), nn.LayerNorm(8)
        self.query, self.key, self.value, self.merge = (nn.Linear(8, 8, bias=False) for _ in range(4))
        self.content, self.kind = nn.Parameter(torch.zeros(2, 4)), nn.Parameter(torch.zeros(2, 4))
        self.kinds = nn.Parameter(torch.zeros(2, 2, 4))


class MomentsFirst(Weights):
    """Upstream: attention with a term for tokens of one kind; a token that is padding sees itself."""

    def forward(self, ids: Tensor, kinds: Tensor, seen: Tensor) -> Tensor:
        ids, kinds, seen = ids.mT.contiguous(), kinds.mT.contiguous(), seen.mT.contiguous()
        x = self.tokens(ids)
        q, k, v = (layer(x).view(7, 2, 2, 4) for layer in (self.query, self.key, self.value))
        scores = torch.einsum("ibhd,jbhd->bhij", q + self.content, k)
        kind = torch.einsum("ibhd,shd->ibhs", q + self.kind, self.kinds)
        same = nn.functional.one_hot((kinds[:, None] != kinds[None, :]).long(), 2).to(x.dtype)
        scores = scores + torch.einsum("ijbs,ibhs->bhij", same, kind)
        hidden = (1 - seen)[None].to(x.dtype) - torch.eye(7, dtype=x.dtype)[:, :, None]
        scores = scores - 1e30 * torch.einsum("ijb->bij", (hidden > 0).to(x.dtype))[:, None]
        x = self.norm(self.merge(torch.einsum("bhij,jbhd->ibhd", scores.softmax(-1), v).flatten(2)) + x)
        return x.transpose(0, 1).contiguous()


class BatchFirst(Weights):
    """The port, with one mistake."""

    fault = ""

    def forward(self, ids: Tensor, kinds: Tensor, seen: Tensor) -> Tensor:
        x = self.tokens(ids)
        q, k, v = (layer(x).view(2, 7, 2, 4) for layer in (self.query, self.key, self.value))
        scores = torch.einsum("bihd,bjhd->bhij", q + self.content, k)
        bias = self.content if self.fault == "bias" else self.kind
        kind = torch.einsum("bihd,shd->bhis", q + bias, self.kinds)
        scores = scores + torch.where((kinds[:, :, None] != kinds[:, None])[:, None], kind[..., 1:], kind[..., :1])
        hidden = (seen == 0)[:, None].expand(2, 7, 7)
        if self.fault != "mask":
            hidden = hidden & ~torch.eye(7, dtype=torch.bool)
        scores = scores.masked_fill(hidden[:, None], -1e30)
        return self.norm(self.merge(torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2)) + x)


def explained(fault: str = "") -> Explanation:
    upstream = MomentsFirst()
    keys = {key: key for key in upstream.state_dict()}
    return explained_pair(upstream, BatchFirst(), keys, (IDS, KINDS, SEEN), fault=("", "fault", fault))


def test_a_right_port_with_the_batch_first_is_not_blamed() -> None:
    assert all(fault.diagnosis.startswith("within rounding") for fault in explained().faults)


def test_a_bias_that_stands_in_the_place_of_another_one_is_named() -> None:
    (found,) = explained("bias").faults
    assert "`kind`), not what `add` at" in found.diagnosis


def test_a_mask_that_hides_a_token_from_itself_is_named_and_nothing_else() -> None:
    (found,) = explained("mask").faults
    assert found.diagnosis.startswith("when the mask of `masked_fill` at")
    assert found.diagnosis.endswith("hides no position from itself")


@pytest.mark.parametrize("is_other", [False, True])
def test_whole_numbers_tell_an_order_only_where_they_are_equal_in_it(is_other: bool) -> None:
    orders, right = Orders(), IDS.mT.contiguous()
    orders.look(IDS + is_other, right, IDS.reshape(7, 2))
    assert bool(orders) is not is_other
