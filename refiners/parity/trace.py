"""A trace: everything one side computes in one forward, operation by operation, in fingerprints.

A dispatch mode sees each operation that torch runs, below autograd and below every module. Of its inputs and outputs
nothing but the number of their value is kept (see `fingerprint`), together with the module that was running, the
source line, and the arguments that are no tensors. A view costs nothing until somebody reads it.

    trace, outputs = record(model, lambda: model(x), Values())
    for operation in trace.operations:
        print(operation.name, trace.path_of(operation), operation.source)
"""

import itertools
import linecache
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from refiners.parity.fingerprint import Values
from refiners.parity.modules import named_modules

_TORCH = str(Path(torch.__file__).parent)
_TORCH_LAYERS = str(Path(_TORCH) / "nn" / "modules")
_CALLS = str(Path(_TORCH_LAYERS) / "module.py")
_OURS = str(Path(__file__).parent)
_FLUXION = str(Path(__file__).parent.parent / "fluxion")
_MACHINERY = tuple(str(Path(_FLUXION) / "layers" / f"{name}.py") for name in ("chain", "adapter", "branch", "module"))
_CALL_CODE = cast(Any, nn.Module)._call_impl.__code__


@dataclass(frozen=True, slots=True)
class Source:
    """A line of code."""

    file: str
    line: int

    @property
    def code(self) -> str:
        """The line as it is written."""
        return linecache.getline(self.file, self.line).strip()

    def __str__(self) -> str:
        parts = Path(self.file).parts
        short = parts[parts.index("site-packages") + 1 :] if "site-packages" in parts else parts[-3:]
        return f"{'/'.join(short)}:{self.line}"


@dataclass(frozen=True, slots=True)
class Slot:
    """Stands for a tensor among arguments: its place among the tensors of the operation."""

    place: int


def template_of(args: Any, kwargs: Any) -> Any:
    """Arguments without their tensors."""
    places = itertools.count()
    return fill_template((args, kwargs), Tensor, lambda _: Slot(next(places)))


def fill_template(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """The same nesting of dicts, lists and tuples with every object of a kind replaced."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, Mapping):
        items = cast(Mapping[Any, Any], value).items()
        return {key: fill_template(item, kind, function) for key, item in items}
    if isinstance(value, list | tuple):
        filled = [fill_template(item, kind, function) for item in cast(Sequence[Any], value)]
        return filled if isinstance(value, list) else tuple(filled)
    return value


@dataclass(slots=True)
class Operation:
    """One operation of torch."""

    index: int
    name: str
    """As torch calls it: `aten.native_layer_norm`."""
    call: int
    """The innermost module call it belongs to; -1 outside of all modules."""
    source: Source | None
    inputs: tuple[int, ...]
    """Numbers of the values of its tensors, in the order of its arguments."""
    outputs: tuple[int | None, ...]
    """The same of its results; None for a view that nobody has read."""
    arguments: str
    """All its arguments, with the shapes of tensors in place of their values."""
    dtypes: tuple[torch.dtype, ...]
    """Of its floating inputs and outputs."""
    function: Any = None
    template: Any = None
    """Its arguments and keyword arguments, with a `Slot` in place of each tensor."""

    def __str__(self) -> str:
        return f"{self.name.removeprefix('aten.')}{self.arguments}"


@dataclass(slots=True)
class ModuleCall:
    """One call of a module."""

    index: int
    path: str
    kind: str
    parent: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...] = ()


@dataclass
class Trace:
    """What one side did, in order."""

    operations: list[Operation] = field(default_factory=list[Operation])
    calls: list[ModuleCall] = field(default_factory=list[ModuleCall])
    outputs: dict[str, int] = field(default_factory=dict[str, int])
    """The numbers of the compared outputs."""
    weights: set[int] = field(default_factory=set[int])
    """The numbers of the parameters and buffers."""

    def path_of(self, operation: Operation) -> str:
        """The path of the module that ran an operation."""
        return self.calls[operation.call].path if operation.call >= 0 else ""

    def known(self) -> set[int]:
        """The numbers of all values that occur."""
        found = {number for op in self.operations for number in (*op.inputs, *op.outputs) if number is not None}
        found |= {number for call in self.calls for number in (*call.inputs, *call.outputs)}
        return found | self.weights | set(self.outputs.values())

    def outside_float64(self) -> list[Operation]:
        """Operations that compute on floats of less than 64 bits, although the model and its inputs have 64."""
        return [op for op in self.operations if any(d != torch.float64 and d.itemsize < 8 for d in op.dtypes)]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor of nested dicts, lists, tuples and records."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in cast(Mapping[Any, Any], value).values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in cast(Sequence[Any], value):
            yield from tensors_in(item)


def _told(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_told(item) for item in cast(Sequence[Any], value))}]"
    return repr(value)


class Tracer(TorchDispatchMode):
    """Records every operation that runs while it is entered.

    Receives:
        values: gives numbers to values; shared with the tracer of the other side.
        trace: what to fill.
        weights: the parameters and buffers of the model.
        read_views: fingerprint every view, not only those that somebody reads.
    """

    def __init__(
        self, values: Values, trace: Trace, weights: Sequence[Tensor] = (), *, read_views: bool = False
    ) -> None:
        cast(Any, super()).__init__()
        self.values, self.trace, self.read_views = values, trace, read_views
        self.stack: list[int] = []
        self._paused = False
        self._numbers: Any = WeakIdKeyDictionary()
        self._unread: Any = WeakIdKeyDictionary()
        self._weights: Any = WeakIdKeyDictionary()  # by identity, as torch compares tensors by elements
        for weight in weights:
            self._weights[weight] = True
        self._viewed: set[int] = set()

    @contextmanager
    def paused(self) -> Generator[None, None, None]:
        """What runs inside is not recorded."""
        before, self._paused = self._paused, True
        try:
            with torch.no_grad():
                yield
        finally:
            self._paused = before

    def number_of(self, tensor: Tensor) -> int:
        """The number of a tensor's value, computed once for each of its versions."""
        version = tensor._version
        known = cast(tuple[int, int] | None, self._numbers.get(tensor))
        if known is not None and known[0] == version:
            return known[1]
        with self.paused():
            number = self.values.number_of(tensor)
        self._numbers[tensor] = (version, number)
        unread = cast(tuple[Operation, int, int] | None, self._unread.pop(tensor, None))
        if unread is not None and unread[2] == version:
            operation, place, _ = unread
            operation.outputs = (*operation.outputs[:place], number, *operation.outputs[place + 1 :])
        return number

    def numbers_of_weights(self) -> set[int]:
        """The numbers of all weights that were read, and of their views."""
        read = cast(Iterator[Tensor], iter(self._weights))
        known = [cast(tuple[int, int] | None, self._numbers.get(tensor)) for tensor in read]
        return self._viewed | {number for found in known if found is not None for number in found[1:]}

    def numbers_in(self, value: Any) -> tuple[int, ...]:
        """The numbers of all tensors of a nesting."""
        return tuple(self.number_of(tensor) for tensor in tensors_in(value))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler, which takes seconds, for code that is never compiled

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        is_view = bool(func.is_view)
        inputs = () if is_view else self.numbers_in((args, kwargs))
        result = func(*args, **kwargs)
        results = list(tensors_in(result))
        operation = Operation(
            index=len(self.trace.operations),
            name=str(func).rsplit(".", 1)[0],
            call=self.stack[-1] if self.stack else -1,
            source=self._source(),
            inputs=inputs,
            outputs=(None,) * len(results),
            arguments=_arguments(args, kwargs),
            dtypes=tuple(t.dtype for t in (*tensors_in((args, kwargs)), *results) if t.is_floating_point()),
            function=func,
            template=template_of(args, kwargs),
        )
        self.trace.operations.append(operation)
        if is_view:
            self._take_view(operation, next(tensors_in(args)), results)
        elif "empty" in operation.name:
            pass  # what lies in memory by chance is no value
        elif func._schema.is_mutable:
            # Autograd counts the new version after this returns: what is cached now would be taken for the old one.
            operation.outputs = tuple(self.values.number_of(tensor) for tensor in results)
            for tensor in results:
                self._numbers.pop(tensor, None)
        else:
            operation.outputs = tuple(self.number_of(tensor) for tensor in results)
        return result

    def _take_view(self, operation: Operation, base: Tensor, views: list[Tensor]) -> None:
        """A view is fingerprinted when it is read. Views of views are one operation; those of weights are weights."""
        if base in self._weights:
            for place, view in enumerate(views):
                number = self.values.number_of_view(self.number_of(base), operation.name, operation.arguments, place)
                self._numbers[view] = (view._version, number)
                self._weights[view] = True
                self._viewed.add(number)
            operation.inputs = (self.number_of(base),)
            operation.outputs = self.numbers_in(views)
            return
        unread = cast(tuple[Operation, int, int] | None, self._unread.get(base))
        if unread is not None and unread[2] == base._version:
            before = unread[0]
            operation.inputs = before.inputs
            operation.name = f"{before.name} → {operation.name.removeprefix('aten.')}"
            operation.arguments = f"{before.arguments} → {operation.arguments}"
        else:
            operation.inputs = (self.number_of(base),)
        for place, view in enumerate(views):
            self._unread[view] = (operation, place, view._version)
        if self.read_views:
            _ = self.numbers_in(views)

    def _source(self) -> Source | None:
        """The line that asked for the operation: the model's own if there is one, else that of a layer of torch."""
        fallback: Source | None = None
        depth = len(self.stack)
        frame: FrameType | None = sys._getframe(2)  # pyright: ignore[reportPrivateUsage]  # no public way
        while frame is not None:
            code = frame.f_code
            file = code.co_filename
            if code is _CALL_CODE:
                depth -= 1
                if depth <= 0:
                    return fallback
            elif file.startswith(_FLUXION):
                if file not in _MACHINERY:
                    fallback = fallback or Source(file, frame.f_lineno)
            elif file.startswith(_TORCH_LAYERS) and file != _CALLS:
                fallback = fallback or Source(file, frame.f_lineno)
            elif not file.startswith((_TORCH, _OURS, "<")) and self.stack:
                return Source(file, frame.f_lineno)
            frame = frame.f_back
        return fallback


def _arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    told = [_told(arg) for arg in args]
    return f"({', '.join([*told, *(f'{key}={_told(value)}' for key, value in kwargs.items())])})"


@contextmanager
def _watched(model: nn.Module, tracer: Tracer) -> Generator[None, None, None]:
    """Calls of all modules of a model are recorded."""
    calls = tracer.trace.calls

    def hooks(path: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            parent = tracer.stack[-1] if tracer.stack else -1
            call = ModuleCall(len(calls), path, type(module).__name__, parent, tracer.numbers_in((args, kwargs)))
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
    model: nn.Module, run: Callable[[], Mapping[str, Tensor]], values: Values, *, read_views: bool = False
) -> tuple[Trace, dict[str, Tensor]]:
    """Traces one run of a model.

    Receives:
        model: whose modules are named in the trace.
        run: calls it and names its outputs.
        values: shared with the trace of the other side.
        read_views: fingerprint every view, not only those that somebody reads; slower, and finer.

    Returns:
        The trace, and the outputs.
    """
    trace = Trace()
    tracer = Tracer(values, trace, [*model.parameters(), *model.buffers()], read_views=read_views)
    with _watched(model, tracer):
        with tracer:
            outputs = dict(run())
        trace.outputs = {name: tracer.number_of(tensor) for name, tensor in outputs.items()}
        trace.weights = tracer.numbers_of_weights()
    return trace, outputs
