"""Swapping: other weights in place. All of them or none, whatever comes in between; each form of the same weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.errors import AdapterError
from refiners.fluxion.adapters import DeltaSpec, FusedLoras, LoraAdapter, LoraSet, fuse, inject_ia3, inject_loras
from refiners.fluxion.adapters.lora.spec import are_finite, is_finite
from tests.refiners.fluxion.interrupts import interrupted_at

X = torch.randn(2, 4)


def model() -> fl.Chain:
    return fl.Chain(fl.Linear(4, 4), fl.Residual(fl.ReLU(), fl.Linear(4, 4)))


def spec(rank: int, alpha: float | None, stabilized: bool = False) -> DeltaSpec:
    return DeltaSpec("lora", {"down": torch.randn(rank, 4), "up": torch.randn(4, rank)}, alpha, stabilized)


def specs(rank: int = 3, alpha: float | None = 2.0, stabilized: bool = False) -> dict[str, DeltaSpec]:
    return {path: spec(rank, alpha, stabilized) for path in ("Linear", "Residual.Linear")}


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().numpy().tobytes()


def look(tree: fl.Chain, loras: LoraSet) -> list[Any]:
    """Everything that a swap could have changed."""
    held = [(id(weight), weight.data_ptr(), bits(weight)) for weight in tree.parameters()]
    strengths = [(lora.rank, lora.alpha, lora.rank_stabilized, lora.scale, lora.scaling) for lora in loras.loras]
    tensors = [bits(tensor) for spec in loras.specs().values() for tensor in spec.tensors.values()]
    return [held, strengths, tensors, bits(tree(X))]


def leave(_: fl.Chain, loras: LoraSet) -> None: ...


def merge(_: fl.Chain, loras: LoraSet) -> None:
    loras.merge()


def fuse_all(tree: fl.Chain, loras: LoraSet) -> None:
    inject_loras(tree, specs(1), name="other")
    fuse(tree)


@pytest.mark.parametrize("prepare", [leave, merge, fuse_all])
def test_an_interrupt_at_any_step_of_a_swap_leaves_the_old_weights(
    prepare: Callable[[fl.Chain, LoraSet], None],
) -> None:
    tree = model()
    loras = inject_loras(tree, specs(), name="style", scale=0.5)
    prepare(tree, loras)
    before, other, steps = look(tree, loras), specs(2, 7.0, stabilized=True), 0
    while interrupted_at(steps, lambda: loras.swap(other)):
        if look(tree, loras) != before:
            break  # on the way out of what was done, see below
        steps += 1
    assert steps > 200
    after = look(tree, loras)[1:]
    loras.swap(other)
    assert after == look(tree, loras)[1:]
    for path, given in other.items():
        held = loras.specs()[path]
        assert [bits(tensor) for tensor in held.tensors.values()] == [bits(t) for t in given.tensors.values()]
        assert (held.rank, held.alpha, held.rank_stabilized) == (2, 7.0, True)


def test_an_interrupt_at_any_step_of_loading_leaves_the_old_weights_of_a_tuning() -> None:
    tree = model()
    ia3 = inject_ia3(tree)
    before, steps = [bits(weight) for weight in tree.parameters()], 0
    other = {key: torch.randn(4) for key in ia3.state_dict()}
    while interrupted_at(steps, lambda: ia3.load_state_dict(other)):
        if [bits(weight) for weight in tree.parameters()] != before:
            break
        steps += 1
    assert steps > 50
    after = [bits(weight) for weight in tree.parameters()]
    ia3.load_state_dict(other)
    assert {key: bits(tensor) for key, tensor in ia3.state_dict().items()} == {k: bits(t) for k, t in other.items()}
    assert after == [bits(weight) for weight in tree.parameters()]


def test_a_failing_swap_lists_all_that_is_wrong_and_writes_nothing() -> None:
    tree = model()
    loras = inject_loras(tree, specs(), name="style")
    before, other = look(tree, loras), specs(2)
    other["Linear"].tensors["up"][1, 1] = torch.inf
    other["Residual.Linear"] = spec(4, 2.0)
    with pytest.raises(AdapterError, match=r"(?s)Linear: up holds values that are not finite.*down is \[4, 4\], and"):
        loras.swap({**other, "Linear_2": spec(1, None)})
    assert look(tree, loras) == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_one_value_among_many_that_is_not_finite_is_found(dtype: torch.dtype, value: float) -> None:
    tensors = [torch.randn(5, 3).to(dtype), torch.zeros(2, dtype=torch.int64), torch.empty(3, device="meta")]
    assert are_finite(tensors)
    tensors[0][2, 1] = value
    assert not are_finite(tensors)
    assert [is_finite(tensor) for tensor in tensors] == [False, True, True]


def test_values_whose_sum_is_too_large_are_finite_after_all() -> None:
    large = torch.full((4, 4), 3e38)
    assert not are_finite([large])
    assert is_finite(large)
    tree = fl.Chain(fl.Linear(4, 4))
    loras = inject_loras(tree, {"Linear": DeltaSpec("lora", {"down": large, "up": torch.ones(4, 4)})}, name="style")
    loras.swap({"Linear": DeltaSpec("lora", {"down": large, "up": -torch.ones(4, 4)})})
    assert torch.equal(loras.specs()["Linear"].tensors["up"], -torch.ones(4, 4))


# --- two forms of one adapter --------------------------------------------------------------------------------------


def forms(method: str, **more: Tensor) -> tuple[DeltaSpec, DeltaSpec]:
    """The same LoRA as matrices, and as convolutions of one pixel."""
    down, up = torch.randn(2, 3), torch.randn(5, 2)
    wide = {name: tensor.view(1, -1, 1, 1) for name, tensor in more.items()}
    return (
        DeltaSpec(method, {"down": down, "up": up, **more}, 4.0),
        DeltaSpec(method, {"down": down[..., None, None], "up": up[..., None, None], **wide}, 4.0),
    )


LORAS = [("lora", {}), ("dora", {"magnitude": torch.rand(5) + 0.5})]
PIXEL, LINEAR = fl.Conv2d(3, 5, kernel_size=1), fl.Linear(3, 5)


@pytest.mark.parametrize(("method", "more"), LORAS, ids=["lora", "dora"])
@pytest.mark.parametrize("layer", [PIXEL, LINEAR], ids=["conv2d", "linear"])
def test_matrices_and_convolutions_of_one_pixel_are_the_same_lora(
    layer: nn.Module, method: str, more: dict[str, Tensor]
) -> None:
    x = torch.randn(2, 3, 4, 4) if isinstance(layer, nn.Conv2d) else torch.randn(2, 3)
    tree, outputs = fl.Chain(layer), list[bytes]()
    pair = forms(method, **more)
    for given in pair:
        loras = inject_loras(tree, {type(layer).__name__: given}, name="style")
        outputs.append(bits(tree(x)))
        # Given back as they were given, so that a file is written again as it was.
        held = loras.specs()[type(layer).__name__].tensors
        assert {role: tensor.shape for role, tensor in held.items()} == {r: t.shape for r, t in given.tensors.items()}
        assert all(torch.equal(held[role], tensor) for role, tensor in given.tensors.items())
        for other in pair:
            loras.swap({type(layer).__name__: other})
            back = loras.specs()[type(layer).__name__].tensors
            assert all(torch.equal(back[role], tensor) for role, tensor in other.tensors.items())
        loras.eject()
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize(
    ("layer", "down", "up"),
    [
        (fl.Conv2d(3, 5, kernel_size=3), (2, 3), (5, 2)),
        (fl.Linear(3, 5), (2, 3, 3, 3), (5, 2, 1, 1)),
        (PIXEL, (2, 3), (5, 2, 1, 1)),
        (fl.Embedding(3, 5), (2, 3, 1, 1), (5, 2, 1, 1)),
    ],
    ids=["kernel", "linear", "mixed", "embedding"],
)
def test_what_is_of_more_than_one_pixel_has_one_form_only(
    layer: nn.Module, down: tuple[int, ...], up: tuple[int, ...]
) -> None:
    given = DeltaSpec("lora", {"down": torch.randn(down), "up": torch.randn(up)})
    tree = fl.Chain(layer)
    with pytest.raises(AdapterError):
        inject_loras(tree, {type(layer).__name__: given}, name="style")


def test_a_lokr_of_one_pixel_may_be_a_matrix() -> None:
    tree, w1, w2 = fl.Chain(fl.Conv2d(4, 6, kernel_size=1)), torch.randn(2, 2), torch.randn(3, 2)
    x, outputs = torch.randn(1, 4, 3, 3), list[bytes]()
    for second in (w2, w2[..., None, None]):
        loras = inject_loras(tree, {"Conv2d": DeltaSpec("lokr", {"w1": w1, "w2": second})}, name="style")
        outputs.append(bits(tree(x)))
        assert loras.specs()["Conv2d"].tensors["w2"].shape == second.shape
        loras.eject()
    assert outputs[0] == outputs[1]


# --- the same interrupts for what edits the tree ---------------------------------------------------------------------


def structure(tree: fl.Chain) -> list[Any]:
    """What an edit of the tree could have changed."""
    modules = [(name, id(module)) for name, module in tree.named_modules(remove_duplicate=False)]
    return [modules, [(name, bits(weight)) for name, weight in tree.state_dict().items()], bits(tree(X))]


@pytest.mark.parametrize("what", ["inject", "fused", "eject", "merge", "unmerge", "fuse"])
def test_an_interrupt_at_any_step_leaves_the_model_as_it_was(what: str) -> None:
    tree = model()
    inject_loras(tree, specs(1), name="other")
    held = inject_loras(tree, specs(), name="held")
    if what == "unmerge":
        held.merge()
    other = specs(2)
    acts: dict[str, Callable[[], object]] = {
        "inject": lambda: inject_loras(tree, other, name="style"),
        "fused": lambda: inject_loras(tree, other, name="style", fused=True),
        "eject": held.eject,
        "merge": held.merge,
        "unmerge": held.unmerge,
        "fuse": lambda: fuse(tree),
    }
    before, steps = structure(tree), 0
    while interrupted_at(steps, acts[what]):
        after = structure(tree)
        if after != before:
            break  # on the way out of what was done
        # Injecting has thousands of steps, and most of them touch nothing.
        steps += 29 if what in ("inject", "fused") else 3
    assert steps > 100
    if what in ("inject", "fused"):
        assert sum("style" in adapter.names for adapter in tree.layers(LoraAdapter, recurse=True)) == 2
    if what == "eject":
        assert not any("held" in adapter.names for adapter in tree.layers(LoraAdapter, recurse=True))
    if what in ("merge", "unmerge"):
        assert held.is_merged is (what == "merge")
    if what == "fuse":
        assert len(list(tree.layers(FusedLoras, recurse=True))) == 2
