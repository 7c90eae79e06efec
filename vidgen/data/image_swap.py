"""Which first frame a clip is shown while a DiT with `image_residual` is trained: that of the clip, or of another."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

DOMAIN = 0x494D47  # separates these random numbers from those of captions


class ImageSwap:
    """Draws clips whose first frames are shown in place of others, by (seed, epoch, index).

    A model that always sees the first frame recognizes the training clip by it, and then needs neither class nor
    caption for the motion. The frame of another clip says nothing about the motion.

    Args:
        fraction: of the clips that are shown another first frame.
        labels: class id of every clip.
        motions: class ids that are motions, among which first frames are exchanged; empty: among all clips.
        seed: of the draws.
    """

    def __init__(self, fraction: float, labels: Sequence[int | None], motions: Collection[int], seed: int) -> None:
        self.fraction, self.seed = fraction, seed
        self.pool = np.array([i for i, label in enumerate(labels) if not motions or label in motions])

    def draw(self, epoch: int, index: int) -> int:
        """The index of the clip whose first frame is shown with a clip."""
        rng = np.random.default_rng([self.seed, epoch, index, DOMAIN])
        if rng.random() >= self.fraction:
            return index
        place = np.searchsorted(self.pool, index)
        is_member = place < len(self.pool) and self.pool[place] == index
        return int(self.pool[rng.integers(len(self.pool))]) if is_member else index
