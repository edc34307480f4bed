"""What a tree costs beside plain PyTorch, and how its costs grow with its size. The limits are those of the issue."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import nn

import refiners.fluxion.layers as fl
from benchmarks import subjects
from benchmarks.conftest import Record, Tell
from benchmarks.engine.contestants import Growth, Pair, Work
from benchmarks.engine.counts import operations, python_calls
from benchmarks.engine.figures import exact

# Doubling n doubles linear work; the rest is the cost of larger trees in the processor's caches.
LINEAR = 2.3
# Counts have no such excuse; what is done once, whatever n, makes them grow by less.
EXACTLY = 2.02

with_and_without_gradients = pytest.mark.parametrize("gradients", [False, True], ids=["no_grad", "grad"])


def forward(tree: nn.Module) -> Callable[[], Any]:
    x = subjects.example()
    return lambda: tree(x)


def against_sequential(build: Callable[..., Any], limit: float, container: Any = fl.Chain) -> Pair:
    """The forward of a tree of Chains divided by that of the same tree of `nn.Sequential`."""
    return Pair(
        contestant=lambda: forward(build(container, fl.Linear)),
        reference=lambda: forward(build(nn.Sequential, nn.Linear)),
        limit=limit,
    )


# --- forward -----------------------------------------------------------------------------------------------------


@with_and_without_gradients
def test_flat_chain_of_200_against_sequential(record: Record, gradients: bool) -> None:
    with torch.set_grad_enabled(gradients):
        record(against_sequential(subjects.flat, limit=1.00 if gradients else 0.85))


@with_and_without_gradients
def test_63_chains_in_a_binary_tree_against_sequential(record: Record, gradients: bool) -> None:
    with torch.set_grad_enabled(gradients):
        record(against_sequential(subjects.binary, limit=1.05))


@with_and_without_gradients
def test_63_chains_in_a_spine_against_sequential(record: Record, gradients: bool) -> None:
    with torch.set_grad_enabled(gradients):
        record(against_sequential(subjects.spine, limit=1.05))


@torch.no_grad()
def test_forward_is_linear_in_depth(record: Record) -> None:
    record(forward_by_depth())


def forward_by_depth(container: Any = fl.Chain) -> Growth[Any]:
    def act(tree: Any) -> None:
        for _ in range(5):
            tree(x)

    x = subjects.example()
    build = cache(lambda depth: subjects.spine(container, fl.Linear, depth))
    return Growth(build=build, act=act, n=120, limit=LINEAR)


@torch.no_grad()
def test_depth_500_runs() -> None:
    tree = subjects.spine(fl.Chain, fl.Linear, depth=500)
    assert tree(subjects.example()).shape == (1, subjects.WIDTH)


@torch.no_grad()
def test_contexts_beside_the_same_chain_without(record: Record) -> None:
    def build(container: Any) -> Callable[[], Any]:
        return forward(subjects.flat(container, fl.Linear, 64))

    record(
        Pair(
            contestant=lambda: build(subjects.WithContext),
            reference=lambda: build(subjects.WithoutContext),
            limit=None,
        )
    )


# --- exact counts ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_python_calls_of_a_chain_per_layer_beyond_its_own(tell: Tell) -> None:
    tell(exact(extra_calls_per_layer(fl.Chain), limit=0, unit="calls"))


def extra_calls_per_layer(container: Any) -> float:
    """Python calls that one more layer adds to a forward, beyond those of its own `forward`."""
    few, many = (python_calls(forward(subjects.flat(container, fl.Linear, n))).total() for n in (100, 200))
    layer, x = fl.Linear(subjects.WIDTH, subjects.WIDTH), subjects.example()
    return (many - few) / 100 - python_calls(lambda: layer.forward(x)).total()


@torch.no_grad()
def test_python_calls_of_nested_chains_against_sequential(tell: Tell) -> None:
    tell(exact(nested_calls(fl.Chain) / nested_calls(nn.Sequential), limit=1, unit="×"))


def nested_calls(container: Any) -> int:
    linear = nn.Linear if container is nn.Sequential else fl.Linear
    return python_calls(forward(subjects.binary(container, linear))).total()


@torch.no_grad()
def test_python_calls_of_each_deeper_level_are_as_many(tell: Tell) -> None:
    tell(exact(extra_calls_of_depth(fl.Chain), limit=0, unit="calls"))


def extra_calls_of_depth(container: Any) -> int:
    """How many more calls 50 levels add below 100 levels than below 50: none, where depth costs linearly."""
    x, y, z = (python_calls(forward(subjects.spine(container, fl.Linear, depth))).total() for depth in (50, 100, 150))
    return (z - y) - (y - x)


@pytest.mark.parametrize("work", ["append", "inject_and_eject", "attach", "build_chains", "copy", "walk"])
def test_python_calls_are_linear(tell: Tell, work: str) -> None:
    growths: dict[str, Callable[[], Growth[Any]]] = {
        "append": append,
        "inject_and_eject": inject_and_eject,
        "attach": attach,
        "build_chains": build_chains,
        "copy": lambda: reading(copy_structure),
        "walk": lambda: reading(walk_everything),
    }
    tell(exact(growth_of_calls(growths[work]()), limit=EXACTLY, unit="×"))


def growth_of_calls(growth: Growth[Any]) -> float:
    """By how much the number of Python calls grows from n to 2n. What runs inside of one call of C is not seen."""
    few, many = (python_calls(partial(growth.act, growth.build(n))).total() for n in (growth.n, 2 * growth.n))
    return many / few


@torch.no_grad()
def test_operations_of_a_chain_beyond_those_of_sequential(tell: Tell) -> None:
    tell(exact(extra_operations(fl.Chain), limit=0, unit="operations"))


def extra_operations(container: Any) -> int:
    ours = operations(forward(subjects.binary(container, fl.Linear)))
    theirs = operations(forward(subjects.binary(nn.Sequential, nn.Linear)))
    return ((ours - theirs) + (theirs - ours)).total()


@torch.no_grad()
def test_one_provider_is_entered_where_one_chain_declares_a_context(tell: Tell) -> None:
    tell(exact(entered_providers(fl.Chain), limit=1, unit="calls"))


def entered_providers(container: Any) -> int:
    """How many Chains of a tree of 64 open a frame of values, where only the root declares a context."""
    model = subjects.WithContext(subjects.binary(container, fl.Linear))
    return python_calls(forward(model))["ContextProvider.enter"]


# --- edits and reading, in n ---------------------------------------------------------------------------------------


def test_append_of_2000_is_linear(record: Record) -> None:
    record(append())


def append(container: Any = fl.Chain, n: int = 1000) -> Growth[Any]:
    return Growth(build=lambda n: subjects.empty_and_layers(n, container), act=subjects.append_all, n=n, limit=LINEAR)


def test_inject_and_eject_of_800_adapters_is_linear(record: Record) -> None:
    record(inject_and_eject())


def inject_and_eject(adapter: Any = subjects.Beside, n: int = 400) -> Growth[Any]:
    return Growth(
        build=lambda n: subjects.chain_and_adapters(n, adapter),
        act=subjects.inject_and_eject_all,
        n=n,
        limit=LINEAR,
    )


def test_loras_on_743_layers_are_linear(record: Record) -> None:
    record(attach())


def attach(act: Callable[[Any], None] = subjects.attach_loras, n: int = 372) -> Growth[Any]:
    return Growth(build=subjects.blocks_and_loras, act=act, n=n, limit=LINEAR)


def test_seconds_of_loras_on_743_layers_without_building_them(record: Record) -> None:
    record(seconds_of_attaching())


def seconds_of_attaching(act: Callable[[Any], None] = subjects.attach_loras) -> Work[Any]:
    return Work(build=subjects.blocks_and_loras, act=act, n=743, limit=0.05)


def test_seconds_of_loras_on_743_layers_built_and_injected(record: Record) -> None:
    record(Work(build=subjects.blocks, act=subjects.inject_new_loras, n=743, limit=None))


def test_structural_copy_is_linear(record: Record) -> None:
    record(reading(copy_structure))


def test_walk_is_linear(record: Record) -> None:
    record(reading(walk_everything))


def test_repr_is_linear(record: Record) -> None:
    record(reading(repr))


def copy_structure(tree: Any) -> None:
    tree.structural_copy()


def walk_everything(tree: Any) -> None:
    for _ in tree.walk(recurse=True):
        pass


def reading(act: Callable[[Any], object], n: int = 372) -> Growth[Any]:
    """What is done to trees without changing them."""
    return Growth(build=cache(subjects.blocks), act=act, n=n, limit=LINEAR)


def test_building_a_tree_is_linear(record: Record) -> None:
    record(build_chains())


def build_chains(container: Any = fl.Chain) -> Growth[Any]:
    """Trees around layers that exist already, small enough for the nearer caches: beyond them 2.0 becomes 2.2."""

    def build(layers: list[Any]) -> None:
        container(*[fl.Chain(layer) for layer in layers])

    return Growth(build=subjects.meta_linears, act=build, n=96, limit=LINEAR)
