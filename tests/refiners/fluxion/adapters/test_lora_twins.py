"""LoRAs that are in use in more than one place: layers that a tree holds twice, and structural copies."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.fluxion.adapters import LoraAdapter, LoraSet, fuse, inject_loras, unfuse
from refiners.parity.rounding import agrees_in_float64, relative_error, typical_magnitude

X = torch.linspace(-1, 1, 8, dtype=torch.float64).view(2, 4)


def build() -> fl.Chain:
    torch.manual_seed(0)
    shared = fl.Linear(4, 4)
    return fl.Chain(shared, fl.Residual(shared), fl.Linear(4, 4)).to(torch.float64)


def inject(model: fl.Chain, name: str) -> LoraSet:
    loras = inject_loras(model, name=name, rank=2)
    for parameter in loras.parameters():
        nn.init.normal_(parameter)
    return loras


def is_same(got: Tensor, expected: Tensor) -> bool:
    return agrees_in_float64(relative_error(got, expected, typical_magnitude(expected, gradient=True)))


def test_a_layer_in_two_places_is_fused_in_both_and_is_exact_again_afterwards() -> None:
    model = build()
    before = model(X)
    sets = [inject(model, name) for name in ("a", "b")]
    alone = model(X)
    assert fuse(model) == 2
    assert is_same(model(X), alone)
    sets.append(inject(model, "c"))
    sets[2].scale = 0.0
    assert is_same(model(X), alone)
    unfuse(model)
    assert torch.equal(model(X), alone)
    fuse(model[1])  # what is below this Chain stands elsewhere too
    assert is_same(model(X), alone)
    for loras in sets:
        loras.eject()
    assert torch.equal(model(X), before)
    assert not list(model.layers(LoraAdapter, recurse=True))


@pytest.mark.parametrize("with_copy", [fuse, lambda copied: (fuse(copied), unfuse(copied))])
def test_fusing_a_structural_copy_leaves_the_original_as_it_is(with_copy: Callable[[fl.Chain], object]) -> None:
    model = build()
    loras = inject(model, "a")
    alone = model(X)
    copied = model.structural_copy()
    with_copy(copied)
    assert torch.equal(model(X), alone)
    assert is_same(copied(X), alone)
    with loras.merged():
        assert is_same(model(X), alone)
        assert is_same(copied(X), alone)
    with loras.disabled():
        assert torch.equal(copied(X), model(X))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert is_same(compiled(X), alone)
    unfuse(copied)
    assert torch.equal(copied(X), alone)


def test_a_set_that_lost_its_loras_by_hand_still_takes_its_adapters_along() -> None:
    model = build()
    keys = list(model.state_dict())
    a, b = inject(model, "a"), inject(model, "b")
    for adapter in a.adapters:
        adapter.remove_lora("a")
        adapter.remove_lora("b")
    b.eject()
    a.eject()
    assert list(model.state_dict()) == keys
