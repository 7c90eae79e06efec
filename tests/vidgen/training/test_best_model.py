"""The best model of a run is kept, also by a run that resumes."""

from __future__ import annotations

import json
import math

import pytest

from runs import assert_same_tensors
from vidgen.common.errors import UserError
from vidgen.training.best_model import BestModel, check_keep_best
from vidgen.training.vae_trainer import VAETrainer, train_vae

STEADY = "optim.lr_scheduler=constant_with_warmup"


@pytest.mark.parametrize(
    ("metric", "values", "best_step"),
    [
        ("loss", [3.0, 1.0, 1.0, 2.0], 1),
        ("structure_t0-200", [2.0, 3.0], 0),
        ("fvd_i3d", [math.nan, 5.0, 4.0, math.inf], 2),
        ("psnr", [20.0, 21.0, 20.5], 1),
        ("validation/ssim", [0.2, 0.3, math.nan], 1),
        ("lpips_vgg", [0.2, 0.3], 0),
    ],
)
def test_the_direction_of_every_metric(metric, values, best_step):
    best = BestModel(metric)
    name = metric.removeprefix("validation/")
    kept = [step for step, value in enumerate(values) if best.update({name: value, "other": -step}, step)]
    assert kept[-1] == best_step and best.record == {"metric": name, "value": values[best_step], "step": best_step}


def test_without_a_metric_nothing_is_kept():
    assert not BestModel(None).update({"loss": 1.0}, 1)
    check_keep_best(None, [])


def test_a_record_of_another_metric_is_not_continued():
    best = BestModel("psnr")
    best.load({"metric": "ssim", "value": 0.9, "step": 3})
    assert best.record == {}
    best.load(None)
    assert best.update({"psnr": 1.0}, 4)


def test_an_unknown_metric_is_one_sentence_with_the_known_ones(vae_config, tmp_path):
    with pytest.raises(UserError, match=r"^train\.keep_best=pnsr is not .*: the metrics .* psnr, psnr_frame, ssim\.$"):
        train_vae(vae_config(tmp_path, "train.keep_best=pnsr"))


def test_the_best_model_is_kept_and_a_resumed_run_continues_with_it(vae_config, tmp_path, monkeypatch):
    scripted = {1: 20.0, 2: 23.0, 3: 21.0, 4: 22.0}
    monkeypatch.setattr(VAETrainer, "validate", lambda self, model: {"psnr": scripted[self.state.step]})
    settings = [STEADY, "train.keep_best=psnr", "train.validation_steps=1", "train.checkpointing_steps=1"]
    run, two = tmp_path / "run", tmp_path / "two"
    train_vae(vae_config(two, STEADY, "train.max_train_steps=2"))

    def record(folder) -> dict:
        return json.loads((folder / "best" / "best.json").read_text())

    train_vae(vae_config(run, *settings, "train.max_train_steps=3"))
    assert record(run) == {"metric": "psnr", "value": 23.0, "step": 2}
    (run / "best" / "best.json").rename(tmp_path / "kept.json")
    assert_same_tensors(run / "best", two / "final")
    (tmp_path / "kept.json").rename(run / "best" / "best.json")

    # A run that resumes does not replace it by a worse model.
    train_vae(vae_config(run, *settings, "train.max_train_steps=4", "resume=latest"))
    assert record(run)["step"] == 2
