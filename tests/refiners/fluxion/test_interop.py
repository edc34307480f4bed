"""A Chain is an ordinary nn.Module to the rest of PyTorch, and any nn.Module may be its child: design.md §3."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import refiners.fluxion.layers as fl
from refiners.fluxion.context import Contexts

x = torch.linspace(-1, 1, 6).reshape(3, 2)


def push(values: list[Any], value: Any) -> None:
    values.append(value)


class Scale(nn.Module):
    """A plain module with a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Everything(fl.Chain):
    """Has a node of each kind."""

    def __init__(self) -> None:
        super().__init__(
            fl.Linear(2, 2),
            fl.SetContext("own", "first"),
            fl.Residual(Scale(), fl.Sum(nn.Identity(), fl.UseContext("own", "first"))),
            fl.SetContext("own", "list", callback=push),
            fl.Parallel(nn.Identity(), fl.UseContext("own", "list").compose(lambda values: values[0])),
            fl.Distribute(fl.Lambda(lambda x: x + 1), fl.Linear(2, 2)),
            fl.Concatenate(fl.Lambda(lambda a, b: a), fl.Lambda(lambda a, b: b), dim=-1),
            fl.Chain(fl.Passthrough(nn.Identity())),
            nn.Sequential(nn.Linear(4, 2), fl.Chain(fl.Linear(2, 2))),
            fl.Matmul(nn.Identity(), fl.Chain(fl.Lambda(torch.t))),
        )

    def init_context(self) -> Contexts:
        return {"own": {"first": None, "list": []}}


# --- both ways -----------------------------------------------------------------------------------------------------


def test_a_plain_module_that_holds_chains_is_a_child() -> None:
    inner = fl.Chain(fl.Linear(2, 2), fl.UseContext("a", "b"))
    inner.set_context("a", {"b": torch.ones(1)})
    root = fl.Chain(nn.Sequential(inner, nn.Identity()), fl.Identity())
    assert root(x).item() == 1
    assert list(root.state_dict()) == ["Sequential.0.Linear.weight", "Sequential.0.Linear.bias"]


def test_a_chain_inside_a_plain_module_is_a_child_like_any_other() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = fl.Chain(fl.Linear(2, 2), fl.ReLU())
            self.layers = nn.ModuleList([fl.Chain(fl.Linear(2, 2)) for _ in range(2)])

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(x)
            for layer in self.layers:
                x = layer(x)
            return x

    plain = Plain()
    assert list(plain.state_dict())[::2] == ["body.Linear.weight", "layers.0.Linear.weight", "layers.1.Linear.weight"]
    assert plain(x).shape == (3, 2)
    assert plain.get_submodule("body.Linear") is plain.body[0]
    plain.body.append(fl.Linear(2, 2))
    assert "body.Linear_2.weight" in plain.state_dict()
    assert "body.Linear_1" in dict(plain.named_modules())


def test_weights_trained_in_a_chain_load_into_a_sequential_and_back() -> None:
    chain = fl.Chain(fl.Linear(2, 3), fl.ReLU(), fl.Linear(3, 2))
    optimizer = torch.optim.SGD(chain.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        chain(x).square().sum().backward()
        optimizer.step()
    plain = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    plain.load_state_dict(dict(zip(plain.state_dict(), chain.state_dict().values(), strict=True)))
    assert torch.equal(plain(x), chain(x))
    wrapped = nn.Sequential(chain)
    again = fl.Chain(fl.Linear(2, 3), fl.ReLU(), fl.Linear(3, 2))
    again.load_state_dict({key.removeprefix("0."): value for key, value in wrapped.state_dict().items()})
    assert torch.equal(again(x), plain(x))


def test_a_chain_trains_to_the_same_bits_as_a_sequential() -> None:
    def train(model: nn.Module) -> Tensor:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for _ in range(5):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        return model(x)

    chain = fl.Chain(fl.Linear(2, 3), fl.ReLU(), fl.Linear(3, 2))
    plain = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    plain.load_state_dict(dict(zip(plain.state_dict(), chain.state_dict().values(), strict=True)))
    assert torch.equal(train(chain), train(plain))


def test_load_state_dict_is_strict_about_names_and_shapes() -> None:
    chain = fl.Chain(fl.Linear(2, 2))
    with pytest.raises(RuntimeError, match="Missing key.*Linear.bias"):
        chain.load_state_dict({"Linear.weight": torch.zeros(2, 2)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        chain.load_state_dict({"Linear.weight": torch.zeros(3, 2), "Linear.bias": torch.zeros(2)})


def test_load_state_dict_may_assign() -> None:
    chain = fl.Chain(fl.Linear(2, 2, device="meta"))
    weights = {"Linear.weight": torch.ones(2, 2), "Linear.bias": torch.ones(2)}
    chain.load_state_dict(weights, assign=True)
    assert chain.Linear.weight.data_ptr() == weights["Linear.weight"].data_ptr()


def test_a_state_dict_loaded_after_an_edit_uses_the_new_names() -> None:
    chain = fl.Chain(fl.Linear(2, 2))
    chain.append(fl.Linear(2, 2))
    chain.load_state_dict(
        {f"Linear_{i}.{name}": torch.full(shape, float(i)) for i in (1, 2) for name, shape in WEIGHTS}
    )
    assert chain[1].bias.sum().item() == 4


WEIGHTS = (("weight", (2, 2)), ("bias", (2,)))


# --- hooks -------------------------------------------------------------------------------------------------------


def names(modules: list[nn.Module]) -> list[str]:
    return [type(module).__name__ for module in modules]


def unseen(root: nn.Module, seen: list[nn.Module]) -> list[str]:
    return names([module for module in root.modules() if not any(module is other for other in seen)])


HOOKS: dict[str, Callable[[nn.Module, list[nn.Module]], Any]] = {
    "forward": lambda m, seen: m.register_forward_hook(lambda module, *_: seen.append(module)),
    "forward with kwargs": lambda m, seen: m.register_forward_hook(
        lambda module, *_: seen.append(module), with_kwargs=True
    ),
    "pre": lambda m, seen: m.register_forward_pre_hook(lambda module, *_: seen.append(module)),
    "always": lambda m, seen: m.register_forward_hook(lambda module, *_: seen.append(module), always_call=True),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_forward_hooks_fire_once_on_every_node(kind: str) -> None:
    root, seen = Everything(), []
    before = root(x)
    for module in root.modules():
        HOOKS[kind](module, seen)
    assert torch.equal(root(x), before)
    assert unseen(root, seen) == []
    assert len(seen) == len(list(root.modules()))


@pytest.mark.parametrize("kind", ["full backward", "full backward pre"])
def test_backward_hooks_fire_on_every_node_that_gradients_pass(kind: str) -> None:
    root, seen = Everything(), []
    for module in root.modules():
        if kind == "full backward":
            module.register_full_backward_hook(lambda module, *_: seen.append(module))
        else:
            module.register_full_backward_pre_hook(lambda module, *_: seen.append(module))
    root(x.clone().requires_grad_()).sum().backward()
    # As with any module of torch: no gradient passes a dropped output (in Passthrough) or an input that is not used.
    assert set(unseen(root, seen)) <= {"Identity", "UseContext"}


@pytest.fixture
def global_hooks() -> Iterator[list[Any]]:
    handles: list[Any] = []
    yield handles
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("kind", ["forward", "pre", "always"])
def test_global_hooks_fire_on_every_node(kind: str, global_hooks: list[Any]) -> None:
    root, seen = Everything(), []
    before = root(x)
    if kind == "pre":
        global_hooks.append(torch_module.register_module_forward_pre_hook(lambda module, _: seen.append(module)))
    else:
        global_hooks.append(
            torch_module.register_module_forward_hook(
                lambda module, *_: seen.append(module), always_call=kind == "always"
            )
        )
    assert torch.equal(root(x), before)
    assert unseen(root, seen) == []


def test_global_backward_hooks_fire(global_hooks: list[Any]) -> None:
    root, seen = fl.Chain(fl.Linear(2, 2), fl.Sum(fl.Linear(2, 2))), []
    global_hooks.append(torch_module.register_module_full_backward_hook(lambda module, *_: seen.append(module)))
    root(x.clone().requires_grad_()).sum().backward()
    assert unseen(root, seen) == []


def test_hooks_may_change_inputs_and_outputs() -> None:
    root = fl.Chain(fl.Chain(fl.Identity(), fl.Identity()))
    root[0][0].register_forward_hook(lambda module, args, out: out + 1)
    root[0][1].register_forward_pre_hook(lambda module, args: (args[0] * 10,))
    root[0].register_forward_hook(lambda module, args, out: out + 0.5)
    assert root(torch.ones(1)).item() == 20.5


def test_a_removed_hook_fires_no_more() -> None:
    root, seen = fl.Chain(fl.Identity()), []
    handle = root[0].register_forward_hook(lambda module, *_: seen.append(module))
    root(x)
    handle.remove()
    root(x)
    assert len(seen) == 1


@pytest.mark.parametrize("leaf", [True, False])
def test_always_called_hooks_fire_when_a_forward_fails(leaf: bool) -> None:
    seen: list[Any] = []
    root = fl.Chain(fl.Chain(fl.Lambda(lambda x: 1 / 0)))
    (root[0][0] if leaf else root[0]).register_forward_hook(lambda *_: seen.append(1), always_call=True)
    with pytest.raises(fl.ChainError, match="ZeroDivisionError"):
        root(1)
    assert seen == [1]


def test_a_hook_that_raises_is_an_error_of_its_module() -> None:
    def broken(*_: Any) -> None:
        raise ValueError("in the hook")

    root = fl.Chain(fl.Chain(fl.Identity()))
    root[0][0].register_forward_hook(broken)
    with pytest.raises(fl.ChainError, match=r"in the hook[\s\S]*Chain\.Chain\.Identity"):
        root(x)


def test_hooks_see_the_spread_arguments() -> None:
    seen: list[Any] = []
    root = fl.Chain(fl.Lambda(lambda x: (x, 2)), fl.Lambda(lambda a, b: a * b))
    root[1].register_forward_pre_hook(lambda module, args: seen.append(args))
    root(3)
    assert seen == [(3, 2)]


@pytest.mark.filterwarnings("ignore:For backward hooks to be called")
def test_return_ends_its_chain_also_when_it_has_hooks() -> None:
    root = fl.Chain(fl.Return(), fl.Lambda(lambda x: x * 100))
    root[0].register_forward_hook(lambda *_: None)
    root[0].register_full_backward_hook(lambda *_: None)
    one = torch.ones(2, requires_grad=True)
    assert torch.equal(root(one), one)


def test_gradient_hooks_of_parameters_fire() -> None:
    root, seen = fl.Chain(fl.Residual(fl.Linear(2, 2))), []
    root[0][0].weight.register_hook(lambda grad: seen.append(grad.shape))
    root(x).sum().backward()
    assert seen == [(2, 2)]


def test_the_profiler_sees_every_module() -> None:
    root = Everything()
    with torch.profiler.profile(with_modules=True) as profile:
        root(x)
    assert len(profile.key_averages()) > 0


# --- the rest of nn.Module -------------------------------------------------------------------------------------------


def test_the_usual_methods_reach_every_layer() -> None:
    root = Everything()
    assert root.double() is root
    assert {p.dtype for p in root.parameters()} == {torch.float64}
    root.float().eval()
    assert not any(module.training for module in root.modules())
    root.requires_grad_(False)
    assert not any(p.requires_grad for p in root.parameters())
    visited: list[nn.Module] = []
    root.apply(visited.append)
    assert unseen(root, visited) == []
    assert root.get_submodule("Residual.Scale") is root.Residual.Scale
    assert root.get_parameter("Residual.Scale.weight") is root.Residual.Scale.weight
    assert root.to_empty(device="meta").device == torch.device("meta")


def test_children_and_named_modules_are_those_of_torch() -> None:
    chain = fl.Chain(fl.Linear(2, 2), fl.Chain(fl.ReLU()))
    assert [name for name, _ in chain.named_children()] == ["Linear", "Chain"]
    assert [name for name, _ in chain.named_modules()] == ["", "Linear", "Chain", "Chain.ReLU"]
    assert list(chain.children()) == list(chain)


class Symmetric(nn.Module):
    """Makes a square weight symmetric."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).T


def test_a_leaf_can_be_parametrized_and_back() -> None:
    chain = fl.Chain(fl.Linear(2, 2), fl.Residual(fl.Linear(2, 2)))
    keys = list(chain.state_dict())
    parametrize.register_parametrization(chain[0], "weight", Symmetric())
    assert torch.equal(chain[0].weight, chain[0].weight.T)
    assert torch.equal(chain(x), chain[1](nn.functional.linear(x, chain[0].weight, chain[0].bias)))
    assert chain.device == torch.device("cpu")
    assert isinstance(chain[0], fl.Linear)
    assert chain.find_parent(chain[0]) is chain
    parametrize.remove_parametrizations(chain[0], "weight")
    assert sorted(chain.state_dict()) == sorted(keys)


class Wrap(fl.Chain, fl.Adapter[nn.Module]):
    """Changes nothing."""

    def __init__(self, target: nn.Module) -> None:
        with self.setup_adapter(target):
            super().__init__(target)


def test_an_adapter_of_a_parametrized_leaf_is_an_exact_inverse() -> None:
    chain = fl.Chain(fl.Linear(2, 2), fl.ReLU())
    parametrize.register_parametrization(chain[0], "weight", Symmetric())
    keys, before = list(chain.state_dict()), chain(x)
    Wrap(chain[0]).inject(chain).eject()
    assert list(chain.state_dict()) == keys
    assert torch.equal(chain(x), before)


def test_functional_call_replaces_the_weights() -> None:
    root = Everything()
    zeros = {name: torch.zeros_like(p) for name, p in root.named_parameters()}
    out = torch.func.functional_call(root, zeros, (x,))
    assert torch.count_nonzero(out) == 0
    assert torch.count_nonzero(root(x)) > 0


def test_functional_gradients_and_vmap_pass_through_a_chain() -> None:
    chain = fl.Chain(fl.Linear(2, 2), fl.Residual(fl.Linear(2, 2)))
    weights = dict(chain.named_parameters())
    gradients = torch.func.grad(lambda w: torch.func.functional_call(chain, w, (x,)).sum())(weights)
    chain(x).sum().backward()
    assert all(torch.equal(gradients[name], p.grad) for name, p in weights.items() if p.grad is not None)

    def scaled(scale: Tensor) -> Tensor:
        return torch.func.functional_call(chain, {name: p * scale for name, p in weights.items()}, (x,))

    assert torch.func.vmap(scaled)(torch.tensor([0.0, 1.0])).shape == (2, 3, 2)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("early_stop", [True, False])
def test_checkpointing_gives_the_same_gradients(use_reentrant: bool, early_stop: bool) -> None:
    chain = fl.Chain(
        fl.Linear(2, 2),
        fl.Chain(fl.Sigmoid(), fl.Linear(2, 2), fl.Sum(fl.Sigmoid(), fl.Sin())),
        fl.Residual(fl.Linear(2, 2)),
    )
    chain(x).sum().backward()
    expected = [p.grad for p in chain.parameters()]
    chain.zero_grad()
    with torch.utils.checkpoint.set_checkpoint_early_stop(early_stop):
        checkpoint(chain, x.clone().requires_grad_(), use_reentrant=use_reentrant).sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(expected, chain.parameters(), strict=True))


def test_a_checkpointed_part_of_a_chain_passes_the_early_stop_through() -> None:
    class Checkpointed(fl.Chain):
        def forward(self, *args: Any) -> Any:
            return checkpoint(super().forward, *args, use_reentrant=False)

    plain = fl.Chain(fl.Linear(2, 2), fl.Sigmoid(), fl.Residual(fl.Linear(2, 2)), fl.Sigmoid())
    chain = fl.Chain(
        Checkpointed(*list(plain.structural_copy()[:2])), Checkpointed(fl.Residual(plain[2][0]), fl.Sigmoid())
    )
    plain(x).sum().backward()
    expected = [p.grad for p in plain.parameters()]
    plain.zero_grad()
    chain(x).sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(expected, plain.parameters(), strict=True))


def test_symbolic_tracing_follows_a_chain_whose_inputs_are_named() -> None:
    class Wrapper(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body = body

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    root = Everything()
    graph = torch.fx.symbolic_trace(Wrapper(root))
    assert torch.equal(graph(x), root(x))


def test_an_averaged_model_averages_a_chain() -> None:
    chain = fl.Chain(fl.Linear(2, 2))
    average = torch.optim.swa_utils.AveragedModel(chain)
    average.update_parameters(chain)
    assert torch.equal(average(x), chain(x))


def test_autocast_reaches_the_layers() -> None:
    chain = fl.Chain(fl.Linear(2, 2))
    with torch.autocast("cpu", torch.bfloat16):
        assert chain(x).dtype == torch.bfloat16


def test_inference_mode_and_no_grad_hold_inside() -> None:
    with torch.inference_mode():
        assert Everything()(x).is_inference()
    with torch.no_grad():
        assert not Everything()(x).requires_grad


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_compiled_leaf_runs_inside_a_chain() -> None:
    torch.compiler.reset()
    chain = fl.Chain(fl.Linear(2, 2), fl.Linear(2, 2))
    before = chain(x)
    chain[0].compile(backend="eager")
    assert torch.equal(chain(x), before)
    chain.replace(chain[1], torch.compile(chain[1], backend="eager"))
    assert torch.equal(chain(x), before)
