"""`vidgen runs`: what runs wrote is read, compared, and shown on one page without links to other files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from command_line import fail

from vidgen.cli import main
from vidgen.training.run_folder import read_runs
from vidgen.training.runs_page import config_differences, write_runs_page


def write_run(folder: Path, curves: dict[str, dict[int, float]], config: str, best: dict | None = None) -> Path:
    folder.mkdir(parents=True)
    entries = [{"step": step, name: value} for name, points in curves.items() for step, value in points.items()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    (folder / "config.yaml").write_text(config)
    if best:
        (folder / "best").mkdir()
        (folder / "best" / "best.json").write_text(json.dumps(best))
    return folder


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    """Two VAE runs and a DiT."""
    psnr = "validation/psnr"
    curves = {"loss": {1: 2.0, 2: 1.0}, psnr: {1: 20.0, 2: 22.5}, f"{psnr}_mean_color": {1: 30.0}}
    config = "seed: {}\noutput_dir: {}\nmodel: {{overrides: {{}}}}\noptim: {{learning_rate: 0.001}}\n"
    one = write_run(tmp_path / "all" / "one", curves, config.format(0, "a"))
    best = {"metric": "psnr", "value": 24.0, "step": 1}
    curves = {"loss": {1: 2.0, 2: 1.5}, psnr: {1: 24.0, 2: 23.0}}
    two = write_run(tmp_path / "all" / "two <b>", curves, config.format(1, "b"), best)
    (two / "checkpoint-2").mkdir()
    (two / "final").mkdir()
    dit_config = "seed: 0\nvae: x\ndiffusion: {class_dropout: 0.2}\noptim: {learning_rate: 0.002}\n"
    dit = write_run(tmp_path / "dit", {"validation/loss": {1: 0.5, 2: 0.7}}, dit_config)
    return [one, two, dit]


def test_runs_are_read_with_short_names_from_their_folders_or_a_parent(runs, tmp_path):
    read = read_runs([tmp_path / "all", *runs])
    assert [run.name for run in read] == ["all/one", "all/two <b>", "dit"]
    assert [run.kind for run in read] == ["VAE", "VAE", "DiT"]
    one, two, dit = read
    assert one.best_validation("validation/psnr") == (2, 22.5) and dit.best_validation("validation/loss") == (1, 0.5)
    assert (two.checkpoints, two.has_final, two.best["step"], two.last_step) == (["checkpoint-2"], True, 1, 2)
    assert (one.checkpoints, one.has_final, one.best) == ([], False, None)
    assert [run.name for run in read_runs([runs[0]])] == ["one"]


def test_only_keys_that_differ_are_listed(runs):
    assert config_differences(read_runs(runs[:2])) == {"seed": [0, 1]}
    mixed = config_differences(read_runs(runs))
    assert mixed == {"seed": [0, 1, 0], "optim.learning_rate": [0.001, 0.001, 0.002]}
    (runs[0] / "config.yaml").write_text("seed: 1\n")  # of an earlier version
    assert config_differences(read_runs(runs[:2])) == {
        "model.overrides": [..., {}],
        "optim.learning_rate": [..., 0.001],
    }


def test_the_page_is_one_file_with_the_best_values_and_escaped_names(runs, tmp_path):
    page = write_runs_page(tmp_path / "runs.html", read_runs(runs)).read_text()
    assert not re.search(r"(src|href)\s*=|https?:|url\(|<script", page)
    assert "two <b>" not in page and page.count("all/two &lt;b&gt;") >= 4
    row = re.search(r"<td>psnr ↑</td>(.*?)</tr>", page)[1]
    assert "<td>22.5 <small>at step 2</small></td><td><b>24 <small>at step 1</small></b></td><td></td>" in row
    assert "<td>loss ↓</td>" in page and "<td>psnr_mean_color" not in page
    assert "psnr 24 at step 1" in page and "<code>seed</code>" in page
    assert page.count("<svg") == 4  # loss, psnr, its baseline, and the DiT's validation loss
    assert "all/one, best: 22.5 at 2" in page
    unvalidated = write_run(tmp_path / "all" / "three", {"loss": {1: 2.0}}, "seed: 3\n")
    page = write_runs_page(tmp_path / "runs.html", read_runs([*runs, unvalidated])).read_text()
    best = page[page.index("Best validations") : page.index("Differences of the configs")]
    assert "all/three" in page and "all/three" not in best  # no empty column


def test_one_run_without_validation_has_a_page(tmp_path, capsys):
    run = write_run(tmp_path / "run", {"loss": {1: 1.0}}, "seed: 0\n")
    main(["runs", str(run), "--output", str(tmp_path / "page.html")])
    assert capsys.readouterr().out == f"{tmp_path / 'page.html'}: 1 run\n"
    page = (tmp_path / "page.html").read_text()
    assert "No run has validation metrics." in page and "There is one run." in page


def test_mistakes_are_one_sentence(runs, tmp_path, capsys):
    assert "none is no folder; name run folders" in fail(capsys, "runs", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "empty holds no training run: there is no metrics.jsonl" in fail(capsys, "runs", tmp_path / "empty")
    (runs[0] / "config.yaml").write_text("a: [")
    assert "one cannot be read: " in fail(capsys, "runs", runs[0])
