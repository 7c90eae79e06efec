"""The base class of detectors, and resizing of frames."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..common.errors import UserError
from ..common.weights import WeightsFile


class Detector(nn.Module):
    """A frozen network from clips to feature vectors, in float32 without TF32, independent of autocast.

    Attributes:
        name: as `get_detector` takes it.
        dim: length of a feature vector.
        min_frames: minimum number of frames of a clip.
        min_size: minimum height and width of its frames.
        per_frame: whether a row of features describes a frame instead of a clip.
        weights: the published file of its weights; None for a detector without weights.
        sha256: hash of the loaded file; None without one.
        published: whether the loaded file is the published one, by its hash; True without one.
        preprocessing: how `features` changes the frames before its first layer.
        settings: what its features depend on besides `name` and `sha256`, in JSON types; None for nothing.
    """

    name: str
    dim: int
    min_frames = 1
    min_size = 1
    per_frame = False
    weights: WeightsFile | None = None
    sha256: str | None = None
    preprocessing = "none"
    settings: dict[str, Any] | None = None

    @property
    def published(self) -> bool:
        return self.weights is None or self.weights.knows(self.sha256)

    @torch.no_grad()
    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """Return features (B, dim), or (B * T, dim) if they are per frame, clip by clip.

        Args:
            clips: (B, 3, T, H, W) of any float type, in [-1, 1].

        Raises:
            UserError: if the clips are too short or too small.
            ValueError: if they are of another shape.
        """
        with torch.autocast(clips.device.type, enabled=False), _without_tf32():
            return self.features(self._check_shape(clips).float())

    @abstractmethod
    def features(self, clips: torch.Tensor) -> torch.Tensor:
        """Return the features of clips that are in float32 and were checked."""

    def describe(self) -> dict:
        """Describe the detector for reports: name, length, kind of row, size, preprocessing, file and hash of weights.

        `published` is None if the loaded file is not known to be the published one.
        """
        known = self.weights if self.published else None
        return {
            "name": self.name,
            "dim": self.dim,
            "row": "frame" if self.per_frame else "clip",
            "parameters": sum(parameter.numel() for parameter in self.parameters()),
            "preprocessing": self.preprocessing,
            "sha256": self.sha256,
            "published": known and {"file": known.name, "url": known.url},
            **({} if self.settings is None else {"settings": self.settings}),
        }

    def load(self, path: Path) -> None:
        """Load a file of weights whose hash was checked. Raises `UserError` if it cannot be loaded."""
        raise UserError(f"the detector {self.name} has no weights, so {path} cannot be loaded into it.")

    def train(self, mode: bool = True) -> Detector:
        """Stay in evaluation mode."""
        return super().train(False)

    def _check_shape(self, clips: torch.Tensor) -> torch.Tensor:
        if clips.ndim != 5 or clips.shape[1] != 3:
            raise ValueError(f"the detector {self.name} needs clips (B, 3, T, H, W), not {tuple(clips.shape)}.")
        frames, height, width = clips.shape[2:]
        if frames < self.min_frames or min(height, width) < self.min_size:
            raise UserError(
                f"the detector {self.name} needs clips of {self.min_frames} frames and {self.min_size} x "
                f"{self.min_size} pixels or more, not {frames} frames of {height} x {width}."
            )
        return clips


def resize_frames(
    clips: torch.Tensor, size: tuple[int, int], antialias: bool = False, mode: str = "bilinear"
) -> torch.Tensor:
    """Resize the frames of (B, C, T, H, W) to (height, width), bilinear or bicubic."""
    if clips.shape[-2:] == size:
        return clips
    frames = clips.transpose(1, 2).flatten(0, 1)
    frames = F.interpolate(frames, size=size, mode=mode, align_corners=False, antialias=antialias)
    return frames.unflatten(0, (clips.shape[0], clips.shape[2])).transpose(1, 2)


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Let cuDNN's convolutions compute in full float32; on GPUs since Ampere the default is TF32."""
    conv = getattr(torch.backends.cudnn, "conv", None)  # since PyTorch 2.9
    owner, flag, value = (
        (torch.backends.cudnn, "allow_tf32", False) if conv is None else (conv, "fp32_precision", "ieee")
    )
    before = getattr(owner, flag)
    setattr(owner, flag, value)
    try:
        yield
    finally:
        setattr(owner, flag, before)
