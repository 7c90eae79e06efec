"""Which clips of the real videos a protocol has, and how they are read."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from vidgen.data.listing import list_videos
from vidgen.data.sprites import write_sprites
from vidgen.data.transforms import frames_to_clip
from vidgen.data.video import read_clip, write_video
from vidgen.metrics.protocols import get_protocol, protocol_clips
from vidgen.metrics.real_clips import RealClips, draw_windows, protocol_videos

PROTOCOL = replace(get_protocol("sprites"), frames=4, size=32, fps=4, generated=8, real=8)


@pytest.fixture(scope="module")
def sprites(tmp_path_factory):
    """Four clips of each class; read only."""
    root = tmp_path_factory.mktemp("sprites")
    write_sprites(root, 4, seed=0, resolution=32, num_frames=8)
    return root


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    """Videos of 30, 9, 16 and 4 frames at 10 fps, whose frame t is of one gray of 8 t, and one of no frame."""
    root = tmp_path_factory.mktemp("counting")
    for number, length in enumerate((30, 9, 16, 4)):
        frames = np.broadcast_to((8 * np.arange(length, dtype=np.uint8))[:, None, None, None], (length, 32, 48, 3))
        write_video(root / f"{number}.mp4", frames, 10, crf=1)
    (root / "broken.mp4").write_bytes(b"nothing")
    return list_videos(root)[0]


def clip_of(windows, frames=8, **changes):
    return replace(get_protocol("sprites"), frames=frames, size=32, windows=windows, **{"fps": None, **changes})


def first_frames(files, protocol, windows):
    """(video, frames) of windows, recognized by their grays."""
    shown = []
    for _, number, clip in (RealClips(files, windows, protocol)[i] for i in range(len(windows))):
        assert clip.shape == (3, protocol.frames, 32, 32)
        shown.append((number, (((clip.mean(dim=(0, 2, 3)) + 1) * 127.5) / 8).round().int().tolist()))
    return shown


def test_one_clip_of_each_video_at_a_random_place(counting):
    protocol = clip_of("one")
    real = draw_windows(counting, protocol, None)
    shown = first_frames(counting, protocol, real.windows)
    assert sorted(number for number, _ in shown) == [0, 1, 2]  # the fourth is too short
    assert all(frames == list(range(frames[0], frames[0] + 8)) for _, frames in shown)
    places = {window.start for seed in range(8) for window in draw_windows(counting, protocol, None, seed).windows}
    assert len(places) > 8
    assert [reason.split(":")[0].split(" (")[0] for _, reason in real.unusable] == [
        "too short",
        "not a readable video",
    ]


def test_clips_any_start_and_tiles(counting):
    for windows, expected in (("any", [23, 2, 9]), ("tiles", [3, 1, 2])):
        real = draw_windows(counting, clip_of(windows), None)
        counts = np.bincount([window.video for window in real.windows], minlength=3)
        assert counts.tolist() == expected
        assert len(set(real.windows)) == sum(expected)
    tiles = first_frames(counting, clip_of("tiles"), draw_windows(counting, clip_of("tiles"), None).windows)
    assert sorted(frames[0] for number, frames in tiles if number == 0) == [0, 8, 16]


def test_strides_and_rates_choose_frames(counting):
    strided = clip_of("one", frames=4, stride=5)
    shown = first_frames(counting, strided, draw_windows(counting, strided, None).windows)
    assert [number for number, _ in shown] == [0]
    first = shown[0][1][0]
    assert shown[0][1] == [first, first + 5, first + 10, first + 15]
    timed = clip_of("tiles", frames=4, fps=5)
    shown = first_frames(counting, timed, draw_windows(counting, timed, None).windows)
    assert sorted(frames for number, frames in shown if number == 2) == [[0, 2, 4, 6], [8, 10, 12, 14]]


def test_short_videos_repeat_their_last_frame_where_the_protocol_says(counting):
    protocol = clip_of("one", short="repeat")
    shown = dict(first_frames(counting, protocol, draw_windows(counting, protocol, None).windows))
    assert shown[3] == [0, 1, 2, 3, 3, 3, 3, 3]


def test_a_larger_set_begins_with_the_smaller_one(sprites):
    files, _ = list_videos(sprites)
    protocol = replace(PROTOCOL, windows="any", fps=None)
    few, many = (draw_windows(files, protocol, count) for count in (6, 12))
    assert many.windows[:6] == few.windows
    assert len(many.others) == 12
    assert not {w.video for w in many.windows} & {w.video for w in many.others}
    assert draw_windows(files, protocol, None).others == []
    assert draw_windows(files, protocol, 12, seed=1).windows != many.windows


def test_a_protocols_videos_are_those_of_its_split(tmp_path):
    write_sprites(tmp_path / "videos", 2, seed=0, resolution=32, num_frames=8)
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    names = [path.relative_to(tmp_path / "videos").as_posix() for path in sorted((tmp_path / "videos").rglob("*.mp4"))]
    classes = sorted({name.split("/")[0] for name in names})
    (lists / "classInd.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(classes, start=1)))
    (lists / "trainlist01.txt").write_text("".join(f"{name} 1\n" for name in names[::2]))
    (lists / "testlist01.txt").write_text("".join(f"{name}\n" for name in names[1::2]))
    for split, expected in (("train", names[::2]), ("test", names[1::2]), ("train+test", names), ("all", names)):
        files, found = protocol_videos(tmp_path / "videos", replace(PROTOCOL, split=split))
        assert sorted(file.path.relative_to(tmp_path / "videos").as_posix() for file in files) == sorted(expected)
        assert found == classes


def test_real_clips_become_pixels_once(sprites):
    """Truncating twice would darken what had rounded down in float."""
    files, _ = list_videos(sprites)
    protocol = replace(PROTOCOL, pixels="truncate", fps=None)
    [window] = draw_windows(files, protocol, 1).windows
    *_, clip = RealClips(files, [window], protocol)[0]
    frames = read_clip(files[window.video].path, start=window.start, fps=window.fps, num_frames=4)
    assert torch.equal(clip, protocol_clips(frames_to_clip(frames)[None], protocol)[0])
