"""A case: everything needed to run an upstream model and its port side by side, as data.

The engine knows no model. It is handed two builders of `torch.nn.Module`, the map between their weights, one set of
inputs, and two functions that run a model and name its outputs. It calls them in this order, once per lane:

1. both builders, on the CPU, under the lane's dtype as torch's default dtype and a fixed seed;
2. `eval()`, the move to the lane's device, weights into upstream, then `key_map.convert(...)` into the port, assigned
   so that both sides read the same storages;
3. `run_upstream` and `run_port`, each on its own copy of the inputs, then one backward of each.

A module that holds cases exposes `CASES`, a sequence of them, and does nothing else on import.
"""

import re
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from refiners.errors import ParityError

_ID = re.compile(r"[a-z0-9][a-z0-9._+-]*(/[a-z0-9][a-z0-9._+-]*)*")

_COLLECTING: ContextVar[bool] = ContextVar("collecting", default=False)

Init = Literal["informative", "upstream"]
Inputs = Mapping[str, Any]
Outputs = Mapping[str, Tensor]


class Conversion(Protocol):
    """What a case needs of a key map. `refiners.conversion.KeyMap` is one."""

    def convert(self, state_dict: Mapping[str, Tensor], target: nn.Module, /) -> Mapping[str, Tensor]:
        """Upstream's weights under the port's keys. Pure renames share the storages they were given."""
        ...

    def invert(self, state_dict: Mapping[str, Tensor], source: Mapping[str, Tensor], /) -> Mapping[str, Tensor]:
        """The port's tensors under upstream's keys: the exact inverse of `convert`."""
        ...


@dataclass(frozen=True, kw_only=True)
class FullSize:
    """One published configuration, whose keys and shapes are compared on the `meta` device; nothing is computed.

    `upstream` and `port` build the two models. `key_map` is the case's own unless given.
    """

    upstream: Callable[[], nn.Module]
    port: Callable[[], nn.Module]
    key_map: Conversion | None = None


def _no_strings() -> dict[str, str]:
    return {}


def _no_sizes() -> dict[str, FullSize]:
    return {}


@dataclass(frozen=True, kw_only=True)
class Case:
    """An upstream model and its port, with all that decides whether they are equal.

    Example:
        ```py
        Case(
            id="bert/tiny",
            upstream=lambda: BertModel(CONFIG),
            port=lambda: from_config(CONFIG.to_dict()),
            key_map=KEY_MAP,
            inputs=lambda generator: {"ids": torch.randint(0, 100, (2, 7), generator=generator)},
            run_upstream=lambda model, inputs: {"tokens": model(input_ids=inputs["ids"]).last_hidden_state},
            run_port=lambda model, inputs: {"tokens": model(inputs["ids"])},
        )
        ```

    Raises:
        ParityError: the id is not lower-case segments joined by "/", a builder is missing or is not callable, a lane
            is unknown, or a reason is empty.
    """

    id: str
    """"family/name": lower-case letters, digits and `._+-`, in segments joined by "/"."""
    upstream: Callable[[], nn.Module]
    """Builds the reference model. Called under the lane's default dtype: give no dtype, call no `.to`."""
    port: Callable[[], nn.Module]
    """Builds the model that must equal it, under the same rule."""
    key_map: Conversion
    """From upstream's keys to the port's, and back."""
    inputs: Callable[[torch.Generator], Inputs]
    """Draws the inputs, once, under float64 as default dtype; floating ones are then rounded to each lane's dtype."""
    run_upstream: Callable[[nn.Module, Inputs], Outputs]
    """Runs the reference model: output name → tensor."""
    run_port: Callable[[nn.Module, Inputs], Outputs]
    """Runs the port: the same names."""
    taps: Mapping[str, str] = field(default_factory=_no_strings)
    """Port path → upstream path of submodules whose outputs are compared as well (the first tensor of each call)."""
    without_influence: Mapping[str, str] = field(default_factory=_no_strings)
    """Upstream weights that cannot influence the outputs → why. In keys, `{i}` is a number and `*` is anything."""
    full_size: Mapping[str, FullSize] = field(default_factory=_no_sizes)
    """Name of a published configuration → the pair that is compared on `meta`."""
    weights: Callable[[], Mapping[str, Tensor]] | None = None
    """Real weights under upstream's keys. None: drawn by the engine, see `refiners.parity.weights`."""
    init: Init = "informative"
    """How the engine draws them: informative values everywhere, or upstream's own initialisation."""
    lanes: tuple[str, ...] = ("float64", "float32", "bfloat16", "float16")
    """Dtypes to compare in. Without float64 there is no truth: the case is `BITWISE` or `DIFFERENT`."""
    gradients: bool = True
    """Compare one backward pass as well."""
    seed: int = 0
    """Seeds weights, inputs, cotangents and whatever the models draw themselves."""
    time_limit: float = 600.0
    """Seconds that a lane may take; longer is a hang, and `DIFFERENT`. See `refiners.parity.time_limit`."""
    summary: str = ""
    """One line for people."""
    batch_axis: int | Mapping[str, int] | None = None
    """The axis of all input tensors that holds the items of the batch, or input → its axis, and the others belong to
    every item. Outputs hold them in axis 0, unless a single item has an output of the same shape, which is the same for
    all. For `refiners.parity.cells.metamorphic`, as are the next two."""
    pad: Callable[[Inputs], Inputs] | None = None
    """Lengthens the inputs by padding behind them, hidden by their mask. What outputs have more is cut off again."""
    without_cells: Mapping[str, str] = field(default_factory=_no_strings)
    """Metamorphic cell that does not apply → why."""

    def __post_init__(self) -> None:
        if self.refusal and not _COLLECTING.get():
            raise ParityError(self.refusal)

    @property
    def refusal(self) -> str:
        """Why the case cannot be used; "" for a case that can."""
        problems = _problems(self)
        return f"Case {self.id!r} cannot be used: {'; '.join(problems)}." if problems else ""

    @property
    def family(self) -> str:
        """The first segment of the id."""
        return self.id.split("/", 1)[0]


@contextmanager
def collecting() -> Generator[None, None, None]:
    """Inside, a case that cannot be used does not raise, so that the others of its module can: see its `refusal`."""
    token = _COLLECTING.set(True)
    try:
        yield
    finally:
        _COLLECTING.reset(token)


def _problems(case: Case) -> list[str]:
    from refiners.parity.lanes import DTYPES  # lanes need cases no more than cases need lanes: only the names

    problems: list[str] = []
    is_text = isinstance(case.id, str)  # pyright: ignore[reportUnnecessaryIsInstance]  # a third party's value
    if not is_text or not _ID.fullmatch(case.id):
        problems.append("its id must be lower-case segments joined by '/', as in 'bert/tiny'")
    for name in ("upstream", "port", "inputs", "run_upstream", "run_port"):
        given = getattr(case, name)
        if isinstance(given, nn.Module):
            problems.append(f"`{name}` must be a function, got a {type(given).__name__}: write `lambda:` before it")
        elif not callable(given):
            problems.append(f"`{name}` must be a function, got {given!r}")
    for name in ("convert", "invert"):
        if not callable(getattr(case.key_map, name, None)):
            problems.append(f"`key_map` has no `{name}` method, got {type(case.key_map).__name__}")
    unknown = [lane for lane in case.lanes if lane not in DTYPES]
    if unknown or not case.lanes or len(set(case.lanes)) < len(case.lanes):
        problems.append(f"its lanes must be some of {', '.join(DTYPES)}, each once, got {case.lanes!r}")
    problems += [
        f"no reason is given for `{key}` in `without_influence`"
        for key, why in case.without_influence.items()
        if not why.strip()
    ]
    problems += [
        f"no reason is given for `{cell}` in `without_cells`"
        for cell, why in case.without_cells.items()
        if not why.strip()
    ]
    if not case.time_limit > 0:
        problems.append(f"`time_limit` must be a number of seconds above 0, got {case.time_limit!r}")
    if case.init not in ("informative", "upstream"):
        problems.append(f"`init` must be 'informative' or 'upstream', got {case.init!r}")
    return problems


def with_both_inits(case: Case) -> tuple[Case, Case]:
    """The case, and the same case on upstream's own initialisation.

    Informative weights show activation, scale and rotation faults best; upstream's small ones show eps faults best.

    Returns:
        The case as given, then its copy with `.upstream-init` appended to the id.
    """
    return case, replace(case, id=f"{case.id}.upstream-init", init="upstream", full_size={})
