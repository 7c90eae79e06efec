"""decord and torchcodec give the frames of PyAV; PyAV reads all other files, with a reason."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from video_makers import encode

from vidgen.common.errors import UserError
from vidgen.data import decoders
from vidgen.data.dataset import ClipDataset, collate_clips
from vidgen.data.decoders import TOLERANCE, ClipReader, describe_fallbacks
from vidgen.data.video import VideoError, read_clip

CLIP = dict(start=0.3, fps=8, num_frames=5)


@pytest.fixture(params=["decord", "torchcodec"])
def decoder(request) -> str:
    try:
        decoders.check_package(request.param)
    except UserError as error:
        pytest.skip(str(error))
    return request.param


@pytest.fixture(autouse=True)
def _clear_cache():
    decoders._examine.cache_clear()


def put(folder, frames, name, codec="libx264", **options):
    return encode(folder / name, frames, codec, **options)


@pytest.mark.parametrize("name", ["plain.mp4", "b_frames.mp4", "a.mkv", "mpeg4.mp4"])
def test_intact_files_give_the_frames_of_pyav(decoder, name, frames, tmp_path):
    options = {"b_frames.mp4": {"g": "12", "bf": "3"}}.get(name, {"g": "12", "bf": "0"})
    path = put(tmp_path, frames, name, "mpeg4" if name == "mpeg4.mp4" else "libx264", options=options)
    for settings in (CLIP, dict(start=0.0, fps=60, num_frames=8), dict(start=0.5, fps=3, num_frames=2)):
        clip, reason = ClipReader(decoder).read(path, **settings)
        expected = read_clip(path, **settings)
        assert reason is None
        assert clip.dtype == torch.uint8 and clip.shape == expected.shape
        assert (clip.int() - expected.int()).abs().max() <= TOLERANCE


def test_name_with_a_colon_is_a_file(decoder, frames, tmp_path, monkeypatch):
    put(tmp_path, frames, "plain.mp4").rename(tmp_path / "12:30.mp4")
    monkeypatch.chdir(tmp_path)
    _, reason = ClipReader(decoder).read("12:30.mp4", **CLIP)
    assert reason is None


def test_odd_files_are_read_by_pyav_with_the_reason(decoder, frames, tmp_path):
    times = np.cumsum([0] + [40] * (len(frames) // 2) + [120] * (len(frames) // 2))[: len(frames)]
    odd = {
        "it is stored rotated": put(tmp_path, frames, "rotated.mp4", rotation=90),
        "its frame rate varies": put(tmp_path, frames, "varies.mkv", milliseconds=times),
    }
    for expected, path in odd.items():
        clip, reason = ClipReader(decoder).read(path, **CLIP)
        assert reason is not None and expected in reason
        assert torch.equal(clip, read_clip(path, **CLIP))


def test_damaged_frames_are_never_returned(decoder, frames, tmp_path):
    """decord and torchcodec return pictures for these bits without an error."""
    content = bytearray(put(tmp_path, frames, "intact.mp4", options={"g": "12"}).read_bytes())
    start = content.find(b"mdat") + 200
    content[start + 2000 : start + 2300] = bytes(300)
    path = tmp_path / "damaged.mp4"
    path.write_bytes(content)
    try:
        expected = read_clip(path, **CLIP)
    except VideoError as error:
        with pytest.raises(VideoError) as raised:
            ClipReader(decoder).read(path, **CLIP)
        assert str(raised.value) == str(error)
    else:
        clip, reason = ClipReader(decoder).read(path, **CLIP)
        assert torch.equal(clip, expected) and reason


def test_decoder_that_returns_another_frame_is_not_used(decoder, frames, tmp_path, monkeypatch):
    path = put(tmp_path, frames, "a.mp4", options={"g": "12"})
    decode = decoders._decode_numbers

    def shift(decoder, path, numbers):  # return the frame before, in one keyframe interval
        return decode(decoder, path, [number - (12 <= number < 24) for number in numbers])

    monkeypatch.setattr(decoders, "_decode_numbers", shift)
    clip, reason = ClipReader(decoder).read(path, **CLIP)
    assert reason == f"{decoder} returns other frames than PyAV"
    assert torch.equal(clip, read_clip(path, **CLIP))


def test_changed_file_is_examined_again(frames, tmp_path, monkeypatch):
    examined = []
    monkeypatch.setattr(decoders, "check_package", lambda name: None)
    monkeypatch.setattr(decoders, "_examine", lambda *key: examined.append(key) or "no")
    path = put(tmp_path, frames, "a.mp4")
    reader = ClipReader("decord")
    reader.read(path, **CLIP)
    put(tmp_path, frames[:20], "a.mp4")
    reader.read(path, **CLIP)
    assert examined[0] != examined[1]


def test_dataset_reports_files_read_by_pyav(frames, tmp_path, monkeypatch):
    monkeypatch.setattr(decoders, "check_package", lambda name: None)
    monkeypatch.setattr(decoders, "find_obstacle", lambda path, decoder: "it is odd" if "b.mp4" in str(path) else None)
    monkeypatch.setattr(
        decoders, "_decode_numbers", lambda decoder, path, numbers: np.zeros((len(numbers), 48, 64, 3), "u1")
    )
    for name in ("a.mp4", "b.mp4"):
        put(tmp_path, frames, name)
    clips = ClipDataset(tmp_path, num_frames=4, fps=8, resolution=32, train=False, decoder="decord")
    batch = collate_clips([clips[0], clips[1], clips[1]])
    assert batch["fallbacks"] == [(str(tmp_path / "b.mp4"), "it is odd")]
    assert clips.centered().reader.decoder == "decord"
    sentence = describe_fallbacks("decord", batch["fallbacks"], len(clips.files))
    assert sentence == "PyAV read 1 of 2 videos in place of decord (it is odd: 1)."
    assert describe_fallbacks("decord", [], 2) == "decord read all videos."
    assert describe_fallbacks("pyav", [], 2) is None


def test_unknown_or_missing_decoder_raises_one_sentence(monkeypatch):
    with pytest.raises(UserError, match=r"data\.decoder must be one of pyav, decord, torchcodec, not 'opencv'"):
        ClipReader("opencv")

    def fail(error):
        def import_module(name):
            raise error

        monkeypatch.setattr(decoders.importlib, "import_module", import_module)

    fail(ModuleNotFoundError("No module named 'decord'"))
    with pytest.raises(UserError, match="needs the package decord: pip install decord"):
        ClipReader("decord")
    fail(OSError("libtorchcodec_core4.so: cannot open\nmore"))
    with pytest.raises(UserError, match=r"cannot be loaded \(libtorchcodec_core4.so: cannot open\)"):
        ClipReader("torchcodec")
