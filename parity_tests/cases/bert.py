"""BERT, and sentence encoders: `transformers.BertModel` beside `reference_ports.bert`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BertConfig, BertModel

from parity_tests.published import minilm_directory
from parity_tests.sentences import SENTENCES, SIMILAR
from reference_ports.bert import (
    BERT,
    BERT_KEYS,
    ENCODER_KEYS,
    SENTENCE_ENCODER_KEYS,
    BERTEncoder,
    bert_base,
    bert_from_config,
    bert_large,
    encoder_from_config,
    minilm_l6,
    sentence_encoder_from_config,
)
from refiners.conversion import read_config, read_state_dict
from refiners.parity import Case, FullSize, with_both_inits
from refiners.parity.weights import fill_informative

Inputs = Mapping[str, Any]
Outputs = Mapping[str, Tensor]

TINY: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}

KEY_BIAS = {
    "encoder.layer.{i}.attention.self.key.bias": "adds the same number to all scores of a query: softmax removes it"
}


SCORES = {"padded": "its mask is finished scores"}
FULL = {"padded": "there are as many tokens as places"}


def config(**changes: Any) -> BertConfig:
    """The tiny configuration with some changes, on the kernel that the port uses."""
    return BertConfig(**{**TINY, **changes}, attn_implementation="sdpa")


def text(
    generator: torch.Generator,
    batch: int = 2,
    length: int = 7,
    *,
    mask: list[list[int]] | None = None,
    token_types: int = 0,
    positions: int = 0,
    pad: bool = True,
) -> Inputs:
    """Random ids, with what else the knobs ask for. Where the mask is 0 the ids are those of padding, if `pad`."""
    inputs: dict[str, Any] = {"input_ids": torch.randint(1, TINY["vocab_size"], (batch, length), generator=generator)}
    if mask is not None:
        inputs["attention_mask"] = torch.tensor(mask)
        if pad:
            inputs["input_ids"] = inputs["input_ids"] * inputs["attention_mask"]
    if token_types:
        inputs["token_type_ids"] = torch.randint(0, token_types, (batch, length), generator=generator)
    if positions:
        inputs["position_ids"] = torch.stack(
            [torch.randperm(positions, generator=generator)[:length] for _ in range(batch)]
        )
    return inputs


def longer(inputs: Inputs, more: int = 3) -> Inputs:
    """The same texts with padding behind them."""
    ids = inputs["input_ids"]
    given = {**inputs, "attention_mask": inputs.get("attention_mask", torch.ones_like(ids))}
    return {name: torch.cat([value, value.new_zeros(len(ids), more)], dim=1) for name, value in given.items()}


def set_knobs(model: BERTEncoder, inputs: Inputs) -> BERTEncoder:
    """Gives the port what upstream takes as keyword arguments."""
    model.set_attention_mask(inputs.get("attention_mask"))
    model.set_token_type_ids(inputs.get("token_type_ids"))
    model.set_position_ids(inputs.get("position_ids"))
    return model


def run_upstream(model: nn.Module, inputs: Inputs) -> Outputs:
    """The last state, and what the pooler makes of it where there is one."""
    output = model(**inputs)
    pooled = {} if output.pooler_output is None else {"pooled": output.pooler_output}
    return {"last_hidden_state": output.last_hidden_state, **pooled}


def run_port(model: nn.Module, inputs: Inputs) -> Outputs:
    assert isinstance(model, BERTEncoder)
    output = set_knobs(model, inputs)(inputs["input_ids"])
    return (
        dict(zip(("last_hidden_state", "pooled"), output, strict=True))
        if isinstance(model, BERT)
        else {"last_hidden_state": output}
    )


def run_upstream_states(model: nn.Module, inputs: Inputs) -> Outputs:
    """All hidden states."""
    states = model(**inputs, output_hidden_states=True).hidden_states
    return {f"state {i}": state for i, state in enumerate(states)}


def run_port_states(model: nn.Module, inputs: Inputs) -> Outputs:
    assert isinstance(model, BERTEncoder)
    states = set_knobs(model.with_hidden_states(), inputs)(inputs["input_ids"])
    return {f"state {i}": state for i, state in enumerate(states)}


def run_upstream_some_states(model: nn.Module, inputs: Inputs) -> Outputs:
    """The first hidden state, the last but one, and the last."""
    states = model(**inputs, output_hidden_states=True).hidden_states
    return {"first": states[0], "penultimate": states[-2], "last": states[-1]}


def run_port_slices(model: nn.Module, inputs: Inputs) -> Outputs:
    assert isinstance(model, BERTEncoder)
    slices = {"first": model[:1], "penultimate": model[:-1], "last": model}
    return {name: set_knobs(encoder, inputs)(inputs["input_ids"]) for name, encoder in slices.items()}


def run_upstream_sentences(model: nn.Module, inputs: Inputs) -> Outputs:
    """Mean pooling and normalisation as sentence-transformers' modules `Pooling` and `Normalize` write them."""
    states = model(**inputs).last_hidden_state
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    expanded = mask.unsqueeze(-1).expand(states.size()).to(states.dtype)
    pooled = torch.sum(states * expanded, 1) / torch.clamp(expanded.sum(1), min=1e-9)
    return {"sentence": nn.functional.normalize(pooled, p=2, dim=1)}


def run_port_sentences(model: nn.Module, inputs: Inputs) -> Outputs:
    assert isinstance(model, BERTEncoder)
    return {"sentence": set_knobs(model, inputs)(inputs["input_ids"])}


def taps(num_layers: int, **more: str) -> Mapping[str, str]:
    """The embeddings and every layer, compared as well."""
    layers = {
        "TransformerLayer" if num_layers == 1 else f"TransformerLayer_{i + 1}": f"encoder.layer.{i}"
        for i in range(num_layers)
    }
    return {"Embeddings": "embeddings", **layers, **more}


def case(name: str, summary: str, inputs: Callable[[torch.Generator], Inputs] = text, **changes: Any) -> Case:
    """`BertModel` with its pooler, in the tiny configuration with some changes."""
    settings = config(**changes)
    return Case(
        id=f"bert/{name}",
        summary=summary,
        upstream=lambda: BertModel(settings),
        port=lambda: bert_from_config(settings.to_dict()),
        key_map=BERT_KEYS,
        inputs=inputs,
        run_upstream=run_upstream,
        run_port=run_port,
        taps=taps(settings.num_hidden_layers, **{"StatesAndPooled.Pooler": "pooler"}),
        without_influence=KEY_BIAS,
        batch_axis=0,
        pad=longer,
    )


def encoder_case(
    name: str,
    summary: str,
    runs: tuple[Callable[[nn.Module, Inputs], Outputs], Callable[[nn.Module, Inputs], Outputs]],
    inputs: Callable[[torch.Generator], Inputs] = text,
    **more: Any,
) -> Case:
    """`BertModel` without its pooler."""
    return Case(
        id=f"bert/{name}",
        summary=summary,
        upstream=lambda: BertModel(config(), add_pooling_layer=False),
        port=lambda: encoder_from_config(config().to_dict()),
        key_map=ENCODER_KEYS,
        inputs=inputs,
        run_upstream=runs[0],
        run_port=runs[1],
        batch_axis=0,
        pad=longer,
        **{"without_influence": KEY_BIAS, **more},
    )


def sentence_case(name: str, summary: str, inputs: Callable[[torch.Generator], Inputs], **more: Any) -> Case:
    """`BertModel`, and what sentence-transformers makes of its states."""
    return Case(
        id=f"bert/{name}",
        summary=summary,
        upstream=lambda: BertModel(config(), add_pooling_layer=False),
        port=lambda: sentence_encoder_from_config(config().to_dict()),
        key_map=ENCODER_KEYS,
        inputs=inputs,
        run_upstream=run_upstream_sentences,
        run_port=run_port_sentences,
        taps=taps(3),
        without_influence=KEY_BIAS,
        batch_axis=0,
        pad=longer,
        **more,
    )


def weights_of_short_sentences() -> Mapping[str, Tensor]:
    """Informative weights, but for a last norm that makes everything tiny."""
    model = BertModel(config(), add_pooling_layer=False).double()
    fill_informative(model, seed=0)
    last = "encoder.layer.2.output.LayerNorm."
    return {key: 1e-13 * value if key.startswith(last) else value for key, value in model.state_dict().items()}


def finished_mask(generator: torch.Generator) -> Inputs:
    """Scores to add, for each pair of tokens, as a caller may prepare them."""
    return {**text(generator), "attention_mask": torch.randn(2, 1, 7, 7, generator=generator)}


def real_sentences(generator: torch.Generator, sentences: Sequence[str] = SENTENCES) -> Inputs:
    """Sentences in one batch, as the published tokenizer cuts and pads them."""
    tokenizer = AutoTokenizer.from_pretrained(minilm_directory())
    return dict(tokenizer(list(sentences), padding=True, truncation=True, max_length=256, return_tensors="pt"))


def minilm_config() -> dict[str, Any]:
    """The published config.json."""
    return read_config(minilm_directory() / "config.json")


def minilm_weights() -> dict[str, Tensor]:
    """The published weights. transformers 5 no longer stores position ids."""
    weights = read_state_dict(minilm_directory() / "model.safetensors")
    return {key: tensor for key, tensor in weights.items() if key != "embeddings.position_ids"}


PADDED = [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]]
ON_META = {
    "bert": FullSize(upstream=lambda: BertModel(BertConfig()), port=BERTEncoder, key_map=SENTENCE_ENCODER_KEYS),
    "bert-base": FullSize(upstream=lambda: BertModel(BertConfig()), port=bert_base),
    "bert-large": FullSize(upstream=lambda: BertModel(BertConfig(**LARGE)), port=bert_large),
    "minilm": FullSize(upstream=lambda: BertModel(BertConfig(**MINILM)), port=minilm_l6, key_map=SENTENCE_ENCODER_KEYS),
}

TINY_CASE = case("tiny", "three layers, padding and two segments", partial(text, mask=PADDED, token_types=2))

MINILM_CASE = Case(
    id="bert/minilm",
    summary=f"all-MiniLM-L6-v2, its real weights and tokenizer, {len(SENTENCES)} real sentences",
    upstream=lambda: BertModel(BertConfig(**minilm_config(), attn_implementation="sdpa")),
    port=lambda: sentence_encoder_from_config(minilm_config()),
    key_map=SENTENCE_ENCODER_KEYS,
    inputs=real_sentences,
    run_upstream=run_upstream_sentences,
    run_port=run_port_sentences,
    taps=taps(6),
    without_influence={**KEY_BIAS, "pooler.*": "the sentence is the mean of its tokens"},
    weights=minilm_weights,
    batch_axis=0,
    pad=longer,
    lanes=("float64", "float32", "bfloat16"),
)

CASES = (
    *with_both_inits(replace(TINY_CASE, full_size=ON_META)),
    case("no-mask", "neither mask nor segments"),
    case("mask-of-ones", "a mask that hides nothing takes the kernel without one", partial(text, mask=[[1] * 7] * 2)),
    case(
        "masks",
        "padding on the left, in the middle, on both sides, and all but one",
        partial(
            text,
            batch=5,
            mask=[
                [0, 0, 1, 1, 1, 1, 1],
                [1, 1, 0, 0, 1, 1, 1],
                [0, 1, 1, 1, 1, 0, 0],
                [0, 0, 0, 1, 0, 0, 0],
                [1, 0, 1, 0, 1, 0, 1],
            ],
            pad=False,
        ),
    ),
    case("all-masked", "one text is padding only", partial(text, mask=[[1, 1, 1, 1, 1, 0, 0], [0] * 7], pad=False)),
    replace(case("finished-mask", "scores to add, of four axes", finished_mask), without_cells=SCORES),
    case("position-ids", "tokens in places of their own", partial(text, batch=3, positions=64)),
    case(
        "one-layer", "one layer, one head, batch 1", partial(text, batch=1), num_hidden_layers=1, num_attention_heads=1
    ),
    replace(
        case("long", "as many tokens as places, 8 heads", partial(text, batch=1, length=64), num_attention_heads=8),
        without_cells=FULL,
    ),
    replace(
        case("one-token", "a single token", partial(text, batch=3, length=1)),
        without_influence={
            f"encoder.layer.{{i}}.attention.self.{name}.*": "softmax of a single score is 1"
            for name in ("query", "key")
        },
    ),
    case(
        "odd-sizes",
        "sizes that no vector unit likes, three segments",
        partial(text, batch=3, length=11, mask=[[1] * 11, [1] * 5 + [0] * 6, [1] + [0] * 10], token_types=3),
        hidden_size=30,
        num_attention_heads=3,
        intermediate_size=37,
        type_vocab_size=3,
        num_hidden_layers=2,
    ),
    *(
        case(f"act-{name.replace('_', '-')}", f"hidden_act={name!r}", partial(text, mask=PADDED), hidden_act=name)
        for name in ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "quick_gelu", "relu", "silu", "gelu_python", "tanh")
    ),
    case(
        "base-width",
        "the width and the heads of BERT base",
        partial(text, mask=PADDED, token_types=2),
        hidden_size=768,
        num_attention_heads=12,
        intermediate_size=128,
        num_hidden_layers=1,
    ),
    case("eps", "layer_norm_eps=1e-5", partial(text, mask=PADDED), layer_norm_eps=1e-5),
    case("other-pad-id", "padding has id 7", partial(text, mask=PADDED), pad_token_id=7),
    encoder_case("no-pooler", "without the pooler", (run_upstream, run_port), partial(text, mask=PADDED)),
    encoder_case(
        "hidden-states",
        "every hidden state in one forward",
        (run_upstream_states, run_port_states),
        partial(text, mask=PADDED, token_types=2),
    ),
    encoder_case(
        "slices",
        "hidden states by slicing the tree, which takes several forwards",
        (run_upstream_some_states, run_port_slices),
        partial(text, mask=PADDED),
        gradients=False,
    ),
    sentence_case("sentences", "mean pooling and normalisation", partial(text, mask=PADDED)),
    sentence_case(
        "sentences-all-masked",
        "one text is padding only: its sentence is 0, not NaN",
        partial(text, mask=[[1, 1, 1, 1, 1, 0, 0], [0] * 7], pad=False),
    ),
    sentence_case(
        "sentences-short",
        "vectors that are shorter than the eps of their normalisation",
        partial(text, mask=PADDED),
        weights=weights_of_short_sentences,
        lanes=("float64", "float32", "bfloat16"),
    ),
    MINILM_CASE,
    replace(
        MINILM_CASE,
        id="bert/minilm.three",
        summary="the same in float16, on three sentences: a CPU multiplies matrices of it slowly",
        inputs=partial(real_sentences, sentences=SIMILAR),
        lanes=("float16",),
    ),
)
