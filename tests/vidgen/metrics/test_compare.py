"""Distances between two sets of videos: equal to a pipeline's, of halves, with broken files, in flat memory."""

from __future__ import annotations

import json
import resource
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from command_line import fail

from autoencoder import AutoencoderKLVidTwin
from pipelines import VidTwinPipeline, VidTwinTransformer3DModel, default_scheduler
from vidgen.cli import main
from vidgen.common.io import file_url
from vidgen.common.video_writing import write_video
from vidgen.data.sprites import write_sprites
from vidgen.data.transforms import clip_to_frames
from vidgen.metrics.compare import compare_videos
from vidgen.metrics.detectors import Detector, get_detector
from vidgen.metrics.features import Collector
from vidgen.metrics.fvd import Sampling, evaluate_pipeline, generate_clips
from vidgen.metrics.protocols import get_protocol

PROTOCOL = replace(get_protocol("sprites"), frames=4, size=32, fps=4, generated=16, real=16)
SAMPLING = Sampling(num_inference_steps=2)


class FewNumbers(Detector):
    """Few features per clip, so that few clips suffice."""

    name, dim = "few_numbers", 3

    def features(self, clips):
        return get_detector("pooled_pixels")(clips)[:, [0, 20, 40]]


@pytest.fixture(scope="module")
def sprites(tmp_path_factory):
    root = tmp_path_factory.mktemp("sprites")
    write_sprites(root, 4, seed=0, resolution=32, num_frames=8)
    return root


def write_lossless(path, frames, fps):
    with av.open(file_url(path), "w") as container:
        stream = container.add_stream("ffv1", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "bgr0"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def compare(real, fake, folder, **changes):
    options = {"folder": folder, "protocol": PROTOCOL, "detectors": [FewNumbers()], "batch_size": 2, **changes}
    return compare_videos(real, fake, options.pop("protocol"), options.pop("detectors"), Accelerator(), **options)


def test_saved_samples_of_a_pipeline_have_its_distance(sprites, tmp_path):
    torch.manual_seed(0)
    vae = AutoencoderKLVidTwin.from_preset("tiny-test", bottleneck="residual").eval()
    transformer = VidTwinTransformer3DModel.from_preset("tiny-test", vae=vae, num_classes=8).eval()
    pipeline = VidTwinPipeline(vae, transformer, default_scheduler())
    pipeline.set_progress_bar_config(disable=True)
    [expected] = evaluate_pipeline(
        pipeline, sprites, PROTOCOL, [FewNumbers()], Accelerator(),
        folder=tmp_path / "own", samples=16, sampling=SAMPLING, batch_size=2,
    )  # fmt: skip
    batches = list(generate_clips(pipeline, SAMPLING, PROTOCOL)([[n, n + 1] for n in range(0, 16, 2)]))
    videos = np.concatenate([clip_to_frames(batch.clips).numpy() for batch in batches])
    np.save(tmp_path / "samples.npy", videos)
    for name, write in (("lossless", write_lossless), ("lossy", write_video)):
        (tmp_path / name).mkdir()
        for number, frames in enumerate(videos):
            write(tmp_path / name / f"{number:03}.{'mkv' if name == 'lossless' else 'mp4'}", frames, 4)
    for fake in ("samples.npy", "lossless"):
        [result] = compare(sprites, tmp_path / fake, tmp_path / "work")
        assert (result.value, (result.low, result.high)) == (expected.generated.value, expected.generated.interval)
        assert result.real_vs_real.value == expected.real_vs_real.value
        assert (result.num_real, result.num_fake) == (16, 16)
    [lossy] = compare(sprites, tmp_path / "lossy", tmp_path / "work")
    assert lossy.value != expected.generated.value
    assert expected.generated.interval[0] <= lossy.value <= expected.generated.interval[1]


def test_mmd_of_two_halves_holds_zero_and_of_noise_does_not(sprites, tmp_path):
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (96, 1, 1, 1, 3)) + rng.integers(0, 40, (96, 4, 8, 8, 3))
    videos = base.clip(0, 255).astype(np.uint8)
    np.save(tmp_path / "a.npy", videos[:48])
    np.save(tmp_path / "b.npy", videos[48:])
    np.save(tmp_path / "dark.npy", videos[48:] // 4)
    protocol = replace(PROTOCOL, generated=None, real=None, size=8)
    options = {"protocol": protocol, "distances": ("mmd", "frechet")}
    mmd, frechet = compare(tmp_path / "a.npy", tmp_path / "b.npy", tmp_path / "work", **options)
    assert mmd.distance == "mmd" and mmd.low <= 0 <= mmd.high and frechet.value > 0
    dark, _ = compare(tmp_path / "a.npy", tmp_path / "dark.npy", tmp_path / "work", **options)
    assert dark.low > 0
    [few] = compare(
        tmp_path / "a.npy", tmp_path / "b.npy", tmp_path / "few", **options | {"num_fake": 8, "distances": ["mmd"]}
    )
    assert (few.num_fake, few.num_real) == (8, 48) and not any("Fréchet" in note for note in few.notes)


def test_features_are_cached_by_content_and_broken_files_listed(sprites, tmp_path, monkeypatch):
    folder = tmp_path / "fake"
    write_sprites(folder, 1, seed=1, resolution=32, num_frames=8)
    (folder / "orbit" / "broken.mp4").write_bytes(b"no video")
    [first] = compare(sprites, folder, tmp_path / "work")
    [(path, _)] = first.unreadable["fake"]
    assert path.endswith("broken.mp4") and first.num_fake == 8
    assert any("1 fake videos are left out" in note for note in first.notes)
    assert any("8 fake clips, not the protocol's 16" in note for note in first.notes)
    folder.rename(tmp_path / "moved")
    monkeypatch.setattr("vidgen.metrics.real_clips.RealClips.__getitem__", None)  # nothing is read again
    [again] = compare(sprites, tmp_path / "moved", tmp_path / "work")
    assert again.value == first.value


def test_fewer_fake_clips_than_videos_are_drawn_from_all_classes(sprites, tmp_path, monkeypatch):
    windows = {}
    collect = Collector.collect

    def note(self, name, clips, count, source, **options):
        windows[name] = (clips.func.__self__.windows, source)
        return collect(self, name, clips, count, source, **options)

    monkeypatch.setattr(Collector, "collect", note)
    [few] = compare(sprites, sprites, tmp_path / "work", num_fake=8)
    drawn, source = windows["fake"]
    videos = [window.video for window in drawn]
    assert len({video // 4 for video in videos}) > 3  # of 8 classes with 4 videos each
    assert "8 of 32 fake clips are used, drawn at random with a fixed seed." in few.notes
    compare(sprites, sprites, tmp_path / "work", num_fake=12)
    assert windows["fake"] == ([*drawn, *windows["fake"][0][8:]], source)  # a larger set begins with the smaller one
    [every] = compare(sprites, sprites, tmp_path / "work", num_fake=32)
    drawn, source = windows["fake"]
    assert [window.video for window in drawn] == list(range(32)) and "order" not in source
    assert not any("drawn at random" in note for note in every.notes)


def test_the_command_writes_json_and_a_plot(sprites, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["fvd", str(sprites), str(sprites), "--protocol", "sprites", "--detector", "pooled_pixels"]
    np.save("videos.npy", np.random.default_rng(0).integers(0, 256, (8, 16, 8, 8, 3), dtype=np.uint8))
    words[1:3] = ["videos.npy", "videos.npy"]
    main([*words, "--distance", "mmd", "--output", "o.json", "--plot", "o.png"])
    shown = capsys.readouterr()
    assert "pooled_pixels" in shown.out and "read as N x T x H x W x C" in shown.err
    record = json.loads((tmp_path / "o.json").read_text())
    expected = {
        "value",
        "low",
        "high",
        "distance",
        "detector",
        "protocol",
        "num_real",
        "num_fake",
        "versions",
        "command",
    }
    assert expected <= record.keys() and (record["detector"], record["num_fake"]) == ("pooled_pixels", 8)
    assert (tmp_path / "o.png").stat().st_size > 1000
    assert "4 or more, not 3" in fail(capsys, *words, "--num-fake", 3)
    assert "unknown protocol 'sprite'" in fail(capsys, *words[:4], "sprite")


def test_memory_does_not_grow_with_clips(tmp_path):
    protocol = replace(PROTOCOL, generated=None, real=None, size=32)

    def peak(count):
        videos = np.lib.format.open_memmap(tmp_path / f"{count}.npy", "w+", np.uint8, (count, 16, 32, 32, 3))
        videos[:] = np.random.default_rng(0).integers(0, 256, (count, 1, 1, 1, 3))
        del videos
        options = {"protocol": replace(protocol, frames=16), "batch_size": 16}
        compare(tmp_path / f"{count}.npy", tmp_path / f"{count}.npy", tmp_path / str(count), **options)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    few, many = peak(50), peak(500)
    assert many - few < 50_000  # KiB; 500 clips in float32 take 98 MB, and both sides twice that
