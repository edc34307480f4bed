"""What happens to a tensor on its way from upstream to the port, and back, without losing a bit.

In the table of a `KeyMap` a plain string renames. A rule does more, and hands its result on to strings or to other
rules, so that `Transpose(Split("q", "k", "v"), 0, 1)` transposes first and splits then. Whatever a view can do
copies nothing: only `Merge`, and the inverse of `Split`, allocate.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from refiners.errors import ConversionError


class Rule(ABC):
    """An invertible change of one or several tensors: the base of all rules.

    A new rule implements `forward` and `backward`, and nothing else. Its own numbers are attributes.

    Receives:
        targets: where the results go, one port pattern or one rule for each result.
    """

    inputs: int | None = 1
    """How many tensors the rule takes, None for any number."""

    def __init__(self, *targets: "str | Rule") -> None:
        if not targets:
            raise ConversionError(f"{type(self).__name__} has no target. Name the port keys its result goes to.")
        for target in targets:
            if isinstance(target, Rule) and target.inputs != 1:
                raise ConversionError(
                    f"{type(target).__name__} cannot stand inside {type(self).__name__}: put it first."
                )
        self.targets = targets

    @abstractmethod
    def forward(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """From upstream: the results, one for each target."""

    @abstractmethod
    def backward(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """To upstream: the exact inverse of `forward`."""

    @property
    def leaves(self) -> tuple[str, ...]:
        """The port patterns that the results end up at, in order."""
        return tuple(
            leaf for target in self.targets for leaf in ((target,) if isinstance(target, str) else target.leaves)
        )

    def retarget(self, rename: Callable[[str], str]) -> Self:
        """The same rule with every port pattern renamed."""
        twin = copy.copy(self)
        twin.targets = tuple(rename(t) if isinstance(t, str) else t.retarget(rename) for t in self.targets)
        return twin

    def to_port(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Upstream tensors to port tensors, one for each of `leaves`.

        Raises:
            ConversionError: the tensors do not have a shape that the rule can take.
        """
        results: list[Tensor] = []
        for target, part in zip(self.targets, self.forward(tensors), strict=True):
            results.extend((part,) if isinstance(target, str) else target.to_port((part,)))
        return tuple(results)

    def to_upstream(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Port tensors, one for each of `leaves`, to upstream tensors: the inverse of `to_port`."""
        return tuple(self.backward(list(self._parts(iter(tensors)))))

    def _parts(self, leaves: Iterator[Tensor]) -> Iterator[Tensor]:
        for target in self.targets:
            if isinstance(target, str):
                yield next(leaves)
            else:
                yield from target.backward(list(target._parts(leaves)))

    def __repr__(self) -> str:
        numbers = [f"{key}={value!r}" for key, value in vars(self).items() if key != "targets"]
        return f"{type(self).__name__}({', '.join([*map(repr, self.targets), *numbers])})"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(repr(self))


class Rename(Rule):
    """The tensor itself under another name. A plain string in the table means this."""

    def __init__(self, target: str | Rule) -> None:
        super().__init__(target)

    def forward(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return tensors

    def backward(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return tensors


class Split(Rule):
    """One upstream tensor becomes several port tensors, cut along `dim`.

    Receives:
        targets: one port pattern, or rule, for each piece.
        dim: the axis to cut.
        sizes: the length of each piece; equal pieces by default.

    Example:
        >>> Split("q.{p}", "k.{p}", "v.{p}").to_port([torch.arange(6)])
        (tensor([0, 1]), tensor([2, 3]), tensor([4, 5]))
    """

    def __init__(self, *targets: str | Rule, dim: int = 0, sizes: Sequence[int] | None = None) -> None:
        super().__init__(*targets)
        self.dim = dim
        self.sizes = _checked_sizes(self, sizes, len(targets))

    def forward(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return _cut(self, tensors[0], self.dim, self.sizes, len(self.targets))

    def backward(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [_join(self, tensors, self.dim, self.sizes)]


class Merge(Rule):
    """Several upstream tensors become one port tensor, joined along `dim`. Its key in the table is a tuple.

    Receives:
        target: the port pattern, or rule, of the result.
        dim: the axis along which they are joined.
        sizes: the length of each upstream tensor; equal lengths by default.

    Example:
        >>> Merge("qkv.{p}").to_port([torch.zeros(2), torch.ones(2)])
        (tensor([0., 0., 1., 1.]),)
    """

    inputs = None

    def __init__(self, target: str | Rule, dim: int = 0, sizes: Sequence[int] | None = None) -> None:
        super().__init__(target)
        self.dim = dim
        self.sizes = _checked_sizes(self, sizes, None)
        self.count = 0

    def with_count(self, count: int) -> "Merge":
        """The same rule for this number of upstream tensors: what a table makes of the length of its tuple."""
        _checked_sizes(self, self.sizes, count)
        twin = copy.copy(self)
        twin.count = count
        return twin

    def forward(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [_join(self, tensors, self.dim, self.sizes)]

    def backward(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return _cut(self, tensors[0], self.dim, self.sizes, self.count or len(self.sizes or ()))


class Transpose(Rule):
    """Two axes exchanged, as for a weight of shape (in, out) that the port holds as (out, in). Copies nothing.

    Receives:
        target: the port pattern, or rule, of the result.
        dim0, dim1: the axes to exchange.
    """

    def __init__(self, target: str | Rule, dim0: int = 0, dim1: int = 1) -> None:
        super().__init__(target)
        self.dim0 = dim0
        self.dim1 = dim1

    def forward(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        tensor = tensors[0]
        _check_axes(self, tensor, self.dim0, self.dim1)
        return [tensor.transpose(self.dim0, self.dim1)]

    def backward(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return self.forward(tensors)


class Unsqueeze(Rule):
    """`count` axes of length 1 put in at `dim`: a linear weight (out, in) as that of a 1x1 convolution.

    Receives:
        target: the port pattern, or rule, of the result.
        dim: where the new axes are in the result; -1 puts them at the end.
        count: how many.
    """

    def __init__(self, target: str | Rule, dim: int = -1, count: int = 1) -> None:
        super().__init__(target)
        self.dim = dim
        self.count = count

    def forward(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [_unsqueeze(self, tensors[0], self.dim, self.count)]

    def backward(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [_squeeze(self, tensors[0], self.dim, self.count)]


class Squeeze(Rule):
    """`count` axes of length 1 taken out at `dim`: the weight of a 1x1 convolution as a linear one.

    Receives:
        target: the port pattern, or rule, of the result.
        dim: where the axes are in the upstream tensor; -1 means the last ones.
        count: how many.
        ndim: the number of axes of the result. A tensor that has no more is taken as it is: some files hold it so.
    """

    def __init__(self, target: str | Rule, dim: int = -1, count: int = 1, ndim: int | None = None) -> None:
        super().__init__(target)
        self.dim = dim
        self.count = count
        self.ndim = ndim

    def forward(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        if tensors[0].ndim == self.ndim:
            return list(tensors)
        return [_squeeze(self, tensors[0], self.dim, self.count)]

    def backward(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [_unsqueeze(self, tensors[0], self.dim, self.count)]


@dataclass(frozen=True)
class Recomputed:
    """Why an upstream key has no place in the port, and how its bytes are made again.

    Converting checks that upstream's bytes are those; inverting gives them back where they are asked for.

    Receives:
        reason: why the port does not hold it.
        value: the tensor for a shape, such as `lambda shape: torch.arange(shape[-1]).expand(shape)`.
        upstream_reads: whether upstream computes with what a file holds. False where it makes the tensor itself as
            well: other bytes are then told, not refused.
    """

    reason: str
    value: Callable[[torch.Size], Tensor]
    upstream_reads: bool = True


def _shapes(tensors: Sequence[Tensor]) -> str:
    return " and ".join(str(tuple(tensor.shape)) for tensor in tensors)


def _check_axes(rule: Rule, tensor: Tensor, *dims: int) -> None:
    if any(not -tensor.ndim <= dim < tensor.ndim for dim in dims):
        axes = ", ".join(map(str, dims))
        raise ConversionError(f"{type(rule).__name__} needs the axes {axes}, the shape is {tuple(tensor.shape)}")


def _checked_sizes(rule: Rule, sizes: Sequence[int] | None, count: int | None) -> tuple[int, ...] | None:
    if sizes is None:
        return None
    if count is not None and len(sizes) != count:
        raise ConversionError(f"{type(rule).__name__} has {count} pieces and {len(sizes)} sizes. Give one for each.")
    return tuple(sizes)


def _cut(rule: Rule, tensor: Tensor, dim: int, sizes: tuple[int, ...] | None, count: int) -> Sequence[Tensor]:
    _check_axes(rule, tensor, dim)
    length = tensor.shape[dim]
    if sizes is None:
        if length % count:
            raise ConversionError(f"axis {dim} of {tuple(tensor.shape)} cannot be cut in {count} equal pieces")
        sizes = (length // count,) * count
    if sum(sizes) != length:
        raise ConversionError(f"axis {dim} of {tuple(tensor.shape)} cannot be cut in pieces of {sizes}")
    return torch.split(tensor, list(sizes), dim)


def _join(rule: Rule, tensors: Sequence[Tensor], dim: int, sizes: tuple[int, ...] | None) -> Tensor:
    first = tensors[0]
    _check_axes(rule, first, dim)
    axis = dim % first.ndim
    others = {(t.ndim, t.shape[:axis], t.shape[axis + 1 :]) for t in tensors}
    if len(others) > 1:
        raise ConversionError(f"{_shapes(tensors)} cannot be joined along axis {dim}")
    if len({(tensor.dtype, tensor.device) for tensor in tensors}) > 1:
        kinds = " and ".join(f"{tensor.dtype} on {tensor.device}" for tensor in tensors)
        raise ConversionError(f"{kinds} cannot be joined: give them one dtype and device first")
    lengths = tuple(tensor.shape[axis] for tensor in tensors)
    if lengths != (sizes or (lengths[0],) * len(tensors)):
        expected = sizes or f"{len(tensors)} equal ones"
        raise ConversionError(f"{_shapes(tensors)} have lengths {lengths} along axis {dim}, not {expected}")
    return torch.cat(list(tensors), dim)


def _first_axis(rule: Rule, ndim: int, dim: int, count: int) -> int:
    """The first of `count` axes at `dim` of a shape that has `ndim` of them; a negative dim counts the last one."""
    first = dim if dim >= 0 else ndim + dim - count + 1
    if not 0 <= first <= ndim - count:
        raise ConversionError(f"{type(rule).__name__} finds no {count} axes at {dim} in a shape of {ndim} axes")
    return first


def _unsqueeze(rule: Rule, tensor: Tensor, dim: int, count: int) -> Tensor:
    first = _first_axis(rule, tensor.ndim + count, dim, count)
    for axis in range(first, first + count):
        tensor = tensor.unsqueeze(axis)
    return tensor


def _squeeze(rule: Rule, tensor: Tensor, dim: int, count: int) -> Tensor:
    first = _first_axis(rule, tensor.ndim, dim, count)
    if set(tensor.shape[first : first + count]) - {1}:
        raise ConversionError(f"{type(rule).__name__} finds an axis longer than 1 at {dim} of {tuple(tensor.shape)}")
    for _ in range(count):
        tensor = tensor.squeeze(first)
    return tensor
