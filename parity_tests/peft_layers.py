"""Single layers beside peft's: what the battery of `test_adapters` is made of.

A `Row` is a layer and a way to adapt it. `Pair` builds both sides of it on the same weights: peft's layer, unmerged and
with one or two active adapters, and a `LoraAdapter` with the same ones, made from the tensors of peft's.
"""

import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from refiners.fluxion.adapters import LoraAdapter
from refiners.fluxion.adapters.lora import Delta, DeltaSpec

LORA = {"down": ("lora_A.{}.weight", "lora_embedding_A.{}"), "up": ("lora_B.{}.weight", "lora_embedding_B.{}")}
LORA |= {"up_bias": ("lora_B.{}.bias",)}
# What peft calls the tensor of each role.
KEYS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "lora": LORA,
    "dora": {**LORA, "magnitude": ("lora_magnitude_vector.{}.weight",)},
    "loha": {role: (f"hada_{role}.{{}}",) for role in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    "lokr": {role: (f"lokr_{role}.{{}}",) for role in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}
CONFIGS = {"lora": LoraConfig, "dora": LoraConfig, "loha": LoHaConfig, "lokr": LoKrConfig}
NAMES = ("first", "second")

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...] | int]] = {
    "linear": (lambda: nn.Linear(12, 10), (3, 5, 12)),
    "linear-without-bias": (lambda: nn.Linear(12, 10, bias=False), (7, 12)),
    "embedding": (lambda: nn.Embedding(20, 10, padding_idx=2), 20),
    "conv1d": (lambda: nn.Conv1d(8, 12, 3, padding=1), (2, 8, 9)),
    "conv2d": (lambda: nn.Conv2d(8, 12, 3, padding=1, stride=2), (2, 8, 9, 8)),
    "conv2d-oblong": (lambda: nn.Conv2d(8, 12, (1, 5), padding=(0, 2)), (2, 8, 5, 6)),
    "conv2d-pixel": (lambda: nn.Conv2d(8, 12, 1, bias=False), (2, 8, 5, 6)),
    "conv2d-grouped": (lambda: nn.Conv2d(8, 12, 3, padding="same", groups=2), (2, 8, 5, 6)),
    "conv3d": (lambda: nn.Conv3d(4, 6, (2, 3, 1)), (2, 4, 5, 6, 3)),
}
NO_LYCORIS = ("embedding", "conv3d")


@dataclass(frozen=True)
class Row:
    """One way to adapt a layer.

    Args:
        method: See `DeltaSpec`.
        name: What is special about it.
        rank: Of the adapter.
        alpha: Of the adapter.
        scale: Set on both sides afterwards.
        options: More of peft's configuration.
        without: Layers for which peft does not have it, or is no reference.
    """

    method: str
    name: str = "plain"
    rank: int = 4
    alpha: float = 3
    scale: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    without: tuple[str, ...] = ()

    @property
    def layers(self) -> list[str]:
        """The layers it is compared on."""
        return [layer for layer in LAYERS if layer not in self.without]

    def config(self) -> Any:
        """Peft's configuration."""
        alpha = {"lora_alpha" if self.method in ("lora", "dora") else "alpha": self.alpha}
        more = {"use_dora": True} if self.method == "dora" else {}
        return CONFIGS[self.method](r=self.rank, target_modules=["layer"], **alpha, **more, **self.options)


# A new method joins with a row, and with its keys above.
ROWS = (
    Row("lora"),
    Row("lora", "rank-stabilized", scale=0.7, options={"use_rslora": True}),
    Row("lora", "bias", alpha=4, options={"lora_bias": True}, without=("embedding",)),
    Row("dora"),
    Row("dora", "scaled", alpha=8, scale=-0.3, options={"use_rslora": True}),
    Row("loha", scale=0.7, without=NO_LYCORIS),
    Row("loha", "tucker", options={"use_effective_conv2d": True}, without=NO_LYCORIS),
    # Of a Conv1d with a full w2 peft computes another product, see `test_adapters`.
    Row("lokr", "full", scale=0.7, rank=8, without=(*NO_LYCORIS, "conv1d")),
    Row("lokr", "low-rank", rank=1, options={"decompose_both": True, "decompose_factor": 4}, without=NO_LYCORIS),
    # And of a Conv1d with a Tucker decomposition of rank 1 it fails.
    Row("lokr", "tucker", rank=2, options={"use_effective_conv2d": True, "decompose_factor": 1}, without=NO_LYCORIS),
)
CELLS = [(row, layer) for row in ROWS for layer in row.layers]


def cell_id(cell: tuple[Row, str]) -> str:
    row, layer = cell
    return f"{row.method}-{row.name}-{layer}"


class Pair:
    """Peft's layer and ours, on the same weights.

    Args:
        row: How the layer is adapted.
        layer: A key of `LAYERS`.
        dtype: Of everything.
        count: How many adapters are active, one after the other.
        seed: What weights and inputs are drawn from.
    """

    def __init__(self, row: Row, layer: str, dtype: torch.dtype, count: int = 1, seed: int = 0) -> None:
        torch.manual_seed(seed)
        build, shape = LAYERS[layer]
        self.row, self.dtype, self.names = row, dtype, NAMES[:count]
        self.layer = build().to(dtype)
        holder = nn.ModuleDict({"layer": deepcopy(self.layer)})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of grouped convolutions and biases, which cannot be merged
            for name in self.names:
                inject_adapter_in_model(row.config(), holder, adapter_name=name)
        self.peft: Any = holder["layer"].to(dtype)
        self.peft.set_adapter(list(self.names))
        self.peft.requires_grad_()
        for parameter in self.peft.parameters():
            nn.init.normal_(parameter, std=0.5)
        self.layer.load_state_dict(self.peft.base_layer.state_dict())
        for name in self.names:
            self.peft.set_scale(name, row.scale)
        self.deltas = [Delta.from_spec(name, self.spec(name), self.layer, row.scale) for name in self.names]
        self.ours = LoraAdapter(self.layer, *self.deltas)
        self.shape = shape

    def of_peft(self, name: str) -> dict[str, nn.Parameter]:
        """Peft's parameters of one adapter, by role."""
        there = dict(self.peft.named_parameters())
        keys = {role: [key.format(name) for key in keys] for role, keys in KEYS[self.row.method].items()}
        return {role: there[key] for role, options in keys.items() for key in options if key in there}

    def spec(self, name: str) -> DeltaSpec:
        """One of peft's adapters as data."""
        tensors = {role: parameter.detach() for role, parameter in self.of_peft(name).items()}
        stabilized = bool(self.row.options.get("use_rslora"))
        return DeltaSpec(self.row.method, tensors, self.row.alpha, stabilized, self.row.rank)

    def inputs(self) -> tuple[Tensor, Tensor]:
        """The same input twice, each for a backward of its own."""
        if isinstance(self.shape, int):
            x = torch.randint(self.shape, (3, 7))
            return x, x
        x = torch.randn(self.shape, dtype=self.dtype)
        return x.clone().requires_grad_(), x.clone().requires_grad_()

    def step(self) -> list[str]:
        """One forward and one backward of both: the names of what differs in a bit."""
        theirs, ours = self.inputs()
        self.peft.zero_grad()
        self.ours.zero_grad()
        expected, got = self.peft(theirs), self.ours(ours)
        gradient = torch.randn_like(expected)
        expected.backward(gradient)
        got.backward(gradient)
        compared = {"output": (expected, got)}
        if theirs.is_floating_point():
            compared["gradient of the input"] = (theirs.grad, ours.grad)
        compared |= {f"gradient of {key}": (a.grad, b.grad) for key, (a, b) in self.weights().items()}
        return [key for key, (a, b) in compared.items() if not same(a, b)]

    def weights(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """All parameters: peft's and ours."""
        base = dict(self.layer.named_parameters())
        pairs = {key: (value, base[key]) for key, value in self.peft.base_layer.named_parameters()}
        for name, delta in zip(self.names, self.deltas, strict=True):
            ours = delta.weights()
            pairs |= {f"{name}.{role}": (theirs, ours[role].tensor) for role, theirs in self.of_peft(name).items()}
        return pairs


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors have the same shape, dtype and bits; 0.0 and -0.0 are one."""
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
