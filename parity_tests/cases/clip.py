"""CLIP's text and image encoders: `transformers.CLIPTextModel` and its kin beside `reference_ports.clip`."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)

from parity_tests.clip_runs import (
    END,
    Inputs,
    Outputs,
    finished_mask_ids,
    ids,
    ids_without_end,
    in_float32,
    left_padded_ids,
    longer,
    pixels,
    run_encoder_upstream,
    run_image,
    run_image_slices,
    run_image_states,
    run_interpolated_upstream,
    run_skips_upstream,
    run_some_states_upstream,
    run_states_upstream,
    run_text,
    run_text_encoder,
    run_text_skips,
    run_text_states,
    run_text_states_upstream,
    run_upstream,
)
from parity_tests.published_clip import IMAGE_SIZES, TEXT_SIZES
from reference_ports import clip
from refiners.parity import Case, with_both_inits

Runs = tuple[Callable[[nn.Module, Inputs], Outputs], Callable[[nn.Module, Inputs], Outputs]]

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "projection_dim": 24,
    "attn_implementation": "sdpa",
}
TINY_TEXT: dict[str, Any] = {"vocab_size": 1000, "bos_token_id": 0, "eos_token_id": 2, **TINY}
TINY_IMAGE: dict[str, Any] = {"image_size": 32, "patch_size": 8, **TINY}

SOFTMAX = "adds the same number to all scores of a query: softmax removes it"
SCORES = {"padded": "its mask is finished scores"}
FULL = {"padded": "there are as many tokens as places"}
PICTURES = {"padded": "pictures are not padded"}
PAIRS = {"batch": "every text is held against every picture", "padded": "pictures are not padded"}
POST_NORM = "normalises the pooled token only, which is not compared here"


def taps(num_layers: int, embeddings: str, upstream: str = "", port: str = "") -> Mapping[str, str]:
    """The embeddings and every layer, compared as well."""
    layers = {f"{port}TransformerLayer_{i + 1}": f"{upstream}encoder.layers.{i}" for i in range(num_layers)}
    if num_layers == 1:
        layers = {f"{port}TransformerLayer": f"{upstream}encoder.layers.0"}
    first = "pre_layrnorm" if embeddings == "ImageEmbeddings" else "embeddings"
    return {f"{port}{embeddings}": f"{upstream}{first}", **layers}


def key_bias(upstream: str = "") -> Mapping[str, str]:
    return {f"{upstream}encoder.layers.{{i}}.self_attn.k_proj.bias": SOFTMAX}


def text_case(
    name: str,
    summary: str,
    inputs: Callable[[torch.Generator], Inputs] = ids,
    *,
    projection: bool = False,
    **changes: Any,
) -> Case:
    """`CLIPTextModel`, with its projection or without, in the tiny configuration with some changes."""
    settings = CLIPTextConfig(**{**TINY_TEXT, **changes})
    upstream = CLIPTextModelWithProjection if projection else CLIPTextModel
    port = clip.text_projection_from_config if projection else clip.text_model_from_config
    prefix = "text_model." if projection else ""
    return Case(
        id=f"clip/text-{name}",
        summary=summary,
        upstream=lambda: upstream(settings),
        port=lambda: port(settings.to_dict()),
        key_map=clip.TEXT_PROJECTION_KEYS if projection else clip.TEXT_MODEL_KEYS,
        inputs=inputs,
        run_upstream=run_upstream,
        run_port=run_text,
        taps=taps(settings.num_hidden_layers, "TextEmbeddings", prefix, "CLIPTextEncoder."),
        without_influence=key_bias(prefix),
        batch_axis=0,
        pad=longer,
    )


def text_encoder_case(name: str, summary: str, runs: Runs, **more: Any) -> Case:
    """`CLIPTextModel` beside the encoder alone."""
    settings = CLIPTextConfig(**TINY_TEXT)
    return Case(
        id=f"clip/text-{name}",
        summary=summary,
        upstream=lambda: CLIPTextModel(settings),
        port=lambda: clip.text_encoder_from_config(settings.to_dict()),
        key_map=clip.TEXT_ENCODER_KEYS,
        inputs=partial(ids, mask=True),
        run_upstream=runs[0],
        run_port=runs[1],
        batch_axis=0,
        pad=longer,
        **{"without_influence": key_bias(), **more},
    )


def image_case(
    name: str,
    summary: str,
    inputs: Callable[[torch.Generator], Inputs] = pixels,
    *,
    projection: bool = True,
    interpolate: bool = False,
    **changes: Any,
) -> Case:
    """`CLIPVisionModel`, with its projection or without, in the tiny configuration with some changes."""
    settings = CLIPVisionConfig(**{**TINY_IMAGE, **changes})
    upstream = CLIPVisionModelWithProjection if projection else CLIPVisionModel
    port = clip.image_projection_from_config if projection else clip.image_model_from_config
    prefix = "vision_model." if projection else ""
    return Case(
        id=f"clip/image-{name}",
        summary=summary,
        upstream=lambda: upstream(settings),
        port=lambda: port(settings.to_dict(), interpolate_positions=interpolate),
        key_map=clip.IMAGE_PROJECTION_KEYS if projection else clip.IMAGE_MODEL_KEYS,
        inputs=inputs,
        run_upstream=run_interpolated_upstream if interpolate else run_upstream,
        run_port=run_image,
        taps=taps(settings.num_hidden_layers, "ImageEmbeddings", prefix, "CLIPImageEncoder."),
        without_influence=key_bias(prefix),
        batch_axis=0,
        without_cells=PICTURES,
    )


def image_encoder_case(name: str, summary: str, runs: Runs, **more: Any) -> Case:
    """`CLIPVisionModel` beside the encoder alone."""
    settings = CLIPVisionConfig(**TINY_IMAGE)
    return Case(
        id=f"clip/image-{name}",
        summary=summary,
        upstream=lambda: CLIPVisionModel(settings),
        port=lambda: clip.image_encoder_from_config(settings.to_dict()),
        key_map=clip.IMAGE_ENCODER_KEYS,
        inputs=pixels,
        run_upstream=runs[0],
        run_port=runs[1],
        batch_axis=0,
        without_cells=PICTURES,
        **{"without_influence": {**key_bias(), "post_layernorm.*": POST_NORM}, **more},
    )


TEXT_CASES = (
    *with_both_inits(text_case("l", "quick GELU, the end is the highest id, no projection", partial(ids, mask=True))),
    *with_both_inits(
        replace(
            text_case(
                "bigg",
                "exact GELU, the end is the first such id, projection",
                projection=True,
                eos_token_id=END,
                hidden_act="gelu",
            ),
            full_size=TEXT_SIZES,
        )
    ),
    text_case("no-mask", "no mask: the kernel's own triangle"),
    text_case(
        "mask-of-ones",
        "a mask that hides nothing",
        lambda generator: {**ids(generator), "attention_mask": torch.ones(2, 9, dtype=torch.long)},
    ),
    text_case("left-padding", "queries that see nothing", left_padded_ids),
    replace(
        text_case("finished-mask", "scores to add instead of the causal mask", finished_mask_ids), without_cells=SCORES
    ),
    text_case("first-id", "the end is the first such id", partial(ids, batch=3), eos_token_id=END),
    text_case("no-end", "no end of text: the first token is taken", ids_without_end, eos_token_id=END),
    text_case("position-ids", "tokens in places of their own", partial(ids, mask=True, positions=True)),
    replace(
        text_case("77", "as many tokens as places, 8 heads", partial(ids, batch=1, length=77), num_attention_heads=8),
        without_cells=FULL,
    ),
    replace(
        text_case("one-token", "a single token", partial(ids, batch=3, length=1)),
        without_influence={
            f"encoder.layers.{{i}}.self_attn.{name}_proj.*": "softmax of a single score is 1" for name in "qk"
        },
    ),
    text_case(
        "odd-sizes",
        "one layer, one head, sizes that no vector unit likes",
        partial(ids, batch=3, length=13, mask=True),
        hidden_size=27,
        intermediate_size=31,
        num_attention_heads=1,
        num_hidden_layers=1,
    ),
    text_case(
        "bigg-width",
        "the width and the heads of bigG",
        partial(ids, length=21, mask=True),
        projection=True,
        hidden_size=1280,
        num_attention_heads=20,
        intermediate_size=128,
        projection_dim=128,
        num_hidden_layers=1,
        hidden_act="gelu",
    ),
    text_case("eps", "layer_norm_eps=1e-3", layer_norm_eps=1e-3),
    text_case("l-projection", "quick GELU, highest id, projection, mask", partial(ids, mask=True), projection=True),
    text_case("wide-projection", "a projection wider than the model", projection=True, projection_dim=50),
    text_encoder_case("encoder", "the last state alone", (run_encoder_upstream, run_text_encoder)),
    replace(
        text_encoder_case("encoder-no-mask", "the kernel's own triangle", (run_encoder_upstream, run_text_encoder)),
        inputs=ids,
    ),
    replace(
        text_encoder_case("encoder-finished-mask", "scores to add", (run_encoder_upstream, run_text_encoder)),
        inputs=finished_mask_ids,
        without_cells=SCORES,
    ),
    *(
        replace(
            text_case(f"one-layer-{name}", summary, inputs, num_hidden_layers=1, num_attention_heads=2, hidden_size=26),
            without_cells=SCORES if inputs is finished_mask_ids else {},
        )
        for name, summary, inputs in (
            ("no-mask", "the kernel's own triangle", ids),
            ("finished-mask", "scores to add", finished_mask_ids),
        )
    ),
    text_encoder_case(
        "hidden-states",
        "every hidden state in one forward",
        (run_text_states_upstream, run_text_states),
    ),
    text_encoder_case(
        "clip-skip",
        "hidden states by slicing the tree, which takes several forwards",
        (run_skips_upstream, run_text_skips),
        gradients=False,
    ),
)

IMAGE_CASES = (
    *with_both_inits(image_case("l", "quick GELU, projection")),
    replace(image_case("h", "exact GELU, projection", hidden_act="gelu"), full_size=IMAGE_SIZES),
    image_case("no-projection", "the pooled class token", projection=False),
    *(
        replace(case, run_upstream=in_float32(case.run_upstream), run_port=in_float32(case.run_port))
        for case in (
            image_case("float32", "pictures in float32 for a model of any dtype"),
            image_encoder_case(
                "float32-states", "the same, the encoder alone", (run_states_upstream, run_image_states)
            ),
        )
    ),
    image_case("batch-1", "one picture, 8 heads", partial(pixels, batch=1), num_attention_heads=8),
    image_case("interpolated", "a larger, oblong picture", partial(pixels, height=48, width=40), interpolate=True),
    image_case("interpolated-down", "a smaller picture", partial(pixels, height=16, width=24), interpolate=True),
    image_case(
        "interpolated-same-count",
        "as many patches in another form",
        partial(pixels, height=16, width=64),
        interpolate=True,
    ),
    image_case("interpolated-same", "its own size, positions not touched", interpolate=True),
    image_case(
        "interpolated-uneven", "no whole number of patches", partial(pixels, height=45, width=39), interpolate=True
    ),
    image_case(
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
    image_case(
        "h-width",
        "the width and the heads of H: 80 numbers a head",
        partial(pixels, batch=1, height=42, width=42),
        hidden_size=1280,
        num_attention_heads=16,
        intermediate_size=128,
        projection_dim=128,
        num_hidden_layers=1,
        image_size=42,
        patch_size=14,
        hidden_act="gelu",
    ),
    image_case(
        "bigg-width",
        "the width and the heads of bigG: 104 numbers a head",
        partial(pixels, batch=1, height=42, width=42),
        hidden_size=1664,
        num_attention_heads=16,
        intermediate_size=128,
        projection_dim=128,
        num_hidden_layers=1,
        image_size=42,
        patch_size=14,
        hidden_act="gelu",
    ),
    image_case("eps", "layer_norm_eps=1e-3", layer_norm_eps=1e-3),
    image_encoder_case("hidden-states", "every hidden state in one forward", (run_states_upstream, run_image_states)),
    image_encoder_case(
        "slices",
        "hidden states by slicing the tree, which takes several forwards",
        (run_some_states_upstream, run_image_slices),
        gradients=False,
    ),
)


def run_whole_upstream(model: nn.Module, inputs: Inputs) -> Outputs:
    """The logits; the embeddings are tapped."""
    return {"logits_per_text": model(**inputs).logits_per_text}


def run_whole(model: nn.Module, inputs: Inputs) -> Outputs:
    assert isinstance(model, clip.CLIP)
    model.text.set_attention_mask(inputs.get("attention_mask"))
    return {"logits_per_text": model(inputs["input_ids"], inputs["pixel_values"])}


def texts_and_pictures(generator: torch.Generator) -> Inputs:
    return {**ids(generator, 3, mask=True), **pixels(generator, 2)}


WHOLE = CLIPConfig(text_config=TINY_TEXT, vision_config=TINY_IMAGE, projection_dim=20, attn_implementation="sdpa")
WHOLE_CASE = Case(
    id="clip/whole",
    summary="both halves, and the similarity of three texts with two pictures",
    upstream=lambda: CLIPModel(WHOLE),
    port=lambda: clip.clip_from_config(WHOLE.to_dict()),
    key_map=clip.CLIP_KEYS,
    inputs=texts_and_pictures,
    run_upstream=run_whole_upstream,
    run_port=run_whole,
    taps={
        f"Directions.{half}Direction.CLIP{half}ModelWithProjection.StatesAndPooled.{half}Embedding": upstream
        for half, upstream in (("Text", "text_projection"), ("Image", "visual_projection"))
    },
    without_influence={**key_bias("text_model."), **key_bias("vision_model.")},
    without_cells=PAIRS,
)
WHOLE_CASES = (
    *with_both_inits(WHOLE_CASE),
    replace(
        WHOLE_CASE,
        id="clip/whole-no-mask",
        summary="without a mask, pictures in float32",
        inputs=lambda generator: {**ids(generator, 3), **pixels(generator, 2)},
        run_upstream=in_float32(run_whole_upstream),
        run_port=in_float32(run_whole),
    ),
    replace(
        WHOLE_CASE,
        id="clip/whole-finished-mask",
        summary="scores to add instead of the causal mask",
        inputs=lambda generator: {**finished_mask_ids(generator), **pixels(generator, 2)},
    ),
)

CASES = (*TEXT_CASES, *IMAGE_CASES, *WHOLE_CASES)
