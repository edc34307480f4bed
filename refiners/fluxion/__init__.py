"""Fluxion: the micro-framework. Models are trees of layers, data flows through them and through a Context.

`import refiners.fluxion.layers as fl` brings the layers; here are the utilities that everybody needs.
"""

from refiners.fluxion.utils import load_from_safetensors, manual_seed, norm, pad, save_to_safetensors

__all__ = ["load_from_safetensors", "manual_seed", "norm", "pad", "save_to_safetensors"]
