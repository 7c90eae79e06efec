"""One model, four jobs: the program at its smoke scale, and what it says of figures."""

from __future__ import annotations

import json

import pytest
import sprites
import torch
from PIL import Image

from vidgen.errors import UserError


def test_smoke_with_ablations_and_a_second_start_trains_nothing(work_dir, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(sprites, "STRENGTHS", (0.0, 0.5))
    arguments = ["--scale", "smoke", "--work-dir", str(work_dir), "--ablations"]
    sprites.BENCHMARK.main(arguments)
    results = json.loads((work_dir / "sprites.json").read_text())["results"]
    assert set(results["ablations"]) == set(sprites.ABLATIONS)
    distances = {found["generate"]["distance"]["generated"] for found in results["ablations"].values()}
    assert len(distances) == len(sprites.ABLATIONS)  # each is another model
    assert [*results["animate"]] == [*results["retarget"]] == ["0.0", "0.5"]
    assert len(results["rollouts"]["change"]) == results["rollouts"]["frames"] - 1 == 11
    text = (work_dir / "sprites.md").read_text()
    assert "| no self-conditioning | " in text and "Roll-outs: 8 videos of 12 frames" in text
    assert Image.open(work_dir / "sprites.png").size[0] > 300

    monkeypatch.setattr(sprites, "train_dit", lambda config: pytest.fail("trained again"))
    monkeypatch.setattr(sprites, "train_scorer", lambda *args, **kwargs: pytest.fail("trained again"))
    sprites.BENCHMARK.main(arguments)
    again = json.loads((work_dir / "sprites.json").read_text())["results"]
    assert again == results


def test_there_is_no_paper_scale_and_no_model_but_the_one_named(tmp_path):
    for arguments, says in ((["--scale", "paper"], "take --scale cpu"), (["--scale", "cpu"], "name a pipeline")):
        parser = sprites.argparse.ArgumentParser()
        parser.add_argument("--scale")
        sprites.add_options(parser)
        options = parser.parse_args(arguments)
        options.work_dir = tmp_path
        with pytest.raises(UserError, match=says):
            sprites.run(options)
