"""A check that cannot fail is a defect: a fault for every check of the suites, which has to turn it red."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import safetensors.torch
import torch
from diffusers import DDIMScheduler
from torch import nn

import refiners.fluxion.layers as fl
from benchmarks import subjects
from benchmarks import test_framework as framework
from benchmarks import test_import as imports
from benchmarks import test_loading as loading
from benchmarks import test_solvers as steps
from benchmarks.engine.contestants import Contest
from benchmarks.engine.figures import Verdict
from benchmarks.engine.memory import MEBIBYTE

file = loading.file
BUDGET = 1.0


class Careful(fl.Chain):
    """Calls each layer through a method that looks it up by its name, and has a message ready should it fail."""

    def forward(self, *args: Any) -> Any:
        for name, _ in self.named_layers():
            args = self._call(name, args)
        return args[0]

    def _call(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        message = f"{name} of {', '.join(self._modules)} failed."
        try:
            return self._as_tuple(self.layer(name)(*args))
        except RuntimeError as error:
            raise RuntimeError(message) from error

    def _as_tuple(self, output: Any) -> tuple[Any, ...]:
        return output if isinstance(output, tuple) else (output,)


class Climbing(fl.Chain):
    """Looks for its root in every forward, so that a level costs more the deeper it lies."""

    def forward(self, *args: Any) -> Any:
        above = self.parent
        while above is not None:
            above = above.parent
        return super().forward(*args)


class Counting(fl.Chain):
    """Counts for longer the deeper it lies.

    In one call of C that takes no memory: where a chunk of CPython's stack ends, every call of Python costs a system
    call, and so do large blocks of memory at some sizes, so that depths which happen to meet either look slow.
    """

    depth: ClassVar[int] = 0

    def forward(self, *args: Any) -> Any:
        Counting.depth += 1
        sum(range(100 * Counting.depth))
        try:
            return super().forward(*args)
        finally:
            Counting.depth -= 1


class Copying(fl.Chain):
    """One operation more."""

    def forward(self, *args: Any) -> Any:
        return super().forward(args[0] + 0)


class Declaring(fl.Chain):
    """Has a context, though nobody reads it."""

    def init_context(self) -> dict[str, dict[str, Any]]:
        return {"unread": {"x": None}}


class Naming(fl.Chain):
    """Names all of its children after every append."""

    def append(self, module: nn.Module) -> None:
        super().append(module)
        self.key_of(module)


class Listing(fl.Chain):
    """Looks at the classes of all children for each of them, when it is built."""

    def __init__(self, *modules: Any) -> None:
        super().__init__(*modules)
        for module in modules:
            [type(other) is type(module) for other in modules]


class Searching(subjects.Beside):
    """Searches the tree from its start for its place."""

    def inject(self, parent: Any = None) -> Any:
        next(place for module, place in parent.walk() if module is self.target)
        return super().inject(parent)


def search_all(tree: Any) -> None:
    for layer in tree.layers(fl.Linear):
        next(module for module, _ in tree.walk(recurse=True) if module is layer)


def attach_and_search(subject: tuple[Any, Any]) -> None:
    search_all(subject[0])
    subjects.attach_loras(subject)


def attach_and_print(subject: tuple[Any, Any]) -> None:
    for _ in range(30):
        repr(subject[0])
    subjects.attach_loras(subject)


TIMED: dict[str, Callable[[], Contest]] = {
    "flat": lambda: framework.against_sequential(subjects.flat, 0.85, Careful),
    "binary": lambda: framework.against_sequential(subjects.binary, 1.05, Careful),
    "spine": lambda: framework.against_sequential(subjects.spine, 1.05, Counting),
    "depth": lambda: framework.forward_by_depth(Counting),
    "append": lambda: framework.append(Naming, n=150),
    "inject_and_eject": lambda: framework.inject_and_eject(Searching, n=250),
    "loras": lambda: framework.attach(attach_and_search, n=400),
    "seconds_of_loras": lambda: framework.seconds_of_attaching(attach_and_print),
    "reading": lambda: framework.reading(search_all, n=60),
    "building": lambda: framework.build_chains(Listing),
    "solver": lambda: steps.against(*reversed(steps.samplings(DDIMScheduler()))),  # upstream in the place of the port
    "import": lambda: imports.importing("import refiners.fluxion.layers; sum(range(10_000_000))", fewest=2),
}


@pytest.mark.timed
@pytest.mark.parametrize("fault", TIMED.values(), ids=TIMED.keys())
@torch.no_grad()
def test_a_slow_one_is_missed(fault: Callable[[], Contest]) -> None:
    assert fault().figure(BUDGET).verdict is Verdict.MISSED


COUNTED: dict[str, Callable[[], float]] = {
    "calls_per_layer": lambda: framework.extra_calls_per_layer(Careful),
    "calls_of_nested": lambda: framework.nested_calls(Careful) - framework.nested_calls(nn.Sequential),
    "calls_of_depth": lambda: framework.extra_calls_of_depth(Climbing),
    "calls_of_edits": lambda: (
        framework.growth_of_calls(framework.inject_and_eject(Searching, n=100)) - framework.EXACTLY
    ),
    "calls_of_loras": lambda: framework.growth_of_calls(framework.attach(attach_and_search, n=100)) - framework.EXACTLY,
    "operations": lambda: framework.extra_operations(Copying),
    "providers": lambda: framework.entered_providers(Declaring) - 1,
    "packages": lambda: len(imports.packages("import refiners.fluxion.layers, rich") - imports.NEEDED),
}


@pytest.mark.parametrize("fault", COUNTED.values(), ids=COUNTED.keys())
@torch.no_grad()
def test_one_more_is_counted(fault: Callable[[], float]) -> None:
    assert fault() > 0


def read_and_copy(path: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load(path.read_bytes())


@loading.only_on_linux
def test_a_reader_that_copies_is_counted(file: Path) -> None:
    size = sum(tensor.nbytes for tensor in read_and_copy(file).values())
    assert loading.copied_bytes(read_and_copy, file) == size


@pytest.mark.timed
def test_a_reader_that_copies_is_missed(file: Path) -> None:
    pair = loading.against(Path.read_bytes, read_and_copy, file, limit=1.00)
    assert pair.figure(BUDGET).verdict is Verdict.MISSED


COPY = "model = model.to_empty(device='cpu'); model.load_state_dict(safetensors.torch.load_file({path!r}))"


@loading.only_on_linux
def test_a_loader_that_copies_has_memory_of_its_own(file: Path) -> None:
    assert loading.memory(file, "meta", COPY).own > loading.SMALL * MEBIBYTE


@pytest.mark.parametrize("device", ["cpu", "meta"])
@loading.only_on_linux
def test_a_loader_that_copies_raises_the_peak(file: Path, device: str) -> None:
    copy = COPY if device == "meta" else COPY.partition("; ")[2]
    assert loading.peak_beyond(file, device, copy) > loading.SMALL * MEBIBYTE
