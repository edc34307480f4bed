"""Why the port's way between known values is not upstream's, where no module stands for the fault.

The ways of both sides are run again as programs (`refiners.parity.reasons.replay`). Changes are tried on the port's:
another number, a flag, an operation less, values exchanged or negated, what `refiners.parity.reasons.unlike` finds when
it holds both together; then on upstream's, until it makes the port's value, which says what the port does. A cause is
told only if

- the program of each side, as it is, makes the very bits that the model made;
- the two differ in float64 by more than rounding, and than tables that one side holds in float32;
- with the change, and nothing more, they are equal in float64, on two draws (`refiners.parity.reasons.trial`).

Of causes as simple as each other all are told, if they are few; if they are many, none.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from refiners.parity.operations import Operation, tensors_in
from refiners.parity.reasons import candidates, flow, orders, sources, turning, unlike
from refiners.parity.reasons.candidates import Candidate, name_of_value, residual
from refiners.parity.reasons.hypotheses import ACTIVATIONS
from refiners.parity.reasons.in_place import instead, instead_of_line, not_given
from refiners.parity.reasons.layout import in_another_shape, laid_out, laid_out_in_bits
from refiners.parity.reasons.masks import diagonals
from refiners.parity.reasons.mending import first_that_mend, is_alike, pointer
from refiners.parity.reasons.replay import (
    Change,
    Edit,
    Program,
    as_it_is,
    coarsely,
    is_close,
    is_same,
    left_out,
    makes_bits,
    natively,
    scalars,
    with_arguments,
)
from refiners.parity.reasons.scaled import scaled
from refiners.parity.reasons.tables import with_one_table
from refiners.parity.reasons.trial import Making, Trial, limited

MOST_TOLD = 3
"""Differences that are told together, and causes that are told as alternatives."""

ONLY_ROUNDING = "within rounding: in float64 both sides compute the same here, and differ in an order or a cast"
"""Of a value that both sides make alike."""

SECONDS = 2.5
"""Of the processor, for the changes that are tried on one difference; a third as much for each search behind it."""

FAR = 1000.0
"""How far apart values must be, in units of rounding, for a change to be told that brings them together coarsely."""


def why(
    port: Program, upstream: Program, until: float = math.inf, *, only_point: bool = False
) -> tuple[str, Sequence[Operation]]:
    """What makes the port's value upstream's, completing "equal …"; "" when nothing simple does.

    Receives:
        port, upstream: how both sides make the value.
        until: the time, of the monotonic clock, when the search ends.
        only_point: no search, for lines in which nothing was found before: only where they differ.

    Returns:
        The text, and the operations of the port at which it is; none where that is not known.
    """
    try:
        if not (port.is_faithful() and upstream.is_faithful()):
            return "", ()
        port, upstream = with_one_table(port, upstream)
        told = in_another_shape(port, upstream)
        if told:
            return told, port.operations[-1:]
        if is_rounding_of_float32(port, upstream):
            return _bitwise(port, upstream) or (ONLY_ROUNDING if is_rounding(port, upstream) else ""), ()
        trial = Trial(port, upstream)
        with coarsely():
            is_far = not is_same(port.sketches[port.root], upstream.sketches[upstream.root], times=FAR)
    except Exception:  # an operation that does not take float64, or a value that was not seen
        return "", ()
    searches = (pointer,) if only_point else (_why, *([_coarsely] if is_far else []), laid_out_in_bits, pointer)
    for search in searches:
        try:
            with limited(until, SECONDS if search is _why else SECONDS / 3):
                told = search(trial)
        except Exception:  # the same, or the end of the time
            told = ""
        if told:
            return told, () if search in (pointer, laid_out_in_bits) else trial.touched
    return "", ()


def _coarsely(trial: Trial) -> str:
    """Why, where one side holds in float32 what the other one computes in float64."""
    with coarsely():
        return _why(trial)


def is_rounding(port: Program, upstream: Program) -> bool:
    """Whether both make one value, when all is computed in float64."""
    return is_close(port.values[port.root], upstream.values[upstream.root])


def is_rounding_of_float32(port: Program, upstream: Program) -> bool:
    """The same, or no more lies between both than tables that are held in float32."""
    port, upstream = with_one_table(port, upstream)
    with coarsely():
        return is_rounding(port, upstream)


def _bitwise(port: Program, upstream: Program) -> str:
    """What gives upstream's very bits, where nothing but rounding lies between."""
    numbers = {value for op in upstream.operations for _, value in scalars(op.template)}
    found: dict[object, str] = {}
    with natively():
        for one in candidates.changed(port, numbers):
            if one.key not in found and makes_bits(port, one.making(port, upstream), upstream):
                found[one.key] = one.text
    return ", or ".join(found.values()) if len(found) <= MOST_TOLD else ""


def _why(trial: Trial, *, is_part: bool = False) -> str:
    if is_rounding(trial.port, trial.upstream):
        return ""
    port = trial.port
    read = candidates.bases(port, trial.upstream), sources.cuts(port), sources.reversed_pieces(port)
    known = itertools.chain(*read, candidates.bounds(port), candidates.outer(port))
    told = _tried(lambda: _first(trial, known) or _activation(trial))
    if not told and _tried(lambda: _first(trial, candidates.exchanged(trial.port))):
        told = _alternatives(trial, _of_leaves(trial))
    if told:
        return told
    found = [one for one in unlike.differences(trial.port, trial.upstream) if not _is_a_move(one)]
    is_plain = "instead" not in {one.kind for one in found}
    told = _tried(lambda: (_told(trial, found) if is_plain else "") or _alternatives(trial, _of_leaves(trial)))
    told = told or _tried(lambda: _first(trial, itertools.chain(laid_out(port), scaled(port), diagonals(port))))
    told = told or _tried(lambda: _alternatives(trial, sources.readings(port, trial.upstream)))
    pairs = [] if told or is_part else first_that_mend(trial)
    try:
        told = told or _tried(lambda: not_given(trial, [*pairs, (trial.port.root, trial.upstream.root)]))
        told = told or _tried(lambda: _inside(trial, pairs)) or _tried(lambda: _one_change(trial, found))
        told = told or ("" if is_plain else _tried(lambda: _told(trial, found)))
    except TimeoutError:
        if not pairs:
            raise
    return told or (instead_of_line(trial, pairs) if pairs else "")


def _tried(search: Callable[[], str]) -> str:
    """What a search tells; nothing where it meets a value that it cannot take, so that the next one is tried."""
    try:
        return search()
    except TimeoutError:
        raise
    except Exception:  # an operation that does not take float64 or whole numbers, a value that was not seen
        return ""


def _inside(trial: Trial, pairs: Sequence[tuple[int, int]]) -> str:
    """Why values differ, where upstream's in their place mend the port."""
    parts = [trial.part(*pair) for pair in pairs if not is_alike(trial, *pair)]
    if not all(part.port.operations and part.port.root != trial.port.root for part in parts):
        return ""
    texts = [_why(part, is_part=True) for part in parts]
    clauses = dict.fromkeys(clause for text in texts for clause in text.split("; "))
    return "; ".join(clauses) if texts and all(texts) else ""


def _of_leaves(trial: Trial) -> Iterator[Candidate]:
    return itertools.chain(candidates.signs(trial.port), candidates.exchanged(trial.port))


def _first(trial: Trial, tried: Iterable[Candidate], *, of_upstream: bool = False) -> str:
    return next((one.text for one in tried if trial.holds(one.making, of_upstream=of_upstream)), "")


def _alternatives(trial: Trial, tried: Iterable[Candidate], *, of_upstream: bool = False) -> str:
    """All candidates that hold; nothing if they are many."""
    found: dict[object, str] = {}
    for one in tried:
        if one.key not in found and trial.holds(one.making, of_upstream=of_upstream):
            found[one.key] = one.text
            if len(found) > MOST_TOLD:
                return ""
    return ", or ".join(dict.fromkeys(found.values()))


# One change


def _one_change(trial: Trial, found: Sequence[unlike.Other]) -> str:
    parts = [(one.port, one.upstream) for one in found if one.kind == "instead"]
    roots = [(a, b) for a, b in parts if isinstance(a, int) and isinstance(b, int)]
    whole = trial.port.root, trial.upstream.root
    for pair in dict.fromkeys([*roots[:1], whole] if len(found) <= 1 else [whole]):
        part = trial if pair == whole else trial.part(*pair)
        told = _activation(part) or _changed(part)
        if told and (part is trial or trial.holds(candidates.put([pair]))):
            return told
    return ""


def _activation(trial: Trial) -> str:
    """Both sides are functions of one value, known by name."""
    names: list[str] = []
    if not all(_is_of_one_value(*draw) for draw in trial.draws):
        return ""
    for side in (1, 0):
        programs = [draw[side] for draw in trial.draws]
        if any(len(p.leaves()) != 1 or not p.operations for p in programs):
            return ""
        if not all(program.values[n].is_floating_point() for program in programs for n in program.leaves()):
            return ""
        names += [name for name in ACTIVATIONS if all(_is_function(program, name) for program in programs)][:1]
    return f"when the activation is {names[0]}: here it is {names[1]}" if len(names) == 2 else ""


def _is_of_one_value(port: Program, upstream: Program) -> bool:
    ours, theirs = (program.values[next(iter(program.leaves()))] for program in (port, upstream))
    return is_close(ours, theirs)


def _is_function(program: Program, name: str) -> bool:
    return is_close(program.values[program.root], ACTIVATIONS[name](program.values[next(iter(program.leaves()))]))


def _changed(trial: Trial) -> str:
    """One number, flag, sign or operation of the port, else of upstream, is another."""
    port, upstream = (
        {value for op in program.operations for _, value in scalars(op.template)}
        for program in (trial.port, trial.upstream)
    )
    told = _first(trial, candidates.tiled(trial.port)) or _alternatives(trial, candidates.changed(trial.port, upstream))
    told = told or _first(trial, candidates.signs(trial.port, made=True))
    for some in (sources.residuals, sources.steps):
        told = told or _alternatives(trial, some(trial.port, trial.upstream))
    told = told or _alternatives(trial, sources.windows(trial.port))
    theirs = (candidates.outer(trial.upstream), candidates.changed(trial.upstream, port))
    joined, there = ((replace(one, text=_of_upstream(one.text)) for one in some) for some in theirs)
    return told or _first(trial, joined, of_upstream=True) or _alternatives(trial, there, of_upstream=True)


def _of_upstream(text: str) -> str:
    if text.startswith("without "):
        return (
            f"when it computes {text.removeprefix('without ').removesuffix(candidates.EXTRA)} as well, as upstream does"
        )
    return f"as upstream: the port's value is what upstream's is {text}"


# Several differences


def _told(trial: Trial, found: Sequence[unlike.Other]) -> str:
    keys = dict.fromkeys(one.key for one in found)
    if not found or len(keys) > unlike.MOST_CHANGES or not _mend(trial, found):
        return ""
    for key in keys:
        rest = [one for one in found if one.key != key]
        found = rest if rest and _mend(trial, rest) else found
    replaced = [(one.port, one.upstream) for one in found if one.kind == "instead"]
    turned = [(a, b) for a, b in replaced if isinstance(a, int) and isinstance(b, int)]
    layouts = turning.layouts(trial, turned) if len(turned) == len(found) else ""
    if layouts:
        return layouts
    found = list({one.key: one for one in reversed(found)}.values())[::-1]
    pairs = unlike.exchanges(found, lambda a, b: all(is_same(p.sketches[a], u.sketches[b]) for p, u in trial.draws))
    if pairs:
        named = [f"{name_of_value(trial.port, a)} and {name_of_value(trial.port, b)}" for a, b in pairs]
        return f"when {' as well as '.join(named)} are exchanged"
    if len(found) > MOST_TOLD and any(one.kind != "arguments" for one in found):
        return ""
    texts = [*_chains(trial, found), *(_difference(trial, one) for one in found if one.kind not in _CHAINS)]
    return "; ".join(dict.fromkeys(texts)) if all(texts) else ""


def _mend(trial: Trial, found: Sequence[unlike.Other]) -> bool:
    """Whether differences, undone, leave none: everywhere, or for one that reads the values."""
    lacking = [one.port for one in found if one.kind == "missing"]
    most = max((len(_readers(trial.port, number)) for number in lacking), default=0)
    return any(trial.holds(_undone(found, reader)) for reader in (None, *range(most)))


def _readers(program: Program, number: object) -> list[tuple[int, int]]:
    return [(op.index, place) for op in program.operations for place, one in enumerate(op.inputs) if one == number]


def _undone(found: Sequence[unlike.Other], reader: int | None) -> Making:
    def making(port: Program, upstream: Program) -> Edit:
        changes: dict[int, Change] = {}
        pairs: list[tuple[int, int]] = []
        values: dict[int, Callable[[Tensor], Tensor]] = {}
        reads: dict[tuple[int, int], Callable[[Tensor], Tensor]] = {}
        for one in found:
            match one:
                case unlike.Other("arguments", Operation() as here, Operation() as there):
                    changes[here.index] = lambda op, given, like=there: with_arguments(op, like.template, given)
                case unlike.Other("order", Operation() as here):
                    changes[here.index] = lambda op, given, order=one.order: as_it_is(op, [given[n] for n in order])
                case unlike.Other("extra", Operation() as here):
                    changes[here.index] = left_out
                case unlike.Other("instead", int() as here, int() as there):
                    pairs.append((here, there))
                case unlike.Other("missing", int() as here, Operation() as there):
                    after = _after(upstream, there, one.through)
                    if reader is None:
                        values[here] = after
                    else:
                        reads[_readers(port, here)[reader]] = after
                case _:
                    raise ValueError(one)
        values |= candidates.put(pairs)(port, upstream).values
        return Edit(changes, values, reads)

    return making


def _after(upstream: Program, operation: Operation, through: int) -> Callable[[Tensor], Tensor]:
    """What an operation of upstream's makes of a value of the port's."""

    def made(value: Tensor) -> Tensor:
        passing = value.reshape_as(upstream.values[through])
        given = [passing if number == through else upstream.values[number] for number in operation.inputs]
        result = tensors_in(with_arguments(operation, operation.template, given))[0]
        return result.reshape_as(value) if result.numel() == value.numel() else result

    return made


_CHAINS = ("missing", "extra")


def _sides(found: Sequence[unlike.Other]) -> tuple[list[Operation], list[Operation]]:
    few = [one.upstream for one in found if one.kind == "missing" and isinstance(one.upstream, Operation)]
    return few, [one.port for one in found if one.kind == "extra" and isinstance(one.port, Operation)]


def _is_moved(found: Sequence[unlike.Other]) -> bool:
    """Whether what is missing at one place is too much at another."""
    few, many = _sides(found)
    return sorted(op.name for op in few) == sorted(op.name for op in many)


def _is_one_factor(first: Operation, second: Operation) -> bool:
    """Whether both multiply by one number, or divide by what it is the inverse of."""
    factors = [orders.factor_of(operation) for operation in (first, second)]
    return len({f"{factor:.9g}" for factor in factors if factor is not None}) == 1 and None not in factors


def _chains(trial: Trial, found: Sequence[unlike.Other]) -> Iterator[str]:
    """Operations too few and too many, each kind in one sentence."""
    few, many = _sides(found)
    is_one = len(few) == len(many) == 1 and (_is_moved(found) or _is_one_factor(*few, *many))
    words = orders.moved(trial.port, trial.upstream, many[0], few[0]) if is_one else ""
    if words or (few and _is_moved(found)):
        yield words or f"when it computes {_list(few)} of the other value: here {_list(many)}"
        return
    if few:
        yield f"when it computes {_list(few)} as well, as upstream does{residual(few, 'a missing residual')}"
    if many:
        words = orders.taken_behind(trial.port, many[0]) if len(many) == 1 else ""
        yield words or f"without {_list(many)}{residual(many, 'a residual too much')}"


def _list(operations: Sequence[Operation]) -> str:
    return ", ".join(f"{flow.told(operation)} at {operation.source}" for operation in operations)


def _is_a_move(one: unlike.Other) -> bool:
    operation = one.upstream if one.kind == "missing" else one.port if one.kind == "extra" else None
    return isinstance(operation, Operation) and unlike.is_move(operation)


def _difference(trial: Trial, one: unlike.Other) -> str:
    match one:
        case unlike.Other("arguments", Operation() as here, Operation() as there):
            given, right = unlike.plain_arguments(here), unlike.plain_arguments(there)
            names = [name for name in right if right[name] != given.get(name)]
            apart = [f"`{n}` is {flow.number(right[n])}, not {flow.number(given.get(n))}" for n in names]
            told = " and ".join(apart) or f"it is {flow.told(there)}"
            return f"when in `{flow.name_of(here)}` at {here.source} {told}"
        case unlike.Other("order", Operation() as here):
            names = ", ".join(name_of_value(trial.port, here.inputs[place], 1) for place in one.order)
            places = [place + 1 for place in one.order]
            return f"when in `{flow.name_of(here)}` at {here.source} the tensors stand in the order {places}: {names}"
        case unlike.Other("instead", int() as here, int() as there):
            return instead(trial, here, there)
        case _:
            return ""
