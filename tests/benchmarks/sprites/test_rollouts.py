"""Roll-out scores of consistent videos, of jumps and of drift."""

from __future__ import annotations

import pytest
import torch

from benchmarks.sprites.rollouts import rollout_scores, seam_starts

WINDOW, OVERLAP, FRAMES, SIZE = 4, 1, 10, 32


class BrightSpot:
    """Replaces the classifier: predicts factors of a bright spot from its brightness."""

    def predict(self, clips: torch.Tensor) -> dict[str, torch.Tensor]:
        light = (clips.double().mean(dim=1) + 1) / 2
        grid = torch.arange(SIZE, dtype=torch.float64) + 0.5
        total = light.sum(dim=(2, 3))
        position = torch.stack([light.sum(dim=2) @ grid, light.sum(dim=3) @ grid], dim=-1) / total[..., None]
        colors = 255 * clips.amax(dim=(2, 3, 4)).double()[:, None]
        kind = (total.mean(dim=1) > 20).long()
        return {"motion": kind, "shape": kind, "colors": colors, "position": position}


def video(places: list[float], sizes: list[int] | None = None) -> torch.Tensor:
    """A white square on black, its left edge at a place in each frame: (1, 3, F, SIZE, SIZE)."""
    clip = -torch.ones(1, 3, len(places), SIZE, SIZE)
    for t, (x, size) in enumerate(zip(places, sizes or [4] * len(places), strict=True)):
        clip[:, :, t, 8 : 8 + size, int(x) : int(x) + size] = 1
    return clip


def scores(*videos: torch.Tensor) -> dict:
    labels = torch.zeros(len(videos), dtype=torch.int64)
    return rollout_scores(torch.cat(videos), labels, BrightSpot(), window=WINDOW, overlap=OVERLAP)


def test_a_steady_motion_has_no_seams_and_no_drift():
    found = scores(video([2 * t for t in range(FRAMES)]))
    assert [window["first_frame"] for window in found["windows"]] == [0, 3, 6]
    for window in found["windows"]:
        assert window["motion"]["value"] == window["shape"]["value"] == 1
        assert window["colors"]["value"] == 0
    assert found["moved"] == pytest.approx([2] * (FRAMES - 1))
    assert found["seams"]["moved"] == pytest.approx(1)
    assert found["seams"]["jumps"] == 0


def test_a_jump_between_windows_is_detected():
    places = [2 * t + (10 if t >= 3 else 0) for t in range(FRAMES)]
    found = scores(video(places))
    assert found["moved"][2] == pytest.approx(12)
    assert found["seams"]["jumps"] > 0
    assert found["seams"]["moved"] > 1.5


@pytest.mark.parametrize("frames", [8, 9])
def test_a_cut_last_window_is_scored(frames):
    jumps = scores(video([2 * t + (10 if t >= 6 else 0) for t in range(frames)]))  # it begins with frame 6
    assert jumps["seams"]["frames"] == 4 and jumps["seams"]["jumps"] == 1 / 4
    becomes = scores(video([8] * frames, [4] * (frames - 1) + [8]))
    assert [window["first_frame"] for window in becomes["windows"]] == [0, 3, frames - WINDOW]
    assert [window["shape"]["value"] for window in becomes["windows"]] == [1, 1, 0]


def test_seams_are_where_windows_start():
    assert [*seam_starts(64, 16, 2)] == [14, 28, 42, 56]
    assert [*seam_starts(59, 16, 2)] == [14, 28, 42, 56]
    assert [*seam_starts(58, 16, 2)] == [14, 28, 42]  # its last frames are the window's before
    assert not seam_starts(16, 16, 2)


def test_a_jump_within_a_window_is_not_a_seam():
    found = scores(video([0, 12, 14, 16, 18, 20, 22, 24, 26, 28]))  # the first change, and the first window's own
    assert found["seams"]["jumps"] == 0
    assert found["seams"]["moved"] < 1


def test_a_shape_that_becomes_another_has_drifted():
    becomes = video([8] * FRAMES, [4] * 5 + [8] * 5)
    stays = video([8] * FRAMES)
    found = scores(becomes, stays)
    assert [window["shape"]["value"] for window in found["windows"]] == [1, 0.5, 0.5]
    assert [window["motion"]["value"] for window in found["windows"]] == [1, 0.5, 0.5]


def test_one_window_alone_has_no_seams():
    assert scores(video([1, 2, 3, 4]))["seams"] == {"frames": 0}
