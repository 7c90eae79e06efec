"""One model, four tasks: smoke scale, ablations, classifier and plot."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image

from autoencoder import AutoencoderKLVidTwin
from benchmarks.sprites import __main__ as sprites
from benchmarks.sprites.classifier import SpriteClassifier
from vidgen.common.config import save_config
from vidgen.common.errors import UserError
from vidgen.common.loading import load_vae


def test_smoke_with_ablations_and_a_second_run_trains_nothing(work_dir, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(sprites, "STRENGTHS", (0.0, 0.5))
    arguments = ["--scale", "smoke", "--work-dir", str(work_dir), "--ablations"]
    sprites.BENCHMARK.main(arguments)
    results = json.loads((work_dir / "smoke" / "sprites.json").read_text())["results"]
    assert set(results["ablations"]) == set(sprites.ABLATIONS)
    distances = {found["generate"]["distance"]["generated"] for found in results["ablations"].values()}
    assert len(distances) == len(sprites.ABLATIONS)  # all models differ
    assert [*results["animate"]] == [*results["retarget"]] == ["0.0", "0.5"]
    assert len(results["rollouts"]["change"]) == results["rollouts"]["frames"] - 1 == 11
    text = (work_dir / "sprites.md").read_text()
    assert "| no self-conditioning | " in text and "Roll-outs: 8 videos of 12 frames" in text
    texture = results["classifier"]["texture"]
    assert f"of the texture {texture['value']:.1%} (chance {texture['chance']:.1%})" in text
    assert "an RGB L2 distance of at most 441" in text
    assert Image.open(work_dir / "smoke" / "sprites.png").size[0] > 300

    monkeypatch.setattr(sprites, "train_dit", lambda config: pytest.fail("trained again"))
    monkeypatch.setattr(sprites, "train_classifier", lambda *args, **kwargs: pytest.fail("trained again"))
    sprites.BENCHMARK.main(arguments)
    again = json.loads((work_dir / "smoke" / "sprites.json").read_text())["results"]
    assert again == results


@pytest.fixture
def options(tmp_path, monkeypatch) -> argparse.Namespace:
    """Options with a training that only writes its config and its autoencoder."""
    AutoencoderKLVidTwin.from_preset("tiny-test").save_pretrained(tmp_path / "vae")

    def train(config):
        final = Path(config.output_dir, "final")
        assert not final.exists(), "trained again"
        load_vae(config.vae).save_pretrained(final / "vae")
        (final / "model_index.json").write_text("{}")
        save_config(config, final.with_name("config.yaml"))
        return final

    monkeypatch.setattr(sprites, "train_dit", train)
    return argparse.Namespace(scale="cpu", work_dir=tmp_path, data=tmp_path / "data", pipeline=tmp_path / "vae")


def ablation(options: argparse.Namespace, *settings: str, **others) -> Path:
    return sprites.train_ablation("an ablation", settings, argparse.Namespace(**{**vars(options), **others}))


def test_a_finished_training_with_other_settings_is_refused(options, tmp_path, monkeypatch):
    final = ablation(options)
    monkeypatch.chdir(tmp_path)
    vae = load_vae(str(options.pipeline))
    vae.bfloat16().save_pretrained("rounded")
    places = ["latent_cache=elsewhere", "resume=null"]
    assert ablation(options, *places, data="data", pipeline="rounded") == final
    vae.decoder.requires_grad_(True)
    with torch.no_grad():
        next(vae.decoder.parameters()).add_(1)
    vae.save_pretrained("another")
    for settings, others, says in (
        (["diffusion.independent_timesteps=0"], {}, "with diffusion.independent_timesteps 0.5, not 0.0: delete"),
        (["model.overrides.self_conditioning=false"], {}, "with model.overrides {.*"),
        ([], {"data": "other"}, f"with data.root {tmp_path / 'data'}, not {tmp_path / 'other'}: delete"),
        ([], {"pipeline": "another"}, "was trained on another autoencoder than that of another: delete"),
        (["train.logging_steps=7"], {}, "with train.logging_steps 100, not 7: delete"),
        (["seed=1", "optim.name=adamw"], {}, "with seed 0, not 1, with optim.name muon, not adamw: delete"),
    ):
        with pytest.raises(UserError, match=says):
            ablation(options, *settings, **others)


def test_an_unfinished_training_with_other_settings_is_refused(options, monkeypatch):
    final = ablation(options)
    (final / "model_index.json").unlink()
    with pytest.raises(UserError, match="train_batch_size 32, not 16: delete"):
        ablation(options, "train.train_batch_size=16")
    monkeypatch.setattr(sprites, "train_dit", lambda config: final)
    assert ablation(options) == final


def test_one_classifier_per_clip_size(tmp_path, monkeypatch):
    asked = []

    def train(accelerator, *, num_frames, resolution, **settings):
        asked.append((num_frames, resolution))
        return SpriteClassifier(width=8, dim=8)

    monkeypatch.setattr(sprites, "train_classifier", train)
    options = argparse.Namespace(scale="cpu", work_dir=tmp_path)
    for sizes in ((16, 64), (8, 64), (16, 64), (8, 64)):
        sprites.load_classifier(options, dict(zip(("num_frames", "resolution"), sizes, strict=True)))
    assert asked == [(16, 64), (8, 64)]
    assert sorted(folder.name for folder in (tmp_path / "sprites").iterdir()) == ["classifier", "classifier-8x64"]


def test_the_plot_is_gray_where_windows_overlap(monkeypatch):
    gray = []
    monkeypatch.setattr(Axes, "axvspan", lambda self, low, high, **style: gray.append((low, high)))
    shown = {name: {"value": 1.0} for name in ("motion", "shape")}
    windows = [{"first_frame": first, **shown} for first in (0, 14, 28, 42, 48)]
    rolled = {"frames": 64, "overlap": 2, "windows": windows, "moved": [1.0] * 63}
    sprites.plot({"animate": {}, "retarget": {}, "rollouts": rolled})
    assert gray == [(first - 0.5, first + 2.5) for first in (14, 28, 42, 56)]


def test_paper_scale_and_missing_pipeline_are_refused(tmp_path):
    for arguments, says in ((["--scale", "paper"], "take --scale cpu"), (["--scale", "cpu"], "name a pipeline")):
        parser = sprites.argparse.ArgumentParser()
        parser.add_argument("--scale")
        sprites.add_options(parser)
        options = parser.parse_args(arguments)
        options.work_dir = tmp_path
        with pytest.raises(UserError, match=says):
            sprites.run(options)


def test_a_pipeline_without_the_classes_of_sprites_is_refused(monkeypatch):
    monkeypatch.setattr(sprites, "_load", lambda folder, dtype: SimpleNamespace(labels={}))
    with pytest.raises(UserError, match="must know the motions of sprites as classes; it has no"):
        sprites.run(argparse.Namespace(scale="cpu", pipeline="unconditional", dtype="float32"))
