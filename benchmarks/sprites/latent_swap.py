"""Factor attribution: whether a decoded sprite has the appearance and the motion of one clip or of another.

For the sprites of `vidgen.data.sprites`, whose factors are known. A latent swap decodes the structure of clip A with
the dynamics of clip B; if the latents are disentangled, the result looks like A and moves like B. Linear probes of
simple pixel measurements, fitted on original clips, estimate the factors; they never see a latent.

A clip of `swap` has two shapes. Its targets are those of the first one, which starts on the right; latent swaps leave
such clips out, because a clip of one shape cannot move as two do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from vidgen.data.sprites import MOTIONS, SHAPES, TEXTURES
from vidgen.metrics.stats import Score, mean, ratio, share

from .probes import LinearMap, Ridge

CLASSES = {"motion": MOTIONS, "shape": SHAPES, "texture": TEXTURES}
SLOW_FRAMES = 8  # the shortest cycle of slow motion
MIN_DIFFERENCE = 1.0  # pixels or color levels of 255; points of two clips that are closer do not differ
CROP = 24  # pixels, the side of the window that follows the shape


# --- targets ---------------------------------------------------------------------------------------------------------


def sprite_targets(factors: Sequence[dict]) -> dict[str, torch.Tensor]:
    """The targets of sprite probes, from the factors of N clips of T frames, for their first shape.

    Returns:
        Classes, (N,) int64: `motion`, `shape`, `texture`, numbered as in `CLASSES`. Points, float64:
        `colors` (N, 2, 3) of the shape and `background` (N, 2, 3), in 0..255; `position` (N, T, 2), the shape's
        center (x, y) in pixels, which is the sum of its mean `place` (N, 1, 2), of `slow_motion` (N, T, 2), with
        cycles of `SLOW_FRAMES` or more, and of `fast_motion` (N, T, 2).
    """
    first = [clip["shapes"][0] for clip in factors]
    return {
        "motion": torch.tensor([MOTIONS.index(clip["motion"]) for clip in factors]),
        "shape": torch.tensor([SHAPES.index(shape["kind"]) for shape in first]),
        "texture": torch.tensor([TEXTURES.index(shape["texture"]["kind"]) for shape in first]),
        "colors": 255 * torch.tensor([shape["colors"] for shape in first], dtype=torch.float64),
        "background": 255 * torch.tensor([clip["background"]["colors"] for clip in factors], dtype=torch.float64),
        **split_motion(torch.tensor([shape["centers"] for shape in first], dtype=torch.float64)),
    }


def split_motion(position: torch.Tensor) -> dict[str, torch.Tensor]:
    """Split centers (N, T, 2) into the mean place, and slow and fast motion around it."""
    place = position.mean(dim=1, keepdim=True)
    slow = _slow_projection(position.shape[1]) @ (position - place)
    return {"position": position, "place": place, "slow_motion": slow, "fast_motion": position - place - slow}


def _slow_projection(num_frames: int) -> torch.Tensor:
    """(T, T): projects a track onto the slow cosines of DCT-II, whose half cycles represent a slide well."""
    t = torch.arange(num_frames, dtype=torch.float64) + 0.5
    half_cycles = torch.arange(2 * num_frames // SLOW_FRAMES + 1, dtype=torch.float64)
    basis = F.normalize(torch.cos(math.pi * half_cycles[:, None] * t / num_frames), dim=1)
    return basis.T @ basis


def swap_factors(a: dict, b: dict) -> dict:
    """The factors of an ideal latent swap: those of `a`, with its first shape moving like that of `b`."""
    appearance, motion = a["shapes"][0], b["shapes"][0]
    angles = [appearance["angles"][0] + angle - motion["angles"][0] for angle in motion["angles"]]
    shape = {**appearance, "centers": motion["centers"], "scales": motion["scales"], "angles": angles}
    return {**a, "motion": b["motion"], "motion_parameters": b["motion_parameters"], "shapes": [shape]}


def pair_motions(motions: torch.Tensor) -> torch.Tensor:
    """For each clip A the index of a clip B with another motion: (N,), each clip being B once.

    Args:
        motions: (N,), sorted, with equally many of each of K >= 2 classes.

    Raises:
        ValueError: otherwise.
    """
    classes, counts = motions.unique(return_counts=True)
    each = int(counts[0])
    if len(classes) < 2 or (counts != each).any() or (motions.diff() < 0).any():
        raise ValueError("pairs need clips sorted by motion, with equally many clips of each of 2 classes or more.")
    i = torch.arange(len(motions))
    return (i + each * (1 + i % each % (len(classes) - 1))) % len(motions)


def unrelated_pairs(partner: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """For each pair (i, partner[i]) of N clips an unrelated third clip: (N,), each clip once.

    Args:
        partner: (N,), from `pair_motions`.

    Raises:
        ValueError: for fewer than 3 clips, or if `partner` is not a permutation without fixed points.
    """
    own, generator = torch.arange(len(partner)), torch.Generator().manual_seed(seed)
    if len(partner) < 3 or (partner == own).any() or not torch.equal(partner.sort().values, own):
        raise ValueError("a third clip needs 3 clips or more, each the partner of one other clip.")
    while True:  # about one permutation in eight avoids both
        drawn = torch.randperm(len(partner), generator=generator)
        if not ((drawn == own) | (drawn == partner)).any():
            return drawn


# --- measurements of pixels ------------------------------------------------------------------------------------------


def pixel_measurements(clips: torch.Tensor) -> dict[str, torch.Tensor]:
    """Simple measurements of clips (B, 3, T, H, W) in [-1, 1] for each target of a probe: (B, ·) in float64.

    Sprites are brighter than any background, so brightness locates the shape: `position` is its center of gravity in
    each frame, in pixels. `motion` holds amplitudes, by temporal frequency, of that track, of the shape's area and of
    a window that follows it; `shape` and `texture` hold such windows and their amplitudes by spatial frequency;
    `colors` holds mean colors.
    """
    # Locate the shape in each frame.
    pixels = (clips.double().clamp(-1, 1) + 1) / 2
    brightest = pixels.amax(dim=1)
    mask = ((brightest - 0.62) / 0.16).clamp(0, 1)  # backgrounds reach 0.59, shapes start at 0.85
    frames, height, width = mask.shape[1:]
    grid = [torch.arange(size, dtype=mask.dtype, device=mask.device) + 0.5 for size in (width, height)]
    area = mask.sum(dim=(2, 3)) + 1e-3
    center = 1e-3 * mask.new_tensor([width / 2, height / 2])  # of a frame without a shape
    weighted = torch.stack([mask.sum(dim=2) @ grid[0], mask.sum(dim=3) @ grid[1]], dim=-1)
    position = (weighted + center) / area[..., None]

    # Windows of a fixed size that follow the shape, and others that scale with it.
    paleness = mask * pixels.amin(dim=1) / brightest.clamp(min=1e-3)  # locates the tint
    steady = _crop_windows(torch.stack([mask, paleness], dim=2), position, torch.full_like(area, 0.3 * width))
    scaled = _crop_windows(torch.stack([mask, paleness], dim=2), position, area.sqrt())
    change = torch.fft.rfft(steady, dim=1).abs().square().mean(dim=(2, 3, 4)).sqrt() / CROP
    shape_mask = scaled[:, :, 0]
    inside = shape_mask.mean(dim=(2, 3), keepdim=True).clamp(min=1e-3)
    tint = scaled[:, :, 1].sum(dim=(2, 3), keepdim=True) / shape_mask.sum(dim=(2, 3), keepdim=True).clamp(min=1e-3)
    texture = _amplitudes((scaled[:, :, 1] - tint * shape_mask) / inside)

    # Amplitudes of the motion.
    track = torch.fft.rfft((position - position.mean(dim=1, keepdim=True)) / width, dim=1).abs()
    size = torch.fft.rfft(area.log() - area.log().mean(dim=1, keepdim=True), dim=1).abs()
    motion = torch.cat([track.flatten(1), size, change, track.square().sum(dim=2).sqrt()], dim=1) / frames

    def color(weights: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bthw,bcthw->bc", weights, pixels) / (weights.sum(dim=(1, 2, 3))[:, None] + 1e-3)

    return {
        "motion": _append_products(motion, 1e-2),
        "shape": torch.cat([shape_mask[:, 0].flatten(1), _amplitudes(shape_mask)], dim=1),
        "texture": _append_products(texture, 1e-6),
        "colors": torch.cat([color(mask), color(paleness), color((mask - 2 * paleness).clamp(min=0))], dim=1),
        "position": position.flatten(1),
    }


def _crop_windows(maps: torch.Tensor, centers: torch.Tensor, half: torch.Tensor) -> torch.Tensor:
    """Square windows (B, T, C, CROP, CROP) of maps (B, T, C, H, W) around centers (B, T, 2), of `half` (B, T) side."""
    size = centers.new_tensor([maps.shape[-1], maps.shape[-2]])
    steps = (torch.arange(CROP, dtype=maps.dtype, device=maps.device) + 0.5) * 2 / CROP - 1
    offsets = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), dim=-1)
    points = centers[:, :, None, None] + half[:, :, None, None, None] * offsets
    points = 2 * points / size - 1
    windows = F.grid_sample(maps.flatten(0, 1), points.flatten(0, 1), align_corners=False)
    return windows.unflatten(0, maps.shape[:2])


def _amplitudes(windows: torch.Tensor) -> torch.Tensor:
    """Amplitudes of the lower spatial frequencies of windows (B, T, CROP, CROP), averaged over frames: (B, ·)."""
    amplitudes = torch.fft.rfft2(windows, norm="ortho").abs().mean(dim=1)
    return torch.cat([amplitudes[:, :7, :7], amplitudes[:, -6:, :7]], dim=1).flatten(1)


def _append_products(x: torch.Tensor, floor: float) -> torch.Tensor:
    """Append to x (B, D) all products of two values divided by its squared norm: (B, D + D * (D + 1) / 2)."""
    direction = x / (x.norm(dim=1, keepdim=True) + floor)
    rows, columns = torch.triu_indices(x.shape[1], x.shape[1], device=x.device)
    return torch.cat([x, direction[:, rows] * direction[:, columns]], dim=1)


class PixelProbes:
    """Linear probes that estimate a sprite's factors from `pixel_measurements`.

    Args:
        measurements: of N original clips, (N, ·) for each target.
        targets: `sprite_targets` of these clips.
    """

    def __init__(self, measurements: dict[str, torch.Tensor], targets: dict[str, torch.Tensor]) -> None:
        self.maps: dict[str, LinearMap] = {}
        for name, values in measurements.items():
            target = targets[name]
            numbers = F.one_hot(target, len(CLASSES[name])) if name in CLASSES else target.flatten(1)
            self.maps[name] = Ridge(values).fit(numbers)

    def predict(self, clips: torch.Tensor) -> dict[str, torch.Tensor]:
        """Estimate `sprite_targets`, without the background, of clips (B, 3, T, H, W) in [-1, 1]; on the CPU."""
        predicted = {name: self.maps[name](x).cpu() for name, x in pixel_measurements(clips).items()}
        predicted |= {name: predicted[name].argmax(dim=1) for name in CLASSES}
        position = predicted["position"].unflatten(1, (-1, 2))
        return predicted | {"colors": predicted["colors"].unflatten(1, (2, 3)), **split_motion(position)}

    def score(self, predicted: dict[str, torch.Tensor], targets: dict[str, torch.Tensor]) -> dict[str, Score]:
        """Accuracy of each class, and mean distance of points, of predictions for M clips.

        Chance is the most common class and the mean point of the clips that the probes were fitted on.
        """
        scores, mean_points = {}, self._mean_points()
        for name, values in predicted.items():
            target = targets[name]
            if name in CLASSES:
                most_common = self.maps[name].bias.argmax().cpu()
                scores[name] = share(values == target, chance=(target == most_common).double().mean().item())
            else:
                chance = (mean_points[name] - target).norm(dim=2).mean().item()
                scores[name] = mean((values - target).norm(dim=2).mean(dim=1), chance)
        return scores

    def _mean_points(self) -> dict[str, torch.Tensor]:
        bias = {name: fitted.bias.cpu()[None] for name, fitted in self.maps.items()}
        return {
            "colors": bias["colors"].unflatten(1, (2, 3)),
            **split_motion(bias["position"].unflatten(1, (-1, 2))),
        }


# --- attribution -----------------------------------------------------------------------------------------------------


def factor_attribution(
    predicted: dict[str, torch.Tensor],
    a: dict[str, torch.Tensor],
    b: dict[str, torch.Tensor],
    unrelated: dict[str, torch.Tensor],
) -> dict[str, dict[str, Score | int]]:
    """How often swapped clips have A's factor, B's, or neither.

    A class is A's, B's or neither, over the pairs whose classes differ. Points are A's if their distance to A's is
    less than half the distance between A's and B's, and the same for B; only pairs at least `MIN_DIFFERENCE` apart
    count.

    Args:
        predicted: of N swapped clips, from `PixelProbes.predict`.
        a, b: `sprite_targets` of the N sources of structure and of dynamics.
        unrelated: predictions for N clips that are neither A nor B, which give chance.

    Returns:
        For each target `a`, `b`, `neither` (fractions), the number of `pairs`, and for points `interpolation`, the
        position along the line from A's (0) to B's (1). A target without such pairs is left out.
    """
    result = {}
    for name in predicted:
        differ = a[name] != b[name] if name in CLASSES else _rms(a[name] - b[name]) >= MIN_DIFFERENCE
        if not differ.any():
            continue
        hits, by_chance = (
            _attribute(x[name][differ], a[name][differ], b[name][differ]) for x in (predicted, unrelated)
        )
        scores: dict[str, Score | int] = {
            key: share(hits[key], chance=by_chance[key].double().mean().item()) for key in ("a", "b", "neither")
        }
        if "along" in hits:
            chance = (by_chance["along"].sum() / by_chance["whole"].sum()).item()
            scores["interpolation"] = ratio(hits["along"], hits["whole"], chance)
        result[name] = scores | {"pairs": int(differ.sum())}
    return result


def _attribute(values: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
    if values.ndim == 1:
        hits = {"a": values == a, "b": values == b}
    else:
        half = _rms(a - b) / 2
        hits = {"a": _rms(values - a) < half, "b": _rms(values - b) < half}
        hits |= {"along": ((values - a) * (b - a)).sum(dim=(1, 2)), "whole": (b - a).square().sum(dim=(1, 2))}
    return hits | {"neither": ~(hits["a"] | hits["b"])}


def _rms(points: torch.Tensor) -> torch.Tensor:
    """Root mean square length of points (N, P, d): (N,)."""
    return points.square().sum(dim=2).mean(dim=1).sqrt()
