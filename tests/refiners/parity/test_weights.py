"""Informative weights, one set of storages for both sides, ties, alignment, and the proof of influence."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from refiners.conversion import KeyMap, Merge, Squeeze
from refiners.errors import ParityError
from refiners.parity import Verdict, weights, with_both_inits
from refiners.parity.influence import examine, matches, neutral, never_read
from refiners.parity.weights import (
    ALIGNMENT,
    align,
    fill_from,
    fill_informative,
    floating_entries,
    generator_for,
    share,
)
from tests.refiners.parity.toys import Port, SameKeys, Upstream, make_case, result_of


class Kinds(nn.Module):
    """One weight of each role."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv, self.transposed = nn.Linear(64, 32), nn.Conv2d(8, 16, 3), nn.ConvTranspose2d(8, 16, 3)
        self.embedding, self.norm, self.batch = nn.Embedding(50, 32), nn.LayerNorm(256), nn.BatchNorm1d(256)
        self.gate, self.class_token = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(1, 1, 256))
        self.layer_scale, self.table = nn.Parameter(torch.zeros(256)), nn.Parameter(torch.zeros(40, 4))
        self.counter: Tensor
        self.register_buffer("counter", torch.arange(5))
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.linspace(0, 1, 5), persistent=False)


def assert_spread(tensor: Tensor | None, mean: float, deviation: float) -> None:
    """Within what a hundred numbers or more allow."""
    assert tensor is not None
    values = tensor.detach()
    assert abs(float(values.mean()) - mean) < 0.25 * deviation
    assert 0.75 < float(values.std()) / deviation < 1.25


def test_every_floating_weight_gets_values_that_suit_its_role() -> None:
    model = Kinds()
    fill_informative(model, seed=0)
    for table in (model.embedding.weight, model.class_token, model.table):
        assert_spread(table, 0.0, 1.0)
    assert_spread(model.linear.weight, 0.0, 64**-0.5)
    assert_spread(model.conv.weight, 0.0, (8 * 9) ** -0.5)
    assert_spread(model.transposed.weight, 0.0, (8 * 9) ** -0.5)
    for vector in (model.norm.weight, model.batch.weight, model.layer_scale):
        assert_spread(vector, 1.0, 0.25)
    for vector in (model.norm.bias, model.batch.bias, model.batch.running_mean):
        assert_spread(vector, 0.0, 0.3)
    assert model.batch.running_var is not None
    assert float(model.batch.running_var.min()) > 0
    assert bool(model.gate.detach() != 0)


def test_what_is_not_in_the_state_dict_or_not_floating_stays_as_it_was_computed() -> None:
    model = Kinds()
    fill_informative(model, seed=0)
    assert torch.equal(model.counter, torch.arange(5))
    assert torch.equal(model.frequencies, torch.linspace(0, 1, 5))
    assert "frequencies" not in {entry.key for entry in floating_entries(model)}


def test_values_depend_on_key_and_seed_and_on_no_order() -> None:
    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Linear(8, 8), nn.Linear(8, 8)
            self.norm_2, self.norm_1 = nn.LayerNorm(8), nn.LayerNorm(8)

    first, second, other = Upstream(), Reversed(), Upstream()
    for model, seed in ((first, 0), (second, 0), (other, 1)):
        fill_informative(model, seed)
    assert all(torch.equal(tensor, second.state_dict()[key]) for key, tensor in first.state_dict().items())
    assert not torch.equal(first.up.weight, other.up.weight)
    assert not torch.equal(first.up.bias, first.down.bias)


def test_the_random_numbers_of_a_key_are_the_same_everywhere() -> None:
    assert generator_for(0, "up.weight").initial_seed() == 7316297923741874772
    assert generator_for(0, "a").initial_seed() != generator_for(1, "a").initial_seed()


def test_a_lower_precision_gets_the_rounded_values_of_float64() -> None:
    wide, half = Upstream().double(), Upstream().bfloat16()
    fill_informative(wide, seed=0)
    fill_informative(half, seed=0)
    assert torch.equal(wide.up.weight.bfloat16(), half.up.weight)


def test_the_port_reads_upstreams_own_storages() -> None:
    upstream, port = Upstream(), Port()
    sharing = share(upstream, port, SameKeys())
    assert (sharing.shared, sharing.copied, sharing.faults) == (8, (), ())
    for ours, theirs in zip(upstream.parameters(), port.parameters(), strict=True):
        assert ours.data_ptr() == theirs.data_ptr()
        assert isinstance(theirs, nn.Parameter)


def test_sharing_keeps_what_the_port_says_about_training() -> None:
    upstream, port = Upstream(), Port()
    port.up.weight.requires_grad_(False)
    share(upstream, port, SameKeys())
    assert not port.up.weight.requires_grad
    assert port.down.weight.requires_grad


class Copies(SameKeys):
    """A key map that copies what it only renames."""

    def convert(self, state_dict: Mapping[str, Tensor], target: nn.Module) -> Mapping[str, Tensor]:
        return {key: tensor.clone() for key, tensor in super().convert(state_dict, target).items()}


def test_copies_are_told_in_the_result() -> None:
    assert len(share(Upstream(), Port(), Copies()).copied) == 8
    result = result_of(make_case(key_map=Copies()))
    assert result.notes[0] == "8 of 8 port tensors are copies, not upstream's storage"


class IgnoresAssign(Port):
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        del assign
        return super().load_state_dict(state_dict, strict=strict)


def test_a_port_that_copies_when_weights_are_assigned_is_different() -> None:
    result = result_of(make_case(IgnoresAssign))
    assert result.verdict is Verdict.DIFFERENT
    assert "is not the storage of upstream's" in result.reason


def test_weights_start_on_multiples_of_sixteen_bytes() -> None:
    model = nn.Linear(3, 3)
    storage = torch.randn(3 * 3 + 1)
    model.weight.data = storage[1:].view(3, 3)
    before = model.weight.detach().clone()
    assert model.weight.data_ptr() % ALIGNMENT
    align(model)
    assert model.weight.data_ptr() % ALIGNMENT == 0
    assert torch.equal(model.weight, before)


class Tied(nn.Module):
    """An embedding whose weight is that of the head."""

    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
        if tie:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids))


def tied_case(upstream: bool, port: bool) -> Any:
    return make_case(
        lambda: Tied(port),
        upstream=lambda: Tied(upstream),
        inputs=lambda generator: {"x": torch.randint(0, 20, (2, 5), generator=generator)},
    )


def test_tied_weights_stay_one_parameter() -> None:
    upstream, port = Tied(), Tied()
    assert share(upstream, port, SameKeys()).faults == ()
    assert port.head.weight is port.embedding.weight
    assert port.head.weight.data_ptr() == upstream.head.weight.data_ptr()
    assert result_of(tied_case(True, True)).verdict is Verdict.BITWISE
    assert result_of(tied_case(False, False)).verdict is Verdict.BITWISE


@pytest.mark.parametrize(
    ("upstream", "port", "reason"),
    [
        (True, False, "upstream ties `embedding.weight` and `head.weight`, the port does not"),
        (False, True, "the port ties `embedding.weight` and `head.weight`, upstream does not"),
    ],
)
def test_weights_tied_on_one_side_only_are_different(upstream: bool, port: bool, reason: str) -> None:
    result = result_of(tied_case(upstream, port))
    assert result.verdict is Verdict.DIFFERENT
    assert reason in result.reasons


def test_given_weights_have_to_fit_and_nothing_is_copied_before() -> None:
    model = Upstream()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    given = {"up.weight": torch.ones(8, 8), "up.bias": torch.ones(4), "other": torch.ones(1)}
    with pytest.raises(ParityError, match=r"missing: .*down.weight.*unexpected: other.*another shape: up.bias"):
        fill_from(model, given)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_case_with_real_weights_uses_them() -> None:
    weights = {key: torch.full_like(tensor, 0.5) for key, tensor in Upstream().state_dict().items()}
    weights["down.weight"] = torch.arange(64.0).view(8, 8)
    case = make_case(weights=lambda: weights)
    result = result_of(case)
    assert result.verdict is Verdict.BITWISE
    wrong = result_of(make_case(weights=lambda: {}))
    assert wrong.reason.startswith("building upstream raised ParityError: The given weights do not fit Upstream")


def test_upstreams_own_init_is_the_same_in_every_lane() -> None:
    _, case = with_both_inits(make_case())
    assert case.id == "toy/tower.upstream-init"
    seen: list[Tensor] = []

    def spy(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        seen.append(model.state_dict()["up.weight"].clone())
        return {"y": model(inputs["x"])}

    for lane in case.lanes:
        assert result_of(make_case(init="upstream", run_port=spy), lane).verdict is Verdict.BITWISE
    assert len(seen) == 5 * 4  # once, without gradients, with moved weights, once more, and for its dtypes
    assert torch.equal(seen[0].float(), seen[5])
    assert torch.equal(seen[5].bfloat16(), seen[10])
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


def test_upstreams_own_init_hides_swapped_norms_until_weights_are_moved() -> None:
    class Swapped(Port):
        def forward(self, x: Tensor) -> Tensor:
            x = x + nn.functional.gelu(self.up(self.norm_2(x)))
            return self.down(self.norm_1(x))

    hidden = result_of(make_case(Swapped, init="upstream", gradients=False))
    assert (hidden.verdict, hidden.worst) == (Verdict.DIFFERENT, None)
    assert hidden.reason.startswith("with other weights and inputs the output `y` differs")
    shown = result_of(make_case(Swapped, gradients=False))
    assert shown.reason.startswith("output `y` differs in float64")


class KeyBias(nn.Module):
    """Attention over three keys: the bias of the keys cannot change a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.query(x) @ self.key(x).T, dim=-1) @ x


def attention_case(**changes: Any) -> Any:
    return make_case(KeyBias, upstream=KeyBias, **changes)


def test_a_weight_without_influence_has_to_be_declared() -> None:
    result = result_of(attention_case())
    assert result.verdict is Verdict.DIFFERENT
    assert result.reason.startswith("`key.bias` cannot influence the compared outputs")
    declared = attention_case(without_influence={"key.bias": "adds the same to all scores of a query"})
    for lane in declared.lanes:
        assert result_of(declared, lane).verdict is Verdict.BITWISE


def test_a_declaration_that_does_not_hold_is_an_error() -> None:
    stale = attention_case(without_influence={"key.*": "nothing"})
    assert "`key.weight` is declared in `without_influence` but influences" in " ".join(result_of(stale).reasons)
    unknown = attention_case(without_influence={"key.bias": "softmax", "value.bias": "nothing"})
    assert "`value.bias` in `without_influence` matches no weight" in " ".join(result_of(unknown).reasons)


def test_gradients_of_weights_without_influence_are_judged_as_noise() -> None:
    class OtherOrder(KeyBias):
        def forward(self, x: Tensor) -> Tensor:
            return torch.softmax((self.key(x) @ self.query(x).T).T, dim=-1) @ x

    case = make_case(OtherOrder, upstream=KeyBias, without_influence={"key.bias": "softmax"})
    for lane in case.lanes:
        assert result_of(case, lane).verdict in (Verdict.ROUNDING, Verdict.BITWISE)


class Reserved(Upstream):
    """Holds a table that the forward does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor
        self.register_buffer("table", torch.arange(8) ** 2)


class ReservedToo(Reserved):
    """The same."""


class ReadsOneRow(Reserved):
    """Reads a part of it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.table[1:2]


class ReadsOneRowToo(ReadsOneRow):
    """The same."""


def test_what_the_forward_of_the_port_never_reads_is_a_fault() -> None:
    assert result_of(make_case(ReservedToo, upstream=Reserved)).reason == "the port's forward never reads `table`"
    declared = make_case(ReservedToo, upstream=Reserved, without_influence={"table": "is for another task"})
    assert result_of(declared).verdict is Verdict.BITWISE
    unknown = make_case(ReservedToo, upstream=Reserved, without_influence={"tables": "is for another task"})
    assert "`tables` in `without_influence` matches no weight of upstream" in result_of(unknown).reasons
    assert result_of(make_case(ReadsOneRowToo, upstream=ReadsOneRow)).verdict is Verdict.BITWISE


class Normalised(Upstream):
    """Ends with a norm of statistics, which counts the batches of its training."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_3 = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm_3(super().forward(x).flatten(0, -2))


class NormalisedToo(Normalised):
    """The same."""


def test_what_a_norm_counts_in_training_is_read_by_nobody() -> None:
    assert result_of(make_case(NormalisedToo, upstream=Normalised)).verdict is Verdict.BITWISE


class Spare(Upstream):
    """Holds a row that only another task reads."""

    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.zeros(1, 8))


class SpareVector(Upstream):
    """Holds it as a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.zeros(8))


LAYERS = {"norm_1": "norm_1", "norm_2": "norm_2", "up": "up", "down": "down"}


def test_a_declared_weight_is_excused_under_any_shape_of_the_key_map() -> None:
    key_map = KeyMap({**LAYERS, "row": Squeeze("row", dim=0)})
    case = make_case(SpareVector, upstream=Spare, key_map=key_map, without_influence={"row": "is for another task"})
    assert result_of(case).verdict is Verdict.BITWISE


def test_a_weight_that_is_made_of_several_is_excused_when_all_of_them_are() -> None:
    models = nn.ModuleDict({"q": nn.Linear(2, 3), "k": nn.Linear(2, 3)}), nn.ModuleDict({"qk": nn.Linear(2, 6)})
    origins = weights.origins(["qk.bias"], models, KeyMap({("q.{p}", "k.{p}"): Merge("qk.{p}")}))
    assert origins == {"qk.bias": ("q.bias", "k.bias")}
    assert never_read(origins, {"k.bias": "why"}) == ["the port's forward never reads `qk.bias`"]
    assert never_read(origins, {"*.bias": "why"}) == []


def test_upstreams_own_initialisation_fails_the_proof_that_values_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {entry.key: entry.tensor for entry in floating_entries(torch.nn.LayerNorm(8))}
    assert neutral(entries) == ["weight", "bias"]
    monkeypatch.setattr(weights, "fill_informative", lambda model, seed: None)
    result = result_of(make_case())
    assert result.verdict is Verdict.DIFFERENT
    told = "`norm_1.weight`, `norm_1.bias`, `norm_2.weight`, `norm_2.bias` hold one number everywhere"
    assert result.reason.startswith(told)


def test_weights_that_show_nothing_are_noted_where_upstreams_initialisation_is_wanted() -> None:
    result = result_of(make_case(init="upstream"))
    assert result.verdict is Verdict.BITWISE
    assert any(note.startswith("4 weights hold one number everywhere") for note in result.notes)


def test_patterns_of_declared_weights_know_numbers_and_anything() -> None:
    assert matches("layer.{i}.key.bias", "layer.12.key.bias")
    assert not matches("layer.{i}.key.bias", "layer.x.key.bias")
    assert matches("*.bias", "layer.12.key.bias")
    assert not matches("layer.1.key", "layer.1.key.bias")


def test_the_share_of_weights_without_gradient_counts_elements() -> None:
    gradients = {"a": torch.tensor([0.0, 1.0]), "b": None}
    found = examine(gradients, {"a": 2, "b": 2}, {}, judge=False)
    assert found.without_gradient == 0.75
    assert found.faults == ()


def test_gradients_that_are_not_finite_prove_no_influence() -> None:
    gradients = {"a": torch.tensor([torch.nan]), "b": torch.ones(1), "c": torch.zeros(1)}
    found = examine(gradients, {"a": 1, "b": 1, "c": 1}, {}, judge=True)
    assert found.faults[0] == "the gradient of `a` is not finite, so it proves nothing"
    assert found.faults[1].startswith("`c` cannot influence")


def test_sparse_gradients_are_compared_like_others() -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(20, 8, sparse=True), nn.Linear(8, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embedding(ids))

    result = result_of(make_case(Sparse, upstream=Sparse, inputs=tied_case(True, True).inputs))
    assert result.verdict is Verdict.BITWISE
    assert result.without_gradient is not None
    assert result.without_gradient > 0


def test_a_weight_that_the_key_map_drops_must_not_influence_upstream() -> None:
    class WithExtra(Upstream):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.extra

    class Drops(SameKeys):
        def convert(self, state_dict: Mapping[str, Tensor], target: nn.Module) -> Mapping[str, Tensor]:
            return {key: tensor for key, tensor in state_dict.items() if key != "extra"}

        def invert(self, state_dict: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            return dict(state_dict)

    result = result_of(make_case(upstream=WithExtra, key_map=Drops()))
    assert "upstream's `extra` influences the outputs, but the key map gives the port nothing for it" in result.reasons
