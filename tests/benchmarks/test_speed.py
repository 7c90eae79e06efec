"""speed.py at its smoke scale: figures, not how large they are."""

from __future__ import annotations

import json

import speed
import torch


def test_smoke_compares_attention_at_every_length(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        speed.main(["--scale", "smoke", "--output", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    figures = json.loads((tmp_path / "speed.json").read_text())
    assert set(figures) == {"environment", "attention"}
    assert {row["length"] for row in figures["attention"]} == {16, 65, 196, 1008}
    ratios = [value for row in figures["attention"] for name, value in row.items() if "/" in name]
    assert len(ratios) == 20 and all(ratio > 0 for ratio in ratios)
