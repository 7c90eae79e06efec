"""The comparison of autoencoders: smoke scale, matched sizes, lists, differences and verdicts."""

from __future__ import annotations

import argparse
import csv
import json
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.latents import clips, generation, page, scores, training
from benchmarks.latents.__main__ import BENCHMARK, GIVEN
from benchmarks.latents.methods import METHODS, PRESET, VALUES, VIDTWIN, Method
from benchmarks.latents.results import compare_clips
from vidgen.data.listing import list_videos
from vidgen.data.types import ShardMember, VideoFile
from vidgen.metrics import fvd
from vidgen.metrics.flops import transformer_flops
from vidgen.metrics.frechet import bootstrap_interval

CPU_CASES = [(name, rate) for name, method in METHODS["cpu"].items() for rate in method.rates]


@pytest.fixture(autouse=True)
def _few_resamples(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(fvd, "bootstrap_interval", partial(bootstrap_interval, resamples=4))


def test_smoke_then_nothing_is_done_again_then_given_weights(tmp_path, lpips_weights, monkeypatch, capsys):
    common = ["--work-dir", str(tmp_path), lpips_weights]
    BENCHMARK.main([*common, "--only", "vidtwin-*", "references"])
    assert not (tmp_path / "smoke" / "latents.json").exists()  # only a part
    BENCHMARK.main(common)
    results = json.loads((tmp_path / "smoke" / "latents.json").read_text())["results"]
    assert results["videos"] == {"train": 14, "validation": 2, "test": 8}
    low = results["rates"]["low"]
    assert list(low["methods"]) == ["vidtwin", "ltx"] and set(low["references"]) == {"downsample", "block_pca"}
    for method in low["methods"].values():
        [run] = method["runs"]
        assert run["trained"]["flops"] == pytest.approx(1e9, rel=0.2)
        assert run["cost"]["encode_seconds"] > 0 and run["rfvd"]["pooled_pixels"]["value"] > 0
        assert run["dit"]["fvd"]["pooled_pixels"]["generated"]["value"] > 0
        gain = method["figures"]["psnr"]["mean"] - low["references"]["block_pca"]["figures"]["psnr"]["mean"]
        assert method["gain"]["block_pca"]["mean"] == pytest.approx(gain)
    text = (tmp_path / "latents.md").read_text()
    assert "VidTwin: 0.20 %, 28.14 / 0.241 / 389 | 193 |" in text and "VidTwin vs. LTX: PSNR" in text
    assert (tmp_path / "smoke" / "latents.png").stat().st_size > 10_000

    for module, name in ((training, "train_vae"), (generation, "train_dit")):
        monkeypatch.setattr(module, name, lambda config: pytest.fail("trained again"))
    BENCHMARK.main([*common, "--finished"])
    assert json.loads((tmp_path / "smoke" / "latents.json").read_text())["results"] == results

    sprites = tmp_path / "latents" / "data" / "sprites"
    with pytest.raises(SystemExit):  # kept scores are not of these clips
        BENCHMARK.main([*common, "--train", str(sprites / "train"), "--clips", str(sprites / "train")])
    assert "with other settings: the videos of test (" in capsys.readouterr().err

    vaes = [str(tmp_path / "latents" / "runs" / f"{name}-low-seed0" / "final") for name in ("vidtwin", "ltx")]
    given_options = ["--clips", str(sprites / "test"), "--num-frames", "5"]
    GIVEN.main([*common, "--vae", *vaes, *given_options])
    record = json.loads((tmp_path / "smoke" / "latents_given.json").read_text())
    assert " benchmarks.latents latents_given " in record["environment"]["command"]
    given = record["results"]["vaes"]
    assert all(vae["cost"]["decode_seconds"] > 0 for vae in given.values())
    monkeypatch.setattr(scores, "score_vae", lambda *arguments: pytest.fail("scored again"))
    GIVEN.main([*common, "--vae", *vaes, *given_options])
    assert [vae["clip_shape"] for vae in given.values()] == [[3, 4, 32, 32], [3, 5, 32, 32]]
    assert [vae["latent_size"] for vae in given.values()] == [2 * 28, 32]  # two windows of four frames, one of five
    assert "| MAGVIT-v2 (paper, MCL-JCV) |" in (tmp_path / "latents_given.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scale", "paper"], "score trained weights with --vae"),
        (["--scale", "cpu", "--train", "x"], "those to score on as --clips"),
        (["--train", "missing", "--clips", "missing"], "missing"),
    ],
)
def test_missing_videos_are_one_sentence(arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        BENCHMARK.main([*arguments, "--work-dir", str(tmp_path)])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def build(method: Method, rate: str):
    with torch.device("meta"):
        return method.build(rate, PRESET["cpu"], clips.SIDE["cpu"])


@pytest.mark.parametrize(("name", "rate"), CPU_CASES)
def test_methods_match_in_parameters_values_and_flops(name, rate):
    method = METHODS["cpu"][name]
    model, twin = build(method, rate), build(METHODS["cpu"][VIDTWIN], rate)
    assert model.num_parameters() == pytest.approx(twin.num_parameters(), rel=0.2)
    assert model.latent_size == pytest.approx(VALUES["cpu"][rate], rel=0.2)
    assert clips.NUM_FRAMES["cpu"] <= model.clip_shape[1] <= clips.NUM_FRAMES["cpu"] + 1
    dit = generation.build_transformer(model, method, 18, "cpu")
    assert 48 <= sum(dit.num_tokens) <= 80
    assert transformer_flops(dit) > 0


def test_every_training_has_the_same_flops():
    for name in (VIDTWIN, "single", "ltx"):
        method = METHODS["cpu"][name]
        step = training.training_flops(method, "low", "cpu") * training.BATCH_SIZE
        total = training.count_steps(method, "low", "cpu") * step
        assert abs(total - training.TRAINING_FLOPS["cpu"]) <= step / 2


def test_paper_beside_ours():
    assert page.paper_cells("wan") == ["EMU-3: 0.53 %, 25.36 / 0.254 / 354; CV-VAE: 0.53 %, 28.06 / 0.244 / 402", None]
    assert page.paper_cells("magvit") == ["MAGVIT-v2: 0.65 %, 24.35 / 0.335 / 654", "58"]
    assert page.paper_cells("ltx") == [None, None]


def test_lists_are_disjoint_and_have_classes(tmp_path, monkeypatch):
    train, test = clips.write_smoke_videos(tmp_path)
    lists = clips.write_lists(train, test, tmp_path / "lists", fps=4, num_frames=5)
    files = {name: {file.path for file in list_videos(path)[0]} for name, path in lists.items()}
    assert [len(files[name]) for name in clips.LISTS] == [14, 2, 8]
    assert len(set.union(*files.values())) == 24
    assert list_videos(lists["train"])[1] == list_videos(train[0])[1]
    shard = VideoFile(ShardMember(Path("a.tar"), "1.mp4", 0, 1), None)
    with monkeypatch.context() as patch, pytest.raises(clips.UserError, match="has shards or arrays"):
        patch.setattr(clips, "list_videos", lambda root: ([shard], []))
        clips.list_long_videos(train, fps=4, num_frames=5)
    with pytest.raises(clips.UserError, match="has 500 frames at 4 fps"):
        clips.list_long_videos(train, fps=4, num_frames=500)
    with lists["test"].open(newline="") as file:
        assert all(Path(row["path"]).is_absolute() for row in csv.DictReader(file))


def test_only_selects_by_patterns():
    options = argparse.Namespace(scale="cpu", only=["wan-*", "*-high-*"])
    names = [run.name for run in training.list_runs(options)]
    assert "wan-low-seed1" in names and "ltx-high-seed0" in names and "ltx-low-seed0" not in names
    options.only = None
    runs = training.list_runs(options)
    assert len(runs) == 3 * len(METHODS["cpu"]) and runs[0].name == "vidtwin-low-seed0" and runs[-1].rate == "high"


def seeds_of(*means: float) -> list[list[dict]]:
    """Scores of twenty videos with two clips each, for seeds of these means."""
    noise = torch.rand(40, generator=torch.Generator().manual_seed(0)).double() - 0.5
    noise -= noise.mean()
    paths = [f"{i // 2}.mp4" for i in range(40)]
    return [
        [{"path": path, "psnr": mean + value} for path, value in zip(paths, noise.tolist(), strict=True)]
        for mean in means
    ]


def test_differences_are_paired_by_clip():
    alone = compare_clips(seeds_of(20, 21), None, "psnr")
    assert alone["mean"] == pytest.approx(20.5) and alone["by_seed"] == pytest.approx([20, 21])
    assert alone["low"] < 20.5 < alone["high"]
    same_noise = compare_clips(seeds_of(20, 21), seeds_of(19.5, 20), "psnr")
    assert same_noise["low"] == pytest.approx(0.75) and same_noise["high"] == pytest.approx(0.75)
    assert same_noise["by_seed"] == pytest.approx([0.5, 1.0])
    reference = compare_clips(seeds_of(20, 21), seeds_of(19), "psnr")
    assert reference["mean"] == pytest.approx(1.5) and reference["by_seed"] == pytest.approx([1, 2])


@pytest.mark.parametrize(
    ("means", "others", "sign", "verdict"),
    [
        ((20, 21), (19, 19), 1, "better"),
        ((20, 21), (22, 22), 1, "worse"),
        ((20, 21), (22, 22), -1, "better"),
        ((20, 23), (21, 21), 1, "inconclusive"),  # the seeds disagree
    ],
)
def test_verdict_needs_the_interval_and_every_seed(means, others, sign, verdict):
    assert page.judge(compare_clips(seeds_of(*means), seeds_of(*others), "psnr"), sign) == verdict


def test_distances_are_compared_by_all_intervals():
    def run(low: float, high: float) -> dict:
        return {"rfvd": {"d": {"low": low, "high": high}}, "dit": None}

    assert page.judge_distances([run(1, 2), run(1, 2.5)], [run(3, 4)]) == ["rFVD (d): better"]
    assert page.judge_distances([run(3, 4)], [run(1, 2)]) == ["rFVD (d): worse"]
    assert page.judge_distances([run(1, 2), run(1, 3.5)], [run(3, 4)]) == ["rFVD (d): inconclusive"]
    assert page.judge_distances([{"rfvd": {"d": {"low": None}}, "dit": None}], [run(1, 2)]) == []
