"""The ablation at equal compute: smoke scale, equal FLOPs of all variants, verdicts."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

from benchmarks.equal_compute import page, runs
from benchmarks.equal_compute.__main__ import BENCHMARK
from benchmarks.equal_compute.variants import BASELINE, MUON, VAE_LABELS, VAES, VARIANTS
from vidgen.common.config import load_config
from vidgen.losses.diffusion import check_diffusion
from vidgen.losses.latent_regularization import LatentRegularization
from vidgen.losses.self_alignment import choose_layers
from vidgen.metrics import fvd
from vidgen.metrics.detectors import DETECTORS, Detector
from vidgen.metrics.frechet import bootstrap_interval
from vidgen.training.config import DiTTrainingConfig, VAETrainingConfig
from vidgen.training.vae_trainer import build_vae


class FewNumbers(Detector):
    """A second detector without weights."""

    name, dim, per_frame, sha256 = "few_numbers", 3, False, "0" * 64

    def features(self, clips):
        return clips.mean(dim=(2, 3, 4))


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(fvd, "bootstrap_interval", partial(bootstrap_interval, resamples=4))


def test_smoke_and_a_second_run_trains_nothing(work_dir, monkeypatch, capsys):
    common = ["--work-dir", str(work_dir)]
    with pytest.raises(SystemExit):
        BENCHMARK.main([*common, "--finished"])
    assert "no run is finished yet" in capsys.readouterr().err
    BENCHMARK.main([*common, "--only", "*-baseline-*"])
    record = work_dir / "smoke" / "equal_compute.json"
    assert not record.exists()  # only a part
    BENCHMARK.main(common)
    results = json.loads(record.read_text())["results"]
    sprites, vaes = results["data"]["sprites"], results["vaes"]["sprites"]
    assert list(sprites) == ["baseline", "combined"] and list(vaes) == ["plain", "equivariance_nested_dropout"]
    for kind in (sprites, vaes):
        flops = [run["flops"] for by_seed in kind.values() for run in by_seed.values()]
        assert flops[0] == flops[1] > 0
    assert vaes["plain"]["0"]["psnr"] != vaes["equivariance_nested_dropout"]["0"]["psnr"]
    for by_seed in sprites.values():
        assert by_seed["0"]["distances"]["pooled_pixels"]["generated"]["value"] > 0
        assert set(by_seed["0"]["accuracy"]) == {"generated", "real", "reconstructed"}
    log = (work_dir / "equal_compute" / "dits" / "sprites-combined-seed0" / "metrics.jsonl").read_text()
    assert '"self_alignment"' in log
    text = (work_dir / "equal_compute.md").read_text()
    for words in ("| first three, logit_mean 0.5 |", "one seed", "structure: distance under scaling"):
        assert words in text
    assert (work_dir / "smoke" / "equal_compute.png").stat().st_size > 1000

    for name in ("train_vae", "train_dit"):
        monkeypatch.setattr(runs, name, lambda config: pytest.fail("trained again"))
    BENCHMARK.main([*common, "--finished"])
    assert json.loads(record.read_text())["results"] == results
    monkeypatch.setitem(DETECTORS, "few_numbers", FewNumbers)
    BENCHMARK.main([*common, "--finished", "--detector", "pooled_pixels", "--detector", "few_numbers"])
    distances = json.loads(record.read_text())["results"]["data"]["sprites"]["combined"]["0"]["distances"]
    assert list(distances) == ["pooled_pixels", "few_numbers"]


def test_every_variant_trains_at_scale_cpu():
    """Its settings are known keys that fit the models of the configs, and its VAE is shared where the settings are."""
    folder = runs.REPOSITORY / "configs"
    assert {variant.vae for variant in VARIANTS.values()} == set(VAES) == set(VAE_LABELS)
    for settings in VAES.values():
        arguments = ["--config", str(folder / "vae" / "sprites.yaml"), "data.root=x", *runs.VAE_SETTINGS["cpu"]]
        config = load_config(VAETrainingConfig, [*arguments, *runs.SHARED, *settings])
        with torch.device("meta"):
            LatentRegularization(build_vae(config.model, 16, 64, 64), config.loss)
    for variant in VARIANTS.values():
        arguments = ["--config", str(folder / "dit" / "sprites.yaml"), "data.root=x", "vae=x", *runs.SHARED]
        config = load_config(DiTTrainingConfig, [*arguments, *runs.DIT_SETTINGS["cpu"], *variant.dit])
        check_diffusion(config.diffusion)
        choose_layers(config.diffusion.self_alignment_layers, config.model.overrides["num_layers"])
    assert not VARIANTS[BASELINE].dit and not VAES[VARIANTS[BASELINE].vae]


def test_muon_makes_as_many_fewer_steps_as_its_updates_cost(work_dir):
    folder = runs.REPOSITORY / "configs"
    settings = ["--config", str(folder / "vae" / "sprites.yaml"), "data.root=x"]
    vae = build_vae(load_config(VAETrainingConfig, settings).model, 16, 64, 64)
    vae.save_pretrained(work_dir / "vae")
    settings = ["--config", str(folder / "dit" / "sprites.yaml"), "data.root=x", f"vae={work_dir / 'vae'}"]
    plain, muon = (load_config(DiTTrainingConfig, [*settings, *dit]) for dit in ((), MUON))
    transformer = runs.build_transformer(plain, vae, num_classes=1)
    (model, none), (same, update) = (runs.step_flops(transformer, config) for config in (plain, muon))
    assert same == model and none == 0 < update
    assert runs.plan_steps(plain, 3000) == 3000
    steps = runs.plan_steps(muon, 3000)
    assert steps < 2500 and steps * (model + update) == pytest.approx(3000 * model, rel=1e-3)


@pytest.mark.parametrize(
    ("ours", "verdict", "change"),
    [((0.7, 0.8), "better", "-27 %"), ((1.3, 1.2), "worse", "+22 %"), ((0.9, 1.06), "inconclusive", "-5 %")],
)
def test_verdict_needs_every_seed(ours, verdict, change):
    baseline = {"0": 1.0, "1": 1.05}
    ours = dict(zip(baseline, ours, strict=True))
    assert page.judge(ours, baseline) == verdict and page.change(ours, baseline) == change
    assert page.judge({"0": 0.1}, baseline) == "one seed"
    assert page.change({"2": 0.1}, baseline) is None


def test_diagnostics_are_summarized():
    channels = [
        {"dead": False, "kurtosis": 1.0, "nats": 3.0, "std": 1.0},
        {"dead": True, "kurtosis": 9.0, "nats": 1.0, "std": 0.0},
    ]
    shift = {"height": {"moved": 0.5, "unmoved": 1.0}, "width": {"moved": None, "unmoved": None}}
    grid = {"scale": 0.3, "shift": shift, "spectrum": {"height": {"high": 0.1}, "width": {"high": 0.3}}}
    record = {
        "streams": {"structure": {"nats_per_clip": 8.0, "channels": channels}},
        "grids": {"structure": grid, "dynamics": {"scale": None, "shift": {}, "spectrum": {}}},
    }
    summary = runs.summarize_diagnostics(record)
    assert summary["streams"]["structure"]["kurtosis"] == 1.0  # of the live channels
    assert summary["grids"]["structure"] == {"scale": 0.3, "moved": 0.5, "high": pytest.approx(0.2)}
    assert summary["grids"]["dynamics"] == {"scale": None, "moved": None, "high": None}
    assert page.first_half(summary["streams"]["structure"]["channel_nats"]) == 75
    assert page.first_half([None, 1.0]) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scale", "paper"], "take --scale cpu"),
        (["--train", "x"], "--train and --test, or neither"),
        (["--seeds", "0"], "--seeds must be 1 or more"),
    ],
)
def test_wrong_options_are_one_sentence(arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        BENCHMARK.main([*arguments, "--work-dir", str(tmp_path)])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
