"""Autoencoders: pictures to the latents that diffusion models work on, and back. See README.md beside this file."""

from reference_ports.autoencoder.base import Autoencoder
from reference_ports.autoencoder.convert import (
    KEY_MAPS,
    KEYS,
    PORTS,
    TINY_KEYS,
    from_config,
    key_map_for,
    kl_from_config,
    tiny_from_config,
    tiny_keys,
)
from reference_ports.autoencoder.model import (
    AutoencoderKL,
    Decoder,
    DownBlocks,
    Encoder,
    FluxAutoencoder,
    MiddleBlock,
    PixelAttention,
    SD1Autoencoder,
    SD3Autoencoder,
    SDXLAutoencoder,
    UpBlocks,
)
from reference_ports.autoencoder.posterior import PointPosterior, Posterior
from reference_ports.autoencoder.scaling import LatentScaling
from reference_ports.autoencoder.tiling import RampTilingAdapter, SlicingAdapter, TilingAdapter
from reference_ports.autoencoder.tiny import AutoencoderTiny, TinyDecoder, TinyEncoder

__all__ = [
    "KEYS",
    "KEY_MAPS",
    "PORTS",
    "TINY_KEYS",
    "Autoencoder",
    "AutoencoderKL",
    "AutoencoderTiny",
    "Decoder",
    "DownBlocks",
    "Encoder",
    "FluxAutoencoder",
    "LatentScaling",
    "MiddleBlock",
    "PixelAttention",
    "PointPosterior",
    "Posterior",
    "RampTilingAdapter",
    "SD1Autoencoder",
    "SD3Autoencoder",
    "SDXLAutoencoder",
    "SlicingAdapter",
    "TilingAdapter",
    "TinyDecoder",
    "TinyEncoder",
    "UpBlocks",
    "from_config",
    "key_map_for",
    "kl_from_config",
    "tiny_from_config",
    "tiny_keys",
]
