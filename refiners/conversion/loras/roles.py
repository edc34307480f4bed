"""What a key of a LoRA file says: which layer it is for, and which tensor of that layer's adapter it holds.

    unet.mid_block.attentions.0.proj_in.lora_A.weight      diffusers: the part, the layer, the role
    unet.….attn1.processor.to_q_lora.down.weight           diffusers before 0.18
    text_encoder.….q_proj.lora_linear_layer.up.weight      diffusers before peft
    diffusion_model.input_blocks.1.1.proj_in.lora_up.weight   ComfyUI, read as diffusers' with other names
    base_model.model.encoder.layer.0.output.lora_B.weight  peft
    lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha     kohya: the part, the layer with `_` for `.`, the role

The layout is told from all keys together, never from the name of the file.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

ALPHA = "alpha"
PEFT_PREFIX = "base_model.model."

# The end of a key -> the role it stands for. The longest end that fits counts.
_LORA_ENDS: Mapping[str, str] = {
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora_B.bias": "up_bias",
    "lora_embedding_A": "down",
    "lora_embedding_B": "up",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_down.weight": "down",
    "lora_mid.weight": "mid",
    "lora_up.weight": "up",
    "lora_up.bias": "up_bias",
    "dora_scale": "magnitude",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora.up.bias": "up_bias",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    ALPHA: ALPHA,
    "ia3_l": "ia3",
    "ln_tuning_layers.weight": "norm_weight",
    "ln_tuning_layers.bias": "norm_bias",
}
_OTHER_ENDS = {
    f"{method}_{role}": role
    for method, roles in {
        "hada": ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"),
        "lokr": ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"),
    }.items()
    for role in roles
}
ENDS: Mapping[str, str] = {**_LORA_ENDS, **_OTHER_ENDS}

# Ends of keys that mean something else, with what they mean: they are refused by name, not passed over.
STRANGE_ENDS: Mapping[str, str] = {
    "diff": "a whole difference of weights, which is no LoRA",
    "diff_b": "a whole difference of biases, which is no LoRA",
    "w_norm": "a difference of a norm's weights, which is not read",
    "b_norm": "a difference of a norm's biases, which is not read",
    "on_input": "an IA3 of LyCORIS, which is not read",
    "oft_blocks": "an OFT, which is not read",
    "oft_diag": "an OFT of LyCORIS, which is not read",
    "rescale": "an OFT of LyCORIS, which is not read",
    "scalar": "a trained factor of LyCORIS, which is not read",
    "bias_indices": "a sparse bias of LyCORIS, which is not read",
    "bias_values": "a sparse bias of LyCORIS, which is not read",
    "bias_size": "a sparse bias of LyCORIS, which is not read",
}

_KOHYA_ENDS = frozenset({*ENDS, *STRANGE_ENDS})
_KOHYA_PARTS = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_transformer_": "transformer",
    "lycoris_": "",
}
_DOTTED_PARTS = {
    **{
        f"{part}.": part
        for part in ("unet", "text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "prior", "controlnet")
    },
    # ComfyUI, whose layers have the names of the original code.
    "diffusion_model.": "unet",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
}


@dataclass(frozen=True)
class Key:
    """What one key of a file says.

    Attributes:
        text: the key itself.
        prefix: what stands before the name of the layer, such as `unet.` or `lora_te1_`.
        part: the model that the prefix means, "" for the only one.
        module: the name of the layer.
        role: what the tensor is, "" for an end that is not known.
    """

    text: str
    prefix: str
    part: str
    module: str
    role: str


def layouts_of(keys: Iterable[str]) -> list[str]:
    """The layouts of those keys that are a LoRA's: one for a sound file, none for a file of something else.

    Example:
        >>> layouts_of(["lora_unet_conv_in.alpha", "unet.conv_in.lora_A.weight", "conv_in.weight"])
        ['kohya', 'diffusers']
    """
    return list(dict.fromkeys(_layout_of(key) for key in keys if split_end(key)[1] or strange_end(key)))


def _layout_of(key: str) -> str:
    if key.startswith(PEFT_PREFIX):
        return "peft"
    return "kohya" if key.startswith(tuple(_KOHYA_PARTS)) and key.partition(".")[2] in _KOHYA_ENDS else "diffusers"


def read_keys(keys: Iterable[str], layout: str) -> list[Key]:
    """What each key says, in the order given."""
    read = {"kohya": _read_kohya, "peft": _read_peft, "diffusers": _read_diffusers}[layout]
    return [read(key) for key in keys]


def _read_kohya(key: str) -> Key:
    name, end = split_end(key)
    prefix = next((prefix for prefix in _KOHYA_PARTS if key.startswith(prefix)), "")
    return Key(key, prefix, _KOHYA_PARTS.get(prefix, ""), name.removeprefix(prefix), ENDS.get(end, ""))


def _read_peft(key: str) -> Key:
    name, end = split_end(key)
    return Key(key, PEFT_PREFIX, "", name.removeprefix(PEFT_PREFIX), ENDS.get(end, ""))


def _read_diffusers(key: str) -> Key:
    name, end = split_end(key)
    prefix = next((prefix for prefix in _DOTTED_PARTS if name.startswith(prefix)), "")
    # Attention processors held the LoRAs of old: `attn1.processor.to_q_lora` is for `attn1.to_q`.
    module = name.removeprefix(prefix).replace(".processor.", ".")
    return Key(key, prefix, _DOTTED_PARTS.get(prefix, ""), module, ENDS.get(end, ""))


def split_end(key: str) -> tuple[str, str]:
    """The name of the layer in a key, and the end that says which tensor it is; ("", "") if none is known.

    Example:
        >>> split_end("unet.conv_in.lora_A.weight")
        ('unet.conv_in', 'lora_A.weight')
        >>> split_end("encoder.self_attn.to_q_lora.down.weight")
        ('encoder.self_attn.to_q', 'lora.down.weight')
    """
    segments = key.split(".")
    for count in (3, 2, 1):
        if count >= len(segments):
            continue
        name, end = ".".join(segments[:-count]), ".".join(segments[-count:])
        if end == ALPHA:
            return name.removesuffix("_lora").removesuffix(".lora"), end
        if end in ENDS:
            return name, end
        head, _, tail = end.partition(".")
        # A state dict of peft holds the name of the adapter too: `lora_A.default.weight`, `lokr_w1.default`.
        words = end.split(".")
        if count == 3 and f"{words[0]}.{words[2]}" in ENDS and words[0].startswith("lora_"):
            return name, f"{words[0]}.{words[2]}"
        if count == 2 and words[0] in ENDS and words[0] != ALPHA:
            return name, words[0]
        if count == 3 and head.endswith("_lora") and f"lora.{tail}" in ENDS:
            return f"{name}.{head.removesuffix('_lora')}", f"lora.{tail}"
    return "", ""


def strange_end(key: str) -> str:
    """What a key holds that is known and not read, "" if nothing is known of it."""
    segments = key.split(".")
    return next((STRANGE_ENDS[end] for n in (2, 1) if (end := ".".join(segments[-n:])) in STRANGE_ENDS), "")
