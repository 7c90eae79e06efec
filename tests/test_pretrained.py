"""The bundled pretrained model in pretrained/sprites: size, precision, model card, quality."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.sprites.classifier import DrawnSprites
from pipelines import VidTwinPipeline
from vidgen.common.loading import SHIPPED_MODEL
from vidgen.data.sprites import MOTIONS
from vidgen.metrics.reconstruction import downsample_baseline, psnr

UNSEEN = 5_000_000  # a seed of sprites that no model was trained on


@pytest.fixture(scope="module")
def pipeline() -> VidTwinPipeline:
    pipeline = VidTwinPipeline.from_pretrained(SHIPPED_MODEL)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_weights_are_small_and_in_bfloat16():
    files = sorted(SHIPPED_MODEL.rglob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) <= 12e6
    for file in files:
        assert file.stat().st_size <= 4 * 2**20  # the repository's limit for a file
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}


def test_model_card_documents_the_training():
    card = (SHIPPED_MODEL / "README.md").read_text()
    training = "train_vae.py --config configs/vae/sprites_long.yaml"
    for text in ("## Data", training, "## Limitations", "from_pretrained("):
        assert text in card


def test_reconstruction_beats_rate_matched_downsampling(pipeline):
    vae = pipeline.vae
    clips = DrawnSprites(32, UNSEEN, num_frames=16, resolution=64).clips()
    with torch.no_grad():
        reconstructed = vae(clips).sample
    quality = psnr(reconstructed, clips).mean()
    assert quality >= 25
    assert quality >= psnr(downsample_baseline(clips, vae.latent_size), clips).mean() + 4


def test_generation_of_every_class_and_structure_conditioning(pipeline):
    assert set(pipeline.labels) == set(MOTIONS)
    made = pipeline([*MOTIONS], num_inference_steps=10, guidance_scale=3.0, output_type="pt").frames
    moved = made.diff(dim=1).abs().mean(dim=(1, 2, 3, 4))
    assert moved.argmin() == MOTIONS.index("still")
    assert made.flatten(1).std(dim=1).min() > 0.05  # neither gray nor of low contrast

    clips = DrawnSprites(4, UNSEEN, num_frames=16, resolution=64).clips()
    shown = (clips.transpose(1, 2) + 1) / 2
    animated = pipeline("still", structure=shown, num_inference_steps=10, output_type="pt").frames
    off = (animated.mean(dim=1)[:, None] - shown.mean(dim=1)[None]).square().mean(dim=(2, 3, 4))
    assert off.argmin(dim=1).tolist() == [0, 1, 2, 3]  # each animated clip looks like its structure source
