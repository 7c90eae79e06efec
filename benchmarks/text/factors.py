"""Sprites with prompts, and the names of the factors that generated clips show.

Motion and shape are predicted by the sprite classifier. Color and background are the names of the hues that are
nearest to the measured RGB: shapes are bright and backgrounds are dark, so a threshold separates them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import count

import numpy as np
import torch

from vidgen.data.sprite_captions import (
    BACKGROUNDS,
    BORDER,
    COLORS,
    SpriteDescription,
    describe_sprite,
    name_color,
    write_caption,
)
from vidgen.data.sprites import MOTIONS, SHAPES, render_sprite, sample_factors
from vidgen.data.transforms import frames_to_clip
from vidgen.metrics.stats import share

from ..sprites.classifier import SpriteClassifier

FACTORS = ("motion", "shape", "color", "background")
DARK, BRIGHT = 0.62, 0.78  # largest channel, in [0, 1]; backgrounds reach 0.59, shapes start at 0.85
Names = dict[str, list[str]]  # a name per clip, by factor


@dataclass(frozen=True)
class PromptedSprites:
    """Real sprites, in turn of all motions, whose factors all have clear names.

    Attributes:
        factors: of each sprite, from `sample_factors`.
        descriptions: their names.
    """

    factors: list[dict]
    descriptions: list[SpriteDescription]

    @classmethod
    def draw(
        cls, per_motion: int, seed: int, *, held_out: bool, motions: Sequence[str] = MOTIONS, **sizes: int
    ) -> PromptedSprites:
        """Draw sprites of seen or of held-out compositions, sorted by motion.

        Args:
            per_motion: sprites of each motion.
            seed: of the factors, as in `write_sprites`.
            held_out: whether each has a held-out composition, or none has.
            sizes: `num_frames` and `resolution` of the clips.
        """
        drawn = []
        for motion in motions:
            label = MOTIONS.index(motion)
            sprites = (sample_factors(np.random.default_rng([seed, label, i]), motion, **sizes) for i in count())
            named = ((factors, describe_sprite(factors, BORDER)) for factors in sprites)
            chosen = (pair for pair in named if pair[1].is_complete and pair[1].is_held_out == held_out)
            drawn += [next(chosen) for _ in range(per_motion)]
        return cls([factors for factors, _ in drawn], [description for _, description in drawn])

    def __len__(self) -> int:
        return len(self.factors)

    def clips(self) -> torch.Tensor:
        """The real clips, (N, 3, T, H, W) in [-1, 1]."""
        return frames_to_clip(torch.from_numpy(np.stack([render_sprite(factors) for factors in self.factors])))

    def names(self) -> Names:
        """The names of all factors; in `swap` the shape and the color are those of the shape on the right."""
        return {
            "motion": [description.motion for description in self.descriptions],
            "shape": [description.shapes[0] for description in self.descriptions],
            "color": [description.colors[0] for description in self.descriptions],
            "background": [description.background for description in self.descriptions],
        }


def write_prompts(descriptions: Sequence[SpriteDescription], seed: int = 0) -> list[str]:
    """A prompt for each description; its wording depends on the seed and its index."""
    return [write_caption(each, np.random.default_rng([seed, i])) for i, each in enumerate(descriptions)]


def name_factors(clips: torch.Tensor, motions: Sequence[str], classifier: SpriteClassifier) -> Names:
    """Name the factors that clips show.

    Args:
        clips: (N, 3, T, H, W) in [-1, 1].
        motions: the requested motion of each clip: of two shapes, the color of the right one counts.
        classifier: predicts motion and shape.
    """
    predicted = classifier.predict(clips)
    colors, backgrounds = measure_colors(clips, torch.tensor([motion == "swap" for motion in motions]))
    return {
        "motion": [MOTIONS[i] for i in predicted["motion"].tolist()],
        "shape": [SHAPES[i] for i in predicted["shape"].tolist()],
        "color": [name_color(rgb, COLORS) for rgb in colors.tolist()],
        "background": [name_color(rgb, BACKGROUNDS) for rgb in backgrounds.tolist()],
    }


def measure_colors(clips: torch.Tensor, two_shapes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean colors of the shape and of the background of clips (N, 3, T, H, W), both (N, 3) in [0, 1].

    Of clips with `two_shapes`, bool (N,), only the right half of the first frame counts for the shape. Without a
    bright or a dark pixel the color of all pixels counts.
    """
    pixels = (clips.double().clamp(-1, 1) + 1) / 2
    brightest = pixels.amax(dim=1, keepdim=True)
    bright = (brightest > BRIGHT).double()
    right_half = torch.zeros_like(bright[:1])
    right_half[:, :, 0, :, right_half.shape[-1] // 2 :] = 1
    bright = torch.where(two_shapes[:, None, None, None, None], bright * right_half, bright)
    return tuple(_weighted_mean(pixels, weights + 1e-9) for weights in (bright, (brightest < DARK).double()))


def _weighted_mean(pixels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (pixels * weights).sum(dim=(2, 3, 4)) / weights.sum(dim=(2, 3, 4))


def compare_names(found: Names, wanted: Names) -> dict[str, torch.Tensor]:
    """Whether each clip shows the wanted name, bool (N,), by factor; `all` of them at once."""
    hits = {name: torch.tensor([a == b for a, b in zip(found[name], wanted[name], strict=True)]) for name in FACTORS}
    return hits | {"all": torch.stack(list(hits.values())).all(dim=0)}


def score_names(found: Names, wanted: Names) -> dict[str, dict[str, float | None]]:
    """Accuracy by factor with its interval; chance is the most frequent name."""
    hits = compare_names(found, wanted)
    chance = {name: Counter(wanted[name]).most_common(1)[0][1] / len(wanted[name]) for name in FACTORS}
    return {name: asdict(share(right, chance.get(name))) for name, right in hits.items()}
