"""Order, shape and constants of what a layer is given, in models that compute outside of their leaves."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import refiners.parity.explain as explain_module
from refiners.parity import Lane
from refiners.parity.explain import Explanation, explain, explain_modules
from refiners.parity.fingerprint import Values
from refiners.parity.lanes import held_equal
from refiners.parity.reasons.causes import ONLY_ROUNDING
from refiners.parity.reasons.faults import Fault
from refiners.parity.reasons.localise import Finding
from refiners.parity.reasons.mending import reductions
from refiners.parity.reasons.points import Point, Where
from refiners.parity.trace import record
from refiners.parity.weights import fill_informative
from tests.refiners.parity.toys import Port, explained_pair, make_case

KEEP = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]).double()
OTHER = torch.tensor([[1.0, 0.0], [1.0, 1.0]]).double()


class Picture(nn.Module):
    """Tokens as a picture of two rows of three, between a linear layer and a convolution."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.enter, self.near, self.leave = nn.Linear(4, 4), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 4)
        self.size = rows, columns

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.near(self.enter(x).mT.unflatten(2, self.size)).flatten(2).mT)


class Masked(nn.Module):
    """A mean of the tokens that are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.enter(x)
        return self.leave((x * mask[..., None]).sum(1, keepdim=True) / (mask[..., None].sum(1, keepdim=True) + 1e-3))


class Mean(Masked):
    """A mean of all tokens."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.leave(self.enter(x).mean(1, keepdim=True))


class Blurred(nn.Module):
    """A filter of two axes that is made of a list in each forward, with more of the edge in front."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(9, 9), nn.Linear(9, 9)

    def forward(self, x: Tensor) -> Tensor:
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
        taps = (taps[None, :] * taps[:, None] / 64).to(x.dtype)
        return self.leave(F.conv2d(F.pad(self.enter(x), (2, 1, 2, 1))[:, None], taps[None, None])[:, 0])


class BlurredBehind(Blurred):
    """One axis after the other, with more of the edge behind."""

    def forward(self, x: Tensor) -> Tensor:
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]).to(x.dtype) / 8
        x = F.pad(self.enter(x), (1, 2, 1, 2))[:, None]
        return self.leave(F.conv2d(F.conv2d(x, taps.view(1, 1, 4, 1)), taps.view(1, 1, 1, 4))[:, 0])


TOKENS = torch.linspace(-2, 2, 2 * 6 * 4).double().sin().view(2, 6, 4)


def explained(upstream: nn.Module, port: nn.Module, *inputs: Tensor) -> Explanation:
    return explained_pair(upstream, port, {key: key for key in upstream.state_dict()}, inputs)


def test_a_picture_that_lies_on_its_side_is_told_where_it_is_made() -> None:
    (fault,) = explained(Picture(2, 3), Picture(3, 2), TOKENS).faults
    assert not fault.finding.is_leaf
    assert "has the shape [2, 4, 2, 3], not [2, 4, 3, 2]" in fault.diagnosis


def joined_twice() -> Tensor:
    return torch.cat([mask[:, None].expand(-1, 2, -1) for mask in (KEEP, OTHER)], -1)[:, 0]


def test_masks_that_are_joined_in_the_other_order_are_named() -> None:
    lane = Lane("float64")
    with held_equal(lane):
        upstream, port = (Masked().to(lane.dtype).eval() for _ in range(2))
        fill_informative(upstream, 0)
        port.load_state_dict(upstream.state_dict(), assign=True)
        runs = (
            lambda: {"y": upstream(TOKENS[:, :5], joined_twice())},
            lambda: {"y": port(TOKENS[:, :5], torch.cat((OTHER, KEEP), 1))},
        )
        (fault,) = explain_modules(upstream, port, *runs).faults
    assert "the tensors stand in the order [2, 1]" in fault.diagnosis


def test_a_mean_of_all_in_the_place_of_a_mean_of_some_is_told() -> None:
    mask = torch.cat((KEEP, OTHER), 1)
    (fault,) = explained(Mean(), Masked(), TOKENS[:, :5], mask).faults
    assert "mean(" in fault.diagnosis
    assert "is in the place of div(sum(" in fault.diagnosis


def test_a_constant_that_is_made_of_a_list_does_not_end_the_search() -> None:
    (fault,) = explained(Blurred(), BlurredBehind(), torch.linspace(-2, 2, 162).double().sin().view(2, 9, 9)).faults
    assert "`pad` is [2, 1, 2, 1], not [1, 2, 1, 2]" in fault.diagnosis


class Sums(nn.Module):
    """Sums of some lengths."""

    def __init__(self, *lengths: int) -> None:
        super().__init__()
        self.lengths = lengths

    def forward(self) -> Tensor:
        return torch.stack([torch.arange(float(length)).sin().sum() for length in self.lengths]).prod()


@pytest.mark.parametrize(
    ("port", "upstream", "words"),
    [((3,), (5,), "; `sum` is of 5 values, here of 3"), ((3, 5), (5,), ""), ((3,), (5, 3), ""), ((3,), (3,), "")],
)
def test_how_many_values_a_sum_takes_is_told_where_there_is_one(
    port: tuple[int, ...], upstream: tuple[int, ...], words: str
) -> None:
    traces = [
        record(model, lambda model=model: {"y": model()}, Values())[0] for model in (Sums(*port), Sums(*upstream))
    ]
    assert reductions(traces[0].operations, traces[1].operations) == words


def test_what_is_rounding_alone_in_float64_is_no_fault_in_the_other_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    point = Point(where=Where.RETURNS, port="up", upstream="up", agrees=False, expected=(1,), actual=(2,))
    fault = Fault(Finding(port="up", upstream="up", point=point, is_leaf=True), "", was_run=False)
    rounded = Fault(fault.finding, ONLY_ROUNDING, was_run=False)

    def in_lane(runner: object, lane: Lane, *rest: object, **options: object) -> Explanation:
        return Explanation("toy", Port(), [rounded, rounded] if lane.name == "float64" else [fault])

    monkeypatch.setattr(explain_module, "_explain_in", in_lane)
    (told,) = explain(make_case(), Lane("float32")).faults
    assert told.diagnosis == ONLY_ROUNDING
