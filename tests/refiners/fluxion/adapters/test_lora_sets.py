"""What is done with sets of LoRAs that are in: scales, switches, fusing, swapping, samples, sums of several."""

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from refiners.errors import AdapterError, ChainError, LoraNameError
from refiners.fluxion.adapters import (
    DeltaSpec,
    FusedLoras,
    LoraSet,
    adapter_state_dict,
    assign_samples,
    base_state_dict,
    combine,
    fuse,
    inject_checkpoints,
    inject_loras,
    load_adapter_state_dict,
    unfuse,
)
from refiners.fluxion.selectors import select
from refiners.parity.rounding import (
    ERROR_RATIO,
    ErrorPair,
    agrees_in_float64,
    joint_ratio,
    relative_error,
    typical_magnitude,
)

X = torch.randn(4, 3, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def model() -> fl.Chain:
    return fl.Chain(
        fl.Conv2d(3, 6, kernel_size=3, padding=1),
        fl.Permute(0, 2, 3, 1),
        fl.Residual(fl.Linear(6, 6), fl.ReLU(), fl.Linear(6, 6, bias=False)),
        fl.Linear(6, 4),
    ).to(dtype=torch.float64)


def trained(tree: nn.Module, name: str, rank: int = 2, **settings: Any) -> LoraSet:
    loras = inject_loras(select(tree).of(fl.Linear, fl.Conv2d), name=name, rank=rank, alpha=3, **settings)
    for parameter in loras.parameters():
        nn.init.normal_(parameter, std=0.5)
    return loras


def is_close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors in float64 are the same up to rounding."""
    return agrees_in_float64(relative_error(a, b, typical_magnitude(b, gradient=True)))


def copied(loras: LoraSet) -> dict[str, DeltaSpec]:
    return {
        path: DeltaSpec(spec.method, {role: tensor.clone() for role, tensor in spec.tensors.items()}, spec.alpha)
        for path, spec in loras.specs().items()
    }


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().numpy().tobytes()


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


# --- fused -------------------------------------------------------------------------------------------------------


def test_fused_sets_give_the_same_outputs_up_to_rounding_and_are_exact_again_afterwards() -> None:
    tree = model()
    sets = [trained(tree, name, rank) for name, rank in (("a", 2), ("b", 3), ("c", 1))]
    sets[1].scale = -0.7
    exact, specs = tree(X), [copied(loras) for loras in sets]
    assert fuse(tree) == 4
    assert {(fused.names, fused.rank) for fused in tree.layers(FusedLoras, recurse=True)} == {(("a", "b", "c"), 6)}
    assert is_close(tree(X), exact)
    with torch.no_grad():
        assert is_close(tree(X), exact)
    unfuse(tree)
    assert bits(tree(X)) == bits(exact)
    for loras, before in zip(sets, specs, strict=True):
        for path, spec in loras.specs().items():
            assert all(torch.equal(tensor, before[path].tensors[role]) for role, tensor in spec.tensors.items())


def test_a_fused_layer_adds_at_most_two_products_to_the_base() -> None:
    tree, x = fl.Chain(fl.Linear(6, 6)), torch.randn(3, 6)
    for name in ("a", "b", "c", "d"):
        trained(tree, name, fused=True)
    with torch.no_grad(), torch.profiler.profile() as profile:
        tree(x)
    products = [event.name for event in profile.events() if event.name in ("aten::mm", "aten::addmm", "aten::addmm_")]
    assert len(products) == 3


def test_a_hook_on_the_layer_sees_its_output_without_the_fused_loras() -> None:
    tree, x = fl.Chain(fl.Linear(6, 6)), torch.randn(3, 6)
    layer, base = tree[0], tree(x)
    trained(tree, "a", fused=True)
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda *args: seen.append(args[2]))
    with torch.no_grad():
        tree(x)
    assert torch.equal(seen[0], base)


def test_gradients_through_the_fused_form_reach_the_tensors_of_each_set() -> None:
    tree = model()
    sets = [trained(tree, "a"), trained(tree, "b", rank=1)]

    def gradients() -> list[Tensor]:
        for parameter in tree.parameters():
            parameter.grad = None
        tree(X).square().sum().backward()
        found = [parameter.grad for loras in sets for parameter in loras.parameters()]
        return [gradient for gradient in found if gradient is not None]

    exact = gradients()
    fuse(tree)
    fused = gradients()
    assert len(fused) == 16
    for a, b in zip(fused, exact, strict=True):
        assert is_close(a, b)


def test_what_happens_to_a_set_reaches_the_fused_form() -> None:
    tree = model()
    base = tree(X)
    first, second = trained(tree, "a", fused=True), trained(tree, "b", fused=True)

    def exact() -> Tensor:
        unfuse(tree)
        output = tree(X)
        fuse(tree)
        return output

    first.scale = 0.3
    assert is_close(tree(X), exact())
    second.enabled = False
    assert is_close(tree(X), exact())
    second.enabled = True
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(0.5)
    assert is_close(tree(X), exact())
    second.swap(
        {path: DeltaSpec("lora", {r: t * 3 for r, t in s.tensors.items()}) for path, s in second.specs().items()}
    )
    assert is_close(tree(X), exact())
    tree.to(dtype=torch.float32).to(dtype=torch.float64)
    assert is_close(tree(X), exact())
    first.merge()
    first.unmerge()
    first.eject()
    assert {fused.names for fused in tree.layers(FusedLoras, recurse=True)} == {("b",)}
    for loras in (first, second):
        for parameter in loras.parameters():
            parameter.data.zero_()
    assert torch.equal(tree(X), base)
    second.eject()
    assert not list(tree.layers(FusedLoras, recurse=True))


def test_fusing_takes_no_memory_and_leaves_no_keys() -> None:
    tree = model()
    trained(tree, "a")
    trained(tree, "b")
    keys = list(tree.state_dict())
    before = memory(tree)
    fuse(tree)
    assert list(tree.state_dict()) == keys
    assert memory(tree) == before
    assert list(base_state_dict(tree)) == list(model().state_dict())


def test_other_methods_and_biases_run_beside_what_is_fused() -> None:
    tree = model()
    for i, method in enumerate(("dora", "loha", "lokr")):
        inject_loras(tree, name=f"{i}", rank=2, method=method)
    with pytest.raises(AdapterError, match="no LoRAs that can be fused"):
        fuse(tree)
    trained(tree, "a")
    exact = tree(X)
    assert fuse(tree) == 4
    assert is_close(tree(X), exact)


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


def memory(tree: nn.Module) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in tree.state_dict().values()}
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strength", [1, 20])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: fl.Conv2d(3, 8, kernel_size=3, stride=2, padding=1), (2, 3, 12, 10)),
        (lambda: fl.Conv2d(12, 6, kernel_size=1), (2, 12, 6, 5)),
        (lambda: fl.Linear(64, 64), (24, 64)),
    ],
    ids=["conv2d", "pixel", "linear"],
)
def test_fused_loras_are_as_near_to_the_truth_as_one_after_the_other(
    layer: Any, shape: tuple[int, ...], strength: float, dtype: torch.dtype
) -> None:
    errors: list[ErrorPair] = []
    for seed in range(12):
        torch.manual_seed(seed)
        tree = fl.Chain(layer()).to(dtype=dtype)
        for name, rank, alpha in (("a", 4, 2.1 * strength), ("b", 8, -26.0 * strength)):
            loras = inject_loras(select(tree).of(fl.Linear, fl.Conv2d), name=name, rank=rank, alpha=alpha)
            for parameter in loras.parameters():
                nn.init.normal_(parameter, std=0.5)
        x = torch.randn(shape).to(dtype)
        with torch.no_grad():
            exact = tree(x)
            truth = deepcopy(tree).to(dtype=torch.float64)(x.double())
            fuse(tree)
            both = [relative_error(y, truth, typical_magnitude(truth, gradient=True)) for y in (exact, tree(x))]
        errors.append(ErrorPair(str(seed), *both))
    assert joint_ratio(errors, dtype) <= ERROR_RATIO


# --- samples -----------------------------------------------------------------------------------------------------


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


# --- sums of several ---------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("assign", [False, True])
def test_weights_that_are_loaded_into_a_fused_model_are_seen(assign: bool) -> None:
    tree = model()
    trained(tree, "a", fused=True)
    trained(tree, "b", fused=True)
    new = {key: torch.randn_like(tensor) for key, tensor in adapter_state_dict(tree).items()}
    load_adapter_state_dict(tree, new, assign=assign)
    with torch.no_grad():
        fused = tree(X)
        unfuse(tree)
        assert is_close(fused, tree(X))
        fuse(tree)
        tree.load_state_dict({key: tensor * 0.5 for key, tensor in tree.state_dict().items()}, assign=assign)
        fused = tree(X)
        unfuse(tree)
        assert is_close(fused, tree(X))
