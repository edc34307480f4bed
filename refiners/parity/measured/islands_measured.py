"""The measurement behind docs/decisions/0007: islands of float32, computed in other right ways and in wrong ones.

`python -m refiners.parity.measured.islands_measured` runs a small model that computes norm, softmax, rotary positions,
sinusoids and a scan in float32, beside ports that compute one of them in another order, or all of them. A port that the
float64 lane, or the whole law, calls DIFFERENT is a false alarm. Then it plants every fault of
`refiners.parity.mutants.operators` in the port that computes all of them otherwise, and counts those that the law lets
through.
"""

import argparse
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refiners.parity.case import Case
from refiners.parity.inputs import draw_inputs, place_inputs
from refiners.parity.lanes import DTYPES, Lane
from refiners.parity.measured.rounding_measured import SameKeys
from refiners.parity.mutants import call_operators, formula_operators, image_operators
from refiners.parity.mutants.calls import record
from refiners.parity.mutants.operators import OPERATORS, sites
from refiners.parity.result import Result, Verdict
from refiners.parity.runner import CaseRunner

_ = call_operators, formula_operators, image_operators  # they register their operators when they are imported

SIZES = (16, 32, 64)


class Norm(nn.Module):
    """An RMS norm in float32."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class NormByRoot(Norm):
    """Divided by a root of a mean of products."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide / torch.sqrt((wide * wide).sum(-1, keepdim=True) / x.shape[-1] + self.eps)
        return self.weight * wide.to(x.dtype)


class NormByPower(Norm):
    """With a power in place of a root."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * ((wide**2).mean(-1, keepdim=True) + self.eps) ** -0.5
        return self.weight * wide.to(x.dtype)


class NormOfTorch(Norm):
    """As torch has it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x.to(torch.float32), (x.shape[-1],), eps=self.eps).to(x.dtype)


class Softmax(nn.Module):
    """In float32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(x, dim=-1, dtype=torch.float32).to(x.dtype)


class SoftmaxByHand(Softmax):
    """Written out."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = torch.exp(wide - wide.amax(-1, keepdim=True))
        return (wide / wide.sum(-1, keepdim=True)).to(x.dtype)


class SoftmaxByLogarithm(Softmax):
    """The exponential of a logarithm."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(torch.log_softmax(x.to(torch.float32), dim=-1)).to(x.dtype)


class Rope(nn.Module):
    """Rotary positions in float32, in halves."""

    def angles(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        inverse = 1.0 / (10000.0 ** (torch.arange(0, half, dtype=torch.float32) / half))
        return torch.outer(torch.arange(x.shape[-2], dtype=torch.float32), inverse)

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.cat((self.angles(x), self.angles(x)), dim=-1)
        wide, (first, second) = x.to(torch.float32), x.to(torch.float32).chunk(2, dim=-1)
        return (wide * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()).to(x.dtype)


class RopeByLogarithm(Rope):
    """Frequencies as exponentials of logarithms."""

    def angles(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        inverse = torch.exp(torch.arange(0, half, dtype=torch.float32) * (-math.log(10000.0) / half))
        return torch.arange(x.shape[-2], dtype=torch.float32)[:, None] * inverse


class RopeOfComplexNumbers(Rope):
    """Pairs as complex numbers."""

    def forward(self, x: Tensor) -> Tensor:
        angles = self.angles(x)
        first, second = x.to(torch.float32).chunk(2, dim=-1)
        turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((turned.real, turned.imag), dim=-1).to(x.dtype)


class Scan(nn.Module):
    """A decaying sum along the sequence, in float32, step by step."""

    def forward(self, x: Tensor) -> Tensor:
        wide, steps = x.to(torch.float32), list[Tensor]()
        for step in wide.unbind(1):
            steps.append(step if not steps else 0.9 * steps[-1] + step)
        return torch.stack(steps, dim=1).to(x.dtype)


class ScanAsProduct(Scan):
    """As a product with a triangle of powers."""

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], dtype=torch.float32)
        powers = torch.pow(0.9, (places[:, None] - places).clamp(min=0)).tril()
        return (powers @ x.to(torch.float32)).to(x.dtype)


class Islands(nn.Module):
    """Attention and a scan between norms, with parts that may be exchanged."""

    def __init__(self, dim: int, **others: Callable[..., nn.Module]) -> None:
        super().__init__()
        parts: Mapping[str, Any] = {"norm": Norm, "softmax": Softmax, "rope": Rope, "scan": Scan, **others}
        self.norm_1, self.norm_2 = parts["norm"](dim), parts["norm"](dim)
        self.softmax, self.rope, self.scan = parts["softmax"](), parts["rope"](), parts["scan"]()
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_1(x)
        heads = [layer(y).unflatten(-1, (-1, 8)).transpose(1, 2) for layer in (self.query, self.key, self.value)]
        query, key = self.rope(heads[0]), self.rope(heads[1])
        shares = self.softmax(query @ key.transpose(-1, -2) * 8**-0.5)
        x = x + self.out((shares @ heads[2]).transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.scan(self.norm_2(x)))))


REWRITES: Mapping[str, Mapping[str, Callable[..., nn.Module]]] = {
    "norm by root": {"norm": NormByRoot},
    "norm by power": {"norm": NormByPower},
    "norm of torch": {"norm": NormOfTorch},
    "softmax by hand": {"softmax": SoftmaxByHand},
    "softmax by logarithm": {"softmax": SoftmaxByLogarithm},
    "rope by logarithm": {"rope": RopeByLogarithm},
    "rope of complex numbers": {"rope": RopeOfComplexNumbers},
    "scan as product": {"scan": ScanAsProduct},
    "all": {"norm": NormByRoot, "softmax": SoftmaxByHand, "rope": RopeByLogarithm, "scan": ScanAsProduct},
}


@dataclass(frozen=True)
class Setting:
    """The size of the model, and the seed of its weights and inputs."""

    dim: int
    seed: int

    def case(self, way: str) -> Case:
        """The model, and a port that computes some of its islands in another way."""
        return Case(
            id=f"islands/{way.replace(' ', '-')}",
            upstream=lambda: Islands(self.dim),
            port=lambda: Islands(self.dim, **REWRITES[way]),
            key_map=SameKeys(),
            inputs=self.inputs,
            run_upstream=lambda model, inputs: {"y": model(inputs["x"])},
            run_port=lambda model, inputs: {"y": model(inputs["x"])},
            seed=self.seed,
        )

    def inputs(self, generator: torch.Generator) -> Mapping[str, Tensor]:
        """A batch of sequences."""
        return {"x": torch.randn(2, 7 + self.seed % 11, self.dim, generator=generator)}


def measure(setting: Setting, way: str, lanes: Mapping[str, torch.dtype] = DTYPES) -> Iterator[Result]:
    """What the law says about a rewrite, in every lane."""
    runner = CaseRunner(setting.case(way))
    return (runner.run(Lane(name)) for name in lanes)


def closeness_alone(setting: Setting, way: str) -> Verdict:
    """What the float64 lane says of it when no island may be widened."""
    runner = CaseRunner(setting.case(way))
    runner.may_widen = False
    return runner.run(Lane("float64")).verdict


def _with_fault(setting: Setting, fault: str) -> Case:
    """The port that computes all islands otherwise, with a fault."""
    case = setting.case("all")

    def port() -> nn.Module:
        model = case.port()
        for name, edit in _faults(case, model):
            if name == fault:
                edit()
        return model

    return replace(case, port=port)


def _faults(case: Case, model: nn.Module) -> Iterator[tuple[str, Callable[[], Any]]]:
    inputs = place_inputs(draw_inputs(case), torch.get_default_dtype(), "cpu")
    model.eval()
    seen = record(model, partial(case.run_port, model, inputs))
    for site in sites(model, seen):
        for name, operator in OPERATORS.items():
            for parameter, edit in operator.find(site):
                yield f"{name}::{site.path}::{parameter}", edit


def plant(setting: Setting, lanes: Sequence[str] = ("float64", "bfloat16")) -> Iterator[tuple[str, list[Verdict]]]:
    """Every fault of the port that computes all islands otherwise, and the verdicts on it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = [name for name, _ in _faults(setting.case("all"), setting.case("all").port())]
        for name in names:
            if not name.startswith("swap-weights"):  # weights come after the fault, and take it back
                runner = CaseRunner(_with_fault(setting, name))
                yield name, [runner.run(Lane(lane)).verdict for lane in lanes]


def main() -> None:
    """Prints what stands in docs/verifier.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=4, help="of weights and inputs, for each rewrite and size")
    parser.add_argument("--faults", action="store_true", help="plant faults as well")
    given = parser.parse_args()
    settings = [Setting(dim, seed) for dim in SIZES for seed in range(given.seeds)]
    for way in REWRITES:
        before = Counter(closeness_alone(setting, way) for setting in settings)
        after = [result for setting in settings for result in measure(setting, way)]
        alarms = [result for result in after if result.verdict is Verdict.DIFFERENT]
        told = f"float64 lane as it is: {before[Verdict.DIFFERENT]} of {len(settings)} false alarms"
        print(f"{way:24} {told}; the law: {len(alarms)} of {len(after)}")
        for result in alarms:
            print(f"    {result.lane}: {'; '.join(result.reasons[:3])}")
    if given.faults:
        found = list(plant(Setting(16, 0)))
        told = [name for name, verdicts in found if Verdict.DIFFERENT in verdicts]
        print(f"{len(found)} faults, {len(told)} told by the float64 lane or the bfloat16 lane; the others:")
        for name, verdicts in found:
            if name not in told:
                print(f"    {name}: {', '.join(verdicts)}")


if __name__ == "__main__":
    main()
