"""ViT: `transformers.ViTModel` beside `reference_ports.vit`."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from reference_ports import vit
from refiners.parity import Case, FullSize, with_both_inits

Inputs = Mapping[str, Any]
Outputs = Mapping[str, Tensor]
Run = Callable[[nn.Module, Inputs], Outputs]

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}

KEY_BIAS = {"layers.{i}.attention.k_proj.bias": "adds the same number to all scores of a query: softmax removes it"}
PICTURES = {"padded": "pictures are not padded"}
POOLER = {"pooler.*": "comes after the last hidden state"}


def config(**changes: Any) -> ViTConfig:
    """The tiny configuration with some changes, on the kernel that the port uses."""
    return ViTConfig(**{**TINY, **changes}, attn_implementation="sdpa")


def pixels(generator: torch.Generator, batch: int = 2, height: int = 32, width: int = 32, channels: int = 3) -> Inputs:
    """Random pictures."""
    return {"pixel_values": torch.randn(batch, channels, height, width, generator=generator)}


def bytes_of_pictures(generator: torch.Generator) -> Inputs:
    """Pictures of whole numbers, which both sides cast to the dtype of the weights."""
    return {"pixel_values": torch.randint(0, 256, (2, 3, 32, 32), generator=generator, dtype=torch.uint8)}


def with_mask(generator: torch.Generator, hidden: int = 5, **picture: Any) -> Inputs:
    """Tokens that none may attend to: others in each picture, never the class token."""
    given = pixels(generator, **picture)
    mask = torch.ones(2, 17, dtype=torch.long)
    for row in mask:
        row[1 + torch.randperm(16, generator=generator)[:hidden]] = 0
    return {**given, "attention_mask": mask}


def with_scores(generator: torch.Generator) -> Inputs:
    """Scores to add, for each pair of tokens."""
    return {**pixels(generator), "attention_mask": torch.randn(2, 1, 17, 17, generator=generator)}


def with_masked_patches(generator: torch.Generator, patches: int = 16, share: float = 0.5, **picture: Any) -> Inputs:
    """Patches that the mask token stands in for: others in each picture."""
    given = pixels(generator, **picture)
    return {**given, "bool_masked_pos": torch.rand(2, patches, generator=generator) < share}


def set_knobs(model: vit.ViTEncoder, inputs: Inputs) -> vit.ViTEncoder:
    """Gives the port what upstream takes as keyword arguments."""
    model.set_attention_mask(inputs.get("attention_mask"))
    if isinstance(model, vit.MaskedViTEncoder):
        model.set_masked_patches(inputs.get("bool_masked_pos"))
    return model


def run_upstream(model: nn.Module, inputs: Inputs, **options: Any) -> Outputs:
    """The last state, and what the pooler makes of it where there is one."""
    output = model(**inputs, **options)
    pooled = {} if output.pooler_output is None else {"pooled": output.pooler_output}
    return {"last_hidden_state": output.last_hidden_state, **pooled}


def run_port(model: nn.Module, inputs: Inputs) -> Outputs:
    assert isinstance(model, vit.ViTEncoder)
    output = set_knobs(model, inputs)(inputs["pixel_values"])
    return (
        dict(zip(("last_hidden_state", "pooled"), output, strict=True))
        if isinstance(model, vit.ViT)
        else {"last_hidden_state": output}
    )


def run_upstream_states(model: nn.Module, inputs: Inputs) -> Outputs:
    """All hidden states, the last of which comes before the norm, and the norm of it."""
    output = model(**inputs, output_hidden_states=True)
    states = {f"state {i}": state for i, state in enumerate(output.hidden_states)}
    return {**states, "last_hidden_state": output.last_hidden_state}


def run_port_states(model: nn.Module, inputs: Inputs) -> Outputs:
    assert isinstance(model, vit.ViTEncoder)
    states = set_knobs(model.with_hidden_states(), inputs)(inputs["pixel_values"])
    return {**{f"state {i}": state for i, state in enumerate(states)}, "last_hidden_state": model[-1](states[-1])}


def run_upstream_some_states(model: nn.Module, inputs: Inputs) -> Outputs:
    output = model(**inputs, output_hidden_states=True)
    states = output.hidden_states
    return {"first": states[0], "penultimate": states[-2], "unnormalised": states[-1], "last": output.last_hidden_state}


def run_port_slices(model: nn.Module, inputs: Inputs) -> Outputs:
    assert isinstance(model, vit.ViTEncoder)
    slices = {"first": model[:1], "penultimate": model[:-2], "unnormalised": model[:-1], "last": model}
    return {name: set_knobs(encoder, inputs)(inputs["pixel_values"]) for name, encoder in slices.items()}


def taps(num_layers: int, **more: str) -> Mapping[str, str]:
    """The embeddings and every layer, compared as well."""
    layers = {
        "TransformerLayer" if num_layers == 1 else f"TransformerLayer_{i + 1}": f"layers.{i}" for i in range(num_layers)
    }
    return {"ImageEmbeddings": "embeddings", **layers, "LayerNorm": "layernorm", **more}


def case(
    name: str,
    summary: str,
    inputs: Callable[[torch.Generator], Inputs] = pixels,
    *,
    interpolate: bool = False,
    **changes: Any,
) -> Case:
    """`ViTModel` with its pooler, in the tiny configuration with some changes."""
    settings = config(**changes)
    return Case(
        id=f"vit/{name}",
        summary=summary,
        upstream=lambda: ViTModel(settings),
        port=lambda: vit.vit_from_config(settings.to_dict(), interpolate_positions=interpolate),
        key_map=vit.VIT_KEYS,
        inputs=inputs,
        run_upstream=partial(run_upstream, interpolate_pos_encoding=interpolate),
        run_port=run_port,
        taps=taps(settings.num_hidden_layers, **{"StatesAndPooled.Pooler": "pooler"}),
        without_influence=KEY_BIAS if settings.qkv_bias else {},
        batch_axis=0,
        without_cells=PICTURES,
    )


def encoder_case(name: str, summary: str, runs: tuple[Run, Run], **more: Any) -> Case:
    """`ViTModel` without its pooler."""
    return Case(
        id=f"vit/{name}",
        summary=summary,
        upstream=lambda: ViTModel(config(), add_pooling_layer=False),
        port=lambda: vit.encoder_from_config(config().to_dict()),
        key_map=vit.ENCODER_KEYS,
        run_upstream=runs[0],
        run_port=runs[1],
        batch_axis=0,
        without_cells=PICTURES,
        **{"inputs": pixels, "without_influence": KEY_BIAS, **more},
    )


def masked_case(
    name: str,
    summary: str,
    inputs: Callable[[torch.Generator], Inputs] = with_masked_patches,
    *,
    interpolate: bool = False,
    without_influence: Mapping[str, str] | None = None,
) -> Case:
    """`ViTModel` with its mask token and without its pooler."""
    return Case(
        id=f"vit/{name}",
        summary=summary,
        upstream=lambda: ViTModel(config(), add_pooling_layer=False, use_mask_token=True),
        port=lambda: vit.masked_encoder_from_config(config().to_dict(), interpolate_positions=interpolate),
        key_map=vit.MASKED_ENCODER_KEYS,
        inputs=inputs,
        run_upstream=partial(run_upstream, interpolate_pos_encoding=interpolate),
        run_port=run_port,
        taps=taps(3),
        without_influence={**KEY_BIAS, **(without_influence or {})},
        batch_axis=0,
        without_cells=PICTURES,
    )


def size(port: Callable[[], nn.Module], **numbers: Any) -> FullSize:
    """A published configuration."""
    return FullSize(upstream=lambda: ViTModel(ViTConfig(**numbers)), port=port)


ON_META = {
    "vit": FullSize(upstream=lambda: ViTModel(ViTConfig()), port=vit.ViTEncoder, key_map=vit.ENCODER_KEYS),
    "vit-masked": FullSize(
        upstream=lambda: ViTModel(ViTConfig(), add_pooling_layer=False, use_mask_token=True),
        port=vit.MaskedViTEncoder,
        key_map=vit.MASKED_ENCODER_KEYS,
    ),
    "vit-b16": size(vit.vit_b16),
    "vit-b32": size(vit.vit_b32, patch_size=32),
    "vit-l16": size(vit.vit_l16, **LARGE),
    "vit-l32": size(vit.vit_l32, **LARGE, patch_size=32),
}

INTERPOLATED = (
    ("interpolated", "a larger, oblong picture", {"height": 48, "width": 40}),
    ("interpolated-down", "a smaller picture", {"height": 16, "width": 24}),
    ("interpolated-same-count", "as many patches in another form", {"height": 16, "width": 64}),
    ("interpolated-same", "its own size, positions not touched", {}),
    ("interpolated-uneven", "no whole number of patches", {"height": 45, "width": 39}),
    ("interpolated-rest", "its own number of patches and a rest", {"height": 37, "width": 37}),
)

CASES = (
    *with_both_inits(replace(case("tiny", "three layers, with the pooler"), full_size=ON_META)),
    case("batch-1", "one picture, 8 heads", partial(pixels, batch=1), num_attention_heads=8),
    case("bytes", "pixels that are whole numbers", bytes_of_pictures),
    *(case(name, summary, partial(pixels, **picture), interpolate=True) for name, summary, picture in INTERPOLATED),
    case("mask", "tokens that none may attend to", with_mask),
    case("mask-of-ones", "a mask that hides nothing takes the kernel without one", partial(with_mask, hidden=0)),
    replace(
        case("mask-of-class-token", "the class token alone may be attended to", partial(with_mask, hidden=16)),
        without_influence={
            f"layers.{{i}}.attention.{name}_proj.*": "softmax of a single score is 1" for name in ("q", "k")
        },
    ),
    case("finished-mask", "scores to add, of four axes", with_scores),
    case(
        "odd-sizes",
        "one layer, two heads, one channel, patches that leave a rest",
        partial(pixels, batch=3, height=33, width=33, channels=1),
        hidden_size=26,
        intermediate_size=31,
        num_attention_heads=2,
        num_hidden_layers=1,
        image_size=33,
        patch_size=7,
        num_channels=1,
    ),
    case("one-patch", "a picture that is one patch, one head", patch_size=32, num_attention_heads=1),
    case(
        "base-width",
        "the width, the heads and the patches of base",
        hidden_size=768,
        num_attention_heads=12,
        intermediate_size=128,
        num_hidden_layers=1,
        patch_size=16,
    ),
    case(
        "large-width",
        "the width and the heads of large",
        partial(pixels, batch=1),
        hidden_size=1024,
        num_attention_heads=16,
        intermediate_size=128,
        num_hidden_layers=1,
        patch_size=16,
    ),
    case("no-qkv-bias", "projections without a bias", qkv_bias=False),
    case("eps", "layer_norm_eps=1e-3", layer_norm_eps=1e-3),
    *(
        case(f"act-{name.replace('_', '-')}", f"hidden_act={name!r}", hidden_act=name)
        for name in ("gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu")
    ),
    case("pooler-size", "a pooler narrower than the model", pooler_output_size=20),
    case("pooler-act", "a pooler with another activation", pooler_act="gelu"),
    encoder_case("no-pooler", "without the pooler", (run_upstream, run_port), inputs=with_mask, taps=taps(3)),
    encoder_case(
        "hidden-states",
        "every hidden state in one forward",
        (run_upstream_states, run_port_states),
        inputs=with_mask,
    ),
    encoder_case(
        "slices",
        "hidden states by slicing the tree, which takes several forwards",
        (run_upstream_some_states, run_port_slices),
        gradients=False,
    ),
    replace(
        encoder_case("pooler-left-out", "the encoder of a model with a pooler", (run_upstream, run_port)),
        upstream=lambda: ViTModel(config()),
        run_upstream=lambda model, inputs: {"last_hidden_state": model(**inputs).last_hidden_state},
        without_influence={**KEY_BIAS, **POOLER},
    ),
    *with_both_inits(masked_case("masked-patches", "half of the patches masked")),
    masked_case(
        "masked-all",
        "every patch masked",
        partial(with_masked_patches, share=2.0),
        without_influence={"embeddings.patch_embeddings.*": "the mask token stands in for every patch"},
    ),
    masked_case(
        "masked-none",
        "a mask that hides no patch, which computes as if it did",
        partial(with_masked_patches, share=-1.0),
        without_influence={"embeddings.mask_token": "no patch is masked"},
    ),
    masked_case(
        "masked-not-given",
        "a mask token that is not used",
        pixels,
        without_influence={"embeddings.mask_token": "no patch is masked"},
    ),
    masked_case(
        "masked-interpolated",
        "masked patches in a picture of another size",
        partial(with_masked_patches, patches=30, height=48, width=40),
        interpolate=True,
    ),
)
