"""Reading and writing video files: the correct frames at the correct times in every container, and clear errors."""

from __future__ import annotations

import pickle
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from video_makers import decode_all, encode, encode_audio

from vidgen.data import video
from vidgen.data.video import VideoError, VideoInfo, probe, read_clip, write_video


def expected(path: Path, *, start: float, fps: float, num_frames: int):
    pictures, times = decode_all(path)
    return np.stack([pictures[np.flatnonzero(times <= start + i / fps + 1e-3)[-1]] for i in range(num_frames)])


def as_displayed(picture: np.ndarray, info: VideoInfo) -> np.ndarray:
    """The picture with square pixels."""
    return np.asarray(Image.fromarray(picture).resize((info.width, info.height), Image.Resampling.BILINEAR))


# --- correct frames --------------------------------------------------------------------------------------------------


def test_clips_of_real_videos_match_full_decoding(clips):
    paths = sorted(clips.rglob("*.*"))
    assert len(paths) == 13
    rng = np.random.default_rng(0)
    for path in paths:
        info = probe(path)
        with av.open(str(path)) as container:
            decoded = list(container.decode(container.streams.best("video")))
        times = np.array([float((frame.pts - decoded[0].pts) * frame.time_base) for frame in decoded])
        if path.suffix == ".avi":  # which has no timestamps
            times = np.arange(len(decoded)) / info.fps
        assert info.num_frames == len(decoded)
        latest = info.latest_start(fps=8, num_frames=4)
        for start in (latest, rng.uniform(0, latest)):
            wanted = [decoded[np.flatnonzero(times <= start + i / 8 + 1e-3)[-1]] for i in range(4)]
            wanted = np.stack([as_displayed(frame.to_ndarray(format="rgb24"), info) for frame in wanted])
            clip = read_clip(path, start=start, fps=8, num_frames=4)
            assert clip.shape == (4, info.height, info.width, 3) and clip.dtype == torch.uint8
            np.testing.assert_array_equal(clip.numpy(), wanted, err_msg=f"{path.name} from {start}")


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("closed.mp4", "libx264", {"g": "12", "bf": "3"}),
        ("open.mp4", "libx264", {"x264-params": "keyint=10:open-gop=1:bframes=4"}),
        ("hevc.mp4", "libx265", {"x265-params": "log-level=none:keyint=10"}),
        ("b_frames.avi", "mpeg4", {"g": "12", "bf": "2"}),
        ("h264.avi", "libx264", {"g": "12", "bf": "3"}),
        ("b_frames.mkv", "mpeg4", {"g": "12", "bf": "2"}),
        ("b_frames.mpg", "mpeg2video", {"g": "12", "bf": "2"}),
        ("stream.ts", "libx264", {"g": "12", "bf": "2"}),
        ("vp9.webm", "libvpx-vp9", {"g": "12", "deadline": "realtime", "cpu-used": "8"}),
    ],
)
def test_every_start_is_exact_in_every_container(tmp_path, frames, name, codec, options):
    path = encode(tmp_path / name, frames, codec, options=options)
    pictures, _ = decode_all(path)
    assert probe(path).num_frames == len(pictures) == 48
    for first in range(0, 44, 3):
        clip = read_clip(path, start=first / 25, fps=25, num_frames=4)
        np.testing.assert_array_equal(clip.numpy(), pictures[first : first + 4], err_msg=f"from {first}")
        sparse = read_clip(path, start=first / 25, fps=7, num_frames=2)  # frames between them need not be decoded
        np.testing.assert_array_equal(sparse.numpy(), pictures[[first, first + 25 // 7]], err_msg=f"from {first}")


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_only_frames_that_a_clip_depends_on_are_decoded(tmp_path, frames, suffix, monkeypatch):
    path = encode(tmp_path / f"a{suffix}", frames, options={"g": "12", "bf": "3", "x264-params": "scenecut=0"})
    decoded = []
    decode_frames = video.decode_frames

    def watched(*arguments, **how):
        decoded.append([])
        for number, frame in decode_frames(*arguments, **how):
            decoded[-1].append(number)
            yield number, frame

    monkeypatch.setattr(video, "decode_frames", watched)
    read_clip(path, start=30 / 25, fps=25, num_frames=4)
    assert len(decoded) == 1 and min(decoded[0]) == 24 and max(decoded[0]) == 33
    read_clip(path, start=24 / 25, fps=25, num_frames=2)
    assert len(decoded) == 2 and decoded[1] == [24, 25]
    read_clip(path, start=12 / 25, fps=3, num_frames=3)  # 12, 20 and 28: most B-frames between them are skipped
    assert len(decoded) == 3 and decoded[2][0] == 12 and len(decoded[2]) < 14


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
def test_variable_frame_rate_follows_the_timestamps(tmp_path, frames, suffix):
    times = 700 + np.cumsum(np.random.default_rng(0).integers(10, 150, len(frames)))  # starts late, too
    path = encode(tmp_path / f"vfr{suffix}", frames, milliseconds=times)
    duration = (times[-1] - times[0]) / 1000
    assert duration < probe(path).duration < duration + 0.2
    for start in (0.0, 0.33, 1.07):
        wanted = expected(path, start=start, fps=10, num_frames=16)
        np.testing.assert_array_equal(read_clip(path, start=start, fps=10, num_frames=16).numpy(), wanted)


def test_frames_are_repeated_or_dropped_to_match_the_rate(tmp_path, frames):
    path = write_video(tmp_path / "a.mp4", frames, 8)
    pictures, _ = decode_all(path)

    def read(**how) -> np.ndarray:
        return read_clip(path, **how).numpy()

    np.testing.assert_array_equal(read(fps=8, num_frames=48), pictures)
    np.testing.assert_array_equal(read(fps=4, num_frames=24), pictures[::2])
    np.testing.assert_array_equal(read(fps=16, num_frames=96), pictures.repeat(2, axis=0))
    np.testing.assert_array_equal(read(start=1.99, fps=8, num_frames=3), pictures[15:18])


def test_rounded_timestamps_lose_no_frame(tmp_path, frames):
    times = np.round(np.arange(48) * 1000 / 30)  # Matroska stores milliseconds
    path = encode(tmp_path / "a.mkv", frames, milliseconds=times)
    np.testing.assert_array_equal(read_clip(path, fps=30, num_frames=48).numpy(), decode_all(path)[0])
    assert probe(path).fps == pytest.approx(30, rel=0.01)


def test_audio_makes_no_difference(tmp_path, frames):
    path = encode(tmp_path / "loud.mp4", frames, audio=True)
    clip = read_clip(path, fps=10, num_frames=12).numpy()
    np.testing.assert_array_equal(clip, expected(path, start=0, fps=10, num_frames=12))


# --- unusable files --------------------------------------------------------------------------------------------------


def test_unusable_files_raise_with_the_reason(tmp_path, frames):
    good = write_video(tmp_path / "good.mp4", frames, 8).read_bytes()

    def file(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    for path, reason in [
        (tmp_path / "missing.mp4", "no such file"),
        (tmp_path, "it is a folder, not a video"),
        (file("empty.mp4", b""), "the file is empty"),
        (file("text.mp4", b"not a video at all\n" * 50), "not a readable video"),
        (file("notes.txt", b"FFmpeg would film this text\n" * 50), "it is text, not a video"),
        (file("noise.mp4", np.random.default_rng(0).bytes(5000)), "not a readable video"),
        (file("cut.mp4", good[: len(good) * 7 // 10]), "cut off: "),
        (file("header.mp4", good[:600]), "not a readable video|holds no"),
        (encode(tmp_path / "audio.mp4", frames[:1], audio=True).with_name("audio.m4a"), "no such file"),
    ]:
        with pytest.raises(VideoError, match=reason) as caught:
            probe(path)
        assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
        assert caught.value.path == path and caught.value.reason in str(caught.value)
        with pytest.raises(VideoError, match=reason):
            read_clip(path, fps=8, num_frames=2)


def test_audio_file_is_not_a_video(tmp_path):
    path = encode_audio(tmp_path / "audio.mp4")
    with pytest.raises(VideoError, match="it holds no video stream"):
        probe(path)


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.avi", "mpeg4"), ("a.mkv", "libx264")])
def test_damaged_file_gives_correct_frames_or_an_error(tmp_path, frames, name, codec):
    whole = encode(tmp_path / name, frames, codec, options={"g": "12", "bf": "0"})
    content, pictures = whole.read_bytes(), decode_all(whole)[0]
    hurt = tmp_path / f"hurt_{name}"
    outcomes = []
    for tenth in range(1, 11):
        cut = len(content) * tenth // 10
        for damaged in (content[:cut], content[: cut - 400] + bytes(400) + content[cut:]):
            hurt.write_bytes(damaged)
            try:
                clip = read_clip(hurt, fps=25, num_frames=16).numpy()
            except VideoError:
                outcomes.append("error")
            else:
                if damaged == content[:cut]:
                    np.testing.assert_array_equal(clip, pictures[:16])
                assert clip.mean((1, 2, 3)).min() > 0.5 * pictures.mean()
                outcomes.append("frames")
    assert {"error", "frames"} == set(outcomes)


def test_damaged_frame_is_not_returned(tmp_path, frames):
    path = encode(tmp_path / "a.mpg", frames, "mpeg2video")
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + b"\xff" * 24 + content[middle + 24 :])
    with pytest.raises(VideoError, match=r"decoded|damaged"):
        read_clip(path, fps=25, num_frames=48)
    assert read_clip(path, fps=25, num_frames=8).shape[0] == 8  # before the damage


def test_replaced_file_is_indexed_again(tmp_path, frames):
    path = write_video(tmp_path / "a.mp4", frames, 8)
    assert probe(path).num_frames == 48
    write_video(path, frames[:20], 8)
    assert probe(path).num_frames == 20


def test_too_short_video_raises(tmp_path, frames):
    path = write_video(tmp_path / "a.mp4", frames[:16], 8)
    assert read_clip(path, fps=8, num_frames=16).shape[0] == 16
    with pytest.raises(VideoError, match=r"a.mp4: too short: it lasts 2.00 s, 17 frames at 8 fps need more than 2.00"):
        read_clip(path, fps=8, num_frames=17)
    with pytest.raises(VideoError, match="too short"):
        read_clip(path, start=1.5, fps=8, num_frames=8)
    with pytest.raises(ValueError, match="positive fps"):
        read_clip(path, fps=0, num_frames=8)
    latest = probe(path).latest_start(fps=8, num_frames=8)
    np.testing.assert_array_equal(
        read_clip(path, start=latest, fps=8, num_frames=8), read_clip(path, start=1.0, fps=8, num_frames=8)
    )


def test_errors_can_be_pickled():
    error = pickle.loads(pickle.dumps(VideoError("the file is empty", Path("a.mp4"))))
    assert str(error) == "a.mp4: the file is empty" and error.reason == "the file is empty"


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fps", [8, 12.5, 23.976, 29.97, Fraction(30000, 1001), 60])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (34, 50)])
def test_written_videos_have_exactly_the_size_rate_and_count(tmp_path, frames, fps, height, width):
    path = write_video(tmp_path / "new" / "a.mp4", frames[:9, :height, :width], fps)
    info = probe(path)
    assert (info.height, info.width, info.num_frames, info.codec) == (height, width, 9, "h264")
    assert info.fps == pytest.approx(float(fps), rel=1e-9) and info.duration == pytest.approx(9 / fps, rel=1e-4)
    with av.open(str(path)) as container:
        assert container.streams.video[0].pix_fmt == "yuv420p"


def test_colors_are_preserved(tmp_path):
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 100, 50)]
    frames = torch.tensor(colors, dtype=torch.uint8)[:, None, None].expand(-1, 32, 32, -1)
    path = write_video(tmp_path / "a.mp4", frames, 8)
    assert (read_clip(path, fps=8, num_frames=6).int() - frames.int()).abs().max() <= 4


def test_the_same_frames_give_the_same_bytes(tmp_path, frames):
    contents = {write_video(tmp_path / "a.mp4", frames[:16], 8).read_bytes() for _ in range(12)}
    assert len(contents) == 1


def test_invalid_frames_raise_and_leave_no_file(tmp_path, frames):
    path = tmp_path / "a.mp4"
    for bad, fps, reason in [
        (frames[:, :63], 8, "even height and width, got 63x64"),
        (frames.astype(np.float32), 8, "must be uint8 of shape"),
        (frames[0], 8, "must be uint8 of shape"),
        (frames[:0], 8, "must be uint8 of shape"),
        (frames, 0, "fps must be positive, got 0"),
    ]:
        with pytest.raises(ValueError, match=reason):
            write_video(path, bad, fps)
    assert list(tmp_path.iterdir()) == []


def test_interrupted_write_keeps_the_old_file(tmp_path, frames, monkeypatch):
    path = write_video(tmp_path / "a.mp4", frames[:8], 8)
    before = path.read_bytes()

    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(av.VideoFrame, "from_ndarray", fail, raising=True)
    with pytest.raises(KeyboardInterrupt):
        write_video(path, frames, 8)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
