"""What the DiT minimizes: the denoising objective."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin
from torch import nn

from pipelines import VidTwinTransformer3DModel
from pipelines.classes import superclass_ids
from pipelines.schedulers import PREDICTION_TYPES, estimate_clean, noise_levels, prediction_type_of, spread_streams

from ..common.config import check_config
from ..common.errors import UserError
from ..losses import Losses
from .config import DiffusionConfig

DRAWS = 5  # numbers in [0, 1) that a clip's loss is drawn with, besides noise


class DiffusionLoss(nn.Module):
    """Mean squared error of the DiT's prediction on noised latents, at randomly drawn timesteps.

    The target is the scheduler's `prediction_type`: x0 (`sample`, the paper), `epsilon`, `v_prediction`, or
    `flow_prediction`, the velocity noise - clean. `loss_weighting` "none" leaves each target the weighting it has by
    itself; "min_snr" is Hang et al.'s (arXiv 2303.09556), see `min_snr_weight`.

    A timestep belongs to a clip, or for a share `independent_timesteps` of the clips to each of its streams: then the
    DiT also learns one stream while the other is clean or nearly so. A share `class_dropout` is given the null class,
    which guidance needs, and a share `subclass_dropout` the class above its own (`jump` for `jump/dog`), where there
    is one. A self-conditioned transformer is shown its own estimate of the clean latents for half of the
    clips, and none for the others (Chen et al., arXiv 2208.04202). The estimate is made for all, at the price of one
    more forward pass, so that a clip's loss does not depend on the batch it is in.

    Args:
        transformer: the DiT.
        scheduler: what it is sampled with.
        config: of the recipe.
        classes: names of the classes, by id; only `subclass_dropout` needs them.

    Raises:
        UserError: if a value of the config is unknown or out of range.
    """

    def __init__(
        self,
        transformer: VidTwinTransformer3DModel,
        scheduler: SchedulerMixin,
        config: DiffusionConfig,
        classes: Sequence[str] = (),
    ) -> None:
        super().__init__()
        check_diffusion(config)
        if config.subclass_dropout:
            if len(classes) != transformer.config.num_classes:
                raise UserError(
                    "diffusion.subclass_dropout needs the names of all classes of the transformer, "
                    f"{transformer.config.num_classes}, not {len(classes)}."
                )
            above = [*superclass_ids(classes), len(classes)]  # no class stays none
            self.register_buffer("superclass_ids", torch.tensor(above), persistent=False)
        self.transformer = transformer
        self.scheduler = scheduler
        self.config = config
        self.sizes = (math.prod(transformer.structure_shape), math.prod(transformer.dynamics_shape))

    def forward(
        self,
        latents: torch.Tensor,
        labels: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        uniform: torch.Tensor | None = None,
    ) -> Losses:
        """One step's loss. All that is random in it comes from `noise` and `uniform`, drawn here where not given.

        Args:
            latents: normalized and packed, (B, L).
            labels: class ids (B,); an unconditional transformer has no use for them.
            noise: standard normal (B, L).
            uniform: in [0, 1), (B, DRAWS) or more.

        Returns:
            `loss`, and each stream's own mean squared error, unweighted and detached: `structure`, `dynamics`.
        """
        noise = torch.randn_like(latents) if noise is None else noise
        uniform = torch.rand(len(latents), DRAWS, device=latents.device) if uniform is None else uniform
        first, second, independent, dropped, conditioned = uniform[:, :DRAWS].unbind(1)
        timestep = self._timesteps(first, second, independent)
        alpha, sigma = (spread_streams(level, self.sizes) for level in noise_levels(self.scheduler, timestep))
        noisy = alpha * latents + sigma * noise
        null_class = self.transformer.config.num_classes
        labels = None if null_class is None else self._drop(labels, dropped, null_class)
        estimate = None
        if self.transformer.config.self_conditioning:
            estimate = self._estimate(noisy, timestep, labels) * (conditioned < 0.5)[:, None]
        prediction = self.transformer(noisy, timestep, labels, self_condition=estimate).sample

        prediction_type = prediction_type_of(self.scheduler)
        target = denoising_target(prediction_type, latents, noise, alpha, sigma)
        error = F.mse_loss(prediction.float(), target, reduction="none")
        structure, dynamics = (
            part.mean() if part.numel() else part.sum() for part in error.detach().split(self.sizes, dim=1)
        )
        if self.config.loss_weighting == "min_snr":
            error = error * min_snr_weight(prediction_type, alpha, sigma, self.config.min_snr_gamma)
        return {"loss": error.mean(), "structure": structure, "dynamics": dynamics}

    def _drop(self, labels: torch.Tensor, dropped: torch.Tensor, null_class: int) -> torch.Tensor:
        """Classes (B,) with some exchanged for the class above or for none; of a uniform draw (B,)."""
        kept_until = self.config.class_dropout
        if self.config.subclass_dropout:
            widened = dropped < kept_until + self.config.subclass_dropout
            labels = torch.where(widened, self.superclass_ids[labels], labels)
        return labels.masked_fill(dropped < kept_until, null_class)

    def _timesteps(self, first: torch.Tensor, second: torch.Tensor, independent: torch.Tensor) -> torch.Tensor:
        """(B,) for both streams, or (B, 2) where some clips have one for each; of three uniform draws (B,)."""
        timestep = self._timestep(first)
        if self.config.independent_timesteps == 0:
            return timestep
        other = torch.where(independent < self.config.independent_timesteps, self._timestep(second), timestep)
        return torch.stack([timestep, other], dim=1)

    def _timestep(self, uniform: torch.Tensor) -> torch.Tensor:
        """Uniform draws (B,) as whole steps of a discrete schedule, or as any in [0, 1000) of flow matching's."""
        steps = self.scheduler.config.num_train_timesteps
        if self.config.timestep_sampling == "logit_normal":  # Esser et al., arXiv 2403.03206, section 3.1
            uniform = (self.config.logit_mean + self.config.logit_std * torch.special.ndtri(uniform)).sigmoid()
        if prediction_type_of(self.scheduler) == "flow_prediction":
            return steps * uniform
        return (steps * uniform).long().clamp(max=steps - 1)

    @torch.no_grad()
    def _estimate(self, noisy: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """The model's estimate of the clean latents (B, L), made without one."""
        prediction = self.transformer(noisy, timestep, labels).sample
        timestep = spread_streams(timestep, self.sizes)
        return estimate_clean(self.scheduler, prediction, timestep, noisy).to(noisy.dtype)


def check_diffusion(config: DiffusionConfig) -> None:
    """Raise a `UserError` for a value that its key excludes, or for fractions that exclude each other."""
    check_config(config, "diffusion")
    if config.class_dropout + config.subclass_dropout > 1:
        raise UserError(
            "diffusion.class_dropout and diffusion.subclass_dropout are fractions of the same clips, at most 1 in sum,"
            f" not {config.class_dropout} and {config.subclass_dropout}."
        )


def denoising_target(
    prediction_type: str, clean: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor
) -> torch.Tensor:
    """What the model should have said of alpha * clean + sigma * noise.

    Raises:
        ValueError: if the prediction type is unknown.
    """
    if prediction_type == "sample":
        return clean
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":  # Salimans and Ho, arXiv 2202.00512
        return alpha * noise - sigma * clean
    if prediction_type == "flow_prediction":  # Liu et al., arXiv 2209.03003; Diffusers' time runs toward the noise
        return noise - clean
    raise ValueError(f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}, not {prediction_type!r}.")


def min_snr_weight(prediction_type: str, alpha: torch.Tensor, sigma: torch.Tensor, gamma: float) -> torch.Tensor:
    """The weight of a squared error that makes it min(SNR, gamma) times that of x0, SNR = alpha^2 / sigma^2.

    Hang et al., arXiv 2303.09556, section 3.4. The error of x0 is that of the noise over SNR, that of v over SNR + 1
    and that of the flow's velocity times sigma^2; written so that neither end of the schedule divides 0 by 0. At zero
    terminal SNR all but the noise's are 0: nothing of x0 can be told there.
    """
    signal, noise = alpha.square(), sigma.square()
    if prediction_type == "sample":
        return (signal / noise).clamp(max=gamma)
    if prediction_type == "epsilon":
        return (gamma * noise / signal).clamp(max=1)
    return torch.minimum(signal, gamma * noise)  # v: over (SNR + 1), and alpha^2 + sigma^2 = 1; flow: times sigma^2
