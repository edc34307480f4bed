"""What is recorded of a forward, and that nothing but fingerprints is kept."""

import gc
import weakref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.parity.fingerprint import Values
from refiners.parity.operations import Trace
from refiners.parity.trace import record
from tests.refiners.parity.toys import Port, Upstream


def traced(model: nn.Module, *, read_views: bool = False) -> Trace:
    with torch.no_grad():
        return record(model, lambda: {"y": model(torch.ones(3, 8))}, Values(), read_views=read_views)[0]


def test_each_operation_has_the_module_that_ran_it() -> None:
    trace = traced(Upstream())
    found = {operation.name: trace.path_of(operation) for operation in trace.operations}
    assert found["aten.gelu"] == ""
    assert found["aten.native_layer_norm"] == "norm_2"


def test_the_source_is_the_line_of_the_model_not_of_torch() -> None:
    operation = next(op for op in traced(Upstream()).operations if op.name == "aten.gelu")
    assert operation.source is not None
    assert operation.source.file.endswith("toys.py")
    assert "F.gelu" in operation.source.code


def test_the_source_of_a_leaf_in_a_chain_is_its_forward() -> None:
    operation = next(op for op in traced(fl.Chain(fl.LayerNorm(8))).operations if "norm" in op.name)
    assert operation.source is not None
    assert operation.source.file.endswith("norm.py")


def test_values_that_flow_from_one_operation_to_another_have_one_number() -> None:
    trace = traced(fl.Chain(fl.Linear(8, 8), fl.ReLU(), fl.Sigmoid()))
    relu, sigmoid = (next(op for op in trace.operations if op.name == name) for name in ("aten.relu", "aten.sigmoid"))
    assert relu.outputs == sigmoid.inputs
    assert trace.outputs["y"] == sigmoid.outputs[0]


def test_writing_in_place_gives_another_number() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            before = y.sum()
            y.add_(1)
            return y.sum() + before

    with torch.enable_grad():
        trace = record(InPlace(), lambda: {"y": InPlace()(torch.ones(3))}, Values())[0]
    sums = [op for op in trace.operations if op.name == "aten.sum"]
    assert sums[0].inputs != sums[1].inputs


def test_views_of_views_are_one_operation() -> None:
    class Heads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x.view(3, 2, 4).transpose(0, 1))

    relu = next(op for op in traced(Heads()).operations if op.name == "aten.relu")
    view = next(op for op in traced(Heads()).operations if op.outputs == relu.inputs)
    assert view.name == "aten.view → transpose"


def test_the_outputs_are_those_of_an_untraced_run() -> None:
    model = Upstream()
    x = torch.randn(3, 8)
    _, outputs = record(model, lambda: {"y": model(x)}, Values())
    assert torch.equal(outputs["y"], model(x))


def test_no_activation_is_kept() -> None:
    class Forgets(nn.Module):
        seen: weakref.ref[Tensor]

        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            Forgets.seen = weakref.ref(y)
            return y.sum()

    kept = traced(Forgets())
    gc.collect()
    assert Forgets.seen() is None
    assert kept.operations


def test_no_hook_stays_on_the_model() -> None:
    model = Upstream()
    traced(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Reuses(nn.Module):
    """Gives the memory of each value back, so that the next one has its address and, in Python, its id."""

    def forward(self, x: Tensor) -> Tensor:
        total = x
        for number in range(50):
            passing = x + number
            total = total * passing
            del passing
        return total


def test_a_value_in_the_place_of_one_that_is_gone_is_another() -> None:
    model = Reuses()
    trace = record(model, lambda: {"y": model(torch.full((3,), 0.5))}, Values())[0]
    sums = [operation.outputs[0] for operation in trace.operations if operation.name == "aten.add"]
    assert len(sums) == len(set(sums)) == 50


def forward_and_backward(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    y = model(x)
    y.sum().backward()
    return {"y": y}


def test_the_backward_pass_names_the_module_and_the_line_it_goes_back_through() -> None:
    model = Upstream()
    x = torch.randn(3, 8)
    trace = record(model, lambda: forward_and_backward(model, x), Values(), gradients=True)[0]
    back = {op.name: op for op in trace.operations if op.backward_of is not None}
    gelu = back["aten.gelu_backward"]
    assert trace.operations[gelu.backward_of or 0].name == "aten.gelu"
    assert gelu.source is not None
    assert "F.gelu" in gelu.source.code
    paths = {trace.path_of(op) for op in trace.operations if op.name == "aten.native_layer_norm_backward"}
    assert paths == {"norm_1", "norm_2"}
    assert set(trace.gradients) == {name for name, _ in model.named_parameters()}


def test_equal_gradients_have_one_number() -> None:
    model, other = Upstream(), Port()
    other.load_state_dict(model.state_dict())
    x, values = torch.randn(3, 8), Values()
    traces = [record(m, lambda m=m: forward_and_backward(m, x), values, gradients=True)[0] for m in (model, other)]
    assert traces[0].gradients == traces[1].gradients
    assert {op.outputs for op in traces[0].operations} == {op.outputs for op in traces[1].operations}


def test_a_view_of_what_was_written_to_before_is_known_where_it_is_read() -> None:
    weight, x = nn.Parameter(torch.zeros(1, 4)), torch.zeros(3, 4)
    with torch.no_grad():
        weight.copy_(torch.arange(4.0))
        x.add_(1.0)
        model = nn.Module()
        model.register_parameter("weight", weight)
        trace, _ = record(model, lambda: {"y": weight.expand(3, -1) + x[:, [0]].expand(-1, 4) + x.t().t()}, Values())
    made = {number for operation in trace.operations for number in operation.outputs}
    read = {number for operation in trace.operations if operation.name == "aten.add" for number in operation.inputs}
    assert read <= made
