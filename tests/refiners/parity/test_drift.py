"""Who moved: whatever side changes under another version of upstream is the one that is blamed, with the leaf."""

import io
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from refiners.errors import ParityError
from refiners.parity import CaseRunner, Lane, Ledger
from refiners.parity.drift import Drift, Side, Stored, Summary, load, look, save, summarise
from refiners.parity.drift_report import require_versions, run_drift, write_summaries
from tests.refiners.parity.toys import Port, Upstream, make_case


class UpstreamThatMoved(Upstream):
    """Its next version has another eps in one norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_2.eps = 1e-3


class PortThatMoved(Port):
    """Somebody changed the port."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1.eps = 1e-3


class PortThatFollowed(Port):
    """As upstream's next version."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_2.eps = 1e-3


class InAnotherOrder(Port):
    """Equal to within rounding."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + nn.functional.gelu(self.up(self.norm_1(x)))
        x = self.norm_2(x)
        half = x.shape[-1] // 2
        first = nn.functional.linear(x[..., :half], self.down.weight[:, :half])
        return nn.functional.linear(x[..., half:], self.down.weight[:, half:], self.down.bias) + first


class WithAnotherWeight(Upstream):
    """Its next version has one weight more."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Parameter(torch.zeros(3))


def then() -> Stored:
    return summarise(make_case(), "toys")


def now(**changes: Any) -> Drift:
    case = make_case(**changes)
    runner = CaseRunner(case)
    results = [runner.run(Lane(lane)) for lane in ("float64", "float32")]
    return look(case, then(), results, Ledger(), seconds=5.0)


def test_what_did_not_move_is_equal() -> None:
    found = now()
    assert found.side is Side.NONE
    assert found.is_equal
    assert found.verdicts == {"float64": "BITWISE", "float32": "BITWISE"}
    assert found.reasons == []


@pytest.mark.parametrize(
    ("upstream", "port", "side", "leaf"),
    [
        (UpstreamThatMoved, Port, Side.UPSTREAM, "norm_2, upstream norm_2: equal when `eps` is 0.001"),
        (Upstream, PortThatMoved, Side.PORT, "norm_1, upstream norm_1: equal when `eps` is 1e-05"),
        (UpstreamThatMoved, PortThatMoved, Side.BOTH, "norm_1, upstream norm_1"),
    ],
)
def test_the_side_that_changed_is_blamed_with_the_leaf(
    upstream: Callable[[], nn.Module], port: Callable[[], nn.Module], side: Side, leaf: str
) -> None:
    found = now(upstream=upstream, port=port)
    assert found.side is side, str(found)
    assert not found.is_equal
    assert any(leaf in told for told in found.leaves), found.leaves


def test_a_port_that_follows_its_upstream_is_equal_and_told() -> None:
    found = now(upstream=UpstreamThatMoved, port=PortThatFollowed)
    assert found.side is Side.TOGETHER
    assert found.is_equal
    assert "upstream's y: off by" in found.reasons[0]


def test_another_order_of_operations_is_bits_only() -> None:
    assert now(port=InAnotherOrder).side is Side.BITS


def test_another_weight_upstream_is_not_blamed_on_the_port() -> None:
    found = now(upstream=WithAnotherWeight)
    assert found.side in (Side.UPSTREAM, Side.PORT)  # by its version, which is that of these tests on both occasions
    assert "handing the weights over raised" in found.reasons[0]


def test_an_upstream_class_that_is_not_there_is_absent() -> None:
    def no_such_class() -> nn.Module:
        from torch.nn import NoSuchLayer  # pyright: ignore[reportAttributeAccessIssue]  # that is the point

        return NoSuchLayer()

    found = now(upstream=no_such_class)
    assert found.side is Side.ABSENT
    assert "NoSuchLayer" in found.reasons[0]


def refuses() -> nn.Module:
    raise NotImplementedError("its next version cannot do that")


@pytest.mark.parametrize(
    ("before", "side"), [("torch 1.0", Side.UPSTREAM), (f"torch {torch.__version__}", Side.UNKNOWN)]
)
def test_an_upstream_that_cannot_be_built_any_more_is_not_blamed_on_the_port(before: str, side: Side) -> None:
    found = look(make_case(upstream=refuses), replace(then(), upstream=before), [], Ledger())
    assert found.side is side
    assert found.reasons == ["building upstream raised NotImplementedError: its next version cannot do that"]


def test_a_case_that_is_not_stored_is_unknown() -> None:
    case = make_case()
    assert look(case, None, [CaseRunner(case).run(Lane("float64"))], Ledger()).side is Side.UNKNOWN


def test_a_summary_sees_what_rounding_does_not_explain_and_nothing_else() -> None:
    tensor = torch.randn(7, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = Summary.of("y", tensor)
    assert before.apart(Summary.of("y", tensor * (1 + 1e-14))) == ""
    assert "off by" in before.apart(Summary.of("y", tensor + 1e-8))
    assert "off by" in before.apart(Summary.of("y", tensor.flip(0)))
    assert "shape" in before.apart(Summary.of("y", tensor.T))
    assert "float32" in before.apart(Summary.of("y", tensor.float()))
    spoilt = tensor.clone()
    spoilt[0, 3] = torch.nan
    assert "76 finite" in before.apart(Summary.of("y", spoilt))
    assert Summary.of("y", torch.zeros(3)).apart(Summary.of("y", torch.zeros(3))) == ""
    assert "off by inf" in Summary.of("y", torch.zeros(3)).apart(Summary.of("y", torch.ones(3)))


def test_summaries_come_back_from_a_file_as_they_were(tmp_path: Path) -> None:
    path, stored = tmp_path / "upstream.json", {"toy/tower": then()}
    save(path, stored)
    assert load(path) == stored
    path.write_text("[]")
    with pytest.raises(ParityError, match="drift --write"):
        load(path)


MODULE = """
from torch import nn
{line}
from tests.refiners.parity.toys import make_case
CASES = [make_case(id="{name}/tower")]
"""


def test_the_command_blames_and_lists_absent_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("stays", "leaves"):
        (tmp_path / f"drift_{name}.py").write_text(MODULE.format(line="", name=name))
    path, out = tmp_path / "upstream.json", io.StringIO()
    console = Console(file=out, width=120)
    modules = "drift_stays,drift_leaves"
    assert write_summaries(path, modules, console=console) == 0
    assert set(json.loads(path.read_text())["cases"]) == {"stays/tower", "leaves/tower"}
    (tmp_path / "drift_leaves.py").write_text(MODULE.format(line="from torch.nn import NoSuchLayer", name="leaves"))
    monkeypatch.delitem(sys.modules, "drift_leaves")
    assert run_drift(path, modules, lanes="float64", console=console, json_path=tmp_path / "found.json") == 0
    assert "1 cases absent: torch" in out.getvalue()
    assert "NoSuchLayer" in out.getvalue()
    sides = {one["case"]: one["side"] for one in json.loads((tmp_path / "found.json").read_text())}
    assert sides == {"stays/tower": "nothing moved", "leaves/tower": "absent"}


def test_the_command_names_a_case_of_which_both_sides_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "drift_follows.py").write_text(MODULE.format(line="", name="follows"))
    earlier = make_case(id="follows/tower", upstream=UpstreamThatMoved, port=PortThatFollowed)
    path, out = tmp_path / "upstream.json", io.StringIO()
    save(path, {"follows/tower": summarise(earlier, "drift_follows")})
    assert run_drift(path, "drift_follows", lanes="float64", console=Console(file=out, width=120)) == 0
    assert "follows/tower: both moved together" in out.getvalue()


def test_a_case_without_float64_is_judged_by_its_verdicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    source = "from tests.refiners.parity.toys import make_case\nCASES = [make_case(lanes=('float32',))]\n"
    (tmp_path / "drift_narrow.py").write_text(source)
    console = Console(file=io.StringIO())
    assert write_summaries(tmp_path / "upstream.json", "drift_narrow", console=console) == 0
    assert run_drift(tmp_path / "upstream.json", "drift_narrow", console=console) == 0


def test_no_case_of_that_name_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "drift_other.py").write_text(MODULE.format(line="", name="other"))
    save(tmp_path / "upstream.json", {})
    with pytest.raises(ParityError, match="No case id contains"):
        run_drift(tmp_path / "upstream.json", "drift_other", keyword="nothing")


def test_a_version_that_is_not_installed_is_refused() -> None:
    require_versions([f"torch=={torch.__version__}"])
    with pytest.raises(ParityError, match=r"torch==0.1 is asked for, and torch .* is installed"):
        require_versions(["torch==0.1"])
