"""LPIPS: perceptual distance of images in the features of an ImageNet network.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (CVPR 2018), version 0.1. The
backbones have the layers of torchvision's `features`, so its weights load unchanged, without torchvision; the linear
heads are those in torchmetrics.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..common.errors import UserError
from ..common.weights import WeightsFile, check_weights, read_tensors

DOWNLOADS = "https://download.pytorch.org/models"
# Convert [-1, 1] to the normalized values on which the backbones were trained.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


# --- Backbones -------------------------------------------------------------------------------------------------------


def _conv(in_channels: int, out_channels: int, kernel: int, **options: int) -> list[nn.Module]:
    return [nn.Conv2d(in_channels, out_channels, kernel, **options), nn.ReLU(inplace=True)]


def _vgg16() -> nn.Sequential:
    """Simonyan and Zisserman (2015), configuration D, to relu5_3."""
    layers: list[nn.Module] = []
    channels = 3
    for width, convolutions in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        if layers:
            layers.append(nn.MaxPool2d(2))
        for _ in range(convolutions):
            layers += _conv(channels, width, 3, padding=1)
            channels = width
    return nn.Sequential(*layers)


def _alexnet() -> nn.Sequential:
    """Krizhevsky (2014), the one-tower variant, to relu5."""
    return nn.Sequential(
        *_conv(3, 64, 11, stride=4, padding=2),
        nn.MaxPool2d(3, 2),
        *_conv(64, 192, 5, padding=2),
        nn.MaxPool2d(3, 2),
        *_conv(192, 384, 3, padding=1),
        *_conv(384, 256, 3, padding=1),
        *_conv(256, 256, 3, padding=1),
    )


class Fire(nn.Module):
    """SqueezeNet's block: a 1x1 squeeze, then 1x1 and 3x3 expansions side by side."""

    def __init__(self, in_channels: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(in_channels, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.squeeze(x).relu_()
        return torch.cat([self.expand1x1(x), self.expand3x3(x)], dim=1).relu_()


def _squeezenet() -> nn.Sequential:
    """Iandola et al. (2016), version 1.1."""
    fires = [[(64, 16, 64), (128, 16, 64)], [(128, 32, 128), (256, 32, 128)]]
    fires += [[(256, 48, 192), (384, 48, 192), (384, 64, 256), (512, 64, 256)]]
    layers = _conv(3, 64, 3, stride=2)
    for stage in fires:
        layers += [nn.MaxPool2d(3, 2, ceil_mode=True), *(Fire(*sizes) for sizes in stage)]
    return nn.Sequential(*layers)


@dataclass(frozen=True)
class Backbone:
    """A feature network and its ImageNet weights.

    Attributes:
        build: creates the layers, numbered as torchvision's `features`.
        taps: the layers whose outputs are compared, with their channels.
        min_size: minimum height and width of an image.
        weights: torchvision's file, and hashes of other files with the same weights.
    """

    build: Callable[[], nn.Sequential]
    taps: dict[int, int]
    min_size: int
    weights: WeightsFile


def _torchvision_file(name: str, *sha256: str) -> WeightsFile:
    return WeightsFile(name, "torchvision", f"{DOWNLOADS}/{name}", None, sha256)


BACKBONES = {
    "vgg": Backbone(
        _vgg16,
        {3: 64, 8: 128, 15: 256, 22: 512, 29: 512},
        16,
        _torchvision_file("vgg16-397923af.pth", "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"),
    ),
    "alex": Backbone(
        _alexnet,
        {1: 64, 4: 192, 7: 384, 9: 256, 11: 256},
        31,
        _torchvision_file(
            "alexnet-owt-7be5be79.pth", "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02"
        ),
    ),
    "squeeze": Backbone(
        _squeezenet,
        {1: 64, 4: 128, 7: 256, 9: 384, 10: 384, 11: 512, 12: 512},
        17,
        _torchvision_file(
            "squeezenet1_1-b8a52dc0.pth",
            "b8a52dc049b60e4b6ab68ad0df457362afab8b6304b2febdc1650a5dab4d7e7b",
            "435cedb387e95bc8291893f61a3a64f0345b8c23a05139aceef43947efb3d52d",  # only the feature layers
        ),
    ),
}


# --- Distance --------------------------------------------------------------------------------------------------------


class LPIPS(nn.Module):
    """Perceptual distance of images: 0 for equal ones, about 0.1 to 0.7 for ones that look different.

    The features of both images are scaled to unit length at every position; their squared differences are weighted by
    channel, averaged over the image and summed over the layers. All weights are frozen. Under autocast the backbone
    computes in half precision; distances are float32.

    Args:
        backbone: `"vgg"`, `"alex"` or `"squeeze"`, with random weights; `from_pretrained` loads trained ones.

    Raises:
        UserError: if the backbone is unknown.
    """

    def __init__(self, backbone: str = "vgg") -> None:
        super().__init__()
        self.backbone = backbone
        self.features = _get_backbone(backbone).build()
        self.register_buffer("shift", torch.tensor(SHIFT).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(SCALE).view(3, 1, 1), persistent=False)
        heads = torch.load(_heads_file(backbone), map_location="cpu", weights_only=True)
        for i, tap in enumerate(self.taps):
            self.register_buffer(f"head_{tap}", heads[f"lin{i}.model.1.weight"].view(-1, 1, 1))
        self.requires_grad_(False)

    @classmethod
    def from_pretrained(
        cls,
        backbone: str = "vgg",
        weights: str | None = None,
        sha256: str | None = None,
        options: tuple[str, str] = ("perceptual.weights=", "perceptual.weights_sha256="),
    ) -> LPIPS:
        """Create LPIPS with ImageNet weights. Nothing is downloaded.

        Args:
            backbone: `"vgg"` (the paper's loss), `"alex"` (common in evaluations) or `"squeeze"`.
            weights: file of the backbone's weights, .pth or .safetensors, with torchvision's keys (`features.0.weight`
                or `0.weight`); by default torchvision's file in torch hub's cache.
            sha256: of that file, if it is not one of the known files.
            options: the options that set `weights` and `sha256`, for errors; by default those of a config.

        Raises:
            UserError: if the backbone is unknown, or the file is missing, has another hash or does not fit.
        """
        known = _get_backbone(backbone).weights
        path = Path(weights) if weights is not None else known.cached
        check_weights(
            path,
            known,
            sha256,
            needed=f"LPIPS needs the ImageNet weights of its {backbone} backbone",
            path_option=options[0],
            sha256_option=options[1],
            otherwise=", or train without LPIPS: perceptual.weight=0" if options[0][0] != "-" else "",
        )
        with torch.random.fork_rng(devices=[]):  # the initial weights must not change the run's random numbers
            lpips = cls(backbone)
        load_features(lpips.features, path, backbone)
        return lpips

    @property
    def taps(self) -> dict[int, int]:
        """The layers of `features` that are compared, and their channels."""
        return BACKBONES[self.backbone].taps

    def check_size(self, height: int, width: int) -> None:
        """Raise a `UserError` if frames of this size are too small for the backbone."""
        least = BACKBONES[self.backbone].min_size
        if min(height, width) < least:
            raise UserError(
                f"LPIPS with the {self.backbone} backbone needs frames of {least} x {least} pixels or more, not "
                f"{height} x {width}; choose another perceptual.backbone, or train without LPIPS: perceptual.weight=0."
            )

    def forward(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Distances (N,), float32, of images (N, 3, H, W) in [-1, 1] from targets of the same shape.

        Raises:
            UserError: if the images are too small.
            ValueError: if the shapes differ or are not (N, 3, H, W).
        """
        if images.shape != targets.shape or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"LPIPS compares RGB images (N, 3, H, W) of one shape, not {tuple(images.shape)} and "
                f"{tuple(targets.shape)}."
            )
        self.check_size(*images.shape[-2:])
        distances = images.new_zeros(len(images), dtype=torch.float32)
        for tap, a, b in zip(self.taps, self._extract(images), self._extract(targets), strict=True):
            weighted = (_normalize(a) - _normalize(b)).square() * getattr(self, f"head_{tap}")
            distances = distances + weighted.sum(dim=1).mean(dim=(1, 2))
        return distances

    def _extract(self, images: torch.Tensor) -> list[torch.Tensor]:
        """The outputs of the compared layers."""
        x = (images - self.shift) / self.scale
        outputs = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.taps:
                outputs.append(x)
        return outputs


def load_features(features: nn.Sequential, path: Path, backbone: str) -> None:
    """Load a backbone's layers from a file with torchvision's keys (`features.0.weight` or `0.weight`).

    Raises `UserError`, and loads nothing, if the file does not fit.
    """
    state = {key.removeprefix("features."): tensor for key, tensor in read_tensors(path).items()}
    expected = features.state_dict()
    for key, tensor in expected.items():
        shape = tuple(state[key].shape) if key in state else "missing"
        if shape != tuple(tensor.shape):
            raise UserError(f"{path} is not of the {backbone} backbone: {key} is {shape}, not {tuple(tensor.shape)}.")
    features.load_state_dict({key: state[key] for key in expected})


def _normalize(features: torch.Tensor) -> torch.Tensor:
    """Features (N, C, H, W) in float32, divided by their length along C."""
    features = features.float()
    return features / (features.square().sum(dim=1, keepdim=True) + 1e-8).sqrt()


def _get_backbone(name: str) -> Backbone:
    if name not in BACKBONES:
        raise UserError(f"perceptual.backbone must be one of {', '.join(BACKBONES)}, not {name!r}.")
    return BACKBONES[name]


def _heads_file(backbone: str) -> Path:
    """The file of the heads in torchmetrics, without importing it, which requires torchvision for LPIPS."""
    package = Path(importlib.util.find_spec("torchmetrics").origin).parent
    return package / "functional" / "image" / "lpips_models" / f"{backbone}.pth"
