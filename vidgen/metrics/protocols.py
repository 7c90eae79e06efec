"""Protocols: everything that two Fréchet video distances must have in common before they can be compared.

The same samples give numbers that differ by a factor of two and more under the habits of different projects, so each
habit has a name here, and each choice its source (project: file), read in their public code:

* `larp` - hywang66/LARP: sample.py (10 000 clips of the class labels of 10 000 real ones, drawn with seed 42 from all
  runs of 16 frames, cut one after the other, of the videos in ucf101_train.csv), datasets/video_dataset.py (native
  rate, torchvision's `Resize(128, antialias=True)` and `CenterCrop`; with `use_all_frames`, as there, shorter videos
  have no run and are left out: only eval/rfvd_evaluator.py, which reconstructs, repeats their last frame),
  utils' FVDCalculator (StyleGAN-V's program on floats: `2 x - 1`, resized inside, never rounded to pixels).
* `tats` - songweige/TATS: scripts/sample_vqgan_transformer_short_videos.py (2048 against 2048, train split, as many
  of each class; `(x * 255).astype(uint8)`, which truncates, on both sides), tats/data.py (torchvision's VideoClips:
  any 16 neighboring frames, so a long video counts more; bilinear without antialiasing, short side 128, center crop),
  tats/fvd/fvd.py (squashed to 224 without antialiasing, [-1, 1], VideoGPT's I3D).
* `videogpt` - wilson1yan/VideoGPT: scripts/compute_fvd.py (256 against 256, of the same classes, test split, mean of
  4 trials), videogpt/data.py (as TATS), videogpt/fvd/fvd.py (short side to 224, and the range is [-0.5, 0.5], where
  I3D was trained on [-1, 1]).
* `stylegan-v` - universome/stylegan-v: src/metrics/metric_main.py (fvd2048_16f), src/metrics/metric_utils.py (uint8,
  rounded; labels drawn from the real ones), src/training/dataset.py (one clip of each video, at a random place; videos
  with fewer than frames * stride frames are left out), src/scripts/convert_videos_to_frames.py (Lanczos, short side
  256, center crop). Stride 3 on real videos is Vchitect/Latte's (tools/metrics/frechet_video_distance.py), and 1 is
  StyleGAN-V's own. StyleGAN-V takes the first 2048 videos in the order of their names, which on UCF-101 are some 15
  classes; here 2048 are drawn at random. Both projects keep frames as JPEG files, which is not done here.
* `latte` - Vchitect/Latte: as `stylegan-v`, but tools/metrics/metric_main.py at commit 03d2bda has 20480 in the place
  of 2048 under the same name, so that all real videos count (at c227056 it has 2048; which of them made the paper's
  numbers is not stated); labels are uniform over the classes (sample/sample_ddp.py).
* `stylegan-v-128f` - StyleGAN-V's fvd2048_128f (src/metrics/metric_main.py): 128 frames, stride 1.
* `vidtwin`, `vidtwin-10k` - VidTwin's paper (arXiv 2412.17726) states 224 pixels, 16 frames, 8 fps, and no more.
* `mcl-jcv` - the same paper, Table 1: 25 fps, 16 frames, 224 pixels; reconstruction, so each real clip has its own
  counterpart. How clips are cut, and the detector, are not stated.
* `sprites` - ours: small enough for a CPU.

Labels that a project takes from its real clips are drawn here as often as those clips have them. One difference stays:
StyleGAN-V divides covariances by N (src/metrics/metric_utils.py), and so do those that took its code; here they are
divided by N - 1, which makes a distance of 2048 clips to 2048 larger by 0.05 % at most.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..common.errors import UserError
from ..common.images import to_uint8
from .detectors import squash
from .i3d import SIZE


@dataclass(frozen=True)
class Protocol:
    """What a number depends on beside the clips that were generated.

    Attributes:
        name: as `get_protocol` takes it.
        source: the project or paper whose habit it is.
        generated: how many clips are generated; None: one for each real clip (reconstruction).
        real: how many real clips they are compared with; None: all.
        labels: the classes of the generated clips: "balanced" (as many of each), "uniform" (each drawn at random), or
            "real" (those of the real clips, or drawn from them).
        split: of the dataset the real clips come from: "train", "test", "train+test", or "all" where it has no split.
        windows: which clips of a video count as real clips: "any" start, "tiles" one after the other, or "one" at a
            random place of each video.
        frames: of a clip.
        size: height and width of a clip, in pixels.
        fps: frames are taken at this rate by their time; None: at the video's own, `stride` frames apart.
        stride: see there; of real clips.
        crop: how a real frame becomes square: "center", its short side is resized to `size` and the center cut out;
            or "squash".
        filter: of that resizing: "bilinear" without antialiasing, "antialias" (bilinear with), or "lanczos" (Pillow's,
            on pixels).
        long_side: resized, rounded "up" or "down".
        pixels: what clips are before the detector: "round" or "truncate" to the 256 values of a file, or "float".
        short: videos with too few frames: "refuse" (left out, counted), or "repeat" their last frame (of no protocol
            here; a detector that needs more frames than videos have may ask for it).
        detector: as `vidgen.metrics.get_detector` takes it.
        detector_resize: how frames reach its 224 x 224: "squash", "center" (short side, center crop), both bilinear
            without antialiasing, or "detector", which squashes by itself, or takes any size.
        detector_range: r: the detector is given [-r, r].
        trials: how many times the number is computed anew, and averaged.
        not_stated: of these, what the source does not state; the choice is ours then.
    """

    name: str
    source: str
    generated: int | None
    real: int | None
    split: Literal["train", "test", "train+test", "all"]
    windows: Literal["any", "tiles", "one"]
    frames: int
    size: int
    detector: str
    labels: Literal["balanced", "uniform", "real"] = "real"
    fps: float | None = None
    stride: int = 1
    crop: Literal["center", "squash"] = "center"
    filter: Literal["bilinear", "antialias", "lanczos"] = "antialias"
    long_side: Literal["up", "down"] = "down"
    pixels: Literal["round", "truncate", "float"] = "round"
    short: Literal["refuse", "repeat"] = "refuse"
    detector_resize: Literal["squash", "center", "detector"] = "detector"
    detector_range: float = 1.0
    trials: int = 1
    not_stated: tuple[str, ...] = ()

    @property
    def span(self) -> int:
        """The frames of a video from a real clip's first to its last, at the video's own rate."""
        return (self.frames - 1) * self.stride + 1

    def starts(self, num_frames: int) -> range:
        """The first frames that a real clip may have in a video of so many frames; for "one", any of them is drawn.

        Empty if the video is too short, unless the protocol repeats its last frame: then it starts at 0. For protocols
        with an `fps`, count the frames at that rate.
        """
        if num_frames < self.frames * self.stride:
            return range(1 if self.short == "repeat" and num_frames > 0 else 0)
        return range(0, num_frames - self.span + 1, self.span if self.windows == "tiles" else 1)

    def describe(self) -> dict:
        """All of it, for JSON."""
        return dataclasses.asdict(self) | {"not_stated": list(self.not_stated)}


_STYLEGAN_V = Protocol(
    name="stylegan-v",
    source="universome/stylegan-v, with Vchitect/Latte's stride",
    generated=2048,
    real=2048,
    split="train+test",
    windows="one",
    frames=16,
    size=256,
    detector="i3d_torchscript",
    stride=3,
    filter="lanczos",
)
_VIDTWIN = Protocol(
    name="vidtwin",
    source="arXiv 2412.17726",
    generated=2048,
    real=2048,
    split="train",
    windows="one",
    frames=16,
    size=224,
    detector="i3d_torchscript",
    fps=8,
    labels="balanced",
    not_stated=("generated", "real", "labels", "split", "windows", "detector", "crop", "filter", "pixels", "short"),
)

PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="larp",
            source="hywang66/LARP",
            generated=10_000,
            real=10_000,
            split="train",
            windows="tiles",
            frames=16,
            size=128,
            detector="i3d_torchscript",
            filter="antialias",
            pixels="float",
        ),
        Protocol(
            name="tats",
            source="songweige/TATS",
            labels="balanced",
            generated=2048,
            real=2048,
            split="train",
            windows="any",
            frames=16,
            size=128,
            detector="i3d",
            filter="bilinear",
            long_side="up",
            pixels="truncate",
            detector_resize="squash",
        ),
        Protocol(
            name="videogpt",
            source="wilson1yan/VideoGPT",
            generated=256,
            real=256,
            split="test",
            windows="any",
            frames=16,
            size=128,
            detector="i3d",
            filter="bilinear",
            long_side="up",
            pixels="truncate",
            detector_resize="center",
            detector_range=0.5,
            trials=4,
        ),
        _STYLEGAN_V,
        dataclasses.replace(_STYLEGAN_V, name="latte", source="Vchitect/Latte", real=None, labels="uniform"),
        dataclasses.replace(_STYLEGAN_V, name="stylegan-v-128f", source="universome/stylegan-v", frames=128, stride=1),
        _VIDTWIN,
        dataclasses.replace(_VIDTWIN, name="vidtwin-10k", generated=10_000, real=None),
        Protocol(
            name="mcl-jcv",
            source="arXiv 2412.17726",
            generated=None,
            real=None,
            split="all",
            windows="tiles",
            frames=16,
            size=224,
            detector="i3d_torchscript",
            fps=25,
            not_stated=("real", "windows", "crop", "filter", "pixels", "short", "detector"),
        ),
        Protocol(
            name="sprites",
            source="vidgen",
            generated=256,
            real=256,
            split="all",
            windows="one",
            frames=16,
            size=64,
            detector="pooled_pixels",
            labels="balanced",
            fps=8,
        ),
    )
}


def get_protocol(name: str) -> Protocol:
    """The protocol of this name. Raises `UserError` for an unknown one."""
    if name not in PROTOCOLS:
        near = difflib.get_close_matches(name, PROTOCOLS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(PROTOCOLS)}."
        raise UserError(f"unknown protocol {name!r}: {hint}")
    return PROTOCOLS[name]


def protocol_clips(clips: torch.Tensor, protocol: Protocol) -> torch.Tensor:
    """Clips as the protocol has them: its length, its size, its pixels. For real clips, and for generated ones.

    Args:
        clips: float (B, 3, T, H, W) in [-1, 1], of any size, already at the protocol's rate or stride.

    Returns:
        float32 (B, 3, frames, size, size) in [-1, 1], on the clips' device.

    Raises:
        UserError: if they have too few frames and the protocol does not repeat the last one; or more.
        ValueError: if they are not (B, 3, T, H, W), T >= 1, or not finite.
    """
    if clips.ndim != 5 or clips.shape[1] != 3 or clips.shape[2] < 1:
        raise ValueError(f"the protocol {protocol.name} takes clips (B, 3, T, H, W), not {tuple(clips.shape)}.")
    if not torch.isfinite(clips).all():
        raise ValueError(f"clips of shape {tuple(clips.shape)} hold NaN or infinite values.")
    clips = _full_length(clips.float(), protocol)
    clips = _resized(clips, protocol)
    return _pixels(clips, protocol.pixels)


def detector_input(clips: torch.Tensor, protocol: Protocol) -> torch.Tensor:
    """What the protocol hands to its detector, from `protocol_clips`: float32 (B, 3, T, H, W) in [-r, r].

    Frames are resized to 224 x 224, or left as they are for a detector that does it. Raises `ValueError` if clips are
    not (B, 3, T, H, W).
    """
    if clips.ndim != 5 or clips.shape[1] != 3:
        raise ValueError(f"a detector takes clips (B, 3, T, H, W), not {tuple(clips.shape)}.")
    clips = clips.float()
    if protocol.detector_resize == "squash":
        clips = squash(clips, SIZE)
    elif protocol.detector_resize == "center":
        clips = _cover_and_crop(clips, SIZE, "bilinear", protocol.long_side)
    return clips * protocol.detector_range


def _full_length(clips: torch.Tensor, protocol: Protocol) -> torch.Tensor:
    frames = clips.shape[2]
    if frames < protocol.frames and protocol.short == "repeat":
        last = clips[:, :, -1:].expand(-1, -1, protocol.frames - frames, -1, -1)
        return torch.cat([clips, last], dim=2)
    if frames != protocol.frames:
        raise UserError(f"the protocol {protocol.name} needs clips of {protocol.frames} frames, not {frames}.")
    return clips


def _resized(clips: torch.Tensor, protocol: Protocol) -> torch.Tensor:
    if clips.shape[-2:] == (protocol.size, protocol.size):
        return clips
    if protocol.crop == "center":
        return _cover_and_crop(clips, protocol.size, protocol.filter, protocol.long_side)
    return _resize(clips, (protocol.size, protocol.size), protocol.filter)


def _cover_and_crop(clips: torch.Tensor, size: int, filter: str, long_side: str) -> torch.Tensor:
    """The short side to `size`, and the center cut out, as TATS and torchvision do."""
    height, width = clips.shape[-2:]
    long = size * max(height, width) / min(height, width)
    long = math.ceil(long) if long_side == "up" else int(long)
    clips = _resize(clips, (size, long) if height <= width else (long, size), filter)
    top, left = ((side - size) // 2 for side in clips.shape[-2:])
    return clips[..., top : top + size, left : left + size]


def _resize(clips: torch.Tensor, size: tuple[int, int], filter: str) -> torch.Tensor:
    if clips.shape[-2:] == size:
        return clips
    frames = clips.transpose(1, 2).flatten(0, 1)
    if filter == "lanczos":
        pictures = to_uint8(frames).permute(0, 2, 3, 1).cpu().numpy()
        resized = [
            np.asarray(Image.fromarray(picture).resize(size[::-1], Image.Resampling.LANCZOS)) for picture in pictures
        ]
        frames = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).to(clips).div(127.5).sub(1)
    else:
        frames = F.interpolate(
            frames, size=size, mode="bilinear", align_corners=False, antialias=filter == "antialias"
        )
    return frames.unflatten(0, (clips.shape[0], clips.shape[2])).transpose(1, 2)


def _pixels(clips: torch.Tensor, pixels: str) -> torch.Tensor:
    if pixels == "float":
        return clips.clamp(-1, 1)
    # What is a whole number but for float32's rounding must stay one when truncated: 1e-3 is more than that rounding.
    values = to_uint8(clips) if pixels == "round" else ((clips + 1) * 127.5 + 1e-3).clamp(0, 255).floor()
    return values.float().div(127.5).sub(1)
