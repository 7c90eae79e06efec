"""The bundled pretrained models: size, precision, model cards, quality."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.sprites.classifier import DrawnSprites
from pipelines import VidTwinPipeline
from pipelines.rollout import rollout
from vidgen.common.images import read_image
from vidgen.common.loading import REAL_MODEL, SPRITES_MODEL
from vidgen.data.dataset import ClipDataset
from vidgen.data.sprites import MOTIONS
from vidgen.data.transforms import crop, frames_to_clip, resize_to_cover
from vidgen.metrics.reconstruction import downsample_baseline, psnr

UNSEEN = 5_000_000  # a seed of sprites that no model was trained on


FEW_STEPS_MODEL = SPRITES_MODEL.parent / "sprites_few_steps"
FORCING_MODEL = SPRITES_MODEL.parent / "sprites_forcing"
ROBOT_MODEL = SPRITES_MODEL.parent / "real_robot"
GESTURES = {"down", "left", "right", "square", "star", "tick", "up"}


def load(folder: Path) -> VidTwinPipeline:
    pipeline = VidTwinPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline() -> VidTwinPipeline:
    return load(SPRITES_MODEL)


@pytest.fixture(scope="module")
def real() -> VidTwinPipeline:
    return load(REAL_MODEL)


@pytest.mark.parametrize(
    ("folder", "size"),
    [(SPRITES_MODEL, 13e6), (REAL_MODEL, 14e6), (FEW_STEPS_MODEL, 7e6), (FORCING_MODEL, 7e6), (ROBOT_MODEL, 7e6)],
)
def test_weights_are_small_and_in_bfloat16(folder, size):
    files = [path for path in sorted(folder.rglob("*.safetensors")) if not path.parent.is_symlink()]
    assert 1e6 < sum(file.stat().st_size for file in files) <= size
    for file in files:
        assert file.stat().st_size <= 4 * 2**20  # the repository's limit for a file
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("folder", "texts"),
    [
        (SPRITES_MODEL, ["configs/vae/sprites_long.yaml", "configs/dit/sprites_text.yaml"]),
        (REAL_MODEL, ["configs/vae/real.yaml", "configs/dit/real.yaml", "CC BY 4.0", "2403.12945", "no license file"]),
        (FEW_STEPS_MODEL, ["configs/dit/shortcut.yaml", "docs/results/sampling.md"]),
        (FORCING_MODEL, ["configs/dit/sprites_forcing.yaml", "docs/results/drift.md"]),
        (ROBOT_MODEL, ["configs/dit/real_robot.yaml", "docs/results/text.md", "CC BY 4.0", "2403.12945"]),
    ],
)
def test_model_card_documents_the_training(folder, texts):
    card = (folder / "README.md").read_text()
    for text in ("## Data", "## Limitations", "from_pretrained(", *texts):
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


def test_prompts_and_classes_generate_different_videos(pipeline):
    options = dict(num_inference_steps=4, output_type="pt")
    latents = torch.randn(1, pipeline.vae.latent_size, generator=torch.Generator().manual_seed(0))
    by_prompt = [pipeline(prompt=text, latents=latents, **options).frames for text in ("a red disc", "a blue star")]
    by_class = pipeline("still", latents=latents, **options).frames
    assert (by_prompt[0] - by_prompt[1]).abs().mean() > 0.02
    assert (by_prompt[0] - by_class).abs().mean() > 0.02


def test_few_steps_generate_every_class_without_guidance(pipeline):
    few_steps = load(FEW_STEPS_MODEL)
    assert few_steps.labels == pipeline.labels and few_steps.subclasses == pipeline.subclasses
    made = few_steps([*MOTIONS], num_inference_steps=4, output_type="pt").frames
    moved = made.diff(dim=1).abs().mean(dim=(1, 2, 3, 4))
    assert moved.argmin() == MOTIONS.index("still")
    assert made.flatten(1).std(dim=1).min() > 0.05  # neither gray nor of low contrast


def test_robot_scenes_follow_the_room_of_the_prompt():
    """The same noise gives other scenes for other prompts, and a photo remains the first frame."""
    robot = load(ROBOT_MODEL)
    options = dict(num_inference_steps=4, guidance_scale=3.0, temperature=0.4, output_type="pt")
    noise = torch.randn(1, robot.vae.latent_size, generator=torch.Generator().manual_seed(0))
    prompts = ("Put the pen in the bowl, in a kitchen", "Put the pen in the bowl, in an office")
    scenes = [
        robot(prompt=text, latents=noise, generator=torch.Generator().manual_seed(0), **options).frames
        for text in prompts
    ]
    assert (scenes[0] - scenes[1]).abs().mean() > 0.02
    photo = read_image(REAL_MODEL / "photo.jpg")
    animated = robot(prompt=prompts[0], image=photo, generator=torch.Generator().manual_seed(0), **options).frames
    assert animated.shape == scenes[0].shape and (animated[:, -1] - animated[:, 0]).abs().mean() > 0.001


def test_history_continues_the_video(pipeline):
    """The frames after the first window are nearer to it than to those of another video."""
    forcing = load(FORCING_MODEL)
    assert forcing.labels == pipeline.labels and forcing.subclasses == pipeline.subclasses
    options = dict(history_noise=0.1, match_colors=True, guidance_scale=5.0, num_inference_steps=10)
    videos = rollout(forcing, 40, ["orbit"] * 3, generator=torch.Generator().manual_seed(0), **options)
    means = [videos[:, part].mean(dim=1) for part in (slice(16), slice(28, 40))]
    off = (means[1][:, None] - means[0][None]).square().mean(dim=(2, 3, 4))
    assert off.argmin(dim=1).tolist() == [0, 1, 2]


# --- pretrained/real -----------------------------------------------------------------------------------------------


def test_real_video_of_every_class_and_from_a_photo(real):
    assert set(real.labels) > GESTURES and len(real.labels) == 18
    assert real.vae.num_parameters() <= 4e6 and real.vae.compression_rate <= 0.0065
    seeded = [torch.Generator().manual_seed(0) for _ in real.labels]
    made = real(sorted(real.labels), generator=seeded, num_inference_steps=4, output_type="pt").frames
    assert made.flatten(1).std(dim=1).min() > 0.03  # of a mean color 0

    photo = read_image(REAL_MODEL / "photo.jpg")
    options = dict(generator=torch.Generator().manual_seed(0), num_inference_steps=8, output_type="pt")
    animated = real("kitchen", image=photo, **options).frames[0]
    shown = crop(resize_to_cover(frames_to_clip(torch.tensor(np.asarray(photo))[None]), (64, 96)), (64, 96), 0.5, 0.5)
    shown = (shown[:, 0] + 1) / 2
    rooms = real("kitchen", **options).frames[0]
    assert (animated[0] - shown).square().mean() < 0.5 * (rooms[0] - shown).square().mean()


def test_the_best_of_real_candidates_is_more_probable(real):
    assert set(real.classifier.config.classes) < set(real.labels)
    photo = read_image(REAL_MODEL / "photo.jpg")
    options = dict(guidance_scale=3.0, temperature=0.3, num_inference_steps=3, output_type="pt", image=photo)
    labels = ["left", "up", "tick"]
    best, first = (
        real(labels, generator=[torch.Generator().manual_seed(i) for i in range(3)], num_candidates=count, **options)
        for count in (6, 1)
    )
    targets = [real.classifier.config.classes.index(label) for label in labels]
    of_best, of_first = (
        real.classifier.predict(2 * frames.frames.transpose(1, 2) - 1)[range(3), targets] for frames in (best, first)
    )
    assert (of_best >= of_first).all() and of_best.sum() > of_first.sum() + 0.05


def test_real_reconstruction_beats_rate_matched_downsampling(real, shared_data):
    clips = ClipDataset(shared_data / "real/droid/test.csv", num_frames=16, fps=8, resolution=(64, 96), train=False)
    video = torch.stack([clips[i]["video"] for i in range(0, len(clips), 20)])
    with torch.no_grad():
        quality = psnr(real.vae(video).sample.clamp(-1, 1), video).mean()
    assert quality >= psnr(downsample_baseline(video, real.vae.latent_size), video).mean() + 2
