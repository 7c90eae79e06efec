"""Checking a data set: every file is reported once, with the correct kind, even if it crashes or hangs the decoder."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from video_makers import encode

from vidgen.data.check import VideoReport, check_videos, inspect_video, write_reports

LENGTH = dict(num_frames=8, fps=8)


def test_every_kind_of_report(tmp_path, frames, sprites):
    good = inspect_video(shutil.copy(next(sprites.rglob("*.mp4")), tmp_path / "good.mp4"), **LENGTH)
    assert (good.kind, good.reason, good.width, good.num_frames, good.codec) == ("good", "", 64, 16, "h264")
    assert good.duration == pytest.approx(2) and good.fps == pytest.approx(8)

    def kind_of(path: Path) -> tuple[str, str]:
        report = inspect_video(path, **LENGTH)
        assert report.path == str(path)
        return report.kind, report.reason

    uneven = np.cumsum(np.random.default_rng(0).integers(10, 150, len(frames)))
    assert kind_of(encode(tmp_path / "a.mp4", frames, milliseconds=uneven)) == ("odd", "its frame rate varies")
    assert kind_of(encode(tmp_path / "b.mp4", frames, rotation=90)) == ("odd", "it is stored rotated")
    assert kind_of(encode(tmp_path / "c.mp4", frames[:, :16])) == ("odd", "one side is over 3 times the other")
    see_through = np.concatenate([frames, frames[..., :1]], -1)
    transparent = encode(tmp_path / "d.mov", see_through, "qtrle", "argb")
    assert kind_of(transparent) == ("odd", "it is partly transparent")
    kind, reason = kind_of(encode(tmp_path / "e.mp4", frames[:20]))
    assert kind == "short" and reason.startswith("too short: it lasts 0.80 s")
    assert kind_of(tmp_path / "absent.mp4") == ("unreadable", "no such file")

    whole = encode(tmp_path / "whole.mp4", frames, options={"g": "12"}).read_bytes()
    (tmp_path / "f.mp4").write_bytes(whole[: len(whole) // 2])
    assert kind_of(tmp_path / "f.mp4")[0] == "unreadable"
    middle = whole.index(b"mdat") + 3000
    (tmp_path / "g.mp4").write_bytes(whole[:middle] + bytes(300) + whole[middle + 300 :])
    kind, reason = kind_of(tmp_path / "g.mp4")  # the index is intact: only decoding reveals it
    assert kind == "unreadable" and reason.startswith("frame ")
    kinds = []
    for place in range(middle, len(whole) - 2000, len(whole) // 12):  # the decoder conceals many of these
        flipped = bytes(b ^ 16 for b in whole[place : place + 40])
        (tmp_path / "h.mp4").write_bytes(whole[:place] + flipped + whole[place + 40 :])
        kinds.append(kind_of(tmp_path / "h.mp4")[0])
    assert kinds.count("unreadable") >= len(kinds) - 1  # occasionally flipped bits give a valid picture


def inspect_badly(path: str, **settings: float) -> VideoReport:
    """Crash or hang, as a decoder may."""
    if "segv" in path:
        os.kill(os.getpid(), signal.SIGSEGV)
    if "exit" in path:
        os._exit(3)
    if "hang" in path:
        time.sleep(1000)
    return VideoReport(path, width=int(settings["num_frames"]))


def test_crashes_and_hangs_end_only_their_process():
    paths = ["a", "segv", "b", "hang", "exit", "c", "segv 2", "d"]
    began = time.monotonic()
    reports = list(check_videos(paths, jobs=2, timeout=1, inspect=inspect_badly, num_frames=5))
    assert sorted(report.path for report in reports) == sorted(paths)
    reasons = {report.path: report.reason for report in reports if report.kind == "unreadable"}
    assert reasons == {
        "segv": "it crashes the decoder (SIGSEGV)",
        "segv 2": "it crashes the decoder (SIGSEGV)",
        "exit": "it crashes the decoder (exit code 3)",
        "hang": "decoding it takes over 1 s",
    }
    assert time.monotonic() - began < 50  # "hang" would take a thousand seconds
    assert all(report.width == 5 for report in reports if report.kind == "good")


def test_check_can_be_stopped_early(sprites):
    scan = check_videos(sorted(sprites.rglob("*.mp4")), jobs=1, timeout=30)
    assert next(scan).kind == "good"
    scan.close()
    assert list(check_videos([])) == []


def test_written_reports_omit_good_videos(tmp_path):
    reports = [VideoReport("b", "odd", "x"), VideoReport("c"), VideoReport("a", "short", "y", width=3)]
    lines = write_reports(tmp_path / "new" / "bad.jsonl", reports).read_text().splitlines()
    assert len(lines) == 2 and lines[0].startswith('{"path": "a", "kind": "short", "reason": "y", "width": 3')
