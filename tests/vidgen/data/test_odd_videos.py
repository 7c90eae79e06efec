"""Valid but unusual videos: cut without encoding, mirrored, with empty packets, non-square pixels, wrong timestamps.

Every frame must be the one that players show, and `data check` must name what is odd. The references are the frames of
the whole file before it was cut or changed.
"""

from __future__ import annotations

import itertools
import warnings
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image
from video_makers import copy_packets, encode, encode_silence, set_display_matrix, trim

from vidgen.data.check import VideoReport, inspect_video
from vidgen.data.streams import FrameReader, VideoWarning, open_writer
from vidgen.data.types import ShardMember
from vidgen.data.video import VideoError, probe, read_clip, write_video
from vidgen.data.video_frames import parse_display_matrix, square_pixel_size

STEADY = {"g": "12", "bf": "3", "x264-params": "scenecut=0:b-adapt=0"}
OPEN_GOPS = {"x264-params": "keyint=12:open-gop=1:bframes=3:b-adapt=0:scenecut=0"}


def read(path: Path, **how) -> np.ndarray:
    with FrameReader(path, **how) as reader:
        frames = list(reader)
        assert len(frames) == reader.num_frames
    return np.stack(frames)


def read_odd(path: Path, note: str, **how) -> np.ndarray:
    """All frames of a file that gives exactly one warning, which names it."""
    with pytest.warns(VideoWarning, match=note) as caught:
        frames = read(path, **how)
    assert [str(warning.message).startswith(f"{path}: ") for warning in caught] == [True]
    return frames


def decode_all(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def report(path: Path) -> VideoReport:
    return inspect_video(path, num_frames=1, fps=8)


# --- edit lists ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "duration", "count"), [(0, 1000, 25), (17, 600, 15), (30, 720, 18), (13, 1400, 35)])
def test_trimmed_mp4_gives_the_frames_of_its_edit_list(tmp_path, frames, start, duration, count):
    whole = encode(tmp_path / "whole.mp4", frames, options=STEADY)
    path = trim(whole, tmp_path / "trimmed.mp4", start=start, duration=duration)
    pictures = decode_all(whole)[start : start + count]
    np.testing.assert_array_equal(read(path), pictures)
    info = probe(path)
    assert (info.num_frames, info.fps) == (count, 25) and info.duration == pytest.approx(count / 25)
    for first in (0, 5, count - 3):
        clip = read_clip(path, start=first / 25, fps=25, num_frames=3)
        np.testing.assert_array_equal(clip, pictures[first : first + 3])
    assert (report(path).kind, report(path).reason) == ("good", "")


@pytest.mark.parametrize(
    ("codec", "options"), [("libx264", STEADY), ("libx265", {"x265-params": "log-level=none:keyint=12"})]
)
@pytest.mark.parametrize("suffix", [".mp4", ".mov"])
def test_cut_by_stream_copy_hides_the_frames_before_it(tmp_path, frames, codec, options, suffix):
    whole = encode(tmp_path / f"whole{suffix}", frames, codec, options=options)
    pictures = decode_all(whole)
    with av.open(str(whole)) as container:
        second_key = [number for number, packet in enumerate(container.demux(video=0)) if packet.is_keyframe][1]

    def shift(number: int, packet: av.Packet) -> None:  # frame 18 becomes the one at 0 seconds
        ticks = int(18 / 25 / packet.time_base)
        packet.pts, packet.dts = packet.pts - ticks, packet.dts - ticks

    path = copy_packets(whole, tmp_path / f"cut{suffix}", first=second_key, change=shift)
    np.testing.assert_array_equal(read(path), pictures[18:])
    np.testing.assert_array_equal(read_clip(path, start=0.4, fps=5, num_frames=3), pictures[[28, 33, 38]])
    assert report(path).kind == "good"


@pytest.mark.parametrize("packets", [12.5, 20, 40.5, 47])
def test_truncated_file_with_edit_list_is_detected(tmp_path, frames, packets):
    whole = encode(tmp_path / "whole.mp4", frames, options=STEADY, container_options={"movflags": "faststart"})
    trimmed = trim(whole, tmp_path / "trimmed.mp4", start=17, duration=5000)
    with av.open(str(whole)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    position, size = places[int(packets)]
    path = tmp_path / "cut.mp4"
    path.write_bytes(trimmed.read_bytes()[: position + int(packets % 1 * size)])
    for read_file in (probe, FrameReader):
        with pytest.raises(VideoError, match=r"cut off: \d+ of \d+ frames are complete"):
            read_file(path)
    assert report(path).kind == "unreadable"


def test_cut_among_the_last_frames_keeps_the_rate_constant(tmp_path, frames):
    whole = encode(tmp_path / "whole.mp4", frames, options=STEADY)
    with av.open(str(whole)) as container:
        order = [round(packet.pts * packet.time_base * 25) for packet in container.demux(video=0) if packet.size]
    left = sorted(order[:30])
    assert left != list(range(left[0], left[0] + 30))  # B-frames between the last ones are gone

    path = tmp_path / "cut.mkv"
    with av.open(str(whole)) as container, av.open(str(path), "w") as copy:
        stream = copy.add_stream_from_template(container.streams.video[0])
        for packet in itertools.islice(container.demux(video=0), 30):
            packet.stream = stream
            copy.mux(packet)
    with FrameReader(path) as reader:
        assert reader.fps == 25
    np.testing.assert_array_equal(read(path), decode_all(path))


# --- empty packets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("codec", "options"), [("mpeg4", {}), ("mpeg4", {"bf": "2"}), ("mjpeg", {"qmin": "2"})])
@pytest.mark.parametrize("dropped", [(7, 8), (5, 12, 13, 14, 30, 31, 40), tuple(range(20, 32))])
def test_empty_avi_chunk_repeats_the_previous_picture(tmp_path, frames, codec, options, dropped):
    kept = [number for number in range(48) if number not in dropped]
    format = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = encode(tmp_path / "a.avi", frames[kept], codec, format, options=options, ticks=kept)
    pictures = decode_all(path)
    assert len(pictures) == len(kept)
    shown = [sum(number <= moment for number in kept) - 1 for moment in range(48)]
    info = probe(path)
    assert info.duration == pytest.approx(48 / 25) and info.num_frames == 48
    np.testing.assert_array_equal(read(path), pictures[shown])
    np.testing.assert_array_equal(read_clip(path, start=16 / 25, fps=25, num_frames=20), pictures[shown[16:36]])
    assert report(path).reason == f"{len(dropped)} of its 48 frames are empty and repeat the picture before"


def test_empty_avi_chunks_at_the_end_repeat_the_last_picture(tmp_path, frames):
    path = encode(tmp_path / "a.avi", frames, "mpeg4")
    content = path.read_bytes()
    place = content.index(b"vids", content.index(b"strh")) + 32  # the number of chunks
    assert content[place : place + 4] == (48).to_bytes(4, "little")
    path.write_bytes(content[:place] + (53).to_bytes(4, "little") + content[place + 4 :])
    pictures = decode_all(path)
    np.testing.assert_array_equal(read(path), pictures[[*range(48), *[47] * 5]])
    np.testing.assert_array_equal(read_clip(path, start=46 / 25, fps=25, num_frames=4), pictures[[46, 47, 47, 47]])


def test_hidden_packets_are_not_counted_as_frames(tmp_path, frames):
    whole = encode(tmp_path / "whole.webm", frames, "libvpx", options={"deadline": "realtime", "cpu-used": "8"})
    path = tmp_path / "a.webm"
    with av.open(str(whole)) as container, av.open(str(path), "w") as copy:
        stream = copy.add_stream_from_template(container.streams.video[0])
        for number, packet in enumerate(container.demux(video=0)):
            content = bytearray(bytes(packet))
            if number in (20, 33):
                content[0] &= ~0x10  # VP8's bit for frames to be shown
            if content:
                changed = av.Packet(bytes(content))
                changed.pts, changed.dts, changed.time_base = packet.pts, packet.dts, packet.time_base
                changed.is_keyframe, changed.stream = packet.is_keyframe, stream
                copy.mux(changed)
    pictures = np.delete(decode_all(whole), [20, 33], axis=0)
    np.testing.assert_array_equal(decode_all(path), pictures)
    assert probe(path).num_frames == 46
    np.testing.assert_array_equal(read_clip(path, start=24 / 25, fps=25, num_frames=8), pictures[23:31])


# --- orientation and pixels ------------------------------------------------------------------------------------------

MATRICES = [
    (1, 0, 0, 1),
    (-1, 0, 0, -1),
    (0, 1, -1, 0),
    (0, -1, 1, 0),
    (-1, 0, 0, 1),
    (1, 0, 0, -1),
    (0, 1, 1, 0),
    (0, -1, -1, 0),
]


def place_pixels(picture: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    """The reference: move every pixel as the matrix says, and the result to begin at (0, 0)."""
    a, b, c, d = matrix
    y, x = np.mgrid[: picture.shape[0], : picture.shape[1]]
    across, down = a * x + c * y, b * x + d * y
    across, down = across - across.min(), down - down.min()
    shown = np.zeros((down.max() + 1, across.max() + 1, 3), picture.dtype)
    shown[down, across] = picture
    return shown


@pytest.mark.parametrize("matrix", MATRICES)
def test_every_display_matrix_is_applied(tmp_path, frames, matrix):
    path = write_video(tmp_path / "a.mp4", frames[:4, :48], 25)
    stored = read(path)
    set_display_matrix(path, matrix)
    upright = np.stack([place_pixels(picture, matrix) for picture in stored])
    np.testing.assert_array_equal(read(path), upright)
    np.testing.assert_array_equal(read_clip(path, fps=25, num_frames=4), upright)
    assert (probe(path).height, probe(path).width) == upright.shape[1:3]
    a, b, c, d = matrix
    oddities = {1: "it is stored rotated", -1: "it is stored mirrored"}
    assert report(path).reason == ("" if matrix == MATRICES[0] else oddities[a * d - b * c])


def test_oblique_display_matrix_is_reported(tmp_path, frames):
    path = write_video(tmp_path / "a.mp4", frames[:4, :48], 25)
    stored = read(path)
    set_display_matrix(path, (0.94, 0.34, -0.34, 0.94))
    np.testing.assert_array_equal(read_odd(path, "only quarter turns are applied"), stored)
    assert "only quarter turns are applied" in report(path).reason
    assert not parse_display_matrix(np.array([65536, 300, 0, -300, 65536, 0, 0, 0, 1 << 30])).is_oblique


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize(
    ("aspect", "size"), [(Fraction(2), (128, 48)), (Fraction(16, 15), (68, 48)), (Fraction(1, 2), (64, 96))]
)
def test_pixels_become_square(tmp_path, frames, suffix, aspect, size):
    plain = encode(tmp_path / f"plain{suffix}", frames[:4, :48])
    path = encode(tmp_path / f"a{suffix}", frames[:4, :48], sample_aspect_ratio=aspect)
    assert (probe(path).width, probe(path).height) == size
    wanted = [np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR)) for picture in read(plain)]
    np.testing.assert_array_equal(read(path), wanted)
    np.testing.assert_array_equal(read_clip(path, fps=25, num_frames=4), wanted)
    assert report(path).reason == f"its pixels are not square ({aspect.numerator}:{aspect.denominator})"
    with FrameReader(path, size=24) as reader:
        assert (reader.width, reader.height) == tuple(2 * round(side * 12 / min(size)) for side in size)
        assert next(iter(reader)).shape == (reader.height, reader.width, 3)


def test_non_square_pixels_are_resized_before_rotation(tmp_path, frames):
    path = encode(tmp_path / "a.mp4", frames[:4, :48], sample_aspect_ratio=Fraction(2))
    wide = read(path)
    set_display_matrix(path, (0, 1, -1, 0))
    np.testing.assert_array_equal(read(path), np.rot90(wide, 3, axes=(1, 2)))


def test_nearly_square_pixels_count_as_square():
    for aspect, size in [
        (None, (720, 576)),
        (Fraction(1), (720, 576)),
        (Fraction(1280, 1281), (720, 576)),  # rounded by an encoder
        (Fraction(1, 5000), (720, 576)),  # a damaged header
        (Fraction(16, 15), (768, 576)),
        (Fraction(8, 9), (720, 648)),
    ]:
        assert square_pixel_size(720, 576, aspect) == size


def test_hdr_and_transparency_are_reported_only_where_present(tmp_path, frames):
    for transfer, name in ((16, "PQ"), (18, "HLG")):
        path = encode(tmp_path / f"{name}.mp4", frames[:4], color_trc=transfer)
        read_odd(path, rf"it is HDR \({name}\) and shown without tone mapping")
        assert f"it is HDR ({name})" in report(path).reason
    assert report(encode(tmp_path / "sdr.mp4", frames[:4], color_trc=1)).reason == ""

    with open_writer(tmp_path / "opaque.gif", fps=10, width=64, height=64) as writer:
        writer.write(frames[:4])
    assert report(tmp_path / "opaque.gif").reason == ""
    images = [Image.fromarray(frame).quantize(64) for frame in frames[:3]]
    images[0].info["transparency"] = images[0].getpixel((0, 0))
    images[0].save(tmp_path / "clear.gif", save_all=True, append_images=images[1:], duration=100)
    assert report(tmp_path / "clear.gif").reason == "it is partly transparent"


# --- undecodable first and last frames -------------------------------------------------------------------------------


def begin_late(source: Path, target: Path, share: float) -> Path:
    """A transport stream without its beginning, like a recording that begins inside a broadcast."""
    content = source.read_bytes()
    packets = len(content) // 188
    target.write_bytes(content[int(share * packets) * 188 :])
    return target


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video"])
def test_recording_that_begins_inside_a_gop_starts_at_the_first_intact_frame(tmp_path, frames, codec):
    options = OPEN_GOPS if codec == "libx264" else {"g": "12", "bf": "2"}
    whole = encode(tmp_path / "whole.ts", frames, codec, options=options)
    pictures = decode_all(whole)
    path = begin_late(whole, tmp_path / "late.ts", 0.4)
    given = read_odd(path, r"the first \d+ frames cannot be decoded")
    assert len(given) in (12, 24)  # complete groups of pictures
    np.testing.assert_array_equal(given, pictures[-len(given) :])
    with pytest.raises(VideoError, match="frame 0 cannot be decoded"):
        read_clip(path, fps=25, num_frames=4)
    missing = probe(path).num_frames - len(given)
    clip = read_clip(path, start=(missing + 6) / 25, fps=25, num_frames=4)
    assert (clip.numpy() == pictures[-len(given) :][6:10]).all() or codec == "mpeg2video"
    assert report(path).kind == "odd" and "cannot be decoded" in report(path).reason


def test_leading_frames_of_an_open_gop_are_left_out(tmp_path, frames):
    whole = encode(tmp_path / "whole.mp4", frames, options=OPEN_GOPS)
    with av.open(str(whole)) as container:
        keys = [number for number, packet in enumerate(container.demux(video=0)) if packet.is_keyframe]
    shift = keys[1]

    def start_anew(number: int, packet: av.Packet) -> None:
        packet.dts = packet.dts - int(Fraction(shift, 25) / packet.time_base)
        packet.pts = packet.pts - int(Fraction(shift, 25) / packet.time_base)

    path = copy_packets(whole, tmp_path / "cut.mkv", first=keys[1], change=start_anew)
    given = read_odd(path, r"the first \d+ frames cannot be decoded")
    np.testing.assert_array_equal(given, decode_all(whole)[-len(given) :])
    assert 34 <= len(given) <= 36
    assert "the first" in report(path).reason
    with pytest.raises(VideoError, match="frame 0 cannot be decoded"):
        read_clip(path, fps=25, num_frames=4)


def test_last_frames_that_cannot_be_decoded_are_left_out(tmp_path, frames):
    path = encode(tmp_path / "a.mp4", frames, options={"g": "12", "bf": "0"})
    pictures = decode_all(path)
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    for position, size in places[-2:]:
        content[position : position + size] = b"\xff" * size
    path.write_bytes(content)
    np.testing.assert_array_equal(read_odd(path, "the last 2 frames cannot be decoded"), pictures[:-2])
    assert report(path).reason == "the last 2 frames cannot be decoded"
    with pytest.raises(VideoError, match="decoded"):
        read_clip(path, start=45 / 25, fps=25, num_frames=3)
    np.testing.assert_array_equal(read_clip(path, start=30 / 25, fps=25, num_frames=3), pictures[30:33])


# --- wrong timestamps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", ["later", "same"])
def test_concatenated_transport_streams_follow_each_other(tmp_path, frames, second):
    one = encode(tmp_path / "one.ts", frames[:24], options=STEADY)
    two = encode(tmp_path / "two.ts", frames[24:], options=STEADY) if second == "later" else one
    path = tmp_path / "joined.ts"
    path.write_bytes(one.read_bytes() + two.read_bytes())
    pictures = np.concatenate([decode_all(one), decode_all(two)])
    np.testing.assert_array_equal(read_odd(path, "its clock jumps"), pictures)
    np.testing.assert_array_equal(read_clip(path, start=22 / 25, fps=25, num_frames=5), pictures[22:27])
    assert probe(path).duration == pytest.approx(48 / 25, abs=0.01)
    assert report(path).reason == "its clock jumps"


def test_clock_jumps_of_a_transport_stream_are_removed(tmp_path, frames):
    whole = encode(tmp_path / "whole.mp4", frames, options=STEADY)

    def jump(number: int, packet: av.Packet) -> None:
        if number >= 24:
            packet.dts += int(3600 / packet.time_base)
            packet.pts += int(3600 / packet.time_base)

    path = copy_packets(whole, tmp_path / "jump.ts", change=jump)
    pictures = decode_all(whole)
    np.testing.assert_array_equal(read_odd(path, "its clock jumps"), pictures)
    np.testing.assert_array_equal(read_clip(path, start=20 / 25, fps=25, num_frames=8), pictures[20:28])

    slow = copy_packets(whole, tmp_path / "still.mp4", change=jump)  # in mp4, timestamps are taken as they are
    np.testing.assert_array_equal(read_odd(slow, "one of its frames is shown for 3600 s"), pictures)
    assert probe(slow).duration > 3600 and report(slow).kind == "odd"


@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".ts"])
def test_timestamps_in_decoding_order_keep_the_display_order(tmp_path, frames, suffix):
    whole = encode(tmp_path / "whole.mp4", frames, options=STEADY)

    def lie(number: int, packet: av.Packet) -> None:
        packet.pts = packet.dts

    path = copy_packets(whole, tmp_path / f"lie{suffix}", change=lie)
    given = read_odd(path, "its timestamps are out of order")
    np.testing.assert_array_equal(given, decode_all(path if suffix == ".mp4" else whole))
    assert len(given) == (46 if suffix == ".mp4" else 48)  # the edit list of an mp4 omits frames before 0 seconds
    for first in (0, 7, 20, 41):
        clip = read_clip(path, start=first / 25, fps=25, num_frames=4)
        np.testing.assert_array_equal(clip, given[first : first + 4])
        sparse = read_clip(path, start=first / 25, fps=9, num_frames=2)
        np.testing.assert_array_equal(sparse, given[[first, first + 2]])
    assert report(path).kind == "odd" and "its timestamps are out of order" in report(path).reason


def test_regular_file_is_read_without_warning(tmp_path, frames):
    for name, options in (("a.mp4", STEADY), ("b.mkv", OPEN_GOPS), ("c.ts", {"bf": "0"})):
        path = encode(tmp_path / name, frames, options=options)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            np.testing.assert_array_equal(read(path), decode_all(path))
        assert (report(path).kind, report(path).reason) == ("good", "")


# --- streams and file names ------------------------------------------------------------------------------------------


def test_cover_picture_is_not_a_video(tmp_path, frames):
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        audio, cover = container.add_stream("aac", rate=8000), container.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 64, "rgb24"
        cover.disposition = Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_ndarray(frames[0], format="rgb24")))
        container.mux(cover.encode())
        encode_silence(container, audio)
    for read_file in (probe, FrameReader):
        with pytest.raises(VideoError, match="it holds no video, only a cover picture"):
            read_file(path)


@pytest.mark.parametrize("default", [None, 0])
def test_default_or_largest_stream_is_read(tmp_path, frames, default):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("ffv1", rate=25) for _ in range(2)]
        for number, (stream, side) in enumerate(zip(streams, (32, 64), strict=True)):
            stream.width, stream.height, stream.pix_fmt = side, side, "bgr0"
            stream.disposition = Disposition.default if number == default else Disposition(0)
        for picture in frames[:6]:
            for stream in streams:
                side = stream.width
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture[:side, :side]), format="rgb24")
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode())
    side = 64 if default is None else 32
    np.testing.assert_array_equal(read(path), frames[:6, :side, :side])


@pytest.mark.parametrize("name", ["12:30.mp4", "http:a.mp4", "12:30.gif"])
def test_name_with_a_colon_is_a_file(tmp_path, frames, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open_writer(name, fps=10, width=64, height=64) as writer:
        writer.write(frames[:4])
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert len(read(Path(name))) == 4 and probe(name).num_frames == 4
    content = Path(name).read_bytes()
    Path("12:30.tar").write_bytes(b"x" * 512 + content)
    assert probe(ShardMember(Path("12:30.tar"), name, 512, len(content))).num_frames == 4
    if name.endswith(".mp4"):
        write_video(name, frames[:3], 10)
        assert probe(name).num_frames == 3


def test_check_includes_errors_of_ffmpeg(tmp_path, frames):
    """Damage that the decoder neither rejects nor flags, but logs."""
    whole, path = tmp_path / "whole.gif", tmp_path / "damaged.gif"
    with open_writer(whole, fps=10, width=64, height=64) as writer:
        writer.write(frames[:8])
    content = bytearray(whole.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 8] = bytes(range(250, 242, -1))
    path.write_bytes(content)
    for _ in range(2):  # a repeated message is not delayed until the next file
        assert "FFmpeg reports " in report(path).reason
        assert report(whole).reason == ""
