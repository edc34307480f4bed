"""What is done with sets of LoRAs that are in: scales, switches, swapping, and the memory they take."""

import gc
import weakref

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.errors import AdapterError, LoraNameError
from refiners.fluxion.adapters import DeltaSpec, adapter_state_dict, inject_loras
from tests.refiners.fluxion.adapters.lora_trees import X, bits, copied, is_close, memory, model, trained

# --- scales and switches -----------------------------------------------------------------------------------------


def test_scale_0_and_disabled_are_the_base_to_the_last_bit_even_for_negative_zeros_and_overflows() -> None:
    tree = fl.Chain(fl.Linear(2, 2, bias=False))
    nn.init.zeros_(tree[0].weight)
    x = torch.tensor([[-1.0, -2.0]])
    loras = inject_loras(tree, name="a", rank=1)
    base = bits(tree[0][0](x))
    for parameter in loras.parameters():
        nn.init.constant_(parameter, 1e30)
    assert bits(tree(x)) != base
    loras.scale = 0.0
    assert bits(tree(x)) == base
    loras.scale = 1.0
    with loras.disabled():
        assert not loras.enabled
        assert bits(tree(x)) == base
    assert loras.enabled
    loras.enabled = False
    assert bits(tree(x)) == base


def test_disabled_gives_each_lora_the_state_back_that_it_had() -> None:
    loras = trained(model(), "a")
    loras.loras[0].switch.set("enabled", value=False)
    with loras.disabled():
        pass
    assert [lora.switch.enabled for lora in loras.loras] == [False, True, True, True]


def test_each_layer_has_a_scale_by_its_path() -> None:
    tree = model()
    loras = trained(tree, "a")
    loras.scales["Residual.Linear_2"] = 0.25
    assert dict(loras.scales) == {"Conv2d": 1, "Residual.Linear_1": 1, "Residual.Linear_2": 0.25, "Linear": 1}
    with pytest.raises(LoraNameError, match=r"nearest: Residual.Linear_2"):
        loras.scales["Residual.Linear_3"] = 1.0
    with pytest.raises(AdapterError, match="set it to 0"):
        del loras.scales["Linear"]


# --- swapping ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_fused", [False, True])
def test_other_weights_go_in_without_another_compilation(is_fused: bool) -> None:
    torch._dynamo.reset()
    graphs = 0

    def backend(module: torch.fx.GraphModule, _: list[Tensor]) -> object:
        nonlocal graphs
        graphs += 1
        return module.forward

    tree, other = model(), model()
    other.load_state_dict(tree.state_dict())
    loras, stacked = trained(tree, "a", 3, fused=is_fused), trained(tree, "b", fused=is_fused)
    compiled = torch.compile(tree, fullgraph=True, backend=backend)
    with torch.no_grad():
        compiled(X)
        for rank, scale in ((3, 1.0), (1, -0.5), (2, 0.0)):
            specs = copied(trained(other, f"{rank}", rank))
            loras.swap(specs)
            loras.scale = stacked.scale = scale
            assert is_close(compiled(X), tree(X))
            assert loras.specs()["Linear"].rank == rank
            assert all(
                torch.equal(loras.specs()[path].tensors["up"], spec.tensors["up"]) for path, spec in specs.items()
            )
    assert graphs == 1


def test_a_swap_that_does_not_fit_tells_everything_and_writes_nothing() -> None:
    tree = model()
    loras = trained(tree, "a")
    before = [parameter.clone() for parameter in loras.parameters()]
    specs = copied(loras)
    specs["Linaer"] = specs.pop("Linear")
    specs["Conv2d"] = DeltaSpec("lora", {"down": torch.ones(3, 3, 3, 3), "up": torch.ones(6, 3, 1, 1)})
    nan = torch.full((1, 6), torch.nan)
    specs["Residual.Linear_1"] = DeltaSpec("lora", {"down": nan, "up": torch.ones(6, 1)})
    with pytest.raises(AdapterError, match="nothing was written") as caught:
        loras.swap(specs)
    for line in ("Linear: missing", "Linaer: unexpected (nearest: Linear)", "Conv2d: ", "Residual.Linear_1: "):
        assert f"  {line}" in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(loras.parameters(), before, strict=True))


# --- memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_fused", [False, True])
def test_a_set_takes_the_memory_of_its_tensors_and_gives_it_back_at_once(is_fused: bool) -> None:
    tree = model()
    before = memory(tree)
    loras = trained(tree, "a", fused=is_fused)
    brought = sum(tensor.numel() * tensor.element_size() for tensor in adapter_state_dict(tree).values())
    assert memory(tree) == before + brought
    loras.merge()
    loras.unmerge()
    assert memory(tree) == before + brought
    alive = [weakref.ref(parameter) for parameter in loras.parameters()]
    storages = [weakref.ref(parameter.untyped_storage()) for parameter in loras.parameters()]
    gc.collect()
    gc.disable()
    try:
        loras.eject()
        del loras
        assert memory(tree) == before
        assert [ref() for ref in alive] == [None] * len(alive)
        assert [ref() for ref in storages] == [None] * len(storages)
    finally:
        gc.enable()
