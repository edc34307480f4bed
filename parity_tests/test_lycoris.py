"""LoHa, LoKr and LoCon beside LyCORIS, which brought them to Stable Diffusion and writes most of their files.

lycoris-lora 4.1.3 is a second opinion beside peft, and where peft is no reference (the gradients of a LoHa's Tucker
form, a LoKr of a Conv1d, the core of a LoCon) the only one. What its modules write is read here as a file in kohya's
layout, and both are compared in float64: LyCORIS adds the change to the weight of the layer and subtracts the weight
again, so the two are the same up to rounding, not to the last bit.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from lycoris.modules import LoConModule, LohaModule, LokrModule
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.conversion import KeyMap
from refiners.conversion.loras import LoraNames, read_loras, write_loras
from refiners.fluxion.adapters import LoraSet, inject_loras
from refiners.parity.bits import same_bits
from refiners.parity.rounding import agrees_in_float64, relative_error, typical_magnitude

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of lycoris, for torch.norm

PREFIX = "lora_unet_layer"
LAYERS: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 10), (3, 5, 12)),
    "conv1d": (lambda: nn.Conv1d(8, 12, 3, padding=1), (2, 8, 9)),
    "conv2d": (lambda: nn.Conv2d(8, 12, 3, padding=1, stride=2), (2, 8, 9, 8)),
    "conv2d-pixel": (lambda: nn.Conv2d(8, 12, 1, bias=False), (2, 8, 5, 6)),
    "conv2d-grouped": (lambda: nn.Conv2d(8, 12, 3, padding=1, groups=2), (2, 8, 5, 6)),
}
CONVOLUTIONS = ("conv1d", "conv2d")


@dataclass(frozen=True)
class Row:
    """One way to adapt a layer, as LyCORIS builds it."""

    name: str
    module: type[Any]
    rank: int = 2
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    layers: tuple[str, ...] = tuple(LAYERS)


ROWS = (
    Row("loha", LohaModule),
    Row("loha-tucker", LohaModule, options={"use_tucker": True}, layers=("conv2d", "conv2d-grouped")),
    Row("lokr", LokrModule, rank=1),
    Row("lokr-full", LokrModule, options={"full_matrix": True}),
    Row("lokr-products", LokrModule, rank=1, options={"decompose_both": True, "factor": 4}),
    Row("lokr-tucker", LokrModule, rank=1, options={"use_tucker": True}, layers=("conv2d", "conv2d-grouped")),
    Row("locon", LoConModule, layers=("linear", *CONVOLUTIONS, "conv2d-pixel")),
    Row("locon-core", LoConModule, options={"use_tucker": True}, layers=CONVOLUTIONS),
)
CELLS = [(row, layer) for row in ROWS for layer in row.layers]


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    """LyCORIS builds its weights in torch's default type."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


class Both:
    """A layer with a module of LyCORIS on it, and a copy of the layer with what we read of its state."""

    def __init__(self, row: Row, layer: str, scale: float = 0.7) -> None:
        build, shape = LAYERS[layer]
        self.layer = build()
        self.lycoris = row.module(PREFIX, self.layer, scale, row.rank, 3.0, **row.options)
        for parameter in self.lycoris.parameters():
            nn.init.normal_(parameter, std=0.5)
        self.model = fl.Chain(self.layer)
        self.names = LoraNames.of(self.model, KeyMap({"layer": type(self.layer).__name__}), part="unet")
        self.file = read_loras(self.state())
        self.loras: LoraSet = inject_loras(self.model, self.file.specs_for(self.names), name="style", scale=scale)
        self.shape = shape

    def state(self) -> dict[str, Tensor]:
        """What LyCORIS writes of its module."""
        return {f"{PREFIX}.{key}": tensor.detach() for key, tensor in self.lycoris.custom_state_dict().items()}

    def roles(self) -> dict[str, nn.Parameter]:
        """LyCORIS' parameters, by the roles that they have in our specs."""
        (entry,) = self.file.entries.values()
        there = dict(self.lycoris.named_parameters())
        return {role: there[entry.keys[role].removeprefix(f"{PREFIX}.")] for role in entry.spec.tensors}


def is_close(ours: Tensor, theirs: Tensor) -> bool:
    return agrees_in_float64(relative_error(ours, theirs, typical_magnitude(theirs, gradient=True)))


def differing(both: Both) -> list[str]:
    """What is not the same up to rounding: outputs, and the gradients of inputs and weights."""
    x = torch.randn(both.shape)
    inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
    outputs = both.model(inputs[0]), both.lycoris(inputs[1])
    gradient = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(gradient)
    compared = {"output": outputs, "gradient of the input": (inputs[0].grad, inputs[1].grad)}
    (delta,) = both.loras.loras
    ours = delta.weights()
    compared |= {role: (ours[role].tensor.grad, theirs.grad) for role, theirs in both.roles().items()}
    assert len(compared) == 2 + len(ours)
    return [name for name, (a, b) in compared.items() if a is None or b is None or not is_close(a, b)]


def cell_id(cell: tuple[Row, str]) -> str:
    return f"{cell[0].name}-{cell[1]}"


@pytest.mark.parametrize("cell", CELLS, ids=cell_id)
def test_outputs_and_gradients_are_those_of_lycoris(cell: tuple[Row, str]) -> None:
    both = Both(*cell)
    base = both.layer(torch.ones(both.shape))
    assert not is_close(both.model(torch.ones(both.shape)), base)
    assert not differing(both)


@pytest.mark.parametrize("cell", CELLS, ids=cell_id)
def test_the_merged_weight_is_that_of_lycoris(cell: tuple[Row, str]) -> None:
    both = Both(*cell, scale=1.0)
    shape = tuple(both.layer.weight.shape)
    # Its own `get_diff_weight` of a LoHa and a LoKr multiplies by alpha / rank twice, unlike its forward.
    change = both.lycoris.get_diff_weight()[0] if cell[0].module is LoConModule else both.lycoris.get_weight(shape)
    expected = both.layer.weight + change.reshape(shape)
    both.loras.merge()
    assert is_close(both.layer.weight, expected)


@pytest.mark.parametrize("cell", CELLS, ids=cell_id)
def test_what_lycoris_has_written_is_written_again_with_the_same_bits(cell: tuple[Row, str], tmp_path: Any) -> None:
    both = Both(*cell)
    write_loras(tmp_path / "again.safetensors", both.loras.specs(), both.names, layout="kohya")
    again = read_loras(tmp_path / "again.safetensors").tensors
    state = both.state()
    if cell[0].name == "lokr-full":
        del again[f"{PREFIX}.alpha"], state[f"{PREFIX}.alpha"]  # it counts for nothing
    assert again.keys() == state.keys()
    assert all(same_bits(again[key], tensor.to(again[key].dtype)) for key, tensor in state.items())


def lose_the_alpha(both: Both) -> None:
    both.loras.loras[0].alpha = None
    both.loras.scale = 0.7


def turn_a_matrix(both: Both) -> None:
    (delta,) = both.loras.loras
    for weight in delta.weights().values():
        weight.tensor.data = weight.tensor.data.flip(0).clone()


@pytest.mark.parametrize("fault", [lose_the_alpha, turn_a_matrix])
@pytest.mark.parametrize("row", [row for row in ROWS if row.name != "lokr-full"], ids=lambda row: row.name)
def test_a_planted_fault_is_found(row: Row, fault: Callable[[Both], None]) -> None:
    both = Both(row, "conv2d")
    fault(both)
    assert differing(both)
