"""What injected adapters cost: beside the same model without them, beside peft's, and beside their products alone."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, cast

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import refiners.fluxion.layers as fl
from benchmarks.adapter_rows import ADAPTERS, attention_projections, inject_one, inject_several
from benchmarks.conftest import Record, Tell
from benchmarks.engine.contestants import Pair, Work
from benchmarks.engine.figures import exact, measure
from benchmarks.engine.timers import ByClock
from benchmarks.upstream import inject_peft_loras, remove_peft_loras
from benchmarks.workloads import PORTS, Act, case, draw, forward_of, with_adapter
from reference_ports.unet import SD1UNet
from refiners.fluxion.adapters import DeltaSpec, inject_loras

Specs = Mapping[str, DeltaSpec]

# What a forward with adapters may take at most, of the same without. Others are told.
LIMITS: dict[str, float] = {}
STACKS = (1, 2, 4, 8)


@cache
def base(host: str = "unet-sd1") -> Act:
    """A model without adapters."""
    return PORTS[host]().ready()[1]


@cache
def adapted(name: str) -> Act:
    return with_adapter(ADAPTERS[name]).ready()[1]


@cache
def stacked(count: int) -> Act:
    """With some LoRAs on each projection of attention."""
    workload = forward_of("unet-sd1", "unet/sd1")
    model = workload.build()
    inject_several(model, count)
    return torch.no_grad()(workload.port(model))


@cache
def stacked_by_peft(count: int) -> Act:
    """Upstream with some LoRAs of peft on the same projections, all of them active."""
    found = case("unet/sd1")
    model, inputs = inject_peft_loras(found.upstream(), count), draw(found)
    return torch.no_grad()(lambda: found.run_upstream(model, inputs))


@cache
def base_of_upstream() -> Act:
    found = case("unet/sd1")
    model, inputs = found.upstream().eval(), draw(found)
    return torch.no_grad()(lambda: found.run_upstream(model, inputs))


def against(act: Act, other: Act, limit: float | None, **facts: Any) -> Pair:
    return Pair(
        contestant=lambda: act, reference=lambda: other, limit=limit, facts={"threads": 1, "dtype": "float32", **facts}
    )


@pytest.mark.told
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_forward_with_an_adapter_against_without(record: Record, name: str) -> None:
    host = ADAPTERS[name].host
    facts = {"workload": f"{host}+{name}", "against": "base", "adapter": name}
    record(against(adapted(name), base(host), LIMITS.get(name), **facts))


@pytest.mark.told
@pytest.mark.parametrize("count", STACKS)
def test_a_stack_of_loras_against_without(record: Record, count: int) -> None:
    record(against(stacked(count), base(), None, stack=count, who="refiners"))


@pytest.mark.told
@pytest.mark.parametrize("count", STACKS)
def test_a_stack_of_loras_of_peft_against_without(record: Record, count: int) -> None:
    record(against(stacked_by_peft(count), base_of_upstream(), None, stack=count, who="peft"))


@pytest.mark.parametrize("count", [1, 4])
def test_a_stack_of_loras_against_peft(record: Record, count: int) -> None:
    record(against(stacked(count), stacked_by_peft(count), 1.0, against="peft", workload=f"{count} LoRAs"))


@pytest.mark.told
@pytest.mark.parametrize("count", STACKS)
def test_products_of_a_stack_of_loras_against_without(tell: Tell, count: int) -> None:
    """What a stack costs at least: the multiplications that it adds."""
    tell(exact(flops(stacked(count)) / flops(base()), limit=None, unit="×", stack=count, who="the products alone"))


def flops(act: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        act()
    return counter.get_total_flops()


# Injecting into many layers, with tensors


def layers_of_64(container: Any) -> nn.Module:
    return container(*[nn.Linear(64, 64) for _ in range(743)])


@pytest.mark.told
def test_loras_on_743_layers_in_and_out_against_peft(tell: Tell) -> None:
    """As a user has it: the garbage collector runs, and searches now and then in a turn of either."""
    model, other, timer = layers_of_64(fl.Chain), layers_of_64(nn.Sequential), ByClock(time.process_time)

    def ours() -> None:
        inject_loras(model, name="style", rank=16).eject()

    def theirs() -> None:
        peft_model: Any = get_peft_model(cast(Any, other), LoraConfig(r=16, target_modules="all-linear"))
        peft_model.unload()

    def ratio() -> float:
        turns = [(timer(ours, 1), timer(theirs, 1)) for _ in range(3)]
        return sum(ours for ours, _ in turns) / sum(theirs for _, theirs in turns)

    ratio()
    figure = measure(ratio, limit=0.1, precision=0.05, fewest=8, clock=time.process_time)
    tell(replace(figure, facts={"who": "refiners", "against": "peft", "rank": 16}))


# Injecting into the published size, on `meta`


@cache
def full_size() -> SD1UNet:
    return SD1UNet(device="meta")


class Injecting:
    """Builds what is timed: the model without, or with, what was injected last."""

    def __init__(self) -> None:
        self.ejects: list[Callable[[], None]] = []

    def without(self, _: int) -> nn.Module:
        while self.ejects:
            self.ejects.pop()()
        return full_size()

    def inject(self, model: nn.Module) -> None:
        self.ejects.append(inject_one(model))

    def with_them(self, _: int) -> Callable[[], None]:
        self.inject(self.without(0))
        return self.ejects.pop()


@pytest.mark.told
def test_seconds_of_injecting_128_loras(record: Record) -> None:
    injecting = Injecting()
    record(Work(build=injecting.without, act=injecting.inject, n=128, limit=None, facts={"who": "refiners"}))
    injecting.without(0)


@pytest.mark.told
def test_seconds_of_ejecting_128_loras(record: Record) -> None:
    injecting = Injecting()
    record(Work(build=injecting.with_them, act=lambda eject: eject(), n=128, limit=None, facts={"who": "refiners"}))


def weights_of_rank_16(model: nn.Module) -> Specs:
    """LoRAs in memory for each projection of attention, as a file gives them."""
    loras = inject_loras(attention_projections(model), name="drawn", rank=16, alpha=8, device="cpu")
    specs = {
        path: replace(spec, tensors={role: torch.randn(tensor.shape) for role, tensor in spec.tensors.items()})
        for path, spec in loras.specs().items()
    }
    loras.eject()
    return specs


@pytest.mark.told
def test_seconds_of_injecting_128_loras_that_are_in_memory(record: Record) -> None:
    specs, injecting = weights_of_rank_16(full_size()), Injecting()

    def inject(model: nn.Module) -> None:
        injecting.ejects.append(inject_loras(model, specs, name="style", device="cpu").eject)

    record(Work(build=injecting.without, act=inject, n=128, limit=None, facts={"who": "refiners", "rank": 16}))
    injecting.without(0)


@pytest.mark.told
def test_seconds_of_swapping_128_loras(record: Record) -> None:
    """Other weights of rank 16 in place: checked, written, and the old ones kept until all are."""
    model = full_size()
    given = [weights_of_rank_16(model) for _ in range(2)]
    loras = inject_loras(model, given[0], name="style", device="cpu")
    assert len(loras) == 128

    def other(_: int) -> Specs:
        given.reverse()
        return given[0]

    record(Work(build=other, act=loras.swap, n=128, limit=None, facts={"who": "refiners", "rank": 16}))
    loras.eject()


@pytest.mark.told
def test_seconds_of_injecting_128_loras_of_peft(record: Record) -> None:
    with torch.device("meta"):
        model = UNet2DConditionModel(cross_attention_dim=768, sample_size=64)

        def without(_: int) -> nn.Module:
            remove_peft_loras(model)
            return model

        record(Work(build=without, act=inject_peft_loras, n=128, limit=None, facts={"who": "peft"}))
