"""What the leaves of a model call: the functions of torch, seen and rewritten while they run.

A leaf is where a model computes, and its forward is a function that nobody can edit. But torch tells a function mode
of every call, so one of them can be made to do something else: a mask is dropped, a slice begins one further, a number
is another. That works on any module, whoever wrote it.
"""

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, is_dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from refiners.parity.modules import named_modules
from refiners.parity.mutants.planting import Edit, with_forward, with_members

Function = Callable[..., Any]
Change = Callable[[Function, Sequence[Any], dict[str, Any]], Any]
"""Called with the function, its arguments and its keyword arguments, instead of the function."""


@dataclass(frozen=True)
class Call:
    """One call of a function of torch that a leaf made."""

    name: str
    occurrence: int
    """How many calls of that name the leaf made before, in the same forward."""
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    output: Any

    def is_like(self, other: "Call") -> bool:
        """Whether another call, of another forward, stands in the same place and has the same numbers."""
        return (self.name, self.occurrence, self._numbers) == (other.name, other.occurrence, other._numbers)

    @property
    def _numbers(self) -> list[Any]:
        return [value for value in self.args if isinstance(value, int | float)]


@dataclass
class Seen:
    """What one node did in one forward of the model: in its first call, and what leaves called in later ones only."""

    args: tuple[Any, ...] = ()
    output: Any = None
    calls: list[Call] = field(default_factory=list[Call])
    times: int = 0
    reads: set[str] = field(default_factory=set[str])
    """The attributes of its own that a leaf read while it ran; `parameters.order` for a field of a dataclass."""
    writes: set[str] = field(default_factory=set[str])
    """Those that it wrote: a state, and nothing that it was built with."""


WATCHED_FORWARDS = 8
"""Of a leaf that runs more often (a solver, once a step) the calls of so many forwards are looked at."""


@dataclass
class _Running:
    """A node that is running, and how often it has called each function so far."""

    module: nn.Module
    seen: Seen
    is_watched: bool
    counts: Counter[str] = field(default_factory=Counter[str])


class _Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.stack: list[_Running] = []

    def __torch_function__(
        self, func: Function, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if self.stack and self.stack[-1].is_watched:
            running, name = self.stack[-1], name_of(func)
            occurrence = running.counts[name]
            running.counts[name] += 1
            call = Call(name, occurrence, args, kwargs or {}, output)
            # A later forward may take another way than the first: what only it calls is looked at as well.
            if running.seen.times == 1 or not any(call.is_like(other) for other in running.seen.calls):
                running.seen.calls.append(call)
        return output

    def spied(self, module: nn.Module) -> Edit:
        """The leaf notes which of its attributes are read while it runs."""

        def read(leaf: nn.Module, name: str) -> Any:
            value = object.__getattribute__(leaf, name)
            if name in _OF_EVERY_MODULE or not self.stack or self.stack[-1].module is not leaf:
                return value
            reads = self.stack[-1].seen.reads
            reads.add(name)
            return _spied_fields(value, name, reads) if is_dataclass(value) and not isinstance(value, type) else value

        def write(leaf: nn.Module, name: str, value: Any) -> None:
            if self.stack and self.stack[-1].module is leaf:
                self.stack[-1].seen.writes.add(name)
            kind.__setattr__(leaf, name, value)

        kind: Any = type(module)
        return with_members(module, __getattribute__=read, __setattr__=write)


_OF_EVERY_MODULE = frozenset((*nn.Module().__dict__, "__dict__", "__class__"))


def _spied_fields(value: Any, name: str, reads: set[str]) -> Any:
    """The same dataclass, which notes which of its fields are read."""
    kind = cast(Any, type(value))

    def read(given: Any, attribute: str) -> Any:
        reads.add(f"{name}.{attribute}")
        return object.__getattribute__(given, attribute)

    made = copy.copy(value)
    spied = type(kind.__name__, (kind,), {"__module__": kind.__module__, "__getattribute__": read})
    object.__setattr__(made, "__class__", spied)
    return made


def name_of(func: Function) -> str:
    """`softmax` for `torch.softmax`, `torch.nn.functional.softmax` and `Tensor.softmax`."""
    name = str(getattr(func, "__name__", type(func).__name__))
    return getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name


def _forget_states(seen: Mapping[str, Seen]) -> None:
    for node in seen.values():
        node.reads -= {name for name in node.reads if name.partition(".")[0] in node.writes}


def record(model: nn.Module, run: Callable[[], Any]) -> dict[str, Seen]:
    """What each node of a model does while `run` runs it, by path."""
    seen: dict[str, Seen] = {}
    recorder = _Recorder()

    def enter(path: str, is_leaf: bool) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            node = seen.setdefault(path, Seen(args))
            node.times += 1
            recorder.stack.append(_Running(module, node, is_leaf and node.times <= WATCHED_FORWARDS))

        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        node = recorder.stack.pop().seen
        if node.times == 1:
            node.output = output

    with ExitStack() as stack:
        for path, module in named_modules(model):
            is_leaf = not any(True for _ in module.children())
            if is_leaf:
                stack.callback(recorder.spied(module)())
            stack.callback(module.register_forward_pre_hook(enter(path, is_leaf)).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        with torch.no_grad(), recorder:
            run()
    _forget_states(seen)
    return seen


class _Rewrite(TorchFunctionMode):
    def __init__(self, name: str, occurrence: int, change: Change) -> None:
        super().__init__()
        self.name, self.occurrence, self.change = name, occurrence, change
        self.met = 0

    def __torch_function__(
        self, func: Function, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if name_of(func) == self.name:
            self.met += 1
            if self.met == self.occurrence + 1:
                return self.change(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def with_call(module: nn.Module, call: Call, change: Change) -> Edit:
    """In each forward of a leaf, one of its calls does something else."""

    def forward(original: Function, *args: Any, **kwargs: Any) -> Any:
        with _Rewrite(call.name, call.occurrence, change):
            return original(*args, **kwargs)

    return with_forward(module, forward)


_POSITIONS: dict[str, tuple[str, ...]] = {
    "scaled_dot_product_attention": ("query", "key", "value", "attn_mask", "dropout_p", "is_causal"),
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "group_norm": ("input", "num_groups", "weight", "bias", "eps"),
    "rms_norm": ("input", "normalized_shape", "weight", "eps"),
    "linear": ("input", "weight", "bias"),
    "conv1d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "conv2d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "conv_transpose2d": ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
    "interpolate": ("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias"),
    "embedding": ("input", "weight", "padding_idx"),
    "cat": ("tensors", "dim"),
    "concat": ("tensors", "dim"),
    "stack": ("tensors", "dim"),
    "normalize": ("input", "p", "dim", "eps"),
    "softmax": ("input", "dim"),
    "flatten": ("input", "start_dim", "end_dim"),
    "transpose": ("input", "dim0", "dim1"),
    "argmax": ("input", "dim"),
    "sum": ("input", "dim"),
    "mean": ("input", "dim"),
    "clamp": ("input", "min", "max"),
    "clip": ("input", "min", "max"),
    "hardtanh": ("input", "min_val", "max_val"),
    "linspace": ("start", "end", "steps"),
    "chunk": ("input", "chunks", "dim"),
    "split": ("tensor", "split_size_or_sections", "dim"),
    "unbind": ("input", "dim"),
    "pad": ("input", "pad", "mode", "value"),
}
KNOWN = frozenset(_POSITIONS)


def named(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a known function by their names."""
    return {**dict(zip(_POSITIONS[name], args, strict=False)), **kwargs}


def with_arguments(change: Callable[[dict[str, Any]], Mapping[str, Any]]) -> Change:
    """The call gets some other arguments: those that `change` makes of all of them, by name."""

    def changed(func: Function, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        name = name_of(func)
        given = named(name, args, kwargs)
        given |= change(given)
        positional = [given.pop(key) for key in _POSITIONS[name] if key in given] if _is_leading(name, given) else []
        return func(*positional, **given)

    return changed


def _is_leading(name: str, given: Mapping[str, Any]) -> bool:
    """Whether the arguments that have a position fill the first ones without a gap."""
    present = [key in given for key in _POSITIONS[name]]
    return all(present[: sum(present)])


def tensors(values: Sequence[Any]) -> list[Tensor]:
    """The tensors among some values."""
    return [value for value in values if isinstance(value, Tensor)]
