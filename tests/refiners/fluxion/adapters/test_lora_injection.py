"""Injecting a set of LoRAs: from specs by path, with settings for some layers; all of it or nothing at all."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import refiners.fluxion.layers as fl
from refiners.errors import AdapterError, AdapterTypeError, LoraNameError
from refiners.fluxion.adapters import (
    Adapter,
    CheckpointAdapter,
    Delta,
    DeltaSpec,
    FusedLoras,
    LinearLora,
    Lora,
    LoraAdapter,
    LoraSet,
    adapter_state_dict,
    base_state_dict,
    inject_loras,
)
from refiners.fluxion.adapters.lora.merge import Merge
from refiners.fluxion.adapters.merging import Merging
from refiners.fluxion.layers.branch import Branch
from refiners.fluxion.layers.slots import Slots
from refiners.fluxion.selectors import select
from refiners.parity.rounding import agrees_in_float64, relative_error, typical_magnitude


class Attention(fl.Chain):
    pass


def model() -> fl.Chain:
    return fl.Chain(
        fl.Residual(Attention(fl.Linear(4, 4), fl.ReLU(), fl.Linear(4, 4))),
        fl.Residual(Attention(fl.Linear(4, 4), fl.ReLU(), fl.Linear(4, 4))),
        fl.Linear(4, 4),
    )


FIRST = "Residual_1.Attention.Linear_1"
SECOND = "Residual_1.Attention.Linear_2"


def spec(rank: int = 2, in_dim: int = 4, out_dim: int = 4, **more: Any) -> DeltaSpec:
    return DeltaSpec("lora", {"down": torch.randn(rank, in_dim), "up": torch.randn(out_dim, rank)}, **more)


def look(tree: nn.Module) -> list[Any]:
    """Everything an injection could have changed."""
    seen: list[Any] = []
    for name, module in tree.named_modules(remove_duplicate=False):
        parent = module.parent if isinstance(module, fl.ContextModule) else None
        own = vars(module)
        flags = [own.get(key) for key in ("_is_injected", "_merge", "is_fused", "is_shared")]
        seen.append((name, id(module), list(own["_modules"]), module.training, id(parent), flags))
        for key, parameter in module.named_parameters(recurse=False):
            seen.append((key, id(parameter), parameter.data_ptr(), parameter.requires_grad, parameter.tolist()))
    return seen


# --- specs -------------------------------------------------------------------------------------------------------


def test_specs_go_to_the_layers_their_paths_name() -> None:
    tree, x = model().to(dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    specs = {SECOND: spec(alpha=3.0), "Linear": spec(rank=3)}
    expected = model().to(dtype=torch.float64)
    expected.load_state_dict(tree.state_dict())
    with torch.no_grad():
        for layer, key, scaling in ((expected[0][0][2], SECOND, 1.5), (expected[2], "Linear", 1.0)):
            layer.weight += specs[key].tensors["up"].double() @ specs[key].tensors["down"].double() * scaling
    loras = inject_loras(tree, specs, name="style")
    assert loras.paths == (SECOND, "Linear")
    truth = expected(x)
    assert agrees_in_float64(relative_error(tree(x), truth, typical_magnitude(truth, gradient=True)))
    assert {path: found.alpha for path, found in loras.specs().items()} == {SECOND: 3.0, "Linear": None}


def test_paths_are_those_of_the_base_whatever_is_injected_already() -> None:
    tree = model()
    outer = CheckpointAdapter(tree[0]).inject()
    inject_loras(tree, {FIRST: spec()}, name="a")
    loras = inject_loras(tree, {FIRST: spec(), SECOND: spec()}, name="b")
    assert loras.paths == (FIRST, SECOND)
    loras.eject()
    outer.eject()


def test_the_tensors_of_specs_are_copied_onto_device_and_dtype_of_each_layer() -> None:
    tree = fl.Chain(fl.Linear(4, 4, dtype=torch.bfloat16).eval(), fl.Linear(4, 4))
    given = spec()
    first, second = inject_loras(tree, {"Linear_1": given, "Linear_2": given}, name="a").loras
    assert [first.weights()["down"].tensor.dtype, second.weights()["down"].tensor.dtype] == [
        torch.bfloat16,
        torch.float32,
    ]
    assert (first.training, second.training) == (False, True)
    second.weights()["down"].tensor.data.zero_()
    assert given.tensors["down"].any()


def test_a_tree_on_meta_takes_specs_too() -> None:
    tree = fl.Chain(fl.Linear(4, 4, device="meta"))
    loras = inject_loras(tree, {"Linear": spec()}, name="a")
    assert all(parameter.is_meta for parameter in loras.parameters())


def test_what_knows_its_specs_for_a_model_is_taken_as_well() -> None:
    class File:
        def specs_for(self, tree: nn.Module, /, *, strict: bool = True) -> dict[str, DeltaSpec]:
            return {"Linear": spec(out_dim=tree[2].out_features)}

    assert inject_loras(model(), File(), name="a").paths == ("Linear",)


def test_all_faults_are_one_error_and_nothing_changes() -> None:
    tree = model()
    inject_loras(tree, {SECOND: spec()}, name="style")
    before = look(tree)
    nan = DeltaSpec("lora", {"down": torch.full((1, 4), torch.nan), "up": torch.ones(4, 1)})
    specs = {
        FIRST: spec(in_dim=5),
        SECOND: spec(),
        "Residual_2.Attention.Linear_1": nan,
        "Residual_2.Attention.Linear_2": DeltaSpec("lora", {"down": torch.ones(1, 4)}),
        "Residual_2": spec(),
        "Lineer": spec(),
        "Linear": DeltaSpec("lora", {"down": torch.ones(3, 4), "up": torch.ones(4, 2)}),
    }
    with pytest.raises(AdapterError) as caught:
        inject_loras(tree, specs, name="style")
    text = str(caught.value)
    for line in (
        f"{FIRST}: The lora 'style' does not fit",
        f"{SECOND}: there is a LoRA called 'style' already",
        "Residual_2.Attention.Linear_1: down holds values that are not finite",
        "Residual_2.Attention.Linear_2: misses up",
        "Residual_2: Residual is no layer",
        "Lineer: there is no such layer (nearest: Linear)",
        "Linear: down [3, 4] and up [4, 2] are no pair",
    ):
        assert line in text
    assert look(tree) == before


def test_what_fits_nowhere_is_left_out_and_told_if_that_is_allowed() -> None:
    tree = model()
    loras = inject_loras(tree, {"Linear": spec(), "Elsewhere": spec(), FIRST: spec(in_dim=7)}, name="a", strict=False)
    assert loras.paths == ("Linear",)
    assert list(loras.left_out) == ["Elsewhere", FIRST]
    assert "no such layer" in loras.left_out["Elsewhere"]
    assert "down is [2, 7], has to be [2, 4]" in loras.left_out[FIRST]


def test_values_that_are_not_finite_are_refused_even_then() -> None:
    bad = DeltaSpec("lora", {"down": torch.ones(1, 4), "up": torch.full((4, 1), torch.inf)})
    with pytest.raises(AdapterError, match="Linear: up holds values that are not finite"):
        inject_loras(model(), {"Linear": bad, FIRST: spec()}, name="a", strict=False)


def test_a_set_that_changes_nothing_is_refused_unless_asked_for() -> None:
    tree = model()
    zero = DeltaSpec("lora", {"down": torch.ones(1, 4), "up": torch.zeros(4, 1)})
    before = look(tree)
    for specs, strict in (({}, True), ({"Linear": zero}, True), ({"Nowhere": spec()}, False)):
        with pytest.raises(AdapterError, match="would change nothing"):
            inject_loras(tree, specs, name="a", strict=strict)
        assert look(tree) == before
        inject_loras(tree, specs, name="a", strict=strict, allow_no_change=True).eject()
        assert look(tree) == before


def test_two_specs_for_one_layer_in_two_places_are_refused() -> None:
    shared = fl.Linear(4, 4)
    tree = fl.Chain(fl.Chain(shared), shared)
    with pytest.raises(AdapterError, match="stands in several places"):
        inject_loras(tree, {"Chain.Linear": spec(), "Linear": spec()}, name="a")
    loras = inject_loras(tree, {"Chain.Linear": spec()}, name="a")
    assert isinstance(tree[0][0], LoraAdapter)
    assert isinstance(tree[1], LoraAdapter)
    loras.eject()


# --- settings ----------------------------------------------------------------------------------------------------


def test_ranks_and_alphas_may_differ_by_selection_and_by_pattern() -> None:
    tree = model()
    ranks = {"Residual_1.**": 3, select(tree).of(fl.Linear).inside(Attention): 2}
    loras = inject_loras(tree, name="a", rank=1, alpha=8, rank_pattern=ranks, alpha_pattern={"**.Linear_2": 4})
    assert [lora.rank for lora in loras.loras] == [3, 3, 2, 2, 1]
    assert [lora.alpha for lora in loras.loras] == [8, 4, 8, 4, 8]


def test_a_pattern_that_holds_no_layer_is_refused() -> None:
    tree = model()
    before = look(tree)
    with pytest.raises(AdapterError, match=r"Residuel\.\*\*: this pattern holds no layer"):
        inject_loras(tree, name="a", rank_pattern={"Residuel.**": 3})
    assert look(tree) == before


@pytest.mark.parametrize("method", ["lora", "dora", "loha", "lokr"])
def test_new_adapters_of_any_method_change_nothing_yet(method: str) -> None:
    tree, x = model().to(dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    base = tree(x)
    loras = inject_loras(tree, name="a", rank=2, method=method, rank_stabilized=True, alpha=2)
    assert {lora.method for lora in loras.loras} == {method}
    assert agrees_in_float64(relative_error(tree(x), base, typical_magnitude(base, gradient=True)))
    loras.eject()
    assert torch.equal(tree(x), base)


def test_a_name_may_be_given_by_position() -> None:
    assert inject_loras(model(), "a", 3).loras[0].rank == 3


def test_a_method_that_does_not_exist_is_refused() -> None:
    with pytest.raises(AdapterTypeError, match="'vera' is unknown"):
        inject_loras(model(), name="a", method="vera")


# --- all or nothing ----------------------------------------------------------------------------------------------

HOOKS: list[tuple[type, str]] = [
    (LinearLora, "__init__"),
    (LinearLora, "like_layer"),
    (Lora, "reset_parameters"),
    (Delta, "__init__"),
    (Delta, "_check_shapes"),
    (LinearLora, "delta_weight"),
    (LoraAdapter, "__init__"),
    (LoraAdapter, "add_lora"),
    (LoraAdapter, "remove_lora"),
    (LoraAdapter, "eject"),
    (LoraAdapter, "fuse"),
    (Adapter, "inject"),
    (Adapter, "eject"),
    (Adapter, "_match_training_mode"),
    (Merge, "fold"),
    (Merging, "begin"),
    (Merging, "end"),
    (Merging, "show"),
    (FusedLoras, "__init__"),
    (FusedLoras, "_put_side_by_side"),
    (FusedLoras, "refresh"),
    (FusedLoras, "take_apart"),
    (LoraSet, "__init__"),
    (Branch, "append"),
    (Branch, "remove"),
    (Slots, "replace_everywhere"),
    (Slots, "_adopt"),
    (Slots, "_hold"),
    (nn.Module, "__init__"),
]


class Killer:
    """Lets the n-th call of a function fail."""

    def __init__(self, n: int) -> None:
        self.left = n

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == -1:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return call


def kill_at(n: int, act: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run an act and let the n-th call of any hook fail. False: there are not that many."""
    killer = Killer(n)
    with monkeypatch.context() as patch:
        for owner, name in HOOKS:
            function = owner.__dict__[name]
            is_of_class = isinstance(function, classmethod)
            wrapped = classmethod(killer.around(function.__func__)) if is_of_class else killer.around(function)
            patch.setattr(owner, name, wrapped)
        try:
            act()
        except KeyboardInterrupt:
            return True
    return False


FEWEST_STEPS = {"new": 40, "specs": 20, "fused": 20, "eject": 6, "merge": 5, "unmerge": 5, "fuse": 5}


@pytest.mark.parametrize("what", FEWEST_STEPS)
def test_a_failure_at_any_step_leaves_the_model_as_it_was(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tree, x = model(), torch.randn(2, 4)
    inject_loras(tree, {FIRST: spec(), "Linear": spec()}, name="other")
    CheckpointAdapter(tree[0]).inject()
    held = inject_loras(tree, {FIRST: spec(), SECOND: spec()}, name="held")
    if what == "unmerge":
        held.merge()
    acts: dict[str, Callable[[], object]] = {
        "new": lambda: inject_loras(tree, name="style", rank=1),
        "specs": lambda: inject_loras(tree, {FIRST: spec(), SECOND: spec(), "Linear": spec()}, name="style"),
        "fused": lambda: inject_loras(tree, {FIRST: spec(), SECOND: spec()}, name="style", fused=True),
        "eject": held.eject,
        "merge": held.merge,
        "unmerge": held.unmerge,
        "fuse": lambda: [adapter.fuse() for adapter in held.adapters[:1]],
    }
    before, output = look(tree), tree(x)
    steps = 0
    while kill_at(steps, acts[what], monkeypatch):
        assert look(tree) == before, f"killed at call {steps}"
        assert torch.equal(tree(x), output)
        steps += 1
    assert steps >= FEWEST_STEPS[what]
    assert look(tree) != before


# --- other adapters on the same layers ---------------------------------------------------------------------------


class Twice(fl.Chain, fl.Adapter[nn.Module]):
    """Takes the place of a layer and doubles what it gives."""

    def __init__(self, target: nn.Module) -> None:
        with self.setup_adapter(target):
            super().__init__(target, fl.Multiply(2.0))


class Instead(fl.Chain, fl.Adapter[nn.Module]):
    """Takes the place of a layer, which is not run at all."""

    def __init__(self, target: nn.Module) -> None:
        with self.setup_adapter(target):
            super().__init__(fl.Linear(4, 4))


@pytest.mark.parametrize("lora_leaves_first", [True, False])
def test_a_lora_under_an_adapter_that_replaced_the_layer_is_inside_of_it(lora_leaves_first: bool) -> None:
    layer = fl.Linear(4, 4)
    tree, x = fl.Chain(layer), torch.randn(2, 4)
    outer = Twice(layer).inject(tree)
    loras = inject_loras(tree, {"Linear": spec()}, name="a")
    assert torch.equal(tree(x), 2 * (layer(x) + loras.loras[0](x)))
    for leaving in [loras, outer] if lora_leaves_first else [outer, loras]:
        leaving.eject()
    assert list(tree) == [layer]


@pytest.mark.parametrize("lora_leaves_first", [True, False])
def test_a_lora_over_an_adapter_that_came_later_adds_to_what_that_gives(lora_leaves_first: bool) -> None:
    layer = fl.Linear(4, 4)
    tree, x = fl.Chain(layer), torch.randn(2, 4)
    loras = inject_loras(tree, {"Linear": spec()}, name="a")
    inner = Twice(layer).inject(tree)
    assert torch.equal(tree(x), 2 * layer(x) + loras.loras[0](x))
    assert list(base_state_dict(tree)) == ["Linear.weight", "Linear.bias"]
    assert len(adapter_state_dict(tree)) == 2
    for leaving in [loras, inner] if lora_leaves_first else [inner, loras]:
        leaving.eject()
    assert list(tree) == [layer]


def test_a_layer_that_an_adapter_does_not_run_takes_no_lora_by_its_path() -> None:
    layer = fl.Linear(4, 4)
    tree = fl.Chain(layer)
    outer = Instead(layer).inject(tree)
    with pytest.raises(AdapterError, match="Linear: .* stands in no Chain"):
        inject_loras(tree, {"Linear": spec()}, name="a")
    outer.eject()


def test_a_layer_that_is_gone_is_told() -> None:
    tree = model()
    loras = inject_loras(tree, {FIRST: spec(), "Linear": spec()}, name="a")
    tree.pop(2)
    for act in (loras.specs, lambda: loras.swap({}), lambda: loras.scales, loras.state_dict):
        with pytest.raises(AdapterError, match="1 layers of .* are no longer in"):
            act()
    loras.eject()


def test_a_name_that_is_taken_is_told_for_every_layer() -> None:
    tree = model()
    inject_loras(tree, name="style")
    with pytest.raises(LoraNameError) as caught:
        inject_loras(tree, name="style")
    assert str(caught.value).count("there is a LoRA called 'style' already") == 5
