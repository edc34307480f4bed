"""Faults planted into injected LoRAs: the cases of `cases.lora` find them."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from parity_tests.cases.lora import CASES
from parity_tests.peft_models import as_chain
from refiners.fluxion.adapters import LoraAdapter
from refiners.parity import Case, CaseRunner, Lane, Verdict


def lose_alpha(model: fl.Chain) -> None:
    for multiply in model.layers(fl.Multiply):
        multiply.scale = 1.0


def swap_the_order(model: fl.Chain) -> None:
    for adapter in list(model.layers(LoraAdapter)):
        first = next(adapter.lora_layers)
        adapter.remove(first)
        adapter.append(first)


@pytest.mark.parametrize("fault", [lose_alpha, swap_the_order])
@pytest.mark.parametrize("case", [case for case in CASES if case.id.endswith("stacked")], ids=lambda case: case.id)
def test_a_planted_fault_is_found(case: Case, fault: Callable[[fl.Chain], None]) -> None:
    def run_faulty(model: nn.Module, inputs: Mapping[str, Any]) -> Mapping[str, Tensor]:
        fault(as_chain(model))
        return case.run_port(model, inputs)

    faulty = replace(case, run_port=run_faulty)
    assert CaseRunner(faulty).run(Lane("float32")).verdict is not Verdict.BITWISE
