"""One, two and three faults in small ports: where they are, and what puts them right."""

import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.errors import ParityError
from refiners.parity import CaseRunner, Lane
from refiners.parity.again import command_of
from refiners.parity.explain import Explanation, explain, explain_modules
from refiners.parity.explained import try_to_explain
from refiners.parity.leaf_again import leaf_of_case
from refiners.parity.reasons import teacher
from tests.refiners.parity.toys import Port, Upstream, make_case


class Block(nn.Module):
    """Upstream: attention and a feed-forward, each with its norm and its residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_1(x)
        q, k, v = (p(y).view(2, 5, 2, 4).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 8)
        x = x + self.o(y)
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class Attention(fl.Module):
    def __init__(self, num_heads: int = 2) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.is_causal = False

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.view(2, 5, self.num_heads, -1).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.is_causal).transpose(1, 2).reshape(2, 5, 8)


class Query(fl.Linear): ...


class Key(fl.Linear): ...


class Value(fl.Linear): ...


def build() -> fl.Chain:
    return fl.Chain(
        fl.Residual(
            fl.LayerNorm(8),
            fl.Parallel(Query(8, 8), Key(8, 8), Value(8, 8)),
            Attention(),
            fl.Linear(8, 8),
        ),
        fl.Residual(fl.LayerNorm(8), fl.Linear(8, 8), fl.GeLU(), fl.Linear(8, 8)),
    )


KEYS = {
    "Residual_1.LayerNorm": "norm_1",
    "Residual_1.Parallel.Query": "q",
    "Residual_1.Parallel.Key": "k",
    "Residual_1.Parallel.Value": "v",
    "Residual_1.Linear": "o",
    "Residual_2.LayerNorm": "norm_2",
    "Residual_2.Linear_1": "up",
    "Residual_2.Linear_2": "down",
}

Fault = Callable[[fl.Chain], None]


def explained(*faults: Fault, dtype: torch.dtype = torch.float32) -> tuple[Explanation, fl.Chain]:
    generator = torch.Generator().manual_seed(0)
    upstream, port = Block().to(dtype).eval(), build().to(dtype).eval()
    for parameter in upstream.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype)
    right = {
        f"{path}.{name}": upstream.state_dict()[f"{other}.{name}"]
        for path, other in KEYS.items()
        for name in ("weight", "bias")
    }
    port.load_state_dict(right, assign=True)
    for fault in faults:
        fault(port)
    x = torch.randn(2, 5, 8, generator=generator).to(dtype)
    return explain_modules(
        upstream, port, lambda: {"y": upstream(x)}, lambda: {"y": port(x)}, right_weights=right
    ), port


def other_eps(port: fl.Chain) -> None:
    port.get_submodule("Residual_1.LayerNorm").eps = 1e-3


def lost_bias(port: fl.Chain) -> None:
    port.get_submodule("Residual_1.Parallel.Value").bias = None


def transposed(port: fl.Chain) -> None:
    linear = port.get_submodule("Residual_2.Linear_2")
    linear.weight = nn.Parameter(linear.weight.detach().T.contiguous())


def other_activation(port: fl.Chain) -> None:
    port.get_submodule("Residual_2.GeLU").approximation = fl.GeLUApproximation.TANH


def silu(port: fl.Chain) -> None:
    port.get_submodule("Residual_2").replace(port.get_submodule("Residual_2.GeLU"), fl.SiLU())


def other_heads(port: fl.Chain) -> None:
    port.get_submodule("Residual_1.Attention").num_heads = 4


def causal(port: fl.Chain) -> None:
    port.get_submodule("Residual_1.Attention").is_causal = True


def swapped(port: fl.Chain) -> None:
    query, key = port.get_submodule("Residual_1.Parallel.Query"), port.get_submodule("Residual_1.Parallel.Key")
    query.weight, key.weight, query.bias, key.bias = key.weight, query.weight, key.bias, query.bias


def lost_residual(port: fl.Chain) -> None:
    residual = port.get_submodule("Residual_2")
    port.replace(residual, fl.Chain(*residual.structural_copy()))


def lost_norm(port: fl.Chain) -> None:
    port.get_submodule("Residual_2").replace(port.get_submodule("Residual_2.LayerNorm"), fl.Identity())


SINGLE: list[tuple[Fault, str, str]] = [
    (other_eps, "Residual_1.LayerNorm", "when `eps` is 1e-05"),
    (lost_bias, "Residual_1.Parallel.Value", "with `bias`, which the port drops"),
    (transposed, "Residual_2.Linear_2", "when `weight` is transposed"),
    (other_activation, "Residual_2.GeLU", "when `approximation` is 'none'"),
    (silu, "Residual_2.SiLU", "gelu"),
    (other_heads, "Residual_1.Attention", "when `num_heads` is 2"),
    (causal, "Residual_1.Attention", "when `is_causal` is False"),
    (swapped, "Residual_1.Parallel.Query", "the port holds `k.weight`"),
    (lost_residual, "Chain", "a missing residual"),
    (lost_norm, "Residual_2.Identity", "upstream's `norm_2`"),
]


@pytest.mark.parametrize(("fault", "path", "text"), SINGLE, ids=[fault.__name__ for fault, *_ in SINGLE])
def test_a_fault_is_found_and_diagnosed(fault: Fault, path: str, text: str) -> None:
    explanation, _ = explained(fault)
    assert explanation.leaves[0] == path
    assert text in explanation.faults[0].diagnosis


@pytest.mark.parametrize("fault", [fault for fault, *_ in SINGLE if fault is not swapped])
def test_nothing_but_the_fault_is_blamed(fault: Fault) -> None:
    assert len(explained(fault)[0].faults) == 1


@pytest.mark.parametrize(
    "faults",
    [(other_eps, transposed), (causal, other_activation), (lost_bias, lost_norm), (other_eps, other_heads, silu)],
)
def test_several_faults_are_found_in_one_run(faults: tuple[Fault, ...]) -> None:
    explanation, _ = explained(*faults)
    expected = {path: text for fault, path, text in SINGLE if fault in faults}
    assert set(explanation.leaves) == set(expected)
    for fault in explanation.faults:
        assert expected[fault.finding.port] in fault.diagnosis


def test_later_leaves_propagate() -> None:
    marks = explained(other_eps)[0].marks
    assert marks["Residual_1.LayerNorm"] == "introduces"
    assert marks["Residual_2.Linear_2"] == "propagates"


def test_equal_sides_have_nothing_to_explain() -> None:
    explanation, _ = explained()
    assert not explanation.faults
    assert "in the forward both sides are equal" in str(explanation)


def test_the_port_is_as_it_was() -> None:
    explanation, port = explained(other_heads, transposed)
    assert explanation.faults
    assert port.get_submodule("Residual_1.Attention").num_heads == 4
    assert not any("forward" in module.__dict__ or module._forward_hooks for module in port.modules())
    assert [name for name, _ in port.named_parameters()] == [name for name, _ in build().named_parameters()]


def test_the_text_shows_both_sides_and_the_tree() -> None:
    text = str(explained(other_eps)[0])
    for part in ("native_layer_norm", "norm_1", "test_explain.py", ">>> LayerNorm", "ULP", "worst"):
        assert part in text


def test_ports_that_are_no_chains_are_explained_too() -> None:
    class OtherEps(Port):
        def __init__(self) -> None:
            super().__init__(eps=1e-3)

    explanation = explain(make_case(OtherEps), Lane("float32"))
    assert set(explanation.leaves) == {"norm_1", "norm_2"}
    assert {fault.diagnosis for fault in explanation.faults} == {"when `eps` is 1e-05"}


def test_rounding_is_told_from_a_fault_in_float64() -> None:
    class Rewritten(Upstream):
        """Every linear layer sums in another order, and one activation is another."""

        def forward(self, x: Tensor) -> Tensor:
            def reversed_sum(linear: nn.Linear, x: Tensor) -> Tensor:
                return x.flip(-1) @ linear.weight.flip(-1).T + linear.bias

            x = x + F.gelu(reversed_sum(self.up, self.norm_1(x)), approximate="tanh")
            return reversed_sum(self.down, self.norm_2(x))

    explanation = explain(make_case(Rewritten), Lane("float64"))
    assert any("gelu" in fault.diagnosis for fault in explanation.faults)


def test_a_forward_that_is_right_has_its_gradients_explained() -> None:
    class Detached(Port):
        def forward(self, x: Tensor) -> Tensor:
            h = F.gelu(self.up(self.norm_1(x)))
            x = x + (h + (h - h.detach()))
            return self.down(self.norm_2(x))

    explanation = explain(make_case(Detached), Lane("float64"))
    assert not explanation.faults
    assert any("gradients part at the model itself" in note and "`gelu_backward`" in note for note in explanation.notes)


def test_the_line_at_which_a_gradient_stops_is_told() -> None:
    class Detached(Port):
        def forward(self, x: Tensor) -> Tensor:
            x = x + F.gelu(self.up(self.norm_1(x)).detach())
            return self.down(self.norm_2(x))

    notes = explain(make_case(Detached), Lane("float64")).notes
    told = next(note for note in notes if "no gradient arrives" in note)
    assert all(f"`{name}`" in told for name in ("norm_1.weight", "up.bias"))
    assert "it stops at `gelu` in the model itself" in told


def test_a_case_that_cannot_be_built_gives_one_line() -> None:
    def broken() -> nn.Module:
        raise ValueError("no such thing")

    told = try_to_explain(CaseRunner(make_case(broken)), Lane("float32"), seconds=5)
    assert told == "No explanation: ValueError: no such thing"


def test_the_line_that_shows_a_fault_again_shows_both_outputs_of_the_leaf() -> None:
    class OtherEps(Port):
        def __init__(self) -> None:
            super().__init__()
            self.norm_1.eps = 1e-3

    case = make_case(OtherEps)
    text = str(explain(case, Lane("float32")))
    assert "refiners parity explain toy/tower --lanes float32 --cases YOUR.MODULE --leaf norm_1" in text
    told = leaf_of_case(CaseRunner(case), Lane("float32"), "norm_1")
    assert "LayerNorm((8,), eps=0.001" in told
    assert "LayerNorm((8,), eps=1e-05" in told
    assert "differ in 24 of 24 elements, worst [" in told
    assert "equal, bit for bit" in leaf_of_case(CaseRunner(case), Lane("float32"), "down")


def test_a_leaf_that_is_not_there_is_refused_with_the_nearest() -> None:
    with pytest.raises(ParityError, match="`norm_3` of Port does not exist.*Nearest leaves: norm_"):
        leaf_of_case(CaseRunner(make_case()), Lane("float32"), "norm_3")


def test_what_upstream_computed_is_kept_in_files_beyond_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    right = str(explained(other_eps, transposed)[0].faults)
    monkeypatch.setattr(teacher.Shelf, "__init__", lambda self: self.__dict__.update(limit=0, _held=0))
    assert str(explained(other_eps, transposed)[0].faults) == right
    x = torch.randn(3, 5).bfloat16()
    (kept,) = teacher.Shelf().keep(x.T)
    assert torch.equal(kept, x.T)


class _Scores(nn.Module):
    """Attention whose mask is made of another constant than on the other side."""

    def __init__(self, scale: float, axes: int) -> None:
        super().__init__()
        self._scale, self._shape = scale, (1,) * axes + (3, 3)
        self.q, self.k, self.o = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.full(self._shape, -9.0, dtype=x.dtype).triu(1)
        return self.o(((self.q(x) @ self.k(x).mT)[None] * self._scale + mask).softmax(-1))[0]


class _Twice(nn.Module):
    def __init__(self, scale: float = 0.5, axes: int = 1) -> None:
        super().__init__()
        self.first, self.second = _Scores(0.5, axes), _Scores(scale, axes)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_a_mask_made_of_another_constant_is_not_blamed_beside_the_fault() -> None:
    found = explain(make_case(lambda: _Twice(0.25, 0), upstream=_Twice), Lane("float32"))
    assert found.leaves == ["second"]
    assert "0.5" in found.faults[0].diagnosis


def test_the_line_that_shows_a_fault_again_names_the_module_that_lists_the_case(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = make_case()
    module = ModuleType("somebody.cases")
    module.__dict__["CASES"] = [make_case(), case]
    monkeypatch.setitem(sys.modules, "somebody.cases", module)
    assert (
        command_of(case, Lane("float32")) == "refiners parity explain toy/tower --lanes float32 --cases somebody.cases"
    )


def test_cases_of_this_repository_need_no_module_in_that_line(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case()
    module = ModuleType("parity_tests.cases.toy")
    module.__dict__["CASES"] = [case]
    monkeypatch.setitem(sys.modules, "parity_tests.cases.toy", module)
    assert command_of(case, Lane("float64")) == "refiners parity explain toy/tower --lanes float64"
