"""What each input of a case is good for: a planted fault that the case tells with it, and not without.

An input that makes no difference to any fault earns nothing: it looks like a test and is none.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from refiners.parity.case import Case, Inputs
from refiners.parity.inputs import draw_inputs
from refiners.parity.lanes import Lane
from refiners.parity.mutants.mutate import Bench, Mutant, Outcome, bench

NEEDED = "the case cannot run without it"
UNREAD = "a port that does not read it"
UNDECIDED = "not found among {} faults"
TRUTH = Lane("float64")


def one_of_each_role(mutants: Sequence[Mutant]) -> list[Mutant]:
    """The first of the mutants that play one role, such as one fault in each of three equal layers."""
    return list({mutant.role: mutant for mutant in reversed(mutants)}.values())[::-1]


def witnesses(
    case: Case, revealing: Sequence[str] = (), most: Callable[[Bench], int | None] = lambda _: None
) -> dict[str, str]:
    """Input → a fault that only it lets the case tell; "" where there is none.

    Receives:
        case: any; without a float64 lane nothing is planted in it, and nothing is told.
        revealing: faults to begin with, such as those that some case of the family does not tell.
        most: how many faults are tried for one input of a case. None: all.
    """
    names = list(draw_inputs(case)) if TRUTH.name in case.lanes else []
    if len(names) == 1:
        return {names[0]: NEEDED}
    found: dict[str, str] = {}
    for name in names:
        try:
            with bench(_without(case, name), TRUTH) as lacking, bench(case, TRUTH) as given:
                found[name] = _told_no_more(name, given, lacking, revealing, most(given))
        except Exception:  # it raises, or is not equal any more: both mean that it is read
            found[name] = NEEDED
    return found


def _without(case: Case, name: str) -> Case:
    def inputs(generator: torch.Generator) -> Inputs:
        return {key: value for key, value in case.inputs(generator).items() if key != name}

    return replace(case, inputs=inputs)


def _told_no_more(name: str, given: Bench, lacking: Bench, revealing: Sequence[str], most: int | None) -> str:
    """A fault that is killed with the input, and without it survives or cannot even be planted."""
    without = {mutant.fault: mutant for mutant in lacking.mutants_of_lane()}
    planned = one_of_each_role(given.mutants_of_lane())
    early = {fault: number for number, fault in enumerate(revealing)}
    planned.sort(key=lambda mutant: (mutant.fault in without, early.get(mutant.fault, len(early))))
    for mutant in planned[:most]:
        other = without.get(mutant.fault)
        survives = other is None or lacking.try_out(other).outcome is Outcome.SURVIVED
        if survives and given.try_out(mutant).outcome is Outcome.KILLED:
            return mutant.fault
    if given.misses(name):
        return UNREAD
    return UNDECIDED.format(most) if most is not None and most < len(planned) else ""
