"""Files of autoencoders as diffusers reads them, those with the names of before its version 0.18 included."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file, save_file

from parity_tests.cases.autoencoder import SMALL, TINY
from reference_ports import autoencoder
from refiners.conversion import read_config

OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
FILE = "diffusion_pytorch_model.safetensors"


def rename_as_of_old(folder: Path) -> None:
    state = load_file(folder / FILE)
    for key in [*state]:
        name = key
        for new, old in OLD.items():
            name = name.replace(f".{new}.", f".{old}.")
        state[name] = state.pop(key)
    assert sum(".proj_attn." in key for key in state) == 4
    save_file(state, folder / FILE, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["new names", "old names", "tiny"])
def test_a_folder_that_diffusers_wrote_gives_the_weights_that_diffusers_reads(kind: str, tmp_path: Path) -> None:
    upstream: Any = AutoencoderTiny(**SMALL) if kind == "tiny" else AutoencoderKL(**TINY, latents_mean=None)
    upstream.save_pretrained(tmp_path)
    if kind == "old names":
        rename_as_of_old(tmp_path)
    config = read_config(tmp_path / "config.json")
    port, keys = autoencoder.from_config(config), autoencoder.key_map_for(config)
    ours = keys.convert(load_file(tmp_path / FILE), port)
    read = type(upstream).from_pretrained(tmp_path)
    theirs = keys.convert(read.state_dict(), port)
    assert list(ours) == list(theirs) == list(port.state_dict())
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
