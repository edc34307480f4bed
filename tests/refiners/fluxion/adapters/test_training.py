"""`trainable` freezes everything but some adapters, and puts it back."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch._dynamo

import refiners.fluxion.layers as fl
from refiners.errors import AdapterError
from refiners.fluxion.adapters import LoraSet, inject_loras, inject_norm_tuning, trainable


@pytest.fixture
def model() -> fl.Chain:
    model = fl.Chain(fl.Linear(4, 4), fl.LayerNorm(4), fl.Linear(4, 4))
    model.layer("LayerNorm", fl.LayerNorm).weight.requires_grad_(False)
    return model


def wants_gradients(model: fl.Chain) -> dict[str, bool]:
    return {name: weight.requires_grad for name, weight in model.named_parameters()}


def test_only_the_adapters_get_gradients(model: fl.Chain) -> None:
    loras = inject_loras(model, name="style", rank=2)
    with trainable(loras) as training:
        model(torch.ones(1, 4)).sum().backward()
        trained = {id(parameter) for parameter in training.parameters()}
    assert trained == {id(parameter) for parameter in loras.parameters()}
    assert {id(weight) for weight in model.parameters() if weight.grad is not None} == trained


def test_everything_wants_what_it_wanted_before(model: fl.Chain) -> None:
    loras = inject_loras(model, name="style", rank=2)
    before = wants_gradients(model)
    with pytest.raises(RuntimeError, match="half-way"), trainable(loras):
        assert wants_gradients(model) != before
        raise RuntimeError("half-way")
    assert wants_gradients(model) == before
    trainable(loras).restore()
    assert wants_gradients(model) == before


def test_what_was_trained_may_leave_in_between(model: fl.Chain) -> None:
    before = wants_gradients(model)
    loras = inject_loras(model, name="style", rank=2)
    with trainable(loras):
        loras.eject()
    assert wants_gradients(model) == before


def test_other_sets_of_the_model_are_frozen(model: fl.Chain) -> None:
    style = inject_loras(model, name="style", rank=2)
    other = inject_loras(model, name="other", rank=2)
    with trainable(style):
        assert not any(parameter.requires_grad for parameter in other.parameters())
    with trainable(style, other) as training:
        assert training.num_trained == sum(p.numel() for loras in (style, other) for p in loras.parameters())
        assert training.num_frozen == 2 * (16 + 4) + 8
        assert repr(training) == "Training(64 of 112 weights)"


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(AdapterError, match="no weights"):
        trainable()


def test_a_compiled_model_is_trained_in_one_graph_to_the_same_bits(model: fl.Chain) -> None:
    def losses(run: Callable[[torch.Tensor], torch.Tensor]) -> list[float]:
        with trainable(loras) as training:
            optimizer = torch.optim.AdamW(training.parameters(), lr=0.1)
            found: list[float] = []
            for _ in range(4):
                optimizer.zero_grad()
                loss = (run(x) - 1).square().sum()
                loss.backward()
                optimizer.step()
                found.append(loss.item())
        return found

    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    loras = inject_loras(model, name="style", rank=2)
    fresh = loras.specs()
    fresh = {path: replace(s, tensors={role: t.clone() for role, t in s.tensors.items()}) for path, s in fresh.items()}
    eager = losses(model)
    loras.swap(fresh)
    torch.compiler.reset()  # what other tests have compiled of the same functions counts as well
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert losses(torch.compile(model, backend="aot_eager", fullgraph=True)) == eager
    assert eager[-1] < eager[0]


def merge(loras: LoraSet) -> None:
    loras.merge()


def disable(loras: LoraSet) -> None:
    loras.enabled = False


def disable_one_layer(loras: LoraSet) -> None:
    loras.loras[0].switch.set("enabled", False)


def eject(loras: LoraSet) -> None:
    loras.eject()


@pytest.mark.parametrize(
    ("spoil", "advice"),
    [
        (merge, r"merged into the weights of the layers: unmerge\(\) it first"),
        (disable, "is disabled: set enabled = True first"),
        (disable_one_layer, "is disabled: set enabled = True first"),
        (eject, "was ejected: inject it again"),
    ],
)
def test_a_set_that_takes_no_part_is_refused_with_what_to_do(
    model: fl.Chain, spoil: Callable[[LoraSet], None], advice: str
) -> None:
    good, loras = inject_loras(model, name="good", rank=1), inject_loras(model, name="style", rank=2)
    spoil(loras)
    before = wants_gradients(model)
    with pytest.raises(AdapterError, match=rf"(?s)cannot be trained.*'style'.*{advice}"):
        trainable(good, loras)
    assert wants_gradients(model) == before


def test_a_tuning_that_takes_no_part_is_refused_as_well(model: fl.Chain) -> None:
    norms = inject_norm_tuning(model)
    norms.enabled = False
    with pytest.raises(AdapterError, match="set enabled = True first"):
        trainable(norms)
    norms.eject()
    with pytest.raises(AdapterError, match="was ejected"):
        trainable(norms)
