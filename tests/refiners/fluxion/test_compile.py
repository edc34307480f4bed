"""torch.compile(fullgraph=True) on Chains: design.md §4, api.md §8 "torch"."""

import asyncio
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import refiners.fluxion.layers as fl
from refiners.fluxion.context import Contexts

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
x = torch.linspace(-1, 1, 6).reshape(3, 2)


def push(values: list[Any], value: Any) -> None:
    values.append(value)


class Model(fl.Chain):
    """Has a node of each kind, and contexts that are declared, written and set from outside."""

    def __init__(self) -> None:
        super().__init__(
            fl.Linear(2, 2),
            fl.SetContext("own", "first"),
            fl.Residual(fl.Linear(2, 2), fl.Sum(fl.Identity(), fl.UseContext("own", "first"))),
            fl.SetContext("own", "list", callback=push),
            fl.Parallel(fl.Identity(), fl.UseContext("own", "list").compose(lambda values: values[0])),
            fl.Distribute(fl.Identity(), fl.Linear(2, 2)),
            fl.Concatenate(fl.GetArg(0), fl.GetArg(1), fl.Lambda(lambda *_: None), dim=-1),
            fl.Chain(fl.Passthrough(fl.Sin()), fl.Return(), fl.Lambda(lambda x: x * 100)),
            nn.Sequential(nn.Linear(4, 2), fl.Chain(fl.ReLU())),
            fl.Sum(fl.Identity(), fl.UseContext("outside", "embedding")),
            fl.Matmul(fl.Identity(), fl.Transpose(0, 1)),
        )
        self.set_context("outside", {"embedding": torch.ones(2)})

    def init_context(self) -> Contexts:
        return {"own": {"first": None, "list": []}}


class Reads(fl.Sum, fl.Adapter[fl.Linear]):
    """Adds a value of the context to its target's output."""

    def __init__(self, target: fl.Linear) -> None:
        with self.setup_adapter(target):
            super().__init__(target, fl.Chain(fl.UseContext("outside", "embedding"), fl.Sin()))


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model: nn.Module) -> tuple[Any, CompileCounter]:
    counter = CompileCounter()
    return torch.compile(model, fullgraph=True, backend=counter), counter


def test_a_model_with_every_kind_of_node_is_one_graph_with_equal_results() -> None:
    model = Model()
    fast, counter = compiled(model)
    for _ in range(3):
        assert torch.equal(fast(x), model(x))
    assert counter.frame_count == 1
    assert model.use_context("own") == {"first": None, "list": []}


@pytest.mark.parametrize(
    "build",
    [
        lambda: fl.Chain(fl.Linear(2, 2)),
        lambda: fl.Residual(fl.Linear(2, 2)),
        lambda: fl.Sum(fl.Linear(2, 2), fl.Linear(2, 2)),
        lambda: fl.Sum(fl.Parallel(fl.Linear(2, 2), fl.Linear(2, 2))),
        lambda: fl.Parallel(fl.Linear(2, 2), fl.Identity()),
        lambda: fl.Chain(fl.Parallel(fl.Sin(), fl.Cos()), fl.Distribute(fl.Linear(2, 2), fl.Linear(2, 2))),
        lambda: fl.Concatenate(fl.Linear(2, 2), fl.Lambda(lambda x: None), dim=1),
        lambda: fl.Passthrough(fl.Linear(2, 2)),
        lambda: fl.Matmul(fl.Linear(2, 2), fl.Transpose(0, 1)),
        lambda: fl.Chain(fl.Linear(2, 2), fl.Return(), fl.Sin()),
        lambda: fl.Chain(),
        lambda: fl.Chain(fl.Sin(), fl.Chain(fl.Lambda(lambda x: (x, x)), fl.Return())),
    ],
    ids=[str(i) for i in range(12)],
)
def test_each_kind_of_node_compiles_alone(build: Any) -> None:
    model = build()
    fast, counter = compiled(model)
    found, expected = fast(x), model(x)
    for a, b in zip(*((v if isinstance(v, tuple) else (v,)) for v in (found, expected)), strict=True):
        assert a is b if b is None else torch.equal(a, b)
    assert type(found) is type(expected)
    assert counter.frame_count <= 1


def test_gradients_are_equal() -> None:
    model = Model()
    model(x).sum().backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    compiled(model)[0](x).sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(expected, model.parameters(), strict=True))


def test_a_tree_edited_just_before_compiles() -> None:
    model = Model()
    model.insert(0, fl.Linear(2, 2))
    model.append(fl.Residual(fl.Sin()))
    model.Residual_1.pop(0)
    model.insert(0, fl.Linear(2, 2))
    fast, counter = compiled(model)
    assert torch.equal(fast(x), model(x))
    assert torch.equal(fast(x), model(x))
    assert counter.frame_count == 1


def test_an_edit_after_compiling_is_seen() -> None:
    model = Model()
    fast, _ = compiled(model)
    before = fast(x)
    model.insert(0, fl.Sin())
    assert torch.equal(fast(x), model(x))
    assert not torch.equal(fast(x), before)
    model.pop(0)
    assert torch.equal(fast(x), before)


def test_an_edit_deep_in_the_tree_after_compiling_is_seen() -> None:
    model = Model()
    fast, _ = compiled(model)
    before = fast(x)
    model.Residual.Sum.append(fl.Sin())
    assert torch.equal(fast(x), model(x))
    model.Residual.Sum.pop()
    model.replace(model[0], fl.Sin())
    assert torch.equal(fast(x), model(x))
    assert not torch.equal(fast(x), before)


def test_an_injected_adapter_that_reads_context_compiles() -> None:
    model = Model()
    Reads(model[0]).inject(model)
    fast, counter = compiled(model)
    assert torch.equal(fast(x), model(x))
    assert counter.frame_count == 1


def test_an_adapter_injected_after_compiling_is_seen_and_gone_after_ejection() -> None:
    model = Model()
    fast, _ = compiled(model)
    before = fast(x)
    adapter = Reads(model[0]).inject(model)
    assert torch.equal(fast(x), model(x))
    assert not torch.equal(fast(x), before)
    adapter.eject()
    assert torch.equal(fast(x), before)


def test_an_adapter_injected_and_ejected_again_reuses_the_graphs() -> None:
    model = Model()
    fast, counter = compiled(model)
    adapter = Reads(model[0])
    fast(x)
    for _ in range(5):
        adapter.inject(model)
        fast(x)
        adapter.eject()
        fast(x)
    assert counter.frame_count == 2


def test_other_values_of_a_context_recompile_nothing() -> None:
    model = Model()
    fast, counter = compiled(model)
    for i in range(5):
        model.set_context("outside", {"embedding": torch.full((2,), float(i))})
        assert torch.equal(fast(x), model(x))
    assert counter.frame_count == 1


def test_a_declared_value_set_before_each_call_recompiles_nothing() -> None:
    class Timed(fl.Chain):
        def init_context(self) -> Contexts:
            return {"diffusion": {"timestep": None}}

    model = Timed(fl.Linear(2, 2), fl.Sum(fl.Identity(), fl.UseContext("diffusion", "timestep")))
    fast, counter = compiled(model)
    for i in range(5):
        model.set_context("diffusion", {"timestep": torch.full((2,), float(i))})
        found = fast(x)
        model.set_context("diffusion", {"timestep": torch.full((2,), float(i))})
        assert torch.equal(found, model(x))
    assert counter.frame_count == 1


def test_a_declared_value_is_consumed_by_a_compiled_forward_too() -> None:
    class Timed(fl.Chain):
        def init_context(self) -> Contexts:
            return {"diffusion": {"timestep": None}}

    model = Timed(fl.Sum(fl.Identity(), fl.UseContext("diffusion", "timestep")))
    fast = torch.compile(model, backend="eager")
    model.set_context("diffusion", {"timestep": torch.ones(2)})
    fast(x)
    assert model.use_context("diffusion") == {"timestep": None}


def test_values_of_a_scope_are_seen_by_a_compiled_forward() -> None:
    model = Model()
    fast, counter = compiled(model)
    outside = fast(x)
    for i in range(4):
        with model.context_scope():
            model.set_context("outside", {"embedding": torch.full((2,), float(i))})
            assert torch.equal(fast(x), model(x))
        assert torch.equal(fast(x), outside)
    assert counter.frame_count <= 3


def test_setting_the_scale_of_a_multiply_recompiles_nothing() -> None:
    model = fl.Chain(fl.Linear(2, 2), fl.Multiply(scale=2.0))
    fast, counter = compiled(model)
    for scale in (2.0, 0.5, -1.0, 3.0):
        model.Multiply.scale = scale
        assert torch.equal(fast(x), model(x))
    assert counter.frame_count == 1


def test_loading_other_weights_recompiles_nothing() -> None:
    model = Model()
    fast, counter = compiled(model)
    for _ in range(3):
        model.load_state_dict({name: torch.randn_like(value) for name, value in model.state_dict().items()})
        assert torch.equal(fast(x), model(x))
    assert counter.frame_count == 1


def test_a_structural_copy_compiles_with_its_own_contexts() -> None:
    model = Model()
    copied = model.structural_copy()
    copied.set_context("outside", {"embedding": torch.zeros(2)})
    fast, _ = compiled(copied)
    assert torch.equal(fast(x), copied(x))
    assert not torch.equal(fast(x), model(x))


def test_a_chain_inside_a_plain_module_compiles() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = Model()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) * 2

    plain = Plain()
    fast, counter = compiled(plain)
    assert torch.equal(fast(x), plain(x))
    assert counter.frame_count == 1


def test_compile_in_place_works() -> None:
    model = Model()
    before = model(x)
    model.compile(fullgraph=True, backend="eager")
    assert torch.equal(model(x), before)


def test_a_user_forward_that_asks_for_its_parent_compiles() -> None:
    class Asks(fl.Chain):
        def forward(self, *args: Any) -> Any:
            out = super().forward(*args)
            return out + 1 if self.parent is not None else out

    root = fl.Chain(Asks(fl.Linear(2, 2)))
    fast, _ = compiled(root)
    assert torch.equal(fast(x), root(x))


def test_hooks_fire_in_a_compiled_model() -> None:
    model = Model()
    model.Residual[0].register_forward_hook(lambda module, args, out: out * 2)
    fast, _ = compiled(model)
    assert torch.equal(fast(x), model(x))


def test_an_error_in_a_compiled_model_leaves_it_usable() -> None:
    model = Model()
    before = model(x)
    fast = torch.compile(model, backend="eager")
    with pytest.raises(Exception, match="mat1|size|shape|dim"):
        fast(torch.ones(3, 5))
    assert torch.equal(model(x), before)
    assert torch.equal(fast(x), before)


@torch._dynamo.disable
def fail_once(x: Tensor) -> Tensor:
    if FAILURES and FAILURES.pop():
        raise ValueError("on purpose")
    return x


def break_graph(x: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return x


FAILURES: list[bool] = []


class Listing(fl.Chain):
    """Fills a list that it declares."""

    def init_context(self) -> Contexts:
        return {"own": {"list": []}}


def test_a_graph_that_breaks_keeps_its_contexts() -> None:
    model = Listing(
        fl.Sin(),
        fl.SetContext("own", "list", callback=push),
        fl.Lambda(break_graph),
        fl.Chain(fl.Lambda(break_graph), fl.UseContext("own", "list").compose(lambda values: values[0])),
    )
    fast = torch.compile(model, backend="eager")
    for _ in range(3):
        assert torch.equal(fast(x), model(x))
    assert model.use_context("own") == {"list": []}


def test_a_failure_after_a_graph_break_leaves_the_contexts_clean() -> None:
    model = Listing(
        fl.Sin(),
        fl.SetContext("own", "list", callback=push),
        fl.Lambda(break_graph),
        fl.Lambda(fail_once),
        fl.UseContext("own", "list").compose(len),
    )
    fast = torch.compile(model, backend="eager")
    FAILURES[:] = [True]
    with pytest.raises(Exception, match="on purpose"):
        fast(x)
    assert model.use_context("own") == {"list": []}
    assert model(x) == 1
    assert fast(x) == 1


def test_threads_with_scopes_run_one_compiled_model() -> None:
    model = Model()
    fast, _ = compiled(model)

    def run(number: int) -> bool:
        with model.context_scope():
            model.set_context("outside", {"embedding": torch.full((2,), float(number))})
            return torch.equal(fast(x), model(x))

    assert run(0)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, range(40))) == [True] * 40


def test_scopes_of_asyncio_tasks_are_seen_by_a_compiled_forward() -> None:
    model = Model()
    fast = torch.compile(model, backend="eager")
    fast(x)

    async def run(number: int) -> bool:
        with model.context_scope():
            model.set_context("outside", {"embedding": torch.full((2,), float(number))})
            await asyncio.sleep(0)
            return torch.equal(fast(x), model(x))

    async def main() -> list[bool]:
        return await asyncio.gather(*[run(i) for i in range(8)])

    assert asyncio.run(main()) == [True] * 8


# Inductor needs a C++ compiler; what can be traced and split into forward and backward is seen without.
BACKEND = "aot_eager" if shutil.which("g++") is None else "inductor"


@pytest.mark.filterwarnings("ignore:`torch.jit")  # inductor imports what torch itself deprecates
def test_inductor_compiles_a_model_with_contexts_to_equal_results() -> None:
    model = fl.Chain(fl.Linear(2, 2), fl.Residual(fl.Sum(fl.Sin(), fl.UseContext("outside", "embedding")))).double()
    model.set_context("outside", {"embedding": torch.ones(2, dtype=torch.float64)})
    fast = torch.compile(model, fullgraph=True, backend=BACKEND)
    # In float64 and read as float32: other rounding of the last bits is the compiler's right.
    assert torch.equal(fast(x.double()).float(), model(x.double()).float())


def test_a_structural_copy_of_a_chain_compiled_in_place_is_a_model_of_its_own() -> None:
    chain = fl.Chain(fl.Linear(2, 2), fl.Identity())
    chain.compile(backend="eager")
    x = torch.ones(1, 2)
    before = chain(x)
    clone = chain.structural_copy()
    clone.append(fl.Multiply(2.0))
    assert torch.equal(clone(x), 2 * before)
    assert torch.equal(chain(x), before)
