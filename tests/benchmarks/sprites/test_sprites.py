"""One model, four tasks: smoke scale and classifier."""

from __future__ import annotations

import argparse
import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks.sprites import __main__ as sprites
from benchmarks.sprites import classifier
from vidgen.common.errors import UserError


def test_smoke_and_a_second_run_trains_nothing(work_dir, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(sprites, "STRENGTHS", (0.0, 0.5))
    arguments = ["--scale", "smoke", "--work-dir", str(work_dir)]
    sprites.BENCHMARK.main(arguments)
    results = json.loads((work_dir / "smoke" / "sprites.json").read_text())["results"]
    assert [*results["animate"]] == [*results["retarget"]] == ["0.0", "0.5"]
    assert len(results["rollouts"]["moved"]) == results["rollouts"]["frames"] - 1 == 11
    text = (work_dir / "sprites.md").read_text()
    assert "Roll-outs: 8 videos of 12 frames" in text
    texture = results["classifier"]["texture"]
    assert f"of the texture {texture['value']:.1%} (chance {texture['chance']:.1%})" in text
    assert "an RGB L2 distance of at most 441" in text

    monkeypatch.setattr(classifier, "train_classifier", lambda *args, **kwargs: pytest.fail("trained again"))
    sprites.BENCHMARK.main(arguments)
    again = json.loads((work_dir / "smoke" / "sprites.json").read_text())["results"]
    assert again == results


def test_one_classifier_per_clip_size(tmp_path, monkeypatch):
    asked = []

    def train(accelerator, *, num_frames, resolution, **settings):
        asked.append((num_frames, resolution))
        return classifier.SpriteClassifier(width=8, dim=8)

    monkeypatch.setattr(classifier, "train_classifier", train)
    for frames, side in ((16, 64), (8, 64), (16, 64), (8, 64)):
        folder = tmp_path / "sprites" / "classifier"
        classifier.load_classifier(folder, "cpu", num_frames=frames, resolution=side)
    assert asked == [(16, 64), (8, 64)]
    assert sorted(folder.name for folder in (tmp_path / "sprites").iterdir()) == [
        "classifier-16x64",
        "classifier-8x64",
    ]


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
    monkeypatch.setattr(sprites.generation, "load_placed_pipeline", lambda *_: SimpleNamespace(labels={}))
    with pytest.raises(UserError, match="must know the motions of sprites as classes; it has no"):
        sprites.run(argparse.Namespace(scale="cpu", pipeline="unconditional", dtype="float32"))
