"""Figure 5: tokens, parameters and FLOPs by hand, and the table of claims."""

from __future__ import annotations

import json

import pytest

from benchmarks.common import paper
from benchmarks.common.harness import RESULTS
from benchmarks.resources import __main__ as resources
from benchmarks.resources.latents import latents, rate

COMMITTED = RESULTS / "cpu" / "resources.json"
STRUCTURE, DYNAMICS = 16 * 7 * 7, 16 * 14
VIDTWIN = {
    "2": [8 * 4 * 4, 8 * 7],
    "2, cropped": [8 * 3 * 3, 8 * 7],
    "(1, 2, 2)": [16 * 4 * 4, 16 * 7],
    "1": [STRUCTURE, DYNAMICS],
    "own": [STRUCTURE, DYNAMICS],
}
FOUR_FRAMES = {
    "2": [2 * 14 * 14],
    "2, cropped": [2 * 14 * 14],
    "(1, 2, 2)": [4 * 14 * 14],
    "1": [4 * 28 * 28],
    "own": [4 * 28 * 28],
}
TOKENS = {
    "iVideoGPT": {
        "2": [8 * 8, 7 * 2 * 2],
        "2, cropped": [8 * 8, 7 * 2 * 2],
        "(1, 2, 2)": [2 * 8 * 8, 14 * 2 * 2],
        "1": [2 * 16 * 16, 14 * 4 * 4],
        "own": [2 * 16 * 16, 14 * 4 * 4],
    },
    "MAGVIT-v2": {
        "2": [3 * 14 * 14],
        "2, cropped": [2 * 14 * 14],
        "(1, 2, 2)": [5 * 14 * 14],
        "1": [5 * 28 * 28],
        "own": [5 * 28 * 28],
    },
    "CMD": {
        "2": [112 * 112, 8 * 14],
        "2, cropped": [112 * 112, 8 * 14],
        "(1, 2, 2)": [112 * 112, 16 * 14],
        "1": [224 * 224, 16 * 28],
        "own": [14 * 14, 16 * 28],
    },
    "EMU-3": FOUR_FRAMES,
    "CV-VAE": {**FOUR_FRAMES, "own": [4 * 14 * 14]},
    "MAGVIT-v2, 5 channels": FOUR_FRAMES,
    "VidTwin": VIDTWIN,
    "VidTwin, released": VIDTWIN,
    "VidTwin, 65 tokens": {patching: [49, 16] for patching in VIDTWIN},
}


def pseudo_dit_flops(tokens, projections=False):
    """Of a forward pass at the paper's sizes."""
    return 6 * 2 * (2 * tokens * 512 * 2048 + 2 * tokens**2 * 512 + projections * 4 * tokens * 512**2)


@pytest.mark.parametrize("method", TOKENS)
def test_tokens_by_hand(method):
    assert {patching: resources.count_tokens(method, patching) for patching in resources.PATCHINGS} == TOKENS[method]


def test_all_methods_are_counted():
    assert set(TOKENS) == set(latents()) == set(resources.METHODS["cpu"])
    assert sum(VIDTWIN["1"]) == 1008 and sum(TOKENS["VidTwin, 65 tokens"]["1"]) == 65


def test_rates_of_the_paper():
    rates = {method: 100 * rate(*latent) for method, latent in latents().items()}
    for method in paper.LATENTS:
        assert rates[method] == pytest.approx(paper.RECONSTRUCTION[method][0], abs=0.01)
    assert rates["EMU-3"] == rates["CV-VAE"] == pytest.approx(0.52, abs=0.005)
    assert rates["CMD"] == pytest.approx(6.85, abs=0.005)
    assert rates["VidTwin"] == rates["VidTwin, 65 tokens"] == pytest.approx(0.2046, abs=5e-5)
    assert rates["VidTwin, released"] == pytest.approx(0.335, abs=5e-4)
    assert rates["MAGVIT-v2, 5 channels"] == rates["MAGVIT-v2"]


def costs_of(figures, model=resources.STATED):
    """Rows of one DiT at patch 1 from (FLOPs, fused peak, math peak) by method."""
    return [
        {
            "model": model,
            "patching": "1",
            "method": method,
            "step_flops": flops,
            "fused": {"peak": fused},
            "math": {"peak": math_peak},
        }
        for method, (flops, fused, math_peak) in figures.items()
    ]


def test_claim_table():
    figures = {"VidTwin": (10, 100, 100), "CMD": (40, 290, 90), "EMU-3": (81, 200, 310), "CV-VAE": (39, 190, 0)}
    text = resources.claim_table(costs_of(figures))
    assert "**CMD 4.0**, EMU-3 8.1, CV-VAE 3.9" in text
    assert "**CMD 2.9**, **EMU-3 2.0**, CV-VAE 1.9" in text
    assert "The paper claims 4-8 for FLOPs and 2-3 for memory" in text
    assert text.endswith("| CMD | none |")  # within both ranges with fused and with math attention


def test_smoke(tmp_path, capsys):
    resources.RESOURCES.main(["--scale", "smoke", "--work-dir", str(tmp_path)])
    record = json.loads((tmp_path / "smoke" / "resources.json").read_text())
    rows = {(row["model"], row["patching"], row["method"]): row for row in record["results"]["costs"]}
    assert len(rows) == 2 * 2
    emu = rows[resources.STATED, "2", "EMU-3"]
    assert emu["parameters"] == 12_610_560 and emu["tokens"] == [392]
    assert emu["forward_flops"] == pseudo_dit_flops(392) and emu["step_flops"] == 3 * pseudo_dit_flops(392)
    assert emu["math"]["peak"] > emu["fused"]["peak"] > 16 * 12_610_560
    text = (tmp_path / "resources.md").read_text()
    assert f"({3 * pseudo_dit_flops(392) / (3 * pseudo_dit_flops(184)):.2f}x)" in text
    assert "12,610,560 parameters" in text and "128 + 56" in text
    assert (tmp_path / "smoke" / "resources.png").read_bytes()[:4] == b"\x89PNG"


def test_committed_results_by_hand():
    rows = json.loads(COMMITTED.read_text())["results"]["costs"]
    pseudo = [row for row in rows if row["model"] in resources.PSEUDO_DITS]
    assert len(pseudo) == 2 * len(resources.PATCHINGS) * len(TOKENS)
    for row in rows:
        assert row["tokens"] == TOKENS[row["method"]][row["patching"]]
    for row in pseudo:
        projections = row["model"] == resources.PROJECTED
        assert row["parameters"] == (18_914_304 if projections else 12_610_560)
        assert row["forward_flops"] == pseudo_dit_flops(sum(row["tokens"]), projections)
        assert row["step_flops"] == 3 * row["forward_flops"]
