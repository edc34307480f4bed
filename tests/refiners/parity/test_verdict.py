"""Each rule of the verdict, and a planted fault that turns it red."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refiners.parity import Case, Verdict
from refiners.parity.pairing import Kind, Pair
from refiners.parity.verdict import uninformative
from tests.refiners.parity.toys import Port, Upstream, make_case, result_of, run

LANES = ("float64", "float32", "bfloat16", "float16")


@pytest.mark.parametrize("lane", LANES)
def test_two_equal_models_are_bitwise_in_every_lane(lane: str) -> None:
    result = result_of(make_case(), lane)
    assert result.verdict is Verdict.BITWISE
    assert result.reasons == ()
    assert (result.tensors, result.leaves) == (1 + 8 + 1, 4)
    assert result.elements == 24 + 2 * 72 + 4 * 8 + 24
    assert result.error_upstream == result.error_port


class DroppedBias(Port):
    def forward(self, x: Tensor) -> Tensor:
        x = x + F.gelu(F.linear(self.norm_1(x), self.up.weight))
        return self.down(self.norm_2(x))


class SwappedNorms(Port):
    def forward(self, x: Tensor) -> Tensor:
        x = x + F.gelu(self.up(self.norm_2(x)))
        return self.down(self.norm_1(x))


class WrongEps(Port):
    def __init__(self) -> None:
        super().__init__(eps=1e-6)


class TransposedWeight(Port):
    def forward(self, x: Tensor) -> Tensor:
        x = x + F.gelu(F.linear(self.norm_1(x), self.up.weight.T, self.up.bias))
        return self.down(self.norm_2(x))


class OtherActivation(Port):
    def forward(self, x: Tensor) -> Tensor:
        x = x + F.gelu(self.up(self.norm_1(x)), approximate="tanh")
        return self.down(self.norm_2(x))


class NoResidual(Port):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm_2(F.gelu(self.up(self.norm_1(x)))))


class HalfPrecisionInside(Port):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(torch.float32).to(x.dtype))


@pytest.mark.parametrize(
    "port",
    [DroppedBias, SwappedNorms, WrongEps, TransposedWeight, OtherActivation, NoResidual, HalfPrecisionInside],
)
def test_a_planted_fault_is_different_in_float64(port: type[Port]) -> None:
    result = result_of(make_case(port))
    assert result.verdict is Verdict.DIFFERENT
    assert "differs in float64" in result.reason or "never ran" in result.reason
    assert result.worst is not None
    assert result.worst.tensor == "y"


def test_a_fault_in_float64_is_no_rounding_in_float32() -> None:
    result = result_of(make_case(WrongEps), "float32")
    assert result.verdict is Verdict.DIFFERENT
    assert result.reason == "not bitwise, and DIFFERENT in float64 as well"


class OtherOrder(Port):
    """A legitimate rewrite: the sum over the features is cut in two."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.gelu(self.up(self.norm_1(x)))
        y, weight = self.norm_2(x), self.down.weight
        return F.linear(y[:, :4], weight[:, :4]) + F.linear(y[:, 4:], weight[:, 4:], self.down.bias) + 0 * self.down(y)


@pytest.mark.parametrize("lane", LANES)
def test_another_order_of_the_same_operations_is_rounding(lane: str) -> None:
    result = result_of(make_case(OtherOrder), lane)
    assert result.verdict is Verdict.ROUNDING
    assert result.reason.startswith("output `y` differs, worst at y[")
    assert result.worst is not None
    assert result.worst.ulp is not None


def test_without_a_float64_lane_nothing_is_rounding() -> None:
    result = result_of(make_case(OtherOrder, lanes=("float32",)), "float32")
    assert result.verdict is Verdict.DIFFERENT
    assert "no float64 lane" in result.reason
    assert result.error_upstream is None


class RoundedToEightBits(Port):
    """Right in float64, and far less precise than upstream elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if y.dtype == torch.float64 else y + (y.detach().to(torch.bfloat16).to(y.dtype) - y.detach())


def test_a_port_less_precise_than_upstream_is_no_rounding() -> None:
    case = make_case(RoundedToEightBits)
    assert result_of(case).verdict is Verdict.BITWISE
    result = result_of(case, "float32")
    assert result.verdict is Verdict.DIFFERENT
    assert "times as far from float64" in result.reason
    assert result.error_port is not None
    assert result.error_upstream is not None
    assert result.error_port > 100 * result.error_upstream


def one(function: Callable[[Tensor], Tensor | None]) -> dict[str, Any]:
    """A case whose port returns something else than it computed; None leaves the output out."""

    def changed(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        made = function(model(inputs["x"]))
        return {} if made is None else {"y": made}

    return {"run_port": changed}


def both(function: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """A case both of whose sides return something else than they computed."""

    def changed(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"y": function(model(inputs["x"]))}

    return {"run_upstream": changed, "run_port": changed}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (one(lambda y: None), "does not return the output `y`"),
        (one(lambda y: y[:1]), "shape (1, 8) in the port, (3, 8) upstream"),
        (one(lambda y: y[None]), "shape (1, 3, 8) in the port"),
        (one(lambda y: y.float()), "float32 in the port, float64 upstream"),
        (one(lambda y: y.clone().index_fill_(0, torch.tensor(0), torch.nan)), "finite on one side only"),
        (one(lambda y: y * 0 + 1), "is constant in the port"),
        (one(lambda y: y.detach()), "can be differentiated upstream only"),
        (both(lambda y: y * torch.nan), "is NaN everywhere"),
        (both(lambda y: y * 0), "is constant"),
        (both(lambda y: y[:0]), "zero elements were compared"),
        (both(lambda y: y > 1e9), "every output is constant"),
        (both(lambda y: y.detach()), "no output depends on a weight"),
        ({"run_port": lambda model, inputs: {**run(model, inputs), "z": inputs["x"]}}, "returns `z`, which upstream"),
        ({"run_port": lambda model, inputs: model(inputs["x"])}, "must return a dict of tensors, got Tensor"),
        ({"run_port": lambda model, inputs: {"y": (model(inputs["x"]),)}}, "`y` is tuple"),
        (
            {"run_port": lambda model, inputs: {"y": inputs["x"].mm(inputs["x"])}},
            "running the port raised RuntimeError",
        ),
        ({"run_port": lambda model, inputs: {"y": inputs["x"] * 2}}, "never ran: `down`, `norm_1`, `norm_2`, `up`"),
        ({"inputs": lambda generator: [1]}, "must return a mapping"),
        ({"taps": {"up": "upp"}}, "no submodule `upp`, which a tap asks for. Nearest: up"),
    ],
)
def test_a_comparison_that_proves_nothing_is_different(change: dict[str, Any], reason: str) -> None:
    result = result_of(make_case(**change))
    assert result.verdict is Verdict.DIFFERENT
    assert reason in " | ".join(result.reasons)


def test_the_sign_of_a_zero_is_not_rounding_away() -> None:
    """Bitwise is bitwise: equal values, other bits, and so not BITWISE."""

    def signed(sign: float) -> Callable[..., dict[str, Tensor]]:
        return lambda model, inputs: {
            **run(model, inputs),
            "zero": model(inputs["x"]).detach() * 0.0 * sign + sign * 0.0,
        }

    zeros = {"run_upstream": signed(1.0), "run_port": signed(-1.0)}
    worst = result_of(make_case(**zeros)).reasons
    assert any("zero" in reason and "constant" in reason for reason in worst)
    first, second = torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0])

    def with_zero(zero: Tensor) -> Callable[..., dict[str, Tensor]]:
        return lambda model, inputs: {**run(model, inputs), "zero": zero.clone()}

    result = result_of(make_case(run_upstream=with_zero(first), run_port=with_zero(second)))
    assert result.verdict is Verdict.ROUNDING
    assert result.worst is not None
    assert (result.worst.upstream, result.worst.port, result.worst.ulp) == ("0.0", "-0.0", 1)


def test_equal_nan_is_bitwise_beside_informative_values() -> None:
    def some_nan(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        y = model(inputs["x"])
        return {"y": torch.where(torch.arange(8) == 0, torch.nan, y)}

    result = result_of(make_case(run_upstream=some_nan, run_port=some_nan))
    assert result.verdict is Verdict.BITWISE


def test_integers_that_differ_are_never_rounding() -> None:
    def flipped(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        return {**run(model, inputs), "best": torch.tensor([1, 2])}

    def straight(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        return {**run(model, inputs), "best": torch.tensor([2, 1])}

    result = result_of(make_case(run_upstream=straight, run_port=flipped))
    assert result.verdict is Verdict.DIFFERENT
    assert "int64 values differ" in result.reason


def test_a_tensor_compared_with_itself_is_a_fault() -> None:
    tensor = torch.arange(4.0)
    assert "compared with itself" in uninformative([Pair("y", Kind.OUTPUT, tensor, tensor[1:])], set())[0]
    assert uninformative([Pair("y", Kind.OUTPUT, tensor, tensor.clone())], set()) == []
    weight = Pair("w", Kind.OUTPUT, torch.rand(3), torch.rand(3)).upstream
    known = {weight.untyped_storage().data_ptr()}
    pairs = [Pair("w", Kind.OUTPUT, weight, weight), Pair("y", Kind.OUTPUT, tensor, tensor.clone())]
    assert uninformative(pairs, known) == []
    assert "a weight that both sides share" in uninformative(pairs[:1], known)[0]


class WritesItsInput(Port):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        with torch.no_grad():
            x.mul_(2)
        return y


class Trains(Port):
    def train(self, mode: bool = True) -> "Trains":
        del mode
        return super().train(True)


class WritesItsWeights(Port):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x.detach())
        with torch.no_grad():
            self.up.bias.add_(1)
        return y


def test_a_side_that_writes_into_its_weights_is_different() -> None:
    """Upstream runs first and the storages are shared, so the port would compute with other weights."""
    for changes, side in (({"port": WritesItsWeights}, "the port"), ({"upstream": WritesItsWeights}, "upstream")):
        result = result_of(make_case(**changes, gradients=False))
        assert result.verdict is Verdict.DIFFERENT
        assert f"{side}: its forward writes into its weights `up.bias`" in result.reasons


class SkipsALeaf(Port):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 2)


class UpstreamWithSpare(Upstream):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 2)


class Frozen(Port):
    def __init__(self) -> None:
        super().__init__()
        self.up.weight.requires_grad_(False)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (make_case(Trains), "the port: it is in training mode at `the model`, `norm_1`, `norm_2` and 2 more"),
        (make_case(SkipsALeaf, upstream=UpstreamWithSpare), "leaves of the port that never ran: `spare`"),
        (make_case(Frozen), "the port's `up.weight` has requires_grad=False, upstream's `up.weight` trains"),
    ],
)
@pytest.mark.parametrize("lane", ["float64", "float32"])
def test_a_side_that_misbehaves_is_different_though_its_bits_are_equal(case: Case, reason: str, lane: str) -> None:
    result = result_of(case, lane)
    assert result.verdict is Verdict.DIFFERENT
    assert reason in result.reasons


@pytest.mark.parametrize(
    ("changes", "side"),
    [
        ({"port": WritesItsInput}, "the port"),
        ({"port": WritesItsInput, "gradients": False}, "the port"),
        ({"upstream": WritesItsInput}, "upstream"),
    ],
)
def test_a_side_that_writes_into_its_inputs_is_different(changes: dict[str, Any], side: str) -> None:
    result = result_of(make_case(**changes))
    assert result.verdict is Verdict.DIFFERENT
    assert result.reason.startswith(f"running {side} raised ParityError: A forward may not write into its inputs")
    assert "`x`" in result.reason


def test_a_leaf_whose_weights_are_read_without_calling_it_has_run() -> None:
    class ReadsWeights(Port):
        def forward(self, x: Tensor) -> Tensor:
            x = x + F.gelu(F.linear(self.norm_1(x), self.up.weight, self.up.bias))
            return self.down(self.norm_2(x))

    assert result_of(make_case(ReadsWeights)).verdict is Verdict.BITWISE
    blind = result_of(make_case(ReadsWeights, gradients=False))
    assert "`up`" in blind.reason
    assert "gradients=False: no weight is shown to influence the outputs" in blind.notes


def test_taps_compare_intermediate_outputs_of_every_call() -> None:
    class DoubledInside(Port):
        def forward(self, x: Tensor) -> Tensor:
            x = x + F.gelu(self.up(self.norm_1(x)))
            return self.down(self.norm_2(x * 2 / 2))

    assert result_of(make_case(taps={"norm_1": "norm_1", "up": "up"})).tensors == 12
    swapped = result_of(make_case(taps={"norm_1": "norm_2"}))
    assert swapped.verdict is Verdict.DIFFERENT
    assert "tap `norm_1`" in swapped.reason


def test_an_exception_is_a_result_with_a_short_traceback() -> None:
    def fail() -> nn.Module:
        raise ValueError("no such layer\nand more")

    result = result_of(make_case(fail))
    assert result.verdict is Verdict.DIFFERENT
    assert result.reason == "building the port raised ValueError: no such layer"
    assert "no such layer" in result.traceback
    assert (result.tensors, result.elements, result.leaves) == (0, 0, 0)


def test_a_class_that_upstream_no_longer_has_is_one_line_with_the_installed_version() -> None:
    name = "ConvolutionOfNextYear"

    def moved() -> nn.Module:
        return getattr(nn, name)()

    def gone() -> nn.Module:
        namespace: dict[str, Any] = {}
        exec(f"from torch.nn import {name} as layer", namespace)
        return namespace["layer"]()

    for builder in (moved, gone):
        result = result_of(make_case(upstream=builder))
        assert result.verdict is Verdict.DIFFERENT
        assert result.reason.startswith("building upstream raised ")
        assert f"(torch {torch.__version__} is installed)" in result.reason
        assert "\n" not in result.reason


def test_an_operation_missing_in_half_is_reported_and_the_other_lanes_go_on() -> None:
    def inverse(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        y = model(inputs["x"])
        return {"y": torch.linalg.inv(y.T @ y + torch.eye(8, dtype=y.dtype))}

    case = make_case(run_upstream=inverse, run_port=inverse)
    assert result_of(case).verdict is Verdict.BITWISE
    result = result_of(case, "float16")
    assert result.verdict is Verdict.DIFFERENT
    assert result.reason.startswith("running upstream raised RuntimeError")


def test_modules_shared_by_both_sides_are_refused() -> None:
    shared = Upstream()
    result = result_of(make_case(lambda: shared, upstream=lambda: shared), "float32")
    assert "share modules" in result.reason


def test_a_builder_that_fixes_a_dtype_is_refused() -> None:
    result = result_of(make_case(lambda: Port().float()), "bfloat16")
    assert "Give no dtype in a builder" in result.reason
