"""A trace: everything one side computes in one forward and backward, operation by operation, in fingerprints.

A dispatch mode sees each operation that torch runs, below autograd and below every module. Of its inputs and outputs
nothing but the number of their value is kept (see `fingerprint`), together with the module that was running, the
source line, and the arguments that are no tensors. A view costs nothing until somebody reads it. An operation of the
backward pass belongs to the module and the line of the one whose gradient it computes.

    trace, outputs = record(model, lambda: model(x), Values())
    for operation in trace.operations:
        print(operation.name, trace.path_of(operation), operation.source)
"""

import sys
import weakref
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from refiners.parity.fingerprint import Fingerprint, Values, fingerprint
from refiners.parity.modules import named_modules
from refiners.parity.operations import (
    ModuleCall,
    Operation,
    Source,
    Trace,
    facts_of,
    floats_in,
    taken_apart,
    tensors_in,
)
from refiners.parity.written import Cut, Whole, is_filled, put_into, whole_of

_TORCH = str(Path(torch.__file__).parent)
_TORCH_LAYERS = str(Path(_TORCH) / "nn" / "modules")
_CALLS = str(Path(_TORCH_LAYERS) / "module.py")
_OURS = str(Path(__file__).parent)
_FLUXION = str(Path(__file__).parent.parent / "fluxion")
_MACHINERY = tuple(str(Path(_FLUXION) / "layers" / f"{name}.py") for name in ("chain", "adapter", "branch", "module"))
READ_BELOW = 1 << 20
"""Bytes below which a view of a weight is read."""
_engine = cast(Any, torch)._C
_CALL_CODE = cast(Any, nn.Module)._call_impl.__code__


class _Known:
    """What a tracer knows of one tensor, which it does not keep alive."""

    __slots__ = ("cut", "digest", "is_blank", "is_weight", "maker", "number", "reference", "unread", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.reference = weakref.ref(tensor)
        self.version = -1  # none: it was not read
        self.number = 0
        self.digest = b""
        self.unread: tuple[Operation, int, int, bytes] | None = None
        """For a view that nobody has read: what made it, which result it is, its version, its digest if known."""
        self.is_weight = False
        """Whether it is a parameter or a buffer, or a view of one."""
        self.maker = -1
        """The index of the operation that returned it last."""
        self.is_blank = False
        """Whether it was made without a value."""
        self.cut: Cut | None = None
        """For a view: how it was cut."""


class Tracer(TorchDispatchMode):
    """Records every operation that runs while it is entered.

    Receives:
        values: gives numbers to values; shared with the tracer of the other side.
        trace: what to fill.
        weights: the parameters and buffers of the model.
        read_views: fingerprint every view, not only those that somebody reads.
        keep: numbers of values that are kept when an operation reads them.
    """

    def __init__(
        self,
        values: Values,
        trace: Trace,
        weights: Sequence[Tensor] = (),
        *,
        read_views: bool = False,
        keep: Collection[int] = (),
    ) -> None:
        cast(Any, super()).__init__()
        self.values, self.trace, self.read_views, self.keep = values, trace, read_views, keep
        self.kept: dict[int, Tensor] = {}
        self.stack: list[int] = []
        self._paused = False
        self._of_id: dict[int, _Known] = {}
        self._weights = list(weights)
        for weight in weights:
            self._known(weight).is_weight = True
        self._viewed: set[int] = set()
        self._by_sequence: dict[int, int] = {}

    def _known(self, tensor: Tensor) -> _Known:
        """What is known of a tensor. Torch compares tensors by elements and Python gives an id away again."""
        known = self._of_id.get(id(tensor))
        if known is None or known.reference() is not tensor:
            known = self._of_id[id(tensor)] = _Known(tensor)
        return known

    def number_of(self, tensor: Tensor, version: int | None = None) -> int:
        """The number of a tensor's value, computed once for each of its versions.

        Receives:
            tensor: of which the number is asked.
            version: of a view that is just made, which will count with the tensor it is of, and does not yet.
        """
        known, version = self._known(tensor), tensor._version if version is None else version
        if known.version == version:
            return known.number
        before, self._paused = self._paused, True
        unread, known.unread = known.unread, None
        try:
            digest = unread[3] if unread is not None and unread[2] == version else b""
            if known.is_weight:
                number = self.values.number_of_weight(tensor)
            else:
                key = Fingerprint(tensor.dtype, tuple(tensor.shape), digest) if digest else fingerprint(tensor)
                number, digest = self.values.number_of(tensor, key), key.digest
        finally:
            self._paused = before
        known.version, known.number, known.digest = version, number, digest
        if unread is not None and unread[2] == version:
            operation, place = unread[:2]
            operation.outputs = (*operation.outputs[:place], number, *operation.outputs[place + 1 :])
        return number

    def numbers_of_weights(self) -> set[int]:
        """The numbers of all weights that were read, and of their views."""
        return self._viewed | {self._known(weight).number for weight in self._weights if self.has_read(weight)}

    def has_read(self, tensor: Tensor) -> bool:
        """Whether some operation read a tensor, or a view of it."""
        return self._known(tensor).version >= 0

    def numbers_in(self, value: Any) -> tuple[int, ...]:
        """The numbers of all tensors of a nesting."""
        return tuple(self.number_of(tensor) for tensor in tensors_in(value))

    def makers_of(self, tensors: Sequence[Tensor]) -> tuple[int, ...]:
        """The indices of the operations that returned tensors, of which others may have the same value."""
        return tuple(self._known(tensor).maker for tensor in tensors)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, which takes seconds, for code that is never compiled

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        name, is_view, is_mutable = facts_of(func)
        given, template = taken_apart(args, kwargs)
        inputs = () if is_view else tuple(map(self.number_of, given))
        origin = self._origin()
        self._keep(inputs, given)
        whole = self._whole(given) if is_mutable and self.read_views else None
        result = func(*args, **kwargs)
        results = tensors_in(result)
        operation = Operation(
            index=len(self.trace.operations),
            name=name,
            call=origin.call if origin else self.stack[-1] if self.stack else -1,
            source=origin.source if origin else self._source(),
            inputs=inputs,
            outputs=(None,) * len(results),
            tensors=tuple((tensor.dtype, tuple(tensor.shape)) for tensor in given),
            given=floats_in(given),
            made=next(iter(floats_in(results[:1])), None),
            is_view=is_view,
            backward_of=origin.index if origin else None,
            function=func,
            template=template,
            makers=self.makers_of(given) if self.read_views else (),
        )
        self.trace.operations.append(operation)
        if is_view:
            self._take_view(operation, given[0], results)
            self._keep(operation.inputs, given)
        elif "empty" in name and not (self.read_views and is_filled(operation, results)):
            for tensor in results:  # what lies in memory by chance is no value
                self._known(tensor).is_blank = True
        elif is_mutable:
            # Autograd counts the new version after this returns: what is cached now would be taken for the old one.
            operation.outputs = tuple(self.values.number_of(tensor) for tensor in results)
            for tensor in results:
                self._known(tensor).version = -1
            if whole is not None and results:
                self._take_whole(operation, whole, results[0])
        else:
            operation.outputs = tuple(self.number_of(tensor) for tensor in results)
        self._keep(operation.outputs, results)
        for tensor in results:
            self._known(tensor).maker = max(operation.index, self._known(tensor).maker)
        return result

    def _keep(self, numbers: Sequence[int | None], tensors: Sequence[Tensor]) -> None:
        for number, tensor in zip(numbers, tensors, strict=False) if self.keep else ():
            if number is not None and number in self.keep and number not in self.kept:
                before, self._paused = self._paused, True
                self.kept[number] = tensor.detach().clone()
                self._paused = before

    def _whole(self, given: Sequence[Tensor]) -> Whole | None:
        """What the first tensor is a part of, before it is written to."""
        base = whole_of(given[0], self._known(given[0]).cut) if given else None
        if base is None or self._known(base).is_blank or self._known(base).is_weight:
            return None
        number = self.number_of(base)
        self._keep((number,), (base,))
        return Whole(base, number, self._known(base).maker, *put_into(base, given[0], self._known(given[0]).cut))

    def _take_whole(self, operation: Operation, whole: Whole, part: Tensor) -> None:
        """One more operation, which makes the whole out of what it was and of the part that was written."""
        before, self._paused = self._paused, True
        number = self.values.number_of(whole.tensor)
        self._paused = before
        self._known(whole.tensor).version = -1
        given, template = whole.joined(part)
        made = replace(
            operation,
            index=len(self.trace.operations),
            name=str(whole.function).rsplit(".", 1)[0],
            inputs=(whole.number, cast(int, operation.outputs[0])),
            outputs=(number,),
            tensors=tuple((tensor.dtype, tuple(tensor.shape)) for tensor in given),
            given=floats_in(given),
            function=whole.function,
            template=template,
            makers=(whole.maker, operation.index),
        )
        self.trace.operations.append(made)
        self._known(whole.tensor).maker = made.index
        self._keep((number,), (whole.tensor,))

    def _origin(self) -> Operation | None:
        """On the way back: the operation of the forward that autograd is at, by the number that autograd gave it."""
        node = _engine._current_autograd_node()
        if node is None:
            self._by_sequence.setdefault(_engine._autograd._get_sequence_nr() - 1, len(self.trace.operations))
            return None
        index = self._by_sequence.get(node._sequence_nr())
        return None if index is None else self.trace.operations[index]

    def _take_view(self, operation: Operation, base: Tensor, views: list[Tensor]) -> None:
        """A view is fingerprinted when it is read. Views of views are one operation; those of weights are weights."""
        known = self._known(base)
        for view in views if self.read_views else ():
            self._known(view).cut = Cut(weakref.ref(base), operation.function, operation.template[0][1:])
        if known.is_weight:
            for place, view in enumerate(views):
                number = self._number_of_view(operation, base, view, place)
                of_view = self._known(view)
                of_view.version, of_view.number, of_view.is_weight = base._version, number, True
                self._viewed.add(number)
            operation.inputs = (self.number_of(base),)
            operation.outputs = tuple(self.number_of(view, base._version) for view in views)
            return
        unread = known.unread
        if unread is not None and unread[2] == base._version:
            before, digest = unread[0], unread[3]
            operation.inputs = before.inputs
            operation.name = f"{before.name} → {operation.name.removeprefix('aten.')}"
            operation.before = before
        else:
            operation.inputs = (self.number_of(base),)
            digest = known.digest
        for place, view in enumerate(views):
            own = digest if _holds_all(view, base) else b""
            self._known(view).unread = (operation, place, base._version, own)
        if self.read_views:
            _ = tuple(self.number_of(view, base._version) for view in views)

    def _number_of_view(self, operation: Operation, base: Tensor, view: Tensor, place: int) -> int:
        """A small part of a weight or of a table is read: the other side may compute it, or cut it in another way."""
        number = self.number_of(base)
        if view.nbytes >= READ_BELOW:
            return self.values.number_of_view(number, operation.name, operation.arguments, place)
        before, self._paused = self._paused, True
        try:
            return self.values.number_of(view)
        finally:
            self._paused = before

    def _source(self) -> Source | None:
        """The line that asked for the operation: the model's own if there is one, else that of a layer of torch."""
        fallback: Source | None = None
        depth = len(self.stack)
        frame: FrameType | None = sys._getframe(2)  # pyright: ignore[reportPrivateUsage]  # no public way
        while frame is not None:
            code = frame.f_code
            if code is _CALL_CODE:
                depth -= 1
                if depth <= 0:
                    return fallback
            elif (room := _room_of(code.co_filename)) == "layer":
                fallback = fallback or Source(code.co_filename, frame.f_lineno)
            elif room == "model" and self.stack:
                return Source(code.co_filename, frame.f_lineno)
            frame = frame.f_back
        return fallback


@cache
def _room_of(file: str) -> Literal["layer", "model", "machinery"]:
    """Whose code a file holds: a layer's, of torch or of ours, a model's, or nobody's that asks for operations."""
    if file.startswith(_FLUXION):
        return "machinery" if file in _MACHINERY else "layer"
    if file.startswith(_TORCH_LAYERS) and file != _CALLS:
        return "layer"
    return "machinery" if file.startswith((_TORCH, _OURS, "<")) else "model"


def _holds_all(view: Tensor, base: Tensor) -> bool:
    """Whether a view has all bytes of its base in their order, so that it needs not be read again."""
    whole = view.is_contiguous() and base.is_contiguous() and view.nbytes == base.nbytes
    return whole and not (view.is_conj() or view.is_neg() or base.is_conj() or base.is_neg())


@contextmanager
def _watched(model: nn.Module, tracer: Tracer) -> Generator[None, None, None]:
    """Calls of all modules of a model are recorded."""
    calls = tracer.trace.calls

    def hooks(path: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            parent = tracer.stack[-1] if tracer.stack else -1
            call = ModuleCall(len(calls), path, type(module).__name__, parent, tracer.numbers_in((args, kwargs)))
            call.makers = tracer.makers_of(tensors_in((args, kwargs)))
            calls.append(call)
            tracer.stack.append(call.index)

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            calls[tracer.stack.pop()].outputs = tracer.numbers_in(output)

        return enter, leave

    with ExitStack() as stack:
        for path, module in named_modules(model):
            enter, leave = hooks(path)
            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield


def record(
    model: nn.Module,
    run: Callable[[], Mapping[str, Tensor]],
    values: Values,
    *,
    read_views: bool = False,
    gradients: bool = False,
    keep: Collection[int] = (),
    kept: dict[int, Tensor] | None = None,
) -> tuple[Trace, dict[str, Tensor]]:
    """Traces one run of a model.

    Receives:
        model: whose modules are named in the trace.
        run: calls it and names its outputs.
        values: shared with the trace of the other side.
        read_views: fingerprint every view, not only those that somebody reads; slower, and finer.
        gradients: `run` goes back as well; the numbers of what it leaves in `grad` are put into the trace.
        keep, kept: numbers of values that are wanted, and where to put them.

    Returns:
        The trace, and the outputs.
    """
    trace = Trace()
    tracer = Tracer(values, trace, [*model.parameters(), *model.buffers()], read_views=read_views, keep=keep)
    with _watched(model, tracer):
        with tracer:
            outputs = dict(run())
        trace.outputs = {name: tracer.number_of(tensor) for name, tensor in outputs.items()}
        if kept is not None:
            kept.update(tracer.kept)
        given = [(name, parameter.grad) for name, parameter in model.named_parameters() if gradients]
        trace.gradients = {name: tracer.number_of(gradient) for name, gradient in given if gradient is not None}
        trace.weights = tracer.numbers_of_weights()
        state = model.state_dict(keep_vars=True)
        trace.unread = tuple(key for key, tensor in state.items() if tensor.numel() and not tracer.has_read(tensor))
    return trace, outputs
