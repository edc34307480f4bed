"""What `torch.compile` makes of a model: how many graphs, where it breaks off, and what makes it compile again."""

import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import nn
from torch._dynamo.utils import counters

# Calls after the first: none of them may need a graph of its own.
AGAIN = 2
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in ')
_CHILD = re.compile(r"\.(?:__dict__\[')?_modules(?:'\])?\['([^']+)'\]")


@dataclass
class Compiled:
    """What compiling took."""

    graphs: int = 0
    recompilations: int = 0
    breaks: int = 0
    why: list[str] = field(default_factory=list[str])
    """The first break and the first recompilation, with the leaf and the line."""


def compiling(model: nn.Module, act: Callable[[], object]) -> Compiled:
    """Compile a model in place, run an act that calls it some times, and undo that.

    The backend runs each graph as it is: what is counted is decided before any kernel is generated.
    """
    graphs: list[Any] = []
    with _compiled(model, graphs):
        counters.clear()
        act()
        found = Compiled(graphs=len(graphs), breaks=sum(counters["graph_break"].values()))
        for _ in range(AGAIN):
            act()
        found.recompilations = len(graphs) - found.graphs
    if found.breaks:
        found.why.append(f"breaks at {_where_it_breaks(model, act)}")
    if found.recompilations:
        found.why.append(f"compiled again because {_why_again(model, act)}")
    return found


@contextmanager
def _compiled(model: nn.Module, graphs: list[Any], **options: Any) -> Generator[None]:
    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    model.compile(backend=backend, **options)
    try:
        yield
    finally:
        model._compiled_call_impl = None
        torch.compiler.reset()


def _where_it_breaks(model: nn.Module, act: Callable[[], object]) -> str:
    """The leaf and the line of the first break: the end of what PyTorch tells when it may not break."""
    with _compiled(model, [], fullgraph=True):
        try:
            act()
        except Exception as error:
            told = _text_of(error)
            frames = [*_FRAME.finditer(told.partition("from user code")[2])]
            if not frames:
                return told.strip().splitlines()[0]
            file, line = frames[-1]["file"], int(frames[-1]["line"])
            reason = told.strip().splitlines()[0]
            return f"{_leaf_at(model, file, line)} ({Path(file).name}:{line}): {reason}"
    return "another place in each run"


def _text_of(error: BaseException) -> str:
    """What the first cause says: a Chain may have explained it in its own words."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error)


def _leaf_at(model: nn.Module, file: str, line: int) -> str:
    """The module whose forward holds a line, the first one if there are several."""
    for path, module in model.named_modules():
        code = getattr(type(module).forward, "__code__", None)
        if code is None or code.co_filename != file:
            continue
        last = max(number for _, _, number in code.co_lines() if number is not None)
        if code.co_firstlineno <= line <= last:
            return path or type(module).__name__
    return "a function"


def _why_again(model: nn.Module, act: Callable[[], object]) -> str:
    """The guard that failed, which names the module."""
    with _compiled(model, []):
        act()
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(AGAIN):
                try:
                    act()
                except Exception as error:
                    lines = [line.strip() for line in _text_of(error).splitlines() if line.strip()]
                    guard = next((line for line in lines if line.startswith("- ")), lines[0])
                    return _CHILD.sub(r".\1", guard).removeprefix("- ")
    return "of something else in each run"
