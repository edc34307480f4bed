"""Inputs of the cases of CLIP, and how each side is called: a port gets otherwise what upstream takes as keywords."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reference_ports import clip

Inputs = Mapping[str, Any]
Outputs = Mapping[str, Tensor]

END = 999


def ids(
    generator: torch.Generator, batch: int = 2, length: int = 9, *, mask: bool = False, positions: bool = False
) -> Inputs:
    """Random ids after that of the beginning, 0; the end of each text is in another place, padded with its own id."""
    tokens = torch.randint(3, END, (batch, length), generator=generator)
    tokens[:, 0] = 0
    lengths = [max(1, length - 2 * row) for row in range(batch)]
    for row, end in enumerate(lengths):
        tokens[row, end - 1 :] = END
    inputs: dict[str, Any] = {"input_ids": tokens}
    if mask:
        inputs["attention_mask"] = torch.tensor([[1] * end + [0] * (length - end) for end in lengths])
    if positions:
        inputs["position_ids"] = torch.stack([torch.randperm(77, generator=generator)[:length] for _ in range(batch)])
    return inputs


def longer(inputs: Inputs, more: int = 3) -> Inputs:
    """The same texts with padding behind them."""
    tokens = inputs["input_ids"]
    given = {**inputs, "attention_mask": inputs.get("attention_mask", torch.ones_like(tokens))}
    return {name: torch.cat([value, value.new_zeros(len(tokens), more)], dim=1) for name, value in given.items()}


def left_padded_ids(generator: torch.Generator) -> Inputs:
    """Padding in front, so that the first queries see nothing at all."""
    return {**ids(generator, 3), "attention_mask": torch.tensor([[0] * 3 + [1] * 6, [1] * 9, [0] * 8 + [1]])}


def finished_mask_ids(generator: torch.Generator) -> Inputs:
    """Scores to add for each pair of tokens: they stand in for the causal mask."""
    return {**ids(generator), "attention_mask": torch.randn(2, 1, 9, 9, generator=generator)}


def ids_without_end(generator: torch.Generator) -> Inputs:
    """No text has the id of the end: the first token is taken."""
    return {"input_ids": torch.randint(3, END, (2, 9), generator=generator)}


def pixels(generator: torch.Generator, batch: int = 2, height: int = 32, width: int = 32, channels: int = 3) -> Inputs:
    """Random pictures."""
    return {"pixel_values": torch.randn(batch, channels, height, width, generator=generator)}


TextPort = clip.CLIPTextEncoder | clip.CLIPTextModel | clip.CLIPTextModelWithProjection


def run_text_port(model: TextPort, inputs: Inputs) -> Any:
    """Gives the port what upstream takes as keyword arguments, and calls it."""
    model.set_attention_mask(inputs.get("attention_mask"))
    model.set_position_ids(inputs.get("position_ids"))
    return model(inputs["input_ids"])


def run_upstream(model: nn.Module, inputs: Inputs) -> Outputs:
    """The last state and the one vector made of it, projected or not."""
    output = model(**inputs)
    vector = next(output[name] for name in ("text_embeds", "image_embeds", "pooler_output") if name in output)
    return {"last_hidden_state": output.last_hidden_state, "vector": vector}


def run_text(model: nn.Module, inputs: Inputs) -> Outputs:
    assert isinstance(model, TextPort)
    return dict(zip(("last_hidden_state", "vector"), run_text_port(model, inputs), strict=True))


def run_image(model: nn.Module, inputs: Inputs) -> Outputs:
    return dict(zip(("last_hidden_state", "vector"), model(inputs["pixel_values"]), strict=True))


def in_float32(run: Callable[[nn.Module, Inputs], Outputs]) -> Callable[[nn.Module, Inputs], Outputs]:
    """The same, on pictures in float32, whatever the dtype of the model: both sides cast them."""
    return lambda model, inputs: run(model, {**inputs, "pixel_values": inputs["pixel_values"].float()})


def run_interpolated_upstream(model: nn.Module, inputs: Inputs) -> Outputs:
    return run_upstream(model, {**inputs, "interpolate_pos_encoding": True})


def run_encoder_upstream(model: nn.Module, inputs: Inputs) -> Outputs:
    """The last state only."""
    return {"last_hidden_state": model(**inputs).last_hidden_state}


def run_text_encoder(model: nn.Module, inputs: Inputs) -> Outputs:
    assert isinstance(model, clip.CLIPTextEncoder)
    return {"last_hidden_state": run_text_port(model, inputs)}


def run_states_upstream(model: nn.Module, inputs: Inputs) -> Outputs:
    """All hidden states."""
    states = model(**inputs, output_hidden_states=True).hidden_states
    return {f"state {i}": state for i, state in enumerate(states)}


def run_text_states_upstream(model: nn.Module, inputs: Inputs) -> Outputs:
    """All hidden states, the last of which comes before the norm, and the norm of it."""
    output = model(**inputs, output_hidden_states=True)
    states = {f"state {i}": state for i, state in enumerate(output.hidden_states)}
    return {**states, "last_hidden_state": output.last_hidden_state}


def run_text_states(model: nn.Module, inputs: Inputs) -> Outputs:
    assert isinstance(model, clip.CLIPTextEncoder)
    states = run_text_port(model.with_hidden_states(), inputs)
    return {**{f"state {i}": state for i, state in enumerate(states)}, "last_hidden_state": model[-1](states[-1])}


def run_image_states(model: nn.Module, inputs: Inputs) -> Outputs:
    assert isinstance(model, clip.CLIPImageEncoder)
    return {f"state {i}": state for i, state in enumerate(model.with_hidden_states()(inputs["pixel_values"]))}


def run_skips_upstream(model: nn.Module, inputs: Inputs) -> Outputs:
    """The states that Stable Diffusion reads: clip skip 1 and 2, with the norm and without, and the last."""
    output = model(**inputs, output_hidden_states=True)
    one, two = output.hidden_states[-2], output.hidden_states[-3]
    norm = model.final_layer_norm
    return {"last": output.last_hidden_state, "one": one, "two": two, "one, normalised": norm(one)}


def run_text_skips(model: nn.Module, inputs: Inputs) -> Outputs:
    assert isinstance(model, clip.CLIPTextEncoder)
    without_layer = model.structural_copy()
    without_layer.pop(-2)
    slices = {"last": model, "one": model[:-2], "two": model[:-3], "one, normalised": without_layer}
    return {name: run_text_port(encoder, inputs) for name, encoder in slices.items()}


def run_some_states_upstream(model: nn.Module, inputs: Inputs) -> Outputs:
    states = model(**inputs, output_hidden_states=True).hidden_states
    return {"first": states[0], "penultimate": states[-2], "last": states[-1]}


def run_image_slices(model: nn.Module, inputs: Inputs) -> Outputs:
    assert isinstance(model, clip.CLIPImageEncoder)
    slices = {"first": model[:1], "penultimate": model[:-1], "last": model}
    return {name: encoder(inputs["pixel_values"]) for name, encoder in slices.items()}
