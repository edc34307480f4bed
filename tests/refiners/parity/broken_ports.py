"""Ports and upstreams that are broken on purpose, each in one way, for `test_pathologies`."""

import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refiners.parity.weights import draw, floating_entries
from tests.refiners.parity.toys import Port, SameKeys, Upstream, run

Changes = dict[str, Any]
Runs = Callable[[nn.Module, Mapping[str, Any]], dict[str, Any]]


def one(function: Callable[[Tensor], Any], **more: Any) -> Changes:
    """A case whose port returns something else than it computed."""
    return {"run_port": lambda model, inputs: {"y": function(model(inputs["x"]))}, **more}


def both(function: Callable[[Tensor], Tensor], **more: Any) -> Changes:
    """A case both of whose sides return something else than they computed."""
    changed = one(function)["run_port"]
    return {"run_upstream": changed, "run_port": changed, **more}


def beside(ours: Callable[[Tensor], Any], theirs: Callable[[Tensor], Any], **more: Any) -> Changes:
    """A case with a second output `z`, on each side another function of the first."""

    def with_z(function: Callable[[Tensor], Any]) -> Runs:
        def changed(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
            y = model(inputs["x"])
            return {"y": y, "z": function(y)}

        return changed

    return {"run_upstream": with_z(ours), "run_port": with_z(theirs), **more}


def after_running(function: Callable[[Any], Tensor], **more: Any) -> Changes:
    """A case both of whose sides run, drop what they computed and return something else."""

    def changed(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        model(inputs["x"])
        return {"y": function(model)}

    return {"run_upstream": changed, "run_port": changed, **more}


def put(tensor: Tensor, index: Any, value: Any) -> Tensor:
    """A copy with another value in one place."""
    made = tensor.clone()
    made[index] = value
    return made


def nan(payload: int) -> Tensor:
    """A float64 NaN with chosen last bits."""
    return torch.tensor([0x7FF8000000000000 + payload]).view(torch.float64)[0]


class Golden:
    """Hands what upstream returned to the port: the very tensor, or a copy of it with true gradients."""

    def __init__(self, *, once: bool = False) -> None:
        self.kept = torch.zeros(())
        self.once = once

    def changes(self, returned: Callable[["Golden", Tensor], Tensor], **more: Any) -> Changes:
        def upstream(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
            y = model(inputs["x"])
            if not self.kept.ndim or not self.once:
                self.kept = y.detach()
            return {"y": y}

        def port(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
            return {"y": returned(self, model(inputs["x"]) + 1)}

        return {"run_upstream": upstream, "run_port": port, **more}


class StraightThrough(torch.autograd.Function):
    """Any value at all, with the gradient of another one times a factor."""

    @staticmethod
    def forward(ctx: Any, computed: Tensor, shown: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return shown.detach().clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient * ctx.factor, None, None


def scaled_gradient(y: Tensor, factor: float = 1.001) -> Tensor:
    """Its argument, with a gradient slightly off."""
    made: Tensor = StraightThrough.apply(y, y, factor)
    return made


class Liar(Tensor):
    """A tensor that says it equals any other."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.equal:
            return True
        return super().__torch_function__(func, types, args, kwargs or {})


def tower(w: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """What `Upstream` computes, of weights that are given."""
    norm_1 = F.layer_norm(x, (8,), w["norm_1.weight"], w["norm_1.bias"])
    x = x + F.gelu(F.linear(norm_1, w["up.weight"], w["up.bias"]))
    return F.linear(F.layer_norm(x, (8,), w["norm_2.weight"], w["norm_2.bias"]), w["down.weight"], w["down.bias"])


class OwnConstants(Port):
    """Calls its leaves, and computes with the very numbers that the engine draws for upstream."""

    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        return tower({e.key: draw(e.key, e.tensor, e.owner, 0).to(x) for e in floating_entries(self)}, x)


class Discards(Port):
    """Runs a layer and goes on without what it returned."""

    def forward(self, x: Tensor) -> Tensor:
        self.up(self.norm_1(x))
        return self.down(self.norm_2(x))


class CachesTheFirst(Port):
    """Keeps its first result and returns it for ever."""

    def forward(self, x: Tensor) -> Tensor:
        if "kept" not in self.__dict__:
            self.kept = super().forward(x)
        return self.kept


class Counts(Port):
    """Every call after the first is slightly off."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = itertools.count()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + 1e-3 * next(self.calls))


class Clock(Port):
    """Draws from something that no seed reaches."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1e-3 * (time.perf_counter_ns() % 1000)


class Dropout(Port):
    """Drops whether it trains or not."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5, training=True)


class Trains(Port):
    """Ignores `eval()`."""

    def train(self, mode: bool = True) -> "Trains":
        del mode
        super().train(True)
        return self


class Patched(Upstream):
    """Calls a function that anybody may replace."""

    factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * Patched.factor


def patched_upstream() -> nn.Module:
    Patched.factor = 1.0
    return Patched()


def port_that_patches() -> nn.Module:
    """Wrong, and makes upstream as wrong as itself, as libraries do that replace upstream's functions."""
    Patched.factor = 1.001
    return Patched()


class Hidden(Port):
    """Holds an upstream where no tree shows it, and lets that compute."""

    def __init__(self) -> None:
        super().__init__()
        self.held = [Upstream()]

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.held[0], dict(self.named_parameters()), (x,))


class LastRow(Port):
    """Right but for its last row."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return torch.cat([y[:-1], y[-1:] * (1 + 1e-6)])


class WritesItsInput(Port):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        with torch.no_grad():
            x.mul_(2)
        return y


class WritesItsWeights(Port):
    """Behind autograd's back, after it computed."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.up.bias.data.add_(1)
        return y


class ChangesTheDefault(Port):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        torch.set_default_dtype(torch.float16)
        return y


class Loops(Port):
    def forward(self, x: Tensor) -> Tensor:
        while True:
            x = x + 0


class Sleeps(Port):
    def forward(self, x: Tensor) -> Tensor:
        time.sleep(60)
        return x


class Loose(Port):
    """A leaf that the forward never calls; upstream has it too."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 2)


class Frozen(Port):
    def __init__(self) -> None:
        super().__init__()
        self.up.weight.requires_grad_(False)


class Tied(Port):
    """Both norms are one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_2 = self.norm_1


class Untied(Port):
    """Its norms are two, as are those of `Port`."""


class EasyKeys(SameKeys):
    """Gives the port all it asks for, in a way that hides the second norm."""

    def convert(self, state_dict: Mapping[str, Tensor], target: nn.Module) -> Mapping[str, Tensor]:
        for key, tensor in state_dict.items():
            if key.startswith("norm_2"):
                tensor.copy_(torch.ones(8) if "weight" in key else torch.zeros(8))
        return dict(state_dict)


class NoSecondNorm(Port):
    """Uses no weights in its second norm."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.gelu(self.up(self.norm_1(x)))
        self.norm_2(x)
        return self.down(F.layer_norm(x, (8,)))


class Buffered(Upstream):
    """Adds a table that no state dict holds."""

    def __init__(self, start: int = 0) -> None:
        super().__init__()
        self.table: Tensor
        self.register_buffer("table", torch.arange(start, start + 8) ** 2 * 1e-3, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.table)


class Difference(Upstream):
    """Of two inputs, in which their order counts."""

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        return super().forward(x if other is None else x - 2 * other)


class PortOfDifference(Difference):
    """The same."""


class Sines(nn.Module):
    """No weights at all."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


class IgnoresStrides(Port):
    """Reads the memory of its input as if it were contiguous."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.as_strided(x.shape, (x.shape[1], 1)))


class Unprintable(Exception):
    """An exception that cannot even be shown."""

    def __str__(self) -> str:
        raise RuntimeError("no words for it")


class Stops(BaseException):
    """What `except Exception` does not catch."""


def raises(error: BaseException) -> Callable[..., Any]:
    def function(*_: Any) -> Any:
        raise error

    return function


def two_inputs(generator: torch.Generator) -> dict[str, Any]:
    return {"x": torch.randn(3, 8, generator=generator), "other": torch.randn(3, 8, generator=generator)}


def swapped(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    return {"y": model(inputs["other"], inputs["x"])}


def straight(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    return {"y": model(inputs["x"], inputs["other"])}


def transposed(generator: torch.Generator) -> dict[str, Any]:
    return {"x": torch.randn(8, 8, generator=generator).T}


def halves(first: str, second: str) -> Runs:
    """Two outputs under chosen names."""

    def changed(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
        y = run(model, inputs)["y"]
        return {first: y[:, :4], second: y[:, 4:]}

    return changed
