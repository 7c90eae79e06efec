"""README, results and cards state the values of the records in docs/results/cpu."""

from __future__ import annotations

import json
from functools import cache, reduce
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
README, RESULTS = "README.md", "docs/results/README.md"
SPRITES, ROBOT, REAL = (f"pretrained/{name}/README.md" for name in ("sprites", "real_robot", "real"))


def each(path: str, *rows: str) -> list[str]:
    """The path for each row, whose words take the place of the braces."""
    return [path.format(*row.split()) for row in rows]


PSNR = each("reconstruction/all/figures/{}/psnr/mean", "reconstruction", "downsample", "block_pca_16x16x16")
GAINS = each("reconstruction/all/difference/{}/psnr/mean", "downsample", "block_pca_16x16x16")
CLIPS = ("real", "reconstruction", "generated", "animated", "animated, one candidate")
GESTURES = [f"accuracy/{name}/mean" for name in CLIPS]
SEEN = each("sprites/seen/generated/{}/value", "motion", "shape", "color", "background")
HELD_OUT = each("sprites/held_out/generated/{}/value", "motion", "shape", "color", "background")
SWAPPED = each(
    "sprites/swapped_parts/{}/value", "swapped/motion", "unswapped/motion", "swapped/shape", "unswapped/shape"
)
RANK = ["real/sets/generated/reciprocal_rank/mean"]

# Page, record, sentence, the paths in the record of its values.
STATEMENTS = [
    (README, "real", "{:.1f} dB on 288 held-out clips (rate-matched downsampling {:.1f}, block PCA {:.1f})", PSNR),
    (README, "sprites", "{:.1f} dB on 256 held-out sprites", ["reconstruct/psnr/reconstructed/value"]),
    (README, "text", "(classifier; on real clips 100, 94, 100 %) | | {:.0%}, {:.0%}, {:.0%} |", SEEN[:3]),
    (RESULTS, "text", "motion {:.0%}, shape {:.0%}, color {:.0%} of generated clips", SEEN[:3]),
    (RESULTS, "text", "mean reciprocal rank of {:.2f} for clips of `pretrained/real_robot`", RANK),
    (RESULTS, "real", "{:.1f} dB above rate-matched downsampling and {:.2f} dB above the best block PCA", GAINS),
    (SPRITES, "text", "| {:.1%} | {:.1%} | {:.1%} | {:.0%} |", SEEN),
    (SPRITES, "text", "| {:.1%} | {:.1%} | {:.1%} | {:.0%} |", HELD_OUT),
    (SPRITES, "text", "| {:.1%} (unswapped {:.1%}) | {:.1%} ({:.1%}) |", SWAPPED),
    (ROBOT, "text", "| {:.3f}", RANK),
    (REAL, "real", "| this autoencoder | {:.2f} dB |", PSNR[:1]),
    (REAL, "real", "one candidate; chance | {:.0%}; {:.0%}; {:.0%}; {:.0%}; {:.0%}; 9 % |", GESTURES),
]


@cache
def results(record: str) -> dict[str, Any]:
    return json.loads((ROOT / "docs" / "results" / "cpu" / f"{record}.json").read_text())["results"]


@pytest.mark.parametrize(("page", "record", "sentence", "paths"), STATEMENTS)
def test_pages_state_the_values_of_records(page, record, sentence, paths):
    values = [reduce(lambda node, name: node[name], path.split("/"), results(record)) for path in paths]
    assert without_signs(sentence.format(*values)) in without_signs((ROOT / page).read_text())


def without_signs(text: str) -> str:
    """The text in one line without percent signs, which follow one or several numbers."""
    return " ".join(text.replace("%", " ").split()).replace(" ,", ",").replace(" ;", ";")
