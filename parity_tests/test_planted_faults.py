"""A check that cannot fail is a defect: each fault planted in a port must turn its case red.

The faults are edits of the tree, made after the weights were handed over, so that nothing but the comparison can tell.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import TypeVar
from weakref import WeakSet

import pytest
import torch
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from parity_tests.cases import bert, clip, vit
from reference_ports.bert.model import MeanPooling, Normalize, TokenTypeIds, WordEncoder
from reference_ports.blocks.attention import Key, MaskedAttention, Query, SelfAttention, Value
from reference_ports.blocks.images import ClassToken, GridPositions
from reference_ports.blocks.pooling import FirstToken, Pooler
from reference_ports.blocks.text import PositionIds
from reference_ports.clip.image import ImageEmbeddings
from reference_ports.clip.text import EndOfTextState, FirstId, HighestId
from reference_ports.vit.model import MaskedPlaces, MaskToken
from refiners.parity import Case, CaseRunner, Lane, Verdict

T = TypeVar("T", bound=nn.Module)
Fault = Callable[[fl.Chain], None]

CASES = {case.id: case for case in (*bert.CASES, *clip.CASES, *vit.CASES)}
BERT, SENTENCES = "bert/tiny", "bert/sentences"
TEXT, PROJECTED, IMAGE = "clip/text-l", "clip/text-bigg", "clip/image-l"
RESIZED = "clip/image-interpolated"
VIT, VIT_MASK, VIT_MASKED, VIT_RESIZED = "vit/tiny", "vit/mask", "vit/masked-patches", "vit/interpolated"
ALL = (BERT, TEXT, PROJECTED, IMAGE, VIT)


class Unmasked(MaskedAttention):
    """Does not look at the mask."""

    def use_context(self, context_name: str) -> dict[str, Tensor | None]:
        return {"mask": None}


class InFloat32(nn.Module):
    """A norm that computes in float32 what upstream computes in the dtype of the model."""

    def __init__(self, norm: fl.LayerNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        weight, bias = norm.weight.float(), norm.bias.float()
        return nn.functional.layer_norm(x.float(), norm.normalized_shape, weight, bias, norm.eps).to(x.dtype)


class Reordered(nn.Module):
    """Class token and patches in the other order."""

    def forward(self, x: Tensor) -> Tensor:
        return x.roll(1, dims=1)


class Shifted(nn.Module):
    """Each position is one too far."""

    def __init__(self, positions: nn.Module) -> None:
        super().__init__()
        self.positions = positions

    def forward(self, ids: Tensor) -> Tensor:
        return self.positions(ids) + 1


class NothingMasked(MaskedPlaces):
    """Does not look at the mask of the patches."""

    def forward(self, patches: Tensor) -> None:
        return None


class TheOthersMasked(MaskedPlaces):
    """Masks what is not masked."""

    def forward(self, patches: Tensor) -> Tensor:
        return ~super().forward(patches)


def nth(model: fl.Chain, kind: type[T], index: int = 0) -> T:
    return list(model.layers(kind, recurse=True))[index]


def swap(model: fl.Chain, old: nn.Module, new: nn.Module) -> None:
    parent = model.ensure_find_parent(old)
    parent.replace(old, new, old_module_parent=parent)


def exchange(one: nn.Module, other: nn.Module) -> None:
    one.weight, other.weight = other.weight, one.weight
    if getattr(one, "bias", None) is not None:
        one.bias, other.bias = other.bias, one.bias


def swap_norms(model: fl.Chain) -> None:
    exchange(nth(model, fl.LayerNorm, 1), nth(model, fl.LayerNorm, 2))


def lose_bias_of(kind: type[nn.Module]) -> Fault:
    def fault(model: fl.Chain) -> None:
        nth(model, kind).bias = None

    return fault


def change_eps(model: fl.Chain) -> None:
    norm = nth(model, fl.LayerNorm, 1)
    norm.eps = 1e-6 if norm.eps == 1e-5 else 1e-5


def transpose(model: fl.Chain) -> None:
    query = nth(model, Query)
    query.weight = nn.Parameter(query.weight.detach().T)


def change_activation(model: fl.Chain) -> None:
    gelu = nth(model, fl.GeLU)
    other = fl.GeLUApproximation.NONE if gelu.approximation == "sigmoid" else fl.GeLUApproximation.TANH
    swap(model, gelu, fl.GeLU(other))


def rotate_heads(model: fl.Chain) -> None:
    value = nth(model, Value)
    width = value.out_features // nth(model, MaskedAttention).num_heads
    value.weight = nn.Parameter(value.weight.detach().roll(width, dims=0))
    value.bias = nn.Parameter(value.bias.detach().roll(width, dims=0))


def interleave_heads(model: fl.Chain) -> None:
    value = nth(model, Value)
    heads = nth(model, MaskedAttention).num_heads
    for name in ("weight", "bias"):
        rows = getattr(value, name).detach().unflatten(0, (heads, -1)).transpose(0, 1).flatten(0, 1)
        setattr(value, name, nn.Parameter(rows.contiguous()))


def other_head_count(model: fl.Chain) -> None:
    nth(model, MaskedAttention).num_heads *= 2


def swap_query_and_key(model: fl.Chain) -> None:
    exchange(nth(model, Query), nth(model, Key))


def swap_key_and_value(model: fl.Chain) -> None:
    exchange(nth(model, Key), nth(model, Value))


def swap_layers(model: fl.Chain) -> None:
    exchange(nth(model, Value, 0), nth(model, Value, 1))


def drop_layer(model: fl.Chain) -> None:
    layer = nth(model, SelfAttention).ensure_parent.ensure_parent
    layer.ensure_parent.remove(layer)


def drop_residual(model: fl.Chain) -> None:
    residual = nth(model, SelfAttention).ensure_parent
    swap(model, residual, fl.Chain(*residual.structural_copy()))


def drop_first_norm(model: fl.Chain) -> None:
    swap(model, nth(model, fl.LayerNorm), fl.Identity())


def drop_last_norm(model: fl.Chain) -> None:
    swap(model, nth(model, fl.LayerNorm, -1), fl.Identity())


def shift_positions(model: fl.Chain) -> None:
    positions = nth(model, PositionIds)
    swap(model, positions, Shifted(positions))


def ignore_mask(model: fl.Chain) -> None:
    attention = nth(model, MaskedAttention)
    swap(model, attention, Unmasked(attention.num_heads, attention.is_causal))


def forget_causality(model: fl.Chain) -> None:
    for attention in model.layers(MaskedAttention, recurse=True):
        attention.is_causal = False


def invent_causality(model: fl.Chain) -> None:
    nth(model, MaskedAttention).is_causal = True


def compute_norm_in_float32(model: fl.Chain) -> None:
    norm = nth(model, fl.LayerNorm, 1)
    swap(model, norm, InFloat32(norm))


def train_padding(model: fl.Chain) -> None:
    nth(model, WordEncoder).padding_idx = None


def freeze_weight(model: fl.Chain) -> None:
    nth(model, Value).weight.requires_grad_(False)


def detach_attention(model: fl.Chain) -> None:
    attention = nth(model, SelfAttention)
    attention.append(fl.Lambda(lambda x: x + (x - x.detach())))


def ignore_token_types(model: fl.Chain) -> None:
    swap(model, nth(model, TokenTypeIds), fl.Lambda(torch.zeros_like))


def average_padding_too(model: fl.Chain) -> None:
    swap(model, nth(model, MeanPooling), fl.Lambda(lambda x: x.mean(dim=1)))


def drop_normalize(model: fl.Chain) -> None:
    swap(model, nth(model, Normalize), fl.Identity())


def pool_last_token(model: fl.Chain) -> None:
    kind = EndOfTextState if list(model.layers(EndOfTextState, recurse=True)) else FirstToken
    swap(model, nth(model, kind), fl.Lambda(lambda x: x[:, -1]))


def take_other_end(model: fl.Chain) -> None:
    ends = list(model.layers(FirstId, recurse=True))
    swap(model, ends[0] if ends else nth(model, HighestId), FirstId(3))


def reorder_tokens(model: fl.Chain) -> None:
    nth(model, ImageEmbeddings).insert(1, Reordered())


def double_class_token(model: fl.Chain) -> None:
    token = nth(model, ClassToken)
    token.weight = nn.Parameter(token.weight.detach() * 2)


def lose_class_position(model: fl.Chain) -> None:
    positions = nth(model, GridPositions)
    weight = positions.weight.detach().clone()
    weight[0] = 0
    positions.weight = nn.Parameter(weight)


def resize_to_the_oblong(model: fl.Chain) -> None:
    positions = nth(model, GridPositions)
    resize = positions._resize
    positions._resize = lambda rows, columns: resize(columns, rows)


def pool_with_another_activation(model: fl.Chain) -> None:
    nth(model, Pooler).replace(nth(model, nn.Tanh), nn.Sigmoid())


def normalise_the_pooled_token_twice(model: fl.Chain) -> None:
    norm = nth(model, fl.LayerNorm, -1)
    nth(model, Pooler).insert(1, fl.Lambda(lambda x: norm(x)))


def ignore_masked_patches(model: fl.Chain) -> None:
    swap(model, nth(model, MaskedPlaces), NothingMasked())


def mask_the_other_patches(model: fl.Chain) -> None:
    swap(model, nth(model, MaskedPlaces), TheOthersMasked())


def detach_mask_token(model: fl.Chain) -> None:
    token = nth(model, MaskToken)
    token.forward = lambda patches, masked: torch.where(masked.unsqueeze(-1), token.weight.detach(), patches)


def transpose_positions(model: fl.Chain) -> None:
    positions = nth(model, GridPositions)
    size = positions.grid_size
    table = positions.weight.detach()[1:].unflatten(0, (size, size)).transpose(0, 1).flatten(0, 1)
    positions.weight = nn.Parameter(torch.cat((positions.weight.detach()[:1], table)))


FAULTS: dict[Fault, tuple[str, ...]] = {
    swap_norms: ALL,
    lose_bias_of(Query): ALL,
    lose_bias_of(Value): ALL,
    lose_bias_of(fl.LayerNorm): ALL,
    change_eps: ALL,
    transpose: ALL,
    change_activation: ALL,
    rotate_heads: ALL,
    interleave_heads: ALL,
    other_head_count: ALL,
    swap_query_and_key: ALL,
    swap_key_and_value: ALL,
    swap_layers: ALL,
    drop_layer: ALL,
    drop_residual: ALL,
    drop_first_norm: ALL,
    drop_last_norm: ALL,
    freeze_weight: ALL,
    detach_attention: ALL,
    pool_last_token: ALL,
    shift_positions: (BERT, TEXT, PROJECTED),
    ignore_mask: (BERT, TEXT, VIT_MASK),
    invent_causality: (IMAGE, VIT),
    forget_causality: (PROJECTED,),
    take_other_end: (TEXT, PROJECTED),
    train_padding: (BERT,),
    ignore_token_types: (BERT,),
    average_padding_too: (SENTENCES,),
    drop_normalize: (SENTENCES,),
    reorder_tokens: (IMAGE,),
    double_class_token: (IMAGE, VIT),
    lose_class_position: (IMAGE, VIT),
    transpose_positions: (IMAGE, RESIZED, VIT, VIT_RESIZED),
    resize_to_the_oblong: (RESIZED, VIT_RESIZED),
    lose_bias_of(fl.Conv2d): (VIT,),
    pool_with_another_activation: (BERT, VIT),
    normalise_the_pooled_token_twice: (VIT,),
    ignore_masked_patches: (VIT_MASKED,),
    mask_the_other_patches: (VIT_MASKED,),
    detach_mask_token: (VIT_MASKED,),
}

BACKWARD_FAULTS = {freeze_weight, detach_attention, train_padding, detach_mask_token}


def planted(case: Case, fault: Fault) -> Case:
    """The case, with a port that is spoilt once its weights are there."""
    spoilt: WeakSet[nn.Module] = WeakSet()

    def run_port(model: nn.Module, inputs: object) -> object:
        assert isinstance(model, fl.Chain)
        if model not in spoilt:
            spoilt.add(model)
            fault(model)
            model.eval()  # a new node in training mode would be red by itself
        return case.run_port(model, inputs)

    # Outputs alone have to show a fault, unless it is one of the backward pass.
    return replace(case, run_port=run_port, taps={}, gradients=fault in BACKWARD_FAULTS)


def combinations() -> Iterator[object]:
    for fault, ids in FAULTS.items():
        for case_id in ids:
            name = (
                fault.__name__
                if fault.__name__ != "fault"
                else f"lose_bias_of_{fault.__closure__[0].cell_contents.__name__}"
            )
            yield pytest.param(case_id, fault, id=f"{name}-{case_id}")


@lru_cache(maxsize=1)
def runner_of(case_id: str, fault: Fault) -> CaseRunner:
    """Its lanes follow one another: float32 asks for the verdict of float64, which need not be found twice."""
    return CaseRunner(planted(CASES[case_id], fault))


@pytest.mark.parametrize("lane", ["float64", "float32"])
@pytest.mark.parametrize(("case_id", "fault"), [*combinations()])
def test_a_planted_fault_turns_its_case_red(case_id: str, fault: Fault, lane: str) -> None:
    result = runner_of(case_id, fault).run(Lane(lane))
    assert result.verdict is Verdict.DIFFERENT, result
    assert not result.traceback, "the fault broke the model: the comparison has not shown that it sees it"
    assert result.worst is not None, "red for another reason than a tensor that differs"


@pytest.mark.parametrize("case_id", ALL)
def test_a_norm_in_float32_turns_the_half_lanes_red(case_id: str) -> None:
    runner = CaseRunner(planted(CASES[case_id], compute_norm_in_float32))
    assert {runner.run(Lane(lane)).verdict for lane in ("bfloat16", "float16")} != {Verdict.BITWISE}


@pytest.mark.parametrize("case_id", [*ALL, SENTENCES, RESIZED, VIT_MASK, VIT_MASKED, VIT_RESIZED])
def test_the_same_case_without_a_fault_is_green(case_id: str) -> None:
    runner = CaseRunner(planted(CASES[case_id], lambda model: None))
    assert {runner.run(Lane(lane)).verdict for lane in ("float64", "float32")} == {Verdict.BITWISE}
