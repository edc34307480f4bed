"""Memory that is read though nobody wrote to it: `torch.empty` where zeros belong, or a part that is never filled.

While a model is watched, such memory holds NaN (see `refiners.parity.written`). Otherwise it holds what lies there by
chance, often zeros: so what the port computes differs from run to run, and no hypothesis that is run can be believed.
"""

import math
from typing import Any

import torch
from torch import Tensor

from refiners.parity.operations import Operation, tensors_in
from refiners.parity.reasons.localise import Finding
from refiners.parity.reasons.replay import Edit, Program, as_it_is, is_close, scalars


def reads_unwritten(finding: Finding) -> bool:
    """Whether memory that nobody has written to yet is on the way of the port."""
    return any(_is_blank(operation) for operation in finding.port_region)


def unwritten(port: Program, upstream: Program) -> str:
    """What is read as it lies in memory; "" if all of it is written first."""
    for operation in port.operations:
        if not _is_blank(operation) or not port.values[port.root].isnan().any():
            continue
        filled = port.run(Edit(changes={operation.index: _zeros}))[port.root]
        if is_close(filled, upstream.values[upstream.root]):
            return f"when `torch.empty` at {operation.source} is `torch.zeros`: what nobody wrote is read"
        if not filled.isnan().any():
            return f"once all that `torch.empty` returns at {operation.source} is written to: a part is read as it lies"
    return ""


def _is_blank(operation: Operation) -> bool:
    is_full = operation.name.removeprefix("aten.") in ("full", "full_like", "new_full")
    return is_full and any(isinstance(value, float) and math.isnan(value) for _, value in scalars(operation.template))


def _zeros(operation: Operation, given: list[Tensor]) -> Any:
    return [torch.zeros_like(tensor) for tensor in tensors_in(as_it_is(operation, given))]
