"""Table 1 at smoke scale, for a VAE on any folder, and for videos that another method reconstructed."""

from __future__ import annotations

import json
import shutil

import pytest
from peers import tiny_peer

from benchmarks import reconstruction
from vidgen.metrics.reconstruction import MAX_PSNR


def test_smoke_then_a_vae_and_reconstructed_videos(work_dir, tmp_path, lpips_weights):
    common = ["--dtype", "float32", "--work-dir", str(work_dir), lpips_weights, "--results", str(tmp_path)]
    reconstruction.BENCHMARK.main(common)
    record = json.loads((tmp_path / "smoke" / "reconstruction.json").read_text())["results"]
    [method] = record["methods"].values()
    run = work_dir / "vae_runs" / "sprites-full-seed0"
    score = json.loads((run / "score.json").read_text())["score"]
    of = method["figures"]["reconstruction"]["uint8"]
    for name in ("psnr", "ssim", "lpips_squeeze"):  # the same scores in both ways
        assert of[name]["mean"] == pytest.approx(score[name], rel=1e-5)
    distance = method["rfvd"]["pooled_pixels"]
    assert 0 < distance["low"] < distance["value"] < distance["high"] and distance["vectors"] == 8
    page = (tmp_path / "reconstruction.md").read_text()
    assert "| VidTwin | MCL-JCV, from the paper | 0.2 | 28.137 | 0.2414 | 0.8044 | 388.86 |" in page
    assert f"8 clips of 8 videos of 4 x 32 x 32, 4 fps | 1.432 | {of['psnr']['mean']:.3f} |" in page
    assert [p.name for p in (tmp_path / "smoke").glob("*.png")] == ["reconstruction-sprites-full-seed0.png"]

    videos = tmp_path / "videos"
    shutil.copytree(next((work_dir / "data" / "sprites" / "test").iterdir()), videos)
    tiny_peer("AutoencoderKLWan").save_pretrained(tmp_path / "wan")
    arguments = ["--vae", str(run / "final"), str(tmp_path / "wan"), "--data", str(videos), "--fps", "4"]
    arguments += ["--num-frames", "5", "--resolution", "32", "--reconstructed", str(videos)]
    reconstruction.BENCHMARK.main([*common, *arguments, "--rate", "5"])
    methods = json.loads((tmp_path / "smoke" / "reconstruction.json").read_text())["results"]["methods"]
    assert list(methods) == ["videos", "sprites-full-seed0", "wan"]
    assert methods["wan"]["clip_shape"] == [3, 5, 32, 32] and methods["wan"]["num_values"] == 4 * 3 * 8 * 8
    assert methods["videos"]["figures"]["reconstruction"]["uint8"]["psnr"]["mean"] == MAX_PSNR
    assert methods["videos"]["compression_rate"] == 0.05
    assert methods["sprites-full-seed0"]["num_videos"] == 1
    assert methods["videos"]["rfvd"]["pooled_pixels"]["value"] is None  # of a single clip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vae", "x"], "give the videos to measure on as --data"),
        (["--scale", "paper"], "give the videos to measure on as --data"),
        (
            ["--scale", "paper", "--vae", "x", "--data", "x", "--fps", "8"],
            "mcl-jcv determines the clips",
        ),
        (["--data", "x"], "name what to measure on --data"),
        (
            ["--vae", "x", "--data", "x", "--protocol", "mcl-jcv", "--fps", "8"],
            "mcl-jcv determines the clips",
        ),
    ],
)
def test_incompatible_options_are_one_sentence(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        reconstruction.BENCHMARK.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_short_names_of_vaes():
    assert reconstruction.short_name("runs/a/final", []) == "a"
    assert reconstruction.short_name("somewhere/b", []) == "b"
    assert reconstruction.short_name("other/a/final", ["a"]) == "other/a/final"


def test_table_with_a_protocol():
    figures = {k: {"mean": 1.0, "low": None, "high": None} for k in ("psnr", "psnr_frame", "ssim", "lpips_alex")}
    method = {
        "data": "x",
        "fps": 25,
        "num_clips": 12,
        "num_videos": 2,
        "clip_shape": [3, 16, 224, 224],
        "compression_rate": 0.002046,
        "figures": {"reconstruction": {"uint8": figures, "float": figures}},
        "rfvd": {
            "i3d": {"value": 321.25, "low": 300.0, "high": 350.0, "vectors": 12, "detector": {"dim": 400}},
            "pooled_pixels": {"value": 0.5, "low": 0.4, "high": 0.6, "vectors": 200, "detector": {"dim": 128}},
        },
    }
    text = reconstruction.tables({"protocol": "mcl-jcv", "lpips": "alex", "methods": {"ours": method}})
    assert "LPIPS of the alex backbone" in text and "LPIPS (alex)" in text
    assert "does not state real, windows, crop" in text and "It has 30 videos; ours was measured on 2." in text
    assert "| 0.205 | 1.000 | 1.0000 | 1.0000 | 321.2 (i3d, of only 12); 0.5 (pooled_pixels) |" in text
    assert "| ours | reconstruction | float | 1.00 | 1.00 | 1.0000 | 1.0000 |" in text
    whole = reconstruction.tables(
        {"protocol": "mcl-jcv", "lpips": "alex", "methods": {"ours": {**method, "num_videos": 30}}}
    )
    assert "was measured on" not in whole
