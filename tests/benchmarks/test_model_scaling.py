"""Table 4 at smoke scale, and its words and sizes."""

from __future__ import annotations

import json

from benchmarks import model_scaling


def test_smoke_trains_three_sizes_and_shows_them_beside_the_papers(work_dir, tmp_path, lpips_weights):
    arguments = ["--scale", "smoke", "--work-dir", str(work_dir), "--results", str(tmp_path)]
    model_scaling.BENCHMARK.main([*arguments, lpips_weights])
    runs = json.loads((tmp_path / "model_scaling.json").read_text())["results"]["data"]["sprites"]
    assert list(runs) == ["size-small", "full", "size-large"]
    sizes = [scores[0]["parameters"] for scores in runs.values()]
    assert sizes == sorted(sizes) and sizes[0] < 0.5 * sizes[1] < 0.25 * sizes[2]
    assert len({scores[0]["latent_size"] for scores in runs.values()}) == 1
    page = (tmp_path / "model_scaling.md").read_text()
    assert f"| small | 24.83 / 0.683 | {sizes[0]:,} | {runs['size-small'][0]['psnr']:.2f} |" in page
    assert (tmp_path / "model_scaling.png").stat().st_size > 1000


def test_orderings_are_computed():
    def seeds(*values):
        return [{"psnr": value, "ssim": value / 30, "parameters": 1000} for value in values]

    runs = {"size-small": seeds(20, 20.2), "full": seeds(21, 21.4), "size-large": seeds(20.9, 21.5)}
    text = model_scaling.tables({"data": {"clips": runs}})
    assert "| base | 26.13 / 0.732 | 1,000 | 21.20 ± 0.20 | 0.707 ± 0.007 |" in text
    assert (
        "base over small: PSNR: the paper +1.30, ours +1.00, +1.20 by seed: holds; SSIM: the paper +0.049, ours"
        in text
    )
    assert (
        "large over base: PSNR: the paper +1.03, ours -0.10, +0.10 by seed: lies within the seeds' spread; SSIM"
        in text
    )
    assert "26.13" in model_scaling.tables(None)
