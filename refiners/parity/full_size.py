"""Full size without full cost: the published configuration of both sides on the `meta` device.

Nothing is computed. After conversion, upstream's keys and shapes have to be exactly the port's.
"""

import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from refiners.errors import ParityError
from refiners.parity.case import Case
from refiners.parity.environment import package_behind
from refiners.parity.time_limit import time_limit
from refiners.parity.torch_state import forked_random_state


@dataclass(frozen=True, kw_only=True)
class FullSizeResult:
    """Whether one published configuration has the same keys and shapes on both sides."""

    case: str
    name: str
    equal: bool
    tensors: int = 0
    """Tensors of the port."""
    elements: int = 0
    """Their elements: the number of weights."""
    reason: str = ""
    seconds: float = 0.0

    @property
    def lane(self) -> str:
        """`meta:name`, where a dtype stands for computed cases."""
        return f"meta:{self.name}"

    @property
    def id(self) -> str:
        """`case[meta:name]`, the name of its test."""
        return f"{self.case}[{self.lane}]"

    def to_json(self) -> dict[str, Any]:
        """Only strings, numbers and booleans."""
        return asdict(self)


def check_full_size(case: Case, name: str) -> FullSizeResult:
    """Compares keys and shapes of one full-size pair of a case.

    Raises:
        ParityError: the case has no pair of that name.
    """
    if name not in case.full_size:
        raise ParityError(f"{case.id} has no full size {name!r}. It has: {', '.join(case.full_size) or 'none'}.")
    started = time.perf_counter()
    return replace(_compare(case, name), seconds=round(time.perf_counter() - started, 4))


def _compare(case: Case, name: str) -> FullSizeResult:
    pair = case.full_size[name]
    key_map = pair.key_map or case.key_map
    try:
        with forked_random_state(cuda=False), time_limit(case.time_limit):
            with torch.device("meta"):
                upstream, port = pair.upstream(), pair.port()
            converted = key_map.convert(upstream.state_dict(), port)
    except Exception as error:  # a builder or a key map of anybody's
        package = package_behind(error)
        told = f"{type(error).__name__}: {error}{f' ({package})' if package else ''}"
        return FullSizeResult(case=case.id, name=name, equal=False, reason=told)
    wanted = port.state_dict()
    problems = [f"missing `{key}`" for key in wanted if key not in converted]
    problems += [f"unexpected `{key}`" for key in converted if key not in wanted]
    problems += [
        f"`{key}` is {tuple(converted[key].shape)} for {tuple(tensor.shape)}"
        for key, tensor in wanted.items()
        if key in converted and converted[key].shape != tensor.shape
    ]
    if not wanted:
        problems.append("the port has no weights: nothing was compared")
    return FullSizeResult(
        case=case.id,
        name=name,
        equal=not problems,
        tensors=len(wanted),
        elements=sum(tensor.numel() for tensor in wanted.values()),
        reason="; ".join(problems),
    )
