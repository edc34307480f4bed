"""Teacher forcing: the port's leaves are given what upstream's were given, so that no fault hides behind another.

Upstream runs once, and what each of its leaves received and returned is kept. Then the port runs: where it reaches a
paired leaf, what arrives there is compared with what upstream's leaf received and is replaced by it; what the leaf
returns is compared and replaced as well. Every leaf is so judged by itself, and so is every way between two leaves.
"""

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from refiners.parity.bits import Worst, find_worst
from refiners.parity.fingerprint import Values
from refiners.parity.inputs import map_tensors
from refiners.parity.leaves import Pairing
from refiners.parity.modules import named_modules
from refiners.parity.operations import tensors_in
from refiners.parity.reasons.axes import Orders
from refiners.parity.reasons.channels import exchanged
from refiners.parity.reasons.lesson import LeafLesson, WholeLesson, asked, is_alike, undispatched
from refiners.parity.reasons.points import Point, Where, shapes_of
from refiners.parity.reasons.shelf import Call, Shelf
from refiners.parity.reasons.unread import Unread, is_cut_from

Run = Callable[[], Mapping[str, Tensor]]


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
    wholes: Mapping[str, str] = field(default_factory=dict[str, str])
    """Path of a module of the port with modules below → path of the one of upstream that holds the same weights."""
    often: Mapping[str, int] = field(default_factory=dict[str, int])
    """Path of a module of the port → how often it runs, where that is known."""
    unread: Unread = field(default_factory=Unread)
    """Rows that no output of upstream's depends on."""

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

    def with_wholes(
        self, found: Mapping[str, str], upstream: nn.Module, more: Mapping[str, nn.Module], run: Run
    ) -> "Teacher":
        """One that teaches modules with modules below as well.

        Receives:
            found: path of a module of the port → path of that of upstream.
            upstream, more: upstream and its modules of these paths.
            run: runs it once more.
        """
        also = Teacher.listen(upstream, more, run, self.values)
        return replace(self, calls={**also.calls, **self.calls}, wholes=found)

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
        leaves = {path: module for path, module in named_modules(port) if path in pairing or path in self.wholes}
        with ExitStack() as stack:
            for path, leaf in leaves.items():
                is_leaf = path in pairing
                taught = LeafLesson(self, path, pairing[path], points) if is_leaf else None
                taught = taught or WholeLesson(self, path, self.wholes[path], points)
                stack.callback(leaf.register_forward_pre_hook(taught.enter, with_kwargs=True).remove)
                if after is not None:
                    stack.callback(leaf.register_forward_hook(after).remove)
                stack.callback(leaf.register_forward_hook(taught.leave).remove)
            yield

    def judge(self, outputs: Mapping[str, Tensor]) -> list[Point]:
        """Compares the outputs of a forced run."""
        return [
            self.compare(Where.OUTPUT, (name, name, 0), outputs.get(name, ()), [tensor])
            for name, tensor in self.outputs.items()
        ]

    def agree(self, given: Any, expected: list[Tensor]) -> bool:
        """Whether what a leaf returns is what upstream's returned."""
        actual = [tensor.detach() for tensor in tensors_in(given)]
        return self._numbers(actual, expected) == self._known(expected)

    def turns(self, module: nn.Module, given: Any, call: Call) -> bool:
        """Whether a leaf takes and returns what upstream's does with its channels at the other end.

        As where upstream moves axes around a norm, and the port inside of it. Where all axes have one size, shapes do
        not tell.
        """
        with torch.no_grad(), undispatched():
            actual = [tensor.detach() for tensor in tensors_in(given)]
            if not any(tensor.ndim > 2 for tensor in actual):
                return False
            for axes in ((1, -1), (-1, 1)):
                if self._are(_turned(actual, axes), call.received):
                    returned = [tensor.detach() for tensor in tensors_in(asked(module, actual))]
                    return self._are(_turned(returned, axes), call.returned)
        return False

    def _are(self, actual: list[Tensor], expected: list[Tensor]) -> bool:
        shapes = [tensor.shape for tensor in actual] == [tensor.shape for tensor in expected]
        return shapes and tuple(map(self.values.number_of, actual)) == self._known(expected)

    def compare(self, where: Where, place: tuple[str, str, int], given: Any, expected: list[Tensor]) -> Point:
        with torch.no_grad(), undispatched():
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
                shapes=("", "") if agrees else (shapes_of(expected), shapes_of(actual)),
                worst=None if agrees else _worst(path, expected, actual),
                is_other_size=is_other_size,
                is_other_rank=is_other_size and [t.ndim for t in actual] != [t.ndim for t in expected],
                turned=tuple((self.values.number_of(a), self.values.number_of(e)) for a, e in turned if agrees),
            )

    def is_cut(self, given: Any, right: list[Tensor]) -> bool:
        """Whether a leaf works on some of the rows that upstream's works on, which are left out later there."""
        with torch.no_grad(), undispatched():
            return is_cut_from([tensor.detach() for tensor in tensors_in(given)], right, self.values.number_of)

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

    def look(self, given: Any, right: list[Tensor]) -> None:
        """Remembers in which order the port holds what upstream holds, where that is another one."""
        with torch.no_grad(), undispatched():
            for tensor, other in zip(tensors_in(given), right, strict=False):
                if tensor.shape != other.shape and tensor.numel() == other.numel():
                    self.orders.look(tensor.detach(), other, _in_layout(tensor.detach(), other.shape))

    def _in_layout(self, tensor: Tensor, shape: torch.Size) -> Tensor:
        """A tensor in another shape, and in the order that was seen."""
        known = self.orders.known(tensor, shape)
        return _in_layout(tensor, shape) if known is None else known

    def replaced(self, given: Any, right: list[Tensor]) -> Any:
        """The same nesting with upstream's tensors; None, which hooks take for no change, where they do not fit."""
        if not is_alike(given, right):
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


def _worst(name: str, expected: list[Tensor], actual: list[Tensor]) -> Worst | None:
    for ours, theirs in zip(expected, actual, strict=False):
        if ours.shape == theirs.shape and ours.dtype == theirs.dtype:
            worst = find_worst(name, ours, theirs)
            if worst is not None:
                return worst
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
