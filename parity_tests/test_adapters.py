"""Every method of adapting a layer beside peft 0.21.2, at every kind of layer, to the last bit.

Where peft is no reference, the formula of the paper is: on whole numbers, with which float64 computes without rounding.
"""

import warnings
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoKrConfig, inject_adapter_in_model
from peft.tuners.loha.layer import make_weight_cp
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from parity_tests.peft_layers import CELLS, LAYERS, ROWS, Pair, Row, cell_id, same
from refiners.fluxion.adapters import inject_bias_tuning, inject_ia3, inject_norm_tuning
from refiners.fluxion.adapters.lora import Conv1dLokr, Conv2dLoha, Conv3dLora, Delta
from refiners.fluxion.selectors import select

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
# peft 0.21.2 takes the gradients of w1_a and w2_a from the other decomposition's core: see the test of the formula.
WRONG_IN_PEFT = ("w1_a", "w2_a")


def is_tucker_loha(row: Row, layer: str) -> bool:
    return (
        row.method == "loha"
        and row.name == "tucker"
        and layer in ("conv1d", "conv2d", "conv2d-oblong", "conv2d-grouped")
    )


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS, ids=cell_id)
def test_outputs_and_gradients_are_those_of_peft(cell: tuple[Row, str], dtype: torch.dtype, count: int) -> None:
    differing = Pair(*cell, dtype, count).step()
    if is_tucker_loha(*cell):
        assert differing
        differing = [name for name in differing if not name.endswith(WRONG_IN_PEFT)]
    assert not differing


def momentum(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01)


@pytest.mark.parametrize(
    ("dtype", "optimizer", "count"), [(torch.float64, adam, 1), (torch.float32, momentum, 2)], ids=["adamw", "momentum"]
)
@pytest.mark.parametrize("cell", [cell for cell in CELLS if not is_tucker_loha(*cell)], ids=cell_id)
def test_five_steps_of_training_are_those_of_peft(
    cell: tuple[Row, str], dtype: torch.dtype, optimizer: Callable[..., torch.optim.Optimizer], count: int
) -> None:
    pair = Pair(*cell, dtype, count)
    both = optimizer(pair.peft.parameters()), optimizer(pair.ours.parameters())
    for _ in range(5):
        assert not pair.step()
        for each in both:
            each.step()
    assert not [key for key, (theirs, ours) in pair.weights().items() if not same(theirs, ours)]


def can_merge(row: Row, layer: str) -> bool:
    """Whether peft can: not with a bias where the layer has none, and no LoRA in groups."""
    if row.method in ("lora", "dora") and layer == "conv2d-grouped":
        return False
    return row.name != "bias" or layer not in ("linear-without-bias", "conv2d-pixel")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", [cell for cell in CELLS if can_merge(*cell)], ids=cell_id)
def test_merged_weights_are_those_of_peft(cell: tuple[Row, str], dtype: torch.dtype) -> None:
    # peft takes the first of two DoRAs out again while it merges the second, and does not get the same bits back.
    pair = Pair(*cell, dtype, 1 if cell[0].method == "dora" else 2)
    weight, bias = pair.layer.weight.detach().clone(), getattr(pair.layer, "bias", None)
    base = weight
    for delta in pair.deltas:
        assert same(pair.peft.get_delta_weight(delta.name), delta.delta_weight())
        weight, change = delta.merged_weight(weight, base), delta.delta_bias()
        bias = bias if change is None else bias + change
    pair.peft.merge()
    assert same(pair.peft.base_layer.weight, weight)
    assert bias is None or same(pair.peft.base_layer.bias, bias)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.method}-{row.name}")
def test_scale_0_gives_the_base_of_peft_as_well(row: Row) -> None:
    pair = Pair(row, "linear", torch.float32, count=2)
    x = torch.randn(4, 12)
    for delta in pair.deltas:
        delta.scale = 0
    assert same(pair.ours(x), pair.peft.base_layer(x))


def lose_the_alpha(pair: Pair) -> None:
    for delta in pair.deltas:
        delta.alpha = None
        delta.scale = pair.row.scale


def divide_by_the_other_rank(pair: Pair) -> None:
    for delta in pair.deltas:
        delta.rank_stabilized = not delta.rank_stabilized
        delta.scale = pair.row.scale


def swap_the_order(pair: Pair) -> None:
    first = pair.ours[1]
    pair.ours.remove(first)
    pair.ours.append(first)


def train_the_norm(pair: Pair) -> None:
    """Computes what it has to, with the gradient that the paper leaves out."""

    def factor_for(self: Any, x: Tensor, weight: Tensor) -> Tensor:
        norm = self._norm(weight + self._factor(self._unscaled(weight)))
        return self.magnitude(norm).view(1, -1)

    for delta in pair.deltas:
        delta._factor_for = factor_for.__get__(delta)


@pytest.mark.parametrize(
    ("fault", "row"),
    [
        *((lose_the_alpha, row) for row in ROWS if row.alpha != row.rank),
        *((divide_by_the_other_rank, row) for row in ROWS if row.rank > 1),
        *((swap_the_order, row) for row in ROWS if row.scale != 1),
        (train_the_norm, Row("dora")),
    ],
    ids=lambda value: f"{value.method}-{value.name}" if isinstance(value, Row) else value.__name__,
)
def test_a_planted_fault_is_found(fault: Callable[[Pair], None], row: Row) -> None:
    pair = Pair(row, "linear", torch.float32, count=2)
    fault(pair)
    assert pair.step()


# Where peft 0.21.2 is no reference


def whole(*shape: int) -> Tensor:
    """Whole numbers, with which float64 computes without rounding."""
    return torch.randint(-3, 4, shape).double()


def with_whole_numbers(delta: Delta[Any]) -> Delta[Any]:
    with torch.no_grad():
        for weight in delta.weights().values():
            weight.tensor.copy_(whole(*weight.tensor.shape))
    return delta


def test_the_gradients_of_a_tucker_loha_are_those_of_the_formula_and_peft_has_others() -> None:
    layer = nn.Conv2d(6, 5, 3, dtype=torch.float64)
    delta = with_whole_numbers(Conv2dLoha.for_target("a", layer, rank=2, tucker=True))
    roles = {role: weight.tensor for role, weight in delta.weights().items()}
    gradient = whole(5, 6, 3, 3)
    first = torch.einsum("ijkl,jr,ip->prkl", roles["t1"], roles["w1_b"], roles["w1_a"])
    second = torch.einsum("ijkl,jr,ip->prkl", roles["t2"], roles["w2_b"], roles["w2_a"])
    expected = torch.autograd.grad(first * second, list(roles.values()), gradient)
    got = torch.autograd.grad(delta.delta_weight(), list(roles.values()), gradient)
    assert all(same(a, b) for a, b in zip(expected, got, strict=True))
    order = ("t1", "w1_a", "w1_b", "t2", "w2_a", "w2_b")
    of_peft = make_weight_cp(*(roles[role] for role in order), scale=torch.tensor(1.0))
    theirs = dict(zip(roles, torch.autograd.grad(of_peft, list(roles.values()), gradient), strict=True))
    differing = [role for role, value in zip(roles, expected, strict=True) if not same(value, theirs[role])]
    assert differing == list(WRONG_IN_PEFT)


def test_a_lokr_of_a_conv1d_is_the_kronecker_product_and_peft_has_another() -> None:
    layer = nn.Conv1d(8, 12, 3, dtype=torch.float64)
    delta = with_whole_numbers(Conv1dLokr.for_target("a", layer, rank=8))
    roles = {role: weight.tensor for role, weight in delta.weights().items()}
    assert list(roles) == ["w1", "w2"]
    product = torch.stack([torch.kron(roles["w1"], roles["w2"][:, :, i]) for i in range(3)], dim=2)
    assert same(delta.delta_weight(), product)
    holder = nn.ModuleDict({"layer": layer})
    inject_adapter_in_model(LoKrConfig(r=8, alpha=8, target_modules=["layer"]), holder)
    theirs: Any = holder["layer"].double()
    with torch.no_grad():
        theirs.lokr_w1["default"].copy_(roles["w1"])
        theirs.lokr_w2["default"].copy_(roles["w2"])
    assert not same(theirs.get_delta_weight("default"), product)


@pytest.mark.parametrize("kernel", [(1, 1, 1), (1, 1, 3)])
def test_a_lora_of_a_conv3d_of_one_pixel_is_merged_where_peft_fails(kernel: tuple[int, int, int]) -> None:
    layer = nn.Conv3d(4, 6, kernel, dtype=torch.float64)
    delta = with_whole_numbers(Conv3dLora.for_target("a", layer, rank=2))
    product = torch.einsum("orxyz,rixyz->oixyz", delta.up.weight.expand(-1, -1, *kernel), delta.down.weight)
    assert same(delta.delta_weight(), product)


# IA3, norm and bias tuning


class Tanh(fl.Lambda):
    def __init__(self) -> None:
        super().__init__(torch.tanh)


def compare_training(
    theirs: nn.Module, ours: nn.Module, x: Tensor, parameters: Callable[[], list[tuple[nn.Parameter, nn.Parameter]]]
) -> None:
    """Five steps with momentum: outputs, gradients and weights."""
    both = [momentum([pair[side] for pair in parameters()]) for side in (0, 1)]
    for _ in range(5):
        inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
        outputs = theirs(inputs[0]), ours(inputs[1])
        assert same(*outputs)
        gradient = torch.randn_like(outputs[0])
        for optimizer, output in zip(both, outputs, strict=True):
            optimizer.zero_grad()
            output.backward(gradient)
        assert same(inputs[0].grad, inputs[1].grad)
        assert all(same(a.grad, b.grad) for a, b in parameters())
        for optimizer in both:
            optimizer.step()
        assert all(same(a, b) for a, b in parameters())


IA3_LAYERS = [layer for layer in LAYERS if layer not in ("embedding", "conv1d")]


@pytest.mark.parametrize("feedforward", [False, True], ids=["outputs", "inputs"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", IA3_LAYERS)
def test_ia3_gives_the_outputs_and_gradients_of_peft(name: str, dtype: torch.dtype, feedforward: bool) -> None:
    build, shape = LAYERS[name]
    assert not isinstance(shape, int)
    layer = build().to(dtype)
    holder = nn.ModuleDict({"layer": deepcopy(layer)})
    config = IA3Config(target_modules=["layer"], feedforward_modules=["layer"] if feedforward else [])
    inject_adapter_in_model(config, holder)
    theirs: Any = holder["layer"].to(dtype).requires_grad_()
    model = fl.Chain(layer)
    ia3 = inject_ia3(select(model).of(type(layer)), feedforward=feedforward)
    scale = next(ia3.parameters())
    nn.init.normal_(scale)
    with torch.no_grad():
        theirs.ia3_l["default"].copy_(scale.view_as(theirs.ia3_l["default"]))

    x = torch.randn(shape, dtype=dtype)
    inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
    outputs = theirs(inputs[0]), model(inputs[1])
    assert same(*outputs)
    gradient = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(gradient)
    assert same(inputs[0].grad, inputs[1].grad)
    assert scale.grad is not None
    assert same(theirs.ia3_l["default"].grad.flatten(), scale.grad)
    assert all(same(a.grad, b.grad) for a, b in zip(theirs.base_layer.parameters(), layer.parameters(), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_tuning_trains_as_in_peft(dtype: torch.dtype) -> None:
    upstream = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.LayerNorm(8, bias=False)).to(dtype)
    for parameter in upstream.parameters():
        nn.init.normal_(parameter)
    layers = deepcopy(upstream)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it does not know the type, of each norm
        inject_adapter_in_model(LNTuningConfig(target_modules=["1", "3"]), upstream)
    model = fl.Chain(layers[0], layers[1], Tanh(), layers[3])
    norms = inject_norm_tuning(model)
    theirs = [p for i in (1, 3) for p in upstream[i].ln_tuning_layers["default"].parameters()]
    compare_training(
        upstream, model, torch.randn(3, 6, dtype=dtype), lambda: [*zip(theirs, norms.parameters(), strict=True)]
    )
    norms.eject()
    assert all(same(a, b) for a, b in zip(layers.parameters(), (upstream[0].weight, upstream[0].bias), strict=False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_tuning_trains_as_the_biases_of_the_model_themselves(dtype: torch.dtype) -> None:
    upstream = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), nn.GroupNorm(2, 4), nn.Linear(5, 6))
    upstream = upstream.to(dtype)
    for parameter in upstream.parameters():
        nn.init.normal_(parameter)
    layers = deepcopy(upstream)
    model = fl.Chain(*layers)
    biases = inject_bias_tuning(model)
    theirs = [layer.bias for layer in upstream]
    x = torch.randn(2, 3, 4, 5, dtype=dtype)
    compare_training(upstream, model, x, lambda: [*zip(theirs, biases.parameters(), strict=True)])
