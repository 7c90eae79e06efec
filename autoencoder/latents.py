"""The two latents of a clip, and the Gaussian the encoder predicts over them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

LatentShape = tuple[int, ...]


@dataclass
class TwinLatents:
    """Structure and dynamics latents of a batch of clips.

    Attributes:
        structure: (B, d_S, n_q, h_S, w_S): what is there and how it slowly moves.
        dynamics: (B, d_D, T, w_D + h_D): per-frame detail and fast motion; the first w_D positions are averages over
            height, the next h_D averages over width.
    """

    structure: torch.Tensor
    dynamics: torch.Tensor

    def pack(self) -> torch.Tensor:
        """Both latents as one (B, L) tensor, structure flattened first: what schedulers and caches work on."""
        return torch.cat([self.structure.flatten(1), self.dynamics.flatten(1)], dim=1)

    @classmethod
    def unpack(cls, packed: torch.Tensor, structure_shape: LatentShape, dynamics_shape: LatentShape) -> TwinLatents:
        """The inverse of `pack`.

        Args:
            packed: (B, L).
            structure_shape: (d_S, n_q, h_S, w_S).
            dynamics_shape: (d_D, T, w_D + h_D).

        Raises:
            ValueError: if `packed` is not (B, L) with L the size of both shapes together.
        """
        n_structure, n_dynamics = numel(structure_shape), numel(dynamics_shape)
        if packed.ndim != 2 or packed.shape[1] != n_structure + n_dynamics:
            raise ValueError(
                f"packed latents must be (B, {n_structure + n_dynamics}) for structure {tuple(structure_shape)} "
                f"and dynamics {tuple(dynamics_shape)}, but have shape {tuple(packed.shape)}."
            )
        structure, dynamics = packed.split([n_structure, n_dynamics], dim=1)
        return cls(structure.unflatten(1, tuple(structure_shape)), dynamics.unflatten(1, tuple(dynamics_shape)))

    def to(self, *args, **kwargs) -> TwinLatents:
        """Both latents through `torch.Tensor.to`."""
        return TwinLatents(self.structure.to(*args, **kwargs), self.dynamics.to(*args, **kwargs))


def numel(shape: LatentShape) -> int:
    """The number of values in a latent of this shape (without the batch)."""
    return torch.Size(shape).numel()


class TwinPosterior(DiagonalGaussianDistribution):
    """A diagonal Gaussian over packed latents.

    Diffusers' distribution with the log-variance clamped to [-30, 20], for (B, L) means and log-variances:
    `sample(generator)` and `mode()` give packed (B, L) tensors.
    """

    def __init__(self, mean: torch.Tensor, logvar: torch.Tensor) -> None:
        super().__init__(torch.cat([mean, logvar], dim=1))

    def kl(self) -> torch.Tensor:
        """KL divergence to the standard normal in nats, summed over each clip's latent: (B,)."""
        return 0.5 * (self.mean.square() + self.var - 1.0 - self.logvar).sum(dim=1)

    def nll(self, sample: torch.Tensor) -> torch.Tensor:
        """Negative log-likelihood of packed latents (B, L) in nats, summed over each clip's latent: (B,)."""
        log_2pi = torch.log(torch.tensor(2.0 * torch.pi, dtype=sample.dtype, device=sample.device))
        return 0.5 * (log_2pi + self.logvar + (sample - self.mean).square() / self.var).sum(dim=1)
