"""A Stable Diffusion model of toy size, with random weights, in the layout in which models are published.

    python docs/examples/tiny_stable_diffusion.py tiny/
    refiners generate --model tiny/ --prompt "a photo of a cat" --steps 5 -o cat.png

Its pictures are noise, made in a second by the code that makes real ones. Its vocabulary is made up as well: every
letter is a token of its own.
"""

import json
import sys
from itertools import chain, islice, product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reference_ports import autoencoder, clip, unet
from reference_ports.clip.tokenizer import NUM_MERGES
from refiners.conversion import KeyMap, write_state_dict

UNET: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
}
AUTOENCODER: dict[str, Any] = {
    "block_out_channels": [16, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
TEXT_ENCODER: dict[str, Any] = {
    "vocab_size": 49_408,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SCHEDULER: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def write(directory: Path | str, **unet_changes: Any) -> Path:
    """Writes the model to a directory, and returns it."""
    torch.manual_seed(0)
    root = Path(directory)
    config = {**UNET, **unet_changes}
    write_part(root / "unet", config, unet.from_config(config), unet.key_map_for(config))
    write_part(root / "vae", AUTOENCODER, autoencoder.from_config(AUTOENCODER), autoencoder.KEYS)
    encoder = clip.text_encoder_from_config(TEXT_ENCODER)
    write_part(root / "text_encoder", TEXT_ENCODER, encoder, clip.TEXT_ENCODER_KEYS)
    write_json(root / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(root / "tokenizer" / "tokenizer_config.json", {"model_max_length": 77, "pad_token": "<|endoftext|>"})
    (root / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *made_up_merges()]) + "\n")
    return root


def write_part(folder: Path, config: dict[str, Any], port: nn.Module, keys: KeyMap) -> None:
    """Writes the configuration and the weights of one part, under the published names."""
    write_json(folder / "config.json", config)
    write_state_dict(folder / "model.safetensors", keys.invert(port.state_dict()), overwrite=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2))


def made_up_merges() -> list[str]:
    """As many merges as CLIP has, of characters that no lower-case text holds."""
    letters = [chr(code) for code in [*range(33, 127), *range(161, 173), *range(174, 256)]]
    unused = [letter for letter in letters if not letter.islower()]
    pairs = [f"{left} {right}" for left, right in product(unused, unused)]
    triples = (f"{pair.replace(' ', '')} {last}" for pair, last in product(pairs, unused))
    return list(islice(chain(pairs, triples), NUM_MERGES))


if __name__ == "__main__":
    print(f"{write(sys.argv[1] if len(sys.argv) > 1 else 'tiny')} is ready.")
