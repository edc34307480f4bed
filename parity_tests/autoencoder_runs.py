"""Inputs of the cases of autoencoders, and what each side makes of them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from reference_ports import autoencoder

Inputs = Mapping[str, Any]
Outputs = Mapping[str, Tensor]


def draw(
    generator: torch.Generator,
    batch: int = 2,
    height: int = 20,
    width: int = 28,
    channels: int = 3,
    latents: int = 4,
    latent_size: tuple[int, int] = (5, 3),
) -> Inputs:
    """Pictures, and latents to decode."""
    return {
        "pixels": torch.randn(batch, channels, height, width, generator=generator),
        "latents": torch.randn(batch, latents, *latent_size, generator=generator),
    }


def with_moments(inputs: Callable[[torch.Generator], Inputs]) -> Callable[[torch.Generator], Inputs]:
    """One seed for each picture as well, and moments beyond the bounds of variances."""

    def drawn(generator: torch.Generator) -> Inputs:
        given = inputs(generator)
        batch = len(given["pixels"])
        moments = 30 * torch.randn(batch, 4, 3, 3, generator=generator)
        return {**given, "seeds": torch.arange(batch) + 7, "moments": moments}

    return drawn


def generators(inputs: Inputs) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(int(seed)) for seed in inputs["seeds"]]


def one_generator(inputs: Inputs) -> torch.Generator:
    return generators(inputs)[0]


def run_upstream(model: Any, inputs: Inputs, generator: Callable[[Inputs], Any] = generators) -> Outputs:
    posterior = model.encode(inputs["pixels"]).latent_dist
    held, likely = (DiagonalGaussianDistribution(inputs["moments"] * factor) for factor in (1, 0.1))
    return {
        "mean": posterior.mean,
        "log variance": posterior.logvar,
        "sample": posterior.sample(generator(inputs)),
        "decoded": model.decode(inputs["latents"]).sample,
        "held": held.logvar,
        "divergence": likely.kl(),
    }


def run_port(model: nn.Module, inputs: Inputs, generator: Callable[[Inputs], Any] = generators) -> Outputs:
    assert isinstance(model, autoencoder.AutoencoderKL)
    posterior = model.encode(inputs["pixels"])
    held, likely = (autoencoder.Posterior(inputs["moments"] * factor) for factor in (1, 0.1))
    return {
        "mean": posterior.mode(),
        "log variance": posterior.log_variance,
        "sample": posterior.sample(generator(inputs)),
        "decoded": model.decode(inputs["latents"]),
        "held": held.log_variance,
        "divergence": likely.divergence(),
    }


def run_upstream_both_ways(model: Any, inputs: Inputs) -> Outputs:
    """Scaled as the pipelines scale, which read the configuration."""
    config, latents = model.config, model.encode(inputs["pixels"]).latent_dist.mode()
    given = inputs["latents"]
    if config.latents_mean is not None:
        mean, deviation = (
            torch.tensor(x).view(1, -1, 1, 1).to(latents.dtype) for x in (config.latents_mean, config.latents_std)
        )
        scaled = (latents - mean) * config.scaling_factor / deviation
        unscaled = given * deviation / config.scaling_factor + mean
    elif config.shift_factor is not None:
        scaled = (latents - config.shift_factor) * config.scaling_factor
        unscaled = given / config.scaling_factor + config.shift_factor
    else:
        scaled, unscaled = config.scaling_factor * latents, given / config.scaling_factor
    return {"scaled": scaled, "decoded": model.decode(unscaled).sample, "both ways": model(inputs["pixels"]).sample}


def run_port_both_ways(model: nn.Module, inputs: Inputs) -> Outputs:
    assert isinstance(model, autoencoder.AutoencoderKL)
    scaled = model.scale(model.encode(inputs["pixels"]).mode())
    decoded = model.decode(model.unscale(inputs["latents"]))
    return {"scaled": scaled, "decoded": decoded, "both ways": model(inputs["pixels"])}


def run_upstream_tiny(model: Any, inputs: Inputs) -> Outputs:
    return {
        "latents": model.encode(inputs["pixels"]).latents,
        "decoded": model.decode(inputs["latents"]).sample,
        "shares": model.scale_latents(inputs["latents"]),
    }


def run_port_tiny(model: nn.Module, inputs: Inputs) -> Outputs:
    assert isinstance(model, autoencoder.AutoencoderTiny)
    return {
        "latents": model.encode(inputs["pixels"]).sample(),
        "decoded": model.decode(inputs["latents"]),
        "shares": model.ThroughBytes.to_shares(inputs["latents"]),
    }
