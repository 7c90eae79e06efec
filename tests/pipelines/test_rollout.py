"""Roll-outs, loops and interpolation."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from autoencoder.latents import TwinLatents
from pipelines import VidTwinPipeline
from pipelines.rollout import crossfade, encode_structure, interpolate, match_color_statistics, rollout

STEPS, FRAMES, OVERLAP = 2, 4, 2  # of the tiny model


def options(seed: int = 0) -> dict:
    return {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(seed)}


@pytest.fixture
def windows(pipe, monkeypatch):
    """The calls of the pipeline with their outputs, window by window."""
    calls = []
    original = type(pipe).__call__

    def call(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        calls.append(SimpleNamespace(frames=output.frames, **kwargs))
        return output

    monkeypatch.setattr(type(pipe), "__call__", call)
    return calls


# --- roll-outs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_frames", [1, 4, 5, 6, 11])
def test_videos_have_num_frames_frames(pipe, num_frames):
    video = rollout(pipe, num_frames, [0, 1], overlap=OVERLAP, **options())
    assert video.shape == (2, num_frames, 3, 32, 32)
    assert video.min() >= 0 and video.max() <= 1


def test_only_needed_windows_are_generated(pipe, windows):
    rollout(pipe, 2 * FRAMES - OVERLAP, 0, overlap=OVERLAP, **options())
    assert len(windows) == 2
    rollout(pipe, 2 * FRAMES - OVERLAP + 1, 0, overlap=OVERLAP, **options())
    assert len(windows) == 2 + 3


def test_a_window_continues_the_previous_one(pipe, windows):
    strengths = dict(structure_strength=0.5, dynamics_strength=0.75)
    video = rollout(pipe, 8, 0, overlap=OVERLAP, **strengths, **options())
    first, second, third = windows
    for before, after in ((first.frames, second), (crossfade(first.frames, second.frames, OVERLAP), third)):
        assert torch.equal(after.structure, after.dynamics)
        assert torch.equal(after.structure, before[:, [-2, -1, -2, -3]])  # then in reverse
        assert list(after.kept_frames) == [0, 1]
        assert after.structure_strength == 0.5 and after.dynamics_strength == 0.75
    assert torch.equal(video[:, : FRAMES - OVERLAP], first.frames[:, : FRAMES - OVERLAP])
    assert torch.equal(video[:, -(FRAMES - OVERLAP) :], third.frames[:, OVERLAP:])


def test_all_windows_have_the_same_subclass(pipe_of_kinds, monkeypatch):
    asked = []
    original = type(pipe_of_kinds).__call__
    monkeypatch.setattr(
        type(pipe_of_kinds),
        "__call__",
        lambda self, **kwargs: asked.append(kwargs["class_labels"]) or original(self, **kwargs),
    )
    rollout(pipe_of_kinds, 8, "jump", overlap=OVERLAP, num_videos_per_prompt=12, **options())
    assert len(asked) == 3 and asked[0] == asked[1] == asked[2]
    assert set(asked[0]) == {2, 3}
    asked.clear()
    first = torch.rand(1, FRAMES, 3, 32, 32)
    rollout(pipe_of_kinds, 6, "jump", overlap=OVERLAP, first=first, **options())
    assert asked == [[0]]  # conditioning determines the subclass


def test_a_first_clip_is_continued(pipe, windows):
    clip = torch.rand(1, FRAMES, 3, 32, 32)
    video = rollout(pipe, 6, 0, overlap=OVERLAP, first=clip, **options())
    assert len(windows) == 1
    assert torch.equal(video[:, : FRAMES - OVERLAP], clip[:, : FRAMES - OVERLAP])


@pytest.mark.parametrize(
    ("labels", "each", "windows", "videos"),
    [([0, 1], 1, 1, 2), (0, 2, 1, 2), (None, 2, 1, 2), (0, 1, 3, 3), ([0, 1], 1, 2, 2)],
)
def test_one_first_clip_serves_all_videos(pipe, make_transformer, labels, each, windows, videos):
    clip = torch.rand(windows, FRAMES, 3, 32, 32)
    if labels is None:
        pipe = VidTwinPipeline(pipe.vae, make_transformer(num_classes=None), pipe.scheduler)
    video = rollout(pipe, 6, labels, overlap=OVERLAP, first=clip, num_videos_per_prompt=each, **options())
    assert video.shape[:2] == (videos, 6)
    kept = FRAMES - OVERLAP
    assert torch.equal(video[:, :kept], clip.expand(videos, -1, -1, -1, -1)[:, :kept])


def test_crossfade_has_equal_steps():
    zeros, ones = torch.zeros(1, 5, 1, 1, 1), torch.ones(1, 6, 1, 1, 1)
    assert crossfade(zeros, ones, 3).flatten().tolist() == [0, 0, 0.25, 0.5, 0.75, 1, 1, 1]


def test_a_loop_of_two_windows_closes(pipe, windows):
    overlap = 1
    video = rollout(pipe, 6, 0, overlap=overlap, loop=True, **options())
    first, closing = windows
    assert video.shape[1] == 6
    assert list(closing.kept_frames) == [0, 3]
    assert torch.equal(closing.structure, first.frames[:, [3, 2, 1, 0]])
    # The frame after the last would be the closing window's own last, which has crossfade into the first.
    assert torch.equal(video[:, :1], torch.lerp(closing.frames[:, -1:], first.frames[:, :1], 0.5))
    assert torch.equal(video[:, 4:], closing.frames[:, 1:3])


def test_a_loop_of_many_windows_closes(pipe, windows):
    clip = torch.rand(1, FRAMES, 3, 32, 32)
    video = rollout(pipe, 9, 0, overlap=1, loop=True, first=clip, **options())
    before, closing = windows
    assert torch.equal(before.structure, clip[:, [3, 2, 1, 0]]) and list(before.kept_frames) == [0]
    assert torch.equal(closing.structure[:, -1:], clip[:, :1]) and list(closing.kept_frames) == [0, 3]
    assert torch.equal(closing.structure[:, :1], before.frames[:, -1:])
    assert torch.equal(video[:, :1], torch.lerp(closing.frames[:, -1:], clip[:, :1], 0.5))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (dict(overlap=0), "overlap must be 1 to 2"),
        (dict(overlap=3), "overlap must be 1 to 2"),
        (dict(num_frames=0), "num_frames must be at least 1"),
        (dict(loop=True, num_frames=7), "nearest is 8"),
        (dict(loop=True, num_frames=2), "nearest is 4"),
        (dict(class_labels="orbt"), "orbt"),
        (dict(first=torch.zeros(3, 4, 3, 32, 32), class_labels=[0, 1]), "first has 3 windows for 2 videos"),
        (dict(first=torch.zeros(1, 3, 3, 32, 32)), "first must be a window of 4 frames, not of 3"),
    ],
)
def test_invalid_rollouts_are_refused(pipe, wrong, says):
    with pytest.raises(ValueError, match=says):
        rollout(pipe, **{"num_frames": 8, "class_labels": 0, "overlap": OVERLAP, **options(), **wrong})


# --- colors ----------------------------------------------------------------------------------------------------------


def color_statistics(video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return video.mean((1, 3, 4)), video.std((1, 3, 4), correction=0)


def test_every_window_has_the_colors_of_the_first(pipe, windows):
    clip = 0.1 + 0.2 * torch.rand(2, FRAMES, 3, 32, 32)
    arguments = {"overlap": 1, "first": clip, **options()}
    plain = rollout(pipe, 10, [0, 1], **arguments)
    matched = rollout(pipe, 10, [0, 1], match_colors=True, **(arguments | options()))
    for start in (4, 7):  # behind the fades
        for found, wanted, without in zip(
            color_statistics(matched[:, start : start + 3]),
            color_statistics(clip),
            color_statistics(plain[:, start : start + 3]),
            strict=True,
        ):
            assert (found - wanted).abs().max() < 0.03 < (without - wanted).abs().max()
    # The model continues the video as it is shown.
    assert torch.equal(windows[-1].dynamics[:, 1:], matched[:, [5, 4, 3]])


@pytest.mark.parametrize("frames", [4, 7])
def test_matched_colors_have_the_statistics_of_the_reference(frames):
    generator = torch.Generator().manual_seed(0)
    reference = 0.4 + 0.2 * torch.rand(2, 4, 3, 8, 8, generator=generator)
    video = 0.1 * torch.rand(2, frames, 3, 8, 8, generator=generator)
    matched = match_color_statistics(video, reference)
    torch.testing.assert_close(color_statistics(matched), color_statistics(reference))
    torch.testing.assert_close(match_color_statistics(reference, reference), reference)
    flat = match_color_statistics(torch.full_like(video, 0.2), reference)
    torch.testing.assert_close(flat.mean((1, 3, 4)), reference.mean((1, 3, 4)), atol=1e-4, rtol=0)
    assert match_color_statistics(video, 20 * reference).max() <= 1


# --- history ---------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def trained_with_frame_timesteps(pipe):
    pipe.transformer.register_to_config(frame_timesteps=True)


def test_windows_with_history_start_from_the_structure_of_the_first(pipe, windows):
    rollout(pipe, 9, 0, history_noise=0.1, history_guidance_scale=1.5, **options())
    first, *others = windows
    anchor = encode_structure(pipe, first.frames)
    assert len(others) == 2  # a quarter of a window overlaps
    video = first.frames
    for window in others:
        assert torch.equal(window.structure, anchor)
        assert torch.equal(window.dynamics, video[:, [-1, -2, -3, -4]]) and list(window.kept_frames) == [0]
        assert (window.history_noise, window.history_guidance_scale) == (0.1, 1.5)
        assert (window.structure_strength, window.dynamics_strength) == (0.5, 1.0)
        video = crossfade(video, window.frames, 1)


def test_the_anchor_is_renewed_after_some_windows(pipe, windows):
    rollout(pipe, 14, 0, history_noise=0.0, anchor_windows=2, **options())
    _, second, third, fourth, fifth = windows
    assert torch.equal(second.structure, third.structure)
    assert not torch.equal(third.structure, fourth.structure)
    assert torch.equal(fourth.structure, fifth.structure)


def test_a_model_without_history_is_refused_before_it_samples(pipe, windows):
    pipe.transformer.register_to_config(frame_timesteps=False)
    with pytest.raises(ValueError, match=r"requires a transformer trained with diffusion\.frame_timesteps"):
        rollout(pipe, 9, 0, history_noise=0.1, **options())
    assert not windows


def test_structure_strength_zero_keeps_the_anchor(pipe, monkeypatch):
    decoded = []
    decode = type(pipe.vae).decode
    monkeypatch.setattr(
        type(pipe.vae), "decode", lambda self, z, **k: decoded.append(self.unpack(z).structure) or decode(self, z, **k)
    )
    first = torch.rand(1, FRAMES, 3, 32, 32)
    rollout(pipe, 8, 0, first=first, history_noise=0.0, structure_strength=0.0, **options())
    anchor = encode_structure(pipe, first)
    for structure in decoded:
        torch.testing.assert_close(structure, anchor, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"history_noise": 1.0}, "history_noise must be at least 0"),
        ({"anchor_windows": 2}, "anchor_windows requires history_noise"),
        ({"history_guidance_scale": 2.0}, "history_guidance_scale requires history_noise"),
        ({"history_noise": 0.0, "anchor_windows": 0}, "anchor_windows must be at least 1, not 0"),
        ({"history_noise": 0.0, "anchor_windows": 1.5}, "anchor_windows must be a whole number"),
    ],
)
def test_invalid_history_is_refused(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        rollout(pipe, 8, 0, **arguments, **options())


# --- interpolation ---------------------------------------------------------------------------------------------------


@pytest.fixture
def ends(pipe) -> list[TwinLatents]:
    generator = torch.Generator().manual_seed(3)
    shapes = (pipe.vae.structure_shape, pipe.vae.dynamics_shape)
    return [TwinLatents(*(torch.randn(1, *shape, generator=generator) for shape in shapes)) for _ in range(2)]


def shown(pipe, latents: TwinLatents) -> torch.Tensor:
    with torch.no_grad():
        return ((pipe.vae.decode(latents).sample.transpose(1, 2) + 1) / 2).clamp(0, 1)


@pytest.mark.parametrize("streams", [("structure", "dynamics"), ("structure",), ("dynamics",)])
def test_interpolation_starts_and_ends_at_the_clips(pipe, ends, streams):
    a, b = ends
    end = TwinLatents(*((b if s in streams else a).__dict__[s] for s in ("structure", "dynamics")))
    middle = TwinLatents(*((getattr(a, s) + getattr(end, s)) / 2 for s in ("structure", "dynamics")))
    found = interpolate(pipe, a, b, [0, 0.5, 1], streams=streams)
    wanted = torch.cat([shown(pipe, latents) for latents in (a, middle, end)])
    assert found.shape == (3, FRAMES, 3, 32, 32)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_strength_varies_the_interpolation(pipe, ends):
    given = dict(shares=[0, 0.5], class_labels=0)
    kept = interpolate(pipe, *ends, shares=[0, 0.5])
    changed = interpolate(pipe, *ends, strength=0.5, **given, **options())
    again = interpolate(pipe, *ends, strength=0.5, **given, **options())
    assert changed.shape == kept.shape
    assert torch.equal(changed, again)
    assert not torch.allclose(changed, kept, atol=1e-3)


def test_clips_and_images_can_be_interpolated(pipe):
    clips = torch.rand(2, FRAMES, 3, 32, 32)
    found = interpolate(pipe, clips[:1], clips[1:, :1], [0, 1])
    with torch.no_grad():
        encoded = pipe.vae.encode((2 * clips[:1] - 1).transpose(1, 2)).latent_dist.mode()
    torch.testing.assert_close(found[:1], shown(pipe, pipe.vae.unpack(encoded)), atol=1e-5, rtol=0)


def test_invalid_interpolations_are_refused(pipe, ends):
    with pytest.raises(ValueError, match="must be among structure, dynamics, not motion"):
        interpolate(pipe, *ends, [0.5], streams=["motion"])
    with pytest.raises(ValueError, match="one clip each, not 2 and 1"):
        interpolate(pipe, torch.rand(2, FRAMES, 3, 32, 32), ends[1], [0.5])
    with pytest.raises(ValueError, match=r"^b: a list must hold PIL images"):
        interpolate(pipe, ends[0], [3], [0.5])
