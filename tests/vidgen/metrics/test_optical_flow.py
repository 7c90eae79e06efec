"""The warping error: near zero for steady motion, large for shuffled frames and noise, and clear without OpenCV."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from command_line import fail
from scipy.ndimage import gaussian_filter

from vidgen.cli import main
from vidgen.common.errors import UserError
from vidgen.common.video_writing import write_video
from vidgen.metrics.optical_flow import estimate_flow, find_occlusion, has_optical_flow, measure_flow
from vidgen.metrics.video_evaluation import evaluate_videos

needs_opencv = pytest.mark.skipif(not has_optical_flow(), reason="OpenCV is not installed: pip install 'vidgen[flow]'")


def moving_texture(step: tuple[int, int] = (1, 2), frames: int = 8, size: int = 64) -> np.ndarray:
    """A texture of all scales that moves by `step` pixels (down, right) per frame, uint8 (T, H, W, 3)."""
    rng, margin = np.random.default_rng(0), frames * max(map(abs, step))
    noise = sum(s**1.5 * gaussian_filter(rng.normal(size=(3, *[size + 2 * margin] * 2)), (0, s, s)) for s in (1, 3, 9))
    colors = ((noise - noise.min()) / np.ptp(noise) * 255).round().astype(np.uint8).transpose(1, 2, 0)
    corners = [(margin - t * step[0], margin - t * step[1]) for t in range(frames)]
    return np.stack([colors[top : top + size, left : left + size] for top, left in corners])


@needs_opencv
@pytest.mark.parametrize("step", [(0, 2), (1, -3), (-2, 1)])
def test_a_moving_texture_has_its_motion_and_no_warping_error(step):
    clip = moving_texture(step)
    flow = estimate_flow(clip[0], clip[1])
    assert flow.shape == (64, 64, 2)
    assert np.median(flow, axis=(0, 1)) == pytest.approx([step[1], step[0]], abs=0.1)
    measures = measure_flow(clip)
    assert measures.warping_error < 1e-5 and measures.occlusion < 0.15
    unmoved = np.mean((clip[1:] / 255.0 - clip[:-1] / 255.0) ** 2)
    assert measures.warping_error < 0.01 * unmoved


@needs_opencv
def test_shuffled_frames_and_flicker_raise_the_warping_error():
    clip = moving_texture(frames=10)
    steady = measure_flow(clip)
    shuffled = measure_flow(clip[np.random.default_rng(1).permutation(len(clip))])
    assert shuffled.warping_error > 50 * steady.warping_error and shuffled.occlusion > 2 * steady.occlusion
    brightness = np.array([0, 12] * 5, dtype=np.int64)[:, None, None, None]
    flickering = (clip.astype(np.int64) // 2 + brightness).astype(np.uint8)
    assert measure_flow(flickering).warping_error == pytest.approx((12 / 255) ** 2, rel=0.2)
    still = np.repeat(clip[:1], 4, axis=0)
    assert list(vars(measure_flow(still)).values()) == [0, 0]


@needs_opencv
def test_pixels_that_are_covered_or_leave_the_frame_are_occluded():
    forward = np.zeros((32, 32, 2), dtype=np.float32)
    assert not find_occlusion(forward, forward).any()
    forward[..., 0] = 4  # to the right, and back again
    assert find_occlusion(forward, -forward).sum() == 4 * 32
    assert find_occlusion(forward, forward).all()  # does not return
    # A square moves over a still background: the background that it covers returns with the square's motion.
    forward, backward = np.zeros((2, 32, 32, 2), dtype=np.float32)
    forward[8:24, 4:12, 0], backward[8:24, 12:20, 0] = 8, -8
    occluded = find_occlusion(forward, backward)
    assert occluded[10:22, 13:19].all() and not occluded[10:22, 5:10].any() and not occluded[:6].any()

    # At a boundary of slow motions the flows agree.
    forward[:], forward[:, 16:, 0] = 0, 0.5
    occluded = find_occlusion(forward, np.zeros_like(forward))
    assert occluded[:, 15].all() and occluded.sum() == 32 * 2  # and the last column, which leaves the frame


@needs_opencv
def test_frames_that_share_nothing_count_with_all_pixels(monkeypatch):
    other = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    flow = np.zeros((16, 16, 2), dtype=np.float32)
    monkeypatch.setattr("vidgen.metrics.optical_flow.estimate_flow", lambda first, second: flow)
    monkeypatch.setattr("vidgen.metrics.optical_flow.find_occlusion", lambda a, b: np.ones((16, 16), dtype=bool))
    measures = measure_flow(other)
    expected = np.mean((other[0] / 255.0 - other[1] / 255.0) ** 2)
    assert (measures.warping_error, measures.occlusion) == (pytest.approx(expected, rel=1e-5), 1)
    monkeypatch.undo()
    with pytest.raises(UserError, match="too small: optical flow needs frames of 12 x 12"):
        measure_flow(other[:, :8, :8])
    with pytest.raises(UserError, match="too short: 1 frame"):
        measure_flow(other[:1])


@needs_opencv
def test_the_command_shows_the_warping_error_beside_that_of_real_videos(tmp_path, capsys):
    clip = moving_texture()
    write_video(tmp_path / "real" / "a.mp4", clip, 8)
    jumping = np.stack([np.roll(frame, 17 * t, axis=(0, 1)) for t, frame in enumerate(clip)])
    write_video(tmp_path / "fake" / "a.mp4", jumping, 8)
    command = ["evaluate", tmp_path / "fake", "--reference", tmp_path / "real", "--output", tmp_path / "a.csv"]
    main([*map(str, command)])
    output = capsys.readouterr().out
    assert "warping_error" in output and "occlusion" in output and "OpenCV" not in output
    fake, real = csv.DictReader((tmp_path / "a.csv").open())
    assert float(fake["warping_error"]) > 10 * float(real["warping_error"]) > 0
    main([*map(str, command), "--no-warping-error"])
    assert "warping_error" not in capsys.readouterr().out
    write_video(tmp_path / "tiny" / "a.mp4", clip[:, :8, :8], 8)  # is still measured otherwise
    assert "warping_error" not in evaluate_videos(tmp_path / "tiny").rows[0]


def test_without_opencv_one_sentence_states_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("vidgen.metrics.optical_flow.has_optical_flow", lambda: False)
    monkeypatch.setattr("vidgen.metrics.video_evaluation.has_optical_flow", lambda: False)
    write_video(tmp_path / "videos" / "a.mp4", moving_texture(frames=4), 8)
    evaluation = evaluate_videos(tmp_path / "videos")
    assert "warping_error" not in evaluation.rows[0] and evaluation.rows[0]["sharpness"] > 0
    [note] = evaluation.notes
    assert note.startswith("The warping error is not measured") and "pip install" in note
    error = fail(capsys, "evaluate", tmp_path / "videos", "--warping-error", "--output", tmp_path / "a.csv")
    assert "vidgen[flow]" in error
    assert evaluate_videos(tmp_path / "videos", warping_error=False).notes == []
    with pytest.raises(UserError, match="pip install"):
        measure_flow(moving_texture(frames=2))
