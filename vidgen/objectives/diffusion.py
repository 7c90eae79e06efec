"""What the DiT minimises: the denoising objective."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin
from torch import nn

from pipelines import VidTwinTransformer3DModel
from pipelines.sampling import estimate_clean

from ..config import DiffusionConfig
from .vae import Losses


class DiffusionObjective(nn.Module):
    """Mean squared error of the DiT's prediction on noised latents, at uniformly drawn timesteps.

    The target is the scheduler's `prediction_type`: x0 (`sample`, the paper), `epsilon` or `v_prediction`. A share
    `class_dropout` of the clips is given the null class, which guidance needs. A self-conditioned transformer is
    shown its own estimate of the clean latents for one half of the batch, and none for the other (Chen et al., arXiv
    2208.04202).
    """

    def __init__(
        self, transformer: VidTwinTransformer3DModel, scheduler: SchedulerMixin, config: DiffusionConfig
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.scheduler = scheduler
        self.class_dropout = config.class_dropout

    def forward(self, latents: torch.Tensor, labels: torch.Tensor | None = None) -> Losses:
        """Normalised packed latents (B, L) and their class ids (B,) -> `loss`."""
        noise = torch.randn_like(latents)
        steps = self.scheduler.config.num_train_timesteps
        timestep = torch.randint(steps, (latents.shape[0],), device=latents.device)
        noisy = self.scheduler.add_noise(latents, noise, timestep)
        null_class = self.transformer.config.num_classes
        if null_class is not None:
            dropped = torch.rand(labels.shape, device=labels.device) < self.class_dropout
            labels = labels.masked_fill(dropped, null_class)
        estimate = self._estimate(noisy, timestep, labels) if self.transformer.config.self_conditioning else None
        prediction = self.transformer(noisy, timestep, labels, self_condition=estimate).sample
        return {"loss": F.mse_loss(prediction.float(), self._target(latents, noise, timestep))}

    @torch.no_grad()
    def _estimate(self, noisy: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        half = (len(noisy) + 1) // 2
        noisy_half, timestep, labels = noisy[:half], timestep[:half], None if labels is None else labels[:half]
        prediction = self.transformer(noisy_half, timestep, labels).sample
        estimate = estimate_clean(self.scheduler, prediction, timestep, noisy_half)
        return torch.cat([estimate.to(noisy.dtype), torch.zeros_like(noisy[half:])])

    def _target(self, latents: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        prediction_type = self.scheduler.config.prediction_type
        if prediction_type == "sample":
            return latents
        if prediction_type == "epsilon":
            return noise
        if prediction_type == "v_prediction":
            return self.scheduler.get_velocity(latents, noise, timestep)
        raise ValueError(f"prediction_type must be sample, epsilon or v_prediction, not {prediction_type!r}.")
