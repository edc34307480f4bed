"""Solvers on the timesteps of the training: the noise at a timestep is what ᾱ says there (arXiv:2006.11239)."""

from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from reference_ports.solvers.noise import Betas, alphas_cumprod_of
from reference_ports.solvers.parameters import BetaParameters, TimestepSpacing
from reference_ports.solvers.prediction import Sample
from reference_ports.solvers.solver import Solver, column
from reference_ports.solvers.spacing import spaced_timesteps
from refiners.errors import InputError


@dataclass(frozen=True, kw_only=True)
class AlphaParameters(BetaParameters):
    """Where the timesteps of the schedule stand among those of the training."""

    timestep_spacing: TimestepSpacing = "leading"
    steps_offset: int = 0


A = TypeVar("A", bound=AlphaParameters)


class AlphaSolver(Solver[A]):
    """A solver whose noise levels are those of the training.

    `alphas_cumprod` holds ᾱ at every timestep of the training.
    """

    alphas_cumprod: Betas

    def make_schedule(self) -> None:
        self.alphas_cumprod = alphas_cumprod_of(self.params)
        self.timesteps = torch.tensor(self.spaced(), dtype=torch.int64, device="cpu")
        self._check_timesteps(self.timesteps)

    def spaced(self) -> list[int]:
        """The timesteps of the schedule."""
        own, count = self.params, self.num_inference_steps
        spaced = spaced_timesteps(own.timestep_spacing, own.num_train_timesteps, count, offset=own.steps_offset)
        return spaced.round().astype(int).tolist()

    def add_noise_at(self, x: Sample, noise: Sample, timesteps: Int[Tensor, "batch"]) -> Sample:
        """The sample as noisy as the training has it at a timestep for each item of the batch, in the schedule or not.

        Raises:
            InputError: they are no timesteps of the training.
        """
        kept, added = self._shares(x, timesteps)
        return kept * x + added * noise

    def velocity_at(self, x: Sample, noise: Sample, timesteps: Int[Tensor, "batch"]) -> Sample:
        """What a denoiser of `v_prediction` is trained to predict (arXiv:2202.00512).

        Raises:
            InputError: they are no timesteps of the training.
        """
        kept, added = self._shares(x, timesteps)
        return kept * noise - added * x

    def _mix(self, x: Sample, noise: Sample, index: Tensor) -> Sample:
        return self.add_noise_at(x, noise, self.timesteps[index])

    def _shares(self, x: Sample, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        self._check_timesteps(timesteps)
        alphas_cumprod = self.alphas_cumprod.to(x.dtype)[timesteps.cpu()]  # rounded before the roots, as upstream does
        return column(alphas_cumprod**0.5, x), column((1 - alphas_cumprod) ** 0.5, x)

    def _check_timesteps(self, timesteps: Tensor) -> None:
        count = self.params.num_train_timesteps
        if timesteps.is_floating_point() or timesteps.min() < 0 or timesteps.max() >= count:
            raise InputError(f"{timesteps} are not all timesteps of the training, which are 0 to {count - 1}.")

    def _alphas_at(self, timesteps: Tensor, final: float | Tensor) -> Tensor:
        """ᾱ at some timesteps, and the final one where they lie before the first."""
        return torch.where(timesteps >= 0, self.alphas_cumprod[timesteps.clamp(min=0)], final)
