"""What upstream's leaves received and returned, as long as it is needed: in memory, and beyond that in files."""

import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from refiners.parity.operations import tensors_in

IN_MEMORY = 1 << 30
"""Bytes of upstream's values that are kept in memory; what is more lies in temporary files."""


@dataclass
class Shelf:
    """Copies of tensors: the first in memory, the others in files that are gone when nobody holds them.

    Receives:
        limit: bytes that are kept in memory.
    """

    limit: int = IN_MEMORY
    _held: int = 0

    def keep(self, value: Any) -> list[Tensor]:
        """Copies of all tensors of a nesting."""
        return [self._copy(tensor.detach()) for tensor in tensors_in(value)]

    def _copy(self, tensor: Tensor) -> Tensor:
        self._held += tensor.nbytes
        if self._held <= self.limit or tensor.device.type != "cpu" or not tensor.numel():
            return tensor.clone()
        with tempfile.NamedTemporaryFile(prefix="refiners-teacher-") as file:
            # The mapping outlives the name of the file, and the system writes its pages out when memory is short.
            made = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        return made.view(tensor.shape).copy_(tensor)


@dataclass
class Call:
    """What one call of an upstream leaf received and returned."""

    received: list[Tensor]
    returned: list[Tensor]

    @classmethod
    def of(cls, received: Any, returned: Any) -> "Call":
        """Copies of all tensors."""
        shelf = Shelf()
        return cls(shelf.keep(received), shelf.keep(returned))
