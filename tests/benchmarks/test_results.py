"""docs/results.md: made from records, and true about what there is."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import ablations, results
from benchmarks.common.harness import REPOSITORY, RESULTS, from_repository, read_record


def test_a_section_is_made_again_from_its_record(tmp_path):
    score = {"psnr": 20.0, "ssim": 0.5, "lpips_squeeze": 0.2}
    score |= {"parameters": 7, "latent_size": 2, "compression_rate": 0.01}
    made = {"data": {"sprites": {name: [score, score] for name in ablations.VARIANTS}}}
    environment = {"command": "ablations.py --scale cpu", "device": "a CPU", "git commit": "abc"}
    record = {
        "benchmark": "ablations",
        "date": "2026-11-23",
        "seconds": 90,
        "environment": environment,
        "results": made,
    }
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "ablations.json").write_text(json.dumps(record))
    (tmp_path / "cpu" / "ablations_grid.png").write_bytes(b"")
    (tmp_path / "cpu" / "ablations-remarks.md").write_text("What was tried.\n")
    text = results.section(ablations.BENCHMARK, "cpu", "Here", tmp_path)
    assert "20.00 ± 0.00" in text and "1.5 minutes on a CPU" in text
    assert f"![ablations]({tmp_path.name}/cpu/ablations.png)" in text and "ablations_grid.png" in text
    assert text.endswith("ablations_grid.png)\n\nWhat was tried.")
    assert (tmp_path / "cpu" / "ablations.png").stat().st_size > 1000


def test_what_was_not_run_says_what_it_needs(tmp_path):
    text = results.section(ablations.BENCHMARK, "paper", "There", tmp_path)
    assert "not run: needs UCF-101, vgg16-397923af.pth for LPIPS and 4 GPUs of 80 GB." in text and "26.116" in text


def test_the_page_holds_every_program_and_every_record():
    page = (RESULTS.parent / "results.md").read_text()
    for name in results.PROGRAMS:
        assert f"## {results._benchmark(name).title}" in page
    for path in RESULTS.glob("*/*.json"):
        record = read_record(path)
        assert f"{record['environment']['git commit']}" in page, path
        made = results.below(results._benchmark(path.stem).tables(record["results"]))
        assert made in page, f"make results was not run after {path} or its program changed"
    for line in page.splitlines():
        if line.startswith("!["):
            assert Path(RESULTS.parent, line.split("(")[-1].rstrip(")")).is_file(), line


def test_a_record_names_no_place_of_this_machine():
    beside = f"{REPOSITORY.parent}/shared/a.pth"
    assert from_repository(f"--vae {REPOSITORY}/runs/x --file={beside} other/y") == (
        "--vae runs/x --file=../shared/a.pth other/y"
    )
    inside = f"/mnt{REPOSITORY.parent}/x /a{REPOSITORY}/y"  # the same folders in the middle of other paths
    assert from_repository(inside) == inside
    text = json.dumps({"a": f"b:{REPOSITORY}/c\n{REPOSITORY}/d", "e": [f"{beside}"]})
    assert json.loads(from_repository(text)) == {"a": "b:c\nd", "e": ["../shared/a.pth"]}
