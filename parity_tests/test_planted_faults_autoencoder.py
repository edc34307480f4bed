"""Faults that a port of an autoencoder invites, each planted in a case that must turn red. As `test_planted_faults`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import refiners.fluxion.layers as fl
from parity_tests.cases import autoencoder
from parity_tests.test_planted_faults import Fault, exchange, nth, planted, swap
from reference_ports.autoencoder import AutoencoderKL, AutoencoderTiny, LatentScaling, posterior, tiling
from reference_ports.autoencoder.model import (
    NORM_EPS,
    MiddleBlock,
    PixelAttention,
    PostQuantConvolution,
    ToImage,
)
from reference_ports.autoencoder.tiny import SoftClamp, ThroughBytes, TinyBlock, ToShares
from reference_ports.blocks.attention import Key, Query
from reference_ports.blocks.residual_block import ResidualBlock
from reference_ports.blocks.upsampling import Enlarge
from refiners.parity import CaseRunner, Lane, Verdict

CASES = {case.id.removeprefix("autoencoder/"): case for case in autoencoder.CASES}
Patch = Callable[[pytest.MonkeyPatch], None]


class Smooth(Enlarge):
    """Enlarges between the pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.interpolate(x, scale_factor=2.0, mode="bilinear")


class Columns(ToImage):
    """Reads the tokens column by column."""

    def forward(self, tokens: Tensor, image: Tensor) -> Tensor:
        batch, channels, height, width = image.shape
        return tokens.transpose(-1, -2).reshape(batch, channels, width, height).transpose(-1, -2).contiguous()


def change_eps(kind: type[nn.Module]) -> Fault:
    def fault(model: fl.Chain) -> None:
        norm = nth(nth(model, kind), fl.GroupNorm) if issubclass(kind, fl.Chain) else nth(model, kind)
        assert norm.eps == NORM_EPS
        norm.eps = 1e-5

    fault.__name__ = f"change_eps_of_{kind.__name__}"
    return fault


def pad_on_all_sides(model: fl.Chain) -> None:
    down = nth(model, fl.Downsample)
    down.remove(down[0])
    down.Conv2d.padding = (1, 1)


def pad_top_left(model: fl.Chain) -> None:
    down = nth(model, fl.Downsample)
    down.replace(down[0], fl.Lambda(lambda x: nn.functional.pad(x, (1, 0, 1, 0))))


def enlarge_smoothly(model: fl.Chain) -> None:
    swap(model, nth(model, Enlarge), Smooth())


def read_columns(model: fl.Chain) -> None:
    swap(model, nth(model, ToImage), Columns())


def attend_with_two_heads(model: fl.Chain) -> None:
    nth(model, fl.ScaledDotProductAttention).num_heads = 2


def swap_query_and_key(model: fl.Chain) -> None:
    exchange(nth(model, Query), nth(model, Key))


def drop_attention(model: fl.Chain) -> None:
    middle = nth(model, MiddleBlock)
    middle.remove(middle.PixelAttention)


def swap_residual_blocks(model: fl.Chain) -> None:
    middle = nth(model, MiddleBlock, 1)
    first, *_, last = middle
    middle.remove(last)
    middle.insert(0, last)
    middle.remove(first)
    middle.append(first)


def drop_shortcut(model: fl.Chain) -> None:
    block = next(
        block for block in model.layers(ResidualBlock, recurse=True) if block.in_channels == block.out_channels
    )
    block.remove(block.Identity)


def drop_post_quant_convolution(model: fl.Chain) -> None:
    convolution = nth(model, PostQuantConvolution)
    model.ensure_find_parent(convolution).remove(convolution)


def keep_colours(model: fl.Chain) -> None:
    swap(model, nth(model, ToShares), fl.Identity())


def clamp_harder(model: fl.Chain) -> None:
    nth(model, SoftClamp).magnitude = 2


def forget_the_last_relu(model: fl.Chain) -> None:
    block = nth(model, TinyBlock)
    block.remove(block[-1])


def round_to_fewer_levels(model: fl.Chain) -> None:
    nth(model, ThroughBytes).magnitude = 2.9


FAULTS: tuple[tuple[Fault, str], ...] = (
    *((change_eps(kind), "tiny") for kind in (fl.GroupNorm, PixelAttention)),
    (pad_on_all_sides, "tiny"),
    (pad_top_left, "tiny"),
    (enlarge_smoothly, "tiny"),
    (read_columns, "tiny"),
    (attend_with_two_heads, "tiny"),
    (swap_query_and_key, "tiny"),
    (drop_attention, "tiny"),
    (swap_residual_blocks, "no-attention"),
    (drop_shortcut, "tiny"),
    (drop_post_quant_convolution, "tiny"),
    (keep_colours, "taesd"),
    (clamp_harder, "taesd"),
    (forget_the_last_relu, "taesd"),
    (round_to_fewer_levels, "taesd-bytes"),
)


@pytest.mark.parametrize(("fault", "name"), [pytest.param(f, n, id=f"{f.__name__}-{n}") for f, n in FAULTS])
def test_a_planted_fault_turns_its_case_red(fault: Fault, name: str) -> None:
    result = CaseRunner(planted(CASES[name], fault)).run(Lane(CASES[name].lanes[0]))
    assert result.verdict is Verdict.DIFFERENT, result
    assert not result.traceback, "the fault broke the model: the comparison has not shown that it sees it"
    assert result.worst is not None, "red for another reason than a tensor that differs"


def one_draw_for_all(patch: pytest.MonkeyPatch) -> None:
    draw = posterior.draw_normal
    patch.setattr(posterior, "draw_normal", lambda shape, generator, *more: draw(shape, generator[0], *more))


def draw_in_float32(patch: pytest.MonkeyPatch) -> None:
    draw = posterior.draw_normal
    patch.setattr(
        posterior, "draw_normal", lambda shape, g, device, dtype: draw(shape, g, device, torch.float32).to(dtype)
    )


def do_not_hold_variances(patch: pytest.MonkeyPatch) -> None:
    def read(self: Any, moments: Tensor) -> None:
        self.mean, self.log_variance = moments.chunk(2, dim=1)

    patch.setattr(posterior.Posterior, "__init__", read)


def deviate_by_the_variance(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(posterior.Posterior, "standard_deviation", property(lambda self: torch.exp(self.log_variance)))


def scale_before_the_shift(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LatentScaling, "scale", lambda self, latents: latents * self.factor - (self.shift or 0))


def forget_the_deviation(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LatentScaling, "unscale", lambda self, latents: latents / self.factor)


def blend_copies(patch: pytest.MonkeyPatch) -> None:
    """Blends with the tile on the left as it was before it was blended with the one above."""
    blend = tiling.blend_columns

    def blend_original(left: Tensor, tile: Tensor, extent: int) -> None:
        blend(left.flip(2), tile, extent)

    patch.setattr(tiling, "blend_columns", blend_original)


def blend_one_row_less(patch: pytest.MonkeyPatch) -> None:
    blend = tiling.blend_rows
    patch.setattr(tiling, "blend_rows", lambda above, tile, extent: blend(above, tile, extent - 1))


def do_not_tile(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(AutoencoderKL, "set_tiling", lambda self, enabled: None)


def ramp_one_step_longer(patch: pytest.MonkeyPatch) -> None:
    ramps = tiling.RampTilingAdapter._ramps
    patch.setattr(tiling.RampTilingAdapter, "_ramps", lambda self, device: ramps(self, device) / 1.1)


def swap_the_ramps(patch: pytest.MonkeyPatch) -> None:
    ramps = tiling.RampTilingAdapter._ramps
    patch.setattr(tiling.RampTilingAdapter, "_ramps", lambda self, device: ramps(self, device).flip(0))


def ignore_tiles_of_the_small(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(AutoencoderTiny, "_tiling_adapters", lambda self: ())


PATCHES: tuple[tuple[Patch, str, str], ...] = (
    (one_draw_for_all, "tiny", "float64"),
    (draw_in_float32, "tiny", "float64"),
    (draw_in_float32, "tiny", "bfloat16"),
    (do_not_hold_variances, "tiny", "float64"),
    (deviate_by_the_variance, "tiny", "float64"),
    (scale_before_the_shift, "flux", "float64"),
    (forget_the_deviation, "latents-mean", "float64"),
    (blend_copies, "tiling", "float64"),
    (blend_one_row_less, "tiling", "float64"),
    (do_not_tile, "tiling", "float64"),
    (ramp_one_step_longer, "taesd-tiling", "float64"),
    (swap_the_ramps, "taesd-tiling", "float64"),
    (ignore_tiles_of_the_small, "taesd-tiling", "float64"),
)


@pytest.mark.parametrize(
    ("fault", "name", "lane"), [pytest.param(*p, id=f"{p[0].__name__}-{p[1]}-{p[2]}") for p in PATCHES]
)
def test_a_fault_beside_the_tree_turns_its_case_red(
    fault: Patch, name: str, lane: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    result = CaseRunner(CASES[name]).run(Lane(lane))
    assert result.verdict is not Verdict.BITWISE, result
    assert not result.traceback, "the fault broke the model: the comparison has not shown that it sees it"
