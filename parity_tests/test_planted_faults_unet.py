"""Faults that a port of a UNet invites, each planted in one case that must turn red. See `test_planted_faults`."""

import pytest
import torch
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from parity_tests.cases import unet
from parity_tests.test_planted_faults import Fault, nth, planted, swap
from reference_ports.blocks.residual_block import Convolutions, ResidualBlock
from reference_ports.unet.embeddings import (
    ClassLabels,
    PooledText,
    PooledTextAndSize,
    Sinusoids,
    SizeSinusoids,
    TimeCondition,
    Timestep,
)
from reference_ports.unet.model import AddToMiddle, AddToSkips, UNet
from reference_ports.unet.stages import ConcatenateSkip, EnlargeToSkip, StoreSkip, TimestepShift
from reference_ports.unet.transformer import (
    CrossAttention,
    CrossAttention2d,
    SelfAttention,
    TextAttention,
    ToImage,
)
from refiners.parity import CaseRunner, Lane, Verdict

CASES = {case.id: case for case in unet.CASES}
SD1, SD2, SDXL, MASK, ODD = "unet/sd1", "unet/sd2", "unet/sdxl", "unet/mask", "unet/odd-size"


class SinesFirst(Sinusoids):
    """The halves in the other order."""

    def forward(self, numbers: Tensor) -> Tensor:
        half = self.embedding_dim // 2
        return super().forward(numbers).roll(half, dims=-1)


class ShiftedFrequencies(Sinusoids):
    """Upstream's freq_shift=1."""

    def forward(self, numbers: Tensor) -> Tensor:
        half = self.embedding_dim // 2
        frequencies = torch.exp(-9.210340371976184 * torch.arange(half) / (half - 1))
        angles = numbers[:, None].float() * frequencies[None, :]
        return torch.cat((torch.cos(angles), torch.sin(angles)), dim=-1)


class OldestSkip(ConcatenateSkip):
    """Takes the skip that was stored last but one, if it fits."""

    def forward(self, x: Tensor) -> Tensor:
        skips = self.use_context("unet")["residuals"]
        if len(skips) > 1 and skips[-1].shape == skips[-2].shape:
            skips[-1], skips[-2] = skips[-2], skips[-1]
        return super().forward(x)


class SkipFirst(ConcatenateSkip):
    """Puts the skip before the image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).roll(-x.shape[1], dims=1)


class Twice(EnlargeToSkip):
    """Doubles the size, then cuts: another pixel is repeated where sizes are odd."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = super().forward(x).shape[2:]
        return nn.functional.interpolate(x, scale_factor=2.0)[:, :, -height:, -width:]


class SwappedGLU(fl.GLU):
    """Gates by the first half."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.roll(x.shape[-1] // 2, dims=-1))


class MildMask(TextAttention):
    """Lowers hidden scores by less."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = self.use_context("cross_attention_block")["text_mask"]
        return super().forward(query, key, value, mask / 1000)


class FirstOfAll(nn.Module):
    """What was said of the first picture, for all."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y[:1].expand_as(y)


class RowsAndColumns(ToImage):
    """Takes height for width."""

    def forward(self, x: Tensor) -> Tensor:
        height, width = self.use_context("sampling")["shapes"][-1]
        y = super().forward(x)
        return y.flatten(2).unflatten(2, (width, height)).transpose(2, 3).contiguous()


def replaced(old: type[nn.Module], new: nn.Module, index: int = 0) -> Fault:
    def fault(model: fl.Chain) -> None:
        swap(model, nth(model, old, index), new)

    fault.__name__ = f"replace_{old.__name__}_by_{type(new).__name__}"
    return fault


def eps_of(parent: type[fl.Chain], eps: float) -> Fault:
    def fault(model: fl.Chain) -> None:
        nth(nth(model, parent), fl.GroupNorm).eps = eps

    fault.__name__ = f"eps_{eps}_of_{parent.__name__}"
    return fault


def heads(model: fl.Chain) -> None:
    nth(model, fl.ScaledDotProductAttention).num_heads *= 2


def gelu_by_tanh(model: fl.Chain) -> None:
    nth(model, fl.GLU).activation.approximation = fl.GeLUApproximation.TANH


def gates_by_the_other_half(model: fl.Chain) -> None:
    swap(model, nth(model, fl.GLU), SwappedGLU(fl.GeLU()))


def sines_first(model: fl.Chain) -> None:
    swap(model, nth(model, Sinusoids), SinesFirst(nth(model, Sinusoids).embedding_dim))


def shifted_frequencies(model: fl.Chain) -> None:
    swap(model, nth(model, Sinusoids), ShiftedFrequencies(nth(model, Sinusoids).embedding_dim))


def one_time_for_all(model: fl.Chain) -> None:
    time = nth(model, Timestep)
    swap(model, time, FirstOfAll(time))


def time_after_the_second_norm(model: fl.Chain) -> None:
    convolutions = nth(model, Convolutions)
    shift = nth(convolutions, TimestepShift)
    convolutions.remove(shift)
    convolutions.insert(4, shift)


def shortcut_lost(model: fl.Chain) -> None:
    block = nth(model, ResidualBlock, -1)
    block.remove(block[1])


def skip_before_the_residual_block(model: fl.Chain) -> None:
    block = nth(model, StoreSkip, 1).ensure_parent
    store = nth(block, StoreSkip)
    block.remove(store)
    block.insert(1, store)


def size_before_text(model: fl.Chain) -> None:
    both = nth(model, PooledTextAndSize)
    both.append(both.pop(0))


def size_by_columns(model: fl.Chain) -> None:
    sizes = nth(model, SizeSinusoids)
    dim = sizes.sinusoids.embedding_dim
    nth(model, PooledTextAndSize).append(
        fl.Chain(*[nth(model, PooledTextAndSize).pop(1), fl.Lambda(lambda x: x.unflatten(1, (-1, dim)).mT.flatten(1))])
    )


def attentions_exchanged(model: fl.Chain) -> None:
    own, text = (nth(model, kind).ensure_parent for kind in (SelfAttention, CrossAttention))
    block = own.ensure_parent
    block.remove(own)
    block.insert(1, own)
    assert block[0] is text


def residuals_in_reverse(model: fl.Chain) -> None:
    add = nth(model, AddToSkips)
    forward = add.forward

    def reversed_forward(x: Tensor) -> Tensor:
        context = add.use_context("unet")
        given = context["additional_residuals"]
        context["additional_residuals"] = (given[1], given[0], *given[2:])
        return forward(x)

    add.forward = reversed_forward


FAULTS: list[tuple[Fault, str]] = [
    (eps_of(Convolutions, 1e-6), SD1),
    (eps_of(Convolutions, 1e-6), "unet/sd1.upstream-init"),
    (eps_of(CrossAttention2d, 1e-5), SD2),
    (heads, SD1),
    (gelu_by_tanh, SD1),
    (gates_by_the_other_half, SD1),
    (sines_first, SD1),
    (shifted_frequencies, SD1),
    (one_time_for_all, SD1),
    (time_after_the_second_norm, SD1),
    (shortcut_lost, SD1),
    (skip_before_the_residual_block, "unet/batch-4"),
    (replaced(ConcatenateSkip, OldestSkip(), -2), SD1),
    (replaced(ConcatenateSkip, SkipFirst()), SD1),
    (replaced(EnlargeToSkip, Twice()), ODD),
    (replaced(ToImage, RowsAndColumns()), SD2),
    (attentions_exchanged, SD1),
    (size_before_text, SDXL),
    (size_by_columns, SDXL),
    (replaced(TextAttention, MildMask(2)), MASK),
    (replaced(AddToMiddle, fl.Identity()), "unet/residuals"),
    (residuals_in_reverse, "unet/residuals"),
    (replaced(TimeCondition, fl.Identity()), "unet/lcm"),
    (lambda model: nth(model, ClassLabels).compose(lambda x: x.flip(0)) and None, "unet/upscaler"),
    (lambda model: nth(model, PooledText).compose(lambda x: x.flip(0)) and None, SDXL),
]


@pytest.mark.parametrize(
    ("fault", "case_id"), [pytest.param(f, c, id=f"{f.__name__}-{c}-{i}") for i, (f, c) in enumerate(FAULTS)]
)
def test_a_planted_fault_turns_its_case_red(fault: Fault, case_id: str) -> None:
    result = CaseRunner(planted(CASES[case_id], fault)).run(Lane("float64"))
    assert result.verdict is Verdict.DIFFERENT, result
    assert not result.traceback, "the fault broke the model: the comparison has not shown that it sees it"
    assert result.worst is not None, "red for another reason than a tensor that differs"


def test_planting_nothing_leaves_a_case_green() -> None:
    assert CaseRunner(planted(CASES[SD1], lambda model: None)).run(Lane("float64")).verdict is Verdict.BITWISE


def test_the_faults_are_faults_of_unets() -> None:
    assert all(isinstance(CASES[case_id].port(), UNet) for _, case_id in FAULTS)
