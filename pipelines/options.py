"""Options of a pipeline's models, by the names that Diffusers' pipelines have for them."""

from __future__ import annotations

from typing import Any

from autoencoder.video_autoencoder import VideoAutoencoder


class OptionsMixin:
    """Slicing and tiling of the autoencoder, and fused projections of the transformer."""

    autoencoder: VideoAutoencoder | None
    transformer: Any

    def enable_vae_slicing(self) -> None:
        """Encode and decode one clip of a batch at a time, to save memory."""
        self._require_vae("enable_vae_slicing").enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Encode and decode whole batches; the default."""
        self._require_vae("disable_vae_slicing").disable_slicing()

    def enable_vae_tiling(self, *args: Any, **kwargs: Any) -> None:
        """Accept clips of any size; the default. The arguments are those of `vae.enable_tiling`."""
        self._require_vae("enable_vae_tiling").enable_tiling(*args, **kwargs)

    def disable_vae_tiling(self) -> None:
        """Accept only clips of the model's size."""
        self._require_vae("disable_vae_tiling").disable_tiling()

    def fuse_qkv_projections(self) -> None:
        """Compute query, key and value of the transformer's attention by one matrix product."""
        self.transformer.fuse_qkv_projections()

    def unfuse_qkv_projections(self) -> None:
        """Undo `fuse_qkv_projections`."""
        self.transformer.unfuse_qkv_projections()

    def _require_vae(self, method: str) -> VideoAutoencoder:
        if self.autoencoder is None:
            raise ValueError(f"{method} requires a vae, but this pipeline has none.")
        return self.autoencoder
