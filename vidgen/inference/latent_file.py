"""Files of a video's latents, written and read window by window.

A .safetensors file that `TwinLatents.load` reads as a whole. It holds the packed `latents` (1, N * L) in the order of
the windows; its metadata hold the shapes, the geometry, the frame rate of the video and the hash of the encoder.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from autoencoder import TwinLatents
from autoencoder.latents import layout_metadata, read_layout
from autoencoder.tiling import ClipGeometry
from autoencoder.video_autoencoder import VideoAutoencoder

from ..common.errors import UserError
from ..common.io import atomic_write
from ..common.loading import encoder_hash, weights_hash
from .streaming import WindowLatents, window_geometry, window_starts

# Hashes by their names in the metadata; files of earlier versions state that of the whole model.
HASHES = {"encoder_sha256": encoder_hash, "model_sha256": weights_hash}
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def write_latents(
    path: str | os.PathLike,
    video: Iterable[WindowLatents],
    vae: VideoAutoencoder,
    geometry: ClipGeometry,
    fps: Fraction,
    sha256: str,
) -> Path:
    """Write the latents of a video as they arrive; the file appears when it is complete.

    Args:
        path: the file, with the suffix .safetensors.
        video: the latents of every window, in order.
        vae: the model of the latents.
        geometry: windows and tiles of the video.
        fps: frames per second, saved as a fraction.
        sha256: `encoder_hash` of the model in float32.

    Raises:
        UserError: if the suffix is another one.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: latents are written to .safetensors files only.")
    values = geometry.num_tiles * vae.latent_size
    metadata = layout_metadata(vae.structure_shape, vae.dynamics_shape, geometry)
    metadata |= {"fps": str(Fraction(fps)), "encoder_sha256": sha256}
    with atomic_write(path) as unfinished, unfinished.open("wb") as file:
        file.write(_make_header(values, vae.dtype, metadata))
        for _, latents in video:
            packed = latents.pack().cpu().contiguous()
            file.write(packed.view(torch.uint8).numpy().tobytes())
    return path


def _make_header(values: int, dtype: torch.dtype, metadata: dict[str, str]) -> bytes:
    """Return the header of a safetensors file with one tensor `latents` (1, values)."""
    tensor = {"dtype": DTYPES[dtype], "shape": [1, values], "data_offsets": [0, values * dtype.itemsize]}
    header = json.dumps({"__metadata__": metadata, "latents": tensor}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


class LatentFile:
    """The latents of a video in a file.

    Attributes:
        path: the file.
        structure_shape: of the latents of a window's tile.
        geometry: windows and tiles of the video; None for a clip of the model's size saved by `TwinLatents.save`.
        fps: frames per second; None if the file does not state it.

    Raises:
        UserError: if it is not a file of a video's latents.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{path}: no such file; decode reads latents that `vidgen encode` wrote.")
        try:
            with safe_open(self.path, "pt") as file:
                metadata = file.metadata() or {}
                self._layout = read_layout(metadata)
                shape = file.get_slice("latents").get_shape()
            self.structure_shape, dynamics_shape, self.geometry = self._layout
            self.fps = Fraction(metadata["fps"]) if "fps" in metadata else None
            self._hash = next(((kind, metadata[kind]) for kind in HASHES if kind in metadata), None)
            tiles = 1 if self.geometry is None else self.geometry.num_tiles
            expected = [1, tiles * (math.prod(self.structure_shape) + math.prod(dynamics_shape))]
            if shape != expected:
                raise ValueError(f"its latents have shape {shape}, not {expected}.")
        except (SafetensorError, ValueError, ZeroDivisionError) as error:
            raise UserError(f"{path} does not hold the latents of a video: {error}") from error

    def check_model(self, vae: VideoAutoencoder, any_model: bool = False) -> None:
        """Raise a `UserError` if the latents are of another encoder; with `any_model`, of other shapes only.

        The hash is that of the model in float32, so it must be checked before the model is converted.
        """
        if self._layout[:2] != (vae.structure_shape, vae.dynamics_shape):
            raise UserError(
                f"{self.path} holds latents of shapes {self._layout[0]} and {self._layout[1]}, but this model's are "
                f"{vae.structure_shape} and {vae.dynamics_shape}."
            )
        if any_model or self._hash is None:
            return
        kind, saved = self._hash
        found = HASHES[kind](vae)
        if saved != found:
            raise UserError(
                f"{self.path} was encoded with another model (sha256 {saved[:12]}…, this one is {found[:12]}…); "
                "decode it with that model, or pass --any-model."
            )

    def windows(self, device: torch.device | str, dtype: torch.dtype) -> Iterator[WindowLatents]:
        """Yield the latents of every window, in order."""
        starts, geometry = [0], None
        if self.geometry is not None:
            starts, geometry = window_starts(self.geometry), window_geometry(self.geometry)
        with safe_open(self.path, "pt") as file:
            packed = file.get_slice("latents")
            values = packed.get_shape()[1] // len(starts)
            for i, start in enumerate(starts):
                part = packed[:, i * values : (i + 1) * values].to(device, dtype)
                yield WindowLatents(start, TwinLatents.unpack(part, *self._layout[:2], geometry))
