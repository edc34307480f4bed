"""A training step of LoRAs in a UNet beside peft: on the projections of attentions, and on the 1x1 convolutions."""

from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor

from parity_tests import tiny_pipelines as tiny
from reference_ports import unet
from reference_ports.blocks.residual_block import ContiguousInTraining
from reference_ports.unet.loras import lora_names
from refiners.fluxion import layers as fl
from refiners.fluxion.adapters import inject_checkpoints, inject_loras, trainable
from refiners.fluxion.selectors import select
from refiners.parity.bits import same_bits

CONFIG = tiny.XL
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "conv_shortcut"]
RANK, ALPHA = 4, 8


class Pair:
    """The UNets with the same weights and the same LoRAs, in training."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.upstream = UNet2DConditionModel(**CONFIG)
        self.port = unet.from_config(CONFIG)
        weights = {key: weight.detach().clone() for key, weight in self.upstream.state_dict().items()}
        self.port.load_state_dict(unet.key_map_for(CONFIG).convert(weights, self.port), assign=True)
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LAYERS, init_lora_weights=False)
        self.upstream.add_adapter(config)
        drawn = {name: weight for name, weight in self.upstream.named_parameters() if "lora_" in name}
        names = {path: name for name, path in lora_names(self.port).paths.items() if name.endswith(tuple(LAYERS))}
        chosen = {module for path, module in self.port.named_modules() if path in names}
        layers = select(self.port).of(fl.Linear, fl.Conv2d).where(lambda layer: layer in chosen).expect(len(names))
        self.loras = inject_loras(layers, name="task", rank=RANK, alpha=ALPHA)
        specs = self.loras.specs()
        self.expected = [drawn[f"{names[path]}.lora_{which}.default.weight"] for path in specs for which in ("A", "B")]
        downs, ups = ([weight.detach().clone() for weight in self.expected[i::2]] for i in (0, 1))
        self.loras.swap(
            {
                path: replace(spec, tensors={"down": down, "up": up})
                for (path, spec), down, up in zip(specs.items(), downs, ups, strict=True)
            }
        )
        self.upstream.train()
        self.port.train()

    def gradients(self, x: Tensor, goal: Tensor, draws: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
        """Those of peft, and those of the port."""
        text, pooled = torch.randn(2, 7, 32, generator=draws), torch.randn(2, 24, generator=draws)
        sizes = torch.randint(0, 100, (2, 6), generator=draws)
        more = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
        loss = (self.upstream(x, torch.tensor(7), text, **more).sample - goal).square().sum()
        expected = torch.autograd.grad(loss, self.expected)
        self.port.set_timestep(torch.tensor(7))
        self.port.set_clip_text_embedding(text)
        self.port.set_pooled_text_embedding(pooled)
        self.port.set_time_ids(sizes)
        with trainable(self.loras) as training:
            found = torch.autograd.grad((self.port(x) - goal).square().sum(), list(training.parameters()))
        return list(expected), list(found)


def unequal(is_checkpointed: bool, layout: torch.memory_format) -> int:
    """How many gradients of a step differ."""
    pair = Pair()
    if is_checkpointed:
        pair.upstream.enable_gradient_checkpointing()
        inject_checkpoints(select(pair.port).of(unet.TimedResidualBlock, unet.TransformerBlock))
    draws = torch.Generator().manual_seed(1)
    x, goal = (torch.randn(2, 4, 16, 16, generator=draws).to(memory_format=layout) for _ in range(2))
    expected, found = pair.gradients(x, goal, draws)
    assert len(expected) == len(found) == 2 * 146
    assert all(gradient.any() for gradient in found)
    return sum(not same_bits(one, other) for one, other in zip(expected, found, strict=True))


@pytest.mark.parametrize(
    ("is_checkpointed", "layout"),
    [(False, torch.contiguous_format), (True, torch.channels_last)],
    ids=["plain", "checkpointed, channels last"],
)
def test_gradients_of_loras_in_a_unet_are_those_of_peft(is_checkpointed: bool, layout: torch.memory_format) -> None:
    assert unequal(is_checkpointed, layout) == 0


def test_a_shortcut_whose_lora_sees_another_layout_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ContiguousInTraining, "forward", fl.Identity.forward)
    assert unequal(is_checkpointed=False, layout=torch.channels_last) > 0
