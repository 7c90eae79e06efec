"""Timesteps of dynamics frames in training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipelines import VidTwinTransformer3DModel, default_scheduler
from pipelines.schedulers import PREDICTION_TYPES
from vidgen.common.errors import UserError
from vidgen.losses.config import DiffusionConfig
from vidgen.losses.diffusion import DRAWS, DiffusionLoss
from vidgen.losses.frame_timesteps import FRAME_DRAWS, condition_fractions, draw_frame_fractions

ROWS, BATCH = 8, 4000


def tiny_dit(**overrides) -> VidTwinTransformer3DModel:
    torch.manual_seed(0)
    shapes = {"structure_shape": (2, 2, 2, 2), "dynamics_shape": (3, ROWS, 4)}
    sizes = {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 8, "num_classes": 2}
    model = VidTwinTransformer3DModel(**{**shapes, **sizes, **overrides})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def draw(fraction: float, independent: float = 0.5):
    torch.manual_seed(0)
    streams = torch.rand(BATCH, 1).expand(-1, 2).clone()
    is_independent = torch.rand(BATCH) < independent
    streams[:, 0] = torch.where(is_independent, torch.rand(BATCH), streams[:, 1])
    drawn = draw_frame_fractions(
        fraction,
        streams,
        torch.rand(BATCH, ROWS),
        is_independent,
        torch.rand(BATCH),
        torch.rand(BATCH, FRAME_DRAWS),
    )
    return streams, is_independent, drawn


# --- distribution ---------------------------------------------------------------------------------------------------


def test_conditions_are_clean_noisy_or_pure_noise():
    fractions = condition_fractions((torch.arange(1000) + 0.5) / 1000)
    assert (fractions == 0).double().mean() == pytest.approx(0.5, abs=0.01)
    assert (fractions == 1).double().mean() == pytest.approx(0.25, abs=0.01)
    noisy = fractions[(fractions > 0) & (fractions < 1)]
    assert noisy.mean() == pytest.approx(0.5, abs=0.01)


def test_other_clips_keep_the_timesteps_of_their_streams():
    streams, _, drawn = draw(fraction=0.0)
    assert torch.equal(drawn.fractions, torch.cat([streams[:, :1], streams[:, 1:].expand(-1, ROWS)], dim=1))
    assert not drawn.is_clean.any()


def test_half_of_the_clips_have_independent_frames_and_half_a_history():
    streams, is_independent, drawn = draw(fraction=0.8)
    structure, frames = drawn.fractions[:, 0], drawn.fractions[:, 1:]
    is_rest = frames == streams[:, 1:]
    num_rest = is_rest.sum(dim=1)
    assert ((num_rest == ROWS).double().mean() - 0.2).abs() < 0.02  # shared
    assert ((num_rest == 0).double().mean() - 0.4).abs() < 0.02  # independent
    has_history = (num_rest > 0) & (num_rest < ROWS)

    # The history is a prefix with one timestep; all its lengths are equally frequent.
    history = frames[has_history]
    lengths = ROWS - num_rest[has_history]
    for length in range(1, ROWS):
        chosen = lengths == length
        assert chosen.double().mean() == pytest.approx(1 / (ROWS - 1), abs=0.03)
        assert torch.equal(history[chosen, :length], history[chosen, :1].expand(-1, length))
    assert (history[:, 0] == 0).double().mean() == pytest.approx(0.5, abs=0.04)
    assert (history[:, 0] == 1).double().mean() == pytest.approx(0.25, abs=0.04)

    # Structure is a condition where it is independent, and otherwise shares the timestep of the rest.
    anchored = has_history & is_independent
    assert (structure[anchored] == 0).double().mean() == pytest.approx(0.5, abs=0.04)
    assert torch.equal(structure[~anchored], streams[~anchored, 0])

    # Only clean conditions have no loss.
    assert torch.equal(drawn.is_clean.any(dim=1), has_history & (drawn.fractions == 0).any(dim=1))
    assert (drawn.fractions[drawn.is_clean] == 0).all()


# --- loss -----------------------------------------------------------------------------------------------------------


def losses_of(model, latents, noise, uniform, prediction_type="v_prediction", **config):
    config = DiffusionConfig(**{"class_dropout": 0.0, **config})
    objective = DiffusionLoss(model, default_scheduler(prediction_type), config)
    return objective(latents, torch.zeros(len(latents), dtype=torch.long), noise, uniform)


def history_uniform(length: int, fraction: float) -> torch.Tensor:
    """Random numbers of one clip with a history of this length, at a place in the schedule."""
    uniform = torch.full((1, DRAWS + FRAME_DRAWS + ROWS), 0.6)
    noise = {0.0: 0.2, 1.0: 0.9}[fraction]
    uniform[0, -ROWS - FRAME_DRAWS : -ROWS] = torch.tensor([0.1, (length - 0.5) / (ROWS - 1), noise])
    return uniform


@pytest.mark.parametrize("self_conditioning", [False, True])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_without_chosen_clips_the_loss_is_that_of_one_timestep(prediction_type, self_conditioning):
    model = tiny_dit(self_conditioning=self_conditioning)
    latents, noise = torch.randn(2, 5, model.latent_size).unbind()
    uniform = torch.rand(5, DRAWS + FRAME_DRAWS + ROWS)
    options = {"independent_timesteps": 0.5, "loss_weighting": "min_snr"}
    plain = losses_of(model, latents, noise, uniform, prediction_type, **options)
    framed = losses_of(model, latents, noise, uniform, prediction_type, frame_timesteps=1e-9, **options)
    assert plain.keys() == framed.keys()
    for name, value in plain.items():
        torch.testing.assert_close(framed[name], value, rtol=1e-5, atol=1e-6)


def test_a_clean_history_has_no_loss_but_is_seen():
    model = tiny_dit()
    latents, noise = torch.randn(2, 1, model.latent_size).unbind()
    uniform = history_uniform(3, 0.0)
    frames = torch.zeros(model.dynamics_shape)
    frames[:, :3] = 1
    history = torch.cat([torch.zeros(16), frames.flatten()])
    options = dict(frame_timesteps=0.5, independent_timesteps=0.0)

    before = losses_of(model, latents, noise, uniform, **options)
    noisier = losses_of(model, latents, noise + 100 * history, uniform, **options)  # timestep 0 has hardly any noise
    torch.testing.assert_close(noisier["dynamics"], before["dynamics"], rtol=0.2, atol=0)
    other = losses_of(model, latents + history, noise, uniform, **options)
    assert not torch.allclose(other["structure"], before["structure"], rtol=1e-4)

    # A history of pure noise is part of the loss, and its latents do not reach the model.
    uniform = history_uniform(3, 1.0)
    noise_only = losses_of(model, latents, noise, uniform, prediction_type="epsilon", **options)
    noisier = losses_of(model, latents, noise + 100 * history, uniform, prediction_type="epsilon", **options)
    assert noisier["dynamics"] > 10 * noise_only["dynamics"]


def test_a_model_is_trained_on_the_drawn_timesteps(monkeypatch):
    model = tiny_dit()
    seen = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda x, t, **k: seen.append(t) or forward(x, t, **k))
    latents, noise = torch.randn(2, 1, model.latent_size).unbind()
    losses_of(model, latents, noise, history_uniform(3, 0.0), frame_timesteps=0.5)["loss"].backward()
    assert seen[0].tolist() == [[600] + [0] * 3 + [600] * (ROWS - 3)]


# --- errors ---------------------------------------------------------------------------------------------------------


def test_patches_over_all_frames_are_refused():
    model = tiny_dit(dynamics_patch_size=(ROWS, 1))
    with pytest.raises(UserError, match="two or more rows of dynamics patches, but this DiT has 1"):
        DiffusionLoss(model, default_scheduler(), DiffusionConfig(frame_timesteps=0.5))


def test_jumps_are_refused():
    model = tiny_dit(interval_conditioning=True)
    with pytest.raises(UserError, match=r"frame_timesteps and diffusion\.shortcut exclude each other"):
        DiffusionLoss(model, default_scheduler("v_prediction"), DiffusionConfig(frame_timesteps=0.5, shortcut=0.5))
