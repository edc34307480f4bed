"""Several LoRAs on a layer that run as one pair of products."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.errors import AdapterError
from refiners.fluxion.adapters import (
    DeltaSpec,
    FusedLoras,
    adapter_state_dict,
    base_state_dict,
    fuse,
    inject_loras,
    load_adapter_state_dict,
    unfuse,
)
from refiners.fluxion.selectors import select
from refiners.parity.rounding import ERROR_RATIO, ErrorPair, joint_ratio, relative_error, typical_magnitude
from tests.refiners.fluxion.adapters.lora_trees import X, bits, copied, is_close, memory, model, trained


def test_fused_sets_give_the_same_outputs_up_to_rounding_and_are_exact_again_afterwards() -> None:
    tree = model()
    sets = [trained(tree, name, rank) for name, rank in (("a", 2), ("b", 3), ("c", 1))]
    sets[1].scale = -0.7
    exact, specs = tree(X), [copied(loras) for loras in sets]
    assert fuse(tree) == 4
    assert {(fused.names, fused.rank) for fused in tree.layers(FusedLoras, recurse=True)} == {(("a", "b", "c"), 6)}
    assert is_close(tree(X), exact)
    with torch.no_grad():
        assert is_close(tree(X), exact)
    unfuse(tree)
    assert bits(tree(X)) == bits(exact)
    for loras, before in zip(sets, specs, strict=True):
        for path, spec in loras.specs().items():
            assert all(torch.equal(tensor, before[path].tensors[role]) for role, tensor in spec.tensors.items())


def test_a_fused_layer_adds_at_most_two_products_to_the_base() -> None:
    tree, x = fl.Chain(fl.Linear(6, 6)), torch.randn(3, 6)
    for name in ("a", "b", "c", "d"):
        trained(tree, name, fused=True)
    with torch.no_grad(), torch.profiler.profile() as profile:
        tree(x)
    products = [event.name for event in profile.events() if event.name in ("aten::mm", "aten::addmm", "aten::addmm_")]
    assert len(products) == 3


def test_a_hook_on_the_layer_sees_its_output_without_the_fused_loras() -> None:
    tree, x = fl.Chain(fl.Linear(6, 6)), torch.randn(3, 6)
    layer, base = tree[0], tree(x)
    trained(tree, "a", fused=True)
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda *args: seen.append(args[2]))
    with torch.no_grad():
        tree(x)
    assert torch.equal(seen[0], base)


def test_gradients_through_the_fused_form_reach_the_tensors_of_each_set() -> None:
    tree = model()
    sets = [trained(tree, "a"), trained(tree, "b", rank=1)]

    def gradients() -> list[Tensor]:
        for parameter in tree.parameters():
            parameter.grad = None
        tree(X).square().sum().backward()
        found = [parameter.grad for loras in sets for parameter in loras.parameters()]
        return [gradient for gradient in found if gradient is not None]

    exact = gradients()
    fuse(tree)
    fused = gradients()
    assert len(fused) == 16
    for a, b in zip(fused, exact, strict=True):
        assert is_close(a, b)


def test_what_happens_to_a_set_reaches_the_fused_form() -> None:
    tree = model()
    base = tree(X)
    first, second = trained(tree, "a", fused=True), trained(tree, "b", fused=True)

    def exact() -> Tensor:
        unfuse(tree)
        output = tree(X)
        fuse(tree)
        return output

    first.scale = 0.3
    assert is_close(tree(X), exact())
    second.enabled = False
    assert is_close(tree(X), exact())
    second.enabled = True
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(0.5)
    assert is_close(tree(X), exact())
    second.swap(
        {path: DeltaSpec("lora", {r: t * 3 for r, t in s.tensors.items()}) for path, s in second.specs().items()}
    )
    assert is_close(tree(X), exact())
    tree.to(dtype=torch.float32).to(dtype=torch.float64)
    assert is_close(tree(X), exact())
    first.merge()
    first.unmerge()
    first.eject()
    assert {fused.names for fused in tree.layers(FusedLoras, recurse=True)} == {("b",)}
    for loras in (first, second):
        for parameter in loras.parameters():
            parameter.data.zero_()
    assert torch.equal(tree(X), base)
    second.eject()
    assert not list(tree.layers(FusedLoras, recurse=True))


def test_fusing_takes_no_memory_and_leaves_no_keys() -> None:
    tree = model()
    trained(tree, "a")
    trained(tree, "b")
    keys = list(tree.state_dict())
    before = memory(tree)
    fuse(tree)
    assert list(tree.state_dict()) == keys
    assert memory(tree) == before
    assert list(base_state_dict(tree)) == list(model().state_dict())


def test_other_methods_and_biases_run_beside_what_is_fused() -> None:
    tree = model()
    for i, method in enumerate(("dora", "loha", "lokr")):
        inject_loras(tree, name=f"{i}", rank=2, method=method)
    with pytest.raises(AdapterError, match="no LoRAs that can be fused"):
        fuse(tree)
    trained(tree, "a")
    exact = tree(X)
    assert fuse(tree) == 4
    assert is_close(tree(X), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strength", [1, 20])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: fl.Conv2d(3, 8, kernel_size=3, stride=2, padding=1), (2, 3, 12, 10)),
        (lambda: fl.Conv2d(12, 6, kernel_size=1), (2, 12, 6, 5)),
        (lambda: fl.Linear(64, 64), (24, 64)),
    ],
    ids=["conv2d", "pixel", "linear"],
)
def test_fused_loras_are_as_near_to_the_truth_as_one_after_the_other(
    layer: Any, shape: tuple[int, ...], strength: float, dtype: torch.dtype
) -> None:
    errors: list[ErrorPair] = []
    for seed in range(12):
        torch.manual_seed(seed)
        tree = fl.Chain(layer()).to(dtype=dtype)
        for name, rank, alpha in (("a", 4, 2.1 * strength), ("b", 8, -26.0 * strength)):
            loras = inject_loras(select(tree).of(fl.Linear, fl.Conv2d), name=name, rank=rank, alpha=alpha)
            for parameter in loras.parameters():
                nn.init.normal_(parameter, std=0.5)
        x = torch.randn(shape).to(dtype)
        with torch.no_grad():
            exact = tree(x)
            truth = deepcopy(tree).to(dtype=torch.float64)(x.double())
            fuse(tree)
            both = [relative_error(y, truth, typical_magnitude(truth, gradient=True)) for y in (exact, tree(x))]
        errors.append(ErrorPair(str(seed), *both))
    assert joint_ratio(errors, dtype) <= ERROR_RATIO


@pytest.mark.parametrize("assign", [False, True])
def test_weights_that_are_loaded_into_a_fused_model_are_seen(assign: bool) -> None:
    tree = model()
    trained(tree, "a", fused=True)
    trained(tree, "b", fused=True)
    new = {key: torch.randn_like(tensor) for key, tensor in adapter_state_dict(tree).items()}
    load_adapter_state_dict(tree, new, assign=assign)
    with torch.no_grad():
        fused = tree(X)
        unfuse(tree)
        assert is_close(fused, tree(X))
        fuse(tree)
        tree.load_state_dict({key: tensor * 0.5 for key, tensor in tree.state_dict().items()}, assign=assign)
        fused = tree(X)
        unfuse(tree)
        assert is_close(fused, tree(X))
