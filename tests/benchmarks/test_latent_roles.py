"""latent_roles.py at its smoke scale: figures, tables and pictures, from a VAE of random weights."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from PIL import Image

from autoencoder import AutoencoderKLVidTwin
from benchmarks import ablations, latent_roles
from benchmarks.common import vae_runs
from vidgen.data.sprites import write_sprites

PICTURES = ("latent_roles", "latent_roles-components", "latent_roles-reenactment")


def save_vae(folder: Path, **overrides) -> Path:
    torch.manual_seed(0)
    AutoencoderKLVidTwin.from_preset("tiny-test", **overrides).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> tuple[Path, Path]:
    """The results of two VAEs and real clips, and where they lie."""
    root = tmp_path_factory.mktemp("roles")
    vaes = [str(save_vae(root / name / "final")) for name in ("one", "two")]
    write_sprites(root / "clips", 1, seed=0, resolution=32, num_frames=4)
    vae_runs.held_out_videos(root / "clips")[1].write_text("not a video")
    arguments = ["--work-dir", str(root / "work"), "--results", str(root / "results"), "--vae", *vaes]
    latent_roles.BENCHMARK.main([*arguments, "--clips", str(root / "clips"), "--clips-vae", vaes[0]])
    return root / "results", root


def results_of(folder: Path) -> dict:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads((folder / "latent_roles.json").read_text(), parse_constant=refuse)["results"]


def test_every_figure_has_its_interval(ran):
    results = results_of(ran[0])
    assert list(results["vaes"]) == ["one", "two"]
    assert results["vaes"]["one"] == results["vaes"]["two"]  # the same weights
    roles = results["vaes"]["one"]
    assert set(roles["probes"]) == set(latent_roles.TARGETS)
    scores = [s for target in roles["probes"].values() for found in target.values() for s in found.values()]
    scores += [s for component in roles["components"].values() for s in component.values()]
    scores += [s for end in roles["reenactment"]["likeness"].values() for s in end.values()]
    assert all(score["low"] <= score["value"] <= score["high"] for score in scores)
    assert roles["values"] == {"structure": 48, "dynamics": 128, "both": 176, "pixels": 180}
    assert results["clips"]["num_clips"] == 2 * vae_runs.CLIPS_PER_VIDEO  # every third of eight, but one


def test_tables_and_pictures(ran):
    folder, _ = ran
    text = (folder / "latent_roles.md").read_text()
    assert "### one" in text and "### two" in text and "real clips, held out" in text
    assert all(label in text for label in (*latent_roles.TARGETS.values(), *latent_roles.DECODED.values()))
    assert "nan" not in text and "None" not in text
    for name in (*PICTURES, "latent_roles-clips-components", "latent_roles-clips-reenactment"):
        with Image.open(folder / f"{name}.png") as picture:
            assert min(picture.size) > 300
    columns = {line.count("|") - line.count("\\|") for line in text.splitlines() if line.startswith("| reenactment, ")}
    assert columns == {4}  # the claim and the verdict of each VAE


def test_tables_without_figures_say_what_is_claimed():
    assert latent_roles.tables(None) == latent_roles.CLAIM


@pytest.mark.parametrize(
    "wanted, other, expected",
    [
        ((0.6, 0.8), (0.2, 0.5), "holds"),
        ((0.2, 0.5), (0.6, 0.8), "is reversed"),
        ((0.2, 0.6), (0.5, 0.9), "not told apart"),
    ],
)
def test_verdicts_need_intervals_apart(wanted, other, expected):
    scores = [dict(low=low, high=high) for low, high in (wanted, other)]
    assert latent_roles.verdict(*scores) == expected


def test_claims_compare_what_their_words_say(ran):
    roles = json.loads(json.dumps(results_of(ran[0])["vaes"]["one"]))
    for features, value in (("structure", 0.9), ("dynamics", 0.1)):
        for target in roles["probes"].values():
            for score in target[features].values():
                score["value"] = value
    for target in roles["reenactment"]["whose"].values():
        target["a"]["value"], target["b"]["value"] = 0.7, 0.3
    roles["reenactment"]["likeness"]["a_as_b"]["nearest"]["value"] = 0.6
    found = {words: tuple(score["value"] for score in pair) for words, pair in latent_roles.claims(roles).items()}
    assert found["shape: read from structure rather than dynamics"] == (0.9, 0.1)
    assert found["motion class: read from dynamics rather than structure"] == (0.1, 0.9)
    assert found["fast motion: read from dynamics rather than structure"] == (0.1, 0.9)
    assert found["reenactment, texture: A's rather than B's"] == (0.7, 0.3)
    assert found["reenactment, motion class: B's rather than A's"] == (0.3, 0.7)
    assert found["reenactment: nearer in pixels to A moving as B than to A"][0] == 0.6


def test_without_folders_the_ablations_vaes_are_taken(tmp_path, monkeypatch):
    asked = []

    def train(name, settings, options):
        asked.append((name, [s for s in settings if not s.startswith("data.")]))
        save_vae(options.work_dir / "vae_runs" / name / "final")
        return {"psnr": 1.0, "ssim": 0.5, "parameters": 1, "seconds": 1.0}

    monkeypatch.setattr(vae_runs, "train_and_score", train)
    monkeypatch.setattr(vae_runs, "SPRITES_PER_CLASS", {"smoke": (1, 1)})
    monkeypatch.setattr(latent_roles, "sprite_roles", lambda vae, counts, seeds: {})
    options = Namespace(
        scale="smoke", work_dir=tmp_path, results=tmp_path, vae=None, clips=None, clips_vae=None, only=None
    )
    assert list(latent_roles.run(options)["vaes"]) == ["sprites-full-seed0"]
    ours, asked[:] = list(asked), []
    ablations.run(options)
    assert ours[0] in asked  # the very same run: it is trained once


def test_one_latent_is_refused(tmp_path, capsys):
    vae = save_vae(tmp_path / "alone" / "final", single_latent=True)
    with pytest.raises(SystemExit) as stopped:
        latent_roles.BENCHMARK.main(["--work-dir", str(tmp_path), "--vae", str(vae)])
    assert stopped.value.code == 2
    assert "one latent" in capsys.readouterr().err
