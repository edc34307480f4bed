"""The measurement behind the constants of `refiners.parity.rounding`: legitimate rewrites, and mistakes.

One small model computes the same function in several ways. `python -m refiners.parity.rounding` runs them all and
prints, for float64, the largest error between two ways, and for the other dtypes the ratios of their errors against
float64. A rewrite has to stay below both constants, a mistake has to show in float64.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refiners.parity.rounding import (
    ERROR_RATIO,
    FLOAT64_AGREEMENT,
    Error,
    ErrorPair,
    joint_ratio,
    relative_error,
    typical_magnitude,
    worst_output_ratio,
)
from refiners.parity.weights import fill_informative, generator_for

REWRITES = ("addmm", "split_sum", "reversed_sum", "attention_by_hand", "norm_by_hand", "one_by_one")
MISTAKES = ("norm_eps_1e-6", "gelu_tanh", "bias_twice")
SEEDS = 40


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)


class Subject(nn.Module):
    """A function that can be computed in several ways; `way` says which."""

    way = ""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(50, 32), nn.Embedding(16, 32)
        self.block_1, self.block_2 = Block(), Block()
        self.convolution, self.head = nn.Conv1d(32, 32, 3, padding=1), nn.Linear(32, 3)

    def linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """Receives and returns: Float[Tensor, "batch sequence features"]."""
        weight, bias, half = layer.weight, layer.bias, layer.in_features // 2
        if self.way == "addmm":
            return x @ weight.T + bias
        if self.way == "split_sum":
            return F.linear(x[..., :half], weight[:, :half], bias) + F.linear(x[..., half:], weight[:, half:])
        if self.way == "reversed_sum":
            return F.linear(x.flip(-1), weight.flip(-1), bias)
        return F.linear(x, weight, 2 * bias if self.way == "bias_twice" else bias)

    def norm(self, layer: nn.LayerNorm, x: Tensor) -> Tensor:
        """Receives and returns: Float[Tensor, "batch sequence features"]."""
        if self.way == "norm_by_hand":
            y = x if x.dtype == torch.float64 else x.float()
            y = (y - y.mean(-1, keepdim=True)) * torch.rsqrt(y.var(-1, unbiased=False, keepdim=True) + layer.eps)
            return (y * layer.weight.to(y.dtype) + layer.bias.to(y.dtype)).to(x.dtype)
        eps = 1e-6 if self.way == "norm_eps_1e-6" else layer.eps
        return F.layer_norm(x, (x.shape[-1],), layer.weight, layer.bias, eps)

    def attention(self, block: Block, x: Tensor) -> Tensor:
        """Receives and returns: Float[Tensor, "batch sequence features"]."""
        layers = (block.query, block.key, block.value)
        query, key, value = (self.linear(layer, x).reshape(*x.shape[:2], 4, 8).transpose(1, 2) for layer in layers)
        if self.way == "attention_by_hand":
            scores = query @ key.transpose(-1, -2) / math.sqrt(8)
            wide = torch.float64 if x.dtype == torch.float64 else torch.float32
            mixed = scores.softmax(-1, dtype=wide).to(x.dtype) @ value
        else:
            mixed = F.scaled_dot_product_attention(query, key, value)
        return self.linear(block.out, mixed.transpose(1, 2).flatten(-2))

    def compute(self, ids: Tensor) -> dict[str, Tensor]:
        """Receives: Int[Tensor, "batch sequence"]. Returns the hidden states and one row of logits."""
        x = self.embedding(ids) + self.position(torch.arange(ids.shape[1]))
        gelu = partial(F.gelu, approximate="tanh" if self.way == "gelu_tanh" else "none")
        for block in (self.block_1, self.block_2):
            x = x + self.attention(block, self.norm(block.norm_1, x))
            x = x + self.linear(block.down, gelu(self.linear(block.up, self.norm(block.norm_2, x))))
        x = x + self.convolution(x.transpose(1, 2)).transpose(1, 2)
        return {"hidden": x, "logits": self.linear(self.head, x[:, 0])}

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        """As `compute`, whole or row by row."""
        if self.way != "one_by_one":
            return self.compute(ids)
        rows = [self.compute(row[None]) for row in ids]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def _tensors(model: Subject, ids: Tensor, way: str, seed: int, rounded: torch.dtype) -> dict[str, Tensor]:
    model.way = way
    model.zero_grad()
    outputs = model(ids)
    cotangents = [
        torch.randn(tensor.shape, generator=generator_for(seed, name), dtype=torch.float64).to(rounded).to(tensor.dtype)
        for name, tensor in outputs.items()
    ]
    torch.autograd.backward(list(outputs.values()), cotangents)
    found = {name: tensor.detach() for name, tensor in outputs.items()}
    # Biases of keys cannot change a softmax: their gradient is noise around zero, in any order of operations.
    named = [(name, parameter) for name, parameter in model.named_parameters() if not name.endswith("key.bias")]
    return found | {f"gradient.{name}": p.grad.clone() for name, p in named if p.grad is not None}


def _errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, Error]:
    magnitudes = {name: typical_magnitude(truth[name], gradient=name.startswith("gradient")) for name in truth}
    return {name: relative_error(found[name], truth[name], magnitudes[name]) for name in truth}


def measure_float64(way: str, seeds: int = SEEDS) -> tuple[float, float]:
    """The smallest and the largest of the worst errors over all seeds, between one way and the plain one."""
    worst: list[float] = []
    for seed in range(seeds):
        model, ids = _subject(seed, torch.float64)
        plain, other = (_tensors(model, ids, chosen, seed, torch.float64) for chosen in ("", way))
        worst.append(max(error.worst for error in _errors(other, plain).values()))
    return min(worst), max(worst)


def measure_ratios(way: str, dtype: torch.dtype, seeds: int = SEEDS) -> tuple[float, float, float]:
    """The largest ratios of outputs together, gradients together and one output alone, over all seeds."""
    largest = (0.0, 0.0, 0.0)
    for seed in range(seeds):
        model, ids = _subject(seed, dtype)
        exact, _ = _subject(seed, torch.float64)
        exact.load_state_dict(model.state_dict())
        truth = _tensors(exact, ids, "", seed, dtype)
        plain, other = (_errors(_tensors(model, ids, chosen, seed, dtype), truth) for chosen in ("", way))
        pairs = [ErrorPair(name, plain[name], other[name]) for name in truth]
        outputs = [pair for pair in pairs if not pair.name.startswith("gradient")]
        gradients = [pair for pair in pairs if pair.name.startswith("gradient")]
        found = joint_ratio(outputs, dtype), joint_ratio(gradients, dtype), worst_output_ratio(outputs, dtype)[0]
        largest = (max(largest[0], found[0]), max(largest[1], found[1]), max(largest[2], found[2]))
    return largest


def _subject(seed: int, dtype: torch.dtype) -> tuple[Subject, Tensor]:
    model = Subject().to(dtype)
    fill_informative(model, seed)
    return model, torch.randint(0, 50, (3, 7 + seed % 5), generator=generator_for(seed, "ids"))


def main() -> None:
    """Prints the table that stands in the docstring of `refiners.parity.rounding`."""
    torch.set_num_threads(1)
    print(f"float64, largest error of any element (bound {FLOAT64_AGREEMENT:g})")
    for way in REWRITES:
        print(f"    rewrite {way:18} at most  {measure_float64(way)[1]:.1e}")
    for way in MISTAKES:
        print(f"    mistake {way:18} at least {measure_float64(way)[0]:.1e}")
    print(f"largest ratio to upstream's error (bound {ERROR_RATIO:g}): outputs, gradients, one output alone")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for way in REWRITES:
            ratios = ", ".join(f"{ratio:.2f}" for ratio in measure_ratios(way, dtype))
            print(f"    {str(dtype).removeprefix('torch.'):8} {way:18} {ratios}")
