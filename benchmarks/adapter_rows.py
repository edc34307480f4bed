"""The adapters that are measured: one row each. A new one joins the budgets, the memory and the timings by its row."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

import refiners.fluxion.layers as fl
from reference_ports import unet
from reference_ports.blocks import attention
from refiners.fluxion.adapters import (
    assign_samples,
    inject_bias_tuning,
    inject_ia3,
    inject_loras,
    inject_norm_tuning,
)
from refiners.fluxion.selectors import select

Eject = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class AdapterRow:
    """An adapter, or a set of them, and the model that it is measured on."""

    name: str
    what: str
    inject: Callable[[Any], Eject]
    """Injects into any of the models, and gives what ejects again."""
    host: str = "clip-text"
    """The workload whose model is adapted."""
    stack: int = 1
    """How many adapters stand on each layer."""
    around: Callable[[Any], AbstractContextManager[Any]] = lambda model: nullcontext()
    """What is open during a forward."""
    is_compiled: bool = False
    """Whether its budget holds what torch.compile makes of it, which takes seconds."""
    adds_weights_only: bool = True
    """Whether its memory has to be that of its weights."""


def attention_projections(model: nn.Module) -> Any:
    """Queries, keys, values and outputs of every attention: what LoRAs usually go to."""
    return select(model).of(fl.Linear).inside(unet.SelfAttention, unet.CrossAttention, attention.SelfAttention)


def inject_one(model: nn.Module, name: str = "style", **settings: Any) -> Eject:
    return inject_loras(attention_projections(model), name=name, rank=4, **settings).eject


def inject_several(model: nn.Module, count: int, **settings: Any) -> Eject:
    ejects = [inject_one(model, f"style {i}", **settings) for i in range(count)]

    def eject() -> None:
        for eject in ejects:
            eject()

    return eject


def inject_merged(model: nn.Module) -> Eject:
    loras = inject_loras(attention_projections(model), name="style", rank=4)
    loras.merge()

    def eject() -> None:
        loras.unmerge()
        loras.eject()

    return eject


ROWS = (
    AdapterRow(
        name="lora",
        what="one LoRA on every projection of attention",
        inject=inject_one,
        host="unet-sd1",
        is_compiled=True,
    ),
    AdapterRow(
        name="lora-4",
        what="four LoRAs on every projection of attention",
        inject=partial(inject_several, count=4),
        host="unet-sd1",
        stack=4,
    ),
    AdapterRow(
        name="lora-4-fused",
        what="four LoRAs on every projection, in one pair of products",
        inject=partial(inject_several, count=4, fused=True),
        host="unet-sd1",
        stack=4,
        is_compiled=True,
    ),
    AdapterRow(
        name="lora-merged", what="one LoRA, merged into the weights", inject=inject_merged, adds_weights_only=False
    ),
    AdapterRow(
        name="lora-samples",
        what="one LoRA, for the first item of the batch only",
        inject=inject_one,
        around=lambda model: assign_samples(model, ["style", None]),
    ),
    AdapterRow(name="dora", what="one DoRA", inject=partial(inject_one, method="dora")),
    AdapterRow(name="loha", what="one LoHa", inject=partial(inject_one, method="loha")),
    AdapterRow(name="lokr", what="one LoKr", inject=partial(inject_one, method="lokr")),
    AdapterRow(name="ia3", what="IA3", inject=lambda model: inject_ia3(attention_projections(model)).eject),
    AdapterRow(name="norm-tuning", what="norms of their own", inject=lambda model: inject_norm_tuning(model).eject),
    AdapterRow(name="bias-tuning", what="biases of their own", inject=lambda model: inject_bias_tuning(model).eject),
)
ADAPTERS: dict[str, AdapterRow] = {row.name: row for row in ROWS}
