"""Drift by window: smoke scale, and scores of videos that do and do not drift."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.drift import __main__ as drift
from benchmarks.drift.scores import measure_drift, score_videos
from benchmarks.drift.videos import BASELINE, METHODS, REAL, TODAY, cut_windows, draw_real, video_labels
from benchmarks.real.generation import compute_statistics
from benchmarks.sprites import classifier
from pipelines import VidTwinPipeline
from vidgen.data.sprites import MOTIONS
from vidgen.metrics.detector_options import parse_detectors

WINDOW = 4


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


class Brightness:
    """Replaces the classifier: dark clips move as their class and have shape 0, bright ones do not."""

    def predict(self, clips: torch.Tensor) -> dict[str, torch.Tensor]:
        level = clips.double().mean(dim=(1, 2, 3, 4))
        kind = (level > 0).long()
        return {"motion": kind, "shape": kind, "colors": (127.5 * (level + 1))[:, None, None].expand(-1, 2, 3)}


def score(levels: list[list[int]]) -> dict:
    """Scores of gray videos with these levels in each window."""
    videos = torch.tensor(levels, dtype=torch.uint8).repeat_interleave(WINDOW, dim=1)
    videos = videos[:, None, :, None, None].expand(-1, 3, -1, 16, 16)
    detector = parse_detectors(["pooled_pixels"], "pooled_pixels", None)[0]
    real = compute_statistics(detector, videos[:, :, :WINDOW])
    labels = torch.zeros(len(videos), dtype=torch.long)
    return score_videos(videos, labels, real, Brightness(), detector, WINDOW)


def test_videos_that_stay_have_no_drift():
    scores = score([[50, 50], [60, 60]])
    assert [window["first_frame"] for window in scores["windows"]] == [0, WINDOW]
    assert all(scores["drift"][name]["value"] == 0 for name in ("motion", "shape", "colors", "frame_color"))
    assert scores["drift"]["fvd"] == pytest.approx(0, abs=1e-9)
    assert scores["windows"][-1]["motion"]["value"] == 1


def test_drift_is_the_last_quarter_minus_the_first_window():
    scores = score([[50, 50, 50, 50], [60, 60, 200, 200]])
    drift = scores["drift"]
    assert drift["motion"]["value"] == drift["shape"]["value"] == 0.5  # one of two videos
    assert drift["colors"]["value"] == pytest.approx(140 * 3**0.5 / 2)
    assert drift["frame_color"]["value"] == pytest.approx(140 * 3**0.5 / 2)
    assert drift["fvd"] > 0
    assert [window["shape"]["value"] for window in scores["windows"]] == [1, 1, 0.5, 0.5]
    assert measure_drift([1.0, 5.0, 5.0, 5.0, 5.0, 2.0, 3.0, 4.0], rises=True) == 2.5
    assert measure_drift([1.0, 0.25], rises=False) == 0.75


def test_windows_are_whole_and_motions_in_turn():
    assert [*cut_windows(35, 16)] == [0, 16]
    labels = video_labels(len(MOTIONS) + 2)
    assert labels[-2:].tolist() == [0, 1]
    videos = draw_real(3, seed=1, num_frames=20, resolution=16)
    assert videos.shape == (3, 3, 20, 16, 16) and videos.dtype == torch.uint8
    assert not torch.equal(videos, draw_real(3, seed=2, num_frames=20, resolution=16))


def test_smoke_and_a_second_run_samples_nothing(work_dir, monkeypatch):
    arguments = ["--work-dir", str(work_dir)]
    drift.BENCHMARK.main(arguments)
    record = json.loads((work_dir / "smoke" / "drift.json").read_text())
    results = record["results"]
    assert [*results["methods"]] == [REAL, *(method.name for method in METHODS)]
    for scores in results["methods"].values():
        assert len(scores["windows"]) == drift.WINDOWS["smoke"]
    page = (work_dir / "drift.md").read_text()
    assert "history, guidance 1.5" in page and "drift.png" in page

    monkeypatch.setattr(classifier, "train_classifier", lambda *args, **kwargs: pytest.fail("trained again"))
    monkeypatch.setattr(VidTwinPipeline, "__call__", lambda *args, **kwargs: pytest.fail("sampled again"))
    for scores in (work_dir / "drift").glob("rollouts-*/scores-*.json"):
        scores.unlink()  # the videos are kept too
        break
    drift.BENCHMARK.main(arguments)
    again = json.loads((work_dir / "smoke" / "drift.json").read_text())["results"]
    assert again == results


def test_tables_state_the_ratio_to_the_roll_outs_of_today():
    def methods(drift: float) -> dict:
        drifts = {name: {"value": drift, "low": 0.0, "high": 1.0} for name in drifts_of}
        return {"drift": drifts | {"fvd": drift}, "windows": []}

    drifts_of = ("motion", "shape", "colors", "frame_color")
    results = {"methods": {BASELINE: methods(0.4), TODAY: methods(0.2), "history": methods(0.05)}}
    lines = drift.drift_table(results).splitlines()
    assert lines[2].count("| 2.00") == lines[4].count("| 0.25") == 5
    assert "|" not in lines[3].replace(" | ", "").strip("| ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scale", "paper"], "take --scale cpu"),
        (["--scale", "cpu"], "--pipeline FOLDER"),
        (["--scale", "cpu", "--pipeline", "pretrained/sprites"], "train it with diffusion.frame_timesteps"),
        (["--scale", "cpu", "--pipeline", "x", "--videos", "1"], "--videos must be 2 or more, not 1"),
    ],
)
def test_wrong_options_are_one_sentence(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        drift.BENCHMARK.main([*arguments, "--work-dir", str(tmp_path)])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
