"""The model in the box: what is said of pretrained/sprites holds of the files that are there."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.sprites.classifier import DrawnSprites
from pipelines import VidTwinPipeline
from vidgen.common.loading import SHIPPED_MODEL
from vidgen.data.sprites import MOTIONS
from vidgen.metrics.reconstruction import downsample_baseline, psnr

UNSEEN = 5_000_000  # a seed of sprites that nothing was trained on


@pytest.fixture(scope="module")
def pipeline() -> VidTwinPipeline:
    pipeline = VidTwinPipeline.from_pretrained(SHIPPED_MODEL)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_it_is_small_and_in_bfloat16():
    files = sorted(SHIPPED_MODEL.rglob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) <= 12e6
    for file in files:
        assert file.stat().st_size <= 4 * 2**20  # what this repository takes of a file
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}


def test_its_card_says_how_it_was_made():
    card = (SHIPPED_MODEL / "README.md").read_text()
    for said in ("## Data", "train_vae.py --config configs/vae/sprites_long.yaml", "## Limits", "from_pretrained("):
        assert said in card


def test_held_out_clips_are_rebuilt_far_better_than_shrinking_them(pipeline):
    vae = pipeline.vae
    clips = DrawnSprites(32, UNSEEN, num_frames=16, resolution=64).clips()
    with torch.no_grad():
        rebuilt = vae(clips).sample
    found = psnr(rebuilt, clips).mean()
    assert found >= 25
    assert found >= psnr(downsample_baseline(clips, vae.latent_size), clips).mean() + 4


def test_every_class_is_generated_and_what_is_given_is_kept(pipeline):
    assert set(pipeline.labels) == set(MOTIONS)
    made = pipeline([*MOTIONS], num_inference_steps=10, guidance_scale=3.0, output_type="pt").frames
    moved = made.diff(dim=1).abs().mean(dim=(1, 2, 3, 4))
    assert moved.argmin() == MOTIONS.index("still")
    assert made.flatten(1).std(dim=1).min() > 0.05  # neither gray nor noise of no contrast

    clips = DrawnSprites(4, UNSEEN, num_frames=16, resolution=64).clips()
    shown = (clips.transpose(1, 2) + 1) / 2
    animated = pipeline("still", structure=shown, num_inference_steps=10, output_type="pt").frames
    off = (animated.mean(dim=1)[:, None] - shown.mean(dim=1)[None]).square().mean(dim=(2, 3, 4))
    assert off.argmin(dim=1).tolist() == [0, 1, 2, 3]  # each animated clip looks like its own, not like another
