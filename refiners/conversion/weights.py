"""The tensors on one side of a conversion, whatever they are given as: a module, a state dict, or shapes only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from refiners.errors import ConversionError

Weights = nn.Module | Mapping[str, Tensor | Sequence[int]]


@dataclass(frozen=True)
class Entries:
    """Keys with tensors, shapes being tensors on the meta device.

    Attributes:
        tensors: the tensors by key.
        only_shapes: the keys that were given as a shape: their dtype means nothing.
        ties: each key that is the same tensor in the same memory as an earlier one, with that earlier key.
    """

    tensors: Mapping[str, Tensor]
    only_shapes: frozenset[str]
    ties: Mapping[str, str]

    @classmethod
    def read(cls, weights: Weights) -> "Entries":
        """Reads a module's `state_dict()`, or a mapping of key to tensor or shape.

        Raises:
            ConversionError: a value is neither a tensor nor a shape, or a key is not a string.
        """
        given: Mapping[str, object] = weights.state_dict(keep_vars=True) if isinstance(weights, nn.Module) else weights
        tensors: dict[str, Tensor] = {}
        shapes: set[str] = set()
        wrong: list[str] = []
        for key, value in given.items():
            if not isinstance(key, str):  # pyright: ignore[reportUnnecessaryIsInstance]: what users pass is not checked
                wrong.append(f"{key!r}: a key of type {type(key).__name__}")
            elif isinstance(value, Tensor):
                tensors[key] = value
            elif (shape := _shape(value)) is not None:
                tensors[key] = torch.empty(shape, device="meta")
                shapes.add(key)
            else:
                wrong.append(f"{key}: {type(value).__name__}")
        if wrong:
            raise ConversionError(
                f"{len(wrong)} entries are neither a tensor nor a shape:\n  " + "\n  ".join(wrong[:12]) + "\n"
                "Give a flat state dict; a checkpoint often holds it under a key such as 'state_dict'."
            )
        return cls(tensors, frozenset(shapes), _ties(tensors))

    def on_meta(self) -> "Entries":
        """The same shapes, dtypes and ties without the values."""
        tensors = {key: value if value.is_meta else value.to("meta") for key, value in self.tensors.items()}
        return Entries(tensors, self.only_shapes, self.ties)


def _shape(value: object) -> list[int] | None:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return None
    items: list[object] = list(value)  # pyright: ignore[reportUnknownArgumentType]: the items are checked below
    sizes = [item for item in items if isinstance(item, int) and item >= 0]
    return sizes if len(sizes) == len(items) else None


def _ties(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    first: dict[tuple[object, ...], str] = {}
    ties: dict[str, str] = {}
    storages: list[torch.UntypedStorage] = []  # kept alive, so that no two of them have the same id
    for key, tensor in tensors.items():
        if tensor.numel() == 0 or tensor.layout != torch.strided:
            continue
        storage = tensor.untyped_storage()
        storages.append(storage)
        identity = (id(storage), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        other = first.setdefault(identity, key)
        if other != key:
            ties[key] = other
    return ties


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits. On the meta device there are no bits to compare."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one is other or one.is_meta or other.is_meta or one.numel() == 0:
        return True
    left, right = (tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(left, right)
