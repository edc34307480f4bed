"""The published models of Stable Diffusion, as `refiners convert` and the pipelines know them.

Which parts they have, what these are called in a folder and in a single file, and the configurations that a single file
lacks. The numbers are those of the config.json files published with each model; the key maps are their families'.
"""

from collections.abc import Mapping
from typing import Any

from reference_ports import autoencoder, clip, unet
from reference_ports.autoencoder import single_file as autoencoder_in_one
from reference_ports.clip import single_file as clip_in_one
from reference_ports.pipelines.stable_diffusion.recognition import KNOWN_BY_SIGHT, Traits
from reference_ports.unet import single_file as unet_in_one
from refiners.conversion import Bundle, Part

Config = dict[str, Any]

_SD1_UNET: Config = {
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 64,
}
_SD2_UNET: Config = {
    **_SD1_UNET,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
_SDXL_UNET: Config = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "layers_per_block": 2,
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 128,
}
_REFINER_UNET: Config = {
    **_SDXL_UNET,
    "block_out_channels": [384, 768, 1536, 1536],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": 4,
    "cross_attention_dim": 1280,
    "attention_head_dim": [6, 12, 24, 24],
    "projection_class_embeddings_input_dim": 2560,
}
_AUTOENCODER: Config = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "in_channels": 3,
    "out_channels": 3,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
_SDXL_AUTOENCODER: Config = {**_AUTOENCODER, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}


def _text(width: int, layers: int, heads: int, activation: str, projection_dim: int) -> Config:
    return {
        "model_type": "clip_text_model",
        "vocab_size": 49_408,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": activation,
        "projection_dim": projection_dim,
        "max_position_embeddings": 77,
        "layer_norm_eps": 1e-5,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
    }


_TEXT_L = _text(768, 12, 12, "quick_gelu", 768)
_TEXT_H = _text(1024, 23, 16, "gelu", 512)
_TEXT_BIG_G = _text(1280, 32, 20, "gelu", 1280)

_SCHEDULE: Config = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}
_PNDM = {"_class_name": "PNDMScheduler", **_SCHEDULE}
_DDIM = {"_class_name": "DDIMScheduler", **_SCHEDULE}
_EULER_ANCESTRAL = {"_class_name": "EulerAncestralDiscreteScheduler", **_SCHEDULE}
_EULER = {
    "_class_name": "EulerDiscreteScheduler",
    **_SCHEDULE,
    "interpolation_type": "linear",
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}


def _unet(config: Config, in_channels: int, **changes: Any) -> Part:
    return Part(
        name="unet",
        folder="unet",
        config={**config, "in_channels": in_channels, **changes},
        build=unet.from_config,
        keys=unet.key_map_for,
        prefixes=("model.diffusion_model.",),
        single_file=unet_in_one.single_file_keys,
    )


def _autoencoder(config: Config) -> Part:
    return Part(
        name="autoencoder",
        folder="vae",
        config=config,
        build=autoencoder.from_config,
        keys=autoencoder.key_map_for,
        prefixes=("first_stage_model.", "vae."),
        single_file=autoencoder_in_one.single_file_keys,
    )


_CLIP = Part(
    name="text_encoder",
    folder="text_encoder",
    config=_TEXT_L,
    build=clip.text_encoder_from_config,
    keys=lambda config: clip.TEXT_ENCODER_KEYS,
    prefixes=("cond_stage_model.transformer.", "conditioner.embedders.0.transformer."),
    single_file=clip_in_one.single_file_keys,
)
_OPEN_CLIP = Part(
    name="text_encoder",
    folder="text_encoder",
    config=_TEXT_H,
    build=clip.text_encoder_from_config,
    keys=lambda config: clip.TEXT_ENCODER_KEYS,
    prefixes=("cond_stage_model.model.",),
    single_file=clip_in_one.open_clip_keys,
)
_OPEN_CLIP_2 = Part(
    name="text_encoder_2",
    folder="text_encoder_2",
    config=_TEXT_BIG_G,
    build=clip.text_projection_from_config,
    keys=lambda config: clip.TEXT_PROJECTION_KEYS,
    prefixes=("conditioner.embedders.1.model.", "conditioner.embedders.0.model."),
    single_file=clip_in_one.open_clip_projection_keys,
)

_BY_THE_SOLVER = "a table of the noise schedule, which the solver computes"
_LEFT_OUT = {
    "model_ema": "the running mean of the weights, kept beside them for training",
    **dict.fromkeys(
        (
            *(f"{name}alphas_cumprod" for name in ("", "sqrt_", "sqrt_one_minus_", "log_one_minus_", "sqrt_recip_")),
            *("betas", "alphas_cumprod_prev", "sqrt_recipm1_alphas_cumprod", "denoiser.sigmas"),
            *("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
        ),
        _BY_THE_SOLVER,
    ),
    "logvar": "weighs the loss in training",
    "lvlb_weights": "weighs the loss in training",
    "scale_factor": "the scale of latents, which the configuration of the autoencoder holds",
    **dict.fromkeys(("global_step", "epoch"), "how long it was trained"),
}


def _sd(
    name: str,
    title: str,
    summary: str,
    parts: tuple[Part, ...],
    family: str,
    *,
    scheduler: Config,
    pipeline: Config | None = None,
    channels: int = 4,
) -> Bundle:
    return Bundle(
        name=name,
        title=title,
        summary=summary,
        recognises=lambda shapes: Traits.of(shapes) == Traits(family, channels),
        parts=parts,
        scheduler=scheduler,
        pipeline=pipeline or {},
        tokenizers=tuple(p.name.replace("text_encoder", "tokenizer") for p in parts if p.name.startswith("text")),
        ignore=_LEFT_OUT,
    )


_SD1_PARTS = (_autoencoder(_AUTOENCODER), _CLIP)
_SD2_PARTS = (_autoencoder({**_AUTOENCODER, "sample_size": 768}), _OPEN_CLIP)
_SDXL_PARTS = (_autoencoder(_SDXL_AUTOENCODER), _CLIP, _OPEN_CLIP_2)
_V = {"prediction_type": "v_prediction"}
_ZEROS = {"force_zeros_for_empty_prompt": True}
_REFINER = {"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True}
_SD2_768: Config = {"sample_size": 96, "upcast_attention": True}

BUNDLES: Mapping[str, Bundle] = {
    bundle.name: bundle
    for bundle in (
        _sd("sd15", "SD 1.5", "Stable Diffusion 1", (_unet(_SD1_UNET, 4), *_SD1_PARTS), "SD 1", scheduler=_PNDM),
        _sd(
            "sd15-inpainting",
            "SD 1.5 inpainting",
            "Stable Diffusion 1 for inpainting, 9 channels",
            (_unet(_SD1_UNET, 9), *_SD1_PARTS),
            "SD 1",
            scheduler=_PNDM,
            channels=9,
        ),
        _sd(
            "instruct-pix2pix",
            "InstructPix2Pix",
            "Stable Diffusion 1 for editing pictures, 8 channels",
            (_unet(_SD1_UNET, 8), *_SD1_PARTS),
            "SD 1",
            scheduler=_EULER_ANCESTRAL,
            channels=8,
        ),
        _sd(
            "sd21",
            "SD 2.1",
            "Stable Diffusion 2 for 768 pixels, predicts v",
            (_unet(_SD2_UNET, 4, **_SD2_768), *_SD2_PARTS),
            "SD 2",
            scheduler={**_DDIM, **_V},
        ),
        _sd(
            "sd21-base",
            "SD 2.1 base",
            "Stable Diffusion 2 for 512 pixels, predicts the noise",
            (_unet(_SD2_UNET, 4), *_SD2_PARTS),
            "SD 2",
            scheduler=_PNDM,
        ),
        _sd(
            "sd2-inpainting",
            "SD 2 inpainting",
            "Stable Diffusion 2 for inpainting, 9 channels",
            (_unet(_SD2_UNET, 9), *_SD2_PARTS),
            "SD 2",
            scheduler=_PNDM,
            channels=9,
        ),
        _sd(
            "sdxl",
            "SDXL base",
            "Stable Diffusion XL",
            (_unet(_SDXL_UNET, 4), *_SDXL_PARTS),
            "SDXL",
            scheduler=_EULER,
            pipeline=_ZEROS,
        ),
        _sd(
            "sdxl-inpainting",
            "SDXL inpainting",
            "Stable Diffusion XL for inpainting, 9 channels",
            (_unet(_SDXL_UNET, 9), *_SDXL_PARTS),
            "SDXL",
            scheduler=_EULER,
            pipeline=_ZEROS,
            channels=9,
        ),
        _sd(
            "sdxl-refiner",
            "SDXL refiner",
            "the second model of Stable Diffusion XL, for the last steps",
            (_unet(_REFINER_UNET, 4), _autoencoder(_SDXL_AUTOENCODER), _OPEN_CLIP_2),
            "SDXL refiner",
            scheduler=_EULER,
            pipeline=_REFINER,
        ),
        *KNOWN_BY_SIGHT,
    )
}
"""What `refiners convert` takes, by name."""
