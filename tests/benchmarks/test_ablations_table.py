"""Table 3 at smoke scale, and its words."""

from __future__ import annotations

import json

import pytest

from autoencoder.presets import ABLATIONS
from benchmarks import ablations
from benchmarks.common import vae_runs
from vidgen.common.errors import UserError

SAME = {"lpips_squeeze": 0.2, "parameters": 1000, "latent_size": 100, "compression_rate": 0.01}


@pytest.fixture
def arguments(work_dir, tmp_path, lpips_weights):
    return ["--scale", "smoke", "--work-dir", str(work_dir), "--results", str(tmp_path), lpips_weights]


def test_smoke_trains_every_variant_once(arguments, tmp_path, monkeypatch):
    ablations.BENCHMARK.main(arguments)
    results = json.loads((tmp_path / "ablations.json").read_text())["results"]
    runs = results["data"]["sprites"]
    assert list(runs) == ["full", *ABLATIONS, "few-full", "few-single", "few-single_half_grid"]
    sizes = [scores[0]["parameters"] for scores in list(runs.values())[:5]]
    assert runs["few-full"][0]["latent_size"] < 0.4 * runs["full"][0]["latent_size"]
    assert len(set(sizes)) == 5 and max(sizes) < 1.1 * sizes[0]
    page = (tmp_path / "ablations.md").read_text()
    assert f"| full | 26.116 / 0.731 | {runs['full'][0]['psnr']:.2f} |" in page
    assert "one seed says nothing of its spread" in page
    assert page.count("With latents of ") == 2 and "With latents of 0.46 % of a clip:" in page
    assert page.count("(a) one latent, half the grid | 23.512 / 0.654 |") == 1
    assert f"| full | 26.116 / 0.731 | {runs['few-full'][0]['psnr']:.2f} |" in page
    assert (tmp_path / "ablations.png").stat().st_size > 1000

    def train_vae(config):
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(vae_runs, "train_vae", train_vae)
    ablations.BENCHMARK.main(arguments)
    assert json.loads((tmp_path / "ablations.json").read_text())["results"] == results
    monkeypatch.setitem(vae_runs.STEPS, "smoke", 5)
    with pytest.raises(SystemExit):
        ablations.BENCHMARK.main(arguments)


def test_some_runs_alone_make_no_table(arguments, tmp_path):
    ablations.BENCHMARK.main([*arguments, "--only", "sprites-full-*"])
    assert not list(tmp_path.iterdir())


def test_orderings_are_computed():
    def seeds(*values):
        return [{"psnr": value, "ssim": value / 30} | SAME for value in values]

    runs = {
        "full": seeds(21, 21.4),
        "single": seeds(20, 21.5),
        "dynamics_qformer": seeds(20.5, 20.5),
        "structure_conv": seeds(22, 22),
        "structure_hidden": seeds(20, 20),
    }
    text = ablations.tables({"data": {"clips": runs}})
    assert (
        "full over (a) one latent, no decoupling: PSNR: the paper +2.60, ours +1.00, -0.10 by seed: lies within"
        in text
    )
    assert "Q-Former: PSNR: the paper +1.28, ours +0.50, +0.90 by seed: holds; SSIM: the paper +0.038, ours" in text
    assert "convolutions: PSNR: the paper +0.73, ours -1.00, -0.60 by seed: is reversed; SSIM" in text
    assert "26.116" in ablations.tables(None)


def test_paper_scale_says_what_it_needs(tmp_path):
    with pytest.raises(UserError, match="--data FOLDER"):
        ablations.BENCHMARK._main(["--scale", "paper", "--work-dir", str(tmp_path)])
