"""What the suites measure: trees, adapters, and what is done to them.

Every builder takes the class to build with, so that the same lines build ours, the reference, and the planted faults of
`test_planted_faults.py`.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

import refiners.fluxion.layers as fl
from refiners.fluxion.adapters.lora import LinearLora, Lora, auto_attach_loras, inject_loras

WIDTH = 8
Container = Callable[..., Any]


def flat(container: Container, linear: type[nn.Linear], n: int = 200) -> Any:
    """One container with n layers."""
    return container(*[linear(WIDTH, WIDTH) for _ in range(n)])


def binary(container: Container, linear: type[nn.Linear], leaves: int = 64) -> Any:
    """A binary tree: 63 containers over 64 layers."""
    if leaves == 1:
        return linear(WIDTH, WIDTH)
    return container(binary(container, linear, leaves // 2), binary(container, linear, leaves - leaves // 2))


def spine(container: Container, linear: type[nn.Linear], depth: int = 63) -> Any:
    """Containers inside one another, each with one layer of its own, the innermost with two."""
    tree = container(linear(WIDTH, WIDTH), linear(WIDTH, WIDTH))
    for _ in range(depth - 1):
        tree = container(linear(WIDTH, WIDTH), tree)
    return tree


@cache
def meta_linears(n: int) -> tuple[fl.Linear, ...]:
    """Layers without values, made once: what is measured is the tree around them."""
    return tuple(fl.Linear(WIDTH, WIDTH, device="meta") for _ in range(n))


def blocks(n: int, container: Container = fl.Chain) -> Any:
    """A tree of n layers on `meta`, 12 in a block, about as a transformer has them."""
    linears = meta_linears(n)
    return container(*[container(fl.Residual(*linears[i : i + 12])) for i in range(0, n, 12)])


class Beside(fl.Sum, fl.Adapter[nn.Module]):
    """The smallest adapter: a second layer beside its target."""

    def __init__(self, target: nn.Module) -> None:
        with self.setup_adapter(target):
            super().__init__(target, fl.Identity())


def chain_and_adapters(n: int, adapter: type[Any] = Beside, container: Container = fl.Chain) -> tuple[Any, list[Any]]:
    """One Chain of n layers, and an adapter of each, not injected yet."""
    chain = container(*meta_linears(n))
    return chain, [adapter(layer) for layer in chain]


def inject_all(subject: tuple[Any, list[Any]]) -> None:
    chain, adapters = subject
    for adapter in adapters:
        adapter.inject(chain)


def inject_and_eject_all(subject: tuple[Any, list[Any]]) -> None:
    inject_all(subject)
    for adapter in subject[1]:
        adapter.eject()


@cache
def finished_loras(n: int) -> dict[str, Lora[Any]]:
    """LoRAs with keys that say nothing, made once: each tree that had them is gone when they go into the next."""
    return {f"{i}": LinearLora("style", WIDTH, WIDTH, rank=4, device="meta") for i in range(n)}


def blocks_and_loras(n: int) -> tuple[Any, dict[str, Lora[Any]]]:
    """A tree of n layers, and a LoRA for each of them."""
    return blocks(n), finished_loras(n)


def attach_loras(subject: tuple[Any, dict[str, Lora[Any]]]) -> None:
    tree, loras = subject
    auto_attach_loras(loras, tree)


def inject_new_loras(tree: Any) -> None:
    inject_loras(tree, name="style", rank=4)


def empty_and_layers(n: int, container: Container = fl.Chain) -> tuple[Any, list[nn.Module]]:
    return container(), [fl.Identity() for _ in range(n)]


def append_all(subject: tuple[Any, list[nn.Module]]) -> None:
    chain, layers = subject
    for layer in layers:
        chain.append(layer)


class WithContext(fl.Chain):
    """A Chain that declares a context, and passes every second layer's output on through it."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*[self.pass_on(layer) if i % 2 else layer for i, layer in enumerate(layers)])

    def init_context(self) -> dict[str, dict[str, Any]]:
        return {"memory": {"x": None}}

    def pass_on(self, layer: nn.Module) -> fl.Chain:
        return fl.Chain(layer, fl.SetContext("memory", "x"), fl.UseContext("memory", "x"))


class WithoutContext(WithContext):
    """The same tree, which passes the outputs on from layer to layer."""

    def init_context(self) -> dict[str, dict[str, Any]]:
        return {}

    def pass_on(self, layer: nn.Module) -> fl.Chain:
        return fl.Chain(layer, fl.Identity(), fl.Identity())


def example() -> torch.Tensor:
    return torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(0))
