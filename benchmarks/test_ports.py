"""What a port costs beside its upstream with the same weights, at sizes so small that calls count and not kernels.

At published sizes the kernels are all there is; `nox -s parity_full` measures those.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from benchmarks.conftest import Record
from benchmarks.engine.contestants import Pair
from benchmarks.engine.figures import Verdict
from reference_ports import unet

LIMIT = 0.95

UNETS: dict[str, dict[str, Any]] = {
    "sd1": {
        "block_out_channels": (32, 64),
        "norm_num_groups": 8,
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    "sdxl": {
        "block_out_channels": (32, 64, 64),
        "norm_num_groups": 8,
        "cross_attention_dim": 32,
        "attention_head_dim": (2, 4, 4),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 8 * 6 + 24,
    },
}

Act = Callable[[], Tensor]


@cache
def unets(name: str) -> tuple[nn.Module, unet.UNet]:
    """Upstream and port, with the same weights."""
    config = UNETS[name]
    upstream = UNet2DConditionModel(**config).eval()
    port = unet.from_config(config).eval()
    port.load_state_dict(unet.key_map_for(config).convert(upstream.state_dict(), port), assign=True)
    return upstream, port


def forwards(name: str) -> tuple[Act, Act]:
    """One forward of each, which give the same bits."""
    upstream, port = unets(name)
    generator = torch.Generator().manual_seed(0)
    latents, text = (torch.randn(shape, generator=generator) for shape in ((1, 4, 8, 8), (1, 7, 32)))
    timestep = torch.tensor([981])
    pooled, time_ids = torch.randn(1, 24, generator=generator), torch.full((1, 6), 512.0)
    more = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids}} if name == "sdxl" else {}

    def run_upstream() -> Tensor:
        return upstream(latents, timestep, text, **more).sample

    def run_port() -> Tensor:
        port.set_timestep(timestep)
        port.set_clip_text_embedding(text)
        if more:
            port.set_pooled_text_embedding(pooled)
            port.set_time_ids(time_ids)
        return port(latents)

    assert torch.equal(run_upstream(), run_port())
    return run_upstream, run_port


def against_diffusers(name: str) -> Pair:
    """The forward of the port divided by upstream's."""
    return Pair(contestant=lambda: forwards(name)[1], reference=lambda: forwards(name)[0], limit=LIMIT)


@pytest.mark.parametrize("name", UNETS)
@torch.no_grad()
def test_a_tiny_unet_against_diffusers(record: Record, name: str) -> None:
    record(against_diffusers(name))


@torch.no_grad()
def test_a_tiny_unet_whose_calls_are_watched_by_three_is_missed() -> None:
    port = unets("sd1")[1]
    hooks = [module.register_forward_hook(lambda *_: None) for module in port.modules() for _ in range(3)]
    figure = against_diffusers("sd1").figure(budget=4.0)
    for hook in hooks:
        hook.remove()
    assert figure.verdict is Verdict.MISSED
