"""The base's state under its own keys while adapters are in, and the adapters' alone."""

import pytest
import torch
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.errors import ConversionError
from refiners.fluxion.adapters import (
    CheckpointAdapter,
    LinearLora,
    LoraAdapter,
    adapter_state_dict,
    base_state_dict,
    inject_loras,
    load_adapter_state_dict,
    load_base_state_dict,
)
from refiners.fluxion.adapters.weights import named_base_modules, paths_of


class Wrap(fl.Chain, fl.Adapter[nn.Module]):
    """Holds its target, and brings a weight."""

    def __init__(self, target: nn.Module) -> None:
        with self.setup_adapter(target):
            super().__init__(fl.Linear(4, 4), target)


class Instead(fl.Chain, fl.Adapter[nn.Module]):
    """Does not hold its target."""

    def __init__(self, target: nn.Module) -> None:
        with self.setup_adapter(target):
            super().__init__(fl.Linear(4, 4))


class Plain(nn.Module):
    """Holds a Chain, a buffer and a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("numbers", torch.arange(3.0))
        self.gain = nn.Parameter(torch.ones(1))
        self.body = fl.Chain(fl.Linear(4, 4), fl.LayerNorm(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.gain


def model() -> fl.Chain:
    shared = fl.Linear(4, 4)
    return fl.Chain(
        fl.Linear(4, 4), fl.Residual(fl.Linear(4, 4), fl.Linear(4, 4)), Plain(), shared, shared, nn.BatchNorm1d(4)
    )


def bytes_of(state: dict[str, Tensor]) -> list[tuple[str, int, bytes]]:
    return [(key, tensor.data_ptr(), tensor.numpy().tobytes()) for key, tensor in state.items()]


def inject_everything(tree: fl.Chain) -> list[fl.Chain]:
    linear, residual = tree["Linear_1"], tree["Residual"]
    body = tree["Plain"].body
    loras = inject_loras(tree, name="style", rank=2)
    return [
        loras,
        Wrap(linear).inject(tree),
        Wrap(residual["LoraAdapter_1"]).inject(residual),
        Wrap(residual).inject(),
        Instead(body["LayerNorm"]).inject(body),
        Instead(residual[-1].target).inject(residual),
        Wrap(tree).inject(),
        LoraAdapter(linear, LinearLora("deep", 4, 4)).inject(tree),
    ]


def test_the_base_has_the_state_that_the_model_had_before() -> None:
    tree = model()
    before, metadata = bytes_of(tree.state_dict()), list(tree.state_dict()._metadata.items())
    adapters = inject_everything(tree)
    assert list(tree.state_dict()) != [key for key, *_ in before]
    assert bytes_of(base_state_dict(tree)) == before
    assert list(base_state_dict(tree)._metadata.items()) == metadata
    for adapter in adapters:
        adapter.eject()
        assert bytes_of(base_state_dict(tree)) == before
    assert bytes_of(tree.state_dict()) == before


def test_without_adapters_the_base_is_the_model() -> None:
    tree = model()
    assert bytes_of(base_state_dict(tree)) == bytes_of(tree.state_dict())
    assert adapter_state_dict(tree) == {}


def test_an_adapter_at_the_root_stands_for_its_target() -> None:
    tree = model()
    before = bytes_of(tree.state_dict())
    root = Wrap(tree).inject()
    assert bytes_of(base_state_dict(root)) == before
    assert list(adapter_state_dict(root)) == ["Linear.weight", "Linear.bias"]
    assert adapter_state_dict(tree) == {}


def test_keep_vars_gives_the_parameters_themselves() -> None:
    tree = model()
    inject_loras(tree, name="style", rank=2)
    assert base_state_dict(tree, keep_vars=True)["Linear_1.weight"] is tree["LoraAdapter_1"].target.weight
    lora = tree["LoraAdapter_1"].loras["style"]
    assert adapter_state_dict(tree, keep_vars=True)["LoraAdapter_1.LinearLora.Linear_1.weight"] is lora.down.weight


def test_base_and_adapters_together_are_the_state_of_the_model() -> None:
    tree = model()
    inject_loras(tree, name="style", rank=2)
    Wrap(tree["Residual"]).inject()
    everything = tree.state_dict()
    adapters = adapter_state_dict(tree)
    assert {key: everything[key].data_ptr() for key in adapters} == {k: t.data_ptr() for k, t in adapters.items()}
    assert len(everything) == len(adapters) + len(base_state_dict(tree))


@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_of_the_base_loads_while_adapters_are_in(assign: bool) -> None:
    tree, source = model(), model()
    adapters = inject_everything(tree)
    brought = bytes_of(adapter_state_dict(tree))
    assert load_base_state_dict(tree, source.state_dict(), assign=assign) == ([], [])
    assert bytes_of(adapter_state_dict(tree)) == brought
    for adapter in adapters:
        adapter.eject()
    loaded = tree.state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in source.state_dict().items())
    assert (loaded["Linear_1.weight"].data_ptr() == source.state_dict()["Linear_1.weight"].data_ptr()) is assign


def test_the_weights_of_adapters_come_back() -> None:
    tree, x = fl.Chain(fl.Linear(4, 4), fl.Residual(fl.Linear(4, 4))), torch.randn(2, 4)
    loras = inject_loras(tree, name="style", rank=2)
    for lora in loras.loras:
        nn.init.normal_(lora.up.weight)
    saved, base, output = {k: t.clone() for k, t in adapter_state_dict(tree).items()}, base_state_dict(tree), tree(x)
    loras.eject()
    inject_loras(tree, name="style", rank=2)
    assert load_adapter_state_dict(tree, saved) == ([], [])
    assert torch.equal(tree(x), output)
    with pytest.raises(ConversionError, match="unexpected"):
        load_adapter_state_dict(tree, saved | base)


def test_what_does_not_fit_is_refused_with_all_its_faults_and_nothing_is_loaded() -> None:
    tree = model()
    inject_loras(tree, name="style", rank=2)
    state = {key: torch.zeros_like(tensor) for key, tensor in base_state_dict(tree).items()}
    before = bytes_of(base_state_dict(tree))
    del state["Linear_1.bias"]
    state["Residual.Linear_1.weigth"] = torch.zeros(4, 4)
    state["Plain.gain"] = torch.zeros(2)
    with pytest.raises(ConversionError, match="nothing was loaded") as error:
        load_base_state_dict(tree, state)
    for line in (
        "missing (1):\n    Linear_1.bias",
        "unexpected (1):\n    Residual.Linear_1.weigth (nearest: Residual.Linear_1.weight)",
        "mis-shaped (1):\n    Plain.gain: [2], has to be [1]",
    ):
        assert line in str(error.value)
    assert bytes_of(base_state_dict(tree)) == before


def test_without_strict_the_missing_and_unexpected_keys_are_told() -> None:
    tree = model()
    state = {"Linear_1.weight": torch.ones(4, 4), "other": torch.ones(1)}
    missing, unexpected = load_base_state_dict(tree, state, strict=False)
    assert "Linear_1.bias" in missing
    assert unexpected == ["other"]
    assert torch.equal(tree["Linear_1"].weight, torch.ones(4, 4))
    with pytest.raises(ConversionError, match="mis-shaped"):
        load_base_state_dict(tree, {"Linear_1.weight": torch.ones(1)}, strict=False)


def test_a_base_of_five_hundred_levels_can_be_read() -> None:
    tree = fl.Chain(fl.Linear(1, 1))
    keep = [tree]
    for _ in range(400):
        keep.append(fl.Chain(keep[-1]))
    LoraAdapter(tree[0], LinearLora("style", 1, 1, rank=1)).inject(tree)
    assert len(base_state_dict(keep[-1])) == 2


# --- where layers are --------------------------------------------------------------------------------------------


class Holder(nn.Module):
    """A module that is no Chain, with Chains in it."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)


def deep_tree() -> fl.Chain:
    shared = fl.Linear(2, 2)
    return fl.Chain(
        fl.Chain(fl.Linear(2, 2), fl.ReLU(), fl.Residual(fl.Linear(2, 2), shared)),
        Holder(fl.Chain(fl.Linear(2, 2), shared), nn.Linear(2, 2)),
        fl.Sum(shared, fl.Chain(fl.Chain(fl.Linear(2, 2)))),
    )


@pytest.mark.parametrize("seed", range(8))
def test_the_paths_of_some_layers_are_those_that_a_walk_through_the_whole_base_finds(seed: int) -> None:
    torch.manual_seed(seed)
    tree = deep_tree()
    CheckpointAdapter(tree[0]).inject()
    LoraAdapter(tree[0][0][0], LinearLora("other", 2, 2, rank=1)).inject(tree)
    layers = [layer for _, layer in named_base_modules(tree) if isinstance(layer, nn.Linear)]
    layers += [tree[2], tree[0].target[2]]
    chosen = [layer for layer in layers if torch.rand(()) < 0.5] or layers
    wanted, expected = {id(layer) for layer in chosen}, dict[str, int]()
    for path, module in named_base_modules(tree):
        if id(module) in wanted:
            wanted.remove(id(module))
            expected[path] = id(module)
    assert {path: id(module) for path, module in paths_of(tree, chosen).items()} == expected
    assert list(paths_of(tree, chosen)) == list(expected)
    assert paths_of(tree, [fl.Linear(2, 2)]) == {}
