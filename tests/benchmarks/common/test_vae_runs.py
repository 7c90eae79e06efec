"""Comparisons of variants, and runs that programs share."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from benchmarks.common import vae_runs


def scores(*values: float) -> list[dict]:
    return [{"psnr": value, "lpips": -value} for value in values]


@pytest.mark.parametrize(
    ("better", "worse", "verdict"),
    [
        ((21.0, 22.0), (20.0, 20.5), "ours +1.00, +1.50 by seed: reproduced"),
        ((20.0, 20.5), (21.0, 22.0), "ours -1.00, -1.50 by seed: reversed"),
        ((21.0, 22.0), (20.0, 21.5), "ours +1.00, +0.50 by seed: within seed variance"),
        ((21.0, 20.0), (20.0, 20.5), "ours +1.00, -0.50 by seed: within seed variance"),
        ((21.0, 20.0), (20.0, 20.0), "ours +1.00, +0.00 by seed: within seed variance"),
        ((21.0,), (20.0,), "ours +1.00 by seed: one seed, variance unknown"),
    ],
)
def test_a_difference_counts_if_it_exceeds_the_seed_variance(better, worse, verdict):
    better, worse = scores(*better), scores(*worse)
    assert vae_runs.compare(better, worse, 1.3) == f"paper +1.30, {verdict}"
    lower_is_better = vae_runs.compare(better, worse, -0.07, "lpips", digits=2).split("ours")[1]
    assert lower_is_better.split(": ")[1] == verdict.split(": ")[1]


def test_variants_train_on_every_data_set_with_every_seed_and_share_runs_by_name(monkeypatch):
    requested = {}

    def trained(name, settings, options):
        requested[name] = settings
        return {"psnr": len(requested), "seconds": 2.0}

    sets = {"sprites": ["data.root=a"], "clips": ["data.root=b", "data.flip=true"]}
    monkeypatch.setattr(vae_runs, "data_sets", lambda options: sets)
    monkeypatch.setattr(vae_runs, "train_and_score", trained)
    options = argparse.Namespace(scale="cpu", only=None)
    variants = {"full": vae_runs.overrides(), "wide": vae_runs.overrides(hidden_size=64)}
    results = vae_runs.train_variants(variants, options)
    assert list(requested) == [f"{d}-{v}-seed{s}" for s in (0, 1) for d in sets for v in variants]
    # A finished run is found by these settings.
    assert requested["sprites-full-seed1"] == ["data.root=a", "seed=1", "model.overrides={}"]
    assert requested["clips-wide-seed0"] == [*sets["clips"], "seed=0", 'model.overrides={"hidden_size": 64}']
    assert results == {
        "data": {
            "sprites": {
                "full": [{"psnr": 1, "seconds": 2.0}, {"psnr": 5, "seconds": 2.0}],
                "wide": [{"psnr": 2, "seconds": 2.0}, {"psnr": 6, "seconds": 2.0}],
            },
            "clips": {
                "full": [{"psnr": 3, "seconds": 2.0}, {"psnr": 7, "seconds": 2.0}],
                "wide": [{"psnr": 4, "seconds": 2.0}, {"psnr": 8, "seconds": 2.0}],
            },
        },
        "seconds": 16.0,
    }
    options.only = "sprites-*"
    assert vae_runs.train_variants(variants, options) is None


def test_paper_scale_is_scored_on_the_official_test_list(tmp_path, monkeypatch):
    """UCF-101 has no validation folder; its split files list the held-out videos."""
    from vidgen.common.config import load_config
    from vidgen.data.sprites import write_sprites
    from vidgen.training.config import VAETrainingConfig

    root = tmp_path / "UCF-101"
    write_sprites(root, 2, seed=0, resolution=32)
    names = [f"{path.parent.name}/{path.name}" for path in sorted(root.rglob("*.mp4"))]
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    classes = sorted({name.split("/")[0] for name in names})
    (lists / "classInd.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(classes, start=1)))
    (lists / "trainlist01.txt").write_text("".join(f"{name} 1\n" for name in names[::2]))
    (lists / "testlist01.txt").write_text("".join(f"{name}\n" for name in names[1::2]))
    settings = vae_runs.data_sets(argparse.Namespace(scale="paper", data=root))["ucf101"]
    config = load_config(VAETrainingConfig, ["model.preset=tiny-test", "output_dir=x", *settings])
    model = argparse.Namespace(clip_shape=(3, 4, 32, 32))
    clips = vae_runs.held_out_clips(model, config)
    assert sorted(f"{Path(f.path).parent.name}/{Path(f.path).name}" for f in clips.files) == names[1::2]
