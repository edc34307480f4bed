"""The `vae/config.json` of published models, as the diffusers of their time wrote it."""

from typing import Any

FIRST: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
XL: dict[str, Any] = {
    **FIRST,
    "_diffusers_version": "0.20.0.dev0",
    "force_upcast": True,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}
THIRD: dict[str, Any] = {
    **XL,
    "_diffusers_version": "0.29.0.dev0",
    "latent_channels": 16,
    "latents_mean": None,
    "latents_std": None,
    "mid_block_add_attention": True,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}
FLUX: dict[str, Any] = {
    **THIRD,
    "_diffusers_version": "0.30.0.dev0",
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}
TINY: dict[str, Any] = {
    "_class_name": "AutoencoderTiny",
    "_diffusers_version": "0.20.0.dev0",
    "act_fn": "relu",
    "decoder_block_out_channels": [64, 64, 64, 64],
    "encoder_block_out_channels": [64, 64, 64, 64],
    "force_upcast": False,
    "in_channels": 3,
    "latent_channels": 4,
    "latent_magnitude": 3,
    "latent_shift": 0.5,
    "num_decoder_blocks": [3, 3, 3, 1],
    "num_encoder_blocks": [1, 3, 3, 3],
    "out_channels": 3,
    "scaling_factor": 1.0,
    "upsampling_scaling_factor": 2,
}

AUTOENCODERS = {
    "autoencoder-sd1": FIRST,
    "autoencoder-sdxl": XL,
    "autoencoder-sd3": THIRD,
    "autoencoder-flux": FLUX,
    "taesd": TINY,
    "taesd-16": {**TINY, "latent_channels": 16},
}
"""Port → the configuration that was published with its weights."""
