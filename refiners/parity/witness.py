"""What each input of a case is good for: a planted fault that the case tells with it, and not without.

An input that makes no difference to any fault earns nothing: it looks like a test and is none.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from refiners.parity.case import Case, Inputs
from refiners.parity.inputs import draw_inputs
from refiners.parity.lanes import Lane
from refiners.parity.mutate import Bench, Outcome, Trial, bench
from refiners.parity.operators import OPERATORS

NEEDED = "the case cannot run without it"


def witnesses(case: Case, trials: Sequence[Trial]) -> dict[str, str]:
    """Input → the fault that only it lets the case tell; "" where there is none.

    Receives:
        case: any.
        trials: its own, killed or not.
    """
    names = list(draw_inputs(case)) if "float64" in case.lanes else []
    if len(names) == 1:
        return {names[0]: NEEDED}
    told = [trial.fault for trial in trials if trial.outcome is Outcome.KILLED and trial.case == case.id]
    found: dict[str, str] = {}
    for name in names:
        try:
            with bench(_without(case, name), Lane("float64")) as built:
                found[name] = next(_told_no_more(built, told), "")
        except Exception:  # it raises, or is not equal any more: both mean that it is read
            found[name] = NEEDED
    return found


def _without(case: Case, name: str) -> Case:
    def inputs(generator: torch.Generator) -> Inputs:
        return {key: value for key, value in case.inputs(generator).items() if key != name}

    return replace(case, inputs=inputs)


def _told_no_more(built: Bench, told: Sequence[str]) -> Iterator[str]:
    """The faults that cannot even be planted without the input, then those that survive."""
    mutants = {mutant.fault: mutant for mutant in built.mutants_of_lane()}
    here = [fault for fault in told if OPERATORS[fault.split("::")[0]].lanes == "any"]
    yield from (fault for fault in here if fault not in mutants)
    for fault in here:
        if fault in mutants and built.try_out(mutants[fault]).outcome is Outcome.SURVIVED:
            yield fault
