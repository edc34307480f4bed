"""How well differences are explained: faults are planted in ports that are right, and the explanations are counted.

    python -m parity_tests.explain_measured                single faults in every tiny case below, then several at once
    python -m parity_tests.explain_measured --count 400    more of them
    python -m parity_tests.explain_measured -v             each one that was not explained

The faults are those of `refiners.parity.mutants.mutate`, which knows nothing of the diagnosis. A leaf is right when a
path that is blamed (or named as a suspect beside it) is the node that was spoilt, lies inside it, or is the node that
holds it where the fault is one of order among its children. A diagnosis is counted when it is told at the right leaf:
most were run, so that both sides were seen to be equal there ("by a run"), the others follow from the values of both
sides. It is wrong when one is told and none of those told is at the right leaf.
"""

import argparse
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from refiners.parity import Case, Lane, load_cases
from refiners.parity.bits import same_bits
from refiners.parity.explain import Explanation, explain_sides
from refiners.parity.inputs import draw_inputs, place_inputs
from refiners.parity.mutants.mutate import Bench, Mutant, bench

CASES = ("bert/tiny", "clip/text-l", "clip/image-l", "vit/tiny")
LANE = Lane("float32")

# Operators that spoil what a node holds or how it is put together: the fault is seen at the node above.
OF_ORDER = frozenset({"drop", "drop-term", "repeat", "swap-order", "join-order", "swap-inputs", "residual"})


@dataclass
class Tally:
    """What became of the faults of one kind."""

    faults: int = 0
    leaves: int = 0
    diagnoses: int = 0
    wrong: int = 0
    run: int = 0
    seconds: float = 0.0
    missed: list[str] = field(default_factory=list)

    def add(self, other: "Tally") -> None:
        self.faults += other.faults
        self.leaves += other.leaves
        self.diagnoses += other.diagnoses
        self.wrong += other.wrong
        self.run += other.run
        self.seconds += other.seconds
        self.missed += other.missed


def is_blamed(mutant: Mutant, path: str) -> bool:
    """Whether a blamed path is where the fault was planted."""
    if path == mutant.path or path.startswith(f"{mutant.path}."):
        return True
    return mutant.operator in OF_ORDER and path == mutant.path.rpartition(".")[0]


def judge(mutant: Mutant, explanation: Explanation) -> Tally:
    told = [
        fault
        for fault in explanation.faults
        if any(is_blamed(mutant, path) for path in (fault.finding.port, *fault.finding.suspects))
    ]
    diagnosed = [fault.diagnosis for fault in told if fault.diagnosis]
    elsewhere = [fault.diagnosis for fault in explanation.faults if fault.diagnosis] if not told else []
    tally = Tally(1, int(bool(told)), int(bool(diagnosed)), int(bool(elsewhere)))
    tally.run = int(any(fault.was_run for fault in told if fault.diagnosis))
    tally.seconds = explanation.seconds
    if not diagnosed:
        found = [(fault.finding.port, fault.diagnosis) for fault in explanation.faults]
        tally.missed.append(f"{'leaf' if told else 'LOST'} {mutant.id} -> {found}")
    return tally


def explained(stand: Bench) -> Explanation:
    return explain_sides(stand.case, stand.lane, stand.upstream, stand.port)


def explained_if_it_runs(stand: Bench) -> Explanation | None:
    try:
        return explained(stand)
    except Exception:  # together they raise, which says itself where
        return None


def killed(stand: Bench) -> dict[str, list[Mutant]]:
    """The mutants that change an output, by operator; those that raise say themselves where."""
    found: dict[str, list[Mutant]] = {}
    for mutant in stand.mutants():
        found.setdefault(mutant.operator, []).append(mutant)
    return found


def changes_outputs(stand: Bench, mutant: Mutant) -> bool:
    """Whether there is something to explain: the forward, in float32."""
    with stand.planted(mutant), torch.no_grad():
        try:
            theirs = outputs(stand, stand.port, stand.case.run_port)
        except Exception:  # it says itself where
            return False
    ours = outputs(stand, stand.upstream, stand.case.run_upstream)
    return any(name not in theirs or not same_bits(ours[name], theirs[name]) for name in ours)


def outputs(stand: Bench, model: nn.Module, run: Callable[..., Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    with torch.no_grad():
        return run(model, place_inputs(draw_inputs(stand.case), stand.lane.dtype, stand.lane.device))


def sample(stand: Bench, count: int, draw: random.Random) -> Iterator[Mutant]:
    """As many mutants of each operator as of any other, as far as there are."""
    waiting = killed(stand)
    for mutants in waiting.values():
        draw.shuffle(mutants)
    while count and any(waiting.values()):
        for mutants in waiting.values():
            while mutants:
                mutant = mutants.pop()
                if changes_outputs(stand, mutant):
                    count -= 1
                    yield mutant
                    break
            if not count:
                return


def single(stand: Bench, mutants: Sequence[Mutant]) -> dict[str, Tally]:
    tallies: dict[str, Tally] = {}
    for mutant in mutants:
        with stand.planted(mutant):
            tally = judge(mutant, explained(stand))
        tallies.setdefault(mutant.operator, Tally()).add(tally)
    return tallies


def several(stand: Bench, mutants: Sequence[Mutant], rounds: int, draw: random.Random) -> dict[str, Tally]:
    tallies = {"2 at once": Tally(), "3 at once": Tally()}
    for turn in range(rounds):
        size = 2 + turn % 2
        chosen = draw.sample(list(mutants), size)
        paths = [mutant.path for mutant in chosen]
        if any(a != b and f"{b}.".startswith(f"{a}.") for a in paths for b in paths) or len(set(paths)) < size:
            continue
        with ExitStack() as stack:
            for mutant in chosen:
                stack.callback(mutant.edit())
            explanation = explained_if_it_runs(stand)
        for mutant in chosen if explanation is not None else ():
            tallies[f"{size} at once"].add(judge(mutant, explanation))
    return tallies


def print_tallies(tallies: dict[str, Tally], *, verbose: bool) -> None:
    total = Tally()
    print(f"{'fault':<24}{'planted':>8}{'right leaf':>12}{'diagnosed':>11}{'by a run':>10}{'wrong':>7}{'seconds':>9}")
    for name, tally in sorted(tallies.items()):
        print_row(name, tally)
        total.add(tally)
    print_row("all", total)
    if verbose:
        print("\n".join(total.missed))


def print_row(name: str, tally: Tally) -> None:
    count = max(tally.faults, 1)
    shares = [f"{value / count:.1%}" for value in (tally.leaves, tally.diagnoses, tally.run, tally.wrong)]
    columns = "".join(f"{share:>{width}}" for share, width in zip(shares, (12, 11, 10, 7), strict=True))
    print(f"{name:<24}{tally.faults:>8}{columns}{tally.seconds / count:>9.2f}")


def merge(into: dict[str, Tally], tallies: dict[str, Tally]) -> None:
    for name, tally in tallies.items():
        into.setdefault(name, Tally()).add(tally)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=160, help="single faults, over all cases")
    parser.add_argument("--several", type=int, default=60, help="rounds of two or three faults, over all cases")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-v", "--verbose", action="store_true")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    wanted = options.cases.split(",")
    cases: list[Case] = [case for case in load_cases("parity_tests.cases") if case.id in wanted]
    singles: dict[str, Tally] = {}
    multiples: dict[str, Tally] = {}
    started = time.time()
    for case in cases:
        with bench(case, LANE) as stand:
            mutants = list(sample(stand, options.count // len(cases), draw))
            merge(singles, single(stand, mutants))
            merge(multiples, several(stand, mutants, options.several // len(cases), draw))
    print_tallies(singles, verbose=options.verbose)
    print()
    print_tallies(multiples, verbose=options.verbose)
    print(f"\n{time.time() - started:.0f} seconds; cases {', '.join(case.id for case in cases)}; seed {options.seed}")


if __name__ == "__main__":
    main()
