"""What runs inside of a model, leaf by leaf: operations, and the memory they take, to the byte.

PyTorch's dispatcher is asked for every ATen operation, below autograd, so backward passes are seen too. An operation
belongs to the innermost module that was running; one of a backward pass belongs to the module whose forward wrote it
into the graph, which its sequence number tells.

Memory is counted by storages: one that an operation returns and that none of its arguments had is an allocation, and a
weak reference tells when it is gone. So these bytes are those that a program asked for. What an operation takes and
gives back inside, such as a scratch buffer for each thread, is not seen, and neither is the rounding of an allocator:
both depend on the machine. The garbage collector is not needed and not run: what only it would free counts as kept.
"""

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OUTSIDE = "(outside of the model)"
ROOT = "(the model itself)"
# `torch.tensor` makes its storage out of sight, and hands it to this operation first.
FRESH = torch.ops.aten.lift_fresh.default


@dataclass
class Leaf:
    """What one module did itself, without what it called other modules for."""

    operations: Counter[str] = field(default_factory=Counter)
    calls: int = 0
    """How often the module was called."""
    allocations: int = 0
    bytes: int = 0
    kept: int = 0
    """Bytes of its allocations that are still alive."""

    def __bool__(self) -> bool:
        return bool(self.operations or self.allocations)


@dataclass
class Moment:
    """An allocation that is alive."""

    path: str
    operation: str
    bytes: int


class Watch(TorchDispatchMode):
    """Counts what happens while it is open.

    Attributes:
        leaves: What each module did, by its path.
        peak: The most bytes that were alive at once, of those allocated in here.
        held: What was alive then, the trace that names the leaf of each byte.
        left: What was alive when this was closed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.leaves: dict[str, Leaf] = {}
        self.current = self.peak = 0
        self.held: list[Moment] = []
        self.left: list[Moment] = []
        self._live: dict[int, tuple[Moment, Any]] = {}
        self._path: list[str] = [OUTSIDE]
        self._written_by: dict[int, str] = {}

    def leaf(self, path: str) -> Leaf:
        return self.leaves.setdefault(path, Leaf())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        path = self._whose()
        self.leaf(path).operations[str(func)] += 1
        given = set() if func is FRESH else {storage._cdata for storage in storages((args, kwargs))}
        output = func(*args, **(kwargs or {}))
        for storage in storages(output):
            self._note(storage, path, str(func), given)
        return output

    def _whose(self) -> str:
        node = torch._C._current_autograd_node()
        if node is not None:
            return self._written_by.get(node._sequence_nr(), OUTSIDE)
        # The node of this operation, if it has one, was numbered just before; later ones without leave it alone.
        self._written_by.setdefault(torch.autograd._get_sequence_nr() - 1, self._path[-1])
        return self._path[-1]

    def _note(self, storage: Any, path: str, operation: str, given: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        known = self._live.get(key)
        if known is None and key in given:
            return
        if known is None:
            leaf = self.leaf(path)
            leaf.allocations += 1
            moment = Moment(path, operation, 0)
            self._live[key] = moment, weakref.ref(storage, lambda _: self._forget(key))
        else:
            moment, leaf = known[0], self.leaf(known[0].path)
        more = size - moment.bytes  # a known one was resized, if any
        moment.bytes = size
        leaf.bytes += max(more, 0)
        leaf.kept += more
        self.current += more
        if self.current > self.peak:
            self.peak = self.current
            self.held = [moment for moment, _ in self._live.values()]

    def _forget(self, key: int) -> None:
        moment, _ = self._live.pop(key)
        self.current -= moment.bytes
        self.leaf(moment.path).kept -= moment.bytes

    @property
    def operations(self) -> Counter[str]:
        """All operations by name."""
        return sum((leaf.operations for leaf in self.leaves.values()), Counter())

    @property
    def allocations(self) -> int:
        return sum(leaf.allocations for leaf in self.leaves.values())

    @property
    def bytes(self) -> int:
        return sum(leaf.bytes for leaf in self.leaves.values())

    @property
    def calls(self) -> int:
        return sum(leaf.calls for leaf in self.leaves.values())

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.left = [moment for moment, _ in self._live.values()]
        # What is freed from now on changes nothing any more.
        self._live.clear()

    @contextmanager
    def inside(self, model: nn.Module) -> Generator[None]:
        """Follow the calls of the modules below a model, by hooks on all modules of the process."""
        paths = {id(module): path or ROOT for path, module in reversed([*named(model)])}

        def enter(module: nn.Module, _: Any) -> None:
            path = paths.get(id(module), self._path[-1])
            self.leaf(path).calls += 1
            self._path.append(path)

        def leave(module: nn.Module, *_: Any) -> None:
            self._path.pop()

        handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def named(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module under its path, the model itself first."""
    return model.named_modules(remove_duplicate=False)


def storages(values: Any) -> Iterator[Any]:
    """The storages of all tensors in a nest of tuples, lists and dicts."""
    for value in tree_leaves(values):
        if isinstance(value, Tensor):
            yield value.untyped_storage()


@contextmanager
def no_garbage_collection() -> Generator[None]:
    """Nothing is freed but by its last reference."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def watch(act: Callable[[], object], model: nn.Module | None = None) -> Watch:
    """What happens in an act; what it returns is dropped while this watches. Without a model, nothing has a path."""
    with no_garbage_collection(), Watch() as seen:
        if model is None:
            act()
        else:
            with seen.inside(model):
                act()
    return seen
