"""Adversarial loss: the patch discriminator, its loss, and that of the autoencoder against it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from ..common.config import check_config
from ..common.errors import UserError
from ..losses import Losses
from .config import GANConfig

LECAM_DECAY = 0.99


def gan_scale(step: int, config: GANConfig) -> float:
    """The factor on the GAN's weight after `step` optimizer steps: 0 before `start_step`, then growing to 1."""
    if config.weight == 0 or step < config.start_step:
        return 0.0
    return min((step - config.start_step + 1) / (config.warmup_steps + 1), 1.0)


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017, Section 3.2.2): one logit per patch, of 70 x 70 pixels with 3 downsampling layers.

    The first layer and `num_layers - 1` more halve the size, one more keeps it, and the last computes the logits. In
    `"3d"` the downsampling layers span 3 frames and also halve the number of frames; 3 of them see 15 frames.
    GroupNorm replaces the original's BatchNorm: then a clip's logits do not depend on its batch, and micro-batches on
    any number of processes have the gradients of the complete batch.

    Args:
        config: `discriminator`, `channels` and `num_layers` are used.
        in_channels: color channels of a clip.

    Raises:
        UserError: if a value of the config is wrong.
    """

    def __init__(self, config: GANConfig, in_channels: int = 3) -> None:
        super().__init__()
        check_config(config, "gan")
        self.frames = config.discriminator == "2d"
        self.num_layers = config.num_layers
        widths = [config.channels * min(2**i, 8) for i in range(config.num_layers + 1)]
        layers: list[nn.Module] = [self._conv(in_channels, widths[0], stride=2), nn.LeakyReLU(0.2, inplace=True)]
        for i, (narrow, wide) in enumerate(zip(widths, widths[1:], strict=False), start=1):
            stride = 2 if i < config.num_layers else 1
            layers += [
                self._conv(narrow, wide, stride, bias=False),
                nn.GroupNorm(math.gcd(wide, 8), wide),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        self.layers = nn.Sequential(*layers, self._conv(widths[-1], 1, stride=1))

    def check_size(self, height: int, width: int) -> None:
        """Raise a `UserError` if frames of this size are too small."""
        least = 3 * 2**self.num_layers
        if min(height, width) < least:
            raise UserError(
                f"The discriminator halves frames {self.num_layers} times, so they need {least} x {least} pixels or "
                f"more, not {height} x {width}; lower gan.num_layers, or train without it: gan.weight=0."
            )

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """Clips (B, C, T, H, W) in [-1, 1] -> logits in float32, high for real: (B * T, 1, h, w) or (B, 1, t, h, w).

        Raises:
            UserError: if the frames are too small.
        """
        self.check_size(*clips.shape[-2:])
        return self.layers(clips.transpose(1, 2).flatten(0, 1) if self.frames else clips).float()

    def _conv(self, in_channels: int, out_channels: int, stride: int, bias: bool = True) -> nn.Module:
        if self.frames:
            conv = nn.Conv2d(in_channels, out_channels, 4, stride, padding=1, bias=bias)
        else:
            # Layers without downsampling span one frame: with a kernel of three over two padded frames, oneDNN's
            # bfloat16 gradient reads uninitialized memory (PyTorch 2.13 on a CPU).
            span = 3 if stride == 2 else 1
            kernel, padding = (span, 4, 4), (span // 2, 1, 1)
            conv = nn.Conv3d(in_channels, out_channels, kernel, stride, padding, bias=bias)
        nn.init.normal_(conv.weight, std=0.02)
        return conv


class DiscriminatorLoss(nn.Module):
    """Adversarial losses of the discriminator and of the generator, in one module.

    | `gan.loss` | discriminator | generator |
    |---|---|---|
    | `hinge` (Lim and Ye 2017) | mean of relu(1 - real) and relu(1 + fake), halved | -fake |
    | `non_saturating` (Goodfellow et al. 2014) | softplus(-real) and softplus(fake), halved | softplus(-fake) |

    LeCAM (Tseng et al., "Regularizing Generative Adversarial Networks under Limited Data", 2021, Equation 4, one-sided
    as in the authors' code) penalizes real logits above the running mean of fake logits, and fake logits below that of
    real logits, from the second step on.

    Attributes:
        lecam_means: running means (2,) of real and fake logits.
        lecam_updates: number of updates of these means.

    Raises:
        UserError: if a value of the config is wrong.
    """

    def __init__(self, discriminator: PatchDiscriminator, config: GANConfig) -> None:
        super().__init__()
        check_config(config, "gan")
        self.discriminator = discriminator
        self.loss = config.loss
        self.lecam_weight = config.lecam_weight
        self.register_buffer("lecam_means", torch.zeros(2))
        self.register_buffer("lecam_updates", torch.zeros((), dtype=torch.long))

    def check_size(self, height: int, width: int) -> None:
        """Raise a `UserError` if frames of this size are too small for the discriminator."""
        self.discriminator.check_size(height, width)

    def forward(self, fake: torch.Tensor, real: torch.Tensor | None = None) -> Losses:
        """The discriminator's loss, given both clips; the generator's loss, given `fake` only.

        Args:
            fake: reconstructions (B, C, T, H, W) in about [-1, 1]; detach them for the discriminator's loss.
            real: clips of the same shape.

        Returns:
            `loss`; with `real` also its terms `d_loss` and, if weighted, `lecam`, and the mean logits `d_real` and
            `d_fake`.
        """
        if real is None:
            logits = self.discriminator(fake)
            return {"loss": -logits.mean() if self.loss == "hinge" else F.softplus(-logits).mean()}
        fake_logits, real_logits = self.discriminator(torch.cat([fake, real])).chunk(2)
        if self.loss == "hinge":
            d_loss = 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())
        else:
            d_loss = 0.5 * (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean())
        losses = {
            "loss": d_loss,
            "d_loss": d_loss.detach(),
            "d_real": real_logits.detach().mean(),
            "d_fake": fake_logits.detach().mean(),
        }
        if self.lecam_weight:
            real_mean, fake_mean = self.lecam_means
            lecam = F.relu(real_logits - fake_mean).square().mean() + F.relu(real_mean - fake_logits).square().mean()
            lecam = lecam * (self.lecam_updates > 0)
            losses["loss"] = d_loss + self.lecam_weight * lecam
            losses["lecam"] = lecam.detach()
        return losses

    @torch.no_grad()
    def update_lecam(self, d_real: torch.Tensor, d_fake: torch.Tensor) -> None:
        """Update LeCAM's running means, once per optimizer step. Values that are not finite are ignored.

        Args:
            d_real, d_fake: mean logits of the global batch, over all processes and micro-batches.
        """
        # At first the mean of all steps, so that the first steps do not dominate.
        decay = (self.lecam_updates / (self.lecam_updates + 1)).clamp(max=LECAM_DECAY)
        means = self.lecam_means.lerp(torch.stack([d_real, d_fake]).float(), 1 - decay)
        finite = means.isfinite().all()
        self.lecam_means.copy_(torch.where(finite, means, self.lecam_means))
        self.lecam_updates += finite
