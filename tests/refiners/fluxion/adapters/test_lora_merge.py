"""Merging a set of LoRAs into the weights, and out again: the base's cost, and the base's bits."""

from collections import Counter
from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import refiners.fluxion.layers as fl
from refiners.errors import AdapterError
from refiners.fluxion.adapters import (
    DeltaSpec,
    LoraSet,
    adapter_state_dict,
    base_state_dict,
    inject_loras,
    load_base_state_dict,
)
from refiners.fluxion.adapters.weights import named_base_modules
from refiners.fluxion.selectors import select
from tests.refiners.fluxion.adapters.lora_trees import is_close, model

X = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def trained(tree: fl.Chain, name: str, method: str = "lora", **settings: Any) -> LoraSet:
    layers = (fl.Linear, fl.Conv2d) if method == "lora" else (fl.Linear,)
    loras = inject_loras(select(tree).of(*layers), name=name, rank=2, alpha=3, method=method, **settings)
    for parameter in loras.parameters():
        nn.init.normal_(parameter, std=0.5)
    return loras


def weights(tree: nn.Module) -> list[tuple[str, int, int, bytes]]:
    return [
        (key, id(tensor), tensor.data_ptr(), tensor.detach().view(torch.uint8).numpy().tobytes())
        for key, tensor in base_state_dict(tree, keep_vars=True).items()
    ]


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def operations(act: Callable[[], object]) -> Counter[str]:
    with Operations() as mode:
        act()
    return mode.counts


@pytest.mark.parametrize("method", ["lora", "dora", "loha", "lokr"])
def test_a_merged_set_is_in_the_weights_and_costs_what_the_base_costs(method: str) -> None:
    tree = model()
    of_base = operations(lambda: tree(X))
    loras = trained(tree, "a", method)
    unmerged = tree(X)
    assert operations(lambda: tree(X)) != of_base
    loras.merge()
    assert loras.is_merged
    assert operations(lambda: tree(X)) == of_base
    plain = model()
    plain.load_state_dict(dict(zip(plain.state_dict(), shown(tree), strict=True)))
    assert torch.equal(tree(X), plain(X))
    assert is_close(tree(X), unmerged)


def shown(tree: fl.Chain) -> list[Tensor]:
    """The weights that the layers of the base show."""
    layers = [module for _, module in named_base_modules(tree) if isinstance(module, nn.Linear | nn.Conv2d)]
    return [parameter for layer in layers for parameter in layer.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sets_merged_and_unmerged_in_any_order_leave_the_same_bits(dtype: torch.dtype) -> None:
    for going_in in ((0, 1, 2), (2, 0, 1)):
        for coming_out in permutations(range(3)):
            torch.manual_seed(0)
            tree = model().to(dtype=dtype)
            x = X.to(dtype)
            sets = [trained(tree, name, method) for name, method in (("a", "lora"), ("b", "lora"), ("c", "loha"))]
            before, output = weights(tree), tree(x)
            for i in going_in:
                sets[i].merge()
                assert weights(tree) == before
            for i in coming_out:
                sets[i].unmerge()
            assert [id(p) for p in shown(tree)] == [i for _, i, _, _ in before]
            assert weights(tree) == before
            assert torch.equal(tree(x), output)


def test_what_is_merged_is_the_sum_of_those_that_are_merged_at_the_time() -> None:
    tree = model()
    first, second = trained(tree, "a"), trained(tree, "b")
    second.merge()
    only_second = [tensor.clone() for tensor in shown(tree)]
    second.unmerge()
    first.merge()
    second.merge()
    first.unmerge()
    assert all(torch.equal(a, b) for a, b in zip(shown(tree), only_second, strict=True))


def test_scales_and_other_weights_are_merged_anew() -> None:
    tree = model()
    loras = trained(tree, "a")
    specs = {path: clone(spec) for path, spec in loras.specs().items()}
    loras.scale = 0.5
    loras.merge()
    at_half = tree(X)
    loras.scale = 0.0
    loras.unmerge()
    base = tree(X)
    loras.merge()
    assert torch.equal(tree(X), base)
    loras.swap(
        {path: DeltaSpec("lora", {"down": ones(spec), "up": spec.tensors["up"]}) for path, spec in specs.items()}
    )
    loras.swap(specs)
    loras.scale = 0.5
    assert torch.equal(tree(X), at_half)
    with loras.disabled():
        assert torch.equal(tree(X), base)
    assert torch.equal(tree(X), at_half)


def ones(spec: DeltaSpec) -> Tensor:
    return torch.ones_like(spec.tensors["down"])


def clone(spec: DeltaSpec) -> DeltaSpec:
    return DeltaSpec(spec.method, {role: tensor.clone() for role, tensor in spec.tensors.items()}, spec.alpha)


def test_a_base_checkpoint_is_saved_and_loaded_while_sets_are_merged() -> None:
    tree = model()
    state = {key: tensor.clone() for key, tensor in tree.state_dict().items()}
    loras = trained(tree, "a")
    own = list(adapter_state_dict(tree))
    loras.merge()
    assert all(torch.equal(a, b) for a, b in zip(base_state_dict(tree).values(), state.values(), strict=True))
    assert list(base_state_dict(tree)) == list(state)
    assert list(adapter_state_dict(tree)) == own
    new = {key: torch.randn_like(tensor) for key, tensor in state.items()}
    for assign in (False, True):
        load_base_state_dict(tree, new, assign=assign)
        merged = tree(X)
        loras.unmerge()
        assert all(torch.equal(a, b) for a, b in zip(base_state_dict(tree).values(), new.values(), strict=True))
        loras.merge()
        assert torch.equal(tree(X), merged)
        new = {key: torch.randn_like(tensor) for key, tensor in state.items()}


def test_a_model_that_is_converted_while_sets_are_merged_gets_its_own_weights_in_that_dtype() -> None:
    tree = model()
    expected = {key: tensor.to(torch.bfloat16) for key, tensor in tree.state_dict().items()}
    loras = trained(tree, "a")
    loras.merge()
    tree.to(dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in base_state_dict(tree).values()} == {torch.bfloat16}
    loras.eject()
    assert all(torch.equal(tree.state_dict()[key], tensor) for key, tensor in expected.items())


def test_a_set_that_is_ejected_is_unmerged() -> None:
    tree = model()
    before, base = weights(tree), tree(X)
    first, second = trained(tree, "a"), trained(tree, "b")
    first.merge()
    second.merge()
    first.eject()
    second.adapters[0].eject()
    second.eject()
    assert weights(tree) == before
    assert torch.equal(tree(X), base)


def test_with_merged_merges_for_a_while() -> None:
    tree = model()
    loras = trained(tree, "a")
    with loras.merged():
        assert loras.is_merged
    assert not loras.is_merged


def test_merging_that_cannot_be_done_tells_all_layers_and_changes_nothing() -> None:
    tree = model()
    loras = trained(tree, "a")
    with torch.no_grad():
        for path in ("Residual.Linear_1", "Linear"):
            loras.by_path()[path].weights()["up"].tensor.fill_(torch.nan)
    before = weights(tree)
    with pytest.raises(AdapterError, match="Nothing was") as caught:
        loras.merge()
    assert str(caught.value).count("not finite") == 2
    assert weights(tree) == before
    assert not any(lora.switch.merged for lora in loras.loras)


def test_a_bias_needs_a_bias_to_be_merged_into() -> None:
    tree = model()
    loras = trained(tree, "a", bias=True)
    with pytest.raises(AdapterError, match="the layer has none to merge it into"):
        loras.merge()
    only = trained(fl.Chain(fl.Linear(4, 4, dtype=torch.float64)), "a", bias=True)
    x = torch.randn(2, 4, dtype=torch.float64)
    unmerged = only.root(x)
    only.merge()
    assert is_close(only.root(x), unmerged)


def test_a_layer_that_others_use_is_not_merged_into() -> None:
    shared = fl.Linear(4, 4)
    tree = fl.Chain(fl.Residual(shared), shared)
    one_place = inject_loras(select(tree).of(fl.Linear).inside(fl.Residual), name="a")
    with pytest.raises(AdapterError, match="stands in other places too"):
        one_place.merge()
    one_place.eject()
    both = inject_loras(tree, name="a")
    both.merge()
    both.eject()

    class Twice(fl.Chain, fl.Adapter[nn.Module]):
        def __init__(self, target: nn.Module) -> None:
            with self.setup_adapter(target):
                super().__init__(target, fl.Multiply(2.0))

    loras = inject_loras(tree, name="a")
    between = Twice(shared).inject(tree)
    with pytest.raises(AdapterError, match="stands between"):
        loras.merge()
    between.eject()
    loras.merge()


def test_merging_twice_and_unmerging_what_is_not_merged_are_refused() -> None:
    loras = trained(model(), "a")
    with pytest.raises(AdapterError, match="is not merged"):
        loras.unmerge()
    loras.merge()
    with pytest.raises(AdapterError, match="is merged already"):
        loras.merge()
    loras.eject()
    with pytest.raises(AdapterError, match="cannot be merged"):
        loras.merge()


def test_a_weight_that_another_layer_shares_is_merged_in_one_of_them_only() -> None:
    tree = fl.Chain(fl.Linear(4, 4), fl.Linear(4, 4))
    tree[1].weight = tree[0].weight
    before = tree[1].weight.clone()
    loras = inject_loras(select(tree).at("Linear_1"), name="a", rank=1)
    nn.init.normal_(loras.loras[0].weights()["up"].tensor)
    loras.merge()
    assert torch.equal(tree[1].weight, before)
    loras.unmerge()
    assert tree[0][0].weight is tree[1].weight
