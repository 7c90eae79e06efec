"""The guides' Python examples run as they stand, on the model in the box."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEEDS_MORE = ["push_to_hub", "vidtwin.ckpt"]  # an account; the authors' weights
if importlib.util.find_spec("peft") is None:
    NEEDS_MORE.append("peft")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Where the examples run: the model is there, and what they write goes with the folder."""
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    return tmp_path


@pytest.mark.parametrize("page", ["README.md", "docs/inference.md"])
def test_examples_run(page, folder, monkeypatch):
    monkeypatch.chdir(folder)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert len(blocks) >= 2
    names: dict = {}
    for block in blocks:
        if not any(word in block for word in NEEDS_MORE):
            exec(compile(block, page, "exec"), names)
