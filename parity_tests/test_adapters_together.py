"""Adapters together on one layer, beside peft 0.21.2: two IA3, a tuned bias inside of a DoRA, two merged DoRAs."""

import warnings
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import IA3Config, inject_adapter_in_model
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from parity_tests.peft_layers import LAYERS, Pair, Row, same
from refiners.fluxion.adapters import LoraAdapter, inject_bias_tuning, inject_ia3
from refiners.fluxion.adapters.lora import Delta
from refiners.fluxion.selectors import select
from refiners.parity.rounding import (
    ERROR_RATIO,
    ErrorPair,
    agrees_in_float64,
    joint_ratio,
    relative_error,
    typical_magnitude,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@pytest.mark.parametrize("feedforward", [False, True], ids=["outputs", "inputs"])
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_two_ia3_scale_one_after_the_other_where_peft_multiplies_their_vectors(name: str, feedforward: bool) -> None:
    build, shape = LAYERS[name]
    assert not isinstance(shape, int)
    layer = build().double()
    holder = nn.ModuleDict({"layer": deepcopy(layer)})
    config = IA3Config(target_modules=["layer"], feedforward_modules=["layer"] if feedforward else [])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are several, which is what is meant
        for adapter in ("first", "second"):
            inject_adapter_in_model(config, holder, adapter_name=adapter)
    theirs: Any = holder["layer"].double().requires_grad_()
    theirs.set_adapter(["first", "second"])
    theirs.requires_grad_()
    model = fl.Chain(layer)
    sets = [inject_ia3(select(model).of(type(layer)), feedforward=feedforward) for _ in range(2)]
    scales = [next(ia3.parameters()) for ia3 in sets]
    for scale, adapter in zip(scales, ("first", "second"), strict=True):
        nn.init.normal_(scale)
        theirs.ia3_l[adapter].data.copy_(scale.detach().view_as(theirs.ia3_l[adapter]))

    x = torch.randn(shape, dtype=torch.float64)
    base = layer(x)
    inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
    outputs = theirs(inputs[0]), model(inputs[1])
    gradient = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(gradient)
    pairs = [outputs, (inputs[0].grad, inputs[1].grad), (theirs.base_layer.weight.grad, layer.weight.grad)]
    pairs += [(theirs.ia3_l[a].grad.flatten(), s.grad) for a, s in zip(("first", "second"), scales, strict=True)]
    assert all(is_close(theirs_, ours) for theirs_, ours in pairs)
    # They leave in any order.
    sets[0].eject()
    assert not is_close(outputs[0], model(x))
    sets[1].eject()
    assert same(model(x), base)


def is_close(a: Tensor | None, b: Tensor | None) -> bool:
    assert a is not None
    assert b is not None
    return agrees_in_float64(relative_error(b, a, typical_magnitude(a, gradient=True)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["linear", "conv2d", "conv1d"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_tuned_bias_inside_of_a_dora_is_the_bias_that_peft_trains(method: str, name: str, dtype: torch.dtype) -> None:
    pair = Pair(Row(method, alpha=8), name, dtype)
    model = fl.Chain(pair.layer)
    adapter = pair.ours.inject(model)
    biases = inject_bias_tuning(select(model).of(type(pair.layer)).outside(Delta))
    (tuned,) = biases.parameters()
    assert tuned.shape == pair.layer.bias.shape
    both = [torch.optim.SGD([bias], lr=0.01, momentum=0.9) for bias in (pair.peft.base_layer.bias, tuned)]
    for _ in range(5):
        theirs, ours = pair.inputs()
        pair.peft.zero_grad()
        model.zero_grad()
        expected, got = pair.peft(theirs), model(ours)
        assert same(expected, got)
        gradient = torch.randn_like(expected)
        expected.backward(gradient)
        got.backward(gradient)
        assert same(theirs.grad, ours.grad)
        assert same(pair.peft.base_layer.bias.grad, tuned.grad)
        for optimizer in both:
            optimizer.step()
    assert not same(tuned, pair.layer.bias)
    biases.enabled = False
    assert same(model(ours), adapter(ours))
    assert not same(model(ours), got)


def test_a_dora_that_takes_the_bias_of_its_layer_for_the_tuned_one_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoraAdapter, "_bias", lambda self: self.target.bias)
    pair = Pair(Row("dora", alpha=8), "linear", torch.float64)
    model = fl.Chain(pair.layer)
    pair.ours.inject(model)
    (tuned,) = inject_bias_tuning(select(model).of(nn.Linear).outside(Delta)).parameters()
    for bias in (tuned, pair.peft.base_layer.bias):
        nn.init.constant_(bias, 0.5)
    theirs, ours = pair.inputs()
    assert not is_close(pair.peft(theirs), model(ours))


def test_two_doras_merged_in_bfloat16_are_as_near_to_the_truth_as_those_of_peft() -> None:
    """Both are off by rounding: a unit in the last place, which is 0.5 where weights are above 64."""
    dora, errors = Row("dora", "scaled", alpha=8, scale=-0.3), list[ErrorPair]()
    for name in ("linear", "conv2d", "embedding"):
        for seed in range(8):
            pair = Pair(dora, name, torch.bfloat16, 2, seed=seed)
            merged, truth = merged_weight(pair.layer, pair.deltas), in_float64(pair)
            pair.peft.merge()
            magnitude = typical_magnitude(truth, gradient=True)
            both = [relative_error(weight, truth, magnitude) for weight in (pair.peft.base_layer.weight, merged)]
            errors.append(ErrorPair(f"{name} {seed}", *both))
    assert joint_ratio(errors, torch.bfloat16) <= ERROR_RATIO


def merged_weight(layer: Any, deltas: Iterable[Delta[Any]]) -> Tensor:
    base = weight = layer.weight.detach()
    for delta in deltas:
        weight = delta.merged_weight(weight, base)
    return weight.detach()


def in_float64(pair: Pair) -> Tensor:
    """What the merged weight would be without rounding."""
    layer = deepcopy(pair.layer).double()
    deltas: list[Delta[Any]] = []
    for delta in pair.deltas:
        spec = delta.spec()
        wide = replace(spec, tensors={role: tensor.double() for role, tensor in spec.tensors.items()})
        deltas.append(Delta.from_spec(delta.name, wide, layer, delta.scale))
    return merged_weight(layer, deltas)
