"""Models that generate the first frame, and then the difference of the video from it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from autoencoder.latents import TwinLatents
from pipelines import VidTwinPipeline, default_scheduler
from pipelines.latents import join_stages, normalize_latents, split_stages

SIZES = (48, 128)  # of the latents of the tiny autoencoder
DEVIATION = 0.5


@pytest.fixture
def staged(vae, make_transformer, monkeypatch):
    """A pipeline whose transformer knows the clean latents of both stages, and the calls that it gets."""
    transformer = make_transformer(image_conditioning=True, image_residual=DEVIATION)
    pipeline = VidTwinPipeline(vae, transformer, default_scheduler("sample"))
    pipeline.set_progress_bar_config(disable=True)
    known = SimpleNamespace(still=torch.randn(1, sum(SIZES)), motion=torch.randn(1, sum(SIZES)), calls=[], inputs=[])

    def answer(latents, timestep, labels, *args, image_latents=None, **kwargs):
        known.calls.append(image_latents)
        known.inputs.append(latents)
        return ((known.still if image_latents is None else known.motion).expand(len(latents), -1),)

    monkeypatch.setattr(transformer, "forward", answer)
    return pipeline, known


def sample(pipeline, labels=0, **options):
    """Normalized latents of videos."""
    settings = {"num_inference_steps": 3, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    latents = pipeline(labels, **settings | options).frames
    return normalize_latents(latents, pipeline.vae, *pipeline.latent_statistics)


def structure_of(vae, clips):
    """The normalized structure latents (B, L_S) of clips (B, T, 3, H, W) in [0, 1]."""
    latents = vae.encode(clips.transpose(1, 2) * 2 - 1).latent_dist.mode()
    return normalize_latents(latents, vae)[:, : SIZES[0]]


def test_stages_are_split_and_joined():
    latents, image = torch.randn(5, 9), torch.randn(5, 6)
    has_image = torch.tensor([True, False, True, False, False])
    split = split_stages(latents, image, DEVIATION, has_image)
    assert torch.equal(split[0], torch.cat([(latents[0, :6] - image[0]) / DEVIATION, latents[0, 6:]]))
    assert torch.equal(split[1], torch.cat([image[1], torch.zeros(3)]))
    torch.testing.assert_close(join_stages(split_stages(latents, image, DEVIATION), image, DEVIATION), latents)


def test_without_an_image_the_first_frame_is_generated_and_then_the_difference(staged):
    pipeline, known = staged
    latents = sample(pipeline, [0, 1], num_videos_per_prompt=2)
    assert [call is None for call in known.calls] == [True] * 3 + [False] * 3
    still = known.still[:, : SIZES[0]]
    torch.testing.assert_close(known.calls[-1], still.expand(8, -1))  # four videos, guided
    torch.testing.assert_close(latents, join_stages(known.motion, still, DEVIATION).expand(4, -1))


def test_temperature_is_that_of_both_stages(staged):
    pipeline, known = staged
    sample(pipeline, temperature=0.5)
    cold = known.inputs[::3]  # the first step of each stage
    known.inputs.clear()
    sample(pipeline)
    for ours, theirs in zip(cold, known.inputs[::3], strict=True):
        assert torch.equal(ours, 0.5 * theirs)


def test_a_given_image_is_not_generated(staged, vae):
    pipeline, known = staged
    clips = torch.rand(2, *[vae.clip_shape[i] for i in (1, 0, 2, 3)])
    image = structure_of(vae, clips[:, :1].expand_as(clips))
    torch.testing.assert_close(
        sample(pipeline, image=clips[:, :1]), join_stages(known.motion.expand(2, -1), image, DEVIATION)
    )
    assert all(call is not None for call in known.calls)


def test_a_given_structure_is_kept_and_holds_the_first_frame(staged, vae):
    """The model sees it relative to its first frame, which a structure latent is decoded for."""
    pipeline, known = staged
    clips = torch.rand(1, *[vae.clip_shape[i] for i in (1, 0, 2, 3)])
    structure, first = structure_of(vae, clips), structure_of(vae, clips[:, :1].expand_as(clips))
    latents = sample(pipeline, structure=clips)
    torch.testing.assert_close(latents, torch.cat([structure, known.motion[:, SIZES[0] :]], dim=1))
    torch.testing.assert_close(known.calls[0][:1], first)
    torch.testing.assert_close(known.calls[0], known.calls[-1])

    known.calls.clear()
    encoded = vae.unpack(vae.encode(clips.transpose(1, 2) * 2 - 1).latent_dist.mode())
    for given in (encoded, encoded.structure):
        torch.testing.assert_close(sample(pipeline, structure=given), latents)
    decoded = vae.decode(encoded, components="structure").sample[:, :, :1].expand(-1, -1, clips.shape[1], -1, -1)
    decoded = (decoded / 2 + 0.5).clamp(0, 1).transpose(1, 2)
    torch.testing.assert_close(known.calls[0][:1], structure_of(vae, decoded))


def test_given_dynamics_are_kept_in_the_second_stage(staged, vae):
    pipeline, known = staged
    given = TwinLatents(*(torch.randn(1, *getattr(vae, f"{stream}_shape")) for stream in ("structure", "dynamics")))
    latents = sample(pipeline, dynamics=given)
    expected = normalize_latents(given.pack(), vae)[:, SIZES[0] :]
    torch.testing.assert_close(latents[:, SIZES[0] :], expected)
    torch.testing.assert_close(latents[:, : SIZES[0]], (known.still + DEVIATION * known.motion)[:, : SIZES[0]])
    assert [call is None for call in known.calls] == [True] * 3 + [False] * 3


@pytest.mark.parametrize("solver", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_the_second_stage_does_not_continue_the_solver_of_the_first(vae, make_transformer, solver):
    """The first frame given as latents leads to the same video as the first frame generated."""
    import diffusers

    transformer = make_transformer(image_conditioning=True, image_residual=DEVIATION)
    scheduler = getattr(diffusers, solver).from_config(default_scheduler("sample").config)
    pipeline = VidTwinPipeline(vae, transformer, scheduler, latents_mean=[0.0, 0.0], latents_std=[1.0, 1.0])
    pipeline.set_progress_bar_config(disable=True)
    seen, forward = [], transformer.forward
    transformer.forward = lambda *a, **k: seen.append(k.get("image_latents")) or forward(*a, **k)
    noise = torch.randn(1, sum(SIZES))
    both = sample(pipeline, latents=noise)
    image = seen[-1][:1].unflatten(1, vae.structure_shape)
    torch.testing.assert_close(sample(pipeline, latents=noise, image=image), both)


def test_a_callback_sees_the_second_stage_only(staged):
    pipeline, known = staged
    steps = []
    sample(pipeline, callback_on_step_end=lambda pipe, i, t, tensors: steps.append((i, pipe.num_timesteps)) or {})
    assert steps == [(0, 3), (1, 3), (2, 3)] and len(known.calls) == 6


def test_wrong_deviations_are_refused(make_transformer):
    with pytest.raises(ValueError, match="image_residual requires image_conditioning"):
        make_transformer(image_residual=DEVIATION)
    with pytest.raises(ValueError, match="image_residual must be 0 or more, not -1"):
        make_transformer(image_conditioning=True, image_residual=-1.0)
