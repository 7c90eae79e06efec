"""The benchmark of real video: smoke scale, and properties of its measurements."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.common.generation import train_tiny_pipeline
from benchmarks.latents.clips import write_smoke_videos
from benchmarks.real import __main__ as real
from benchmarks.real import candidates
from benchmarks.real.classifier import augment
from benchmarks.real.clips import Clips, read_clips, read_groups
from benchmarks.real.components import background_similarity, motion_correlation, pair_classes
from benchmarks.real.generation import measure_image_to_video
from benchmarks.real.memorization import copy_features, measure_memorization
from benchmarks.real.reconstruction import METRICS, summarize
from pipelines import MotionClassifier, VidTwinPipeline
from vidgen.common.errors import UserError
from vidgen.common.images import to_uint8
from vidgen.common.video_writing import write_video


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def random_clips(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, 4, 24, 36, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_smoke_and_a_second_run_computes_nothing(work_dir, lpips_weights, monkeypatch):
    arguments = ["--work-dir", str(work_dir), lpips_weights]
    real.BENCHMARK.main(arguments)
    results = json.loads((work_dir / "smoke" / "real.json").read_text())["results"]
    assert {"reconstruction", "generated", "animated", "real"} == set(results["accuracy"])
    assert set(results["distances"]["pooled_pixels"]) == {"train", "reconstruction", "generated"}
    assert "model minus block_pca_4x8x8" in (work_dir / "real.md").read_text()
    with monkeypatch.context() as patch:  # the fixture's patch stays
        patch.setattr(real, "train_on_videos", lambda *args, **kwargs: pytest.fail("trained again"))
        patch.setattr(VidTwinPipeline, "__call__", lambda *args, **kwargs: pytest.fail("sampled again"))
        patch.setattr(real.reconstruction, "score_codec", lambda *args: pytest.fail("scored again"))
        real.BENCHMARK.main(arguments)
    assert json.loads((work_dir / "smoke" / "real.json").read_text())["results"] == results

    # Another model of the same name has other scores.
    transformer = next((work_dir / "ucf101_fvd").rglob("transformer/diffusion_pytorch_model.safetensors"))
    weights = {name: weight + 0.01 for name, weight in load_file(transformer).items()}
    save_file(weights, transformer)
    real.BENCHMARK.main(arguments)
    again = json.loads((work_dir / "smoke" / "real.json").read_text())["results"]
    assert again["distances"]["pooled_pixels"]["generated"] != results["distances"]["pooled_pixels"]["generated"]
    assert again["reconstruction"] == results["reconstruction"]

    # So have other ways to sample.
    for option, text in (
        (["--guidance", "6"], "with guidance 6, at noise levels 0 to 1, and temperature 1."),
        (["--guidance-interval", "0.6", "1"], "at noise levels 0.6 to 1, and"),
        (["--temperature", "0.5"], "and temperature 0.5."),
        (["--guidance", "4", "--image-guidance", "2"], "Clips are animated in 2 steps with guidance 2,"),
        (["--steps", "4", "--image-steps", "3"], "Clips are animated in 3 steps with guidance 3,"),
    ):
        real.BENCHMARK.main([*arguments, *option])
        results = json.loads((work_dir / "smoke" / "real.json").read_text())["results"]
        assert results["distances"]["pooled_pixels"]["generated"] != again["distances"]["pooled_pixels"]["generated"]
        assert text in (work_dir / "real.md").read_text()

    # More clips for each test clip have other noise: accuracies and similarities are means over all of them.
    real.BENCHMARK.main([*arguments, "--repeats", "3"])
    assert "3 of each test clip" in (work_dir / "real.md").read_text()
    for name in ("generated_classes", "animated"):
        kept = [load_file(path)["clips"] for path in work_dir.rglob(f"scores-*/{name}.safetensors")]
        once, more = min(kept, key=len), max(kept, key=len)
        assert len(more) == 3 * len(once) and len(more.flatten(1).unique(dim=0)) == len(more)


def test_missing_models_and_lists_are_one_sentence(tmp_path, capsys):
    for arguments, message in (
        (["--scale", "cpu"], "--vae FOLDER"),
        (["--scale", "cpu", "--vae", "x"], "--test LIST"),
        (["--vae", "x", "--guidance-interval", "0.8", "0.3"], "two numbers from 0 to 1, the lower first, not 0.8 0.3"),
        (["--vae", "x", "--temperature", "-1"], "temperature must be a finite number of at least 0, not -1"),
        (["--vae", "x", "--train", "x", "--test", "x", "--training-clips", "0"], "clips must be at least 1"),
        (["--vae", "x", "--train", "x", "--test", "x", "--repeats", "0"], "--repeats must be at least 1, not 0"),
        (
            ["--vae", "x", "--train", "x", "--test", "x", "--image-candidates", "0"],
            "--image-candidates must be at least 1, not 0",
        ),
        (["--vae", "x", "--image-steps", "0"], "num_inference_steps must be 1 or more, not 0"),
        (["--vae", "x", "--image-temperature", "-1"], "temperature must be a finite number of at least 0, not -1"),
    ):
        with pytest.raises(SystemExit) as stopped:
            real.BENCHMARK.main([*arguments, "--work-dir", str(tmp_path)])
        assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_videos_that_are_too_short_are_one_sentence(tmp_path):
    (tmp_path / "left").mkdir()
    write_video(tmp_path / "left" / "a.mp4", np.zeros((3, 32, 48, 3), np.uint8), 8)
    with pytest.raises(UserError, match="no readable video"):
        read_clips([tmp_path], (3, 16, 32, 48), 8.0, 1)


def test_groups_that_cannot_be_read_are_one_sentence(tmp_path):
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe")
    for name in ("missing.csv", "bytes.csv"):
        with pytest.raises(UserError, match=f"{name} cannot be read"):
            read_groups([tmp_path / name])


def test_copies_of_training_clips_are_found():
    training, test, new = (copy_features(random_clips(40, seed)) for seed in range(3))
    copied = measure_memorization(torch.cat([training[:10] + 1e-3, new[:10]]), test, training)
    assert copied["copies"]["generated"]["value"] == pytest.approx(0.5, abs=0.06)
    assert measure_memorization(test, test, training)["copies"]["generated"]["value"] <= 0.05
    assert copied["median"]["test"] > copied["threshold"]


def test_equal_methods_differ_by_nothing():
    scores = {metric: [1.0, 2.0, 4.0, 3.0] for metric in METRICS}
    shifted = {metric: [value - 1 for value in values] for metric, values in scores.items()}
    methods = {"reconstruction": scores, "same": scores, "lower": shifted}
    results = summarize(methods, ["a", "a", "b", "c"], ["x", "x", "y", "y"])
    assert list(results) == ["all", "x", "y"] and results["all"]["groups"] == 3
    assert results["all"]["difference"]["same"]["psnr"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert results["all"]["difference"]["lower"]["psnr"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert results["x"]["figures"]["reconstruction"]["psnr"] == {"mean": 1.5, "low": None, "high": None}


def test_background_and_motion():
    still = random_clips(2)[:, :, :1].expand(-1, -1, 4, -1, -1).clone()
    moving = still.clone()
    moving[..., :12, :] = random_clips(2, seed=1)[..., :12, :]  # the upper half moves
    assert torch.allclose(background_similarity(still, moving), torch.ones(2, dtype=torch.float64))
    assert background_similarity(random_clips(2, seed=2), moving).abs().max() < 0.1
    assert (background_similarity(0.5 * still, moving) < 0.85).all()  # a plain correlation is 1
    assert torch.allclose(motion_correlation(moving, moving), torch.ones(2, dtype=torch.float64))
    assert motion_correlation(still, moving).abs().max() == 0
    assert (motion_correlation(moving.flip(2), moving) < 0.9).all()


def test_background_is_relative_to_that_of_reconstructions():
    pixels = to_uint8(random_clips(4))
    clips = Clips(pixels, ["x"] * 4, list("abcd"), list("aabb"), ["data"] * 4)
    sets = {"original": pixels, "noise": to_uint8(random_clips(4, seed=1))}
    rows = measure_image_to_video(sets, clips, lambda clips: 0.5 * clips)
    assert list(rows) == ["original", "noise", "reconstruction"]
    assert rows["reconstruction"]["relative_background"] == 1
    assert rows["original"]["relative_background"] == pytest.approx(1 / rows["reconstruction"]["background"]["mean"])
    assert rows["noise"]["relative_background"] < 0.3


def test_pairs_have_other_classes_and_use_each_clip_once():
    labels = ["b", "a", "c", "a", "b", "c", "a"]
    partner = pair_classes(labels)
    assert sorted(partner) == list(range(7)) and all(labels[i] != labels[j] for i, j in enumerate(partner))


def test_augmentation_never_mirrors():
    ramp = torch.linspace(-0.5, 0.5, 72).expand(8, 3, 2, 48, 72).contiguous()
    changed = augment(ramp, torch.Generator().manual_seed(0))
    middle = changed.mean(dim=(1, 2, 3))[:, 18:54]
    assert (middle[:, 24:].mean(dim=1) > middle[:, :12].mean(dim=1)).all()


def test_a_classifier_for_candidates_is_trained(work_dir, lpips_weights, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(candidates, "CLIP_SHAPE", (3, 4, 32, 32))
    monkeypatch.setattr(candidates, "WINDOWS", 1)
    monkeypatch.setattr(candidates, "TRAINING", dict(steps=1, batch_size=2, seed=1, width=4, points=2, dim=8))
    [train], [test] = write_smoke_videos(tmp_path / "data")
    monkeypatch.setattr("sys.argv", ["candidates", str(tmp_path / "classifier"), str(train), "--steps", "2"])
    candidates.main()
    classifier = MotionClassifier.from_pretrained(tmp_path / "classifier")
    labels = set(read_clips([train], (3, 4, 32, 32), 8.0, 1).labels)
    assert set(classifier.config.classes) == labels
    with pytest.raises(UserError, match="classifier exists: name a new folder"):
        candidates.main()

    # The benchmark chooses by it, and names the classes that it does not know.
    pipeline = VidTwinPipeline.from_pretrained(train_tiny_pipeline(work_dir / "ucf101_fvd"), classifier=classifier)
    pipeline.save_pretrained(tmp_path / "model")
    options = ["--work-dir", str(work_dir), lpips_weights, "--model", str(tmp_path / "model")]
    options += ["--train", str(train), "--test", str(test)]
    real.BENCHMARK.main([*options, "--image-candidates", "2"])
    results = json.loads((work_dir / "smoke" / "real.json").read_text())["results"]
    assert {"animated", "animated, one candidate"} <= set(results["accuracy"])
    assert results["sampling"]["animated"]["num_candidates"] == 2
    assert (
        "Of 2 candidates the pipeline's classifier, not the one above, chooses one."
        in (work_dir / "real.md").read_text()
    )
    classifier.register_to_config(classes=[f"other {label}" for label in classifier.config.classes])
    pipeline.save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit):
        real.BENCHMARK.main([*options, "--image-candidates", "2"])
    assert "the classifier knows other bounce" in capsys.readouterr().err
