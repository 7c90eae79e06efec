"""Tokens against quality: smoke scale, patch sizes and verdicts."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from PIL import Image

from benchmarks import patch_sizes
from benchmarks.patch_sizes import REFERENCE, forms
from pipelines import VidTwinTransformer3DModel
from vidgen.metrics import fvd
from vidgen.metrics.frechet import bootstrap_interval

PAPER, SPRITES = ((4, 16, 7, 7), (8, 16, 14)), ((12, 4, 8, 8), (8, 16, 16))


def test_smoke_and_a_second_run_trains_nothing(work_dir, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(fvd, "bootstrap_interval", partial(bootstrap_interval, resamples=4))
    forms = patch_sizes.forms

    def few_forms(*shapes) -> dict:
        names, patches = zip(*forms(*shapes).items(), strict=True)
        return {names[i]: patches[i] for i in (0, 2, 4)}

    monkeypatch.setattr(patch_sizes, "forms", few_forms)
    arguments = ["--scale", "smoke", "--work-dir", str(work_dir)]
    patch_sizes.BENCHMARK.main(arguments)
    results = json.loads((work_dir / "smoke" / "patch_sizes.json").read_text())["results"]
    found = results["forms"]
    assert [sum(row["tokens"]) for row in found.values()] == [28, 8, 2]
    flops = [row["flops"] for row in found.values()]
    assert flops == sorted(flops, reverse=True) and found[REFERENCE]["relative_flops"] == 1
    for row in found.values():
        assert ("steps" in row["trained"]) == (row["relative_flops"] <= 2)
        for budget, trained in row["trained"].items():
            asked = 2 if budget == "steps" else 2 / row["relative_flops"]
            assert abs(trained["steps"] - asked) <= 0.5
            assert trained["distance"]["interval"][0] <= trained["distance"]["value"]
    distances = {t["distance"]["value"] for row in found.values() for t in row["trained"].values()}
    assert len(distances) == 4  # of five trainings, and the reference's two are one
    assert "| 28 | 3." in (work_dir / "patch_sizes.md").read_text()
    assert Image.open(work_dir / "smoke" / "patch_sizes.png").size[0] > 300

    monkeypatch.setattr(patch_sizes, "train_dit", lambda config: pytest.fail("trained again"))
    patch_sizes.BENCHMARK.main(arguments)
    again = json.loads((work_dir / "smoke" / "patch_sizes.json").read_text())["results"]["forms"]
    assert [row["trained"] for row in again.values()] == [row["trained"] for row in found.values()]


@pytest.mark.parametrize(
    ("shapes", "tokens"), [(PAPER, [1008, 800, 65]), (SPRITES, [512, 272, 80, 32, 20, 8])], ids=["paper", "sprites"]
)
def test_number_of_tokens_of_every_form(shapes, tokens):
    made = []
    for structure_patch_size, dynamics_patch_size in forms(*shapes).values():
        with torch.device("meta"):
            model = VidTwinTransformer3DModel.from_preset(
                "tiny-test",
                structure_shape=shapes[0],
                dynamics_shape=shapes[1],
                structure_patch_size=structure_patch_size,
                dynamics_patch_size=dynamics_patch_size,
            )
        made.append(sum(model.num_tokens))
    assert made == tokens
    assert sum(forms(*shapes)[REFERENCE][0]) == shapes[0][1] + 2


def figures(**found: tuple[int, dict[str, float]]) -> dict:
    """Results of forms by name: tokens, and by budget a distance whose interval is 0.1 to either side."""
    rows = {}
    for name, (tokens, budgets) in found.items():
        trained = {
            budget: {"steps": 9, "distance": {"value": value, "interval": [value - 0.1, value + 0.1]}}
            for budget, value in budgets.items()
        }
        rows[name] = {"tokens": [tokens - 1, 1], "trained": trained}
    return {"forms": rows}


def test_verdicts():
    found = figures(
        a=(512, {"flops": 3.0}), b=(80, {"steps": 1.0, "flops": 1.0}), c=(20, {"steps": 1.5, "flops": 0.85})
    )  # fmt: skip
    assert patch_sizes.verdicts(found) == [
        "At equal steps 80 tokens have the lowest distance, 1.",
        "At equal FLOPs 20 tokens have the lowest distance, 0.85; inconclusive (overlapping intervals): 80.",
    ]
