"""Reading and writing whole videos frame by frame: correct frames, atomic files, constant memory."""

from __future__ import annotations

import resource
import tracemalloc
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from video_makers import decode_all, encode, encode_audio

from vidgen.common.errors import UserError
from vidgen.common.images import to_uint8
from vidgen.data.streams import FrameReader, open_writer
from vidgen.data.transforms import frames_to_clip, resize_to_cover
from vidgen.data.video import VideoError, probe, read_clip
from vidgen.data.video_index import index_video


def read(path: Path, **how) -> np.ndarray:
    """All frames of a reader, whose number and shape match its attributes."""
    with FrameReader(path, **how) as reader:
        frames = list(reader)
        assert len(frames) == reader.num_frames
        for frame in frames:
            assert frame.dtype == np.uint8 and frame.shape == (reader.height, reader.width, 3)
            assert frame.flags.c_contiguous
    return np.stack(frames)


def write(path, frames: np.ndarray, fps=25) -> Path:
    with open_writer(path, fps=fps, height=frames.shape[1], width=frames.shape[2]) as writer:
        writer.write(frames)
    return Path(path)


def delays(path: Path) -> list[int]:
    """The duration of each frame of a GIF, in milliseconds."""
    with Image.open(path) as image:
        return [(image.seek(i), image.info["duration"])[1] for i in range(image.n_frames)]


# --- reading: which frames -------------------------------------------------------------------------------------------


def test_real_videos_match_read_clip(clips):
    paths = sorted(clips.rglob("*.*"))
    assert len(paths) == 13
    for path in paths:
        info = probe(path)
        whole, start = FrameReader(path, fps=4), FrameReader(path)
        assert (start.num_frames, start.width, start.height) == (info.num_frames, info.width, info.height)
        assert float(start.fps) == pytest.approx(info.fps, rel=1e-6)
        for reader, count, fps in [(whole, whole.num_frames, 4), (start, 10, info.fps)]:
            clip = read_clip(path, fps=fps, num_frames=count).numpy()
            with reader:
                same = [np.array_equal(*pair) for pair in zip(clip, reader, strict=False)]
            assert len(same) == count and all(same), f"{path.name} at {fps} fps: frame {same.index(False)}"


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", {"g": "12", "bf": "3"}),
        ("open.mp4", "libx264", {"x264-params": "keyint=10:open-gop=1:bframes=4"}),
        ("a.avi", "mpeg4", {"g": "12", "bf": "2"}),
        ("a.ts", "libx264", {"g": "12", "bf": "2"}),
        ("a.webm", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
    ],
)
def test_constant_rate_gives_each_frame_once(tmp_path, frames, name, codec, options):
    path = encode(tmp_path / name, frames, codec, options=options)
    np.testing.assert_array_equal(read(path), decode_all(path)[0])
    assert FrameReader(path).fps == 25


def test_rounded_and_jittering_timestamps_count_as_constant_rate(tmp_path, frames):
    film = np.round(np.arange(48) * 1001 / 30)  # Matroska stores milliseconds
    pulled_down = np.cumsum(np.tile([33, 50], 24))  # 24 fps converted to 60 Hz
    for times, rate in [(film, 30 / 1.001), (pulled_down, 24.1)]:
        path = encode(tmp_path / "a.mkv", frames, milliseconds=times)
        np.testing.assert_array_equal(read(path), decode_all(path)[0])
        assert float(FrameReader(path).fps) == pytest.approx(rate, rel=0.01)


def test_rate_is_an_exact_fraction(tmp_path, frames):
    rate = Fraction(30000, 1001)
    path = write(tmp_path / "a.mp4", frames[:8], rate)
    assert FrameReader(path).fps == rate
    assert FrameReader(path, fps=30000 / 1001).fps == rate and FrameReader(path, fps=12.5).fps == Fraction(25, 2)


@pytest.mark.parametrize("fps", [None, 10, 40])
def test_variable_rate_follows_the_timestamps(tmp_path, frames, fps):
    times = 700 + np.cumsum(np.random.default_rng(0).integers(10, 150, len(frames)))  # starts late, too
    path = encode(tmp_path / "a.mkv", frames, milliseconds=times)
    pictures, seconds = decode_all(path)
    reader = FrameReader(path, fps=fps)
    rate, duration = float(reader.fps), probe(path).duration
    assert rate == pytest.approx(fps or 48 / duration, rel=1e-3)
    assert reader.num_frames == round(duration * rate)
    shown = [np.flatnonzero(seconds <= i / rate + 1e-3)[-1] for i in range(reader.num_frames)]
    assert len(set(shown)) < 48 or fps == 40  # frames are dropped, or
    assert len(set(shown)) < len(shown)  # are repeated
    np.testing.assert_array_equal(read(path, fps=fps), pictures[shown])


def test_frames_are_repeated_or_dropped_to_match_the_rate(tmp_path, frames):
    path = write(tmp_path / "a.mp4", frames, 8)
    pictures, _ = decode_all(path)
    np.testing.assert_array_equal(read(path, fps=8), pictures)
    np.testing.assert_array_equal(read(path, fps=4), pictures[::2])
    np.testing.assert_array_equal(read(path, fps=16), pictures.repeat(2, axis=0))
    assert len(read(path, fps=0.0004)) == 1 and FrameReader(path, fps=0.0004).fps == Fraction(1, 2500)
    first, second, *_ = FrameReader(path, fps=16)
    first[:] = 0  # modifying one frame does not change the next
    np.testing.assert_array_equal(second, pictures[0])


def test_only_listed_timestamps_have_a_number(tmp_path, frames):
    index = index_video(write(tmp_path / "a.mp4", frames[:4]))
    assert [index.find_tick(tick) for tick in index.ticks.tolist()] == [0, 1, 2, 3]
    assert {index.find_tick(tick) for tick in (None, *(index.ticks + 1).tolist())} == {-1}


def test_one_frame(tmp_path, frames):
    for name in ("a.mp4", "a.mkv"):
        path = encode(tmp_path / name, frames[:1])
        assert read(path).shape == (1, 64, 64, 3) and FrameReader(path).fps == 25
        assert len(read(path, fps=3)) == 1


def test_each_iteration_restarts_and_the_block_ends_it(tmp_path, frames):
    path = write(tmp_path / "a.mp4", frames)
    with FrameReader(path) as reader:
        running = iter(reader)
        first = next(running)
        next(running)
        np.testing.assert_array_equal(next(iter(reader)), first)
        last = iter(reader)
        next(last)
    assert list(last) == []


# --- reading: which pixels -------------------------------------------------------------------------------------------


def test_odd_sizes_are_kept(tmp_path, frames):
    path = encode(tmp_path / "a.mkv", frames[:4, :33, :47], "ffv1", "bgr0")
    np.testing.assert_array_equal(read(path), frames[:4, :33, :47])


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotated_videos_are_read_upright(tmp_path, frames, rotation):
    plain = encode(tmp_path / "plain.mp4", frames[:4, :48])
    phone = encode(tmp_path / "phone.mp4", frames[:4, :48], rotation=rotation)
    upright = np.rot90(decode_all(plain)[0], rotation // 90, axes=(1, 2))
    np.testing.assert_array_equal(read(phone), upright)
    reader = FrameReader(phone, size=24)
    assert (reader.width, reader.height) == ((24, 32) if rotation % 180 else (32, 24))
    assert read(phone, size=24).shape[1:3] == (reader.height, reader.width)


@pytest.mark.parametrize(("codec", "options"), [("libx264", {}), ("libx265", {"x265-params": "log-level=none"})])
def test_ten_bit_videos_are_read_as_eight_bit(tmp_path, frames, codec, options):
    soft = (frames[:4].astype(int) // 2 + 64).astype(np.uint8)
    path = encode(tmp_path / "a.mkv", soft, codec, "yuv444p10le", options={"crf": "1", **options})
    assert np.abs(read(path).astype(int) - soft).mean() < 1


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"), [("a.mov", "qtrle", "argb"), ("b.mov", "png", "rgba"), ("a.mkv", "ffv1", "bgra")]
)
def test_transparent_parts_are_shown_over_black(tmp_path, frames, name, codec, pix_fmt):
    alpha = np.zeros((4, 64, 64, 1), np.uint8)
    alpha[:, 16:], alpha[:, 32:] = 128, 255
    path = encode(tmp_path / name, np.concatenate([frames[:4], alpha], axis=-1), codec, pix_fmt)
    over_black = np.rint(frames[:4] * (alpha / 255)).astype(np.uint8)
    np.testing.assert_array_equal(read(path), over_black)
    np.testing.assert_array_equal(read_clip(path, fps=25, num_frames=4), over_black)


@pytest.mark.parametrize("codec", ["libvpx-vp9", "libvpx"])
def test_transparent_webm_is_shown_over_black(tmp_path, frames, codec):
    alpha = np.full((4, 64, 64, 1), 255, np.uint8)
    alpha[:, :32] = 0
    bright = np.concatenate([frames[:4] // 2 + 128, alpha], axis=-1)
    options = {"deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "0"}
    path = encode(tmp_path / "a.webm", bright, codec, "yuva420p", options=options)
    pictures = read(path)
    assert pictures[:, :30].max() < 8 and pictures[:, 34:].min() > 100
    np.testing.assert_array_equal(read_clip(path, fps=25, num_frames=4), pictures)


def test_gif_frames_are_composed_and_timed(tmp_path, frames):
    images = [Image.fromarray(frame).quantize(64) for frame in frames[:3]]
    path = tmp_path / "a.gif"
    images[0].save(path, save_all=True, append_images=images[1:], duration=[100, 300, 200], optimize=False)
    shown = np.stack([np.asarray(image.convert("RGB")) for image in images])
    np.testing.assert_array_equal(read(path, fps=10), shown[[0, 1, 1, 1, 2, 2]])
    assert FrameReader(path).fps == 5 and FrameReader(path).num_frames == 3

    see_through = Image.new("P", (8, 8), 0)
    see_through.putpalette([255, 255, 255])
    see_through.save(tmp_path / "clear.gif", transparency=0)
    assert read(tmp_path / "clear.gif").max() == 0


@pytest.mark.parametrize(
    ("size", "expected"), [(32, (32, 46)), (48, (48, 68)), (63, (64, 90)), (1, (2, 2)), (90, (90, 128))]
)
def test_short_side_is_resized_as_in_the_dataset(tmp_path, frames, size, expected):
    wide = np.concatenate([frames, frames[:, :, :26]], axis=2)[:4, :63]  # 63 x 90
    path = encode(tmp_path / "a.mkv", wide, "ffv1", "bgr0")
    resized = read(path, size=size)
    assert resized.shape[1:3] == expected
    if size >= 32:
        clip = frames_to_clip(torch.from_numpy(wide))
        clip = torch.nn.functional.interpolate(
            clip.transpose(0, 1), expected, mode="bilinear", antialias=True, align_corners=False
        )
        assert np.abs(resized.astype(int) - to_uint8(clip).permute(0, 2, 3, 1).numpy()).max() <= 1
    if size == 32:
        squares = read(encode(tmp_path / "square.mkv", frames[:4], "ffv1", "bgr0"), size=size)
        clip = to_uint8(resize_to_cover(frames_to_clip(torch.from_numpy(frames[:4])), (size, size)))
        assert np.abs(squares.astype(int) - clip.permute(1, 2, 3, 0).numpy()).max() <= 1


def test_stream_with_changing_size_keeps_the_first(tmp_path, frames):
    large = frames[:6].repeat(2, axis=1).repeat(2, axis=2)
    parts = [
        encode(tmp_path / name, part, "mjpeg", "yuvj420p", options={"qmin": "1", "qmax": "1"}).read_bytes()
        for name, part in [("a.mjpeg", frames[:6]), ("b.mjpeg", large[:, :, :96])]
    ]
    path = tmp_path / "both.mjpeg"
    path.write_bytes(b"".join(parts))
    pictures = read(path)
    assert pictures.shape == (12, 64, 64, 3)
    narrowed = [np.asarray(Image.fromarray(frame).resize((64, 64))) for frame in large[:, :, :96]]
    for picture, frame in zip(pictures, [*frames[:6], *narrowed], strict=True):
        assert np.abs(picture.astype(int) - frame).mean() < 8


# --- reading: unusable files -----------------------------------------------------------------------------------------


def test_incomplete_videos_raise_at_once_with_the_reason(tmp_path, frames):
    good = write(tmp_path / "good.mp4", frames).read_bytes()
    mkv = encode(tmp_path / "good.mkv", frames).read_bytes()

    def file(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    audio = encode_audio(tmp_path / "audio.mp4")
    for path, reason in [
        (tmp_path / "missing.mp4", "no such file"),
        (tmp_path, "it is a folder, not a video"),
        (file("empty.mp4", b""), "the file is empty"),
        (file("text.mp4", b"not a video at all\n" * 50), "not a readable video"),
        (file("notes.txt", b"FFmpeg would film this text\n" * 50), "it is text, not a video"),
        (file("cut.mp4", good[: len(good) * 7 // 10]), r"cut off: \d+ of 48 frames are complete"),
        (file("cut.mkv", mkv[: len(mkv) * 7 // 10]), r"cut off: \d.\d\d of 1.92 s are present"),
        (file("codec.mp4", good.replace(b"avc1", b"zzzz")), "its codec is unknown"),
        (audio, "it holds no video stream"),
    ]:
        with pytest.raises(VideoError, match=reason) as caught:
            FrameReader(path)
        assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("how", "reason"), [({"fps": 0}, "fps"), ({"fps": float("nan")}, "fps"), ({"size": 0}, "size")]
)
def test_invalid_rate_or_size_raises(tmp_path, frames, how, reason):
    with pytest.raises(UserError, match=f"{reason} must be"):
        FrameReader(write(tmp_path / "a.mp4", frames[:2]), **how)


@pytest.mark.parametrize("name", ["a.mpg", "a.mp4"])
def test_damaged_frame_raises_when_reached(tmp_path, frames, name):
    codec = "mpeg2video" if name == "a.mpg" else "libx264"
    path = encode(tmp_path / name, frames, codec, options={"g": "12", "bf": "0"})
    pictures, _ = decode_all(path)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 24] = b"\xff" * 24
    path.write_bytes(content)
    seen = []
    with pytest.raises(VideoError, match=rf"{name}: frame \d+ (is damaged|cannot be decoded)") as caught:
        seen.extend(FrameReader(path))
    assert 4 < len(seen) < 40 and f"frame {len(seen)} " in str(caught.value)
    np.testing.assert_array_equal(seen, pictures[: len(seen)])


def test_file_that_ends_early_raises_while_reading(tmp_path, frames):
    path = write(tmp_path / "a.mp4", frames)
    reader = FrameReader(path)
    write(path, frames[:20])
    with pytest.raises(VideoError, match="frame 20 cannot be decoded"):
        list(reader)


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fps", [8, 12.5, 29.97, Fraction(30000, 1001), 0.25])
@pytest.mark.parametrize("shape", [(64, 64), (34, 50), (33, 47), (1, 2)])
def test_mp4_has_exactly_the_size_rate_and_count(tmp_path, frames, fps, shape):
    height, width = shape
    path = tmp_path / "new" / "a.MP4"
    with open_writer(path, fps=fps, width=width, height=height) as writer:
        writer.write(frames[:1, :height, :width])
        writer.write(frames[1:9, :height, :width])
        assert not path.exists()
    reader = FrameReader(path)
    assert (reader.height, reader.width, reader.num_frames) == (height, width, 9)
    assert reader.fps == Fraction(fps).limit_denominator(1001) and probe(path).codec == "h264"
    assert np.abs(read(path).astype(int) - frames[:9, :height, :width]).mean() < 6
    with av.open(str(path)) as container:
        odd = height % 2 or width % 2
        assert container.streams.video[0].pix_fmt == ("yuv444p" if odd else "yuv420p")
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("fps", [12, Fraction(30000, 1001), 50, 3])
def test_gif_loops_and_keeps_time(tmp_path, frames, fps):
    path = write(tmp_path / "a.gif", frames[:, :33, :47], fps)
    times = np.cumsum([0, *delays(path)])
    assert len(times) == 49 and np.abs(times - np.arange(49) * 1000 / fps).max() <= 10 + 1e-6
    with Image.open(path) as image:
        assert image.info["loop"] == 0
    pictures = read(path)
    assert pictures.shape == (48, 33, 47, 3)
    assert np.abs(pictures.astype(int) - frames[:, :33, :47]).mean() < 4


def test_gif_is_no_faster_than_browsers_show(tmp_path, frames):
    shown = delays(write(tmp_path / "a.gif", frames, 60))
    assert min(shown) == 20 and sum(shown) == pytest.approx(800, abs=20) and len(shown) >= 38


def test_gif_keeps_colors_and_still_parts(tmp_path):
    y, x = np.mgrid[:96, :128]
    scene = np.repeat(np.stack([2 * x, 2 * y, 255 - x - y], axis=-1)[None], 12, axis=0).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (12, 24, 24, 3))
    scene[:, :24, :24] = noise
    pictures = read(write(tmp_path / "a.gif", scene, 10)).astype(int)
    still = pictures[:, 32:]
    assert np.abs(still - scene[:, 32:]).mean() < 6 and np.abs(np.diff(still, axis=0)).mean() < 4
    patches = still.reshape(12, 8, 8, 16, 8, 3).mean((2, 4)) - scene[:, 32:].reshape(12, 8, 8, 16, 8, 3).mean((2, 4))
    assert np.abs(patches).mean() < 3  # on average, colors are correct


@pytest.mark.parametrize("name", ["pictures", "version.2/"])
def test_png_folder_is_exact_and_replaces_only_such_folders(tmp_path, frames, name):
    folder, target = tmp_path / name, f"{tmp_path}/{name}"
    folder.mkdir()
    write(target, frames[:12, :33, :47])
    write(target, frames[:11, :33, :47])
    assert sorted(file.name for file in folder.iterdir()) == [f"frame_{i:06}.png" for i in range(11)]
    for i, file in enumerate(sorted(folder.iterdir())):
        np.testing.assert_array_equal(np.asarray(Image.open(file)), frames[i, :33, :47])

    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds other things \(notes.txt\)"):
        write(target, frames[:2])
    assert len(list(folder.iterdir())) == 12


def test_folder_filled_meanwhile_is_kept(tmp_path, frames):
    folder = tmp_path / "pictures"
    with (
        pytest.raises(UserError, match="holds other things"),
        open_writer(folder, fps=8, width=64, height=64) as writer,
    ):
        writer.write(frames[:2])
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
    assert [file.name for file in folder.iterdir()] == ["notes.txt"] and list(tmp_path.iterdir()) == [folder]


def test_same_frames_give_the_same_file(tmp_path, frames):
    for name in ("a.mp4", "a.gif"):
        assert len({write(tmp_path / name, frames[:16]).read_bytes() for _ in range(4)}) == 1


# --- writing: atomic files -------------------------------------------------------------------------------------------

NAMES = ["a.mp4", "a.gif", "pictures"]


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def full_disk(size: int):
    """Limit files to `size` bytes; the system reports a larger one like a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("error", [RuntimeError, OSError, KeyboardInterrupt])
def test_block_that_raises_changes_no_file(tmp_path, frames, name, error):
    for _ in range(2):
        before = content(tmp_path)
        with pytest.raises(error, match=r"^mine$"), open_writer(tmp_path / name, fps=8, width=64, height=64) as writer:
            writer.write(frames[:8])
            raise error("mine")
        assert content(tmp_path) == before and len(list(tmp_path.iterdir())) == (1 if before else 0)
        write(tmp_path / name, frames[:3])  # the second time there is a file to keep


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [1, 200])  # fails at the end, or midway
def test_full_disk_raises_and_changes_no_file(tmp_path, frames, name, count):
    write(tmp_path / name, frames[:3])
    before = content(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
    written = 0
    with pytest.raises(UserError) as caught, full_disk(3000):  # noqa: SIM117
        with open_writer(tmp_path / name, fps=8, width=64, height=64) as writer:
            for frame in noise:
                writer.write(frame[None])
                written += 1
    assert written < 200
    assert str(caught.value) == f"{tmp_path / name}: cannot be written (File too large)"
    assert content(tmp_path) == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", NAMES)
def test_first_of_two_errors_is_raised(tmp_path, frames, name):
    noise = np.random.default_rng(0).integers(0, 256, (60, 64, 64, 3), dtype=np.uint8)
    with pytest.raises(RuntimeError, match=r"^mine$"), full_disk(3000):  # noqa: SIM117
        with open_writer(tmp_path / name, fps=8, width=64, height=64) as writer:
            with suppress(UserError):
                writer.write(noise)
            raise RuntimeError("mine")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", NAMES)
def test_no_frames_raise_and_write_no_file(tmp_path, name):
    with pytest.raises(UserError, match="no frame to write"), open_writer(tmp_path / name, fps=8, width=64, height=64):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", NAMES)
def test_frames_of_other_shape_or_type_are_rejected(tmp_path, frames, name):
    for bad in (frames[0], frames[:0], frames[:, :62], frames.astype(np.float32), frames[..., :1]):
        with (
            pytest.raises(UserError, match=r"must be uint8 of shape \(T, 64, 64, 3\), got"),
            open_writer(tmp_path / name, fps=8, width=64, height=64) as writer,
        ):
            writer.write(frames[:1])
            writer.write(bad)
    assert list(tmp_path.iterdir()) == []


def test_invalid_outputs_raise_before_writing(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.mp4").mkdir()
    for name, change, reason in [
        ("a.avi", {}, r"expected a name ending in \.mp4 or \.gif, or without extension"),
        ("run.2", {}, r"expected a name ending in \.mp4 or \.gif, or without extension"),
        ("a.mp4", {"fps": 0}, "fps must be positive, got 0"),
        ("a.gif", {"fps": float("inf")}, "fps must be positive, got inf"),
        ("a.mp4", {"width": 0}, "width and height must be at least 1 pixel, got 0x64"),
        ("folder.mp4", {}, "it is a folder"),
        ("file", {}, "is a file"),
        ("file/a.mp4", {}, "cannot be written"),
    ]:
        with (
            pytest.raises(UserError, match=f"{name}:? {reason}") as caught,
            open_writer(tmp_path / name, **({"fps": 8, "width": 64, "height": 64} | change)),
        ):
            raise AssertionError("too late")
        assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.mp4"]


# --- memory ----------------------------------------------------------------------------------------------------------


def resident() -> int:
    """The memory of this process in bytes, including FFmpeg's."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize("name", ["a.mp4", "a.gif"])
def test_memory_does_not_grow_with_the_length(tmp_path, name):
    side, count = 256, 200
    frame = np.zeros((side, side, 3), np.uint8)
    total = count * frame.nbytes  # 39 MB
    held = {}
    with open_writer(tmp_path / name, fps=25, width=side, height=side) as writer:
        for i in range(count):
            frame[:, i % side] = i % 251  # cheap to encode
            writer.write(frame[None])
            held[i] = resident()
    assert held[count - 1] - held[count // 4] < total / 8  # of three quarters of all frames

    tracemalloc.start()
    with FrameReader(tmp_path / name, size=64) as reader:
        for i, _ in enumerate(reader):
            held[i] = resident()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert held[count - 1] - held[count // 4] < total / 8 and peak < total / 8
