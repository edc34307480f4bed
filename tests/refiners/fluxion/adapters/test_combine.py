"""Sums of several sets of LoRAs."""

import pytest
import torch

from refiners.errors import AdapterError
from refiners.fluxion.adapters import DeltaSpec, combine, inject_loras
from tests.refiners.fluxion.adapters.lora_trees import X, is_close, model, trained


def test_concatenated_sets_do_what_they_do_together() -> None:
    tree = model()
    first, second = trained(tree, "a"), trained(tree, "b", rank=3)
    first.scale, second.scale = 0.7, -0.2
    together = tree(X)
    specs = combine(first.specs(), second.specs(), weights=[0.7, -0.2])
    assert {spec.rank for spec in specs.values()} == {5}
    first.eject()
    second.eject()
    inject_loras(tree, specs, name="both")
    assert is_close(tree(X), together)


def test_the_decomposition_of_full_rank_is_the_sum_and_of_less_the_nearest() -> None:
    down, up = torch.randn(3, 6, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    spec = DeltaSpec("lora", {"down": down, "up": up}, alpha=6.0)
    change = up @ down * 2
    full = combine({"x": spec}, how="svd")["x"].tensors
    assert is_close(full["up"] @ full["down"], change)
    less = combine({"x": spec}, how="svd", rank=2)["x"].tensors
    values = torch.linalg.svdvals(change)
    assert is_close(torch.linalg.matrix_norm(less["up"] @ less["down"] - change), values[2])


def test_sets_that_cannot_be_combined_are_refused_with_all_layers() -> None:
    def lora(rank: int, size: int = 4) -> DeltaSpec:
        return DeltaSpec("lora", {"down": torch.ones(rank, size), "up": torch.ones(size, rank)})

    with pytest.raises(AdapterError, match="one weight for each"):
        combine({"x": lora(1)}, weights=[1.0, 2.0])
    with pytest.raises(AdapterError, match="choose from linear, concatenate, svd"):
        combine({"x": lora(1)}, how="cat")  # pyright: ignore[reportArgumentType] (a wrong one on purpose)
    with pytest.raises(AdapterError, match="rank=2 is for how='svd'"):
        combine({"x": lora(1)}, rank=2)
    with pytest.raises(AdapterError) as caught:
        combine({"x": lora(1), "y": lora(1)}, {"x": lora(2), "y": lora(1, 5)}, how="linear")
    assert "x: linear needs one rank, got 1 and 2" in str(caught.value)
    assert "y: shapes differ" in str(caught.value)
    loha = DeltaSpec("loha", {role: torch.ones(1, 1) for role in ("w1_a", "w1_b", "w2_a", "w2_b")})
    with pytest.raises(AdapterError, match="a loha is no sum"):
        combine({"x": loha})
