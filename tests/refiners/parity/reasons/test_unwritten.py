"""`torch.empty` where zeros belong is told at its line, whatever lies in memory; what is written is no fault."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.refiners.parity.toys import explained_pair

KEYS = {key: key for key in ("up.weight", "up.bias", "down.weight", "down.bias")}
X = torch.linspace(-1, 1, 2 * 4 * 8, dtype=torch.float64).view(2, 4, 8)


class Longer(nn.Module):
    """Two tokens more, which hold nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        return self.down(torch.cat((x, self.more(x)), dim=1))

    def more(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x[:, :2])


class Blank(Longer):
    """Written by nobody."""

    def more(self, x: Tensor) -> Tensor:
        return torch.empty(2, 2, 8, dtype=x.dtype)


class HalfBlank(Longer):
    """Written in part, where upstream repeats the first token."""

    def more(self, x: Tensor) -> Tensor:
        more = torch.empty_like(x[:, :2])
        more[:, 0] = x[:, 0]
        return more


class Repeats(Longer):
    """Upstream of it."""

    def more(self, x: Tensor) -> Tensor:
        return x[:, :1].repeat(1, 2, 1)


class Written(Longer):
    """All of it is written, part by part."""

    def more(self, x: Tensor) -> Tensor:
        more = x.new_empty((2, 2, 8))
        more[:, 0] = x[:, 0]
        more[:, 1] = x[:, 0]
        return more


@pytest.mark.parametrize(
    ("upstream", "port", "told"),
    [
        (Longer, Blank, "when `torch.empty` at {} is `torch.zeros`: what nobody wrote is read"),
        (Repeats, HalfBlank, "once all that `torch.empty` returns at {} is written to: a part is read as it lies"),
    ],
)
def test_what_nobody_wrote_is_told_at_its_line(upstream: type[Longer], port: type[Longer], told: str) -> None:
    line = f"parity/reasons/{Path(__file__).name}:{port.more.__code__.co_firstlineno + 1}"
    (fault,) = explained_pair(upstream(), port(), KEYS, [X]).faults
    assert fault.diagnosis == told.format(line)


def test_what_is_written_part_by_part_is_no_fault() -> None:
    assert not explained_pair(Repeats(), Written(), KEYS, [X]).faults
