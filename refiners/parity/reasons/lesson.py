"""What a leaf of the port is taught, and a module that holds leaves: what happens when each is called."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils import _python_dispatch

from refiners.parity.operations import tensors_in
from refiners.parity.reasons.points import Point, Where, agreeing, in_other_shape
from refiners.parity.reasons.shelf import Call
from refiners.parity.reasons.unread import Unread


class Judge(Protocol):
    """What compares the port's values with upstream's, and puts upstream's in their place."""

    calls: dict[str, list[Call]]
    often: Mapping[str, int]
    unread: Unread

    def compare(self, where: Where, place: tuple[str, str, int], given: Any, expected: list[Tensor]) -> Point: ...

    def agree(self, given: Any, expected: list[Tensor]) -> bool: ...

    def turns(self, module: nn.Module, given: Any, call: Call) -> bool: ...

    def is_cut(self, given: Any, right: list[Tensor]) -> bool: ...

    def look(self, given: Any, right: list[Tensor]) -> None: ...

    def replaced(self, given: Any, right: list[Tensor]) -> Any: ...


class _Lesson:
    """Teaches a module what upstream's received and returned, and appends what is seen to `points`.

    Receives:
        judge: compares and replaces.
        path: of the module.
        upstream: the path of upstream's.
        points: to which is appended.
    """

    def __init__(self, judge: Judge, path: str, upstream: str, points: list[Point]) -> None:
        self.judge, self.path, self.upstream, self.points = judge, path, upstream, points
        self.lessons = judge.calls.get(upstream, [])
        self.count: int = 0

    @property
    def place(self) -> tuple[str, str, int]:
        """Where the module is, and how often it ran before."""
        return self.path, self.upstream, self.count - 1


class LeafLesson(_Lesson):
    """Teaches a leaf."""

    has_other_size = is_turned = False
    received: Any = ()

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Before the leaf: what arrives is compared and replaced."""
        self.count += 1
        self.has_other_size = self.is_turned = False
        self.received = given = args, kwargs
        if self.count > len(self.lessons):
            return None
        judge, lesson = self.judge, self.lessons[self.count - 1]
        judge.look(given, lesson.received)
        called = self.upstream, self.count - 1
        # A leaf may be told by other means than upstream's, as a table of positions is by ids or by nothing at all.
        # What it returns is compared all the same.
        self.has_other_size = has_other_size(given, lesson.received)
        if self.has_other_size or is_alike(given, lesson.received):
            seen = judge.unread.righted(called, tensors_in(given), lesson.received)
            point = judge.compare(Where.RECEIVES, self.place, seen, lesson.received)
            self.is_turned = not point.agrees and not self.has_other_size and judge.turns(module, given, lesson)
            if not point.agrees and not self.is_turned:
                judge.unread.look(called, tensors_in(given), lesson.received)
            self.points.append(agreeing(point) if self.is_turned else point)
        with undispatched():
            return None if self.is_turned else judge.replaced(given, lesson.received)

    def leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Behind the leaf: what it returns is compared and replaced."""
        if self.count > len(self.lessons):
            return None
        judge, right, judged = self.judge, self.lessons[self.count - 1], output
        judge.look(output, right.returned)
        if self.has_other_size:
            judged = self._asked_again(module, output, right)
        point = judge.compare(Where.RETURNS, self.place, judged, right.returned)
        point = agreeing(point) if self.is_turned else point
        is_other = self.has_other_size and judged is not output
        is_taught = not point.agrees or is_other
        point = agreeing(point) if not point.agrees and self._is_laid_out(module, right) else point
        self.points.append(replace(point, is_way=self.has_other_size and not is_other))
        with undispatched():
            return judge.replaced(output, right.returned) if is_taught else None

    def _asked_again(self, module: nn.Module, output: Any, right: Call) -> Any:
        """What a leaf makes of what upstream's received: what it returned to another size says nothing about it."""
        with undispatched():
            again = asked(module, right.received)
            judged = right.returned if again is None else again
        is_once = self.judge.often.get(self.path, len(self.lessons)) == len(self.lessons)  # not once for each part
        if is_once and all(map(self.judge.is_cut, (self.received, output), (right.received, right.returned))):
            self.points[-1] = agreeing(self.points[-1])  # the same rows are left out before it, not behind it
        elif self.judge.agree(output, right.returned) or has_other_size(judged, right.returned):
            self.points[-1] = agreeing(self.points[-1])  # it does a part of what upstream's leaf does, as pads before
            return output
        return judged

    def _is_laid_out(self, module: nn.Module, right: Call) -> bool:
        """Whether a leaf is right, and only what it was given has another shape, as a picture that lies on its side."""
        given = tensors_in(self.received)
        if self.has_other_size or [t.shape for t in given] == [t.shape for t in right.received]:
            return False
        with undispatched():
            if not self.judge.agree(asked(module, right.received), right.returned):
                return False
        self.points[-1] = in_other_shape(self.points[-1], given, right.received)
        return True


class WholeLesson(_Lesson):
    """The same for a module that is no leaf: it is taught what fits, and what it returns is judged as a way."""

    is_taught = False

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Before the module: what arrives is compared and replaced, if it is of upstream's kind."""
        self.count += 1
        given = args, kwargs
        self.is_taught = self.count <= len(self.lessons) and is_alike(given, self.lessons[self.count - 1].received)
        if not self.is_taught:
            return None
        right = self.lessons[self.count - 1].received
        self.points.append(self.judge.compare(Where.RECEIVES, self.place, given, right))
        with undispatched():
            return self.judge.replaced(given, right)

    def leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Behind the module: what it returns is compared and replaced."""
        right = self.lessons[self.count - 1].returned if self.is_taught else []
        if not self.is_taught or not is_alike(output, right):
            return None
        point = self.judge.compare(Where.RETURNS, self.place, output, right)
        self.points.append(replace(point, is_way=True))
        with undispatched():
            return None if point.agrees else self.judge.replaced(output, right)


def undispatched() -> Any:
    """A tracer that is entered sees nothing of what is computed for a comparison."""
    return cast(Any, _python_dispatch)._disable_current_modes()


def is_alike(given: Any, right: list[Tensor]) -> bool:
    """Whether there are as many tensors of the same kinds and numbers of elements."""
    actual = tensors_in(given)
    return len(actual) == len(right) and all(
        t.numel() == r.numel() and t.is_floating_point() == r.is_floating_point()
        for t, r in zip(actual, right, strict=True)
    )


def asked(leaf: nn.Module, received: list[Tensor]) -> Any:
    """What a leaf makes of what upstream's received; None where it does not take it."""
    try:
        with torch.no_grad():
            return leaf.forward(*(tensor.clone() for tensor in received))
    except Exception:  # it takes more than tensors, or other ones
        return None


def has_other_size(given: Any, right: list[Tensor]) -> bool:
    """Whether a leaf receives tensors of another size, which it cannot be taught."""
    actual = tensors_in(given)
    kinds = {tensor.is_floating_point() for tensor in (*actual, *right)}
    return (
        len(kinds) == 1
        and len(actual) == len(right)
        and any(t.numel() != r.numel() for t, r in zip(actual, right, strict=True))
    )
