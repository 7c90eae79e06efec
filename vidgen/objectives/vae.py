"""What the autoencoder minimises. Every term is a mean over elements and a scalar tensor, kept on the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from autoencoder import AutoencoderKLVidTwin

from ..config import VAELossConfig

Losses = dict[str, torch.Tensor]


class VAEObjective(nn.Module):
    """L1 + KL (the paper's Equation 6 without its LPIPS and GAN terms, which join here as further terms).

    `l1_weight` multiplies the mean absolute error per value. `l2_weight` multiplies the mean squared error, which is
    ours, for short trainings: under L1 alone small things are long painted over by what surrounds them. `kl_weight`
    multiplies the KL divergence summed over a clip's latent and divided by the values of the clip: nats per pixel
    value, so that the weights mean the same at every size of clip and latent.
    """

    def __init__(self, vae: AutoencoderKLVidTwin, config: VAELossConfig) -> None:
        super().__init__()
        self.vae = vae
        self.l1_weight = config.l1_weight
        self.l2_weight = config.l2_weight
        self.kl_weight = config.kl_weight

    def forward(self, video: torch.Tensor, noise: torch.Tensor | None = None) -> Losses:
        """Clips (B, C, T, H, W) in [-1, 1] -> `loss` and its terms `l1`, `l2` and `kl`."""
        posterior = self.vae.encode(video).latent_dist
        noise = torch.randn_like(posterior.mean) if noise is None else noise
        reconstruction = self.vae.decode(posterior.mean + posterior.std * noise).sample.float()
        l1, l2 = F.l1_loss(reconstruction, video), F.mse_loss(reconstruction, video)
        kl = posterior.kl().float().mean() / video[0].numel()
        loss = self.l1_weight * l1 + self.l2_weight * l2 + self.kl_weight * kl
        return {"loss": loss, "l1": l1, "l2": l2, "kl": kl}
