"""Published configurations on the meta device, where the largest model costs nothing.

That the keys and shapes of each port are those of upstream is compared with its case, as `clip/text-bigg[meta:…]`. Here
stand the published files around them: configurations as they were written years ago, and older spellings of keys.
"""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

import reference_ports
from parity_tests.cases.bert import minilm_config
from parity_tests.published_autoencoders import AUTOENCODERS
from parity_tests.published_unets import UNETS
from reference_ports import bert, clip
from refiners.conversion import KeyMap, Port
from refiners.errors import ConversionError

LEGACY: dict[str, Any] = {
    "_name_or_path": "",
    "add_cross_attention": False,
    "architectures": None,
    "bad_words_ids": None,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "decoder_start_token_id": None,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "exponential_decay_length_penalty": None,
    "finetuning_task": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "prefix": None,
    "problem_type": None,
    "pruned_heads": {},
    "remove_invalid_values": False,
    "repetition_penalty": 1.0,
    "return_dict": True,
    "return_dict_in_generate": False,
    "sep_token_id": None,
    "suppress_tokens": None,
    "task_specific_params": None,
    "temperature": 1.0,
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,
    "tie_word_embeddings": True,
    "tokenizer_class": None,
    "top_k": 50,
    "top_p": 1.0,
    "torch_dtype": None,
    "torchscript": False,
    "transformers_version": "4.16.0.dev0",
    "typical_p": 1.0,
    "use_bfloat16": False,
}
"""What transformers 4 wrote into the configuration of each half of CLIP."""


def text_half(width: int, layers: int, heads: int, act: str) -> dict[str, Any]:
    return {
        **LEGACY,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "hidden_act": act,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "pad_token_id": 1,
        "projection_dim": width,
        "vocab_size": 49408,
    }


def image_half(
    width: int, inner: int, layers: int, heads: int, projection: int, act: str, patch: int = 14
) -> dict[str, Any]:
    return {
        **LEGACY,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "dropout": 0.0,
        "eos_token_id": None,
        "hidden_act": act,
        "hidden_size": width,
        "image_size": 224,
        "intermediate_size": inner,
        "layer_norm_eps": 1e-05,
        "model_type": "clip_vision_model",
        "num_attention_heads": heads,
        "num_channels": 3,
        "num_hidden_layers": layers,
        "pad_token_id": None,
        "patch_size": patch,
        "projection_dim": projection,
    }


def whole(text: Mapping[str, Any], image: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of both halves, as published."""
    return {
        "model_type": "clip",
        "projection_dim": text["projection_dim"],
        "text_config": dict(text),
        "vision_config": dict(image),
    }


B = whole(text_half(512, 12, 8, "quick_gelu"), image_half(768, 3072, 12, 12, 512, "quick_gelu", 32))
L = whole(text_half(768, 12, 12, "quick_gelu"), image_half(1024, 4096, 24, 16, 768, "quick_gelu"))
H = whole(text_half(1024, 24, 16, "gelu"), image_half(1280, 5120, 32, 16, 1024, "gelu"))
BIG_G = whole(text_half(1280, 32, 20, "gelu"), image_half(1664, 8192, 48, 16, 1280, "gelu"))

BERT_BASE: dict[str, Any] = {
    "architectures": ["BertForMaskedLM"],
    "attention_probs_dropout_prob": 0.1,
    "gradient_checkpointing": False,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "transformers_version": "4.6.0.dev0",
    "type_vocab_size": 2,
    "use_cache": True,
    "vocab_size": 30522,
}
BERT_LARGE = {**BERT_BASE, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16}

VIT_BASE: dict[str, Any] = {
    "_name_or_path": "google/vit-base-patch16-224-in21k",
    "architectures": ["ViTModel"],
    "attention_probs_dropout_prob": 0.0,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "hidden_size": 768,
    "image_size": 224,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "model_type": "vit",
    "num_attention_heads": 12,
    "num_channels": 3,
    "num_hidden_layers": 12,
    "patch_size": 16,
    "qkv_bias": True,
    "transformers_version": "4.13.0.dev0",
}
VIT_LARGE = {
    **VIT_BASE,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
}

PUBLISHED: dict[str, Mapping[str, Any]] = {
    "bert": BERT_BASE,
    "clip-text": L,
    "clip-image": L,
    "bert-base": BERT_BASE,
    "bert-large": {**BERT_LARGE, "num_hidden_layers": 24},
    "minilm": minilm_config(),
    "clip-text-b": B,
    "clip-text-l": L,
    "clip-text-h": H,
    "clip-text-bigg": BIG_G,
    "clip-image-b": B,
    "clip-image-l": L,
    "clip-image-h": H,
    "clip-image-bigg": BIG_G,
    "vit": VIT_BASE,
    "vit-masked": VIT_BASE,
    "vit-b16": VIT_BASE,
    "vit-b32": {**VIT_BASE, "patch_size": 32},
    "vit-l16": VIT_LARGE,
    "vit-l32": {**VIT_LARGE, "patch_size": 32},
    **AUTOENCODERS,
    **UNETS,
}


def shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {key: tensor.shape for key, tensor in module.state_dict().items()}


def test_every_port_has_its_published_configuration_here() -> None:
    assert set(reference_ports.PORTS()) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_configuration_gives_the_port_of_that_name(name: str) -> None:
    port: Port = reference_ports.PORTS()[name]
    with torch.device("meta"):
        built, read = port.build(), port.from_config(PUBLISHED[name])
    # The name of the root may say more: CLIPTextEncoderL.
    assert repr(read).splitlines()[1:] == repr(built).splitlines()[1:]
    assert shapes(read) == shapes(built)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("clip")])
def test_the_file_of_the_whole_clip_gives_each_half(name: str) -> None:
    port: Port = reference_ports.PORTS()[name]
    config = PUBLISHED[name]
    with torch.device("meta"):
        upstream = CLIPModel(
            CLIPConfig(
                text_config=CLIPTextConfig(**config["text_config"]).to_dict(),
                vision_config=CLIPVisionConfig(**config["vision_config"]).to_dict(),
                projection_dim=config["projection_dim"],
            )
        )
        converted = port.key_map.convert(upstream.state_dict(), port.build())
    assert converted


def older(keys: Mapping[str, torch.Tensor], *more: str) -> dict[str, torch.Tensor]:
    return {**keys, **{key: torch.arange(512)[None] for key in more}}


@pytest.mark.parametrize(
    ("spelling", "build", "key_map"),
    [
        (lambda key: f"bert.{key}", bert.bert_base, bert.BERT_KEYS),
        (lambda key: f"bert.{key}", bert.BERTEncoder, bert.SENTENCE_ENCODER_KEYS),
        (
            lambda key: key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"),
            bert.bert_base,
            bert.BERT_KEYS,
        ),
    ],
    ids=["prefix", "prefix, no pooler", "gamma and beta"],
)
def test_older_spellings_of_bert_are_read(
    spelling: Callable[[str], str], build: Callable[[], nn.Module], key_map: KeyMap
) -> None:
    with torch.device("meta"):
        upstream, port = BertModel(BertConfig()), build()
    weights = {spelling(key): tensor for key, tensor in upstream.state_dict().items()}
    heads = {"cls.predictions.bias": torch.zeros(30_522), "cls.seq_relationship.bias": torch.zeros(2)}
    positions = {spelling("embeddings.position_ids"): torch.arange(512)[None]}
    converted = key_map.convert({**weights, **heads, **positions}, port)
    assert list(converted) == list(port.state_dict())


def test_stored_position_ids_that_do_not_count_are_refused() -> None:
    with torch.device("meta"):
        upstream, port = BertModel(BertConfig()), bert.bert_base()
    weights = {**upstream.state_dict(), "embeddings.position_ids": torch.arange(512)[None].flip(1)}
    with pytest.raises(ConversionError, match="position_ids"):
        bert.BERT_KEYS.convert(weights, port)


@pytest.mark.parametrize("prefix", ["", "text_model."])
@pytest.mark.parametrize(
    ("build", "key_map"),
    [(clip.CLIPTextEncoderL, clip.TEXT_ENCODER_KEYS), (lambda: clip.CLIPTextModel(), clip.TEXT_MODEL_KEYS)],
    ids=["encoder", "model"],
)
def test_both_spellings_of_a_text_encoder_are_read(
    prefix: str, build: Callable[[], nn.Module], key_map: KeyMap
) -> None:
    with torch.device("meta"):
        port = build()
    upstream = key_map.invert(port.state_dict())
    weights = {f"{prefix}{key}": tensor for key, tensor in upstream.items()}
    weights[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
    assert list(key_map.convert(weights, port)) == list(port.state_dict())
