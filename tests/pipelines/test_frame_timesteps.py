"""A timestep for each row of dynamics frames, beside that of structure."""

from __future__ import annotations

import pytest
import torch

from pipelines.blocks import modulate
from pipelines.latents import spread_streams

BATCH = 2


@pytest.fixture
def inputs(transformer):
    torch.manual_seed(2)
    noisy = torch.randn(BATCH, transformer.latent_size)
    return {"hidden_states": noisy, "class_labels": torch.tensor([0, 3])}


def dynamics_by_frame(model, packed):
    """Packed (B, L) -> dynamics (B, frames, values of a frame)."""
    size = torch.Size(model.structure_shape).numel()
    return packed[:, size:].unflatten(1, model.dynamics_shape).transpose(1, 2).flatten(2)


def test_equal_timesteps_of_all_frames_are_one_of_the_stream(transformer, inputs):
    streams = torch.tensor([[700, 7], [3, 900]])
    frames = torch.cat([streams[:, :1], streams[:, 1:].expand(-1, transformer.num_frame_rows)], dim=1)
    per_stream, per_frame = (transformer(timestep=t, **inputs).sample for t in (streams, frames))
    torch.testing.assert_close(per_frame, per_stream, rtol=1e-6, atol=1e-6)
    modulations = transformer.modulations(frames, inputs["class_labels"])
    assert modulations[0].shape[1] == 1 + transformer.num_frame_rows
    assert torch.equal(transformer(timestep=frames, modulations=modulations, **inputs).sample, per_frame)


def test_every_frames_timestep_reaches_structure_and_all_frames(transformer, inputs):
    timestep = torch.full((BATCH, 1 + transformer.num_frame_rows), 300)
    before = transformer(timestep=timestep, **inputs).sample
    for frame in range(transformer.num_frame_rows):
        changed = timestep.clone()
        changed[:, 1 + frame] = 0
        difference = (transformer(timestep=changed, **inputs).sample - before).abs()
        by_frame = dynamics_by_frame(transformer, difference).amax(dim=(0, 2))
        assert by_frame.argmax() == frame  # most at the frame itself
        assert by_frame.min() > 1e-5
        assert difference[:, : torch.Size(transformer.structure_shape).numel()].max() > 1e-5


def test_a_patch_over_several_frames_has_one_timestep(make_transformer, vae):
    frames = vae.dynamics_shape[1]
    model = make_transformer(dynamics_patch_size=(2, 1))
    assert model.num_frame_rows == frames // 2
    noisy, labels = torch.randn(BATCH, model.latent_size), torch.tensor([0, 1])
    model(noisy, torch.full((BATCH, 1 + frames // 2), 5), labels)
    with pytest.raises(ValueError, match=rf"timestep must be \(2,\) or \(2, 2\) or \(2, {1 + frames // 2}\)"):
        model(noisy, torch.full((BATCH, 1 + frames), 5), labels)


def test_intervals_have_the_rows_of_the_timestep(make_transformer, inputs):
    model = make_transformer(interval_conditioning=True)
    rows = 1 + model.num_frame_rows
    start, end = torch.full((BATCH, rows), 400), torch.full((BATCH, rows), 100)
    per_frame = model(timestep=start, target_timestep=end, **inputs).sample
    per_stream = model(timestep=start[:, :2], target_timestep=end[:, :2], **inputs).sample
    torch.testing.assert_close(per_frame, per_stream, rtol=1e-6, atol=1e-6)
    one = model(timestep=start, target_timestep=end[:, 0], **inputs).sample
    assert torch.equal(one, per_frame)
    with pytest.raises(ValueError, match=r"target_timestep must be .* for this timestep"):
        model(timestep=start, target_timestep=end[:, :2], **inputs)


def test_rows_of_tokens_are_modulated_by_their_vectors():
    tokens, scale = torch.ones(1, 2 + 6, 1), torch.tensor([5.0, 1.0, 2.0, 3.0]).view(1, 4, 1)
    modulated = modulate(tokens, (2, 6), scale, -scale / 2)
    assert modulated.flatten().tolist() == [2.5, 2.5, 0.5, 0.5, 1.0, 1.0, 1.5, 1.5]


def test_values_of_rows_are_spread_over_their_frames_in_every_channel():
    shape = (2, 4, 3)  # channels, frames, positions
    spread = spread_streams(torch.tensor([[9, 1, 2]]), (5, 24), channels=2)
    assert spread[0, :5].tolist() == [9] * 5
    frames = spread[0, 5:].view(shape)
    assert torch.equal(frames, torch.tensor([1, 1, 2, 2])[None, :, None].expand(shape))
