"""How well a pipeline follows prompts of sprites: seen and held-out compositions, a prompt per stream, guidance."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from pipelines import VidTwinPipeline
from vidgen.data.sprite_captions import SpriteDescription
from vidgen.data.sprites import MOTIONS
from vidgen.metrics.fvd import Sampling
from vidgen.metrics.stats import ratio, share

from ..common.generation import BATCH, sample_clips
from ..sprites.classifier import SpriteClassifier, sprite_sizes
from ..sprites.latent_swap import pair_motions
from .factors import FACTORS, Names, PromptedSprites, compare_names, name_factors, score_names, write_prompts

SEED = 2000  # of the sprites whose prompts are measured, plus the seed of sampling; trainings use small seeds
OTHER_SEED = 1  # of a second wording
ONE_SHAPE = tuple(motion for motion in MOTIONS if motion != "swap")


@dataclass(frozen=True)
class PromptTasks:
    """The tasks of one pipeline, scored by one classifier.

    Args:
        pipeline: of a model of captioned sprites.
        classifier: predicts motion and shape.
        sampling: seed, guidance and steps of all clips; with another seed the prompts are of other sprites.
        per_motion: prompts of each motion in each task.
    """

    pipeline: VidTwinPipeline
    classifier: SpriteClassifier
    sampling: Sampling
    per_motion: int

    def compositions(self, held_out: bool) -> dict[str, Any]:
        """Accuracy by factor of clips `generated` from prompts of seen or held-out compositions.

        The same of the `real` sprites that the prompts describe, and of their `reconstruction`.
        """
        sprites = self._draw(held_out)
        real = sprites.clips()
        sets = {
            "generated": self._sample(prompt=write_prompts(sprites.descriptions)),
            "reconstruction": self._reconstruct(real),
            "real": real,
        }
        wanted = sprites.names()
        return {name: score_names(self._name(clips, wanted["motion"]), wanted) for name, clips in sets.items()}

    def swapped_dynamics(self, whole: bool) -> dict[str, Any]:
        """Structure prompts of sprites A with dynamics prompts of sprites B, which have other motions.

        Args:
            whole: whether both prompts describe the whole sprite, so that they contradict each other, instead of the
                appearance of A and the motion of B.

        Returns:
            `unswapped`: `score_names` of clips with both prompts of A. `swapped`: the same with the motion of B.
            `motion_of_structure`: the fraction of swapped clips that move as A. `relative`: accuracy of swapped clips
            divided by that of unswapped ones, by factor; None where too few of these are right.
        """
        sprites = self._draw(held_out=False, motions=ONE_SHAPE)
        names, descriptions = sprites.names(), sprites.descriptions
        partner = pair_motions(torch.tensor([MOTIONS.index(motion) for motion in names["motion"]])).tolist()
        structure, dynamics = (
            write_prompts([each if whole else part(each) for each in descriptions], seed)
            for seed, part in ((0, SpriteDescription.appearance), (OTHER_SEED, SpriteDescription.movement))
        )
        wanted = names | {"motion": [names["motion"][i] for i in partner]}
        unswapped = self._sample(structure_prompt=structure, dynamics_prompt=dynamics)
        swapped = self._sample(structure_prompt=structure, dynamics_prompt=[dynamics[i] for i in partner])
        found = [self._name(clips, names["motion"]) for clips in (unswapped, swapped)]
        hits = [compare_names(found[0], names), compare_names(found[1], wanted)]
        return {
            "unswapped": score_names(found[0], names),
            "swapped": score_names(found[1], wanted),
            "motion_of_structure": asdict(share(compare_names(found[1], names)["motion"])),
            "relative": {name: _divide(hits[1][name], hits[0][name]) for name in FACTORS},
        }

    def guidance(self, scales: tuple[float, ...]) -> dict[str, Any]:
        """Accuracy by factor of the same prompts with each guidance scale."""
        sprites = self._draw(held_out=False)
        prompts, wanted = write_prompts(sprites.descriptions), sprites.names()
        scores = {}
        for scale in scales:
            clips = self._sample(replace(self.sampling, guidance_scale=scale), prompt=prompts)
            scores[f"{scale:g}"] = score_names(self._name(clips, wanted["motion"]), wanted)
        return scores

    def negative_prompts(self) -> dict[str, Any]:
        """How often a color and a motion that the prompt leaves open recur with a negative prompt, by factor.

        Clips are generated first without a negative prompt. With the same noise, the negative prompt names the color
        or motion that the clip shows (`same`), or one that another clip shows (`other`, the reference).

        Returns:
            By factor the fraction of clips that still show what they showed, for both negative prompts.
        """
        descriptions = self._draw(held_out=False, motions=ONE_SHAPE).descriptions
        open_prompts = {
            "color": write_prompts([replace(each, colors=(None,)) for each in descriptions]),
            "motion": write_prompts([each.appearance() for each in descriptions]),
        }
        scores = {}
        for factor, prompts in open_prompts.items():
            before = self._name(self._sample(prompt=prompts), ["still"] * len(prompts))[factor]
            other = [next((b for b in before[i:] + before[:i] if b != a), a) for i, a in enumerate(before)]
            scores[factor] = {}
            for name, avoided in (("same", before), ("other", other)):
                clips = self._sample(prompt=prompts, negative_prompt=_describe_only(factor, avoided, descriptions))
                after = self._name(clips, ["still"] * len(prompts))[factor]
                kept = torch.tensor([a == b for a, b in zip(after, before, strict=True)])
                scores[factor][name] = asdict(share(kept))
        return scores

    def _draw(self, held_out: bool, motions: tuple[str, ...] = MOTIONS) -> PromptedSprites:
        sizes = sprite_sizes(self.pipeline.autoencoder)
        return PromptedSprites.draw(
            self.per_motion, SEED + self.sampling.seed, held_out=held_out, motions=motions, **sizes
        )

    def _sample(self, sampling: Sampling | None = None, **prompts: list[str]) -> torch.Tensor:
        count = len(next(iter(prompts.values())))
        return sample_clips(self.pipeline, count, sampling or self.sampling, **prompts)

    def _name(self, clips: torch.Tensor, motions: list[str]) -> Names:
        return name_factors(clips, motions, self.classifier)

    @torch.no_grad()
    def _reconstruct(self, clips: torch.Tensor) -> torch.Tensor:
        vae = self.pipeline.autoencoder
        return torch.cat([vae(x.to(vae.device, vae.dtype)).sample.float().cpu() for x in clips.split(BATCH)])


def _divide(hits: torch.Tensor, reference: torch.Tensor) -> dict[str, float | None] | None:
    score = ratio(hits.double(), reference.double())
    return asdict(score) if all(map(math.isfinite, (score.value, score.low, score.high))) else None


def _describe_only(factor: str, names: list[str], descriptions: list[SpriteDescription]) -> list[str]:
    """Prompts of one factor: "a red star" of each description's shape, or "something orbits"."""
    if factor == "motion":
        only = [SpriteDescription(name, None) for name in names]
    else:
        shapes = [description.shapes for description in descriptions]
        only = [SpriteDescription(None, kinds, (name,)) for kinds, name in zip(shapes, names, strict=True)]
    return write_prompts(only, OTHER_SEED)
