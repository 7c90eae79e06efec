"""Table 6 at smoke scale, and that the latents have the rates they are for."""

from __future__ import annotations

import json

from autoencoder.presets import preset_config
from benchmarks import rate_curve
from benchmarks.common import paper


def test_smoke_trains_four_rates_and_shows_them_beside_the_papers(work_dir, tmp_path, lpips_weights):
    arguments = ["--scale", "smoke", "--work-dir", str(work_dir), "--results", str(tmp_path)]
    rate_curve.BENCHMARK.main([*arguments, lpips_weights])
    runs = json.loads((tmp_path / "rate_curve.json").read_text())["results"]["data"]["sprites"]
    assert list(runs) == ["rate-1-2", "rate-2-4", "full", "rate-8-16"]
    sizes = [scores[0]["latent_size"] for scores in runs.values()]
    assert sizes == [sizes[0] * factor for factor in (1, 2, 4, 8)]
    page = (tmp_path / "rate_curve.md").read_text()
    assert f"| 0.20 % | 28.14 / 0.24 | 1.43 % | {runs['full'][0]['psnr']:.2f} |" in page
    assert (tmp_path / "rate_curve.png").stat().st_size > 1000


def test_paper_scale_has_the_papers_rates():
    """By hand: (7 * 7 places * 16 queries * d_S + 16 frames * 14 positions * d_D) of 16 x 3 x 224 x 224 values."""
    own = preset_config("base", latent_setting=1)
    assert (own["num_queries"], own["structure_channels"], own["dynamics_channels"]) == (16, 4, 8)
    for channels, (rate, *_) in zip(rate_curve.CHANNELS["paper"], paper.RATE_CURVE, strict=True):
        structure, dynamics = (4, 8) if channels == rate_curve.FULL else channels
        ours = 100 * (7 * 7 * 16 * structure + 16 * 14 * dynamics) / (16 * 3 * 224 * 224)
        assert round(ours, 2) == rate


def test_cpu_scale_halves_and_doubles_the_recipes_own():
    own = preset_config("tiny")
    own = own["structure_channels"], own["dynamics_channels"]
    expected = [(own[0] // 4, own[1] // 4), (own[0] // 2, own[1] // 2), rate_curve.FULL, (2 * own[0], 2 * own[1])]
    assert rate_curve.CHANNELS["cpu"] == expected


def test_orderings_are_computed_from_the_lowest_rate_up():
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
    text = rate_curve.tables({"data": {"clips": runs}})
    assert "| 0.11 % | 24.41 / 0.35 | 0.50 % | 20.10 ± 0.10 | 0.390 ± 0.010 | 19.00 |" in text
    assert (
        "* 1.00 % over 0.50 %: PSNR: the paper +2.62, ours +0.50, +0.50 by seed: holds; "
        "LPIPS: the paper -0.070, ours +0.030, +0.030 by seed: is reversed." in text
    )
    assert "* 4.00 % over 2.00 %: PSNR: the paper +1.90, ours -0.30, -0.30 by seed: is reversed; LPIPS" in text
