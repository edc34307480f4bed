"""At which values the port begins to differ for good: where upstream's in their place make all that follows right.

A search that knows nothing about what is wrong. It narrows a program of a hundred operations down to those that make
one value, or the few values of one line, as for queries and for keys.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import torch

from refiners.parity.operations import Operation
from refiners.parity.reasons import candidates, flow, unlike
from refiners.parity.reasons.replay import Program, coarsely, is_close
from refiners.parity.reasons.trial import Trial

MOST_TRIED = 600
POINTS = " of upstream makes"
"""What says that only lines are pointed at."""
NEAR = 3
"""Lines between two that do the same."""


def first_that_mend(trial: Trial) -> list[tuple[int, int]]:
    """The values of the port that mend it where upstream's stand in their place: one, or those of one line.

    Of several such those that the least is computed for.
    """
    port, upstream = trial.port, trial.upstream

    def is_another(ours: tuple[int, ...], theirs: tuple[int, ...]) -> bool:
        made = port.made.get(ours[0]), upstream.made.get(theirs[0])
        return bool(made[0]) != bool(made[1]) or bool(made[0] and made[1] and made[0][0].name != made[1][0].name)

    theirs = [values for values in _lines(upstream) if upstream.root not in values]
    fitting = [
        (ours, values)
        for ours in _lines(port)
        for values in theirs
        if len(ours) == len(values)
        and all(port.sketches[a][0] == upstream.sketches[b][0] for a, b in zip(ours, values, strict=True))
    ]
    fitting.sort(key=lambda pair: is_another(*pair))
    best: list[tuple[int, int]] = []
    least, tried = math.inf, 0
    for ours, values in fitting:
        pairs = list(zip(ours, values, strict=True))
        size = max(len(port.part(a).operations) + len(upstream.part(b).operations) for a, b in pairs)
        if size >= least or all(is_alike(trial, *pair) for pair in pairs):
            continue
        tried += 1
        if tried > MOST_TRIED:
            break
        if trial.holds(candidates.put(pairs)):
            best, least = [pair for pair in pairs if not is_alike(trial, *pair)], size
    return best


def is_alike(trial: Trial, here: int, there: int) -> bool:
    """Whether both sides make one value, up to rounding."""
    first, second = trial.port.values[here], trial.upstream.values[there]
    return first.shape == second.shape and is_close(first, second)


def _lines(program: Program) -> list[tuple[int, ...]]:
    """The values that a program starts from, then those that it makes, several at once where one line makes them."""
    lines: dict[tuple[str, str], list[int]] = {}
    for number, (operation, _) in program.made.items():
        is_move = unlike.is_move(operation) and operation.name != "aten.expand"
        if program.values[number].dtype != torch.bool and not is_move:
            lines.setdefault((operation.name, str(operation.source)), []).append(number)
    found = [(n,) for n in sorted(program.leaves()) if program.values[n].is_floating_point()]
    groups = sorted(lines.values(), key=lambda group: program.made[group[0]][0].index)
    for group in groups:
        found += [tuple(group), *((number,) for number in group if len(group) > 1)]
    return found + list(_neighbours(program, groups))


def _neighbours(program: Program, groups: Sequence[Sequence[int]]) -> Iterator[tuple[int, ...]]:
    """The values of two or three lines that lie side by side and do the same, as for queries and for keys."""
    single = [(program.made[group[0]][0], group[0]) for group in groups if len(group) == 1]
    for count in (2, 3):
        for some in itertools.combinations(single, count):
            sources = [(operation.name, operation.source) for operation, _ in some if operation.source]
            names = {(name, source.file) for name, source in sources}
            lines = [source.line for _, source in sources]
            if len(names) == 1 and len(lines) == count and max(lines) - min(lines) <= NEAR * (count - 1):
                yield tuple(number for _, number in some)


def operations_of(trial: Trial, pairs: Sequence[tuple[int, int]]) -> tuple[list[Operation], list[Operation]]:
    """What both sides do to make some values."""
    ours = [operation for a, _ in pairs for operation in trial.port.part(a).operations]
    return ours, [operation for _, b in pairs for operation in trial.upstream.part(b).operations]


# Words

_REDUCES = frozenset({"aten.mean", "aten.sum", "aten.var_mean", "aten._softmax", "aten.amax"})


def reductions(port: Sequence[Operation], upstream: Sequence[Operation]) -> str:
    """How many values both sides take a mean of, where they are not as many; nothing where either takes several."""
    told = ""
    for name in sorted(_REDUCES):
        ours, theirs = ({_reduced(op) for op in ops if op.name == name} for ops in (port, upstream))
        if len(ours) == len(theirs) == 1 and ours != theirs:
            told += f"; `{name.removeprefix('aten.')}` is of {theirs.pop()} values, here of {ours.pop()}"
    return told


def _reduced(operation: Operation) -> int:
    """How many values an operation makes one of."""
    shape, arguments = operation.tensors[0][1], operation.template[0]
    axes = arguments[1] if len(arguments) > 1 else list(range(len(shape)))
    return math.prod(shape[axis] for axis in ([axes] if isinstance(axes, int) else axes))


def pointer(trial: Trial) -> str:
    """The lines of both sides at which values stop to differ when upstream's are put there."""
    pairs = first_that_mend(trial) or _coarse_pairs(trial)
    if not pairs:
        return ""
    ours, theirs = operations_of(trial, pairs)
    if not ours or not theirs:
        return ""
    made = f"what `{flow.name_of(theirs[-1])}` at {theirs[-1].source}{POINTS}"
    told = f"when what `{flow.name_of(ours[-1])}` at {ours[-1].source} makes is {made}"
    return f"{told}{reductions(ours, theirs)}"


def _coarse_pairs(trial: Trial) -> list[tuple[int, int]]:
    with coarsely():
        return first_that_mend(trial)
