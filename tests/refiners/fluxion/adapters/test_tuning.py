"""IA3, norm tuning and bias tuning: what they compute, and that they leave no trace."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.errors import AdapterError, AdapterTypeError, ConversionError, SelectionError
from refiners.fluxion.adapters import (
    AdapterSet,
    IA3Adapter,
    LoraAdapter,
    NormTuningAdapter,
    base_state_dict,
    inject_bias_tuning,
    inject_ia3,
    inject_loras,
    inject_norm_tuning,
)
from refiners.fluxion.selectors import select


def whole(*shape: int) -> Tensor:
    """Whole numbers other than 0, so that float64 computes without any rounding."""
    return (torch.randint(1, 4, shape) * (2 * torch.randint(2, shape) - 1)).double()


def model_of_layers() -> fl.Chain:
    kwargs = {"dtype": torch.float64}
    return fl.Chain(
        *(fl.Conv2d(2, 4, 3, padding=1, padding_mode="circular", **kwargs), fl.GroupNorm(4, 2, **kwargs)),
        *(fl.LayerNorm2d(4, **kwargs), fl.Flatten(2), fl.Linear(20, 6, **kwargs), fl.LayerNorm(6, **kwargs)),
        *(nn.RMSNorm(6, **kwargs), fl.Linear(6, 3, bias=False, **kwargs)),
    )


X = torch.linspace(-1, 1, 2 * 2 * 4 * 5, dtype=torch.float64).view(2, 2, 4, 5)
INJECT: list[tuple[Callable[[fl.Chain], AdapterSet], list[str]]] = [
    (lambda model: inject_ia3(model), ["Linear_1.weight", "Linear_2.weight"]),
    (lambda model: inject_ia3(model, feedforward=True), ["Linear_1.weight", "Linear_2.weight"]),
    (lambda model: inject_ia3(select(model).of(nn.Conv2d)), ["Conv2d.weight"]),
    (
        inject_norm_tuning,
        [f"{name}.{p}" for name in ("GroupNorm", "LayerNorm2d", "LayerNorm") for p in ("weight", "bias")]
        + ["RMSNorm.weight"],
    ),
    (inject_bias_tuning, [f"{name}.bias" for name in ("Conv2d", "GroupNorm", "LayerNorm2d", "Linear_1", "LayerNorm")]),
]
each = pytest.mark.parametrize(("inject", "keys"), INJECT, ids=["ia3", "ia3-inputs", "ia3-conv", "norms", "biases"])


@each
def test_a_new_set_changes_nothing_and_an_ejected_one_leaves_no_trace(
    inject: Callable[[fl.Chain], AdapterSet], keys: list[str]
) -> None:
    model = model_of_layers()
    before, state = model(X), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    tuned = inject(model)
    assert torch.equal(model(X), before)
    assert list(tuned.state_dict()) == keys
    assert list(base_state_dict(model)) == list(state)
    for parameter in tuned.parameters():
        nn.init.normal_(parameter)
    after = model(X)
    assert not torch.equal(after, before)
    with tuned.disabled():
        assert torch.equal(model(X), before)
    assert torch.equal(model(X), after)
    tuned.eject()
    assert torch.equal(model(X), before)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    with pytest.raises(AdapterError, match="not injected any more"):
        tuned.eject()


@each
def test_weights_come_back_from_a_state_dict(inject: Callable[[fl.Chain], AdapterSet], keys: list[str]) -> None:
    model = model_of_layers()
    tuned = inject(model)
    other = {key: torch.randn_like(tensor) for key, tensor in tuned.state_dict().items()}
    tuned.load_state_dict(other)
    after = model(X)
    assert all(torch.equal(tensor, other[key]) for key, tensor in tuned.state_dict().items())
    tuned.eject()
    again = inject(model)
    again.load_state_dict(other)
    assert torch.equal(model(X), after)
    wrong = {**other, "nowhere.weight": torch.zeros(1), keys[0]: torch.zeros(99)}
    with pytest.raises(ConversionError, match="nothing was loaded") as error:
        again.load_state_dict(wrong)
    assert "nowhere.weight: unexpected" in str(error.value)
    assert f"{keys[0]}: is [99]" in str(error.value)
    with pytest.raises(ConversionError, match="not finite"):
        again.load_state_dict({**other, keys[0]: torch.full_like(other[keys[0]], torch.nan)})
    with pytest.raises(ConversionError, match="missing"):
        again.load_state_dict({})
    assert torch.equal(model(X), after)


def test_ia3_scales_outputs_with_their_bias_or_inputs() -> None:
    layer = fl.Linear(4, 3, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(whole(3, 4))
        layer.bias.copy_(whole(3))
    x = whole(2, 4)
    for feedforward, size in ((False, 3), (True, 4)):
        adapter = IA3Adapter(layer, feedforward=feedforward)
        scale = whole(size)
        adapter.tuned.weight.data.copy_(scale)
        expected = layer(x * scale) if feedforward else layer(x) * scale
        assert torch.equal(adapter(x), expected)


def test_gradients_reach_what_is_tuned_and_not_what_it_replaces() -> None:
    model = model_of_layers()
    tuned = inject_bias_tuning(model)
    model(X).sum().backward()
    assert all(parameter.grad is not None for parameter in tuned.parameters())
    assert model.layer("Linear", fl.Linear).weight.grad is not None
    assert select(model).of(fl.Conv2d).one().bias.grad is None


def test_a_layer_in_two_places_is_adapted_in_both_and_switched_off_in_both() -> None:
    shared = fl.Linear(3, 3)
    model = fl.Chain(shared, fl.Chain(shared))
    x = torch.randn(2, 3)
    before = model(x)
    tuned = inject_ia3(model)
    assert len(tuned) == 1
    nn.init.constant_(next(tuned.parameters()), 2.0)
    assert torch.equal(model(x), 2 * shared(2 * shared(x)))
    with tuned.disabled():
        assert torch.equal(model(x), before)
    tuned.eject()
    assert torch.equal(model(x), before)


def test_loras_and_tunings_go_together() -> None:
    model = fl.Chain(fl.Linear(4, 3, dtype=torch.float64))
    x = whole(2, 4)
    before = model(x)
    loras = inject_loras(model, name="style", rank=1)
    biases = inject_bias_tuning(model)
    adapter = model.layer("LoraAdapter", LoraAdapter)
    for parameter in (*loras.parameters(), *biases.parameters()):
        parameter.data.copy_(whole(*parameter.shape))
    linear = adapter.target
    expected = x @ linear.weight.T + next(biases.parameters()) + next(adapter.lora_layers)(x)
    got = model(x)
    loras.eject()
    biases.eject()
    assert torch.equal(model(x), before)
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype


def test_a_layer_is_tuned_once_and_next_to_itself() -> None:
    model = fl.Chain(fl.Linear(4, 3))
    inject_bias_tuning(model)
    with pytest.raises(SelectionError):
        inject_bias_tuning(model)
    with pytest.raises(AdapterError, match="tuned already"):
        inject_bias_tuning(select(model).of(fl.Linear))
    keys = list(model.state_dict())
    for inject in (lambda: inject_loras(model, name="style", rank=1), lambda: inject_ia3(select(model).of(fl.Linear))):
        with pytest.raises(AdapterError, match="computes with the parameters of Linear"):
            inject()
    assert list(model.state_dict()) == keys
    model(torch.zeros(1, 4))


def test_layers_of_another_kind_are_refused_and_nothing_is_touched() -> None:
    model = fl.Chain(fl.Linear(4, 3, bias=False), fl.LayerNorm(3))
    keys = list(model.state_dict())
    with pytest.raises(AdapterTypeError, match="only for a Linear or a convolution"):
        inject_ia3(select(model).of(fl.Linear, fl.LayerNorm))
    with pytest.raises(AdapterTypeError, match="only for one of LayerNorm"):
        inject_norm_tuning(select(model).of(fl.LayerNorm, fl.Linear))
    with pytest.raises(AdapterTypeError, match="that has a bias"):
        inject_bias_tuning(select(model).of(fl.LayerNorm, fl.Linear))
    assert list(model.state_dict()) == keys
    assert not list(model.layers(NormTuningAdapter, recurse=True))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """What is compiled here is forgotten afterwards."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@each
def test_a_compiled_model_takes_other_weights(inject: Callable[[fl.Chain], AdapterSet], keys: list[str]) -> None:
    model = model_of_layers()
    tuned = inject(model)
    fast = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(2):
        tuned.load_state_dict({key: torch.randn_like(tensor) for key, tensor in tuned.state_dict().items()})
        assert torch.equal(fast(X), model(X))
