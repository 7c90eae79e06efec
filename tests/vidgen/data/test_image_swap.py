"""Whose first frame a clip is shown: a function of (seed, epoch, index), among clips that are motions."""

from __future__ import annotations

import pytest

from vidgen.data.image_swap import ImageSwap

LABELS = [0, 1, 2, 1, None, 2] * 50


def drawn(swap: ImageSwap, epoch: int = 0) -> list[int]:
    return [swap.draw(epoch, index) for index in range(len(LABELS))]


def test_a_fraction_of_the_motions_is_shown_another_first_frame():
    swap = ImageSwap(0.4, LABELS, {1, 2}, seed=0)
    others = drawn(swap)
    kept = [label not in (1, 2) for label in LABELS]
    assert all(other == i for i, other in enumerate(others) if kept[i])
    assert all(LABELS[other] in (1, 2) for i, other in enumerate(others) if not kept[i])
    swapped = [other != i for i, other in enumerate(others) if not kept[i]]
    assert sum(swapped) / len(swapped) == pytest.approx(0.4, abs=0.08)
    assert len({LABELS[other] for i, other in enumerate(others) if other != i}) == 2


def test_draws_depend_on_seed_and_epoch_only():
    assert drawn(ImageSwap(0.5, LABELS, {1}, 3)) == drawn(ImageSwap(0.5, LABELS, {1}, 3))
    assert drawn(ImageSwap(0.5, LABELS, {1}, 3)) != drawn(ImageSwap(0.5, LABELS, {1}, 4))
    assert drawn(ImageSwap(0.5, LABELS, {1}, 3)) != drawn(ImageSwap(0.5, LABELS, {1}, 3), epoch=1)


def test_without_classes_all_clips_take_part():
    assert sum(other != i for i, other in enumerate(drawn(ImageSwap(1.0, LABELS, set(), 0)))) > 0.95 * len(LABELS)
    assert drawn(ImageSwap(0.0, LABELS, set(), 0)) == list(range(len(LABELS)))
