"""The guides' Python examples run as they stand, on an untrained model of the demo's shape."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from autoencoder import AutoencoderKLVidTwin
from pipelines import VidTwinPipeline, VidTwinTransformer3DModel, default_scheduler

ROOT = Path(__file__).parents[1]
NEEDS_MORE = ("push_to_hub", "vidtwin.ckpt")  # an account; the authors' weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    torch.manual_seed(0)
    vae = AutoencoderKLVidTwin.from_preset("tiny", num_layers=1)
    transformer = VidTwinTransformer3DModel.from_preset(
        "tiny-test", vae=vae, num_classes=2, structure_patch_size=(4, 2, 2), dynamics_patch_size=(4, 16)
    )
    pipeline = VidTwinPipeline(vae, transformer, default_scheduler(), {"0": "orbit", "1": "bounce"})
    pipeline.save_pretrained(folder / "runs" / "demo" / "dit" / "final")
    vae.save_pretrained(folder / "runs" / "demo" / "vae" / "final")
    return folder


@pytest.mark.parametrize("page", ["README.md", "docs/inference.md"])
def test_examples_run(page, folder, monkeypatch):
    monkeypatch.chdir(folder)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert len(blocks) >= 2
    names: dict = {}
    for block in blocks:
        if not any(word in block for word in NEEDS_MORE):
            exec(compile(block, page, "exec"), names)
