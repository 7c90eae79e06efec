"""Tables 3, 4 and 6 at smoke scale, their verdicts, and the sizes and rates of the variants."""

from __future__ import annotations

import json

import pytest

from autoencoder.presets import ABLATIONS, preset_config
from benchmarks import ablations
from benchmarks.common import paper, vae_runs
from benchmarks.common.harness import run_benchmark
from vidgen.common.errors import UserError

SAME = {"lpips_squeeze": 0.2, "parameters": 1000, "latent_size": 100, "compression_rate": 0.01}


@pytest.fixture
def arguments(work_dir, tmp_path, lpips_weights):
    return ["--scale", "smoke", "--work-dir", str(work_dir), "--results", str(tmp_path), lpips_weights]


def test_smoke_trains_every_ablation_once(arguments, tmp_path, monkeypatch):
    ablations.ABLATION.main(arguments)
    results = json.loads((tmp_path / "smoke" / "ablations.json").read_text())["results"]
    runs = results["data"]["sprites"]
    assert list(runs) == ["full", *ABLATIONS, "few-full", "few-single", "few-single_half_grid"]
    sizes = [scores[0]["parameters"] for scores in list(runs.values())[:5]]
    assert runs["few-full"][0]["latent_size"] < 0.4 * runs["full"][0]["latent_size"]
    assert len(set(sizes)) == 5 and max(sizes) < 1.1 * sizes[0]
    page = (tmp_path / "ablations.md").read_text()
    assert f"| full | 26.116 / 0.731 | {runs['full'][0]['psnr']:.2f} |" in page
    assert "one seed, variance unknown" in page
    assert page.count("With latents of ") == 2 and "With latents of 0.46 % of a clip:" in page
    assert page.count("(a) single latent, half the grid | 23.512 / 0.654 |") == 1
    assert f"| full | 26.116 / 0.731 | {runs['few-full'][0]['psnr']:.2f} |" in page
    assert (tmp_path / "smoke" / "ablations.png").stat().st_size > 1000

    def train_vae(config):
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(vae_runs, "train_vae", train_vae)
    ablations.ABLATION.main(arguments)
    assert json.loads((tmp_path / "smoke" / "ablations.json").read_text())["results"] == results
    monkeypatch.setitem(vae_runs.STEPS, "smoke", 5)
    with pytest.raises(SystemExit):
        ablations.ABLATION.main(arguments)


def test_only_trains_matching_runs_and_writes_no_results(arguments, tmp_path):
    ablations.ABLATION.main([*arguments, "--only", "sprites-full-*"])
    assert not list(tmp_path.iterdir())


def test_verdicts_of_ablations():
    def seeds(*values):
        return [{"psnr": value, "ssim": value / 30} | SAME for value in values]

    runs = {
        "full": seeds(21, 21.4),
        "single": seeds(20, 21.5),
        "dynamics_qformer": seeds(20.5, 20.5),
        "structure_conv": seeds(22, 22),
        "structure_hidden": seeds(20, 20),
    }
    text = ablations.ablation_tables({"data": {"clips": runs}})
    assert "latent, no decoupling: PSNR: paper +2.60, ours +1.00, -0.10 by seed: within seed variance" in text
    assert "Q-Former: PSNR: paper +1.28, ours +0.50, +0.90 by seed: reproduced; SSIM: paper +0.038, ours" in text
    assert "convolutions: PSNR: paper +0.73, ours -1.00, -0.60 by seed: reversed; SSIM" in text


def test_paper_scale_requires_data(tmp_path):
    with pytest.raises(UserError, match="--data FOLDER"):
        run_benchmark(ablations.ABLATION, arguments=["--scale", "paper", "--work-dir", str(tmp_path)])


def test_smoke_trains_three_sizes(work_dir, tmp_path, lpips_weights):
    arguments = ["--scale", "smoke", "--work-dir", str(work_dir), "--results", str(tmp_path)]
    ablations.SCALING.main([*arguments, lpips_weights])
    runs = json.loads((tmp_path / "smoke" / "model_scaling.json").read_text())["results"]["data"]["sprites"]
    assert list(runs) == ["size-small", "full", "size-large"]
    sizes = [scores[0]["parameters"] for scores in runs.values()]
    assert sizes == sorted(sizes) and sizes[0] < 0.5 * sizes[1] < 0.25 * sizes[2]
    assert len({scores[0]["latent_size"] for scores in runs.values()}) == 1
    page = (tmp_path / "model_scaling.md").read_text()
    assert f"| small | 24.83 / 0.683 | {sizes[0]:,} | {runs['size-small'][0]['psnr']:.2f} |" in page
    assert (tmp_path / "smoke" / "model_scaling.png").stat().st_size > 1000


def test_verdicts_of_sizes():
    def seeds(*values):
        return [{"psnr": value, "ssim": value / 30, "parameters": 1000} for value in values]

    runs = {"size-small": seeds(20, 20.2), "full": seeds(21, 21.4), "size-large": seeds(20.9, 21.5)}
    text = ablations.scaling_tables({"data": {"clips": runs}})
    assert "| base | 26.13 / 0.732 | 1,000 | 21.20 ± 0.20 | 0.707 ± 0.007 |" in text
    assert (
        "base over small: PSNR: paper +1.30, ours +1.00, +1.20 by seed: reproduced; SSIM: paper +0.049, ours" in text
    )
    assert "large over base: PSNR: paper +1.03, ours -0.10, +0.10 by seed: within seed variance; SSIM" in text


def test_smoke_trains_four_rates(work_dir, tmp_path, lpips_weights):
    arguments = ["--scale", "smoke", "--work-dir", str(work_dir), "--results", str(tmp_path)]
    ablations.RATES.main([*arguments, lpips_weights])
    runs = json.loads((tmp_path / "smoke" / "rate_curve.json").read_text())["results"]["data"]["sprites"]
    assert list(runs) == ["rate-1-2", "rate-2-4", "full", "rate-8-16"]
    sizes = [scores[0]["latent_size"] for scores in runs.values()]
    assert sizes == [sizes[0] * factor for factor in (1, 2, 4, 8)]
    page = (tmp_path / "rate_curve.md").read_text()
    assert f"| 0.20 % | 28.14 / 0.24 | 1.43 % | {runs['full'][0]['psnr']:.2f} |" in page
    assert (tmp_path / "smoke" / "rate_curve.png").stat().st_size > 1000


def test_paper_scale_has_the_rates_of_the_paper():
    """By hand: (7 * 7 places * 16 queries * d_S + 16 frames * 14 positions * d_D) of 16 x 3 x 224 x 224 values."""
    own = preset_config("base", latent_setting=1)
    assert (own["num_queries"], own["structure_channels"], own["dynamics_channels"]) == (16, 4, 8)
    for channels, (rate, *_) in zip(ablations.CHANNELS["paper"], paper.RATE_CURVE, strict=True):
        structure, dynamics = (4, 8) if channels == ablations.FULL else channels
        ours = 100 * (7 * 7 * 16 * structure + 16 * 14 * dynamics) / (16 * 3 * 224 * 224)
        assert round(ours, 2) == rate


def test_cpu_scale_halves_and_doubles_the_rate_of_the_config():
    own = preset_config("tiny")
    own = own["structure_channels"], own["dynamics_channels"]
    expected = [(own[0] // 4, own[1] // 4), (own[0] // 2, own[1] // 2), ablations.FULL, (2 * own[0], 2 * own[1])]
    assert ablations.CHANNELS["cpu"] == expected


def test_verdicts_of_rates_from_the_lowest_up():
    def seeds(rate, psnr, lpips):
        return [
            {"psnr": psnr + s, "lpips_squeeze": lpips - s / 10, "compression_rate": rate, "psnr_downsample": 19.0}
            for s in (0, 0.2)
        ]

    runs = {
        "full": seeds(0.02, 21.0, 0.3),
        "rate-1": seeds(0.005, 20.0, 0.4),
        "rate-2": seeds(0.01, 20.5, 0.43),
        "rate-3": seeds(0.04, 20.7, 0.2),
    }
    text = ablations.rate_tables({"data": {"clips": runs}})
    assert "| 0.11 % | 24.41 / 0.35 | 0.50 % | 20.10 ± 0.10 | 0.390 ± 0.010 | 19.00 |" in text
    assert (
        "* 1.00 % over 0.50 %: PSNR: paper +2.62, ours +0.50, +0.50 by seed: reproduced; "
        "LPIPS: paper -0.070, ours +0.030, +0.030 by seed: reversed." in text
    )
    assert "* 4.00 % over 2.00 %: PSNR: paper +1.90, ours -0.30, -0.30 by seed: reversed; LPIPS" in text
