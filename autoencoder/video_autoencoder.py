"""The protocol of video autoencoders: what training, sampling, caches and benchmarks require of a model.

`AutoencoderKLVidTwin` is one; `autoencoder.adapters` makes those of Diffusers and transformers others.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from .latents import LatentShape, TwinLatents, TwinPosterior, numel
from .tiling import Blender, ClipGeometry, check_stride, cut

Components = Literal["both", "structure", "dynamics"]


class VideoAutoencoder(AutoencoderMixin):
    """Encodes clips (B, C, T, H, W) in [-1, 1] to a Gaussian over packed latents (B, L), and decodes latents.

    A latent has two streams: structure (C_S, *grid) and dynamics (C_D, *grid). An autoencoder with one latent has an
    empty dynamics stream, with 0 channels. Clips of another size than `clip_shape` are cut into overlapping tiles of
    this size, and the decoded tiles are blended.

    A subclass, which is also an `nn.Module`, defines the attributes below, `_encode` and `_decode`.

    Attributes:
        clip_shape: (C, T, H, W) of the clips that the model is built for, or set to.
        min_size: smallest height and width of a clip in pixels.
        structure_shape, dynamics_shape: of the latents of such a clip, without the batch.
        latents_mean, latents_std: mean and standard deviation of latents over a training set: one number per stream,
            or one per channel, structure first; None if unknown. Trainers and pipelines apply them; `encode` and
            `decode` never do.
        normalizes_channels: whether measured statistics are of each channel, or of each stream.
        encoder_modules: names of the modules that `encode` uses; caches of latents depend on these only.
        last_layer: the last layer with weights of the decoder, whose gradient scales a GAN loss.
    """

    clip_shape: tuple[int, int, int, int]
    min_size: int
    structure_shape: LatentShape
    dynamics_shape: LatentShape
    latents_mean: list[float] | None
    latents_std: list[float] | None
    normalizes_channels: bool = True
    encoder_modules: tuple[str, ...]
    last_layer: nn.Module
    use_slicing: bool = False
    use_tiling: bool = True
    _tile_strides: tuple[int | None, int | None, int | None] = (None, None, None)

    @abstractmethod
    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        """Clips (B, *clip_shape) -> packed means and log-variances (B, 2 L)."""

    @abstractmethod
    def _decode(self, z: TwinLatents, components: Components) -> torch.Tensor:
        """Latents of clips of the model's size -> clips (B, *clip_shape)."""

    @abstractmethod
    def set_latent_statistics(self, mean: list[float], std: list[float]) -> None:
        """Set `latents_mean` and `latents_std`, which `save_pretrained` saves where the model's config has them."""

    @abstractmethod
    def fit_clip_size(self, num_frames: int, height: int, width: int) -> None:
        """Choose `clip_shape` for clips of this size; models with a fixed size do nothing."""

    @abstractmethod
    def fit_latent_shape(self, structure_shape: LatentShape) -> None:
        """Choose `clip_shape` for latents of this shape; models with a fixed size do nothing."""

    # --- sizes -----------------------------------------------------------------------------------------------------

    @property
    def latent_size(self) -> int:
        """Number L of values in a packed latent."""
        return numel(self.structure_shape) + numel(self.dynamics_shape)

    @property
    def compression_rate(self) -> float:
        """Values in the latent over values in the clip; 0.002046 for the default of VidTwin's paper."""
        return self.latent_size / numel(self.clip_shape)

    @property
    def backbone(self) -> nn.Module:
        """The model that is saved, hashed and registered in pipelines: this one, or the one in an adapter."""
        return self

    @property
    def has_dynamics(self) -> bool:
        """Whether the dynamics stream has values; if not, the latent is one stream."""
        return numel(self.dynamics_shape) > 0

    def unpack(self, packed: torch.Tensor, geometry: ClipGeometry | None = None) -> TwinLatents:
        """Unpack latents (B, L) into `TwinLatents` of this model's shapes; (B, N * L) with a geometry of N tiles."""
        return TwinLatents.unpack(packed, self.structure_shape, self.dynamics_shape, geometry)

    # --- clips of other sizes --------------------------------------------------------------------------------------

    def enable_tiling(
        self,
        tile_sample_min_height: int | bool | None = None,
        tile_sample_min_width: int | None = None,
        tile_sample_min_num_frames: int | None = None,
        tile_sample_stride_height: int | None = None,
        tile_sample_stride_width: int | None = None,
        tile_sample_stride_num_frames: int | None = None,
        *,
        use_tiling: bool = True,
    ) -> None:
        """Accept clips of any size by cutting them into tiles of the model's size; the default.

        The parameters are those of Diffusers' video autoencoders.

        Args:
            tile_sample_min_height, tile_sample_min_width, tile_sample_min_num_frames: the size of a tile, which can
                only be the size of the model.
            tile_sample_stride_height, tile_sample_stride_width: pixels from one tile to the next; the overlap is
                blended. None: unchanged, initially three quarters of a tile.
            tile_sample_stride_num_frames: frames from one window to the next. None: unchanged, initially three
                quarters of a tile.
            use_tiling: False disables tiling, as `disable_tiling` does; also accepted as the first argument, as in
                older autoencoders.

        Raises:
            ValueError: if a stride is not a whole number between 1 and the size of a tile, or the size of a tile is
                not that of the model.
        """
        if isinstance(tile_sample_min_height, bool):
            tile_sample_min_height, use_tiling = None, tile_sample_min_height
        if not isinstance(use_tiling, bool):
            raise ValueError(f"use_tiling must be True or False, not {use_tiling!r}.")
        tile, strides = self.clip_shape[1:], list(self._tile_strides)
        for axis, (name, size, requested_size, stride) in enumerate(
            [
                ("num_frames", tile[0], tile_sample_min_num_frames, tile_sample_stride_num_frames),
                ("height", tile[1], tile_sample_min_height, tile_sample_stride_height),
                ("width", tile[2], tile_sample_min_width, tile_sample_stride_width),
            ]
        ):
            if requested_size is not None and (isinstance(requested_size, bool) or requested_size != size):
                raise ValueError(
                    f"tile_sample_min_{name} can only be {size}, the size of the model, not {requested_size!r}. "
                    f"tile_sample_stride_{name} sets how much tiles overlap."
                )
            if stride is not None:
                strides[axis] = check_stride(f"tile_sample_stride_{name}", stride, size)
        self._tile_strides = tuple(strides)
        self.use_tiling = use_tiling

    def geometry(self, num_frames: int, height: int, width: int) -> ClipGeometry | None:
        """Return the tiles that cover a clip of this size; None for the size of the model.

        Raises:
            ValueError: if the clip has no frame, is smaller than `min_size`, or has another size while tiling is off.
        """
        size, tile = (num_frames, height, width), self.clip_shape[1:]
        if size == tile:
            return None
        if num_frames < 1 or min(height, width) < self.min_size:
            raise ValueError(
                f"A clip must have one frame and {self.min_size} x {self.min_size} pixels or more, "
                f"but (T, H, W) = {size}."
            )
        if not self.use_tiling:
            raise ValueError(f"Without tiling, clips must be (T, H, W) = {tile}, not {size}: call enable_tiling().")
        strides = [
            min(stride or max(3 * length // 4, 1), length)
            for stride, length in zip(self._tile_strides, tile, strict=True)
        ]
        return ClipGeometry(size, tile, tuple(strides))

    # --- encode, decode --------------------------------------------------------------------------------------------

    @apply_forward_hook
    def encode(self, x: torch.Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[TwinPosterior]:
        """Encode clips to the posterior over their packed latents.

        Args:
            x: clips (B, C, T, H, W) in [-1, 1].
            return_dict: whether to return an `AutoencoderKLOutput` or a tuple.

        Raises:
            ValueError: if the size or the number of channels is not supported.
        """
        if x.ndim != 5 or x.shape[0] == 0 or x.shape[1] != self.clip_shape[0]:
            raise ValueError(
                f"Clips must be (B, C, T, H, W) = (B, {', '.join(map(str, self.clip_shape))}), or of other T, H and W "
                f"with tiling, but have shape {tuple(x.shape)}."
            )
        geometry = self.geometry(*x.shape[2:])
        if geometry is None:
            mean, logvar = self._encode_sliced(x).chunk(2, dim=1)
            posterior = TwinPosterior(mean, logvar)
        else:
            moments = [self._encode_sliced(tile) for tile in cut(x, geometry)]
            mean, logvar = torch.stack(moments, dim=1).chunk(2, dim=2)
            layout = (self.structure_shape, self.dynamics_shape, geometry)
            posterior = TwinPosterior(mean.flatten(1), logvar.flatten(1), layout)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def _encode_sliced(self, x: torch.Tensor) -> torch.Tensor:
        if self.use_slicing and x.shape[0] > 1:
            return torch.cat([self._encode(part) for part in x.split(1)])
        return self._encode(x)

    @apply_forward_hook
    def decode(
        self, z: torch.Tensor | TwinLatents, components: Components = "both", return_dict: bool = True
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Decode latents to clips (B, C, T, H, W), about [-1, 1], not clamped.

        Args:
            z: packed latents (B, L) or `TwinLatents`; for tiled clips, `TwinLatents` with their geometry.
            components: `"both"`, or `"structure"` or `"dynamics"` to decode only one of the two latents.
            return_dict: whether to return a `DecoderOutput` or a tuple.

        Raises:
            ValueError: if the latents have another size or `components` is unknown.
        """
        if components not in ("both", "structure", "dynamics"):
            raise ValueError(f'components must be "both", "structure" or "dynamics", not {components!r}.')
        # Packing and unpacking checks the shapes of both forms.
        geometry = z.geometry if isinstance(z, TwinLatents) else None
        latents = self.unpack(z.pack() if isinstance(z, TwinLatents) else z, geometry)
        if geometry is None:
            sample = self._decode_sliced(latents, components)
        else:
            if geometry.tile != self.clip_shape[1:]:
                raise ValueError(
                    f"The latents are of tiles (T, H, W) = {geometry.tile}, but this model has tiles "
                    f"{self.clip_shape[1:]}."
                )
            blender = Blender(geometry)
            for tile in latents.tiles():
                blender.add(self._decode_sliced(tile, components))
            sample = blender.clip()
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def _decode_sliced(self, z: TwinLatents, components: Components) -> torch.Tensor:
        if self.use_slicing and z.structure.shape[0] > 1:
            return torch.cat([self._decode(self.unpack(part), components) for part in z.pack().split(1)])
        return self._decode(z, components)

    def forward(
        self,
        sample: torch.Tensor,
        sample_posterior: bool = False,
        components: Components = "both",
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Encode and decode clips (B, C, T, H, W); the latent is the mean, or a sample if `sample_posterior`."""
        posterior = self.encode(sample).latent_dist
        z = posterior.sample(generator=generator) if sample_posterior else posterior.mode()
        return self.decode(z, components=components, return_dict=return_dict)
