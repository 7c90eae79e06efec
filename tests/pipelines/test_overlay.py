"""The image over what does not move."""

from __future__ import annotations

import torch

from pipelines.overlay import MOVED, STILL, apply_overlay


def test_what_moves_is_of_the_video_and_the_rest_of_the_image():
    torch.manual_seed(0)
    image = torch.rand(2, 3, 12, 16) * 2 - 1
    video = (0.9 * image)[:, :, None].repeat(1, 1, 5, 1, 1)  # a softer copy
    video[:, :, 3, 4:8, 4:8] += 2 * MOVED
    shown = apply_overlay(video, image)
    moved = torch.zeros(12, 16, dtype=torch.bool)
    moved[5:7, 5:7] = True  # far enough from the edge of the square for the whole neighborhood to move
    torch.testing.assert_close(shown[:, :, 3, moved], video[:, :, 3, moved])
    moved[3:9, 3:9] = True
    for frame in range(5):
        still = torch.ones_like(moved) if frame != 3 else ~moved
        torch.testing.assert_close(shown[:, :, frame, still], image[:, :, still])


def test_the_weight_grows_with_the_change():
    image, video = torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 5, 4, 4)
    changes = (0, STILL, (STILL + MOVED) / 2, MOVED, 1)
    for frame, change in enumerate(changes):
        video[:, :, frame] += change
    shown = apply_overlay(video, image).mean(dim=(0, 1, 3, 4))
    expected = [0, 0, 0.5 * (1 + changes[2]), 1 + MOVED, 2]
    torch.testing.assert_close(shown, torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_the_precision_of_the_video_is_kept():
    shown = apply_overlay(torch.rand(1, 3, 2, 4, 4, dtype=torch.bfloat16), torch.rand(1, 3, 4, 4))
    assert shown.dtype == torch.bfloat16
