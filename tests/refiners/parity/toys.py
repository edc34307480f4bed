"""An upstream of twenty lines, its port, and a case of the two: what the rules of the engine are tried on."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refiners.parity import Case, CaseRunner, Lane, Result
from refiners.parity.explain import Explanation, explain_modules
from refiners.parity.lanes import held_equal
from refiners.parity.weights import fill_informative


class SameKeys:
    """The key map of two models that name their weights equally."""

    def convert(self, state_dict: Mapping[str, Tensor], target: nn.Module) -> Mapping[str, Tensor]:
        assert state_dict.keys() == target.state_dict().keys()
        return dict(state_dict)

    def invert(self, state_dict: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        assert state_dict.keys() == source.keys()
        return dict(state_dict)


class Upstream(nn.Module):
    """Two norms, two linear layers and a residual between them."""

    def __init__(self, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(8, eps=eps), nn.LayerNorm(8, eps=eps)
        self.up, self.down = nn.Linear(8, 8, bias=bias), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.gelu(self.up(self.norm_1(x)))
        return self.down(self.norm_2(x))


class Port(Upstream):
    """The same; subclasses plant one fault each."""


def image(generator: torch.Generator) -> dict[str, Any]:
    return {"x": torch.randn(3, 8, generator=generator)}


def run(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    return {"y": model(inputs["x"])}


def make_case(port: Callable[[], nn.Module] = Port, **changes: Any) -> Case:
    """A case that is BITWISE in all lanes, but for what is changed."""
    given: dict[str, Any] = {
        "id": "toy/tower",
        "upstream": Upstream,
        "port": port,
        "key_map": SameKeys(),
        "inputs": image,
        "run_upstream": run,
        "run_port": run,
    }
    return Case(**{**given, **changes})


def result_of(case: Case, lane: str = "float64") -> Result:
    return CaseRunner(case).run(Lane(lane))


def explained_pair(
    upstream: nn.Module,
    port: nn.Module,
    keys: Mapping[str, str],
    inputs: Sequence[Tensor],
    inputs_of_port: Sequence[Tensor] | None = None,
    fault: tuple[str, str, object] | None = None,
) -> Explanation:
    """What is said in float64 of a port with upstream's weights, run once each on copies of the inputs.

    A fault is another value of an attribute: the path of a module, the name and the value.
    """
    lane = Lane("float64")
    with held_equal(lane):
        upstream, port = upstream.to(lane.dtype).eval(), port.to(lane.dtype).eval()
        fill_informative(upstream, 0)
        right = {ours: upstream.state_dict()[theirs] for ours, theirs in keys.items()}
        port.load_state_dict(right, assign=True)
        if fault is not None:
            path, name, value = fault
            setattr(port.get_submodule(path), name, value)

        def once(model: nn.Module, given: Sequence[Tensor]) -> dict[str, Tensor]:
            return {"y": model(*(tensor.clone() for tensor in given))}

        theirs, ours = partial(once, upstream, inputs), partial(once, port, inputs_of_port or inputs)
        return explain_modules(upstream, port, theirs, ours, right_weights=right)
