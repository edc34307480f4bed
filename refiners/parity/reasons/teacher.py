"""Teacher forcing: the port's leaves are given what upstream's were given, so that no fault hides behind another.

Upstream runs once, and what each of its leaves received and returned is kept. Then the port runs: where it reaches a
paired leaf, what arrives there is compared with what upstream's leaf received and is replaced by it; what the leaf
returns is compared and replaced as well. Every leaf is so judged by itself, and so is every way between two leaves.
"""

import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _python_dispatch

from refiners.parity.bits import Worst, find_worst
from refiners.parity.fingerprint import Values
from refiners.parity.inputs import map_tensors
from refiners.parity.leaves import Pairing
from refiners.parity.modules import named_modules
from refiners.parity.operations import tensors_in
from refiners.parity.reasons.axes import Orders
from refiners.parity.reasons.channels import exchanged

Run = Callable[[], Mapping[str, Tensor]]

IN_MEMORY = 1 << 30
"""Bytes of upstream's values that are kept in memory; what is more lies in temporary files."""


class Where(StrEnum):
    """What is compared at a point."""

    RECEIVES = "receives"
    RETURNS = "returns"
    OUTPUT = "output"


@dataclass(frozen=True, kw_only=True)
class Point:
    """A place of the forward at which both sides were compared."""

    where: Where
    port: str
    """Path of the leaf, or the name of the output."""
    upstream: str
    call: int = 0
    """How often the leaf ran before."""
    agrees: bool
    expected: tuple[int, ...]
    """Numbers of upstream's values."""
    actual: tuple[int, ...]
    shapes: tuple[str, str] = ("", "")
    """Of both sides, upstream's first, where they disagree."""
    worst: Worst | None = None
    is_other_size: bool = False
    """Whether both sides hold other numbers of elements."""
    is_other_rank: bool = False
    """Whether they have other numbers of axes as well."""
    turned: tuple[tuple[int, int], ...] = ()
    """Where both sides agree: numbers of values of the port and of upstream that hold one in another order of axes."""
    is_way: bool = False
    """Whether a leaf does a part of what upstream's does: what it returns is judged with the way to it."""

    @property
    def place(self) -> tuple[str, str, int]:
        """What identifies the point in another run."""
        return self.where, self.port, self.call

    @property
    def module(self) -> str:
        """The path of upstream's leaf; of an output, all of upstream."""
        return "" if self.where is Where.OUTPUT else self.upstream


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
class Teacher:
    """What upstream's leaves received and returned, to be taught to the port.

    Receives:
        values: gives numbers to values.
        calls: path of a leaf → its calls in order.
        outputs: upstream's outputs.
    """

    values: Values
    calls: dict[str, list[Call]]
    outputs: Mapping[str, Tensor]
    _expected: dict[int, int] = field(default_factory=dict[int, int])
    orders: Orders = field(default_factory=Orders)
    """In which the port holds what upstream holds in another one."""

    @classmethod
    def listen(cls, upstream: nn.Module, leaves: Mapping[str, nn.Module], run: Run, values: Values) -> "Teacher":
        """Runs upstream once."""
        calls: dict[str, list[Call]] = {path: [] for path in leaves}
        shelf = Shelf()
        with ExitStack() as stack:
            for path, leaf in leaves.items():

                def enter(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
                    calls[path].append(Call(shelf.keep((args, kwargs)), []))

                def leave(module: nn.Module, args: Any, output: Any, path: str = path) -> None:
                    calls[path][-1].returned = shelf.keep(output)

                stack.callback(leaf.register_forward_pre_hook(enter, with_kwargs=True).remove)
                stack.callback(leaf.register_forward_hook(leave).remove)
            outputs = dict(run())
        return cls(values, calls, {name: tensor.detach() for name, tensor in outputs.items()})

    @contextmanager
    def forcing(
        self,
        port: nn.Module,
        pairing: Pairing,
        points: list[Point],
        *,
        after: Callable[[nn.Module, Any, Any], None] | None = None,
    ) -> Generator[None, None, None]:
        """Inside, the leaves of the port are taught; what is seen is appended to `points`.

        Receives:
            after: called with a leaf, what it was taught, and what it returns to it.
        """
        leaves = {path: module for path, module in named_modules(port) if path in pairing}
        with ExitStack() as stack:
            for path, leaf in leaves.items():
                enter, leave = self._hooks(path, pairing[path], points)
                stack.callback(leaf.register_forward_pre_hook(enter, with_kwargs=True).remove)
                if after is not None:
                    stack.callback(leaf.register_forward_hook(after).remove)
                stack.callback(leaf.register_forward_hook(leave).remove)
            yield

    def _hooks(self, path: str, upstream: str, points: list[Point]) -> tuple[Callable[..., Any], Callable[..., Any]]:
        lessons = self.calls.get(upstream, [])
        count = 0
        has_other_size, is_turned = False, False

        def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
            nonlocal count, has_other_size, is_turned
            count += 1
            has_other_size, is_turned = False, False
            if count > len(lessons):
                return None
            given, right = (args, kwargs), lessons[count - 1].received
            self._look(given, right)
            # A leaf may be told by other means than upstream's, as a table of positions is by ids or by nothing at
            # all. What it returns is compared all the same.
            has_other_size = _has_other_size(given, right)
            if has_other_size or _is_alike(given, right):
                point = self._compare(Where.RECEIVES, (path, upstream, count - 1), given, right)
                is_turned = not point.agrees and not has_other_size and self._turns(module, given, lessons[count - 1])
                points.append(_agreeing(point) if is_turned else point)
            with _undispatched():
                return None if is_turned else self._replaced(given, right)

        def leave(module: nn.Module, args: Any, output: Any) -> Any:
            if count > len(lessons):
                return None
            right, judged = lessons[count - 1], output
            self._look(output, right.returned)
            if has_other_size:  # what it returned says nothing about it: it is asked again
                with _undispatched():
                    again = _asked(module, right.received)
                    judged = right.returned if again is None else again
                is_part = self.agree(output, right.returned) or _has_other_size(judged, right.returned)
                if is_part:  # of what upstream's leaf does, as pads before it are
                    points[-1], judged = _agreeing(points[-1]), output
            point = self._compare(Where.RETURNS, (path, upstream, count - 1), judged, right.returned)
            point = _agreeing(point) if is_turned else replace(point, is_way=has_other_size and judged is output)
            points.append(point)
            with _undispatched():
                is_taught = not point.agrees or (has_other_size and judged is not output)
                return self._replaced(output, right.returned) if is_taught else None

        return enter, leave

    def judge(self, outputs: Mapping[str, Tensor]) -> list[Point]:
        """Compares the outputs of a forced run."""
        return [
            self._compare(Where.OUTPUT, (name, name, 0), outputs.get(name, ()), [tensor])
            for name, tensor in self.outputs.items()
        ]

    def agree(self, given: Any, expected: list[Tensor]) -> bool:
        """Whether what a leaf returns is what upstream's returned."""
        actual = [tensor.detach() for tensor in tensors_in(given)]
        return self._numbers(actual, expected) == self._known(expected)

    def _turns(self, module: nn.Module, given: Any, call: Call) -> bool:
        """Whether a leaf takes and returns what upstream's does with its channels at the other end.

        As where upstream moves axes around a norm, and the port inside of it. Where all axes have one size, shapes do
        not tell.
        """
        with torch.no_grad(), _undispatched():
            actual = [tensor.detach() for tensor in tensors_in(given)]
            if not any(tensor.ndim > 2 for tensor in actual):
                return False
            for axes in ((1, -1), (-1, 1)):
                if self._are(_turned(actual, axes), call.received):
                    returned = [tensor.detach() for tensor in tensors_in(_asked(module, actual))]
                    return self._are(_turned(returned, axes), call.returned)
        return False

    def _are(self, actual: list[Tensor], expected: list[Tensor]) -> bool:
        shapes = [tensor.shape for tensor in actual] == [tensor.shape for tensor in expected]
        return shapes and tuple(map(self.values.number_of, actual)) == self._known(expected)

    def _compare(self, where: Where, place: tuple[str, str, int], given: Any, expected: list[Tensor]) -> Point:
        with torch.no_grad(), _undispatched():
            actual = [tensor.detach() for tensor in tensors_in(given)]
            numbers, right = self._numbers(actual, expected), self._known(expected)
            agrees = numbers == right or (where is Where.RETURNS and _is_part(numbers, right))
            is_other_size = [tensor.numel() for tensor in actual] != [tensor.numel() for tensor in expected]
            turned = exchanged(actual, expected)
            path, upstream, call = place
            return Point(
                where=where,
                port=path,
                upstream=upstream,
                call=call,
                agrees=agrees,
                expected=right,
                actual=tuple(self.values.number_of(tensor) for tensor in actual),
                shapes=("", "") if agrees else (_shapes(expected), _shapes(actual)),
                worst=None if agrees else _worst(path, expected, actual),
                is_other_size=is_other_size,
                is_other_rank=is_other_size and [t.ndim for t in actual] != [t.ndim for t in expected],
                turned=tuple((self.values.number_of(a), self.values.number_of(e)) for a, e in turned if agrees),
            )

    def _numbers(self, actual: list[Tensor], expected: list[Tensor]) -> tuple[int, ...]:
        """Numbers of the port's tensors in upstream's shapes: leaves may flatten the axes they do not look at."""
        shaped = [
            self._in_layout(tensor, other.shape) if tensor.numel() == other.numel() else _unexpanded(tensor, other)
            for tensor, other in zip(actual, expected, strict=False)
        ]
        return tuple(self.values.number_of(tensor) for tensor in (*shaped, *actual[len(shaped) :]))

    def _known(self, expected: list[Tensor]) -> tuple[int, ...]:
        """Upstream's tensors are kept, so that an id stands for one of them."""
        for tensor in expected:
            if id(tensor) not in self._expected:
                self._expected[id(tensor)] = self.values.number_of(tensor)
        return tuple(self._expected[id(tensor)] for tensor in expected)

    def _look(self, given: Any, right: list[Tensor]) -> None:
        """Remembers in which order the port holds what upstream holds, where that is another one."""
        with torch.no_grad(), _undispatched():
            for tensor, other in zip(tensors_in(given), right, strict=False):
                if tensor.shape != other.shape and tensor.numel() == other.numel():
                    self.orders.look(tensor.detach(), other, _in_layout(tensor.detach(), other.shape))

    def _in_layout(self, tensor: Tensor, shape: torch.Size) -> Tensor:
        """A tensor in another shape, and in the order that was seen."""
        known = self.orders.known(tensor, shape)
        return _in_layout(tensor, shape) if known is None else known

    def _replaced(self, given: Any, right: list[Tensor]) -> Any:
        """The same nesting with upstream's tensors; None, which hooks take for no change, where they do not fit."""
        if not _is_alike(given, right):
            return None
        actual = tensors_in(given)
        waiting = iter([self._shaped_as(t, r) for t, r in zip(actual, right, strict=True)])
        return map_tensors(given, lambda _: next(waiting))

    def _shaped_as(self, tensor: Tensor, right: Tensor) -> Tensor:
        """A copy of upstream's tensor in the shape of another one, and then in its memory: sums depend on its order."""
        if tensor.shape == right.shape:
            return right.clone()
        return torch.empty_like(tensor, dtype=right.dtype).copy_(self._in_layout(right, tensor.shape))


def _turned(tensors: list[Tensor], axes: tuple[int, int]) -> list[Tensor]:
    return [tensor.movedim(*axes) if tensor.ndim > 2 else tensor for tensor in tensors]


def _is_part(numbers: tuple[int, ...], right: tuple[int, ...]) -> bool:
    """Whether one leaf returns all that the other does and more: a router its scores, and which of them it chose."""
    fewer, more = sorted((numbers, right), key=len)
    return 0 < len(fewer) < len(more) and set(fewer) <= set(more)


def _agreeing(point: Point) -> Point:
    return replace(point, agrees=True, actual=point.expected, shapes=("", ""), worst=None)


def _undispatched() -> Any:
    """A tracer that is entered sees nothing of what is computed for a comparison."""
    return cast(Any, _python_dispatch)._disable_current_modes()


def _shapes(tensors: list[Tensor]) -> str:
    return ", ".join(f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in tensors) or "nothing"


def _worst(name: str, expected: list[Tensor], actual: list[Tensor]) -> Worst | None:
    for ours, theirs in zip(expected, actual, strict=False):
        if ours.shape == theirs.shape and ours.dtype == theirs.dtype:
            worst = find_worst(name, ours, theirs)
            if worst is not None:
                return worst
    return None


def _is_alike(given: Any, right: list[Tensor]) -> bool:
    actual = tensors_in(given)
    return len(actual) == len(right) and all(
        t.numel() == r.numel() and t.is_floating_point() == r.is_floating_point()
        for t, r in zip(actual, right, strict=True)
    )


def _asked(leaf: nn.Module, received: list[Tensor]) -> Any:
    """What a leaf makes of what upstream's received; None where it does not take it."""
    try:
        with torch.no_grad():
            return leaf.forward(*(tensor.clone() for tensor in received))
    except Exception:  # it takes more than tensors, or other ones
        return None


def _unexpanded(tensor: Tensor, other: Tensor) -> Tensor:
    """Of whole numbers, as positions are, one row stands for the same row in each entry of a batch."""
    if tensor.is_floating_point() or tensor.dtype != other.dtype or tensor.ndim != other.ndim:
        return tensor
    small, large = sorted((tensor, other), key=Tensor.numel)
    fits = all(a in (1, b) for a, b in zip(small.shape, large.shape, strict=True))
    return other if fits and torch.equal(small.expand_as(large), large) else tensor


def _in_layout(tensor: Tensor, shape: torch.Size) -> Tensor:
    """A tensor in another shape; with its channels at the other end, where that is what tells the shapes apart.

    A convolution of 1x1 is a linear layer on rows of pixels: one has the channels at axis 1, the other at the end.
    """
    own = tensor.shape
    if own == shape or min(len(own), len(shape)) < 3 or own[-1] == shape[-1]:
        return tensor.reshape(shape)
    if own[1] == shape[-1]:
        return tensor.movedim(1, -1).reshape(shape)
    if own[-1] == shape[1]:
        return tensor.reshape(shape[0], *shape[2:], own[-1]).movedim(-1, 1).contiguous()
    return tensor.reshape(shape)


def _has_other_size(given: Any, right: list[Tensor]) -> bool:
    """Whether a leaf receives tensors of another size, which it cannot be taught."""
    actual = tensors_in(given)
    kinds = {tensor.is_floating_point() for tensor in (*actual, *right)}
    return (
        len(kinds) == 1
        and len(actual) == len(right)
        and any(t.numel() != r.numel() for t, r in zip(actual, right, strict=True))
    )
