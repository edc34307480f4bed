"""Mistakes in how attention treats its heads, masks and tables: each is one line, in words that say what it is."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refiners.parity.explain import Explanation, explain_modules
from refiners.parity.fingerprint import Values
from refiners.parity.lanes import Lane, held_equal
from refiners.parity.operations import Trace
from refiners.parity.reasons.replay import as_it_is
from refiners.parity.trace import record
from refiners.parity.weights import fill_informative

LANE = Lane("float64")


class Heads(nn.Module):
    """Two heads of eight elements, the first four of which are turned."""

    fault = ""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(6, 16)
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16, bias=False) for _ in range(4))
        self.gain = nn.Parameter(torch.ones(16))

    def normed(self, x: Tensor) -> Tensor:
        heads = x.view(2, 6, 2, 8) if self.fault == "norm" else x
        heads = heads * torch.rsqrt(heads.pow(2).mean(-1, keepdim=True) + 1e-6)
        return heads.reshape(2, 6, 16) * self.gain

    def frequencies(self) -> Tensor:
        return 1.0 / 10_000.0 ** (torch.arange(0, 4, 2).to(torch.float32) / 4)

    def turned(self, x: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(6).to(x.dtype), self.frequencies().to(x.dtype))
        angles = torch.cat((angles, angles), -1)
        rest, part = (x[..., :4], x[..., 4:]) if self.fault == "last part" else (x[..., 4:], x[..., :4])
        part = part * angles.cos() + torch.cat((-part[..., 2:], part[..., :2]), -1) * angles.sin()
        return torch.cat((rest, part) if self.fault == "last part" else (part, rest), -1)

    def ids(self) -> Tensor:
        return torch.arange(6)[None]

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.places(self.ids())
        q, k, v = (t.view(2, 6, 2, 8).transpose(1, 2) for t in (self.normed(self.q(x)), self.k(x), self.v(x)))
        q, k = self.turned(q), self.turned(k)
        mask = torch.zeros(2, 1, 6, 6, dtype=x.dtype).masked_fill(torch.arange(6) > 3, -1e9)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None if self.fault == "mask" else mask)
        return self.o(y.transpose(1, 2).reshape(2, 6, 16))


class InAnotherStyle(Heads):
    """Frequencies as powers of e, and ids for each entry of the batch."""

    def frequencies(self) -> Tensor:
        return torch.exp(torch.arange(0, 4, 2).to(torch.float64) * (-math.log(10_000.0) / 4))

    def ids(self) -> Tensor:
        return torch.arange(6)[None].expand(2, 6)


def explained(port_class: type[Heads], fault: str = "") -> Explanation:
    with held_equal(LANE):
        upstream, port = Heads().to(LANE.dtype).eval(), port_class().to(LANE.dtype).eval()
        fill_informative(upstream, 0)
        port.load_state_dict(upstream.state_dict(), assign=True)
        port.fault = fault
        x = torch.linspace(-2, 2, 2 * 6 * 16, dtype=LANE.dtype).sin().view(2, 6, 16)

        def run(model: nn.Module) -> dict[str, Tensor]:
            return {"y": model(x.clone())}

        return explain_modules(upstream, port, partial(run, upstream), partial(run, port), by_closeness=True)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("norm", "the mean is of 16 values, not of 8"),
        ("last part", "turn the first 4 elements of a head: the port turns the last"),
        ("mask", "`attn_mask` is upstream's tensor, which the port does not give"),
    ],
)
def test_a_mistake_with_heads_is_one_line_that_names_it(fault: str, words: str) -> None:
    (found,) = explained(Heads, fault).faults
    assert words in found.diagnosis


def test_a_table_that_float32_rounds_and_ids_of_a_batch_are_no_fault() -> None:
    assert all("within rounding" in found.diagnosis for found in explained(InAnotherStyle).faults)


def test_attention_is_never_run_again_without_keys() -> None:
    def attend() -> dict[str, Tensor]:
        x = torch.ones(1, 2, 3, 4)
        return {"y": F.scaled_dot_product_attention(x, x, x)}

    trace: Trace = record(nn.Identity(), attend, Values())[0]
    attention = next(op for op in trace.operations if "scaled_dot_product" in op.name)
    query, nothing = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 0, 4)
    with pytest.raises(ValueError, match="do not fit"):
        as_it_is(attention, [query, nothing, nothing])
