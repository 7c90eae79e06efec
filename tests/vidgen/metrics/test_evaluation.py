"""Reconstruction of datasets and pairs of folders, against figures clip by clip, and one process against two."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from forked import run_forked

from autoencoder import AutoencoderKLVidTwin
from vidgen.common.errors import UserError
from vidgen.data.dataset import ClipDataset
from vidgen.data.sprites import write_sprites
from vidgen.data.streams import open_writer
from vidgen.data.video import read_clip, write_video
from vidgen.losses.lpips import LPIPS
from vidgen.metrics import evaluation
from vidgen.metrics.detectors import get_detector
from vidgen.metrics.evaluation import ProtocolClips, evaluate_pairs, evaluate_reconstruction
from vidgen.metrics.frechet import FeatureStatistics, RankDeficientWarning, frechet_distance
from vidgen.metrics.protocols import get_protocol
from vidgen.metrics.reconstruction import MAX_PSNR, clip_metrics, downsample_baseline, mean_color_baseline
from vidgen.metrics.stats import mean_interval

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def sprites(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("evaluation"))


def write_folder(folder: Path) -> Path:
    write_sprites(folder / "sprites", 1, seed=0, resolution=32)
    return folder / "sprites"


def tiny_vae() -> AutoencoderKLVidTwin:
    torch.manual_seed(0)
    return AutoencoderKLVidTwin.from_preset("tiny-test").eval()


def clips_in(folder: Path, **options) -> ClipDataset:
    return ClipDataset(folder, 4, 4, 32, train=False, **options)


def network() -> LPIPS:
    torch.manual_seed(0)
    return LPIPS("squeeze").eval()


# --- a VAE over a data set ------------------------------------------------------------------------------------------


def test_figures_are_means_over_clips(sprites):
    vae, clips, lpips = tiny_vae(), clips_in(sprites, clips_per_video=2), network()
    result = evaluate_reconstruction(vae, clips, networks=[lpips], batch_size=3)
    assert (result["num_clips"], result["num_videos"], result["clip_shape"]) == (16, 8, [3, 4, 32, 32])
    assert result["num_values"] == vae.latent_size and result["compression_rate"] == vae.compression_rate
    video = torch.stack([clips[i]["video"] for i in range(len(clips))])
    with torch.no_grad():
        images = {
            "reconstruction": vae(video).sample,
            "mean_color": mean_color_baseline(video),
            "downsample": downsample_baseline(video, vae.latent_size),
        }
    assert result["figures"].keys() == images.keys()
    for row, image in images.items():
        for precision, quantize in (("uint8", True), ("float", False)):
            expected = clip_metrics(image, video, [lpips], quantize=quantize)
            assert expected.keys() == {"psnr", "psnr_frame", "ssim", "lpips_squeeze"}
            figures = result["figures"][row][precision]
            means = {name: figure["mean"] for name, figure in figures.items()}
            assert means == pytest.approx({n: v.double().mean().item() for n, v in expected.items()}, rel=1e-5), row
            for name, figure in figures.items():
                assert (figure["low"], figure["high"]) == pytest.approx(
                    mean_interval(expected[name].tolist(), list(range(8)) * 2), rel=1e-4
                )
    assert result["figures"]["reconstruction"]["uint8"] != result["figures"]["reconstruction"]["float"]
    for entry, index in zip(result["clips"], range(len(clips)), strict=True):
        assert (entry["path"], entry["start"]) == (
            clips[index]["path"],
            pytest.approx(clips[index]["start"], abs=1e-4),
        )
    expected = clip_metrics(images["reconstruction"], video, [lpips])
    assert [e["uint8"]["psnr"] for e in result["clips"]] == pytest.approx(expected["psnr"].tolist(), rel=1e-5)
    json.dumps(result)


def test_clips_of_another_size_count_the_values_of_all_their_tiles(sprites):
    vae = tiny_vae()
    clips = ClipDataset(sprites, 4, 4, 48, train=False)
    result = evaluate_reconstruction(vae, clips, batch_size=8)
    assert result["clip_shape"] == [3, 4, 48, 48]
    assert result["num_values"] % vae.latent_size == 0 and result["num_values"] > vae.latent_size


def test_clips_that_replace_unreadable_ones_are_left_out(tmp_path):
    folder = write_folder(tmp_path)
    first, second = sorted(folder.rglob("*.mp4"))[:2]
    first.write_bytes(second.read_bytes()[:1000])
    result = evaluate_reconstruction(tiny_vae(), clips_in(folder))
    assert result["num_clips"] == 7 and str(first) not in [entry["path"] for entry in result["clips"]]
    assert [path for path, _ in result["skipped"]] == [str(first)]


def test_a_reconstruction_that_is_not_finite_names_its_clip(sprites):
    vae = tiny_vae()
    for parameter in vae.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    with pytest.raises(UserError, match=r"\.mp4.* NaN"):
        evaluate_reconstruction(vae, clips_in(sprites))


def test_frames_too_small_for_lpips_are_refused(sprites):
    clips = ClipDataset(sprites, 4, 4, 16, train=False)
    with pytest.raises(UserError, match="needs frames of"):
        evaluate_reconstruction(tiny_vae(), clips, networks=[network()])


def work(folder: str) -> None:
    """The work of each of two processes."""
    state, folder = PartialState(cpu=True), Path(folder)
    assert state.num_processes == 2
    results = evaluate_both(folder)
    with pytest.raises(UserError, match="has 5 frames"):  # which the second process alone meets
        evaluate_pairs(folder / "original", folder / "longer")
    (folder / f"{state.process_index}.json").write_text(json.dumps(results))


def evaluate_both(folder: Path) -> list[dict]:
    return [
        evaluate_reconstruction(
            tiny_vae(),
            clips_in(folder / "sprites", clips_per_video=2),
            batch_size=3,
            detectors=[get_detector("pooled_pixels")],
        ),
        evaluate_pairs(folder / "original", folder / "original"),
    ]


def test_two_processes_give_the_result_of_one(tmp_path):
    write_folder(tmp_path)
    for name, length in {"x": 4, "y": 5}.items():
        write(tmp_path / "original" / f"{name}.mp4", noise(4, 32, 32))
        write(tmp_path / "longer" / f"{name}.mp4", noise(length, 32, 32))
    run_forked(work, str(tmp_path), processes=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert_near(first, json.loads(json.dumps(evaluate_both(tmp_path))))


def assert_near(a, b) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_near(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_near(x, y)
    else:
        assert a == (pytest.approx(b, rel=1e-4) if isinstance(b, float) else b)


# --- the interval ---------------------------------------------------------------------------------------------------


def test_an_interval_matches_the_standard_error():
    values = np.random.default_rng(1).normal(20, 3, size=200)
    low, high = mean_interval(values)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15 * half)
    assert mean_interval(values) == (low, high)


def test_clips_of_one_video_are_drawn_together():
    values = np.repeat(np.random.default_rng(1).normal(20, 3, size=50), 8)  # eight clips that say the same
    videos = np.repeat(np.arange(50), 8).tolist()
    assert mean_interval(values, videos) == pytest.approx(mean_interval(values[::8]), abs=1e-9)


def test_one_video_has_no_interval():
    assert mean_interval([1.0, 2.0, 3.0], ["a"] * 3) == (None, None)


# --- pairs of folders -----------------------------------------------------------------------------------------------


def write(path: Path, frames: np.ndarray, fps: float = 10) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_writer(path, fps=fps, width=frames.shape[2], height=frames.shape[1]) as writer:
        writer.write(frames)
    return path


def noise(frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (frames, height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return small.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width]


def test_pairs_of_any_size_and_length_are_measured_in_clips(tmp_path):
    for name, shape in {"a/x": (10, 33, 35), "b/x": (3, 40, 24)}.items():
        write(tmp_path / "original" / f"{name}.mp4", noise(*shape))
        write(tmp_path / "theirs" / f"{name}.mp4", noise(*shape, seed=1))
    result = evaluate_pairs(
        tmp_path / "original", tmp_path / "theirs", networks=[network()], num_frames=4, compression_rate=0.01
    )
    assert (result["num_clips"], result["num_videos"], result["clip_shape"]) == (4, 2, None)
    assert [entry["start"] for entry in result["clips"]] == [0, 0.4, 0.8, 0]
    for entry, (name, first, length) in zip(
        result["clips"], [("a/x", 0, 4), ("a/x", 4, 4), ("a/x", 8, 2), ("b/x", 0, 3)], strict=True
    ):
        ours, theirs = (
            read_clip(tmp_path / side / f"{name}.mp4", start=first / 10, fps=10, num_frames=length)
            for side in ("original", "theirs")
        )
        ours, theirs = (x.permute(3, 0, 1, 2)[None].float() / 127.5 - 1 for x in (ours, theirs))
        expected = clip_metrics(theirs, ours, [network()])
        assert entry["uint8"] == pytest.approx({n: v.item() for n, v in expected.items()}, rel=1e-5)
        assert entry["float"] == pytest.approx(entry["uint8"], rel=1e-5)  # files hold bytes
    assert result["figures"].keys() == {"reconstruction", "mean_color", "downsample"}
    assert "downsample" not in evaluate_pairs(tmp_path / "original", tmp_path / "theirs")["figures"]


def test_a_list_of_files_is_matched_by_their_names_whatever_the_ending(tmp_path):
    write(tmp_path / "original" / "x.mp4", noise(4, 32, 32))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.m4v").write_bytes((tmp_path / "original" / "x.mp4").read_bytes())
    (tmp_path / "theirs.csv").write_text("path\nelsewhere/x.m4v\n")
    result = evaluate_pairs(tmp_path / "original", tmp_path / "theirs.csv")
    assert result["figures"]["reconstruction"]["uint8"]["psnr"] == {"mean": MAX_PSNR, "low": None, "high": None}
    assert result["clip_shape"] == [3, 4, 32, 32]


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ({"x": (4, 32, 32)}, "has a video y, and .*theirs has none of that name: of 2 originals and 1 recon"),
        (dict.fromkeys("xyz", (4, 32, 32)), "theirs has a video z, and .*original has none"),
        ({"x": (4, 32, 32), "y": (4, 32, 48)}, "y.mp4 has 48 x 32 pixels, and its original .*y.mp4 has 32 x 32"),
        ({"x": (4, 32, 32), "y": (5, 32, 32)}, "y.mp4 has 5 frames, and its original .*y.mp4 has 4"),
    ],
)
def test_pairs_that_do_not_fit_are_named(tmp_path, theirs, said):
    for name in "xy":
        write(tmp_path / "original" / f"{name}.mp4", noise(4, 32, 32))
    for name, shape in theirs.items():
        write(tmp_path / "theirs" / f"{name}.mp4", noise(*shape))
    with pytest.raises(UserError, match=said):
        evaluate_pairs(tmp_path / "original", tmp_path / "theirs")


def test_two_videos_of_the_same_name_are_refused(tmp_path):
    video = write(tmp_path / "original" / "x.mp4", noise(4, 32, 32))
    video.with_suffix(".m4v").write_bytes(video.read_bytes())
    with pytest.raises(UserError, match="two videos of the name x"):
        evaluate_pairs(tmp_path / "original", tmp_path / "original")


def test_frames_too_small_for_ssim_name_the_video(tmp_path):
    write(tmp_path / "x.mp4", noise(2, 4, 32))
    with pytest.raises(UserError, match=r"x\.mp4: SSIM's window needs frames of 6 x 6"):
        evaluate_pairs(tmp_path, tmp_path)


# --- the protocol ---------------------------------------------------------------------------------------------------


def test_mcl_jcv_takes_clip_after_clip_and_leaves_out_every_sixth_frame(tmp_path):
    write_video(tmp_path / "a.mp4", np.zeros((150, 32, 48, 3), np.uint8), 30)  # as its originals last
    shades = np.arange(20, dtype=np.uint8)[:, None, None, None] * 10 + np.zeros((32, 32, 3), np.uint8)
    write_video(tmp_path / "b.mp4", shades, 30, crf=0)
    write_video(tmp_path / "c.mp4", shades[:5], 30)
    protocol = get_protocol("mcl-jcv")
    assert (protocol.fps, protocol.frames, protocol.size) == (25, 16, 224)  # as the paper states
    clips = ProtocolClips(tmp_path, replace(protocol, size=32))
    assert len(clips) == 8 and [Path(path).name for path, _ in clips.unusable] == ["c.mp4"]
    assert [clips[i]["start"] for i in range(7)] == pytest.approx([0.64 * i for i in range(7)])
    last = clips[7]
    assert (Path(last["path"]).name, last["start"], last["video"].shape) == ("b.mp4", 0, (3, 16, 32, 32))
    frames = ((last["video"].mean(dim=(0, 2, 3)) + 1) * 127.5 / 10).round().tolist()
    assert frames == [i * 30 // 25 for i in range(16)]  # the one shown at i / 25
    (tmp_path / "a.mp4").unlink()
    result = evaluate_reconstruction(tiny_vae(), clips=ProtocolClips(tmp_path, replace(protocol, size=32)))
    assert result["num_clips"] == 1 and [Path(path).name for path, _ in result["skipped"]] == ["c.mp4"]


# --- rFVD -----------------------------------------------------------------------------------------------------------


def test_rfvd_is_the_distance_of_reconstructions_to_originals(sprites):
    vae, clips, detector = tiny_vae(), clips_in(sprites, clips_per_video=2), get_detector("pooled_pixels")
    with torch.no_grad():
        list(vae.parameters())[-1].add_(1.4)  # bright enough to be clamped
    distance = evaluate_reconstruction(vae, clips, detectors=[detector], batch_size=3)["rfvd"]["pooled_pixels"]
    video = torch.stack([clips[i]["video"] for i in range(len(clips))])
    with torch.no_grad():
        image = vae(video).sample
    assert image.max() > 1.2
    with pytest.warns(RankDeficientWarning):
        expected = frechet_distance(*(FeatureStatistics.of(detector(x)) for x in (image.clamp(-1, 1), video)))
    assert distance["value"] == pytest.approx(expected, rel=1e-4) and distance["vectors"] == 16
    assert distance["low"] < distance["value"] < distance["high"]
    assert distance["detector"] == detector.describe()


def test_rfvd_keeps_no_features_of_clips(sprites, monkeypatch):
    """No features of clips are gathered or returned."""
    gathered = []
    monkeypatch.setattr(evaluation, "gather_object", lambda entries: gathered.append(entries) or entries)
    detector = get_detector("pooled_pixels")
    evaluate_reconstruction(tiny_vae(), clips_in(sprites, clips_per_video=2), detectors=[detector], batch_size=3)

    def leaves(tree):
        children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else None
        return [tree] if children is None else [leaf for child in children for leaf in leaves(child)]

    assert len(gathered[1]) == 16
    assert {type(leaf) for leaf in leaves(gathered)} <= {int, float, str, type(None)}
    assert len(leaves(gathered[1][0])) < 40


def test_rfvds_interval_resamples_videos(sprites, monkeypatch):
    """Clips of one video are in one group."""
    numbers = []
    original = FeatureStatistics.update
    monkeypatch.setattr(FeatureStatistics, "update", lambda s, f, n: numbers.append((len(f), n)) or original(s, f, n))
    clips = clips_in(sprites, clips_per_video=2)
    evaluate_reconstruction(tiny_vae(), clips, detectors=[get_detector("pooled_pixels")], batch_size=8)
    assert numbers == [(8, list(range(8)))] * 4  # two batches, each of originals and of reconstructions


def test_detectors_of_one_name_are_refused(sprites):
    with pytest.raises(UserError, match="the detector pooled_pixels is given 2 times"):
        evaluate_pairs(sprites, sprites, detectors=[get_detector("pooled_pixels")] * 2)


def test_an_internal_error_is_not_a_user_error(sprites, monkeypatch):
    def broken(*_, **__):
        raise ValueError("a bug")

    monkeypatch.setattr(evaluation, "clip_metrics", broken)
    with pytest.raises(ValueError, match=r"^a bug$") as error:
        evaluate_pairs(sprites, sprites)
    assert not isinstance(error.value, UserError)


def test_a_latent_larger_than_the_clip_names_the_video(sprites):
    with pytest.raises(UserError, match=r"\.mp4: num_values must be in 1\.\."):
        evaluate_pairs(sprites, sprites, compression_rate=1.5)


def test_rfvd_prepares_clips_by_the_protocol(tmp_path, monkeypatch):
    frames = noise(36, 32, 32)
    write_video(tmp_path / "x.mp4", frames, 25)
    detector, seen = get_detector("pooled_pixels"), []
    monkeypatch.setattr(detector, "features", lambda clips: seen.append(clips) or torch.randn(len(clips), 128))
    protocol = replace(get_protocol("mcl-jcv"), size=32, detector_range=0.5, detector_resize="squash")
    result = evaluate_reconstruction(tiny_vae(), ProtocolClips(tmp_path, protocol), detectors=[detector])
    assert {clips.shape for clips in seen} == {(2, 3, 16, 224, 224)} and len(seen) == 2
    assert max(clips.abs().max() for clips in seen) <= 0.5
    assert result["rfvd"]["pooled_pixels"]["vectors"] == 2
    assert result["rfvd"]["pooled_pixels"]["low"] is None  # of one video


def test_rfvd_of_pairs_uses_only_full_clips(tmp_path):
    for name in "xy":
        write(tmp_path / f"{name}.mp4", noise(10, 32, 32))
    distance = evaluate_pairs(tmp_path, tmp_path, num_frames=4, detectors=[get_detector("pooled_pixels")])["rfvd"]
    assert distance["pooled_pixels"]["vectors"] == 4
    assert distance["pooled_pixels"]["value"] == pytest.approx(0, abs=1e-9)
