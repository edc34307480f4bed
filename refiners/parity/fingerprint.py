"""Fingerprints: a few bytes that stand for a whole tensor, so that two runs can be compared without being kept.

A fingerprint changes with every bit of a tensor and with its place: a permutation, a flipped sign, -0.0 for 0.0, the
payload of a NaN, the dtype and the shape all count; strides and the device do not. Bits are read as 64-bit words, and
each block of words is multiplied by fixed random numbers and added up modulo 2⁶⁴: an integer product, which every
device computes alike, at the speed of memory. The upper halves of the words are added up a second time by themselves,
for a product modulo 2⁶⁴ shows a change of a top bit but not its place.

`Values` gives a number to each value: tensors of one fingerprint have one number. Where bits differ everywhere by
rounding, it can be asked to take values that are close in float64 for one; then it keeps two more numbers of each
tensor, its norm and its product with random numbers.
"""

import hashlib
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from refiners.parity import rounding
from refiners.parity.bits import as_integers

_BLOCK = 1 << 16
"""Words that are multiplied by the same random numbers as those of other blocks; results of blocks keep their order."""

_HUGE = 1e30
"""Masks hold infinities and the largest numbers of a dtype, which no norm survives."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What identifies the value of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    digest: bytes


@cache
def _multipliers(device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0x5EED)
    drawn = torch.randint(-(2**63), 2**63 - 1, (2, _BLOCK), generator=generator, dtype=torch.int64)
    first, second = (drawn | 1).to(device)
    return first, second


@torch.no_grad()
def fingerprint(tensor: Tensor) -> Fingerprint:
    """The fingerprint of a tensor of any dtype, layout and device; one on `meta` has no digest."""
    tensor = tensor.detach()
    shape, dtype = tuple(tensor.shape), tensor.dtype
    if tensor.is_meta or not tensor.numel():
        return Fingerprint(dtype, shape, b"")
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    flat = as_integers(tensor).contiguous().flatten().view(torch.uint8)
    tail = flat.numel() % 8
    if tail:
        flat = torch.nn.functional.pad(flat, (0, 8 - tail))
    elif flat.storage_offset() % 8:
        flat = flat.clone()
    words = flat.view(torch.int64)
    whole = words.numel() // _BLOCK * _BLOCK
    sums = [_sums(words[:whole].view(-1, _BLOCK))] if whole else []
    sums += [_sums(words[whole:].view(1, -1))] if whole < words.numel() else []
    gathered = torch.cat(sums).cpu().numpy()
    return Fingerprint(dtype, shape, hashlib.blake2b(gathered.tobytes(), digest_size=16).digest())


def _sums(blocks: Tensor) -> Tensor:
    """Two integers for each block."""
    first, second = (row[: blocks.shape[1]] for row in _multipliers(blocks.device))
    upper = blocks >> 32
    if blocks.device.type == "cpu":
        return torch.cat((torch.mv(blocks, first), torch.mv(upper, second)))
    return torch.cat(((blocks * first).sum(1), (upper * second).sum(1)))


@dataclass(frozen=True, slots=True)
class Sketch:
    """What is kept of a floating tensor to tell whether another one is close to it."""

    norm: float
    product: float
    huge: int
    """Elements that are infinite, NaN, or as large as in a mask."""

    def is_close(self, other: "Sketch") -> bool:
        """Whether nothing but rounding in float64 need lie between two tensors."""
        bound = rounding.FLOAT64_AGREEMENT * max(self.norm, other.norm)
        apart = max(abs(self.norm - other.norm), abs(self.product - other.product))
        return self.huge == other.huge and apart <= bound


@torch.no_grad()
def sketch(tensor: Tensor) -> Sketch:
    """The sketch of a real floating tensor."""
    flat = tensor.detach().to(torch.float64).flatten()
    ordinary = flat.isfinite() & (flat.abs() < _HUGE)
    flat = torch.where(ordinary, flat, 0.0)
    random = torch.randn(flat.shape, generator=torch.Generator().manual_seed(flat.numel()), dtype=torch.float64)
    return Sketch(float((flat @ flat).sqrt()), float(flat @ random.to(flat.device)), int((~ordinary).sum()))


@dataclass
class Values:
    """Numbers for values, the same for both sides of a case.

    Receives:
        by_closeness: whether values that are close in float64 count as one. Other dtypes always go by their bits.
    """

    by_closeness: bool = False
    _numbers: dict[Fingerprint, int] = field(default_factory=dict[Fingerprint, int])
    _sketches: dict[tuple[int, ...], list[tuple[Sketch, int]]] = field(
        default_factory=dict[tuple[int, ...], list[tuple[Sketch, int]]]
    )
    _views: dict[tuple[int, str, str, int], int] = field(default_factory=dict[tuple[int, str, str, int], int])

    def number_of(self, tensor: Tensor) -> int:
        """The number of a tensor's value; a new one if it is met for the first time."""
        key = fingerprint(tensor)
        if key not in self._numbers:
            self._numbers[key] = self._near(tensor, key.shape) if self._is_rounded(tensor) else self._new()
        return self._numbers[key]

    def number_of_view(self, base: int, name: str, arguments: str, place: int) -> int:
        """The number of a view of a weight, which need not be read for it."""
        return self._views.setdefault((base, name, arguments, place), -1 - len(self._views))

    def _is_rounded(self, tensor: Tensor) -> bool:
        return self.by_closeness and tensor.dtype == torch.float64 and tensor.numel() > 0 and not tensor.is_meta

    def _near(self, tensor: Tensor, shape: tuple[int, ...]) -> int:
        found = sketch(tensor)
        known = self._sketches.setdefault(shape, [])
        number = next((number for other, number in known if found.is_close(other)), None)
        if number is None:
            number = self._new()
            known.append((found, number))
        return number

    def _new(self) -> int:
        return len(self._numbers)
