"""What `torch.compile` makes of a model: how many graphs, where it breaks off, and what makes it compile again.

Why is told by the same runs that count. Asking once more, under `fullgraph=True` or `error_on_recompile`, would be
simpler, but an error while compiling leaves torch 2.13's evaluator of frames in the process for good: from then on
CPython copies the arguments of every call, and what a caller has let go of lives on until the call returns.
"""

import logging
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import nn
from torch._dynamo.symbolic_convert import graph_break_log
from torch._dynamo.utils import counters

# Calls after the first: none of them may need a graph of its own.
AGAIN = 2
_BREAK = re.compile(r"in user code at (?P<file>.+):(?P<line>\d+)\nGraph Break Reason: (?P<reason>.*)")
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
    failed_guards: list[str] = []
    with _compiled(model, graphs, failed_guards), _told_breaks() as breaks:
        counters.clear()
        act()
        found = Compiled(graphs=len(graphs), breaks=sum(counters["graph_break"].values()))
        for _ in range(AGAIN):
            act()
        found.recompilations = len(graphs) - found.graphs
    if found.breaks:
        found.why.append(f"breaks at {_where_it_breaks(model, breaks)}")
    if found.recompilations:
        found.why.append(f"compiled again because {_guard(failed_guards)}")
    return found


@contextmanager
def _compiled(model: nn.Module, graphs: list[Any], failed_guards: list[str]) -> Generator[None]:
    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled: Any = torch._dynamo.optimize(backend, guard_fail_fn=lambda failure: failed_guards.append(failure.reason))
    model._compiled_call_impl = compiled(model._call_impl)
    try:
        yield
    finally:
        model._compiled_call_impl = None
        torch.compiler.reset()


@contextmanager
def _told_breaks() -> Generator[list[str]]:
    """What PyTorch logs of each graph break; nothing of it is shown."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    level, propagates, disabled = graph_break_log.level, graph_break_log.propagate, logging.root.manager.disable
    graph_break_log.addHandler(handler)
    graph_break_log.setLevel(logging.DEBUG)
    graph_break_log.propagate = False
    logging.disable(logging.NOTSET)
    try:
        yield told
    finally:
        logging.disable(disabled)
        graph_break_log.removeHandler(handler)
        graph_break_log.setLevel(level)
        graph_break_log.propagate = propagates


def _where_it_breaks(model: nn.Module, told: list[str]) -> str:
    """The leaf and the line of the first break, and what PyTorch says of it."""
    found = next(filter(None, map(_BREAK.search, told)), None)
    if found is None:
        return told[0].strip().splitlines()[0] if told else "a place that PyTorch does not tell"
    file, line = found["file"], int(found["line"])
    return f"{_leaf_at(model, file, line)} ({Path(file).name}:{line}): {found['reason']}"


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


def _guard(failed: list[str]) -> str:
    """The first guard that failed, which names the module."""
    if not failed:
        return "of something else in each run"
    return _CHILD.sub(r".\1", failed[0].strip().splitlines()[0])
