"""Curves of metrics."""

import json
import math
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from vidgen.common.plots import loss_curves, read_curves


@pytest.fixture
def metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    entries = [{"step": i, "loss": math.exp(-i / 50), "lr": 1e-3, "note": "x", "ok": True} for i in range(1, 301)]
    entries += [{"step": i, "val/psnr": 20 + i / 100} for i in (100, 200, 300)]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_curves_are_scalars_by_step(metrics):
    curves = read_curves(metrics)
    assert curves.keys() == {"loss", "lr", "val/psnr"}
    assert curves["val/psnr"] == {100: 21.0, 200: 22.0, 300: 23.0}


def test_curves_of_a_resumed_and_crashed_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 1, "loss": 3}', '{"step": 2, "loss": 2}', "", '{"step": 3, "loss": NaN}']
    lines += ['{"step": 2, "loss": 5}', '{"step": 3, "loss": 1}', '{"step": 4, "lo']
    path.write_text("\n".join(lines))
    assert read_curves(path) == {"loss": {1: 3.0, 2: 5.0, 3: 1.0}}
    path.write_text('{"step": 1}\nnonsense\n{"step": 2, "loss": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read_curves(path)
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        read_curves(tmp_path / "none.jsonl")


def test_loss_curves_draw_each_key_on_a_fitting_scale(metrics, tmp_path, monkeypatch):
    drawn, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), savefig(self, *a, **k)))
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would fail
    path = loss_curves(tmp_path / "curves.png", metrics)
    image = Image.open(path)
    image.load()
    assert image.format == "PNG" and image.width > image.height > 200
    panels = {axes.get_title(): axes for axes in drawn[0].axes}
    assert {name: axes.get_yscale() for name, axes in panels.items()} == {
        "loss": "log",
        "lr": "linear",
        "val/psnr": "linear",
    }
    raw, smooth = (line.get_ydata() for line in panels["loss"].lines)
    assert len(raw) == len(smooth) == 300
    np.testing.assert_allclose(smooth[20:-20], raw[20:-20], rtol=0.02)  # a centered mean does not lag
    assert len(panels["val/psnr"].lines) == 1


def test_loss_curves_draw_the_given_keys(metrics, tmp_path, monkeypatch):
    drawn, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), savefig(self, *a, **k)))
    loss_curves(tmp_path / "curves.png", metrics, keys=["val/psnr", "absent", "loss"])
    assert [axes.get_title() for axes in drawn[0].axes] == ["val/psnr", "loss"]
    with pytest.raises(ValueError, match="has no absent"):
        loss_curves(tmp_path / "none.png", metrics, keys=["absent"])
    assert not (tmp_path / "none.png").exists()
