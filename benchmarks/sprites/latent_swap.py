"""Whose factors a decoded sprite shows: what it looks like and how it moves, read from its pixels.

For the sprites of `vidgen.data.sprites`, whose factors are known. A reenactment is decoded from the structure of clip
A and the dynamics of clip B; if the two latents keep their roles it looks like A and moves like B. The readers are
linear probes on simple measurements of the pixels, fitted on clips as drawn, and never see a latent.

A clip of `swap` has two shapes. Its targets are those of the first, which starts on the right; in reenactments it has
no place, for a clip of one shape cannot move as two do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from vidgen.data.sprites import MOTIONS, SHAPES, TEXTURES

from .probes import LinearMap, Ridge, Score, mean, ratio, share

CLASSES = {"motion": MOTIONS, "shape": SHAPES, "texture": TEXTURES}
SLOW_FRAMES = 8  # a cycle; what repeats sooner is fast motion
APART = 1.0  # pixels or color levels of 255; points of two clips that are closer than this do not differ
CROP = 24  # pixels, the side of the window that follows the shape


# --- what the factors say ------------------------------------------------------------------------------------------


def sprite_targets(factors: Sequence[dict]) -> dict[str, torch.Tensor]:
    """What probes of sprites are fitted to, from the factors of N clips of T frames, of their first shape.

    Returns:
        Classes, (N,) int64: `motion`, `shape`, `texture`, numbered as in `CLASSES`. Points, float64:
        `colors` (N, 2, 3) of the shape and `background` (N, 2, 3), in 0..255; `position` (N, T, 2), the shape's
        center (x, y) in pixels, and what adds up to it: its mean `place` (N, 1, 2), and around that `slow_motion`
        (N, T, 2), of cycles of `SLOW_FRAMES` or more, and `fast_motion` (N, T, 2).
    """
    first = [clip["shapes"][0] for clip in factors]
    return {
        "motion": torch.tensor([MOTIONS.index(clip["motion"]) for clip in factors]),
        "shape": torch.tensor([SHAPES.index(shape["kind"]) for shape in first]),
        "texture": torch.tensor([TEXTURES.index(shape["texture"]["kind"]) for shape in first]),
        "colors": 255 * torch.tensor([shape["colors"] for shape in first], dtype=torch.float64),
        "background": 255 * torch.tensor([clip["background"]["colors"] for clip in factors], dtype=torch.float64),
        **motion_parts(torch.tensor([shape["centers"] for shape in first], dtype=torch.float64)),
    }


def motion_parts(position: torch.Tensor) -> dict[str, torch.Tensor]:
    """Centers (N, T, 2), with the mean place, and the slow and the fast motion around it."""
    place = position.mean(dim=1, keepdim=True)
    slow = _slow(position.shape[1]) @ (position - place)
    return {"position": position, "place": place, "slow_motion": slow, "fast_motion": position - place - slow}


def _slow(num_frames: int) -> torch.Tensor:
    """(T, T): projects a track onto the slow ones of the cosines of DCT-II, whose half cycles suit a slide."""
    t = torch.arange(num_frames, dtype=torch.float64) + 0.5
    half_cycles = torch.arange(2 * num_frames // SLOW_FRAMES + 1, dtype=torch.float64)
    basis = F.normalize(torch.cos(math.pi * half_cycles[:, None] * t / num_frames), dim=1)
    return basis.T @ basis


def cross_factors(a: dict, b: dict) -> dict:
    """The factors of the perfect reenactment: everything as in `a`, its first shape moving as that of `b` does."""
    look, moves = a["shapes"][0], b["shapes"][0]
    turned = [look["angles"][0] + angle - moves["angles"][0] for angle in moves["angles"]]
    shape = {**look, "centers": moves["centers"], "scales": moves["scales"], "angles": turned}
    return {**a, "motion": b["motion"], "motion_parameters": b["motion_parameters"], "shapes": [shape]}


def crossed_pairs(motions: torch.Tensor) -> torch.Tensor:
    """For each clip A, in place, the index of a clip B that moves in another way: (N,), each clip being B once.

    Args:
        motions: (N,), sorted, as many of each of K >= 2 classes.

    Raises:
        ValueError: if they are not.
    """
    classes, counts = motions.unique(return_counts=True)
    each = int(counts[0])
    if len(classes) < 2 or (counts != each).any() or (motions.diff() < 0).any():
        raise ValueError("pairs need clips sorted by motion, 2 classes or more, as many clips of each.")
    i = torch.arange(len(motions))
    return (i + each * (1 + i % each % (len(classes) - 1))) % len(motions)


def strangers(partner: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """For each pair (i, partner[i]) of N clips a third clip: (N,), each clip once, the same for the same seed.

    Args:
        partner: (N,), from `crossed_pairs`.

    Raises:
        ValueError: for fewer than 3 clips, or partners that are not each clip once and never its own.
    """
    own, generator = torch.arange(len(partner)), torch.Generator().manual_seed(seed)
    if len(partner) < 3 or (partner == own).any() or not torch.equal(partner.sort().values, own):
        raise ValueError("a third clip needs 3 clips or more, each the partner of one other clip.")
    while True:  # about one permutation in eight avoids both, and there is one for any such partners
        drawn = torch.randperm(len(partner), generator=generator)
        if not ((drawn == own) | (drawn == partner)).any():
            return drawn


# --- what the pixels show ------------------------------------------------------------------------------------------


def pixel_measurements(clips: torch.Tensor) -> dict[str, torch.Tensor]:
    """Simple measurements of clips (B, 3, T, H, W) in [-1, 1], for each target that is read: (B, ·) in float64.

    A sprite is brighter than any background, so brightness says where the shape is: `position` is its center of
    gravity in each frame in pixels. `motion` holds amplitudes of that track, of the shape's area and of a window that
    follows it, by temporal frequency; `shape` and `texture` such windows and their amplitudes by spatial frequency;
    `colors` mean colors.
    """
    pixels = (clips.double().clamp(-1, 1) + 1) / 2
    brightest = pixels.amax(dim=1)
    mask = ((brightest - 0.62) / 0.16).clamp(0, 1)  # backgrounds reach 0.59, shapes start at 0.85
    frames, height, width = mask.shape[1:]
    grid = [torch.arange(size, dtype=mask.dtype, device=mask.device) + 0.5 for size in (width, height)]
    area = mask.sum(dim=(2, 3)) + 1e-3
    nowhere = 1e-3 * mask.new_tensor([width / 2, height / 2])
    weighted = torch.stack([mask.sum(dim=2) @ grid[0], mask.sum(dim=3) @ grid[1]], dim=-1)
    position = (weighted + nowhere) / area[..., None]

    # Windows of a fixed size that follow the shape, and others as large as the shape is.
    paleness = mask * pixels.amin(dim=1) / brightest.clamp(min=1e-3)  # where the tint is
    steady = _follow(torch.stack([mask, paleness], dim=2), position, torch.full_like(area, 0.3 * width))
    scaled = _follow(torch.stack([mask, paleness], dim=2), position, area.sqrt())
    change = torch.fft.rfft(steady, dim=1).abs().square().mean(dim=(2, 3, 4)).sqrt() / CROP
    shape_mask = scaled[:, :, 0]
    inside = shape_mask.mean(dim=(2, 3), keepdim=True).clamp(min=1e-3)
    tint = scaled[:, :, 1].sum(dim=(2, 3), keepdim=True) / shape_mask.sum(dim=(2, 3), keepdim=True).clamp(min=1e-3)
    texture = _amplitudes((scaled[:, :, 1] - tint * shape_mask) / inside)

    track = torch.fft.rfft((position - position.mean(dim=1, keepdim=True)) / width, dim=1).abs()
    size = torch.fft.rfft(area.log() - area.log().mean(dim=1, keepdim=True), dim=1).abs()
    motion = torch.cat([track.flatten(1), size, change, track.square().sum(dim=2).sqrt()], dim=1) / frames

    def color(weights: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bthw,bcthw->bc", weights, pixels) / (weights.sum(dim=(1, 2, 3))[:, None] + 1e-3)

    return {
        "motion": _with_products(motion, 1e-2),
        "shape": torch.cat([shape_mask[:, 0].flatten(1), _amplitudes(shape_mask)], dim=1),
        "texture": _with_products(texture, 1e-6),
        "colors": torch.cat([color(mask), color(paleness), color((mask - 2 * paleness).clamp(min=0))], dim=1),
        "position": position.flatten(1),
    }


def _follow(maps: torch.Tensor, centers: torch.Tensor, half: torch.Tensor) -> torch.Tensor:
    """Square windows of maps (B, T, C, H, W) around centers (B, T, 2), `half` (B, T) pixels each way.

    Returns (B, T, C, CROP, CROP).
    """
    size = centers.new_tensor([maps.shape[-1], maps.shape[-2]])
    steps = (torch.arange(CROP, dtype=maps.dtype, device=maps.device) + 0.5) * 2 / CROP - 1
    offsets = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), dim=-1)
    where = centers[:, :, None, None] + half[:, :, None, None, None] * offsets
    where = 2 * where / size - 1
    windows = F.grid_sample(maps.flatten(0, 1), where.flatten(0, 1), align_corners=False)
    return windows.unflatten(0, maps.shape[:2])


def _amplitudes(windows: torch.Tensor) -> torch.Tensor:
    """Amplitudes of the lower spatial frequencies of windows (B, T, CROP, CROP), the mean over frames: (B, ·)."""
    amplitudes = torch.fft.rfft2(windows, norm="ortho").abs().mean(dim=1)
    return torch.cat([amplitudes[:, :7, :7], amplitudes[:, -6:, :7]], dim=1).flatten(1)


def _with_products(x: torch.Tensor, floor: float) -> torch.Tensor:
    """x (B, D), and all products of two of its values over its squared length: (B, D + D * (D + 1) / 2)."""
    direction = x / (x.norm(dim=1, keepdim=True) + floor)
    rows, columns = torch.triu_indices(x.shape[1], x.shape[1], device=x.device)
    return torch.cat([x, direction[:, rows] * direction[:, columns]], dim=1)


class SpriteReaders:
    """Linear probes that read a sprite's factors from `pixel_measurements`.

    Args:
        measurements: of N clips as drawn, (N, ·) for each target that is read.
        targets: theirs, from `sprite_targets`.
    """

    def __init__(self, measurements: dict[str, torch.Tensor], targets: dict[str, torch.Tensor]) -> None:
        self.maps: dict[str, LinearMap] = {}
        for name, values in measurements.items():
            wanted = targets[name]
            numbers = F.one_hot(wanted, len(CLASSES[name])) if name in CLASSES else wanted.flatten(1)
            self.maps[name] = Ridge(values).fit(numbers)

    def read(self, clips: torch.Tensor) -> dict[str, torch.Tensor]:
        """What clips (B, 3, T, H, W) in [-1, 1] show, on the CPU: as `sprite_targets`, without the background."""
        shown = {name: self.maps[name](x).cpu() for name, x in pixel_measurements(clips).items()}
        shown |= {name: shown[name].argmax(dim=1) for name in CLASSES}
        position = shown["position"].unflatten(1, (-1, 2))
        return shown | {"colors": shown["colors"].unflatten(1, (2, 3)), **motion_parts(position)}

    def scores(self, shown: dict[str, torch.Tensor], targets: dict[str, torch.Tensor]) -> dict[str, Score]:
        """How rightly M clips show M clips' factors: the accuracy of a class, the mean distance of points.

        Chance is the commonest class and the mean point of the clips that the probes were fitted on.
        """
        scores, mean_points = {}, self._mean_points()
        for name, given in shown.items():
            wanted = targets[name]
            if name in CLASSES:
                commonest = self.maps[name].bias.argmax().cpu()
                scores[name] = share(given == wanted, chance=(wanted == commonest).double().mean().item())
            else:
                chance = (mean_points[name] - wanted).norm(dim=2).mean().item()
                scores[name] = mean((given - wanted).norm(dim=2).mean(dim=1), chance)
        return scores

    def _mean_points(self) -> dict[str, torch.Tensor]:
        bias = {name: fitted.bias.cpu()[None] for name, fitted in self.maps.items()}
        return {
            "colors": bias["colors"].unflatten(1, (2, 3)),
            **motion_parts(bias["position"].unflatten(1, (-1, 2))),
        }


# --- whose factors -------------------------------------------------------------------------------------------------


def whose(
    shown: dict[str, torch.Tensor],
    a: dict[str, torch.Tensor],
    b: dict[str, torch.Tensor],
    unrelated: dict[str, torch.Tensor],
) -> dict[str, dict[str, Score | int]]:
    """How often reenactments show A's factor, B's, or neither's.

    A class is A's, B's or another one, over the pairs whose classes differ. Points are A's when they are nearer to
    A's than half the way from A's to B's, B's likewise, and neither's otherwise, over the pairs that lie `APART` or
    more apart.

    Args:
        shown: what N reenactments show, from `SpriteReaders.read`.
        a, b: `sprite_targets` of the N clips that gave the structure and the dynamics.
        unrelated: what N clips show that are neither the pair's A nor its B: they say what chance is.

    Returns:
        For each target `a`, `b`, `neither` (shares), the number of `pairs`, and of points `way`, how far they went
        from A's (0) to B's (1), measured along the straight line. A target without such pairs is left out.
    """
    result = {}
    for name in shown:
        apart = a[name] != b[name] if name in CLASSES else _rms(a[name] - b[name]) >= APART
        if not apart.any():
            continue
        found, by_chance = (_verdicts(x[name][apart], a[name][apart], b[name][apart]) for x in (shown, unrelated))
        scores: dict[str, Score | int] = {
            key: share(found[key], chance=by_chance[key].double().mean().item()) for key in ("a", "b", "neither")
        }
        if "along" in found:
            chance = (by_chance["along"].sum() / by_chance["whole"].sum()).item()
            scores["way"] = ratio(found["along"], found["whole"], chance)
        result[name] = scores | {"pairs": int(apart.sum())}
    return result


def _verdicts(shown: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
    if shown.ndim == 1:
        found = {"a": shown == a, "b": shown == b}
    else:
        half = _rms(a - b) / 2
        found = {"a": _rms(shown - a) < half, "b": _rms(shown - b) < half}
        found |= {"along": ((shown - a) * (b - a)).sum(dim=(1, 2)), "whole": (b - a).square().sum(dim=(1, 2))}
    return found | {"neither": ~(found["a"] | found["b"])}


def _rms(points: torch.Tensor) -> torch.Tensor:
    """Of (N, P, d): (N,), the root of the points' mean squared length."""
    return points.square().sum(dim=2).mean(dim=1).sqrt()
