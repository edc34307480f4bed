"""Fingerprints: a few bytes that stand for a whole tensor, so that two runs can be compared without being kept.

A fingerprint changes with every bit of a tensor and with its place: a permutation, a flipped sign, -0.0 for 0.0, the
payload of a NaN, the dtype and the shape all count; strides and the device do not. Small tensors are hashed as they
are. Of others, bits are read as 64-bit words, and each block of words is multiplied by fixed random numbers and added
up modulo 2⁶⁴: an integer product, which every device computes alike, at the speed of memory. A product modulo 2⁶⁴ shows
a change of a top bit but not its place, so the top bits are gathered, one a byte, and multiplied by themselves.

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
from refiners.parity.bits import as_integers, same_bits

_BLOCK = 1 << 16
"""Words that are multiplied by the same random numbers as those of other blocks; results of blocks keep their order."""

_SMALL = 1 << 14
"""Bytes up to which a tensor is hashed whole: below, calls of torch cost more than the bytes."""

_KNOWN_TO_NUMPY = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.complex64, torch.complex128}
    | {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool}
)

_LARGE = 1 << 20
"""Bytes from which a weight is known by its place."""

_CHUNK = 1 << 20
"""Words whose top bits are gathered at once: they stay in the cache."""

_HUGE = 1e30
"""Masks hold infinities and the largest numbers of a dtype, which no norm survives."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What identifies the value of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    digest: bytes


@cache
def _multipliers(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0x5EED)
    drawn = torch.randint(-(2**63), 2**63 - 1, (_BLOCK,), generator=generator, dtype=torch.int64)
    return (drawn | 1).to(device)


def fingerprint(tensor: Tensor) -> Fingerprint:
    """The fingerprint of a tensor of any dtype, layout and device; one on `meta` has no digest."""
    shape, dtype = tuple(tensor.shape), tensor.dtype
    if tensor.is_meta or not tensor.numel():
        return Fingerprint(dtype, shape, b"")
    if tensor.layout != torch.strided:
        tensor = tensor.detach().to_dense()
    data = _bytes_of(tensor) if tensor.nbytes <= _SMALL else _sums_of(tensor)
    return Fingerprint(dtype, shape, hashlib.blake2b(data, digest_size=16).digest())


def _bytes_of(tensor: Tensor) -> bytes:
    """All bytes of a tensor in the order of its elements."""
    readable = tensor if tensor.dtype in _KNOWN_TO_NUMPY else as_integers(tensor)
    return readable.numpy(force=True).tobytes()


@torch.no_grad()
def _sums_of(tensor: Tensor) -> bytes:
    """The sums of all blocks of words of a tensor."""
    flat = as_integers(tensor).contiguous().flatten().view(torch.uint8)
    if flat.numel() % 8:
        flat = torch.nn.functional.pad(flat, (0, 8 - flat.numel() % 8))
    elif flat.storage_offset() % 8:
        flat = flat.clone()
    words = flat.view(torch.int64)
    chunks = [words[start : start + _CHUNK] for start in range(0, words.numel(), _CHUNK)]
    sums = [part for chunk in chunks for part in (*_sums(chunk), *_sums(_top_bits(chunk)))]
    return torch.cat(sums).cpu().numpy().tobytes()


def _top_bits(words: Tensor) -> Tensor:
    """The top bit of each word, eight of them in a word."""
    bits = (words < 0).view(torch.uint8)
    if bits.numel() % 8:
        bits = torch.nn.functional.pad(bits, (0, 8 - bits.numel() % 8))
    return bits.view(torch.int64)


def _sums(words: Tensor) -> list[Tensor]:
    """An integer for each block of words, and one for the rest."""
    whole = words.numel() // _BLOCK * _BLOCK
    blocks = [words[:whole].view(-1, _BLOCK)] if whole else []
    blocks += [words[whole:].view(1, -1)] if whole < words.numel() else []
    multipliers = _multipliers(words.device)
    if words.device.type == "cpu":
        return [torch.mv(block, multipliers[: block.shape[1]]) for block in blocks]
    return [(block * multipliers[: block.shape[1]]).sum(1) for block in blocks]


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


def _is_same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bits, at one place in memory or at two."""
    here = first.device == second.device and first.data_ptr() == second.data_ptr()
    return (here and first.stride() == second.stride()) or same_bits(first, second)


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
    _weights: dict[tuple[torch.dtype, tuple[int, ...]], list[tuple[Tensor, int, int]]] = field(
        default_factory=dict[tuple[torch.dtype, tuple[int, ...]], list[tuple[Tensor, int, int]]]
    )
    _views: dict[tuple[int, str, str, int], int] = field(default_factory=dict[tuple[int, str, str, int], int])

    def number_of(self, tensor: Tensor, key: Fingerprint | None = None) -> int:
        """The number of a tensor's value; a new one if it is met for the first time.

        Receives:
            tensor: any.
            key: its fingerprint, if that is known already.
        """
        key = fingerprint(tensor) if key is None else key
        if key not in self._numbers:
            self._numbers[key] = self._near(tensor, key.shape) if self._is_rounded(tensor) else self._new()
        return self._numbers[key]

    def number_of_weight(self, weight: Tensor) -> int:
        """The number of a weight, which is not read where it lies in the memory of one that is known.

        Only a large one is held by its place: its values are compared with those of others of its shape, if need be.
        """
        if weight.nbytes < _LARGE or weight.layout != torch.strided or weight.is_meta:
            return self.number_of(weight)
        known = self._weights.setdefault((weight.dtype, tuple(weight.shape)), [])
        number = next((n for other, version, n in known if other._version == version and _is_same(other, weight)), None)
        if number is None:
            number = self._new()
            self._numbers[Fingerprint(weight.dtype, tuple(weight.shape), b"weight %d" % number)] = number
            known.append((weight.detach(), weight._version, number))
        return number

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
