"""Measures of single videos and of folders: what changes them, pairs, the CSV, and VBench's layout."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
from command_line import fail
from scipy.ndimage import gaussian_filter

from vidgen.cli import main
from vidgen.common.errors import UserError
from vidgen.common.video_writing import write_video
from vidgen.data.sprites import write_sprites
from vidgen.metrics.video_evaluation import evaluate_videos, export_vbench
from vidgen.metrics.video_measures import MEASURES, average_to_coarse, measure_video


def moving_texture(frames: int = 12, size: int = 64) -> np.ndarray:
    """A texture that moves by two pixels per frame, uint8 (T, H, W, 3); of all scales, as in natural images."""
    rng = np.random.default_rng(0)
    noise = sum(s**1.5 * gaussian_filter(rng.normal(size=(size, size + 2 * frames)), s) for s in (1, 3, 9))
    gray = (noise - noise.min()) / np.ptp(noise) * 255
    clip = np.stack([gray[:, 2 * t : 2 * t + size] for t in range(frames)])
    return np.repeat(clip.round().astype(np.uint8)[..., None], 3, axis=-1)


def blur(clip: np.ndarray) -> np.ndarray:
    return gaussian_filter(clip.astype(float), (0, 1.5, 1.5, 0)).round().astype(np.uint8)


def test_shuffled_frames_raise_temporal_measures_only():
    clip = moving_texture()
    ordered, shuffled = measure_video(clip), measure_video(clip[np.random.default_rng(1).permutation(len(clip))])
    assert shuffled.flicker > 1.1 * ordered.flicker
    assert shuffled.motion_energy > 1.5 * ordered.motion_energy
    assert shuffled.sharpness == pytest.approx(ordered.sharpness, rel=1e-6)


def test_blur_lowers_sharpness_and_not_motion_energy():
    clip = moving_texture()
    sharp, blurred = measure_video(clip), measure_video(blur(clip))
    assert blurred.sharpness < 0.7 * sharp.sharpness
    assert blurred.motion_energy == pytest.approx(sharp.motion_energy, rel=0.1)


def test_values_of_simple_videos():
    gray = np.full((4, 32, 48, 3), 100, dtype=np.uint8)
    assert list(vars(measure_video(gray)).values()) == [0.0] * len(MEASURES)
    ramp = gray + np.arange(4, dtype=np.uint8)[:, None, None, None] * 10  # brightens steadily
    measures = measure_video(ramp)
    assert measures.flicker == pytest.approx(0, abs=1e-4) and measures.motion_energy == pytest.approx(10, rel=1e-5)
    assert measures.loop_seam == pytest.approx(30, rel=1e-5)
    flashing = gray + np.array([0, 20, 0, 20], dtype=np.uint8)[:, None, None, None]
    assert measure_video(flashing).flicker == pytest.approx(20, rel=1e-5)
    across = np.tile((np.arange(48, dtype=np.uint8) * 3)[None, None, :, None], (4, 32, 1, 3))
    assert measure_video(across).sharpness == pytest.approx(3, rel=1e-5)
    with pytest.raises(UserError, match="too short: 2 frames"):
        measure_video(gray[:2])


@pytest.mark.parametrize("shape", [(64, 64), (45, 70), (70, 45), (8, 30), (5, 12)])
def test_coarse_frames_keep_the_mean_and_the_proportions(shape):
    luma = np.random.default_rng(0).random(shape)
    coarse = average_to_coarse(luma)
    assert min(coarse.shape) == min(8, *shape)
    assert coarse.mean() == pytest.approx(luma.mean(), abs=0.02)
    assert coarse.shape[0] / coarse.shape[1] == pytest.approx(shape[0] / shape[1], rel=0.06)


@pytest.fixture
def pairs(tmp_path):
    """Three real videos, and their blurred versions under the same names."""
    clip = moving_texture()
    for i in range(3):
        write_video(tmp_path / "real" / f"{i}.mp4", clip[i:], 8)
        write_video(tmp_path / "blurred" / f"{i}.mp4", blur(clip)[i:], 8)
    return tmp_path / "blurred", tmp_path / "real"


def test_a_summary_has_each_measure_beside_that_of_the_reference(pairs, tmp_path, capsys):
    videos, real = pairs
    (videos / "broken.mp4").write_bytes(b"no video")
    evaluation = evaluate_videos(videos, real, warping_error=False)
    summary = {row["measure"]: row for row in evaluation.summarize()}
    assert summary["sharpness"]["gap"] < -0.25 and abs(summary["motion_energy"]["gap"]) < 0.1
    assert summary["flicker"]["videos"]["num_videos"] == summary["flicker"]["reference"]["num_videos"] == 3
    assert [reason for _, reason in evaluation.skipped] and "psnr" not in summary
    assert evaluation.notes == [evaluation.notes[0]] and evaluation.notes[0].startswith("No pairs are compared: ")

    (videos / "broken.mp4").unlink()
    main(["evaluate", *map(str, (videos, "--reference", real, "--no-warping-error", "--output", tmp_path / "a.csv"))])
    output = capsys.readouterr().out
    assert "sharpness" in output and "psnr_frame" in output and "note" not in output
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert [(row["set"], row["path"]) for row in rows[:4]] == [
        *(("videos", f"{i}.mp4") for i in range(3)),
        ("reference", "0.mp4"),
    ]
    assert 15 < float(rows[0]["psnr"]) < 50 and rows[3]["psnr"] == "" and rows[0]["frames"] == "12"


def test_other_rates_and_sizes_are_noted_and_made_equal(pairs, tmp_path):
    videos, _ = pairs
    write_video(tmp_path / "real48" / "x.mp4", moving_texture(size=48), 12)
    notes = evaluate_videos(videos, tmp_path / "real48").notes
    assert any(note.startswith("The fps of the videos is 8 to 12; --fps") for note in notes)
    assert any("height" in note and "--size" in note for note in notes)
    evaluation = evaluate_videos(videos, tmp_path / "real48", fps=8, size=32, warping_error=False)
    assert {(row["fps"], row["height"]) for row in evaluation.rows} == {(8.0, 32)}
    assert len(evaluation.notes) == 1
    assert not any(math.isnan(row["flicker"]) for row in evaluation.rows)


def test_vbench_gets_files_named_by_prompt_and_index(tmp_path, pairs, capsys):
    write_sprites(tmp_path / "sprites", 2, seed=0, resolution=32)
    copies = export_vbench(tmp_path / "sprites", tmp_path / "vbench")
    assert sorted(path.name for path in (tmp_path / "vbench").iterdir()) == sorted(path.name for path in copies)
    assert {"bounce-0.mp4", "bounce-1.mp4"} <= {path.name for path in copies} and len(copies) == 16
    assert [path.name for path in export_vbench(pairs[0], tmp_path / "flat")] == [f"{i}-0.mp4" for i in range(3)]
    assert "none" in fail(capsys, "evaluate", tmp_path / "none")
