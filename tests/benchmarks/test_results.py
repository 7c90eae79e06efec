"""docs/results: pages generated from the committed records, an index that agrees with them, and records of old."""

from __future__ import annotations

import json
import re
import shlex

import pytest

from benchmarks import ablations, results
from benchmarks.common.harness import (
    HAND_WRITTEN,
    REPOSITORY,
    RESULTS,
    build_parser,
    read_record,
    relative_to_repository,
)
from benchmarks.common.tables import markdown_table, mean_and_spread, score_cell

VERDICTS = {"reproduced", "not reproduced", "reversed", "within seed variance", "inconclusive", "not comparable"}


@pytest.mark.parametrize("benchmark", results.list_recorded(), ids=lambda benchmark: benchmark.name)
def test_pages_are_generated_from_the_committed_records(benchmark):
    page = (RESULTS / f"{benchmark.name}.md").read_text()
    records = list(RESULTS.glob(f"*/{benchmark.name}.json"))
    assert records and page.startswith(f"# {benchmark.title}\n")
    for path in records:
        record = read_record(path)
        assert benchmark.tables(record["results"]) in page, f"run `make results`: {path} or its program has changed"
        assert f"`{record['environment']['command']}`" in page and record["environment"]["git commit"] in page


def test_every_record_has_a_page_and_every_link_a_file():
    names = {benchmark.name for benchmark in results.list_recorded()}
    assert {path.stem for path in RESULTS.glob("*/*.json")} == names
    assert {path.stem for path in RESULTS.glob("*.md")} == names | {"README"}
    for page in RESULTS.glob("*.md"):
        for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (RESULTS / link).exists(), f"{page}: {link}"


def test_the_index_fits_a_screen_and_agrees_with_the_pages():
    lines = (RESULTS / "README.md").read_text().splitlines()
    assert len(lines) <= 50
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][2:]
    for claim, _, ours, _, verdict, page in rows:
        assert set(verdict.split("; ")) <= VERDICTS, claim
        text = (RESULTS / re.search(r"\((\w+\.md)\)", page)[1]).read_text()
        for number in re.findall(r"\d+\.\d+", ours):
            assert number in text, f"{claim}: {number} is not on {page}"


def test_a_page_keeps_its_remarks(tmp_path):
    score = {"psnr": 20.0, "ssim": 0.5, "lpips_squeeze": 0.2}
    score |= {"parameters": 7, "latent_size": 2, "compression_rate": 0.01}
    record = {
        "benchmark": "ablations",
        "scale": "cpu",
        "date": "2026-11-23",
        "seconds": 90,
        "environment": {"command": "ablations.py --scale cpu", "device": "a CPU", "git commit": "abc"},
        "results": {"data": {"sprites": {name: [score, score] for name in ablations.VARIANTS}}},
    }
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "ablations.json").write_text(json.dumps(record))
    (tmp_path / "cpu" / "ablations-grid.png").write_bytes(b"")
    (tmp_path / "cpu" / "ablations_other.png").write_bytes(b"")  # of a benchmark with a longer name
    (tmp_path / "ablations.md").write_text(f"An older table.\n\n{HAND_WRITTEN}\n\n## Remarks\n\nTwo seeds.\n")
    page = ablations.ABLATION.write_page(tmp_path).read_text()
    assert "20.00 ± 0.00" in page and "1.5 minutes on a CPU" in page and "An older table" not in page
    assert "`python -m benchmarks.ablations --scale cpu`" in page
    assert "![ablations](cpu/ablations.png)" in page and "cpu/ablations-grid.png" in page
    assert "ablations_other.png" not in page
    assert page.endswith(f"{HAND_WRITTEN}\n\n## Remarks\n\nTwo seeds.\n")
    assert (tmp_path / "cpu" / "ablations.png").stat().st_size > 1000
    assert ablations.ABLATION.write_page(tmp_path).read_text() == page


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("sampling.py --pipeline a.py", "python -m benchmarks.sampling --pipeline a.py"),
        ("rate_curve.py --scale cpu", "python -m benchmarks.ablations rate_curve --scale cpu"),
        ("training_cost.py", "python -m benchmarks.resources training_cost"),
        ("latent_roles.py --vae b", "python -m benchmarks.disentanglement --vae b"),
        ("python -m benchmarks.speed a.py", "python -m benchmarks.speed a.py"),
    ],
)
def test_commands_of_older_records(tmp_path, command, expected):
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"environment": {"command": command}, "colours": {"psnr_shrunk": 1, "whose": {}}}))
    record = read_record(path)
    assert record.pop("environment") == {"command": expected}
    assert record == {"colors": {"psnr_downsample": 1, "factor_attribution": {}}}


def commands() -> list[str]:
    """The commands of the benchmarks' docstrings, of the pages and of docs/performance.md."""
    files = [*(REPOSITORY / "benchmarks").rglob("*.py"), *RESULTS.glob("*.md"), RESULTS.parent / "performance.md"]
    pattern = r"(?:python|accelerate launch) -m benchmarks\.[^\n`#)]+"
    texts = [re.sub("^Command: .*", "", file.read_text(), flags=re.MULTILINE) for file in files]  # of other commits
    found = {match for text in texts for match in re.findall(pattern, text)}
    return sorted(re.split(r"  +|\.{3}", command)[0].strip() for command in found if not set('{"') & set(command))


@pytest.mark.parametrize("command", commands())
def test_documented_commands_are_valid(command):
    program, *arguments = shlex.split(command.split("-m benchmarks.")[1])
    if program in (
        "results",
        "sprites.rater_sheets",
        "real.lists",
        "real.candidates",
    ):  # no benchmarks; tested with their options
        return
    programs: dict[str, list] = {}
    for benchmark in results.BENCHMARKS:
        programs.setdefault(benchmark.program or benchmark.name, []).append(benchmark)
    build_parser(*programs[program]).parse_args(arguments)


def test_records_hold_no_path_of_this_machine():
    sibling = f"{REPOSITORY.parent}/shared/a.pth"
    assert relative_to_repository(f"--vae {REPOSITORY}/runs/x --file={sibling} other/y") == (
        "--vae runs/x --file=../shared/a.pth other/y"
    )
    inside = f"/mnt{REPOSITORY.parent}/x /a{REPOSITORY}/y"  # the same folders in the middle of other paths
    assert relative_to_repository(inside) == inside
    text = json.dumps({"a": f"b:{REPOSITORY}/c\n{REPOSITORY}/d", "e": [f"{sibling}"]})
    assert json.loads(relative_to_repository(text)) == {"a": "b:c\nd", "e": ["../shared/a.pth"]}


def test_cells():
    assert (
        markdown_table(["a", "b"], [[1.23456, None], [7, "x"]]) == "| a | b |\n| --- | --- |\n| 1.235 |  |\n| 7 | x |"
    )
    assert mean_and_spread([1.0, 2.0]) == "1.50 ± 0.50" and mean_and_spread([1.0]) == "1.00"
    score = {"value": 0.5, "low": 0.25, "high": 0.75, "chance": 0.125}
    assert score_cell(score) == "0.5 (0.25 to 0.75) \\| 0.125"
    assert score_cell(score, ".1f", chance=False) == "0.5 (0.2 to 0.8)"
