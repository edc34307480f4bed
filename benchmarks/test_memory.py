"""What an adapter takes, to the byte: its own weights while it is in, and nothing once it is out."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.adapter_rows import ADAPTERS, AdapterRow, Eject
from benchmarks.conftest import Tell
from benchmarks.engine.figures import exact
from benchmarks.engine.memory import Memorised, OnCpu, memorise, over_budget
from benchmarks.engine.watch import Watch, no_garbage_collection, watch
from benchmarks.workloads import PORTS
from reference_ports.unet import SD1UNet

CYCLES = 100
# Beside its weights, a LoRA holds two numbers of 8 bytes, so that another scale needs no new compilation.
NUMBERS = 2 * 8 * 128
LEAK: list[Tensor] = []


def host() -> tuple[nn.Module, Callable[[], Tensor]]:
    """A model, and a forward that ends in one number."""
    workload = PORTS["clip-text"]()
    model = workload.build()
    act = workload.port(model)
    return model, lambda: act()["last_hidden_state"].sum()


def drop_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def memory_of(inject: Callable[[Any], Eject]) -> Memorised:
    model, forward = host()
    forward().backward()
    drop_gradients(model)
    with no_garbage_collection(), Watch() as seen:
        return memorise(OnCpu(seen), lambda: inject(model), forward, lambda: drop_gradients(model))


def added_at_full_size(inject: Callable[[Any], Eject]) -> tuple[int, int]:
    """The bytes that an injection into the published UNet adds, and those of the parameters among them.

    On `meta`, where storages have a size and no memory.
    """
    model = SD1UNet(device="meta")
    before = {id(parameter) for parameter in model.parameters()}
    with no_garbage_collection(), Watch() as seen, torch.device("meta"):
        eject = inject(model)
        added = seen.current
        own = sum(parameter.nbytes for parameter in model.parameters() if id(parameter) not in before)
        eject()
    return added, own


@pytest.mark.parametrize("name", [name for name, row in ADAPTERS.items() if row.adds_weights_only])
def test_memory_added_for_each_byte_of_an_adapter(tell: Tell, name: str) -> None:
    added, own = added_at_full_size(ADAPTERS[name].inject)
    tell(
        exact(
            added / own,
            limit=1 + NUMBERS * ADAPTERS[name].stack / own,
            unit="×",
            theoretical=own,
            measured=added,
            adapter=name,
        )
    )


@pytest.mark.parametrize("name", ADAPTERS)
def test_bytes_that_stay_after_an_ejection(tell: Tell, name: str) -> None:
    tell(exact(memory_of(ADAPTERS[name].inject).ejected, limit=0, unit="bytes"))


@pytest.mark.parametrize("name", ADAPTERS)
def test_bytes_that_stay_after_100_cycles(tell: Tell, name: str) -> None:
    tell(exact(left_by_cycles(ADAPTERS[name]), limit=0, unit="bytes"))


def left_by_cycles(row: AdapterRow) -> int:
    """What injecting and ejecting many times leaves, without the garbage collector."""
    model, _ = host()

    def cycle() -> None:
        for _ in range(CYCLES // row.stack):
            row.inject(model)()

    return sum(moment.bytes for moment in watch(cycle).left)


@pytest.mark.parametrize("name", ADAPTERS)
def test_modules_that_stay_after_an_ejection(tell: Tell, name: str) -> None:
    tell(exact(new_modules(ADAPTERS[name]), limit=0, unit="modules"))


def new_modules(row: AdapterRow) -> int:
    """How many modules are alive after some cycles that were not before; none waits for the garbage collector."""
    model, _ = host()

    def alive() -> int:
        return sum(issubclass(type(thing), nn.Module) for thing in gc.get_objects())

    row.inject(model)()
    with no_garbage_collection():
        before = alive()
        for _ in range(5):
            row.inject(model)()
        return alive() - before


# Planted


def leaking(model: Any) -> Eject:
    """Keeps one tensor of each injection."""
    eject = ADAPTERS["lora"].inject(model)
    LEAK.append(torch.zeros(3))
    return eject


def in_a_circle(model: Any) -> Eject:
    """An adapter that refers to itself, so that only the garbage collector frees it."""
    eject = ADAPTERS["lora"].inject(model)
    weight: list[Any] = [torch.zeros(3)]
    weight.append(weight)
    return eject


def generous(model: Any) -> Eject:
    """Takes the bytes of its weights twice."""
    before = {id(parameter) for parameter in model.parameters()}
    ejects = [ADAPTERS["lora"].inject(model)]
    copies = [parameter.detach().clone() for parameter in model.parameters() if id(parameter) not in before]

    def eject() -> None:
        copies.clear()
        ejects.pop()()

    return eject


@pytest.mark.parametrize("leak", [leaking, in_a_circle], ids=["kept", "in a circle"])
def test_a_leak_of_one_tensor_is_counted(leak: Callable[[Any], Eject]) -> None:
    try:
        assert left_by_cycles(AdapterRow(name="leaking", what="", inject=leak)) == CYCLES * 12
        assert memory_of(leak).ejected == 12
    finally:
        LEAK.clear()


def test_a_copy_of_the_weights_is_counted() -> None:
    added, own = added_at_full_size(generous)
    assert added / own > 2


def test_a_forward_leaves_what_its_graph_holds_and_a_backward_frees_it() -> None:
    found = memory_of(ADAPTERS["lora"].inject)
    assert found.forward > found.injected
    assert found.forward_peak >= found.forward
    assert found.backward_peak > found.backward
    assert found.ejected == 0


class Greedy(nn.Linear):
    """Keeps a copy of its output."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.kept = y.clone()
        return y


def test_the_trace_names_the_leaf_of_each_byte_over_budget() -> None:
    model, x = nn.Sequential(nn.ReLU(), nn.Linear(4, 4)), torch.zeros(2, 4)
    with torch.no_grad():
        budget = {f"{moment.path}: {moment.operation}": moment.bytes for moment in watch(lambda: model(x), model).held}
        model[1].__class__ = Greedy
        seen = watch(lambda: model(x), model)
    assert over_budget(seen.held, budget) == {"1: aten.clone.default": 32}
