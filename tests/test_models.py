"""The model in the box: what is shipped, and that it does what its card says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipelines import VidTwinPipeline
from pipelines.rollout import rollout
from vidgen.data.sprites import MOTIONS
from vidgen.metrics.reconstruction import psnr, shrunk
from vidgen.metrics.reenactment import pixel_measurements
from vidgen.metrics.sprite_scorer import DrawnSprites

FOLDER = Path(__file__).parents[1] / "models" / "sprites"
HELD_OUT = 2000  # seed of sprites that it was not trained on


@pytest.fixture(scope="module")
def pipeline() -> VidTwinPipeline:
    pipeline = VidTwinPipeline.from_pretrained(FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def sprites() -> DrawnSprites:
    return DrawnSprites(48, HELD_OUT)


def travelled(videos: torch.Tensor) -> torch.Tensor:
    """How many pixels a bright shape moves from frame to frame, on average; of videos (N, T, 3, H, W) in [0, 1]."""
    position = pixel_measurements(2 * videos.transpose(1, 2) - 1)["position"].unflatten(1, (-1, 2))
    return position.diff(dim=1).norm(dim=2).mean(dim=1)


def test_it_is_small_and_holds_nothing_that_could_run():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".md", ".safetensors"}
    assert sum(path.stat().st_size for path in files) <= 12e6
    assert max(path.stat().st_size for path in files) <= 4 * 2**20


def test_its_card_tells_data_commands_numbers_and_limits():
    card = (FOLDER / "README.md").read_text()
    for heading in ("## Usage", "## Data", "## Commands", "## Numbers", "## Limits"):
        assert heading in card


@torch.no_grad()
def test_it_rebuilds_held_out_clips(pipeline, sprites):
    clips = sprites.clips()
    made = pipeline.vae(clips).sample
    assert psnr(made, clips).mean() >= 25
    assert psnr(made, clips).mean() - psnr(shrunk(clips, pipeline.vae.latent_size), clips).mean() >= 4


def test_its_classes_move_as_they_are_called(pipeline):
    assert sorted(pipeline.labels) == sorted(MOTIONS)
    classes = ["still", "spin", "zoom", "slide", "orbit", "bounce"]
    settings = dict(guidance_scale=2.0, num_inference_steps=20, generator=torch.Generator().manual_seed(0))
    frames = pipeline(classes, num_videos_per_prompt=2, output_type="pt", **settings).frames
    pace = dict(zip(classes, travelled(frames).unflatten(0, (6, 2)).mean(dim=1).tolist(), strict=True))
    assert max(pace["still"], pace["spin"], pace["zoom"]) < 1
    assert min(pace["slide"], pace["orbit"], pace["bounce"]) > 2


def test_it_keeps_a_given_motion(pipeline, sprites):
    of = [i for i in range(len(sprites)) if MOTIONS[i % 8] in ("slide", "orbit", "bounce", "still")][:8]
    clips = (sprites.clips()[of].transpose(1, 2) + 1) / 2
    settings = dict(num_inference_steps=20, generator=torch.Generator().manual_seed(0), output_type="pt")
    made = pipeline(dynamics=clips, **settings).frames
    places = [pixel_measurements(2 * v.transpose(1, 2) - 1)["position"] for v in (clips, made)]
    off = (places[0] - places[1]).abs().mean(dim=1)
    strangers = (places[0] - places[1].roll(1, dims=0)).abs().mean(dim=1)
    assert off.mean() < 0.3 * strangers.mean()


def test_it_rolls_out(pipeline):
    settings = dict(guidance_scale=2.0, num_inference_steps=10, generator=torch.Generator().manual_seed(0))
    assert travelled(rollout(pipeline, 40, "still", **settings)) < 1
