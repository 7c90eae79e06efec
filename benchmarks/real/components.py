"""What each latent of a VidTwin holds on real clips: background, motion and class of clips decoded from one latent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from autoencoder import AutoencoderKLVidTwin, TwinLatents
from vidgen.common.progress import progress

from .clips import Clips, to_float
from .reconstruction import BATCH, interval

COMPONENTS = ("both", "structure", "dynamics")
STATIC_SHARE = 0.5  # the part of the frame that moves least is its background
Classify = Callable[[torch.Tensor], list[str]]  # clips (N, 3, T, H, W) in [-1, 1] -> names of classes


def background_similarity(clips: torch.Tensor, originals: torch.Tensor) -> torch.Tensor:
    """How alike the backgrounds of clips and originals are: 1 if equal, about 0 if unrelated; (B,).

    The concordance correlation coefficient (Lin 1989) of the colors of all pixels in the half of the frame where the
    original's frames differ least, over all frames. Unlike a plain correlation it also falls if brightness or
    contrast differ.

    Args:
        clips, originals: (B, 3, T, H, W) in [-1, 1].
    """
    motion = originals.var(dim=2, correction=0).mean(dim=1).flatten(1)  # (B, H W)
    count = max(1, round(STATIC_SHARE * motion.shape[1]))
    static = motion.topk(count, dim=1, largest=False).indices[:, None, None]
    index = static.expand(-1, *clips.shape[1:3], -1)
    a, b = (x.flatten(3).gather(3, index).flatten(1).double() for x in (clips.clamp(-1, 1), originals))
    covariance = ((a - a.mean(dim=1, keepdim=True)) * (b - b.mean(dim=1, keepdim=True))).mean(dim=1)
    spread = a.var(dim=1, correction=0) + b.var(dim=1, correction=0) + (a.mean(dim=1) - b.mean(dim=1)).square()
    return torch.where(spread > 0, 2 * covariance / spread.clamp(min=1e-12), torch.ones_like(spread))


def motion_correlation(clips: torch.Tensor, originals: torch.Tensor) -> torch.Tensor:
    """Correlation of the differences between frames with those of originals: (B,), 0 for a still picture."""
    a, b = (x.clamp(-1, 1).diff(dim=2).flatten(1).double() for x in (clips, originals))
    a, b = (x - x.mean(dim=1, keepdim=True) for x in (a, b))
    return (a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-9)


def pair_classes(labels: Sequence[str]) -> list[int]:
    """For each clip the index of a partner, each clip once, of another class as far as no class has over half."""
    order = sorted(range(len(labels)), key=lambda i: labels[i])
    shift = max(len(labels) // 2, 1)
    partner = [0] * len(labels)
    for place, index in enumerate(order):
        partner[index] = order[(place + shift) % len(labels)]
    return partner


@torch.no_grad()
def measure_components(vae: AutoencoderKLVidTwin, clips: Clips, classify: Classify | None) -> dict[str, Any]:
    """Scores of clips decoded from both latents or one, and of latent swaps within a data set.

    Args:
        clips: of one data set.
        classify: predicts their classes; None: no accuracies.

    Returns:
        For each of `COMPONENTS` and `original` `background`, `motion` and, with a classifier, `accuracy`; `swap` of
        the structure of A and the dynamics of B: `background_a`, `background_b`, `motion_a`, `motion_b`, `accuracy_a`
        and `accuracy_b`; all with intervals over groups.
    """
    partner = pair_classes(clips.labels)
    columns: dict[str, dict[str, list]] = {name: {} for name in ("original", *COMPONENTS, "swap")}

    def add(row: str, **values: list[float]) -> None:
        for name, column in values.items():
            columns[row].setdefault(name, []).extend(column)

    for batch in progress(torch.arange(len(clips)).split(BATCH), "decoding components"):
        indices, others = batch.tolist(), [partner[i] for i in batch.tolist()]
        a, b = (to_float(clips.pixels[i]) for i in (indices, others))
        labels, other_labels = ([clips.labels[i] for i in part] for part in (indices, others))
        latents, donors = (vae.unpack(vae.encode(x.to(vae.device, vae.dtype)).latent_dist.mode()) for x in (a, b))
        decoded = {"original": a}
        decoded |= {name: vae.decode(latents, name).sample.float().cpu() for name in COMPONENTS}
        for row, video in decoded.items():
            add(row, background=background_similarity(video, a).tolist(), motion=motion_correlation(video, a).tolist())
            if classify:
                add(row, accuracy=matches(classify(video), labels))
        swapped = vae.decode(TwinLatents(latents.structure, donors.dynamics)).sample.float().cpu()
        for name, source, names in (("a", a, labels), ("b", b, other_labels)):
            add("swap", **{f"background_{name}": background_similarity(swapped, source).tolist()})
            add("swap", **{f"motion_{name}": motion_correlation(swapped, source).tolist()})
            if classify:
                add("swap", **{f"accuracy_{name}": matches(classify(swapped), names)})
    return {
        row: {name: interval(values, clips.groups) for name, values in scores.items()}
        for row, scores in columns.items()
    }


def matches(predicted: Sequence[str], labels: Sequence[str]) -> list[float]:
    """1 where a class was predicted right, else 0."""
    return [float(a == b) for a, b in zip(predicted, labels, strict=True)]
