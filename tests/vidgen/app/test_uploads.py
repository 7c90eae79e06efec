"""Upload validation: good files are read, others are refused with one sentence before they cost time or memory."""

from __future__ import annotations

import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vidgen.app.uploads import UploadLimits, open_image, open_image_or_video, open_video
from vidgen.common.errors import UserError
from vidgen.data.sprites import render_sprite, sample_factors
from vidgen.data.streams import open_writer
from vidgen.data.video import write_video

LIMITS = UploadLimits(megabytes=1, seconds=3, side=200, short_side=48)


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return render_sprite(sample_factors(np.random.default_rng(0), "orbit", num_frames=16))


@pytest.fixture(scope="module")
def video(tmp_path_factory, frames) -> Path:
    """16 frames of 64 x 64 at 8 fps."""
    return write_video(tmp_path_factory.mktemp("video") / "good.mp4", frames, 8)


def refused(path: Path, open_it=open_video, limits: UploadLimits = LIMITS) -> str:
    with pytest.raises(UserError) as refusal:
        open_it(path, limits)
    return str(refusal.value).removeprefix(f"{path}: ")


def test_a_video_is_read_within_the_limits(video, frames):
    with open_video(video, LIMITS) as reader:
        assert (reader.num_frames, reader.fps, reader.width, reader.height) == (16, 8, 48, 48)
    with open_video(video, UploadLimits(fps=4)) as reader:
        assert (reader.num_frames, reader.fps, reader.width) == (8, 4, 64)
        assert np.abs(next(iter(reader)).astype(int) - frames[0]).mean() < 6
    with open_video(video, LIMITS, fps=2) as reader:
        assert reader.num_frames == 4


def test_odd_sizes_are_made_even_for_browsers(tmp_path, frames):
    with open_writer(tmp_path / "odd.mp4", fps=8, width=41, height=37) as writer:
        writer.write(frames[:, :37, :41])
    with open_video(tmp_path / "odd.mp4", LIMITS) as reader:
        assert (reader.width % 2, reader.height % 2) == (0, 0)


@pytest.mark.parametrize("ending", ["mp4", "gif", "png", "m3u8"])
def test_a_video_is_recognized_by_content(tmp_path, video, ending):
    path = tmp_path / f"named.{ending}"
    path.write_bytes(video.read_bytes())
    assert open_video(path, LIMITS).num_frames == 16


@pytest.mark.parametrize(
    "script",
    [
        "ffconcat version 1.0\nfile good.mp4\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\ngood.mp4\n#EXT-X-ENDLIST\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 31\n",
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period/></MPD>',
    ],
    ids=["concat", "hls", "sdp", "dash"],
)
@pytest.mark.parametrize("ending", ["mp4", "m3u8", "ffconcat", "sdp", "mpd"])
def test_scripts_that_make_ffmpeg_open_other_files_are_refused(tmp_path, video, script, ending):
    (tmp_path / "good.mp4").write_bytes(video.read_bytes())
    script_file = tmp_path / f"script.{ending}"
    script_file.write_text(script)
    assert refused(script_file) == "it is not a whole mp4, mov, mkv, webm, avi or gif"


@pytest.mark.parametrize("content", [b"just text\n" * 100, bytes(5000), b"\x89PNG\r\n\x1a\n" + bytes(100)])
def test_files_other_than_videos_are_refused(tmp_path, content):
    path = tmp_path / "bad.mp4"
    path.write_bytes(content)
    assert refused(path) == "it is not a whole mp4, mov, mkv, webm, avi or gif"


def test_empty_truncated_long_and_large_videos_are_refused(tmp_path, video, frames):
    empty, cut = tmp_path / "empty.mp4", tmp_path / "cut.mp4"
    empty.touch()
    assert refused(empty) == "the file is empty."
    for share in (0.3, 0.7):
        cut.write_bytes(video.read_bytes()[: int(share * video.stat().st_size)])
        refused(cut)
    slow = write_video(tmp_path / "slow.mp4", frames, 4)
    assert refused(slow) == "it lasts 4.0 s; the maximum is 3 s."
    assert "it has 64 x 64 pixels" in refused(video, limits=UploadLimits(side=60))
    heavy = tmp_path / "heavy.mp4"
    heavy.write_bytes(bytes(1_200_000))
    assert refused(heavy) == "it has 1 MB; the maximum is 1 MB."


@pytest.mark.parametrize("turned", [False, True])
def test_elongated_frames_are_refused(tmp_path, turned):
    for long, name in ((128, "long"), (136, "thin")):
        frame = np.zeros((long, 16, 3) if turned else (16, long, 3), np.uint8)
        write_video(tmp_path / f"{name}.mp4", frame[None], 1)
        Image.fromarray(frame).save(tmp_path / f"{name}.png")
    assert max(open_image(tmp_path / "long.png", LIMITS).size) == 128
    assert open_video(tmp_path / "long.mp4", LIMITS).num_frames == 1
    size = "16 x 136" if turned else "136 x 16"
    expected = f"it has {size} pixels; the longer side may be at most 8 times the shorter."
    assert refused(tmp_path / "thin.png", open_image) == refused(tmp_path / "thin.mp4") == expected


@pytest.mark.parametrize("open_it", [open_image, open_video, open_image_or_video])
def test_expired_files_must_be_uploaded_again(tmp_path, open_it):
    assert refused(tmp_path / "gone", open_it) == "the file has expired; upload it again."


@pytest.mark.parametrize("name", ["photo.jfif", "photo.mp4", "photo"])
def test_an_image_or_video_is_recognized_by_content(tmp_path, video, name):
    path = tmp_path / name
    Image.new("RGB", (30, 20), "red").save(path, format="JPEG")
    assert open_image_or_video(path, LIMITS).size == (30, 20)
    path.write_bytes(path.read_bytes()[:400])
    assert refused(path, open_image_or_video) == "it is not a whole PNG, JPEG, WebP or BMP image."
    path.write_bytes(video.read_bytes())
    assert open_image_or_video(path, LIMITS, fps=4).num_frames == 8
    path.write_text("just text")
    assert refused(path, open_image_or_video) == (
        "it is not a whole PNG, JPEG, WebP or BMP image, and it is not a whole mp4, mov, mkv, webm, avi or gif."
    )


def test_huge_sizes_are_refused_before_memory_is_allocated(tmp_path):
    gif = tmp_path / "absurd.gif"
    side = struct.pack("<HH", 65535, 65535)
    gif.write_bytes(b"GIF89a" + side + b"\x80\0\0" + bytes(6) + b"," + bytes(4) + side + b"\0\x02\x02L\x01\0;")
    large, absurd = tmp_path / "large.png", tmp_path / "absurd.png"
    for png, size in ((large, 3000), (absurd, 60000)):
        header = b"IHDR" + struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
        png.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)))
        with png.open("ab") as file:
            file.write(struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT")))
    tracemalloc.start()
    try:
        assert refused(large, open_image) == "it has 3000 x 3000 pixels; the maximum is 200 per side."
        assert refused(absurd, open_image) == "it has far too many pixels."
        refused(gif, open_image)
        refused(gif)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


def test_an_image_is_upright_and_without_transparency(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn
    Image.new("RGB", (30, 20), "red").save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg", LIMITS).size == (20, 30)
    Image.new("RGBA", (30, 20)).save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png", LIMITS).mode == "RGB"


def test_files_other_than_images_are_refused(tmp_path, video):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    (tmp_path / "drawing.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    for path in (tmp_path / "cut.png", tmp_path / "drawing.svg", video):
        assert refused(path, open_image) == "it is not a whole PNG, JPEG, WebP or BMP image."
