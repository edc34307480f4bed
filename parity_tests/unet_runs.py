"""Inputs of the cases of UNets, and how each side is called: a port is told before what upstream takes as keywords."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reference_ports import unet
from refiners.fluxion.adapters import inject_checkpoints
from refiners.fluxion.selectors import select

Inputs = Mapping[str, Any]
Outputs = Mapping[str, Tensor]


def latents(
    generator: torch.Generator,
    batch: int = 2,
    channels: int = 4,
    height: int = 10,
    width: int = 6,
    words: int = 7,
    text_dim: int = 20,
    timestep: Any = None,
) -> dict[str, Any]:
    """Latents, texts, and a time of its own for each of them unless one is given for all."""
    return {
        "sample": torch.randn(batch, channels, height, width, generator=generator),
        "timestep": torch.randint(0, 1000, (batch,), generator=generator) if timestep is None else timestep,
        "encoder_hidden_states": torch.randn(batch, words, text_dim, generator=generator),
    }


def with_mask(generator: torch.Generator, **numbers: Any) -> Inputs:
    """Words that none may attend to: others in each text."""
    given = latents(generator, **numbers)
    mask = torch.ones(given["encoder_hidden_states"].shape[:2], dtype=torch.long)
    for i, row in enumerate(mask):
        row[torch.randperm(len(row), generator=generator)[: 2 + i]] = 0
    return {**given, "encoder_attention_mask": mask}


def with_size(generator: torch.Generator, num_ids: int = 6, **numbers: Any) -> Inputs:
    """The text as one vector, and the numbers that say how the picture was sized and cut."""
    given = latents(generator, **numbers)
    batch = len(given["sample"])
    return {
        **given,
        "text_embeds": torch.randn(batch, 14, generator=generator),
        "time_ids": torch.randint(0, 1024, (batch, num_ids), generator=generator).float(),
    }


def with_size_and_other_text(generator: torch.Generator) -> Inputs:
    """Five numbers of size, words of another width, and a whole prompt that is float32 whatever the model is."""
    return {**with_size(generator, num_ids=5, text_dim=18), "is_pooled_in_float32": True}


def with_condition(generator: torch.Generator) -> Inputs:
    """What a consistency model is told beside the time."""
    return {**latents(generator), "timestep_cond": torch.randn(2, 10, generator=generator)}


def with_class(generator: torch.Generator, labels: Callable[[torch.Generator], Tensor], **numbers: Any) -> Inputs:
    """A class for each of the latents."""
    return {**latents(generator, **numbers), "class_labels": labels(generator)}


def with_residuals(generator: torch.Generator) -> Inputs:
    """What a ControlNet adds: to each of the four skips, and to the middle."""
    shapes = ((16, 10, 6), (16, 10, 6), (16, 5, 3), (24, 5, 3))
    residuals = [torch.randn(2, *shape, generator=generator) for shape in (*shapes, (24, 5, 3))]
    return {**latents(generator), **{f"residual {i}": residual for i, residual in enumerate(residuals)}}


def with_noise(generator: torch.Generator) -> Inputs:
    """The noise that is to be predicted, for one step of training."""
    return {**latents(generator), "noise": torch.randn(2, 4, 10, 6, generator=generator)}


def run_upstream(model: nn.Module, inputs: Inputs) -> Outputs:
    given = dict(inputs)
    residuals = [given.pop(name) for name in inputs if name.startswith("residual ")]
    if residuals:
        given |= {
            "down_block_additional_residuals": tuple(residuals[:-1]),
            "mid_block_additional_residual": residuals[-1],
        }
    if "time_ids" in given:
        given["added_cond_kwargs"] = {name: given.pop(name) for name in ("text_embeds", "time_ids")}
    if given.pop("is_pooled_in_float32", False):
        given["added_cond_kwargs"]["text_embeds"] = given["added_cond_kwargs"]["text_embeds"].float()
    return {"prediction": model(**given).sample}


def run_port(model: nn.Module, inputs: Inputs) -> Outputs:
    assert isinstance(model, unet.UNet)
    model.set_timestep(inputs["timestep"])
    model.set_clip_text_embedding(inputs["encoder_hidden_states"])
    model.set_text_mask(inputs.get("encoder_attention_mask"))
    model.set_timestep_condition(inputs.get("timestep_cond"))
    if "time_ids" in inputs:
        is_float32 = inputs.get("is_pooled_in_float32", False)
        model.set_pooled_text_embedding(inputs["text_embeds"].float() if is_float32 else inputs["text_embeds"])
        model.set_time_ids(inputs["time_ids"])
    if "class_labels" in inputs:
        model.set_class_labels(inputs["class_labels"])
    residuals = [inputs[name] for name in inputs if name.startswith("residual ")]
    if residuals:
        model.set_additional_residuals(residuals[:-1], residuals[-1])
    return {"prediction": model(inputs["sample"])}


def loss_of(run: Callable[[nn.Module, Inputs], Outputs]) -> Callable[[nn.Module, Inputs], Outputs]:
    """One step of training: how far the prediction is from the noise."""

    def run_step(model: nn.Module, inputs: Inputs) -> Outputs:
        prediction = run(model, {name: value for name, value in inputs.items() if name != "noise"})["prediction"]
        return {"loss": nn.functional.mse_loss(prediction.float(), inputs["noise"].float())}

    return run_step


def run_checkpointed(model: nn.Module, inputs: Inputs) -> Outputs:
    """The port, with the activations of residual blocks and transformers computed again in the backward."""
    checkpoints = inject_checkpoints(select(model).of(unet.TimedResidualBlock, unet.CrossAttention2d))
    try:
        return run_port(model, inputs)
    finally:
        checkpoints.eject()
