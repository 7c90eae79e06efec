"""The two latents of a clip, and the Gaussian over them that the encoder predicts."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .tiling import ClipGeometry, is_whole

LatentShape = tuple[int, ...]
LatentLayout = tuple[LatentShape, LatentShape, ClipGeometry | None]


@dataclass
class TwinLatents:
    """Structure and dynamics latents of a batch of clips.

    A clip of another size than the model's is covered by N tiles (`autoencoder.tiling`). Its latents have one more
    axis, (B, N, ...), and the geometry that decoding requires.

    Attributes:
        structure: (B, d_S, n_q, h_S, w_S): content and slow motion.
        dynamics: (B, d_D, T, w_D + h_D): per-frame detail and fast motion; the first w_D positions are averages over
            height, the next h_D averages over width.
        geometry: of the tiles; None for clips of the model's size.
    """

    structure: torch.Tensor
    dynamics: torch.Tensor
    geometry: ClipGeometry | None = None

    def pack(self) -> torch.Tensor:
        """Pack both latents into one tensor (B, L), structure first, for schedulers and caches.

        With tiles (B, N * L), one tile after the other.
        """
        if self.geometry is None:
            return torch.cat([self.structure.flatten(1), self.dynamics.flatten(1)], dim=1)
        return torch.cat([self.structure.flatten(2), self.dynamics.flatten(2)], dim=2).flatten(1)

    @classmethod
    def unpack(
        cls,
        packed: torch.Tensor,
        structure_shape: LatentShape,
        dynamics_shape: LatentShape,
        geometry: ClipGeometry | None = None,
    ) -> TwinLatents:
        """Invert `pack`.

        Args:
            packed: (B, L), or (B, N * L) with a geometry of N tiles.
            structure_shape: (d_S, n_q, h_S, w_S).
            dynamics_shape: (d_D, T, w_D + h_D).
            geometry: of the clip, if it is covered by tiles.

        Raises:
            ValueError: if `packed` has another shape.
        """
        n_structure, n_dynamics = numel(structure_shape), numel(dynamics_shape)
        tiles = 1 if geometry is None else geometry.num_tiles
        expected = tiles * (n_structure + n_dynamics)
        if packed.ndim != 2 or packed.shape[1] != expected:
            covered = " (one tile; pass the geometry of several)" if geometry is None else f" in {tiles} tiles"
            raise ValueError(
                f"packed latents must be (B, {expected}) for structure {tuple(structure_shape)} "
                f"and dynamics {tuple(dynamics_shape)}{covered}, but have shape {tuple(packed.shape)}."
            )
        lead = (-1,) if geometry is None else (-1, tiles)
        structure, dynamics = packed.reshape(*lead, n_structure + n_dynamics).split([n_structure, n_dynamics], dim=-1)
        return cls(
            structure.unflatten(-1, tuple(structure_shape)), dynamics.unflatten(-1, tuple(dynamics_shape)), geometry
        )

    def to(self, *args, **kwargs) -> TwinLatents:
        """Convert both latents with `torch.Tensor.to`."""
        return TwinLatents(self.structure.to(*args, **kwargs), self.dynamics.to(*args, **kwargs), self.geometry)

    def tiles(self) -> list[TwinLatents]:
        """Return the latents of each tile, in order; without tiles, a list of itself."""
        if self.geometry is None:
            return [self]
        return [TwinLatents(s, d) for s, d in zip(self.structure.unbind(1), self.dynamics.unbind(1), strict=True)]

    def save(self, path: str | os.PathLike) -> None:
        """Save a .safetensors file: packed `latents`, with shapes and geometry in the metadata."""
        lead = 1 if self.geometry is None else 2
        shapes = tuple(self.structure.shape[lead:]), tuple(self.dynamics.shape[lead:])
        unfinished = f"{os.fspath(path)}.{os.getpid()}"  # an interrupted save keeps the old file
        try:
            # Not save_file, whose files other users cannot read (safetensors issue 782).
            data = save({"latents": self.pack().contiguous()}, layout_metadata(*shapes, self.geometry))
            Path(unfinished).write_bytes(data)
            os.replace(unfinished, path)
        finally:
            if os.path.exists(unfinished):
                os.remove(unfinished)

    @classmethod
    def load(cls, path: str | os.PathLike, device: str = "cpu") -> TwinLatents:
        """Load the latents that `save` wrote.

        Raises:
            ValueError: if `save` did not write the file.
        """
        try:
            with safe_open(path, "pt", device=device) as file:
                return cls.unpack(file.get_tensor("latents"), *read_layout(file.metadata()))
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{path} does not hold VidTwin latents: {error}") from error


def layout_metadata(
    structure_shape: LatentShape, dynamics_shape: LatentShape, geometry: ClipGeometry | None
) -> dict[str, str]:
    """Return the metadata of a file of packed latents: the arguments of `TwinLatents.unpack`."""
    layout = {
        "structure_shape": list(structure_shape),
        "dynamics_shape": list(dynamics_shape),
        "geometry": None if geometry is None else asdict(geometry),
    }
    return {"vidtwin_latents": json.dumps(layout)}


def read_layout(metadata: dict[str, str] | None) -> LatentLayout:
    """Invert `layout_metadata`.

    Raises:
        ValueError: if it is missing or invalid.
    """
    if "vidtwin_latents" not in (metadata or {}):
        raise ValueError("its metadata has no vidtwin_latents.")
    try:
        layout = json.loads(metadata["vidtwin_latents"])
        geometry = layout["geometry"]
        geometry = None if geometry is None else ClipGeometry(**geometry)
        shapes = tuple(layout["structure_shape"]), tuple(layout["dynamics_shape"])
        if not all(is_whole(size) and size >= 0 for shape in shapes for size in shape):
            raise ValueError(f"shapes {shapes}")
        return *shapes, geometry
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"its vidtwin_latents cannot be read ({error}).") from error


def numel(shape: LatentShape) -> int:
    """Return the number of values in a latent of this shape (without the batch)."""
    return torch.Size(shape).numel()


class TwinPosterior(DiagonalGaussianDistribution):
    """A diagonal Gaussian over packed latents.

    Diffusers' distribution, with the log-variance clamped to [-30, 20], for means and log-variances (B, L).
    `sample(generator)` and `mode()` return packed tensors (B, L), or `TwinLatents` with the geometry of a tiled clip.

    Attributes:
        layout: structure shape, dynamics shape and geometry of a tiled clip, else None.
    """

    def __init__(self, mean: torch.Tensor, logvar: torch.Tensor, layout: LatentLayout | None = None) -> None:
        super().__init__(torch.cat([mean, logvar], dim=1))
        self.layout = layout

    def sample(self, generator: torch.Generator | None = None) -> torch.Tensor | TwinLatents:
        """Draw a sample: packed (B, L), or `TwinLatents` of tiles."""
        return self._apply_layout(super().sample(generator))

    def mode(self) -> torch.Tensor | TwinLatents:
        """Return the mean: packed (B, L), or `TwinLatents` of tiles."""
        return self._apply_layout(super().mode())

    def _apply_layout(self, packed: torch.Tensor) -> torch.Tensor | TwinLatents:
        return packed if self.layout is None else TwinLatents.unpack(packed, *self.layout)

    def kl(self) -> torch.Tensor:
        """Compute the KL divergence to the standard normal in nats, summed over each clip's latent: (B,)."""
        return 0.5 * (self.mean.square() + self.var - 1.0 - self.logvar).sum(dim=1)

    def nll(self, sample: torch.Tensor | TwinLatents) -> torch.Tensor:
        """Compute the negative log-likelihood of latents, packed or not, in nats, summed over each clip: (B,)."""
        if isinstance(sample, TwinLatents):
            sample = sample.pack()
        log_2pi = torch.log(torch.tensor(2.0 * torch.pi, dtype=sample.dtype, device=sample.device))
        return 0.5 * (log_2pi + self.logvar + (sample - self.mean).square() / self.var).sum(dim=1)
