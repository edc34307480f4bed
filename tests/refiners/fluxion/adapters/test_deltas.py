"""Every method of adapting a layer, as far as no upstream is needed: building, specs, merging, scales, compilation."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import refiners.fluxion.layers as fl
from refiners.errors import AdapterTypeError, ChainError
from refiners.fluxion.adapters import LoraAdapter, base_state_dict
from refiners.fluxion.adapters.lora import Delta, DeltaSpec, LinearLora, Lora

LAYERS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "linear": (lambda **kwargs: fl.Linear(6, 4, **kwargs), (2, 6)),
    "conv1d": (lambda **kwargs: nn.Conv1d(6, 4, 3, padding=1, **kwargs), (2, 6, 5)),
    "conv2d": (lambda **kwargs: fl.Conv2d(6, 4, (3, 2), stride=2, padding=1, dilation=(1, 2), **kwargs), (2, 6, 7, 8)),
    "reflect": (lambda **kwargs: fl.Conv2d(6, 4, 3, padding=1, padding_mode="reflect", **kwargs), (2, 6, 5, 5)),
    "conv3d": (lambda **kwargs: nn.Conv3d(6, 4, (1, 3, 2), **kwargs), (2, 6, 3, 4, 5)),
    "embedding": (lambda **kwargs: fl.Embedding(6, 4, **kwargs), (2, 3)),
}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {}),
    "lora-bias": ("lora", {"bias": True}),
    "dora": ("dora", {}),
    "locon": ("locon", {}),
    "loha": ("loha", {}),
    "loha-tucker": ("loha", {"tucker": True}),
    "lokr": ("lokr", {}),
    "lokr-both": ("lokr", {"decompose_both": True, "factor": 4}),
    "lokr-tucker": ("lokr", {"tucker": True, "factor": 1}),
}
WEIGHT_METHODS = [method for method in METHODS if METHODS[method][0] in ("loha", "lokr")]
UNDEFINED = {("lora-bias", "embedding"), ("locon", "linear"), ("locon", "embedding")}
UNDEFINED |= {*((m, layer) for m in WEIGHT_METHODS for layer in ("conv3d", "embedding"))}
CELLS = [(method, layer) for method in METHODS for layer in LAYERS if (method, layer) not in UNDEFINED]
cells = pytest.mark.parametrize(("method", "layer"), CELLS)


def whole(*shape: int) -> Tensor:
    """Whole numbers other than 0, so that float64 computes without any rounding."""
    return (torch.randint(1, 4, shape) * (2 * torch.randint(2, shape) - 1)).double()


def built(layer: str, **kwargs: Any) -> tuple[nn.Module, Tensor]:
    build, shape = LAYERS[layer]
    module = build(dtype=torch.float64, **kwargs)
    if not next(module.parameters()).is_meta:
        for parameter in module.parameters():
            parameter.data = whole(*parameter.shape)
    return module, torch.randint(6, shape) if layer == "embedding" else whole(*shape)


def new(method: str, module: nn.Module, name: str = "style", rank: int = 2, **settings: Any) -> Delta[Any]:
    kind, options = METHODS[method]
    return Delta.of_method(kind).for_target(name, module, rank=rank, **options, **settings)


def filled(delta: Delta[Any]) -> Delta[Any]:
    with torch.no_grad():
        for weight in delta.weights().values():
            weight.tensor.copy_(whole(*weight.tensor.shape))
    return delta


def equal(a: DeltaSpec, b: DeltaSpec) -> bool:
    if (a.method, a.alpha, a.rank_stabilized) != (b.method, b.alpha, b.rank_stabilized):
        return False
    return a.tensors.keys() == b.tensors.keys() and all(torch.equal(a.tensors[r], b.tensors[r]) for r in a.tensors)


@cells
def test_a_new_one_changes_nothing(method: str, layer: str) -> None:
    module, x = built(layer)
    delta = new(method, module, alpha=3)
    assert torch.equal(LoraAdapter(module, delta)(x), module(x))
    assert torch.equal(delta.merged_weight(module.weight), module.weight)


@cells
def test_merged_into_the_weight_it_gives_the_same(method: str, layer: str) -> None:
    module, x = built(layer)
    delta = filled(new(method, module))
    merged = deepcopy(module)
    if method == "dora":
        # A power of two for each length, so that its quotients are exact: rows that have one number.
        one_number = torch.zeros_like(module.weight)
        rows = one_number.T if layer == "embedding" else one_number
        for row in rows:
            row.flatten()[0] = 2.0
            row.view(-1)[0] = 2.0
        module.weight.data = one_number
        merged.weight.data = one_number.clone()
        nn.init.zeros_(delta.weights()["up"].tensor)
        delta.weights()["magnitude"].tensor.data.fill_(8.0)
    with torch.no_grad():
        merged.weight.copy_(delta.merged_weight(module.weight))
        change = delta.delta_bias()
        if change is not None:
            merged.bias += change
    assert not torch.equal(merged.weight, module.weight)
    assert torch.equal(LoraAdapter(module, delta)(x), merged(x))


@cells
def test_a_spec_gives_the_same_adapter_again(method: str, layer: str) -> None:
    module, x = built(layer)
    delta = filled(new(method, module, alpha=5, rank_stabilized=True, scale=0.5))
    spec = delta.spec()
    assert spec.validate() == []
    assert not spec.changes_nothing()
    again = Delta.from_spec("again", spec, module, scale=0.5)
    assert type(again) is type(delta)
    assert (again.rank, again.scaling) == (delta.rank, delta.scaling)
    assert equal(again.spec(), spec)
    assert torch.equal(LoraAdapter(module, again)(x), LoraAdapter(module, delta)(x))
    own = {weight.tensor.data_ptr() for weight in delta.weights().values()}
    assert {tensor.data_ptr() for tensor in spec.tensors.values()} == own
    assert own.isdisjoint(weight.tensor.data_ptr() for weight in again.weights().values())


@cells
def test_weights_of_a_smaller_rank_are_filled_up_and_strength_follows(method: str, layer: str) -> None:
    module, x = built(layer)
    small = filled(new(method, module, rank=1, alpha=3, scale=0.5))
    large = filled(new(method, module, rank=2, alpha=7, scale=0.5))
    before = large.spec()
    if large.spec().tensors.keys() != small.spec().tensors.keys():
        with pytest.raises(AdapterTypeError, match="its tensors are"):
            large.load_spec(small.spec())
        assert equal(large.spec(), before)
        return
    parameters = [weight.tensor for weight in large.weights().values()]
    large.load_spec(small.spec())
    assert equal(large.spec(), small.spec())
    assert (large.rank, large.scale, large.scaling) == (1, 0.5, 1.5)
    assert [weight.tensor for weight in large.weights().values()] == parameters
    assert torch.equal(LoraAdapter(module, large)(x), LoraAdapter(module, small)(x))


@cells
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_at_scale_0_the_layer_is_alone_whatever_the_weights_are(method: str, layer: str, value: float) -> None:
    module, x = built(layer)
    module.weight.data.zero_()
    if getattr(module, "bias", None) is not None:
        module.bias.data.fill_(-0.0)
    delta = new(method, module, scale=0.0)
    for weight in delta.weights().values():
        nn.init.constant_(weight.tensor, value)
    got, expected = LoraAdapter(module, delta)(x), module(x)
    assert torch.equal(got, expected)
    assert torch.equal(torch.signbit(got), torch.signbit(expected))
    assert torch.equal(delta.merged_weight(module.weight), module.weight)


@cells
def test_it_takes_device_dtype_and_mode_of_the_layer(method: str, layer: str) -> None:
    module, _ = LAYERS[layer][0](device="meta", dtype=torch.bfloat16).eval(), None
    delta = new(method, module)
    assert {(p.device.type, p.dtype) for p in delta.parameters()} == {("meta", torch.bfloat16)}
    assert not any(part.training for part in delta.modules())
    assert {p.dtype for p in new(method, module, dtype=torch.float32).parameters()} == {torch.float32}


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """What is compiled here is forgotten afterwards."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# torch's own, in which it makes an object of what a `torch.autograd.Function` is given.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
# Other layers have the same leaves.
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("method", "layer"), [cell for cell in CELLS if cell[1] in ("linear", "reflect", "embedding")])
def test_scales_and_weights_change_without_a_new_compilation(method: str, layer: str) -> None:
    module, x = built(layer)
    model = fl.Chain(module)
    deltas = [filled(new(method, module, name, alpha=3)) for name in ("a", "b")]
    adapter = LoraAdapter(module, *deltas).inject(model)
    counter = CompileCounterWithBackend("aot_eager")
    fast: Any = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(fast(x), model(x))
        compiled = counter.frame_count
        for scale in (0.5, 0.0, -2.0):
            adapter.scale = {"a": scale}
            assert torch.equal(fast(x), model(x))
        deltas[0].load_spec(deltas[1].spec())
        deltas[1].scale = 0.0
        assert torch.equal(fast(x), model(x))
        deltas[0].scale = 0.0
        nn.init.constant_(next(iter(deltas[0].weights().values())).tensor, float("nan"))
        assert torch.equal(fast(x), module(x))
    assert counter.frame_count == compiled


@cells
def test_inject_and_eject_leave_no_trace(method: str, layer: str) -> None:
    module, x = built(layer)
    model = fl.Chain(fl.Identity(), module)
    before, keys = model(x), list(model.state_dict())
    adapter = LoraAdapter(module, filled(new(method, module))).inject(model)
    assert list(base_state_dict(model)) == keys
    copied = deepcopy(model)
    assert torch.equal(copied(x), model(x))
    adapter.eject()
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), before)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("lora", ["Linear_1.weight", "Linear_2.weight"]),
        ("lora-bias", ["Linear_1.weight", "Linear_2.weight", "Linear_2.bias"]),
        ("dora", ["Linear_1.weight", "Linear_2.weight", "Magnitude.weight"]),
        ("loha", [f"HadamardProduct.{role}" for role in ("w1_a", "w1_b", "w2_a", "w2_b")]),
        ("lokr", ["KroneckerProduct.w1", "KroneckerProduct.w2"]),
        ("lokr-both", [f"KroneckerProduct.{role}" for role in ("w1", "w2")]),
    ],
)
def test_the_keys_of_the_weights(method: str, expected: list[str]) -> None:
    assert list(new(method, fl.Linear(6, 4)).state_dict()) == expected


def dora_with_exact_lengths() -> tuple[nn.Linear, Delta[Any], Tensor]:
    """Rows of one number, a power of two: their lengths, and quotients of them, need no rounding."""
    module = nn.Linear(6, 4, dtype=torch.float64)
    nn.init.zeros_(module.weight)
    delta = new("dora", module, rank=1)
    up, magnitude = torch.tensor([[1.0], [-2.0], [4.0], [1.0]]), torch.tensor([8.0, 8.0, 4.0, 2.0])
    tensors = {"down": torch.tensor([[2.0, 0, 0, 0, 0, 0]]), "up": up, "magnitude": magnitude}
    delta.load_spec(DeltaSpec("dora", {role: tensor.double() for role, tensor in tensors.items()}))
    return module, delta, torch.tensor([2.0, 4.0, 8.0, 2.0]).double()


def test_a_dora_gives_each_output_its_length() -> None:
    module, delta, _ = dora_with_exact_lengths()
    merged = delta.merged_weight(module.weight)
    assert merged[:, 0].tolist() == [8.0, -8.0, 4.0, 2.0]
    assert not merged[:, 1:].any()


def test_new_weights_of_a_dora_leave_the_length_of_each_output() -> None:
    module = fl.Linear(6, 4)
    delta = new("dora", module)
    delta.weights()["up"].tensor.data.fill_(1.0)
    before = delta.weights()["magnitude"].tensor.clone()
    delta.reset_parameters()
    assert torch.equal(delta.weights()["magnitude"].tensor, before)
    assert not delta.weights()["up"].tensor.any()
    assert delta.weights()["down"].tensor.any()


def test_the_norm_of_a_dora_gets_no_gradient() -> None:
    module, delta, lengths = dora_with_exact_lengths()
    x, up = whole(3, 6), delta.weights()["up"].tensor
    factor = (delta.weights()["magnitude"].tensor / lengths).detach()
    down = delta.weights()["down"].tensor
    expected = torch.autograd.grad((factor * (x @ down.T @ up.T)).sum(), up)[0]
    got = torch.autograd.grad(LoraAdapter(module, delta)(x).sum(), up)[0]
    assert torch.equal(got, expected)


def test_a_kronecker_product_is_the_one_of_the_book() -> None:
    layer = fl.Linear(6, 4, dtype=torch.float64)
    delta = filled(new("lokr", layer, rank=3))
    tensors = delta.spec().tensors
    assert torch.equal(delta.delta_weight(), torch.kron(tensors["w1"], tensors["w2"]))


def test_a_rank_that_stabilizes_divides_by_its_root() -> None:
    delta = LinearLora("style", 6, 5, rank=4, alpha=3, rank_stabilized=True, scale=0.5)
    assert delta.scaling == 0.5 * 3 / 2


# --- refusals --------------------------------------------------------------------------------------------------------


def spec_of(method: str = "lora", layer: str = "linear", **changes: Any) -> DeltaSpec:
    spec = filled(new(method, built(layer)[0])).spec()
    tensors = {role: tensor for role, tensor in {**spec.tensors, **changes}.items() if tensor is not None}
    return DeltaSpec(spec.method, tensors, spec.alpha, spec.rank_stabilized, spec.declared_rank)


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        (spec_of(up=None), "misses up"),
        (spec_of(down=None), "misses down"),
        (spec_of(left=torch.zeros(1)), "left is no part of it"),
        (spec_of(up=torch.zeros(4, 3)), r"down \[2, 6\] and up \[4, 3\] are no pair"),
        (spec_of(up=torch.zeros(4, 2, 1)), "are no pair"),
        (spec_of(down=torch.full((2, 6), torch.nan)), "down holds values that are not finite"),
        (spec_of(up=torch.full((4, 2), torch.inf)), "up holds values that are not finite"),
        (spec_of(down=torch.zeros(2, 6, dtype=torch.int8)), "no floating dtype"),
        (spec_of("lora-bias", up_bias=torch.zeros(3)), "has not one value for each row of up"),
        (spec_of("dora", magnitude=None), "misses magnitude"),
        (spec_of("locon", "conv2d", mid=torch.zeros(2, 3, 3, 2)), "does not begin with the rank 2 twice"),
        (spec_of("locon", "conv2d", up=torch.zeros(4, 2, 3, 3)), "is not of one pixel"),
        (spec_of("loha", w2_b=None), "misses w2_b"),
        (spec_of("loha", w1_b=torch.zeros(3, 6)), "are no pair"),
        (spec_of("loha-tucker", "conv2d", t2=None), "t1 is no part of it"),
        (spec_of("loha-tucker", "conv2d", t2=torch.zeros(3, 2, 3, 2)), "does not begin with the rank 2 twice"),
        (spec_of("lokr", w1=None), "misses w1"),
        (DeltaSpec("oft", {}), "the method 'oft' is unknown"),
    ],
)
def test_a_spec_that_is_not_sound_is_refused(spec: DeltaSpec, problem: str) -> None:
    with pytest.raises(AdapterTypeError, match=problem):
        Delta.from_spec("style", spec, fl.Linear(6, 4))
    delta = new("lora", fl.Linear(6, 4))
    before = delta.spec().tensors["down"].clone()
    with pytest.raises(AdapterTypeError, match="Nothing was loaded"):
        delta.load_spec(spec)
    assert torch.equal(delta.spec().tensors["down"], before)


@pytest.mark.parametrize("method", ["lora", "dora", "loha", "lokr"])
def test_a_spec_for_another_layer_is_refused_with_its_shapes(method: str) -> None:
    with pytest.raises(AdapterTypeError, match=r"does not fit Linear.*has to be \["):
        Delta.from_spec("style", spec_of(method), fl.Linear(12, 8))
    with pytest.raises(AdapterTypeError, match="is not made for LayerNorm"):
        Delta.from_spec("style", spec_of(method), fl.LayerNorm(6))


@pytest.mark.parametrize(("method", "role"), [("lora", "down"), ("dora", "up"), ("loha", "w2_b"), ("lokr", "w1")])
def test_what_changes_nothing_is_told(method: str, role: str) -> None:
    spec = spec_of(method)
    zero = spec_of(method, **{role: torch.zeros_like(spec.tensors[role])})
    assert not spec.changes_nothing()
    assert zero.changes_nothing() == (method != "dora")


def test_undefined_pairs_of_method_and_layer_are_refused() -> None:
    for method, layer in sorted(UNDEFINED):
        with pytest.raises(AdapterTypeError):
            new(method, built(layer)[0])
    with pytest.raises(AdapterTypeError, match="the rank is 1 or more"):
        new("loha", fl.Linear(6, 4), rank=0)
    with pytest.raises(AdapterTypeError, match="max_norm"):
        Lora.for_target("style", nn.Embedding(3, 4, max_norm=1.0))
    with pytest.raises(AdapterTypeError, match="takes no bias"):
        new("dora", fl.Linear(6, 4), bias=True)
    with pytest.raises(AdapterTypeError, match="The method 'oft' is unknown"):
        Delta.of_method("oft")


def test_what_sees_all_channels_of_a_grouped_layer_cannot_be_merged() -> None:
    delta = Lora.for_target("style", fl.Conv2d(4, 6, 3, groups=2), rank=2)
    with pytest.raises(AdapterTypeError, match="cannot be merged"):
        delta.delta_weight()


def test_an_adapter_of_another_layer_is_refused() -> None:
    for method in METHODS:
        layer, other = (
            (fl.Conv2d(6, 4, 3), fl.Conv2d(6, 4, 5)) if method == "locon" else (fl.Linear(6, 4), fl.Linear(6, 8))
        )
        with pytest.raises(AdapterTypeError, match="does not fit"):
            LoraAdapter(other, new(method, layer))
    with pytest.raises(AdapterTypeError, match="which has groups"):
        new("locon", fl.Conv2d(6, 4, 3, groups=2))


def test_a_dora_is_refused_where_a_chain_stands_in_the_place_of_its_layer() -> None:
    with pytest.raises(AdapterTypeError, match="needs the weight of its layer"):
        LoraAdapter(fl.Chain(fl.Linear(6, 4)), new("dora", fl.Linear(6, 4)))


def test_a_rank_that_no_tensor_tells_has_to_be_declared() -> None:
    spec = spec_of("lokr")
    assert DeltaSpec("lokr", spec.tensors).rank is None
    with pytest.raises(AdapterTypeError, match="declare it"):
        Delta.from_spec("style", DeltaSpec("lokr", spec.tensors, alpha=2.0), fl.Linear(6, 4))
    assert Delta.from_spec("style", DeltaSpec("lokr", spec.tensors), fl.Linear(6, 4)).scaling == 1.0


def test_a_failing_forward_is_marked_at_the_leaf_of_the_lora() -> None:
    module = fl.Linear(6, 4)
    model = fl.Chain(module)
    lora = Lora.for_target("style", module, rank=2)
    LoraAdapter(module, lora).inject(model)
    lora.up.weight = nn.Parameter(torch.zeros(4, 3))
    with pytest.raises(ChainError, match="LinearLora") as error:
        model(torch.zeros(1, 6))
    assert ">>> Linear" in str(error.value)
