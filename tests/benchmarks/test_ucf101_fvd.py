"""Table 2 at smoke scale, on one process and on two."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from forked import run_forked
from PIL import Image

from benchmarks import ucf101_fvd
from benchmarks.common import generation
from vidgen.common.errors import UserError
from vidgen.metrics.protocols import get_protocol

DISTANCES = ("generated", "reconstructed", "real_vs_real", "mean_color")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("smoke")
    ucf101_fvd.BENCHMARK.main(["--scale", "smoke", "--work-dir", str(folder)])
    return folder


def results(folder: Path) -> dict:
    return json.loads((folder / "smoke" / "ucf101_fvd.json").read_text())["results"]


def test_results_table_and_pictures(smoke):
    [evaluation] = results(smoke)["evaluations"]
    for name in DISTANCES:
        distance = evaluation[name]
        assert 0 < distance["interval"][0] <= distance["value"] <= distance["interval"][1]
        assert (distance["samples"], distance["real_samples"]) == (24, 24)
    assert evaluation["real_vs_real"]["value"] < evaluation["mean_color"]["value"]
    assert evaluation["settings"]["guidance_scale"] == 2.0 and evaluation["detector"]["name"] == "pooled_pixels"
    text = (smoke / "ucf101_fvd.md").read_text()
    for text_part in (
        f"| generated | {evaluation['generated']['value']:.4g} |",
        "| VidTwin | 193 | not stated | VidTwin, Table 2 |",
        "| LARP | 57 | larp |",
        "24 feature vectors in 128 dimensions",
        "protocol `sprites`: 4 frames of 32 px, 4 fps, split all",
    ):
        assert text_part in text
    assert Image.open(smoke / "smoke" / "ucf101_fvd-samples.png").size[1] > 300


def test_two_processes_give_the_results_of_one(smoke, tmp_path, capfd):
    arguments = ["--scale", "smoke", "--work-dir", str(tmp_path), "--pipeline", results(smoke)["pipeline"]]
    run_forked(ucf101_fvd.BENCHMARK.main, arguments, processes=2)
    assert capfd.readouterr().out.count("UCF-101, published") == 1
    [one], [two] = results(smoke)["evaluations"], results(tmp_path)["evaluations"]
    assert two["settings"].pop("processes") == 2 and one["settings"].pop("processes") == 1
    for evaluation in (one, two):
        del evaluation["settings"]["root"], evaluation["settings"]["data"]  # times of the files
    assert two["settings"] == one["settings"]
    for name in DISTANCES:
        for key in ("value", "interval"):
            assert two[name][key] == pytest.approx(one[name][key], rel=1e-7), name
        assert two[name]["samples"] == 24
    made = {path.name for path in next((tmp_path / "ucf101_fvd" / "features").glob("generated-*")).iterdir()}
    assert made == {"features-000000.safetensors", "features-000008.safetensors", "features-000016.safetensors"}


def test_missing_options_are_named(capsys, tmp_path):
    work = ["--work-dir", str(tmp_path), "--detector", "pooled_pixels"]
    for arguments, message in (
        (["--scale", "cpu"], "name a pipeline, as train_dit.py leaves it"),
        (["--scale", "paper", "--pipeline", "x"], "compares with UCF-101: give its folder as --data FOLDER"),
        (["--scale", "paper", "--protocol", "larp", "--detector", "i3d=nothing.pt"], "nothing.pt"),
    ):
        with pytest.raises(SystemExit) as exit_code:
            ucf101_fvd.BENCHMARK.main([*arguments, *work])
        assert exit_code.value.code == 2
        assert message in capsys.readouterr().err


def test_detectors_are_named_or_files(tmp_path):
    def asked(*detectors):
        options = Namespace(scale="paper", detector=list(detectors), detector_sha256=None)
        return generation.detectors_of(options, get_protocol("tats"))

    assert [d.name for d in asked("pooled_pixels")] == ["pooled_pixels"]
    with pytest.raises(UserError, match="pooled_pixels is given 2 times"):
        asked("pooled_pixels", "pooled_pixels")
    for given in (str(tmp_path / "i3d_of_mine.pt"), f"i3d={tmp_path / 'i3d_of_mine.pt'}"):
        with pytest.raises(UserError, match=r"detector i3d.*i3d_of_mine\.pt"):
            asked(given)
    with pytest.raises(UserError, match="the detector i3d needs its weights"):  # the protocol's own
        asked()


def test_undefined_distances_leave_empty_cells(smoke, tmp_path):
    found = results(smoke)
    [evaluation] = found["evaluations"]
    evaluation["real_vs_real"], evaluation["generated"]["interval"] = None, None
    text = ucf101_fvd.tables(found)
    assert "| real vs. other real clips (noise level) |  |  |  |" in text
    assert f"| generated | {evaluation['generated']['value']:.4g} |  | 24 / 24 |" in text


def test_counts_must_be_positive(capsys, smoke):
    for option in ("--samples", "--steps", "--batch-size"):
        with pytest.raises(SystemExit):
            arguments = ["--scale", "smoke", "--work-dir", str(smoke), option, "0"]
            ucf101_fvd.BENCHMARK.main([*arguments, "--pipeline", results(smoke)["pipeline"]])
        assert "must be 1 or more, not 0" in capsys.readouterr().err
