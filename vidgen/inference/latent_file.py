"""A video's latents as a file, written and read window by window.

A .safetensors file that `TwinLatents.load` reads whole: the packed `latents` (1, N * L) in the order of the windows,
and in its metadata the shapes and the geometry, the rate of the video and the hash of the model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from autoencoder import AutoencoderKLVidTwin, TwinLatents
from autoencoder.latents import layout_metadata, read_layout
from autoencoder.tiling import ClipGeometry

from ..common.errors import UserError
from ..common.io import atomic_write
from .streaming import WindowLatents, window_geometry, window_starts

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def write_latents(
    path: str | os.PathLike,
    video: Iterable[WindowLatents],
    vae: AutoencoderKLVidTwin,
    geometry: ClipGeometry,
    fps: Fraction,
    model_hash: str,
) -> Path:
    """Write the latents of a video as they come; the file appears when whole.

    Args:
        path: the file, ending in .safetensors.
        video: every window's latents, in order.
        vae: their model.
        geometry: of the video.
        fps: frames a second, kept as a fraction.
        model_hash: `weights_hash` of the model in float32.

    Raises:
        UserError: if the ending is another.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: latents are written as .safetensors.")
    values = geometry.num_tiles * vae.latent_size
    metadata = layout_metadata(vae.structure_shape, vae.dynamics_shape, geometry)
    metadata |= {"fps": str(Fraction(fps)), "model_sha256": model_hash}
    with atomic_write(path) as unfinished, unfinished.open("wb") as file:
        file.write(_header(values, vae.dtype, metadata))
        for _, latents in video:
            packed = latents.pack().cpu().contiguous()
            file.write(packed.view(torch.uint8).numpy().tobytes())
    return path


def _header(values: int, dtype: torch.dtype, metadata: dict[str, str]) -> bytes:
    """The start of a safetensors file of one tensor `latents` (1, values), whose data follows."""
    tensor = {"dtype": DTYPES[dtype], "shape": [1, values], "data_offsets": [0, values * dtype.itemsize]}
    header = json.dumps({"__metadata__": metadata, "latents": tensor}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


class LatentFile:
    """The latents of a video in a file.

    Attributes:
        path: the file.
        geometry: of the video; None for a clip of the model's own size that `TwinLatents.save` wrote.
        fps: frames a second; None where the file does not say.
        model_hash: of the model they were made with; None where the file does not say.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        """Read what the file says of itself.

        Raises:
            UserError: if it is not a file of a video's latents.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{path}: no such file; latents as `vidgen encode` writes them are wanted.")
        try:
            with safe_open(self.path, "pt") as file:
                metadata = file.metadata() or {}
                self._layout = read_layout(metadata)
                shape = file.get_slice("latents").get_shape()
            self.geometry = self._layout[2]
            self.fps = Fraction(metadata["fps"]) if "fps" in metadata else None
            self.model_hash = metadata.get("model_sha256")
            sizes = torch.Size(self._layout[0]).numel() + torch.Size(self._layout[1]).numel()
            tiles = 1 if self.geometry is None else self.geometry.num_tiles
            if shape != [1, tiles * sizes]:
                raise ValueError(f"its latents are of shape {shape}, where one video's are {[1, tiles * sizes]}.")
        except (SafetensorError, ValueError, ZeroDivisionError) as error:
            raise UserError(f"{path} does not hold the latents of a video: {error}") from error

    def check_model(self, vae: AutoencoderKLVidTwin, model_hash: str | None) -> None:
        """Raise a `UserError` if the latents are not of this model; without a hash, if they do not fit it."""
        if self._layout[:2] != (vae.structure_shape, vae.dynamics_shape):
            raise UserError(
                f"{self.path} holds latents of {self._layout[0]} and {self._layout[1]}, but this model's are "
                f"{vae.structure_shape} and {vae.dynamics_shape}."
            )
        if None not in (model_hash, self.model_hash) and self.model_hash != model_hash:
            raise UserError(
                f"{self.path} was encoded with another model (sha256 {self.model_hash[:12]}…, this one is "
                f"{model_hash[:12]}…); decode it with the one that made it, or say --any-model."
            )

    def windows(self, device: torch.device | str, dtype: torch.dtype) -> Iterator[WindowLatents]:
        """Every window's latents, in order."""
        starts, geometry = [0], None
        if self.geometry is not None:
            starts, geometry = window_starts(self.geometry), window_geometry(self.geometry)
        with safe_open(self.path, "pt") as file:
            packed = file.get_slice("latents")
            values = packed.get_shape()[1] // len(starts)
            for i, start in enumerate(starts):
                part = packed[:, i * values : (i + 1) * values].to(device, dtype)
                yield WindowLatents(start, TwinLatents.unpack(part, *self._layout[:2], geometry))
