"""Other LoRAs for each sample of a batch."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor

import refiners.fluxion.layers as fl
from refiners.errors import AdapterError, ChainError, LoraNameError
from refiners.fluxion.adapters import assign_samples, inject_checkpoints
from refiners.fluxion.selectors import select
from tests.refiners.fluxion.adapters.lora_trees import X, is_close, model, trained


def test_each_sample_has_loras_of_its_own() -> None:
    tree = model()
    sets = {name: trained(tree, name, rank) for name, rank in (("a", 2), ("b", 3))}
    rows = ["a", None, ("a", "b"), "b"]
    with assign_samples(tree, rows):
        mixed = tree(X)
        assert torch.equal(tree(X), mixed)
    for i, names in enumerate(rows):
        for name, loras in sets.items():
            loras.enabled = name in (names or ())
        assert is_close(mixed[i], tree(X)[i])
        assert is_close(mixed[i : i + 1], tree(X[i : i + 1]))
    for loras in sets.values():
        loras.enabled = True
    assert tree.provider.values == {}


def test_samples_without_a_lora_are_the_base_to_the_last_bit() -> None:
    tree = model()
    base = tree(X)
    trained(tree, "a", fused=True)
    with assign_samples(tree, [None, "a", None, None]):
        mixed = tree(X)
    assert all(torch.equal(mixed[i], base[i]) for i in (0, 2, 3))
    assert not torch.equal(mixed[1], base[1])


def test_gradients_go_to_the_lora_of_each_sample() -> None:
    tree = model()
    first, second = trained(tree, "a"), trained(tree, "b")
    with assign_samples(tree, ["a", None, "b", "b"]):
        tree(X)[0].square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in first.parameters())
    assert not any(parameter.grad is not None and parameter.grad.any() for parameter in second.parameters())


def test_samples_that_cannot_be_are_refused() -> None:
    tree = model()
    loras = trained(tree, "a")
    with pytest.raises(LoraNameError, match="'c'"), assign_samples(tree, ["a", "c"]):
        pass
    with assign_samples(tree, ["a", None]), pytest.raises(ChainError, match="receives 4 rows, and 2 samples"):
        tree(X)
    with (
        assign_samples(tree, ["a"] * 4),
        pytest.raises(AdapterError, match="leave that assignment"),
        assign_samples(tree, ["a"] * 4),
    ):
        pass
    with loras.merged(), pytest.raises(AdapterError, match="unmerge them first"), assign_samples(tree, ["a"] * 4):
        pass
    tree(X)


def test_threads_with_assignments_of_their_own_do_not_meet() -> None:
    tree = model()
    trained(tree, "a"), trained(tree, "b", 3)
    plans: list[list[Any]] = [["a", "b", None, "a"], [None, ("a", "b"), "b", "b"], ["b"] * 4]
    expected: list[Tensor] = []
    for plan in plans:
        with assign_samples(tree, plan):
            expected.append(tree(X))
    turn = threading.Barrier(len(plans))

    def run(plan: list[Any]) -> list[Tensor]:
        with tree.context_scope(), assign_samples(tree, plan):
            turn.wait()
            outputs = [tree(X) for _ in range(5)]
            turn.wait()
        return [*outputs, tree(X)]

    plain = tree(X)
    with ThreadPoolExecutor(len(plans)) as pool:
        found = list(pool.map(run, plans))
    for outputs, wanted in zip(found, expected, strict=True):
        assert all(torch.equal(output, wanted) for output in outputs[:-1])
        assert torch.equal(outputs[-1], plain)


def test_an_assignment_is_for_its_part_of_the_model_and_ends_with_it() -> None:
    tree = model()
    trained(tree, "a")
    plain = tree(X)
    with assign_samples(tree.layer("Residual", fl.Chain), ["a"] * 4):
        inside = tree(X)
    assert is_close(inside, plain)
    with assign_samples(tree, [None] * 4):
        base = tree(X)
    with assign_samples(tree.layer("Residual", fl.Chain), [None] * 4):
        mixed = tree(X)
    assert not is_close(mixed, base)
    assert not is_close(mixed, plain)
    assert torch.equal(tree(X), plain)


def test_a_checkpoint_runs_again_with_the_assignment_of_its_forward() -> None:
    tree = model()
    loras = trained(tree, "a")
    rows = ["a", None, None, "a"]
    gradients: list[list[Tensor]] = []
    for checkpoints in (False, True):
        if checkpoints:
            inject_checkpoints(select(tree).of(fl.Residual).expect(1))
        with assign_samples(tree, rows):
            output = tree(X)
        gradients.append(list(torch.autograd.grad(output.square().sum(), list(loras.parameters()))))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("rows", [["a", None, ("a", "b"), "b"], ["b"] * 4])
def test_a_compiled_model_has_samples_with_loras_of_their_own(rows: list[Any]) -> None:
    tree = model()
    trained(tree, "a"), trained(tree, "b", 3)
    torch._dynamo.reset()
    compiled = torch.compile(tree, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), assign_samples(tree, rows):
        assert is_close(compiled(X), tree(X))
    with torch.no_grad():
        assert is_close(compiled(X), tree(X))
