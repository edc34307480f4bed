"""Gradient checkpointing: equal gradients from less memory, with the contexts of the forward."""

import threading
from collections.abc import Callable
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.errors import AdapterError, ChainError, SelectionError
from refiners.fluxion.adapters import CheckpointAdapter, Lora, base_state_dict, inject_checkpoints, inject_loras
from refiners.fluxion.context import Contexts
from refiners.fluxion.selectors import select
from tests.refiners.fluxion.toys import model as toy
from tests.refiners.fluxion.toys import state

DIM = 4


def push(values: list[Tensor], value: Tensor) -> None:
    values.append(value)


def total(values: list[Tensor]) -> Tensor:
    return torch.stack(values).sum(0)


class Scaled(fl.Chain):
    """Declares a context, writes it and reads it, and reads a value that is set from outside of the model."""

    def __init__(self) -> None:
        super().__init__(
            fl.Linear(DIM, DIM),
            fl.SetContext("own", "x"),
            fl.SiLU(),
            fl.Sum(fl.Identity(), fl.UseContext("own", "x"), fl.UseContext("own", "shift")),
        )

    def init_context(self) -> Contexts:
        return {"own": {"x": None, "shift": None}}


class Block(fl.Chain):
    """Reads what the model was told, and what blocks before it have stored; stores what the next read."""

    def __init__(self) -> None:
        super().__init__(
            Scaled(),
            fl.SetContext("model", "skips", callback=push),
            fl.Sum(fl.Identity(), fl.UseContext("model", "skips").compose(total)),
            fl.Sum(fl.Identity(), fl.Chain(fl.UseContext("model", "time"), fl.Linear(DIM, DIM))),
            fl.SetContext("model", "last"),
        )


class Model(fl.Chain):
    """Three blocks, and what they have stored."""

    def __init__(self) -> None:
        super().__init__(
            Block(),
            fl.Residual(Block()),
            Block(),
            fl.Sum(
                fl.UseContext("model", "skips").compose(total),
                fl.UseContext("model", "last"),
                fl.UseContext("outside", "embedding"),
            ),
        )

    def init_context(self) -> Contexts:
        return {"model": {"skips": [], "time": None, "last": None}}


def tell(model: fl.Chain, value: float) -> None:
    model.set_context("outside", {"embedding": torch.full((DIM,), value)})
    model.set_context("model", {"time": torch.full((DIM,), value / 7)})
    for i, scaled in enumerate(select(model).of(Scaled)):
        scaled.set_context("own", {"shift": torch.full((DIM,), value / (i + 2))})


def forward(model: fl.Chain) -> tuple[Tensor, Tensor]:
    tell(model, 3.0)
    x = torch.linspace(-1, 1, 2 * DIM).reshape(2, DIM).requires_grad_()
    for parameter in model.parameters():
        parameter.grad = None
    return x, model(x)


def gradients(model: fl.Chain, x: Tensor) -> list[Tensor | None]:
    return [x.grad, *(parameter.grad for parameter in model.parameters())]


def train(model: fl.Chain) -> list[Tensor | None]:
    x, y = forward(model)
    y.square().sum().backward()
    return gradients(model, x)


def equal(first: list[Tensor | None], second: list[Tensor | None]) -> bool:
    pairs = list(zip(first, second, strict=True))
    return len(pairs) > 1 and all(a is not None and b is not None and torch.equal(a, b) for a, b in pairs)


def saved_bytes(run: Callable[[], Any]) -> tuple[int, Any]:
    """How many bytes autograd keeps for the backward, each storage once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    return sum(kept.values()), result


@pytest.mark.parametrize("targets", [(Block,), (Scaled,), (Block, Scaled), (fl.Linear,), (fl.Residual, Block, fl.Sum)])
def test_gradients_are_those_without_checkpoints(targets: tuple[type[nn.Module], ...]) -> None:
    model = Model()
    expected = train(model)
    inject_checkpoints(select(model).of(*targets))
    assert equal(train(model), expected)


def test_values_set_between_forward_and_backward_are_for_the_next_forward() -> None:
    model = Model()
    expected = train(model)
    inject_checkpoints(select(model).of(Block, Scaled))
    x, y = forward(model)
    tell(model, 5.0)
    y.square().sum().backward()
    assert equal(gradients(model, x), expected)
    assert model.use_context("outside")["embedding"].tolist() == [5.0] * DIM
    assert model.use_context("model")["skips"] == []
    assert [s.use_context("own")["shift"].tolist() for s in select(model).of(Scaled)] == [
        torch.full((DIM,), 5.0 / (i + 2)).tolist() for i in range(3)
    ]


def test_a_target_whose_chains_above_are_not_running_sees_their_values_too() -> None:
    model = Model()
    block = model.layer(0, Block)

    def run() -> list[Tensor | None]:
        tell(model, 3.0)
        model.set_context("model", {"skips": []})
        x = torch.ones(2, DIM, requires_grad=True)
        for parameter in block.parameters():
            parameter.grad = None
        y = top(x)
        tell(model, 5.0)
        model.set_context("model", {"skips": [torch.zeros(9)]})
        y.square().sum().backward()
        assert len(model.use_context("model")["skips"]) == 1
        return gradients(block, x)

    top: fl.Chain = block
    expected = run()
    top = CheckpointAdapter(block).inject()
    assert equal(run(), expected)


def test_a_scope_may_be_over_when_the_backward_comes() -> None:
    model = Model()
    expected = train(model)
    inject_checkpoints(select(model).of(Block))
    with model.context_scope():
        x, y = forward(model)
    assert model.use_context("model")["time"] is None
    y.square().sum().backward()
    assert equal(gradients(model, x), expected)


def test_the_backward_may_run_in_another_thread_while_this_one_runs_the_model() -> None:
    model = Model()
    expected = train(model)
    inject_checkpoints(select(model).of(Block))
    x, y = forward(model)
    errors: list[Exception] = []

    def backward() -> None:
        try:
            y.square().sum().backward()
        except Exception as error:
            errors.append(error)

    class Waits(fl.Module):
        def forward(self, x: Tensor) -> Tensor:
            thread = threading.Thread(target=backward)
            thread.start()
            thread.join()
            return x

    with torch.no_grad():
        before = model(tell(model, 5.0) or x)
        model.insert(2, Waits())
        after = model(tell(model, 5.0) or x)
    assert errors == []
    assert torch.equal(before, after)
    assert equal(gradients(model, x), expected)


def test_a_backward_inside_of_a_forward_leaves_that_forward_alone() -> None:
    model = Model()
    expected = train(model)
    inject_checkpoints(select(model).of(Block))
    x, y = forward(model)
    loss = y.square().sum()

    class Backward(fl.Module):
        def forward(self, x: Tensor) -> Tensor:
            loss.backward()
            return x

    with torch.no_grad():
        before = model(tell(model, 5.0) or x)
        model.insert(2, Backward())
        assert torch.equal(model(tell(model, 5.0) or x), before)
    assert equal(gradients(model, x), expected)


def test_a_graph_that_is_kept_can_be_run_again() -> None:
    model = Model()
    inject_checkpoints(select(model).of(Block))
    x, y = forward(model)
    parameters = [x, *model.parameters()]
    first = torch.autograd.grad(y.square().sum(), parameters, retain_graph=True)
    second = torch.autograd.grad(y.square().sum(), parameters)
    assert equal(list(first), list(second))


def test_dropout_drops_the_same_twice() -> None:
    model = fl.Chain(fl.Chain(fl.Linear(DIM, DIM), nn.Dropout(0.5), fl.Linear(DIM, DIM)))
    x = torch.ones(8, DIM)

    def run() -> list[Tensor | None]:
        torch.manual_seed(3)
        model.zero_grad()
        model(x).square().sum().backward()
        return [parameter.grad for parameter in model.parameters()] + [torch.rand(1)]

    expected = run()
    inject_checkpoints(select(model).of(fl.Chain))
    assert equal(run(), expected)


@pytest.mark.parametrize("grad", [True, False])
def test_the_target_runs_twice_only_if_there_is_a_backward(grad: bool) -> None:
    runs: list[Tensor] = []
    model = fl.Chain(fl.Chain(fl.Linear(DIM, DIM), fl.Lambda(lambda x: runs.append(x) or x), fl.Linear(DIM, DIM)))
    inject_checkpoints(select(model).of(fl.Chain))
    with torch.set_grad_enabled(grad):
        y = model(torch.ones(1, DIM))
    assert len(runs) == 1
    if grad:
        y.sum().backward()
        assert len(runs) == 2


def deep_model(blocks: int = 4) -> fl.Chain:
    def block() -> fl.Chain:
        return fl.Residual(fl.Linear(64, 64), fl.SiLU(), fl.Linear(64, 64), fl.Sigmoid(), fl.SetContext("deep", "x"))

    class Deep(fl.Chain):
        def init_context(self) -> Contexts:
            return {"deep": {"x": None}}

    return Deep(*(block() for _ in range(blocks)))


def test_only_the_inputs_of_targets_are_kept_for_the_backward() -> None:
    model, x = deep_model(), torch.randn(256, 64, requires_grad=True)
    plain, _ = saved_bytes(lambda: model(x))
    checkpoints = inject_checkpoints(select(model).of(fl.Residual))
    less, _ = saved_bytes(lambda: model(x))
    # The input of each block, and the value of the context there.
    assert less <= (2 * 4 - 1) * x.nbytes < plain / 2
    checkpoints.eject()
    assert saved_bytes(lambda: model(x))[0] == plain


def test_an_outer_checkpoint_keeps_nothing_of_the_contexts_of_inner_ones() -> None:
    model, x = fl.Chain(deep_model()), torch.randn(256, 64, requires_grad=True)
    inject_checkpoints(select(model).of(fl.Residual))
    inject_checkpoints(select(model).where(lambda module: isinstance(module, fl.Chain) and len(module) == 4))
    assert saved_bytes(lambda: model(x))[0] == x.nbytes


def test_nothing_is_kept_after_the_backward() -> None:
    model = Model()
    inject_checkpoints(select(model).of(Block))
    time = torch.full((DIM,), 0.5)
    tell(model, 3.0)
    model.set_context("model", {"time": time})
    y = model(torch.ones(2, DIM))
    kept = ref(time)
    del time
    assert kept() is not None
    y.sum().backward()
    assert kept() is None
    assert y.grad_fn is not None


def test_a_value_of_the_context_that_is_overwritten_before_the_backward_is_an_error() -> None:
    model = fl.Chain(fl.Chain(fl.Linear(DIM, DIM), fl.Sum(fl.Sin(), fl.UseContext("outside", "shift"))))
    shift = torch.ones(DIM)
    model.set_context("outside", {"shift": shift})
    inject_checkpoints(select(model).of(fl.Chain))
    y = model(torch.ones(1, DIM))
    shift.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("lora_first", [True, False])
@pytest.mark.parametrize("target", [Block, fl.Linear])
def test_loras_stand_over_and_under_checkpoints(target: type[nn.Module], lora_first: bool) -> None:
    model = Model()
    loras = inject_loras(model, name="style", rank=2)
    for lora in loras.loras:
        nn.init.normal_(lora.up.weight)
    weights = loras.state_dict()
    expected = sorted((g.tolist() for g in train(model) if g is not None), key=repr)
    loras.eject()
    base = base_state_dict(model)

    steps: list[Callable[[], Any]] = [
        lambda: inject_loras(select(model).of(fl.Linear), name="style", rank=2),
        lambda: inject_checkpoints(select(model).of(target).outside(Lora)),
    ]
    injected = [step() for step in (steps if lora_first else steps[::-1])]
    (injected if lora_first else injected[::-1])[0].load_state_dict(weights)
    assert list(base_state_dict(model)) == list(base)
    assert sorted((g.tolist() for g in train(model) if g is not None), key=repr) == expected
    injected[0].eject()
    injected[1].eject()
    assert list(model.state_dict()) == list(base)


def test_ejecting_leaves_no_trace() -> None:
    root = toy()
    before = state(root)
    checkpoints = inject_checkpoints(select(root).of(fl.Chain, fl.Linear))
    assert len(checkpoints) == 5
    assert repr(checkpoints) == "CheckpointSet(5 modules)"
    root(torch.ones(1, 2)).sum().backward()
    checkpoints.eject()
    assert state(root) == before
    with pytest.raises(AdapterError):
        checkpoints.eject()


def test_a_layer_that_stands_in_several_places_is_checkpointed_in_all() -> None:
    shared = fl.Linear(DIM, DIM)
    model = fl.Chain(fl.Chain(shared), fl.Residual(shared))
    expected = train_plain(model)
    checkpoints = inject_checkpoints(select(model).of(fl.Linear))
    assert len(select(model).of(CheckpointAdapter).paths) == 2
    assert equal(train_plain(model), expected)
    checkpoints.eject()
    assert equal(train_plain(model), expected)


def train_plain(model: fl.Chain) -> list[Tensor | None]:
    model.zero_grad()
    x = torch.ones(1, DIM, requires_grad=True)
    model(x).square().sum().backward()
    return [x.grad, *(parameter.grad for parameter in model.parameters())]


def test_one_module_that_cannot_be_checkpointed_leaves_the_model_as_it_was() -> None:
    root = fl.Chain(fl.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    before = state(root)
    with pytest.raises(AdapterError, match="stands in Sequential, which is no Chain"):
        inject_checkpoints(select(root).of(nn.Linear))
    assert state(root) == before


def test_a_module_is_not_checkpointed_twice() -> None:
    root = toy()
    inject_checkpoints(select(root).of(fl.Residual))
    before = state(root)
    with pytest.raises(AdapterError, match="checkpointed already"):
        inject_checkpoints(select(root).of(fl.Linear, fl.Residual))
    assert state(root) == before


def test_an_empty_selection_is_an_error() -> None:
    with pytest.raises(SelectionError):
        inject_checkpoints(select(toy()).of(fl.Conv2d))


def test_a_failing_target_is_explained_as_without_checkpoint() -> None:
    model = fl.Chain(fl.Chain(fl.Linear(DIM, DIM), fl.Linear(DIM + 1, DIM)))
    inject_checkpoints(select(model).of(fl.Chain))
    with pytest.raises(ChainError, match=r">>> Linear.*CheckpointAdapter\.Chain\.Linear_2"):
        model(torch.ones(1, DIM))


class Reader(fl.Chain):
    """Reads a context, and writes none."""

    def __init__(self) -> None:
        super().__init__(fl.Linear(DIM, DIM), fl.SiLU(), fl.Sum(fl.Identity(), fl.UseContext("model", "time")))


class Readers(fl.Chain):
    def __init__(self) -> None:
        super().__init__(Reader(), fl.Residual(Reader()))

    def init_context(self) -> Contexts:
        return {"model": {"time": None}}


# Chains that write contexts need a flag of torch's: it refuses all changes inside of a checkpoint that it compiles.
@pytest.mark.parametrize(("build", "target", "flag"), [(Readers, Reader, False), (Model, Block, True)])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_it_compiles_to_one_graph(build: Callable[[], fl.Chain], target: type[nn.Module], flag: bool) -> None:
    model = build()
    expected = train(model) if build is Model else train_reader(model, model)
    inject_checkpoints(select(model).of(target))
    torch.compiler.reset()
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=flag):  # pyright: ignore[reportPrivateUsage] (has no public name)
        for _ in range(2):
            if build is Model:
                x = torch.linspace(-1, 1, 2 * DIM).reshape(2, DIM).requires_grad_()
                model.zero_grad()
                tell(model, 3.0)
                compiled(x).square().sum().backward()
                assert equal(gradients(model, x), expected)
            else:
                assert equal(train_reader(model, compiled), expected)
    torch.compiler.reset()


def train_reader(model: fl.Chain, call: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
    model.zero_grad()
    model.set_context("model", {"time": torch.full((DIM,), 0.3)})
    x = torch.linspace(-1, 1, 2 * DIM).reshape(2, DIM).requires_grad_()
    call(x).square().sum().backward()
    return gradients(model, x)


def test_an_exported_model_has_no_checkpoints() -> None:
    model, x = toy(), torch.ones(1, 2)
    inject_checkpoints(select(model).of(fl.Chain, fl.Linear))
    exported = torch.export.export(model, (x,))
    assert torch.equal(exported.module()(x), model(x))
