"""One node at the wrong place is one line, however many values differ because of it."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.conversion import KeyMap, Split
from refiners.parity.case import Case
from refiners.parity.explain import Explanation, explain, explain_modules
from refiners.parity.lanes import Lane, held_equal
from refiners.parity.modules import named_modules
from refiners.parity.weights import fill_informative

LANE = Lane("float32")


class Block(nn.Module):
    """Upstream: norms in front of the branches, or behind the sums."""

    def __init__(self, *, is_post: bool) -> None:
        super().__init__()
        self.is_post = is_post
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.mix, self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        if self.is_post:
            x = self.norm1(x + self.mix(x))
            return self.norm2(x + self.down(F.gelu(self.up(x))))
        x = x + self.mix(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Mix(fl.Chain):
    """A branch."""

    def __init__(self) -> None:
        super().__init__(fl.Linear(16, 16))


class FeedForward(fl.Chain):
    """The other branch."""

    def __init__(self) -> None:
        super().__init__(fl.Linear(16, 32), fl.GeLU(), fl.Linear(32, 16))


class Pre(fl.Chain):
    """Norms in front of the branches."""

    def __init__(self) -> None:
        super().__init__(
            fl.Residual(fl.LayerNorm(16), Mix()),
            fl.Residual(fl.LayerNorm(16), FeedForward()),
        )


class Post(fl.Chain):
    """Norms behind the sums."""

    def __init__(self) -> None:
        super().__init__(fl.Residual(Mix()), fl.LayerNorm(16), fl.Residual(FeedForward()), fl.LayerNorm(16))


class Joined(nn.Module):
    """A port that is no Chain, whose norms may be exchanged."""

    is_wrong = False

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(16), nn.LayerNorm(16)
        self.lin, self.wide, self.narrow = nn.Linear(16, 16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        one, other = (self.second, self.first) if self.is_wrong else (self.first, self.second)
        x = x + self.lin(one(x))
        return x + self.narrow(F.gelu(self.wide(other(x))))


class Swapped(Joined):
    """Its norms are exchanged."""

    is_wrong = True


NAMES: dict[type[nn.Module], tuple[str, str]] = {
    Pre: ("Residual_1.LayerNorm", "Residual_2.LayerNorm"),
    Post: ("LayerNorm_1", "LayerNorm_2"),
}


def names_of(kind: type[nn.Module]) -> dict[str, str]:
    if issubclass(kind, Joined):
        return {"norm1": "first", "norm2": "second", "mix": "lin", "up": "wide", "down": "narrow"}
    feed = "Residual_2.FeedForward.Linear"
    norms = dict(zip(("norm1", "norm2"), NAMES[kind], strict=True))
    return {**norms, "mix": "Residual_1.Mix.Linear", "up": f"{feed}_1", "down": f"{feed}_2"}


def explained(kind: type[nn.Module], *, is_post: bool) -> Explanation:
    with held_equal(LANE):
        upstream = nn.Sequential(*(Block(is_post=is_post) for _ in range(2))).eval()
        blocks = [kind() for _ in range(2)]
        port = (nn.Sequential(*blocks) if issubclass(kind, Joined) else fl.Chain(*blocks)).eval()
        fill_informative(upstream, 0)
        paths = [name for name, _ in port.named_children()]
        right = {
            f"{paths[number]}.{other}.{part}": upstream.state_dict()[f"{number}.{name}.{part}"]
            for number in range(2)
            for name, other in names_of(kind).items()
            for part in ("weight", "bias")
        }
        port.load_state_dict(right, assign=True)
        x = torch.linspace(-3, 3, 2 * 6 * 16).sin().view(2, 6, 16)

        def run(model: nn.Module) -> dict[str, Tensor]:
            return {"y": model(x.clone())}

        return explain_modules(upstream, port, partial(run, upstream), partial(run, port), right_weights=right)


@pytest.mark.parametrize(("kind", "is_post"), [(Pre, False), (Post, True), (Joined, False)])
def test_a_right_port_is_not_rearranged(kind: type[nn.Module], is_post: bool) -> None:
    assert not explained(kind, is_post=is_post).faults


@pytest.mark.parametrize(
    ("kind", "is_post", "path", "words"),
    [
        (Pre, True, "Pre_1.Residual_1.LayerNorm", ("behind `Pre_1.Residual_1`", "norm order", "3 more")),
        (Post, False, "Post_1.LayerNorm_1", ("inside of `Post_1.Residual_1`", "norm order", "3 more")),
        (Swapped, False, "0.first", ("`0.first` and `0.second` are exchanged", "1 more")),
    ],
)
def test_one_arrangement_in_all_layers_is_one_line(
    kind: type[nn.Module], is_post: bool, path: str, words: tuple[str, ...]
) -> None:
    (fault,) = explained(kind, is_post=is_post).faults
    assert fault.finding.port == path
    assert fault.was_run
    assert all(word in fault.diagnosis for word in words), fault.diagnosis


def test_the_port_is_as_it_was() -> None:
    found = explained(Pre, is_post=True)
    assert [path for path, _ in named_modules(found.port) if path.endswith("LayerNorm")] == [
        f"Pre_{layer}.Residual_{branch}.LayerNorm" for layer in (1, 2) for branch in (1, 2)
    ]


class Halved(fl.Chain):
    """Two branches, each added as it is or by half."""

    def __init__(self, *, is_half: bool) -> None:
        def branch() -> fl.Residual:
            return fl.Residual(fl.LayerNorm(16), fl.Linear(16, 16), *([fl.Multiply(0.5)] if is_half else []))

        super().__init__(branch(), branch())


def test_norms_of_which_each_could_be_exchanged_with_several_do_not_stop_the_search() -> None:
    with held_equal(LANE):
        upstream, port = (
            fl.Chain(*(fl.Chain(Halved(is_half=half), Halved(is_half=half)) for _ in range(2))).eval()
            for half in (True, False)
        )
        fill_informative(upstream, 0)
        port.load_state_dict(upstream.state_dict(), assign=True)
        x = torch.linspace(-3, 3, 2 * 6 * 16).sin().view(2, 6, 16)
        found = explain_modules(upstream, port, lambda: {"y": upstream(x)}, lambda: {"y": port(x)})
    assert len(found.faults) == 8
    assert all("Multiply" in fault.diagnosis or "`mul(" in fault.diagnosis for fault in found.faults)


class Gated(nn.Module):
    """Upstream: a norm in front of a branch and one behind it, then gate and up in one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.behind, self.front = nn.LayerNorm(16), nn.LayerNorm(16)
        self.mix, self.wide, self.down = nn.Linear(16, 16), nn.Linear(16, 40), nn.Linear(20, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.behind(self.mix(x))
        gate, up = self.wide(self.front(x)).chunk(2, dim=-1)
        return x + self.down(up * F.silu(gate))


class Parted(nn.Module):
    """The port: two weights, and products of them that are rounded otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.LayerNorm(16), nn.LayerNorm(16)
        self.mix, self.gate, self.up, self.down = (
            nn.Linear(*size) for size in ((16, 16), (16, 20), (16, 20), (20, 16))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.one(self.mix(x))
        y = self.two(x)
        gate = self.gate(y)
        return x + self.down(gate * (gate.sigmoid() * self.up(y)))


def test_norms_of_a_wrong_key_map_are_told_once_where_what_follows_is_rounded_otherwise() -> None:
    rules = {"{i}.behind": "{i}.two", "{i}.front": "{i}.one", "{i}.wide": Split("{i}.gate", "{i}.up")}
    case = Case(
        id="toys/gated",
        summary="two norms have each other's weights",
        upstream=lambda: nn.Sequential(Gated(), Gated()),
        port=lambda: nn.Sequential(Parted(), Parted()),
        key_map=KeyMap({**rules, "{i}.mix": "{i}.mix", "{i}.down": "{i}.down"}, name="gated"),
        inputs=lambda generator: {"x": torch.randn(3, 7, 16, generator=generator)},
        run_upstream=lambda model, inputs: {"y": model(inputs["x"])},
        run_port=lambda model, inputs: {"y": model(inputs["x"])},
    )
    (found,) = explain(case, LANE).faults
    assert "`0.one` and `0.two` are exchanged (and 1 more such pairs)" in found.diagnosis
