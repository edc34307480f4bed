"""The measurement behind the constants of `refiners.parity.rounding`: false alarms, and misses.

`python -m refiners.parity.rounding` runs four small models in every legitimate way of
`refiners.parity.measured.rewrites`, at several sizes and seeds, and asks the law (`refiners.parity.verdict`) in every
dtype: a rewrite that it calls DIFFERENT is a false alarm. Then it plants faults in the same models, and single wrong
elements in their outputs, and counts those that the law lets through.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from refiners.parity import rounding, verdict
from refiners.parity.case import Case
from refiners.parity.lanes import DTYPES, Lane, held_equal
from refiners.parity.measured.measured_models import SIZES, SUBJECTS, Outputs, Subject
from refiners.parity.measured.rewrites import MISTAKES, REWRITES, Run, compiled
from refiners.parity.mutants.mutate import bench
from refiners.parity.mutants.operators import OPERATORS
from refiners.parity.pairing import Kind, Pair
from refiners.parity.result import Verdict
from refiners.parity.weights import fill_informative, generator_for


@dataclass(frozen=True)
class Setting:
    """A model, its size, and the seed of its weights and inputs."""

    subject: Subject
    dim: int
    seed: int

    def __str__(self) -> str:
        return f"{self.subject.__name__} of {self.dim}, seed {self.seed}"

    def model(self, dtype: torch.dtype) -> nn.Module:
        """With informative weights, drawn in float64 and rounded."""
        model = self.subject(self.dim).to(dtype)
        fill_informative(model, self.seed)
        return model

    def inputs(self, dtype: torch.dtype) -> Tensor:
        """Ids, or numbers rounded to the dtype."""
        x = self.subject.draw(self.dim, self.seed)
        return x.to(dtype) if x.is_floating_point() else x


Computed = Mapping[tuple[Kind, str], Tensor]


def compute(setting: Setting, model: nn.Module, x: Tensor, way: Run | None, rounded: torch.dtype) -> Computed | None:
    """Outputs and gradients of one forward and backward, in one way; None where that way is the plain one."""
    model.zero_grad()
    made: Outputs | None = model(x) if way is None else way(model, x)
    if made is None:
        return None
    cotangents = [
        torch.randn(one.shape, generator=generator_for(setting.seed, name), dtype=torch.float64).to(rounded).to(one)
        for name, one in made.items()
    ]
    torch.autograd.backward(list(made.values()), cotangents)
    # Biases of keys cannot change a softmax: their gradient is noise around zero, in any order of operations.
    named = [(name, parameter) for name, parameter in model.named_parameters() if not name.endswith("key.bias")]
    gradients = {(Kind.GRADIENT, name): p.grad.clone() for name, p in named if p.grad is not None}
    return {(Kind.OUTPUT, name): one.detach() for name, one in made.items()} | gradients


def compare(plain: Computed, other: Computed, truth: Computed) -> list[verdict.Comparison]:
    """Every tensor of two ways, and its errors against the truth."""
    return [
        verdict.compare(Pair(name, kind, plain[kind, name], other[kind, name]), truth[kind, name])
        for kind, name in truth
    ]


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What the law says about one rewrite in one lane, and how near it came to saying something else."""

    way: str
    setting: Setting
    lane: Lane
    verdict: Verdict
    reason: str
    float64: float
    """The largest error of any element, in the float64 lane."""
    ratios: tuple[float, float, float, float]
    """Of the outputs together, the gradients together, the worst output alone, and the worst element."""


def measure(setting: Setting, ways: Mapping[str, Run], lanes: Sequence[str] = tuple(DTYPES)) -> Iterator[Measurement]:
    """Every way in every lane, float64 first: the others need its verdict."""
    float64: dict[str, Verdict] = {}
    for lane in [Lane("float64"), *(Lane(name) for name in lanes if name != "float64")]:
        model, exact = setting.model(lane.dtype), setting.model(torch.float64)
        exact.load_state_dict(model.state_dict())
        x = setting.inputs(lane.dtype)
        with held_equal(lane):
            plain = compute(setting, model, x, None, lane.dtype)
            wide = x.double() if x.is_floating_point() else x
            truth = compute(setting, exact, wide, None, lane.dtype)
            assert plain is not None
            assert truth is not None
            for name, way in ways.items():
                other = compute(setting, model, x, way, lane.dtype)
                if other is None:
                    continue
                comparisons = compare(plain, other, truth)
                told, reasons = verdict.judge(comparisons, (), lane, float64_verdict=float64.get(name))
                float64.setdefault(name, told)
                yield Measurement(
                    way=name, setting=setting, lane=lane, verdict=told, reason=next(iter(reasons), ""),
                    float64=max((c.difference.worst for c in comparisons if c.difference), default=0.0),
                    ratios=_ratios(comparisons, lane.dtype),
                )  # fmt: skip


def _ratios(comparisons: Sequence[verdict.Comparison], dtype: torch.dtype) -> tuple[float, float, float, float]:
    outputs = [c.errors for c in comparisons if c.errors and not c.pair.kind.is_gradient]
    gradients = [c.errors for c in comparisons if c.errors and c.pair.kind.is_gradient]
    return (
        rounding.joint_ratio(outputs, dtype),
        rounding.joint_ratio(gradients, dtype),
        rounding.worst_output_ratio(outputs, dtype)[0],
        rounding.worst_element_ratio(outputs, dtype)[0],
    )


# --- misses: faults, and single wrong elements --------------------------------------------------------------------


class SameKeys:
    """The key map of two models of one class."""

    def convert(self, state_dict: Mapping[str, Tensor], target: nn.Module, /) -> Mapping[str, Tensor]:
        return dict(state_dict)

    def invert(self, state_dict: Mapping[str, Tensor], source: Mapping[str, Tensor], /) -> Mapping[str, Tensor]:
        return dict(state_dict)


def case_of(setting: Setting) -> Case:
    """A model beside itself, as a case in which faults can be planted."""
    return Case(
        id=f"measured/{setting.subject.__name__.lower()}",
        upstream=lambda: setting.subject(setting.dim),
        port=lambda: setting.subject(setting.dim),
        key_map=SameKeys(),
        inputs=lambda generator: {"x": setting.inputs(torch.float64)},
        run_upstream=lambda model, inputs: model(inputs["x"]),
        run_port=lambda model, inputs: model(inputs["x"]),
        seed=setting.seed,
    )


@dataclass(frozen=True)
class Planted:
    """What the law says about a fault."""

    fault: str
    lane: str
    verdict: Verdict
    by_ratio_alone: Verdict
    """What it would say of the lane alone: if the fault were in it and not in float64."""
    shows: bool
    """Whether it changes an output at all in float64, or is a cast: what spoils gradients alone does not."""

    @property
    def is_of_precision(self) -> bool:
        """Whether the fault is a cast, which is rounding by its nature."""
        return OPERATORS[self.fault.split("::")[0]].lanes == "half"


def plant(setting: Setting) -> Iterator[Planted]:
    """Every fault that can be planted in a model, in every lane."""
    case, float64 = case_of(setting), dict[str, Verdict]()
    for name in DTYPES:
        with bench(case, Lane(name)) as built:
            truth = built.truth()
            for mutant in built.mutants():
                told = built.verdict_on(mutant, truth, float64.get(mutant.fault, Verdict.BITWISE))
                alone = built.verdict_on(mutant, truth, Verdict.BITWISE)
                if built.lane.is_truth:
                    float64[mutant.fault] = told
                shows = OPERATORS[mutant.operator].lanes == "half" or float64[mutant.fault] is not Verdict.BITWISE
                yield Planted(mutant.fault, name, told, alone, shows)


SPOILT: Mapping[str, Callable[[Tensor], Tensor]] = {
    "twice too large": lambda x: 2 * x,
    "half as large": lambda x: x / 2,
    "of the other sign": torch.neg,
    "0": torch.zeros_like,
    "1 % too large": lambda x: 1.01 * x,
}


def spoil_one_element(setting: Setting, way: str, lane: Lane) -> Verdict:
    """The verdict on an output of which one element, as large as most, is wrong, in a lane alone."""
    model, exact = setting.model(lane.dtype), setting.model(torch.float64)
    exact.load_state_dict(model.state_dict())
    x = setting.inputs(lane.dtype)
    with held_equal(lane), torch.no_grad():
        plain = cast(Outputs, model(x))
        truth = cast(Outputs, exact(x.double() if x.is_floating_point() else x))
    comparisons: list[verdict.Comparison] = []
    for i, (name, right) in enumerate(truth.items()):
        spoilt = plain[name].clone()
        if i == 0:
            flat = spoilt.view(-1)
            at = int(right.flatten().abs().sort().indices[3 * right.numel() // 4])
            flat[at] = SPOILT[way](flat[at])
        comparisons.append(verdict.compare(Pair(name, Kind.OUTPUT, plain[name], spoilt), right))
    return verdict.judge(comparisons, (), lane, float64_verdict=Verdict.BITWISE)[0]


# --- the tables ---------------------------------------------------------------------------------------------------


def settings(seeds: int, first: int = 0) -> Iterator[Setting]:
    """Every model in every size with every seed."""
    return (Setting(subject, dim, first + i) for i in range(seeds) for subject in SUBJECTS for dim in SIZES)


def print_false_alarms(seeds: int, first: int, ways: Mapping[str, Run]) -> int:
    """How often a rewrite is called DIFFERENT, and how near it came: the number of false alarms."""
    found = [one for setting in settings(seeds, first) for one in measure(setting, ways)]
    for name in DTYPES:
        of_lane = [one for one in found if one.lane.name == name]
        alarms = [one for one in of_lane if one.verdict is Verdict.DIFFERENT]
        counts = Counter(one.verdict for one in of_lane)
        told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in Verdict)
        print(f"{name}: {len(of_lane)} rewrites, {len(alarms)} false alarms ({told})")
        for one in alarms:
            print(
                f"    {one.way} {one.setting.subject.__name__} {one.setting.dim} seed {one.setting.seed}: {one.reason}"
            )
        for way in ways:
            of_way = [one for one in of_lane if one.way == way]
            if of_way and name == "float64":
                print(f"    {way:22} largest error {max(one.float64 for one in of_way):.1e}")
            elif of_way:
                largest = (max(one.ratios[i] for one in of_way) for i in range(4))
                print(f"    {way:22} {'  '.join(f'{ratio:.2f}' for ratio in largest)}")
    return sum(one.verdict is Verdict.DIFFERENT for one in found)


def print_misses(seeds: int) -> None:
    """How many faults the law lets through, of those that show in the outputs."""
    found = [one for setting in settings(seeds) if setting.dim == SIZES[0] for one in plant(setting)]
    found = [one for one in found if one.shows]
    for name in DTYPES:
        for what, is_of_precision in (("mistakes", False), ("casts", True)):
            some = [one for one in found if one.lane == name and one.is_of_precision is is_of_precision]
            told, alone = (Counter(getattr(one, key) for one in some) for key in ("verdict", "by_ratio_alone"))
            texts = (", ".join(f"{counts[verdict]} {verdict}" for verdict in Verdict) for counts in (told, alone))
            print(f"{name}: {len(some)} {what}: {'; by this lane alone: '.join(texts)}")
    for name in DTYPES:
        if name != "float64":
            shares: list[str] = []
            for way in SPOILT:
                told = [spoil_one_element(setting, way, Lane(name)) for setting in settings(seeds)]
                shares.append(f"{way} {sum(one is Verdict.DIFFERENT for one in told)} of {len(told)}")
            print(f"{name}: one wrong element told by this lane alone: {', '.join(shares)}")


def main() -> None:
    """Prints what stands in the docstring of `refiners.parity.rounding` and in docs/verifier.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=16, help="of weights and inputs, for false alarms")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--seeds-of-faults", type=int, default=1, help="the same, for misses; 0 leaves them out")
    parser.add_argument("--compiled", action="store_true", help="measure inductor's code instead: minutes a seed")
    given = parser.parse_args()
    alarms = print_false_alarms(given.seeds, given.first, {"compiled": compiled} if given.compiled else REWRITES)
    if given.seeds_of_faults and not given.compiled:
        for way, run in MISTAKES.items():
            told = [one for setting in settings(1) for one in measure(setting, {way: run}, ("float64",))]
            print(f"mistake {way:18} in float64 at least {min(one.float64 for one in told):.1e}")
        print_misses(given.seeds_of_faults)
    print(f"{alarms} false alarms")
