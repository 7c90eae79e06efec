"""Fréchet distances while training: of samples of the DiT, of reconstructions of the VAE, without changing the run."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from forked import run_forked

from pipelines import VidTwinPipeline
from runs import assert_same_tensors, logged
from vidgen.common.errors import UserError
from vidgen.data.listing import list_videos
from vidgen.metrics.detectors import get_detector
from vidgen.metrics.frechet import FeatureStatistics, frechet_distance
from vidgen.metrics.fvd import Sampling, generate_clips
from vidgen.metrics.real_clips import RealClips
from vidgen.metrics.validation_fvd import ValidationFVD
from vidgen.training.dit_trainer import train_dit
from vidgen.training.vae_trainer import train_vae

pytestmark = pytest.mark.filterwarnings("ignore:.*biased upwards")


def make_fvd(root, folder, **settings) -> ValidationFVD:
    options = dict(num_samples=6, clip_shape=(3, 4, 32, 32), fps=4, batch_size=4) | settings
    return ValidationFVD(["pooled_pixels"], Accelerator(cpu=True), folder, root, *list_videos(root), **options)


class Dimmer(torch.nn.Module):
    """An autoencoder that multiplies its input by a factor."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, clips):
        return SimpleNamespace(sample=self.factor * clips)


def expected_distance(pipeline, fvd: ValidationFVD, sampling: Sampling, count: int) -> float:
    """The distance computed clip by clip, without the files of features."""
    detector = get_detector("pooled_pixels")

    def statistics(clips) -> FeatureStatistics:
        collected = FeatureStatistics(detector.dim, 1)
        collected.update(detector(clips), range(len(clips)))
        return collected

    real = RealClips(fvd.files, fvd.windows, fvd.protocol)
    real = torch.stack([real[i][2] for i in range(len(fvd.windows))])
    [batch] = generate_clips(pipeline, sampling, fvd.protocol)([range(count)])
    return frechet_distance(statistics(batch.clips), statistics(real))


def test_the_fvd_of_a_dit_run_is_that_of_its_pipeline_and_changes_nothing(dit_config, sprites, tmp_path):
    settings = ["train.max_train_steps=2", "train.validation_steps=1", "train.checkpointing_steps=9"]
    train_dit(dit_config(tmp_path / "plain", *settings))
    settings += [
        "validation.detectors=[pooled_pixels]",
        "validation.num_samples=6",
        "train.keep_best=fvd_pooled_pixels",
    ]
    final = train_dit(dit_config(tmp_path / "run", *settings))
    assert_same_tensors(tmp_path / "plain" / "final", final)
    entries = [entry for entry in logged(tmp_path / "run") if "validation/fvd_pooled_pixels" in entry]
    assert [entry["step"] for entry in entries] == [1, 2]
    values = [entry["validation/fvd_pooled_pixels"] for entry in entries]
    assert json.loads((tmp_path / "run" / "best" / "best.json").read_text())["value"] == min(values)
    fvd = make_fvd(sprites, tmp_path / "features")
    expected = expected_distance(VidTwinPipeline.from_pretrained(final), fvd, Sampling(0, 5.0, 3), 6)
    assert values[1] == pytest.approx(expected, rel=1e-3)
    assert not list((tmp_path / "run" / "features").glob("step-*"))


def test_the_rfvd_of_a_vae_run_is_logged(vae_config, sprites, tmp_path):
    settings = ["train.max_train_steps=1", "validation.detectors=[pooled_pixels]", f"data.validation_root={sprites}"]
    train_vae(vae_config(tmp_path, *settings, "train.keep_best=rfvd_pooled_pixels"))
    assert logged(tmp_path)[-1]["validation/rfvd_pooled_pixels"] > 0
    assert (tmp_path / "best" / "best.json").exists()


def test_a_perfect_reconstruction_has_distance_zero_and_a_darker_one_more(sprites, tmp_path):
    fvd = make_fvd(sprites, tmp_path)
    perfect, dim, dimmer = (fvd.measure_reconstruction(Dimmer(x), step=1) for x in (1.0, 0.9, 0.8))
    assert perfect["rfvd_pooled_pixels"] < 1e-6 < 10 * dim["rfvd_pooled_pixels"] < 100 * dimmer["rfvd_pooled_pixels"]
    assert dim["rfvd_pooled_pixels"] < dimmer["rfvd_pooled_pixels"], "the features of step 1 were used again"


def _write(root, folder) -> None:
    values = make_fvd(root, folder / "features").measure_reconstruction(Dimmer(0.9), step=1)
    (folder / f"{Accelerator(cpu=True).process_index}.json").write_text(json.dumps(values))


def test_two_processes_measure_the_same_as_one(sprites, tmp_path):
    for processes in (1, 2):
        (tmp_path / f"{processes}").mkdir()
        run_forked(_write, sprites, tmp_path / f"{processes}", processes=processes)
    one, *two = (json.loads((tmp_path / name).read_text()) for name in ("1/0.json", "2/0.json", "2/1.json"))
    assert two[0] == two[1] and two[0] == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("broken", [{3}, set(range(6))])
def test_clips_that_are_not_finite_give_nan_and_a_warning(sprites, tmp_path, monkeypatch, capsys, broken):
    def pipeline(generator, **_):
        frames = torch.rand(len(generator), 4, 3, 32, 32)
        numbers = [index for index in range(len(generator)) if (index in broken)]
        frames[numbers] = torch.nan
        return SimpleNamespace(frames=frames)

    pipeline.class_ids = []
    values = make_fvd(sprites, tmp_path, batch_size=6).measure_generation(pipeline, Sampling(), step=1)
    assert math.isnan(values["fvd_pooled_pixels"])
    assert "warning: no FVD, because only" in capsys.readouterr().out


def test_mistakes_are_found_before_the_training(vae_config, dit_config, sprites, tmp_path):
    with pytest.raises(UserError, match=r"^unknown detector 'pooled_pixel': did you mean 'pooled_pixels'\?"):
        train_dit(dit_config(tmp_path, "validation.detectors=[pooled_pixel]"))
    with pytest.raises(UserError, match=r"i3d needs its weights.*validation\.detectors=NAME=FILE"):
        train_dit(dit_config(tmp_path, f"validation.detectors=['i3d={tmp_path}/none.pt']"))
    with pytest.raises(UserError, match=r"^validation\.detectors needs validation videos: set"):
        train_vae(vae_config(tmp_path, "validation.detectors=[pooled_pixels]", "data.num_validation_videos=0"))
    with pytest.raises(UserError, match=r"distance needs 4 real clips or more, but there are 2 usable"):
        train_vae(vae_config(tmp_path, "validation.detectors=[pooled_pixels]"))
    assert not (tmp_path / "latents").exists()
