"""How well a pipeline reconstructs, generates, animates and retargets sprites, whose factors are known.

A classifier (`benchmarks.sprites.classifier`) predicts the factors of each clip. Every score is reported with chance,
from unrelated clips, and with the scores of real clips and of their reconstructions, which bound those of generated
clips.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from autoencoder import TwinLatents
from pipelines import VidTwinPipeline
from pipelines.classes import superclass_name
from vidgen.data.sprites import MOTIONS, SHAPES, subclass
from vidgen.metrics.fvd import Sampling
from vidgen.metrics.reconstruction import downsample_baseline, mean_color_baseline, psnr
from vidgen.metrics.stats import Score, mean, share

from ..common.generation import sample_clips
from .classifier import DrawnSprites, Prediction, SpriteClassifier
from .latent_swap import CLASSES, unrelated_pairs

BATCH = 32
PER_MOTION = {"smoke": 2, "cpu": 32}  # reference sprites, and generated clips of each task


@dataclass(frozen=True)
class SpriteTasks:
    """The tasks of one pipeline, scored by one classifier on the same sprites.

    Args:
        pipeline: of a model of sprites; its classes are `MOTIONS`, in any order, and its subclasses, if any, have the
            names of `subclass`.
        classifier: predicts the factors of clips.
        sprites: real clips that neither was trained on, motions in turn, equally many of each: the reference, and the
            source of structure and dynamics.
        sampling: seed, guidance and steps of all clips.
    """

    pipeline: VidTwinPipeline
    classifier: SpriteClassifier
    sprites: DrawnSprites
    sampling: Sampling

    def reconstruct(self) -> dict[str, Any]:
        """PSNR of the autoencoder's reconstructions in dB, per clip, with two baselines.

        Returns:
            `psnr` of `reconstructed` clips, of `downsample`, the rate-matched downsampling, and of each clip's mean
            `color`; `rate`, latent values divided by clip values.
        """
        clips, values = self.sprites.clips(), self.pipeline.autoencoder.latent_size
        approximations = {
            "reconstructed": self._reconstruct(),
            "downsample": downsample_baseline(clips, values),
            "color": mean_color_baseline(clips),
        }
        return {
            "psnr": {name: _as_dict(mean(psnr(x, clips))) for name, x in approximations.items()},
            "rate": values / clips[0].numel(),
        }

    def generate(self) -> dict[str, Any]:
        """Generate a clip of each sprite's class, or of its subclass where the pipeline has subclasses.

        Returns:
            `accuracy` of the motion of `generated`, `real` and `reconstructed` clips; `per_class` that of generated
            ones; and with subclasses `shape`, the accuracy of the shape.
        """
        labels = self.sprites.targets["motion"]
        subclasses = self.pipeline.subclasses
        names = [subclass(factors) for factors in self.sprites.factors]
        clips = {
            "generated": self._sample([name if name in subclasses else superclass_name(name) for name in names]),
            "real": self.sprites.clips(),
            "reconstructed": self._reconstruct(),
        }
        predictions = {name: self.classifier.predict(batch) for name, batch in clips.items()}
        hits = {name: predicted["motion"] == labels for name, predicted in predictions.items()}
        chance = 1 / len(MOTIONS)
        per_class = {name: hits["generated"][labels == label] for label, name in enumerate(MOTIONS)}
        scores = {
            "accuracy": {name: _as_dict(share(right, chance)) for name, right in hits.items()},
            "per_class": {name: _as_dict(share(right, chance)) for name, right in per_class.items()},
            "clips": len(labels),
        }
        if subclasses:
            specified = torch.tensor([name in subclasses for name in names])
            shapes = self.sprites.targets["shape"]
            hits = {name: (predicted["shape"] == shapes)[specified] for name, predicted in predictions.items()}
            scores["shape"] = {name: _as_dict(share(right, 1 / len(SHAPES))) for name, right in hits.items()}
        return scores

    def animate(self, strength: float = 0.0) -> dict[str, Any]:
        """Generate dynamics for the structure of real clips and their class of motion.

        Returns:
            `score_factors` of `animated` and of `reconstructed` clips.
        """
        structure = self._encode().structure
        return self._compare(animated=self._sample(self._motions(), structure=structure, structure_strength=strength))

    def retarget(self, strength: float = 0.0) -> dict[str, Any]:
        """Generate structure for the dynamics of real clips, without their class.

        Returns:
            `score_factors` of `retargeted` and of `reconstructed` clips.
        """
        dynamics = self._encode().dynamics
        return self._compare(retargeted=self._sample(None, dynamics=dynamics, dynamics_strength=strength))

    def _compare(self, **clips: torch.Tensor) -> dict[str, Any]:
        clips["reconstructed"] = self._reconstruct()
        targets = self.sprites.targets
        return {name: score_factors(self.classifier.predict(batch), targets) for name, batch in clips.items()}

    def _motions(self) -> list[str]:
        return [MOTIONS[i] for i in self.sprites.targets["motion"].tolist()]

    @torch.no_grad()
    def _reconstruct(self) -> torch.Tensor:
        vae = self.pipeline.autoencoder
        batches = self.sprites.clips().split(BATCH)
        return torch.cat([vae(x.to(vae.device, vae.dtype)).sample.float().cpu() for x in batches])

    @torch.no_grad()
    def _encode(self) -> TwinLatents:
        """The latents of the sprites."""
        vae = self.pipeline.autoencoder
        batches = self.sprites.clips().split(BATCH)
        packed = torch.cat([vae.encode(x.to(vae.device, vae.dtype)).latent_dist.mode().float() for x in batches])
        return vae.unpack(packed)

    def _sample(self, labels: list[str] | None, **conditioning: Any) -> torch.Tensor:
        """Sample a clip for each sprite."""
        return sample_clips(self.pipeline, len(self.sprites), self.sampling, class_labels=labels, **conditioning)


def score_factors(predicted: Prediction, targets: Prediction) -> dict[str, dict[str, float]]:
    """How well clips match the factors of the sprites that they were made from; chance is from other sprites.

    Args:
        predicted: for N clips, from `SpriteClassifier.predict`.
        targets: `sprite_targets` of the N sprites.

    Returns:
        Accuracy of `motion`, `shape` and `texture`; the RGB L2 distance (at most 441) of `colors`; and for sprites
        with one shape the distance of `position` in pixels.
    """
    n = len(targets["motion"])
    other = unrelated_pairs((torch.arange(n) + 1) % n)
    scores = {}
    for name in CLASSES:
        chance = (predicted[name] == targets[name][other]).double().mean().item()
        scores[name] = _as_dict(share(predicted[name] == targets[name], chance))
    one_shape = targets["motion"] != MOTIONS.index("swap")
    for name in ("colors", "position"):
        counted = one_shape if name == "position" else torch.ones(n, dtype=torch.bool)
        chance = _mean_distance(predicted[name], targets[name][other])[counted].mean().item()
        scores[name] = _as_dict(mean(_mean_distance(predicted[name], targets[name])[counted], chance))
    return scores


def _mean_distance(points: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """The mean Euclidean distance of each clip's points: (N,)."""
    return (points - others).norm(dim=2).mean(dim=1)


def _as_dict(score: Score) -> dict[str, float]:
    return {name: value for name, value in asdict(score).items() if value is not None}
