"""Training loss of the VAE. Every term is a mean over elements and a scalar on the device.

The gradients of the reconstruction terms are computed at the reconstruction first, each through its network only; then
one backward pass through the model starts from their sum. So the adaptive weight of the GAN is known before the
model's backward pass, activations of LPIPS exist for a few frames at a time, and a wrapped model needs no other code.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from autoencoder import AutoencoderKLVidTwin
from autoencoder.video_autoencoder import VideoAutoencoder

from ..losses import Losses
from ..losses.adversarial import DiscriminatorLoss
from ..losses.lpips import LPIPS
from .config import GANConfig, PerceptualConfig, VAELossConfig
from .latent_regularization import LatentRegularization

MAX_ADAPTIVE_WEIGHT = 1e4


class VAELoss(nn.Module):
    """L1 + LPIPS + GAN + KL: the paper's Equation 6.

        loss = l1_weight * l1 + l2_weight * l2 + perceptual.weight * lpips + gan_weight * gan + kl_weight * kl

    `l1` is the mean absolute error per value of clips in [-1, 1]. `l2`, the mean squared error, is an addition for
    short trainings: L1 alone ignores small objects for a long time. `lpips` is the mean over frames. `kl` is the KL
    divergence summed over a clip's latent and divided by the number of the clip's values (nats per value), so that
    the weights have the same meaning for all sizes of clip and latent. The released code sums both absolute errors and
    KL over a clip; its gradients are ours times the number of values, so its `kl_weight` is ours.

    `gan_weight` is `gan.weight` times the warmup factor of the step and, with `gan.adaptive`, times the ratio of two
    gradient norms at the decoder's last layer: that of the reconstruction terms (l1, l2 and lpips, weighted) to that
    of the GAN (Esser et al., "Taming Transformers", 2021, Equation 7). Both gradients are averaged over the processes
    first, so that the ratio is that of the global batch; each micro-batch has a different ratio.

    With `loss.equivariance` or `loss.nested_dropout`, some latents are changed before they are decoded, and some clips
    with them: l1, l2, lpips and gan compare with the changed clips (`vidgen.losses.latent_regularization`).

    Args:
        vae: the model.
        loss: weights of l1, l2 and KL, regularization of the latents.
        perceptual: config of `lpips`.
        gan: config of `discriminator`.
        lpips: adds the perceptual term. It is not a submodule: it is not saved, and the caller moves it to a device.
        discriminator: adds the GAN term. Its loss is part of the same call, so that one wrapper and one optimizer
            serve both; neither loss has a gradient in the other's parameters.

    Raises:
        UserError: if the model's clips are too small for LPIPS or the discriminator, or its latents do not support the
            regularization.
    """

    def __init__(
        self,
        vae: VideoAutoencoder,
        loss: VAELossConfig,
        perceptual: PerceptualConfig | None = None,
        gan: GANConfig | None = None,
        lpips: LPIPS | None = None,
        discriminator: DiscriminatorLoss | None = None,
    ) -> None:
        super().__init__()
        self.vae = vae
        self.loss = loss
        self.perceptual = perceptual or PerceptualConfig()
        self.gan = gan or GANConfig()
        self._lpips = (lpips,)  # a tuple hides it from nn.Module
        self.discriminator = discriminator
        is_regularized = loss.equivariance or loss.nested_dropout
        self._regularization = LatentRegularization(vae, loss) if is_regularized else None
        for critic in filter(None, (lpips, discriminator)):
            critic.check_size(*vae.clip_shape[-2:])
        self._last_layer_input: list[torch.Tensor] = []
        if discriminator is not None and self.gan.adaptive and isinstance(vae, AutoencoderKLVidTwin):
            vae.last_layer.register_forward_pre_hook(self._keep_last_layer_input)

    def forward(
        self,
        video: torch.Tensor,
        noise: torch.Tensor | None = None,
        gan_scale: torch.Tensor | None = None,
        uniform: torch.Tensor | None = None,
    ) -> Losses:
        """The loss on a batch.

        Args:
            video: clips (B, C, T, H, W) in [-1, 1].
            noise: standard normal (B, L), with which the latents are sampled; drawn here if not given.
            gan_scale: factor on the GAN's weight, a scalar. If not given, the discriminator is not run and its
                gradients are zero.
            uniform: random numbers in [0, 1), (B, 5) or more, which decide on the regularization of the latents; drawn
                here if not given.

        Returns:
            `loss`, whose gradient is that of both the VAE and the discriminator and whose value is the VAE's; and its
            terms, detached: `l1`, `l2`, `kl`, with LPIPS `lpips`, and with `gan_scale` also `gan`, `gan_weight` and
            the terms of `DiscriminatorLoss`.
        """
        (lpips,), discriminator = self._lpips, self.discriminator
        # Reconstruct the clips.
        posterior = self.vae.encode(video).latent_dist
        noise = torch.randn_like(posterior.mean) if noise is None else noise
        latents = posterior.mean + posterior.std * noise
        if self._regularization is not None:
            latents, video = self._regularization(latents, video, uniform)
        reconstruction = self.vae.decode(latents).sample.float()
        fake = reconstruction.detach()

        # Sum the terms of the reconstruction, and their gradients at it.
        l1, l1_gradient = value_and_gradient(lambda x: F.l1_loss(x, video), fake)
        l2, l2_gradient = value_and_gradient(lambda x: F.mse_loss(x, video), fake)
        kl = posterior.kl().float().mean() / video[0].numel()
        losses = {"l1": l1, "l2": l2, "kl": kl.detach()}
        value = self.loss.l1_weight * l1 + self.loss.l2_weight * l2
        gradient = self.loss.l1_weight * l1_gradient + self.loss.l2_weight * l2_gradient
        if lpips is not None:
            losses["lpips"], lpips_gradient = self._perceptual(fake, video, noise)
            value = value + self.perceptual.weight * losses["lpips"]
            gradient = gradient + self.perceptual.weight * lpips_gradient
        if discriminator is not None and gan_scale is not None:
            losses["gan"], gan_gradient = value_and_gradient(lambda x: discriminator(x)["loss"], fake)
            weight = self.gan.weight * gan_scale
            if self.gan.adaptive and torch.is_grad_enabled():
                weight = weight * self._adaptive_weight(reconstruction, gradient, gan_gradient)
            losses["gan_weight"] = weight
            value = value + weight * losses["gan"]
            gradient = gradient + weight * gan_gradient
        self._last_layer_input.clear()

        # Continue the gradient into the model; add the KL divergence.
        losses["loss"] = _KnownGradient.apply(reconstruction, value, gradient) + self.loss.kl_weight * kl

        # Add the gradient of the discriminator's loss, but not its value.
        if discriminator is not None:
            if gan_scale is not None:
                terms = discriminator(fake, video)
                discriminator_loss = terms.pop("loss")
                losses |= terms
            else:  # DDP expects a gradient of every parameter
                discriminator_loss = sum(0.0 * parameter.sum() for parameter in discriminator.parameters())
            losses["loss"] = losses["loss"] + (discriminator_loss - discriminator_loss.detach())
        return losses

    def _perceptual(
        self, fake: torch.Tensor, video: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean LPIPS over frames and its gradient, computed in chunks of frames; `noise` selects the frames."""
        (lpips,), size, clips = self._lpips, self.perceptual.chunk_size, torch.arange(len(fake), device=fake.device)
        frames = torch.arange(fake.shape[2], device=fake.device).expand(len(fake), -1)
        if (self.perceptual.num_frames or len(frames[0])) < len(frames[0]):
            frames = noise[:, : len(frames[0])].topk(self.perceptual.num_frames).indices.sort().values
        at = (clips.repeat_interleave(frames.shape[1]), slice(None), frames.flatten())
        images, targets = fake[at], video[at]
        value, gradients = fake.new_zeros(()), []
        for image, target in zip(images.split(size), targets.split(size), strict=True):
            share = len(image) / len(images)
            part, gradient = value_and_gradient(lambda x, target=target: lpips(x, target).mean(), image)
            value = value + share * part
            gradients.append(share * gradient)
        gradient = torch.zeros_like(fake)
        gradient[at] = torch.cat(gradients)
        return value, gradient

    def _keep_last_layer_input(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            self._last_layer_input[:] = [args[0].detach()]

    @torch.no_grad()
    def _adaptive_weight(
        self, reconstruction: torch.Tensor, gradient: torch.Tensor, gan_gradient: torch.Tensor
    ) -> torch.Tensor:
        """Ratio of the norms of both gradients (B, C, T, H, W) at the weight of the decoder's last layer."""
        if isinstance(self.vae, AutoencoderKLVidTwin):
            at_weight = self._project_on_last_layer(gradient, gan_gradient)
        else:  # any last layer: a backward pass from the clip to its weight
            weight = self.vae.last_layer.weight
            pair = (gradient, gan_gradient)
            at_weight = [torch.autograd.grad(reconstruction, weight, g, retain_graph=True)[0] for g in pair]
            at_weight = torch.stack(at_weight).float()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(at_weight)
            at_weight /= dist.get_world_size()
        norm, gan_norm = at_weight.flatten(1).norm(dim=1)
        return (norm / (gan_norm + 1e-6)).clamp(max=MAX_ADAPTIVE_WEIGHT)

    def _project_on_last_layer(self, gradient: torch.Tensor, gan_gradient: torch.Tensor) -> torch.Tensor:
        """Both gradients at the weight of VidTwin's last linear layer, from its input: (2, out, in)."""
        tokens = [self.vae.decoder.patchify(g) for g in (gradient, gan_gradient)]
        if not self._last_layer_input or self._last_layer_input[0].shape[:-1] != tokens[0].shape[:-1]:
            raise ValueError(
                "gan.adaptive=true needs a decoder that runs once per batch, on clips of the model's own size (T, H, "
                f"W) = {self.vae.clip_shape[1:]}, without slicing, and that was not compiled before its loss was "
                "created."
            )
        with torch.autocast(gradient.device.type, enabled=False):
            inputs = self._last_layer_input[0].float().flatten(0, -2)
            return torch.stack([g.flatten(0, -2).T @ inputs for g in tokens])


def value_and_gradient(
    function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The value and the gradient of a scalar function at x, both detached; a zero gradient under `no_grad`.

    The parameters of the function get no gradient.
    """
    x = x.detach().requires_grad_(torch.is_grad_enabled())
    value = function(x)
    if not x.requires_grad:
        return value, torch.zeros_like(x)
    # The gradient of a mean over many values is too small for float16; scale it to about 1.
    (gradient,) = torch.autograd.grad(value, x, torch.full_like(value, x.numel()))
    return value.detach(), gradient / x.numel()


class _KnownGradient(torch.autograd.Function):
    """A scalar `value` with a given gradient in x."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, value: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return upstream * gradient, None, None
