"""What a failing forward says.

The innermost Chain whose child fails raises one `ChainError` from the original exception. It shows the whole tree with
the failing child marked, the arguments, and the part of the traceback that is not this framework's.
"""

import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils._pytree import tree_leaves  # pyright: ignore[reportUnknownVariableType] (torch has no stubs here)

from refiners.errors import ChainError
from refiners.fluxion.layers.branch import Branch
from refiners.fluxion.layers.tree import ModuleTree

_LAYERS = Path(__file__).parent
_FRAMEWORK = ("adapter", "branch", "chain", "combinators", "context_access", "failure", "functions", "module", "slots")
_FRAMEWORK_FILES = frozenset(
    [str(_LAYERS / f"{name}.py") for name in _FRAMEWORK]
    + [str(_LAYERS.parent / "context.py"), nn.Module.__call__.__code__.co_filename]
)
_MAX_TREE_LINES = 20
_MAX_DEPTH = 40


def chain_error(chain: Branch, child: nn.Module | None, args: Any, error: Exception) -> ChainError:
    """The error of a forward in which `child` (or the Chain itself, if None) failed on `args`."""
    inputs = cast(tuple[Any, ...], args) if isinstance(args, tuple) else (args,)
    failing = chain if child is None else child
    path = chain.get_path() if child is None else f"{chain.get_path()}.{chain.key_of(child)}"
    parts = [
        f"{type(error).__name__}: {error}",
        _own_traceback(error),
        f"At {path}:",
        marked_tree(chain, failing),
        describe_arguments(inputs),
    ]
    return ChainError("\n\n".join(part for part in parts if part))


def describe_arguments(args: Sequence[Any]) -> str:
    """One line for each argument, and for each item inside one."""
    leaves: list[Any] = tree_leaves(list(args))
    return "\n".join(f"{i}: {_describe(leaf)}" for i, leaf in enumerate(leaves)) or "(no arguments)"


def marked_tree(chain: Branch, failing: nn.Module) -> str:
    """The tree from the root, with `>>>` at the failing module: at most 20 lines around it."""
    root: Branch = chain
    keys = [] if failing is chain else [chain.key_of(failing) or ""]
    # A very deep tree is shown from a node near the failing one.
    while root.parent is not None and len(keys) < _MAX_DEPTH and (key := root.parent.key_of(root)) is not None:
        keys.append(key)
        root = root.parent
    place = ".".join(reversed(keys))

    def mark(module: nn.Module, path: str) -> str | None:
        return (path or type(module).__name__) if path == place and module is failing else None

    tree = ModuleTree(root, mark)
    picture = tree.generate_tree_repr(tree.root)
    lines = picture.splitlines()
    index = next((i for i, line in enumerate(lines) if ">>> " in line), 0)
    return tree.shorten_tree_repr(picture, line_index=index, max_lines=_MAX_TREE_LINES)


def _own_traceback(error: Exception) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename not in _FRAMEWORK_FILES]
    return "".join(traceback.format_list(frames)).rstrip()


def _describe(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        try:
            text = repr(value)
        except Exception as error:  # the failure to explain is another one
            text = f"its repr raises {type(error).__name__}"
        return f"{type(value).__name__}({text if len(text) <= 80 else text[:77] + '...'})"
    from refiners.fluxion.utils import summarize_tensor

    return summarize_tensor(value)
