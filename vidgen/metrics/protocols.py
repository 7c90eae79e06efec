"""Protocols: all settings that two Fréchet video distances must share to be comparable.

The same samples give numbers that differ by a factor of two and more under the settings of different projects. Each
protocol below has a name and its source (project: file), read in the project's public code:

* `larp` - hywang66/LARP: sample.py (10 000 clips with the class labels of 10 000 real ones, drawn with seed 42 from
  all consecutive runs of 16 frames of the videos in ucf101_train.csv), datasets/video_dataset.py (native frame rate,
  torchvision's `Resize(128, antialias=True)` and `CenterCrop`; with `use_all_frames`, as there, shorter videos have no
  run and are left out: only eval/rfvd_evaluator.py, which reconstructs, repeats their last frame), utils'
  FVDCalculator (StyleGAN-V's program on floats: `2 x - 1`, resized inside, never rounded to pixels).
* `tats` - songweige/TATS: scripts/sample_vqgan_transformer_short_videos.py (2048 vs. 2048, train split, balanced
  classes; `(x * 255).astype(uint8)`, which truncates, on both sides), tats/data.py (torchvision's VideoClips: any 16
  consecutive frames, so a long video counts more; bilinear without antialiasing, short side 128, center crop),
  tats/fvd/fvd.py (squashed to 224 without antialiasing, [-1, 1], VideoGPT's I3D).
* `videogpt` - wilson1yan/VideoGPT: scripts/compute_fvd.py (256 vs. 256, of the same classes, test split, mean of 4
  trials), videogpt/data.py (as TATS), videogpt/fvd/fvd.py (short side to 224, and the range is [-0.5, 0.5], where I3D
  was trained on [-1, 1]).
* `stylegan-v` - universome/stylegan-v: src/metrics/metric_main.py (fvd2048_16f), src/metrics/metric_utils.py (uint8,
  rounded; labels drawn from the real ones), src/training/dataset.py (one clip of each video, at a random place; videos
  with fewer than frames * stride frames are left out), src/scripts/convert_videos_to_frames.py (Lanczos, short side
  256, center crop). Stride 3 on real videos is Vchitect/Latte's (tools/metrics/frechet_video_distance.py); StyleGAN-V
  uses 1. StyleGAN-V takes the first 2048 videos in the order of their names, about 15 classes of UCF-101; here 2048
  are drawn at random. Both projects store frames as JPEG files, which is not done here.
* `latte` - Vchitect/Latte: as `stylegan-v`, but tools/metrics/metric_main.py at commit 03d2bda has 20480 instead of
  2048 under the same name, so that all real videos are used (at c227056 it has 2048; the paper does not state which of
  them was used); labels are uniform over the classes (sample/sample_ddp.py).
* `stylegan-v-128f` - StyleGAN-V's fvd2048_128f (src/metrics/metric_main.py): 128 frames, stride 1.
* `vidtwin`, `vidtwin-10k` - the VidTwin paper (arXiv 2412.17726) states 224 pixels, 16 frames, 8 fps, and no more.
* `mcl-jcv` - the same paper, Table 1: 25 fps, 16 frames, 224 pixels; reconstruction, so each real clip has a
  counterpart. The paper states neither how clips are cut nor the detector.
* `sprites` - vidgen's: small enough for a CPU.
* `folders` - vidgen's, for two sets of videos that belong to no publication: all videos of both sides, one clip of 16
  consecutive frames of each, resized as in `larp` and rounded.

Labels that a project takes from its real clips are drawn here with the frequencies of those clips. One difference
remains: StyleGAN-V and the projects that took its code divide covariances by N (src/metrics/metric_utils.py); here
they are divided by N - 1, which increases a distance of 2048 vs. 2048 clips by 0.05 % at most.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image

from ..common.errors import UserError
from ..common.images import to_uint8
from .detectors import resize_frames
from .i3d import SIZE


@dataclass(frozen=True)
class Protocol:
    """The settings of a Fréchet video distance.

    Attributes:
        name: as `get_protocol` takes it.
        source: project or paper.
        generated: number of generated clips; None: one for each real clip (reconstruction).
        real: number of real clips; None: all.
        labels: classes of the generated clips: "balanced" (equally many of each), "uniform" (drawn uniformly), or
            "real" (those of the real clips, or drawn with their frequencies).
        split: split of the dataset that the real clips come from: "train", "test", "train+test", or "all" if the
            dataset has no split.
        windows: which clips of a video are real clips: "any" start, consecutive "tiles", or "one" at a random place.
        frames: frames per clip.
        size: height and width of a clip in pixels, or (height, width) of a model whose clips are not square.
        fps: frame rate at which frames are taken by their timestamps; None: the video's, with `stride`.
        stride: distance between frames of real clips; see `fps`.
        crop: how a real frame becomes square: "center" (short side resized to `size`, center crop) or "squash".
        filter: resizing filter: "bilinear" without antialiasing, "antialias" (bilinear with), or "lanczos" (Pillow's,
            on pixels).
        long_side: resized, rounded "up" or "down".
        pixels: precision of clips before the detector: "round" or "truncate" to 256 values, or "float".
        short: videos with too few frames: "refuse" (left out, counted), or "repeat" their last frame (in no protocol
            here; for a detector that needs more frames than the videos have).
        detector: as `vidgen.metrics.detectors.get_detector` takes it.
        detector_resize: how frames are resized to 224 x 224: "squash", "center" (short side, center crop), both
            bilinear without antialiasing, or "detector", which squashes them or accepts any size.
        detector_range: r: the detector's inputs are in [-r, r].
        trials: number of repetitions that the project averages.
        not_stated: attributes that the source does not state; vidgen's choice.
    """

    name: str
    source: str
    generated: int | None
    real: int | None
    split: Literal["train", "test", "train+test", "all"]
    windows: Literal["any", "tiles", "one"]
    frames: int
    size: int | tuple[int, int]
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
        """Number of frames of a video from a real clip's first to its last, at the video's frame rate."""
        return (self.frames - 1) * self.stride + 1

    def starts(self, num_frames: int) -> range:
        """Return the possible first frames of real clips of a video; for "one", one of them is drawn.

        Empty if the video is too short, unless the protocol repeats its last frame: the clip then starts at 0.

        Args:
            num_frames: of the video; for protocols with an `fps`, at that rate.
        """
        if num_frames < self.frames * self.stride:
            return range(1 if self.short == "repeat" and num_frames > 0 else 0)
        return range(0, num_frames - self.span + 1, self.span if self.windows == "tiles" else 1)

    def describe(self) -> dict:
        """Return all attributes in JSON types."""
        return dataclasses.asdict(self) | {"not_stated": list(self.not_stated)}


_NOT_STATED = ("generated", "real", "labels", "split", "windows", "detector", "crop", "filter", "pixels", "short")
_NOT_STATED_IN_TABLE_1 = ("real", "windows", "crop", "filter", "pixels", "short", "detector")
_TATS = dict(filter="bilinear", long_side="up", pixels="truncate")
_STYLEGAN_V = dict(stride=3, filter="lanczos")
_PAPER = dict(labels="balanced", fps=8, not_stated=_NOT_STATED)
_I3D = "i3d_torchscript"

# fmt: off
_TABLE = (
    # name, source, generated and real clips, split, windows, frames, size, detector
    Protocol("larp", "hywang66/LARP", 10_000, 10_000, "train", "tiles", 16, 128, _I3D, pixels="float"),
    Protocol("tats", "songweige/TATS", 2048, 2048, "train", "any", 16, 128, "i3d", labels="balanced",
             detector_resize="squash", **_TATS),
    Protocol("videogpt", "wilson1yan/VideoGPT", 256, 256, "test", "any", 16, 128, "i3d",
             detector_resize="center", detector_range=0.5, trials=4, **_TATS),
    Protocol("stylegan-v", "universome/stylegan-v, with Vchitect/Latte's stride", 2048, 2048, "train+test", "one",
             16, 256, _I3D, **_STYLEGAN_V),
    Protocol("latte", "Vchitect/Latte", 2048, None, "train+test", "one", 16, 256, _I3D, labels="uniform",
             **_STYLEGAN_V),
    Protocol("stylegan-v-128f", "universome/stylegan-v", 2048, 2048, "train+test", "one", 128, 256, _I3D,
             filter="lanczos"),
    Protocol("vidtwin", "arXiv 2412.17726", 2048, 2048, "train", "one", 16, 224, _I3D, **_PAPER),
    Protocol("vidtwin-10k", "arXiv 2412.17726", 10_000, None, "train", "one", 16, 224, _I3D, **_PAPER),
    Protocol("mcl-jcv", "arXiv 2412.17726", None, None, "all", "tiles", 16, 224, _I3D, fps=25,
             not_stated=_NOT_STATED_IN_TABLE_1),
    Protocol("sprites", "vidgen", 256, 256, "all", "one", 16, 64, "pooled_pixels", labels="balanced", fps=8),
    Protocol("folders", "vidgen", None, None, "all", "one", 16, 224, _I3D),
)
# fmt: on
PROTOCOLS: dict[str, Protocol] = {protocol.name: protocol for protocol in _TABLE}


def get_protocol(name: str) -> Protocol:
    """Return the protocol of this name. Raises `UserError` for an unknown one."""
    if name not in PROTOCOLS:
        near = difflib.get_close_matches(name, PROTOCOLS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the protocols are {', '.join(PROTOCOLS)}."
        raise UserError(f"unknown protocol {name!r}: {hint}")
    return PROTOCOLS[name]


def protocol_clips(clips: torch.Tensor, protocol: Protocol) -> torch.Tensor:
    """Prepare real or generated clips by the protocol: its length, its size, its pixels.

    Args:
        clips: float (B, 3, T, H, W) in [-1, 1], of any size, at the protocol's frame rate or stride.

    Returns:
        float32 (B, 3, frames, size, size) in [-1, 1], on the clips' device.

    Raises:
        UserError: if they have too many frames, or too few and the protocol does not repeat the last one.
        ValueError: if they are not (B, 3, T, H, W), T >= 1, or not finite.
    """
    if clips.ndim != 5 or clips.shape[1] != 3 or clips.shape[2] < 1:
        raise ValueError(f"the protocol {protocol.name} takes clips (B, 3, T, H, W), not {tuple(clips.shape)}.")
    if not torch.isfinite(clips).all():
        raise ValueError(f"clips of shape {tuple(clips.shape)} hold NaN or infinite values.")
    clips = _fit_length(clips.float(), protocol)
    clips = _fit_size(clips, protocol)
    return _quantize(clips, protocol.pixels)


def detector_input(clips: torch.Tensor, protocol: Protocol) -> torch.Tensor:
    """Convert the clips of `protocol_clips` to the detector's input: float32 (B, 3, T, H, W) in [-r, r].

    Frames are resized to 224 x 224, or keep their size for a detector that resizes them. Raises `ValueError` if clips
    are not (B, 3, T, H, W).
    """
    if clips.ndim != 5 or clips.shape[1] != 3:
        raise ValueError(f"a detector takes clips (B, 3, T, H, W), not {tuple(clips.shape)}.")
    clips = clips.float()
    if protocol.detector_resize == "squash":
        clips = resize_frames(clips, (SIZE, SIZE))
    elif protocol.detector_resize == "center":
        clips = _cover_and_crop(clips, (SIZE, SIZE), "bilinear", protocol.long_side)
    return clips * protocol.detector_range


def _fit_length(clips: torch.Tensor, protocol: Protocol) -> torch.Tensor:
    frames = clips.shape[2]
    if frames < protocol.frames and protocol.short == "repeat":
        last = clips[:, :, -1:].expand(-1, -1, protocol.frames - frames, -1, -1)
        return torch.cat([clips, last], dim=2)
    if frames != protocol.frames:
        raise UserError(f"the protocol {protocol.name} needs clips of {protocol.frames} frames, not {frames}.")
    return clips


def _fit_size(clips: torch.Tensor, protocol: Protocol) -> torch.Tensor:
    size = (protocol.size, protocol.size) if isinstance(protocol.size, int) else tuple(protocol.size)
    if clips.shape[-2:] == size:
        return clips
    if protocol.crop == "center":
        return _cover_and_crop(clips, size, protocol.filter, protocol.long_side)
    return _resize(clips, size, protocol.filter)


def _cover_and_crop(clips: torch.Tensor, size: tuple[int, int], filter: str, long_side: str) -> torch.Tensor:
    """Resize one side to that of `size`, the other to at least its side, and crop the center.

    With a square size the short side is resized to it, as TATS and torchvision do.
    """
    (rows, columns), (height, width) = size, clips.shape[-2:]
    round_long = math.ceil if long_side == "up" else int
    if rows * width >= columns * height:
        covering = (rows, round_long(rows * width / height))
    else:
        covering = (round_long(columns * height / width), columns)
    clips = _resize(clips, covering, filter)
    top, left = (clips.shape[-2] - rows) // 2, (clips.shape[-1] - columns) // 2
    return clips[..., top : top + rows, left : left + columns]


def _resize(clips: torch.Tensor, size: tuple[int, int], filter: str) -> torch.Tensor:
    if filter != "lanczos" or clips.shape[-2:] == size:
        return resize_frames(clips, size, antialias=filter == "antialias")
    images = to_uint8(clips.transpose(1, 2).flatten(0, 1)).permute(0, 2, 3, 1).cpu().numpy()
    resized = [np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.LANCZOS)) for image in images]
    frames = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).to(clips).div(127.5).sub(1)
    return frames.unflatten(0, (clips.shape[0], clips.shape[2])).transpose(1, 2)


def _quantize(clips: torch.Tensor, pixels: str) -> torch.Tensor:
    if pixels == "float":
        return clips.clamp(-1, 1)
    # Adding 1e-3, more than the rounding of float32, keeps integers from being truncated to the next lower one.
    values = to_uint8(clips) if pixels == "round" else ((clips + 1) * 127.5 + 1e-3).clamp(0, 255).floor()
    return values.float().div(127.5).sub(1)
