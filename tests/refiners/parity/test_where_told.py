"""A cause is told at the node that holds it, in each layer that has one."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refiners.parity.explain import Explanation, explain_modules
from refiners.parity.lanes import Lane, held_equal
from refiners.parity.weights import fill_informative

LANE = Lane("float32")
X = torch.linspace(-2, 2, 2 * 6 * 16).sin().view(2, 6, 16)
KEPT = torch.arange(6) < torch.tensor([[6], [4]])


class Layer(nn.Module):
    """Attention of four heads over two keys, turned by a table that the model makes."""

    def __init__(self, *, is_tiled: bool = False) -> None:
        super().__init__()
        self._is_tiled = is_tiled
        self.q, self.kv, self.o = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, table: Tensor, keep: Tensor) -> Tensor:
        q = self.q(x).view(2, 6, 4, 4) * table
        k, v = self.kv(x).view(2, 6, 2, 2, 4).unbind(2)
        k, v = self.spread(k) * table, self.spread(v)
        q, k, v = (one.transpose(1, 2) for one in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
        return x + self.o(y.transpose(1, 2).flatten(2))

    def spread(self, x: Tensor) -> Tensor:
        if self._is_tiled:
            return x[:, :, None].expand(2, 6, 2, 2, 4).reshape(2, 6, 4, 4)
        return x[:, :, :, None].expand(2, 6, 2, 2, 4).reshape(2, 6, 4, 4)


class Model(nn.Module):
    """Two layers, a table of whole numbers that are cast, and a mask of a window and of padding."""

    def __init__(self, tiled: Sequence[str] = (), *, forgets_padding: bool = False) -> None:
        super().__init__()
        self._forgets_padding = forgets_padding
        self.one, self.two = Layer(is_tiled="one" in tiled), Layer(is_tiled="two" in tiled)

    def table(self, x: Tensor) -> Tensor:
        return (torch.arange(6)[None].float()[..., None, None] / 7).cos().to(x.dtype)

    def mask(self, kept: Tensor) -> Tensor:
        near = (torch.arange(6)[:, None] - torch.arange(6)).abs() <= 2
        return near[None, None] & kept[:, None, None]

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        table, mask = self.table(x), self.mask(kept)
        return self.two(self.one(x, table, mask), table, mask)


class Port(Model):
    """The same with a table of another shape."""

    def table(self, x: Tensor) -> Tensor:
        return (torch.arange(6, dtype=torch.float32) / 7).cos().view(6, 1, 1).to(x.dtype)

    def mask(self, kept: Tensor) -> Tensor:
        near = (torch.arange(6).view(6, 1) - torch.arange(6).view(1, 6)).abs() <= 2
        return near.expand(2, 1, 6, 6) if self._forgets_padding else near & kept.view(2, 1, 1, 6)


def explained(port: nn.Module) -> Explanation:
    with held_equal(LANE):
        upstream = Model().eval()
        fill_informative(upstream, 0)
        port.load_state_dict(upstream.state_dict(), assign=True)
        runs = (lambda model=model: {"y": model(X.clone(), KEPT.clone())} for model in (upstream, port.eval()))
        return explain_modules(upstream, port, *runs)


@pytest.mark.parametrize("wrong", [["one"], ["two"], ["one", "two"]])
def test_heads_that_are_tiled_are_told_in_each_layer_that_does_it(wrong: list[str]) -> None:
    found = explained(Port(wrong))
    assert found.leaves == wrong
    assert all("axes" in fault.diagnosis or "dim" in fault.diagnosis for fault in found.faults)


def test_a_mask_that_the_model_makes_is_blamed_on_the_model_and_not_on_the_layer_that_reads_it() -> None:
    (fault,) = explained(Port(forgets_padding=True)).faults
    assert fault.finding.port == ""
    assert fault.diagnosis.startswith("when it computes `bitwise_and(bool")
