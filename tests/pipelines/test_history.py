"""History: kept frames at a noise level of their own, and guidance by them."""

from __future__ import annotations

import diffusers
import pytest
import torch

from autoencoder.latents import TwinLatents
from pipelines import VidTwinPipeline, default_scheduler
from pipelines.history import History, fraction_to_timestep
from pipelines.schedulers import noise_levels, other_solver

STEPS, KEPT, FRAMES = 4, (0, 1), 4
STREAMS = ("structure", "dynamics")


def generate(pipe, clip, **options):
    settings = {
        "num_inference_steps": STEPS,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
        "kept_frames": KEPT,
        "dynamics_strength": 1.0,
        "history_noise": 0.0,
        "guidance_scale": 2.0,
    }
    frames = pipe([0, 2], structure=clip.structure, dynamics=clip.dynamics, **{**settings, **options}).frames
    return pipe.vae.unpack(frames)


@pytest.fixture(autouse=True)
def trained_with_frame_timesteps(pipe):
    pipe.transformer.register_to_config(frame_timesteps=True)


@pytest.fixture
def latents(pipe) -> TwinLatents:
    generator = torch.Generator().manual_seed(5)
    return TwinLatents(*(torch.randn(2, *getattr(pipe.vae, f"{s}_shape"), generator=generator) for s in STREAMS))


@pytest.fixture
def calls(pipe, monkeypatch):
    """Latents and timesteps of each call of the transformer."""
    calls = []
    forward = type(pipe.transformer).forward

    def record(self, hidden_states, timestep, *args, **kwargs):
        calls.append((TwinLatents.unpack(hidden_states, self.structure_shape, self.dynamics_shape), timestep))
        return forward(self, hidden_states, timestep, *args, **kwargs)

    monkeypatch.setattr(type(pipe.transformer), "forward", record)
    return calls


@pytest.mark.parametrize("noise_level", [0.0, 0.3])
@pytest.mark.parametrize("solver", [None, diffusers.UniPCMultistepScheduler])
@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction", "flow_prediction"])
def test_kept_frames_have_one_timestep_and_its_noise(pipe, latents, calls, prediction_type, solver, noise_level):
    pipe.scheduler = default_scheduler(prediction_type)
    pipe.scheduler = pipe.scheduler if solver is None else other_solver(pipe.scheduler, solver)
    noise = torch.randn(2, pipe.transformer.latent_size)
    out = generate(pipe, latents, latents=noise, history_noise=noise_level)
    torch.testing.assert_close(out.dynamics[:, :, :2], latents.dynamics[:, :, :2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.structure, latents.structure, atol=1e-5, rtol=1e-5)

    level = fraction_to_timestep(pipe.scheduler, noise_level)
    alpha, sigma = noise_levels(pipe.scheduler, torch.tensor(level))
    clean = (latents.dynamics - pipe.vae.latents_mean[1]) / pipe.vae.latents_std[1]
    expected = (
        alpha * clean
        + sigma * TwinLatents.unpack(noise, pipe.transformer.structure_shape, pipe.transformer.dynamics_shape).dynamics
    )
    steps = pipe.scheduler.timesteps
    assert len(calls) == len(steps)
    for (seen, timestep), t in zip(calls, steps, strict=True):
        assert timestep.shape == (4, 1 + FRAMES)
        assert (timestep[:, 0] == 0).all() and (timestep[:, 3:] == t).all()
        assert (timestep[:, 1:3] == level).all()
        torch.testing.assert_close(seen.dynamics[:2, :, :2], expected[:, :, :2], atol=1e-5, rtol=1e-5)


def test_the_other_frames_depend_on_the_history(pipe, latents):
    before = generate(pipe, latents)
    latents.dynamics[:, :, 1] += 1
    after = generate(pipe, latents)
    assert (before.dynamics - after.dynamics)[:, :, 2:].abs().amax(dim=(1, 3)).min() > 1e-4


def test_precomputed_modulations_are_those_of_the_model(pipe, latents, monkeypatch):
    precomputed = generate(pipe, latents)
    monkeypatch.setattr(VidTwinPipeline, "prepare_modulations", lambda *_: None)
    torch.testing.assert_close(generate(pipe, latents).dynamics, precomputed.dynamics, atol=1e-4, rtol=1e-4)


# --- guidance -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("self_conditioning", [False, True])
def test_guidance_scale_zero_is_a_model_without_history(vae, make_transformer, latents, self_conditioning):
    """Without classifier-free guidance, the prediction at scale 0 is the one that sees noise as the history."""
    transformer = make_transformer(self_conditioning=self_conditioning, frame_timesteps=True)
    pipe = VidTwinPipeline(vae, transformer, default_scheduler("v_prediction"))
    pipe.set_progress_bar_config(disable=True)
    blind, other = (
        generate(pipe, clip, history_guidance_scale=0.0, guidance_scale=1.0)
        for clip in (latents, TwinLatents(latents.structure, latents.dynamics + 1))
    )
    # Kept frames reach the others through nothing else.
    torch.testing.assert_close(blind.dynamics[:, :, 2:], other.dynamics[:, :, 2:], atol=1e-4, rtol=1e-4)
    seeing = generate(pipe, latents, guidance_scale=1.0)
    assert (seeing.dynamics - blind.dynamics)[:, :, 2:].abs().max() > 1e-3


def test_guidance_scales_the_difference_that_the_history_makes(pipe, latents):
    def first_step(scale: float) -> torch.Tensor:
        one_step = {"num_inference_steps": 1, "guidance_scale": 1.0}
        return generate(pipe, latents, history_guidance_scale=scale, **one_step).dynamics[:, :, 2:]

    without, plain, guided = map(first_step, (0.0, 1.0, 3.0))
    torch.testing.assert_close(guided, without + 3 * (plain - without), atol=1e-4, rtol=1e-4)


def test_only_guidance_costs_a_row(pipe, latents, calls):
    generate(pipe, latents, history_guidance_scale=1.0)
    assert [len(timestep) for _, timestep in calls] == [4] * STEPS
    calls.clear()
    generate(pipe, latents, history_guidance_scale=1.5)
    assert [len(timestep) for _, timestep in calls] == [4, 2] * STEPS
    assert (calls[1][1][:, 1:3] == 999).all()  # pure noise


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"history_noise": 1.0}, "history_noise must be at least 0, clean, and below 1, pure noise, not 1.0"),
        ({"history_noise": float("nan")}, "history_noise must be at least 0"),
        ({"history_noise": "0"}, "history_noise must be a number"),
        ({"kept_frames": ()}, "history_noise requires kept_frames"),
        ({"history_noise": None, "history_guidance_scale": 2.0}, "history_guidance_scale requires history_noise"),
        ({"history_guidance_scale": float("inf")}, "history_guidance_scale must be finite"),
    ],
)
def test_invalid_history_is_refused(pipe, latents, options, message):
    with pytest.raises(ValueError, match=message):
        generate(pipe, latents, **options)


def test_history_is_whole_patches(make_transformer):
    scheduler = default_scheduler()
    pairs = make_transformer(dynamics_patch_size=(2, 1), frame_timesteps=True)
    assert History(pairs, scheduler, [0, 1]).is_kept.tolist() == [False, True, False]
    with pytest.raises(ValueError, match=r"whole patches of 2 positions .*, not the positions \[0, 1, 2\]"):
        History(pairs, scheduler, [0, 1, 2])
    with pytest.raises(ValueError, match="dynamics patches of this one cover all frames"):
        History(make_transformer(dynamics_patch_size=(FRAMES, 1)), scheduler, [0])


def test_a_transformer_without_frame_timesteps_is_refused(pipe, latents):
    pipe.transformer.register_to_config(frame_timesteps=False)
    with pytest.raises(ValueError, match=r"trained with diffusion.frame_timesteps, and the config of this one"):
        generate(pipe, latents)
    generate(pipe, latents, history_noise=None)


def test_it_is_refused_before_a_first_frame_is_generated(vae, make_transformer, latents, calls):
    pipe = VidTwinPipeline(vae, make_transformer(image_conditioning=True, image_residual=0.5), default_scheduler())
    with pytest.raises(ValueError, match=r"trained with diffusion\.frame_timesteps"):
        pipe([0, 2], dynamics=latents.dynamics, kept_frames=KEPT, history_noise=0.0, output_type="latent")
    assert not calls
