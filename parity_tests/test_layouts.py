"""Layouts in memory, on which convolutions round: upstream moves that of a shortcut in training."""

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor

import refiners.fluxion.layers as fl
from reference_ports.blocks.residual_block import ContiguousInTraining, ResidualBlock
from refiners.parity.bits import same_bits

NAMES = {"norm1": "GroupNorm_1", "conv1": "Conv2d_1", "norm2": "GroupNorm_2", "conv2": "Conv2d_2"}


def is_equal(out_channels: int) -> bool:
    """Whether upstream and port make the same bits, and the same layout, of channels-last pixels in training."""
    torch.manual_seed(0)
    upstream = ResnetBlock2D(in_channels=8, out_channels=out_channels, temb_channels=None, groups=4, eps=1e-5).train()
    port = ResidualBlock(8, out_channels, num_groups=4).train()
    weights: dict[str, Tensor] = {}
    for key, weight in upstream.state_dict().items():
        layer, _, name = key.rpartition(".")
        weights[f"Convolutions.{NAMES[layer]}.{name}" if layer in NAMES else f"Shortcut.Conv2d.{name}"] = weight
    port.load_state_dict(weights, assign=True)
    x = torch.randn(2, 8, 16, 16).to(memory_format=torch.channels_last)
    ours, theirs = upstream(x, None), port(x)
    return same_bits(ours, theirs) and ours.stride() == theirs.stride()


@pytest.mark.parametrize("out_channels", [8, 12])
def test_a_block_in_training_has_the_bits_and_the_layout_of_upstream(out_channels: int) -> None:
    assert is_equal(out_channels)


def test_a_shortcut_that_is_the_second_term_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ResidualBlock, "_fold", fl.Sum._fold)  # pyright: ignore[reportPrivateUsage]  # the planted fault
    assert not is_equal(12)


def test_a_shortcut_that_keeps_its_layout_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ContiguousInTraining, "forward", fl.Identity.forward)
    assert not is_equal(12)
