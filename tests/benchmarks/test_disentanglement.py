"""The disentanglement benchmark at smoke scale, with a VAE of random weights: figures, tables and pictures."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from PIL import Image

from autoencoder import AutoencoderKLVidTwin
from benchmarks import ablations, disentanglement
from benchmarks.common import vae_runs
from vidgen.data.sprites import write_sprites

PICTURES = ("disentanglement", "disentanglement-components", "disentanglement-latent_swap")


def save_vae(folder: Path, **overrides) -> Path:
    torch.manual_seed(0)
    AutoencoderKLVidTwin.from_preset("tiny-test", **overrides).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Path]:
    """The results of two VAEs and real clips, and where they lie."""
    root = tmp_path_factory.mktemp("roles")
    vaes = [str(save_vae(root / name / "final")) for name in ("one", "two")]
    write_sprites(root / "clips", 1, seed=0, resolution=32, num_frames=4)
    vae_runs.held_out_videos(root / "clips")[1].write_text("not a video")
    arguments = ["--work-dir", str(root / "work"), "--results", str(root / "results"), "--vae", *vaes]
    disentanglement.BENCHMARK.main([*arguments, "--clips", str(root / "clips"), "--clips-vae", vaes[0]])
    return root / "results" / "smoke", root


def results_of(folder: Path) -> dict:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads((folder / "disentanglement.json").read_text(), parse_constant=refuse)["results"]


def test_every_score_has_an_interval(finished):
    results = results_of(finished[0])
    assert list(results["vaes"]) == ["one", "two"]
    assert results["vaes"]["one"] == results["vaes"]["two"]  # the same weights
    roles = results["vaes"]["one"]
    assert set(roles["probes"]) == set(disentanglement.TARGETS)
    scores = [s for target in roles["probes"].values() for found in target.values() for s in found.values()]
    scores += [s for component in roles["components"].values() for s in component.values()]
    scores += [s for end in roles["latent_swap"]["likeness"].values() for s in end.values()]
    assert all(score["low"] <= score["value"] <= score["high"] for score in scores)
    assert roles["values"] == {"structure": 48, "dynamics": 128, "both": 176, "pixels": 180}
    assert results["clips"]["num_clips"] == 2 * vae_runs.CLIPS_PER_VIDEO  # every third of eight, but one


def test_tables_and_pictures(finished):
    folder, _ = finished
    text = (folder.parent / "disentanglement.md").read_text()
    assert "### one" in text and "### two" in text and "held-out real clips" in text
    assert all(label in text for label in (*disentanglement.TARGETS.values(), *disentanglement.SOURCES.values()))
    assert "nan" not in text and "None" not in text
    for name in (*PICTURES, "disentanglement-clips-components", "disentanglement-clips-latent_swap"):
        with Image.open(folder / f"{name}.png") as picture:
            assert min(picture.size) > 300
    columns = {line.count("|") - line.count("\\|") for line in text.splitlines() if line.startswith("| latent swap, ")}
    assert columns == {4}  # the claim and the verdict of each VAE


@pytest.mark.parametrize(
    "wanted, other, expected",
    [
        ((0.6, 0.8), (0.2, 0.5), "reproduced"),
        ((0.2, 0.5), (0.6, 0.8), "reversed"),
        ((0.2, 0.6), (0.5, 0.9), "inconclusive"),
    ],
)
def test_verdicts_need_disjoint_intervals(wanted, other, expected):
    scores = [dict(low=low, high=high) for low, high in (wanted, other)]
    assert disentanglement.verdict(*scores) == expected


def test_claims_compare_the_named_scores(finished):
    roles = json.loads(json.dumps(results_of(finished[0])["vaes"]["one"]))
    for features, value in (("structure", 0.9), ("dynamics", 0.1)):
        for target in roles["probes"].values():
            for score in target[features].values():
                score["value"] = value
    for target in roles["latent_swap"]["factor_attribution"].values():
        target["a"]["value"], target["b"]["value"] = 0.7, 0.3
    roles["latent_swap"]["likeness"]["a_as_b"]["nearest"]["value"] = 0.6
    found = {words: tuple(score["value"] for score in pair) for words, pair in disentanglement.claims(roles).items()}
    assert found["shape: probe of structure over dynamics"] == (0.9, 0.1)
    assert found["motion class: probe of dynamics over structure"] == (0.1, 0.9)
    assert found["fast motion: probe of dynamics over structure"] == (0.1, 0.9)
    assert found["latent swap, texture: structure source over dynamics source"] == (0.7, 0.3)
    assert found["latent swap, motion class: dynamics source over structure source"] == (0.3, 0.7)
    assert found["latent swap: closer in pixels to A moving as B than to A"][0] == 0.6


def test_default_vaes_are_those_of_the_ablations(tmp_path, monkeypatch):
    asked = []

    def train(name, settings, options):
        asked.append((name, [s for s in settings if not s.startswith("data.")]))
        save_vae(options.work_dir / "vae_runs" / name / "final")
        return {"psnr": 1.0, "ssim": 0.5, "parameters": 1, "seconds": 1.0}

    monkeypatch.setattr(vae_runs, "train_and_score", train)
    monkeypatch.setattr(vae_runs, "SPRITES_PER_CLASS", {"smoke": (1, 1)})
    monkeypatch.setattr(disentanglement, "measure_disentanglement", lambda vae, counts, seeds: {})
    options = Namespace(
        scale="smoke", work_dir=tmp_path, results=tmp_path, vae=None, clips=None, clips_vae=None, only=None
    )
    assert list(disentanglement.run(options)["vaes"]) == ["sprites-full-seed0"]
    ours, asked[:] = list(asked), []
    ablations.run_ablations(options)
    assert ours[0] in asked  # the very same run: it is trained once


def test_single_latent_is_refused(tmp_path, capsys):
    vae = save_vae(tmp_path / "alone" / "final", single_latent=True)
    with pytest.raises(SystemExit) as stopped:
        disentanglement.BENCHMARK.main(["--work-dir", str(tmp_path), "--vae", str(vae)])
    assert stopped.value.code == 2
    assert "single latent" in capsys.readouterr().err
