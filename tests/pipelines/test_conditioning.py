"""Conditioning: streams that are kept or varied, and the inputs that encode to a stream."""

from __future__ import annotations

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance
from stub import denoise

from autoencoder.latents import TwinLatents
from pipelines import VidTwinPipeline, default_scheduler
from pipelines.conditioning import encode_conditioning
from pipelines.guidance import apply_guidance
from pipelines.overlay import apply_overlay
from pipelines.schedulers import noise_levels, other_solver, retrieve_timesteps

STEPS, SIZES = 4, (24, 16)
STREAMS = ("structure", "dynamics")


def generate(pipe, *args, **kwargs):
    settings = {"num_inference_steps": STEPS, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    return pipe.vae.unpack(pipe(*args, **{**settings, **kwargs}).frames)


@pytest.fixture
def latents(pipe) -> TwinLatents:
    generator = torch.Generator().manual_seed(5)
    return TwinLatents(*(torch.randn(2, *getattr(pipe.vae, f"{s}_shape"), generator=generator) for s in STREAMS))


@pytest.fixture
def clips(pipe) -> torch.Tensor:
    """(2, T, 3, H, W) in [0, 1], as the pipeline returns them."""
    channels, frames, height, width = pipe.vae.clip_shape
    return torch.rand(2, frames, channels, height, width, generator=torch.Generator().manual_seed(6))


@pytest.fixture
def timesteps(pipe):
    """Timesteps of each call of the transformer."""
    timesteps = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _, args: timesteps.append(args[1]))
    yield timesteps
    hook.remove()


# --- in the loop -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("solver", [None, diffusers.DPMSolverMultistepScheduler, diffusers.UniPCMultistepScheduler])
@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction", "flow_prediction"])
def test_a_conditioned_stream_is_unchanged(pipe, latents, timesteps, stream, solver, prediction_type):
    pipe.scheduler = default_scheduler(prediction_type)
    pipe.scheduler = pipe.scheduler if solver is None else other_solver(pipe.scheduler, solver)
    given = getattr(latents, stream)
    out = generate(pipe, [0, 2], **{stream: given}, guidance_scale=3.0)
    torch.testing.assert_close(getattr(out, stream), given, atol=1e-5, rtol=1e-5)
    other = STREAMS[1 - STREAMS.index(stream)]
    assert (getattr(out, other)[0] - getattr(out, other)[1]).abs().max() > 0.1
    for timestep, t in zip(timesteps, pipe.scheduler.timesteps, strict=True):
        assert timestep.shape == (4, 2)
        assert (timestep[:, STREAMS.index(stream)] == 0).all() and (timestep[:, STREAMS.index(other)] == t).all()


def test_temperature_is_of_generated_streams_only(pipe, latents):
    def change(**given):
        cool, warm = (generate(pipe, [0, 2], **given, temperature=temperature) for temperature in (0.4, 1.0))
        return [(getattr(cool, stream) - getattr(warm, stream)).abs().max().item() for stream in STREAMS]

    varied = {"structure_strength": 0.5, "dynamics_strength": 0.5}
    assert change(structure=latents, dynamics=latents, **varied) == [0, 0]
    assert min(change(structure=latents, structure_strength=0.5)) > 0.01


def test_strength_one_equals_no_conditioning(pipe, latents):
    free = generate(pipe, [0, 2])
    ignored = generate(
        pipe, [0, 2], structure=latents, dynamics=latents, structure_strength=1.0, dynamics_strength=1.0
    )
    for stream in STREAMS:
        torch.testing.assert_close(getattr(ignored, stream), getattr(free, stream), atol=1e-5, rtol=1e-5)


def test_strength_is_the_fraction_of_steps(pipe, latents, timesteps):
    def change(strength):
        timesteps.clear()
        out = generate(pipe, [0, 2], structure=latents, dynamics=latents, structure_strength=strength)
        torch.testing.assert_close(out.dynamics, latents.dynamics, atol=1e-5, rtol=1e-5)
        return (out.structure - latents.structure).square().mean().item()

    none, some = change(0.0), change(0.75)
    assert none < 1e-9 and some > 0.01
    steps = pipe.scheduler.timesteps
    assert [int(timestep[0, 0]) for timestep in timesteps] == [int(steps[max(i, 1)]) for i in range(STEPS)]


@pytest.mark.parametrize("solver", [None, diffusers.DPMSolverMultistepScheduler, diffusers.UniPCMultistepScheduler])
@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction", "flow_prediction"])
def test_a_varied_stream_follows_its_noise(prediction_type, solver):
    """Of normal data the best prediction is known, and so is the end: the same number of deviations from the mean."""
    scheduler = default_scheduler(prediction_type)
    scheduler = scheduler if solver is None else other_solver(scheduler, solver)
    steps, deviation = retrieve_timesteps(scheduler, 50), 0.3
    clean, noise = torch.randn(2, 8, sum(SIZES), generator=torch.Generator().manual_seed(0))

    def levels(timestep):
        return (level.repeat_interleave(torch.tensor(SIZES), dim=1) for level in noise_levels(scheduler, timestep))

    def model_fn(noisy, timestep, estimate):
        alpha, sigma = levels(timestep)
        x0 = alpha * deviation**2 / (alpha**2 * deviation**2 + sigma**2) * noisy
        eps = (noisy - alpha * x0) / sigma
        return {"sample": x0, "v_prediction": alpha * eps - sigma * x0, "flow_prediction": eps - x0}[prediction_type]

    out = denoise(model_fn, scheduler, noise, 50, SIZES, structure=deviation * clean, structure_strength=0.5)
    alpha, sigma = levels(torch.stack([steps[25], steps[0]])[None])
    start = torch.cat([(alpha * deviation * clean + sigma * noise)[:, : SIZES[0]], noise[:, SIZES[0] :]], dim=1)
    start_deviation = (alpha**2 * deviation**2 + sigma**2).sqrt()
    assert (out - deviation * start / start_deviation).square().mean().sqrt() < 0.02


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction", "flow_prediction"])
def test_a_waiting_stream_has_the_noise_level_of_its_first_timestep(prediction_type):
    scheduler = default_scheduler(prediction_type)
    steps = retrieve_timesteps(scheduler, STEPS)
    clean, noise = torch.randn(2, 3, sum(SIZES))
    seen = []

    def model_fn(noisy, timestep, estimate):
        seen.append((noisy, timestep))
        return noisy

    conditions = dict(structure=clean, structure_strength=0.5, dynamics=clean)
    out = denoise(model_fn, scheduler, noise, STEPS, SIZES, self_conditioning=True, **conditions)
    alpha, sigma = noise_levels(scheduler, steps[2])
    for noisy, timestep in seen[:3]:
        structure, dynamics = noisy.split(SIZES, dim=1)
        torch.testing.assert_close(structure, (alpha * clean + sigma * noise)[:, : SIZES[0]])
        assert torch.equal(dynamics, clean[:, SIZES[0] :])
        assert (timestep == torch.tensor([steps[2], 0])).all()
    assert not torch.equal(seen[3][0][:, : SIZES[0]], seen[2][0][:, : SIZES[0]])
    assert torch.equal(out[:, SIZES[0] :], clean[:, SIZES[0] :])


def test_no_conditioned_step_reads_values_from_the_device(unchecked):
    clean, noise = torch.randn(2, 3, sum(SIZES), device="meta")
    conditions = dict(structure=clean, structure_strength=0.5, dynamics=clean)
    denoise(lambda x, t, _: x, default_scheduler(), noise, STEPS, SIZES, **conditions)


@pytest.mark.parametrize("prediction_type", ["sample", "flow_prediction"])
def test_kept_frames_are_kept_and_others_depend_on_them(pipe, latents, prediction_type):
    pipe.scheduler = default_scheduler(prediction_type)
    out = generate(pipe, [0, 2], dynamics=latents, dynamics_strength=1.0, kept_frames=[0, 2])
    torch.testing.assert_close(out.dynamics[:, :, [0, 2]], latents.dynamics[:, :, [0, 2]], atol=1e-5, rtol=1e-5)
    free = generate(pipe, [0, 2])
    assert (out.dynamics[:, :, 1] - latents.dynamics[:, :, 1]).abs().max() > 0.1
    assert (out.dynamics[:, :, 1] - free.dynamics[:, :, 1]).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"kept_frames must be in 0 to 3, not \[4\]"):
        generate(pipe, 0, dynamics=latents, kept_frames=[4])
    with pytest.raises(ValueError, match="kept_frames requires `dynamics`"):
        generate(pipe, 0, structure=latents, kept_frames=[1])


def test_kept_values_have_the_noise_level_of_the_step(monkeypatch):
    scheduler = default_scheduler()
    steps = retrieve_timesteps(scheduler, STEPS)
    clean, noise = torch.randn(2, 3, sum(SIZES))
    known, seen = torch.rand(sum(SIZES)) < 0.5, []
    monkeypatch.setattr("pipelines.pipeline_vidtwin.get_keep_mask", lambda *_: known)
    conditions = dict(dynamics=clean, dynamics_strength=1.0)
    out = denoise(lambda x, t, _: seen.append(x) or 0.3 * x, scheduler, noise, STEPS, SIZES, **conditions)
    for noisy, t in zip(seen, steps, strict=True):
        alpha, sigma = noise_levels(scheduler, t)
        torch.testing.assert_close(noisy[:, known], (alpha * clean + sigma * noise)[:, known])
    assert torch.equal(out[:, known], clean[:, known]) and not torch.equal(out[:, ~known], clean[:, ~known])


def test_streams_that_shared_a_timestep_in_training_are_warned_of(pipe, latents, caplog):
    def warnings(trained: bool | None, **options) -> int:
        caplog.clear()
        pipe.transformer.register_to_config(independent_timesteps=trained)
        generate(pipe, 0, structure=latents.structure[:1], **options)
        return len([r for r in caplog.records if "one timestep for both streams" in r.message])

    assert [warnings(trained) for trained in (None, True, False)] == [0, 0, 1]
    assert warnings(False, structure_strength=1.0) == 0
    assert warnings(False, dynamics=latents.dynamics[:1], structure_strength=0.5, dynamics_strength=0.5) == 0


def test_a_solver_with_scaled_latents_refuses_conditioning(pipe, latents):
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="EulerDiscreteScheduler does not support conditioning or structure_delay; "):
        generate(pipe, 0, structure=latents)
    generate(pipe, 0)


# --- guidance per stream ---------------------------------------------------------------------------------------------


def test_guidance_scales_each_stream_separately():
    predictions = torch.tensor([[3.0], [5.0], [1.0], [1.0]]).expand(-1, sum(SIZES))
    out = apply_guidance(predictions, (4.0, 0.5), SIZES)
    assert (out[:, : SIZES[0]] == torch.tensor([[1 + 4.0 * 2], [1 + 4.0 * 4]])).all()
    assert (out[:, SIZES[0] :] == torch.tensor([[1 + 0.5 * 2], [1 + 0.5 * 4]])).all()


def test_scales_up_to_one_do_not_guide(pipe):
    torch.testing.assert_close(
        generate(pipe, [0, 1], guidance_scale=(1.0, 0.5)).pack(), generate(pipe, [0, 1], guidance_scale=1.0).pack()
    )


def test_two_equal_guidance_scales_equal_one(pipe):
    one, two = (generate(pipe, [0, 1], guidance_scale=scale) for scale in (3.0, (3.0, 3.0)))
    torch.testing.assert_close(one.pack(), two.pack(), atol=1e-5, rtol=1e-5)
    assert pipe.guidance_scale == (3.0, 3.0) and pipe.do_classifier_free_guidance
    apart = generate(pipe, [0, 1], guidance_scale=(3.0, 1.0))
    assert not torch.allclose(apart.dynamics, one.dynamics, atol=1e-3)


# --- conditioning inputs ---------------------------------------------------------------------------------------------


def images(clip: torch.Tensor) -> list[PIL.Image.Image]:
    return [PIL.Image.fromarray((frame.permute(1, 2, 0) * 255).round().byte().numpy()) for frame in clip]


@pytest.mark.parametrize("stream", STREAMS)
def test_clips_in_every_format_have_the_same_latent(pipe, clips, stream):
    vae, device = pipe.vae, torch.device("cpu")
    clips = (clips * 255).round() / 255
    with torch.no_grad():
        latents = vae.unpack(vae.encode(clips.transpose(1, 2) * 2 - 1).latent_dist.mode())
    expected = getattr(latents, stream).flatten(1)
    forms = {
        "tensor": clips,
        "array": clips.permute(0, 1, 3, 4, 2).numpy(),
        "images": [images(clip) for clip in clips],
        "latents": latents,
        "latent": getattr(latents, stream),
    }
    with torch.no_grad():
        for given in forms.values():
            torch.testing.assert_close(encode_conditioning(given, stream, vae, device), expected, atol=1e-5, rtol=1e-5)
        alone = [encode_conditioning(given, stream, vae, device) for given in (clips[0], images(clips[0]))]
    for latent in alone:
        torch.testing.assert_close(latent, expected[:1], atol=1e-5, rtol=1e-5)


def test_an_image_is_repeated_for_the_whole_clip(pipe, clips):
    still = clips[:1, :1]
    whole = still.expand(-1, clips.shape[1], -1, -1, -1)
    [image] = images(still[0])
    with torch.no_grad():
        expected = encode_conditioning(whole, "structure", pipe.vae, torch.device("cpu"))
        for given in (still, still[0], still.permute(0, 1, 3, 4, 2).numpy()):
            assert torch.equal(encode_conditioning(given, "structure", pipe.vae, torch.device("cpu")), expected)
        latent = encode_conditioning(image, "structure", pipe.vae, torch.device("cpu"))
        large = image.resize((image.width * 3, image.height * 2), PIL.Image.Resampling.NEAREST)
        cut = encode_conditioning(large, "structure", pipe.vae, torch.device("cpu"))
    torch.testing.assert_close(latent, expected, atol=0.05, rtol=0.05)
    assert cut.shape == latent.shape


def test_one_condition_serves_all_videos(pipe, latents):
    one = TwinLatents(latents.structure[:1], latents.dynamics[:1])
    assert generate(pipe, [0, 1, 2], structure=one).structure.shape[0] == 3
    assert generate(pipe, 0, structure=latents).structure.shape[0] == 2
    assert generate(pipe, structure=latents, dynamics=one, dynamics_strength=0.5).structure.shape[0] == 2
    out = generate(pipe, [0, 1], structure=latents, num_videos_per_prompt=2).structure
    torch.testing.assert_close(out, latents.structure.repeat_interleave(2, dim=0), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="structure has length 2, but the batch size is 3: pass one, or 3"):
        generate(pipe, [0, 1, 2], structure=latents)


STRUCTURE_SHAPE = (4, 3, 2, 2)  # of the tiny autoencoder
WRONG = {
    "path": ("clip.mp4", "structure must be clips, images or latents, not str"),
    "empty": ([], "structure: a list must hold PIL images"),
    "numbers": ([1, 2], "structure: a list must hold PIL images"),
    "bytes": (
        np.zeros((1, 16, 64, 64, 3), np.uint8),
        r"structure: frames must be floats in \[0, 1\], not torch.uint8",
    ),
    "signed": (lambda clips: clips * 2 - 1, r"structure: frames must be in \[0, 1\], not in \[-"),
    "frames": (lambda clips: clips[:, :2], "structure must be clips .* frames or one frame"),
    "size": (lambda clips: clips[..., :-1], "structure must be clips .* but has shape"),
    "flat": (torch.zeros(5), r"structure must be clips .* but has shape \(5,\)"),
    "lengths": (lambda clips: [images(clips[0]), images(clips[0])[:-1]], "structure: all clips must have the same"),
    "not finite": (lambda clips: clips * torch.nan, "structure contains NaN or infinite values"),
    "latent not finite": (torch.full((1, *STRUCTURE_SHAPE), torch.nan), "structure contains NaN or infinite values"),
    "other latents": (TwinLatents(torch.zeros(1, 1, 1, 1, 1), torch.zeros(1, 1, 1, 1)), "structure latents must be"),
}


@pytest.mark.parametrize("name", WRONG)
def test_invalid_conditioning_is_refused(pipe, clips, name):
    given, sentence = WRONG[name]
    with pytest.raises(ValueError, match=sentence):
        generate(pipe, 0, structure=given(clips) if callable(given) else given)


def test_values_out_of_range_are_refused(pipe, latents, vae):
    with pytest.raises(ValueError, match=r"dynamics_strength must be between 0 and 1, not 1\.5"):
        generate(pipe, 0, dynamics=latents, dynamics_strength=1.5)
    with pytest.raises(ValueError, match=r"guidance_scale must be a number or .structure, dynamics."):
        generate(pipe, 0, guidance_scale=(1.0, 2.0, 3.0))
    alone = VidTwinPipeline(None, pipe.transformer, pipe.scheduler)
    with pytest.raises(ValueError, match="structure: conditioning requires a vae"):
        alone(0, structure=latents, output_type="latent", num_inference_steps=1)


# --- images ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def image_pipe(vae, make_transformer) -> VidTwinPipeline:
    pipeline = VidTwinPipeline(vae, make_transformer(image_conditioning=True), default_scheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_both_streams_depend_on_the_image(image_pipe, clips):
    free, animated = generate(image_pipe, [0, 2]), generate(image_pipe, [0, 2], image=clips[:, :1])
    for stream in STREAMS:
        assert (getattr(free, stream) - getattr(animated, stream)).abs().max() > 1e-2
    of_clips = generate(image_pipe, [0, 2], image=clips)  # their first frames
    assert torch.equal(of_clips.pack(), animated.pack())
    guided = generate(image_pipe, [0, 2], image=clips[:, :1], guidance_scale=3.0)
    assert guided.structure.shape == animated.structure.shape


def test_the_image_is_the_normalized_structure_of_a_still_clip(image_pipe, clips, monkeypatch):
    seen, forward = [], image_pipe.transformer.forward
    monkeypatch.setattr(image_pipe.transformer, "forward", lambda *a, **k: seen.append(k) or forward(*a, **k))
    generate(image_pipe, 1, image=clips[:1], num_videos_per_prompt=2, num_inference_steps=1)
    still = clips[:1, :1].expand_as(clips[:1]).transpose(1, 2) * 2 - 1
    latents = image_pipe.vae.unpack(image_pipe.vae.encode(still).latent_dist.mode()).structure.flatten(1)
    expected = (latents - 0.1) / 2.0  # the statistics of the autoencoder
    torch.testing.assert_close(seen[0]["image_latents"], expected.expand(4, -1))  # two videos, guided
    encoded = generate(image_pipe, 1, image=image_pipe.vae.unpack(latents_of(image_pipe, still)).structure)
    assert torch.equal(encoded.pack(), generate(image_pipe, 1, image=clips[:1]).pack())


def test_a_clip_shows_its_image_where_it_does_not_move(image_pipe, clips):
    settings = dict(output_type="pt", num_videos_per_prompt=2, image=clips[:, :1])
    shown = [
        image_pipe([0, 2], num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0), **settings, **option)
        for option in ({}, {"overlay_image": False})
    ]
    overlaid, decoded = (output.frames for output in shown)
    images = clips[:, 0].repeat_interleave(2, dim=0)
    torch.testing.assert_close(overlaid[:, 0], images)
    assert (decoded[:, 0] - images).abs().mean() > 0.01
    expected = apply_overlay(2 * decoded.transpose(1, 2) - 1, 2 * images - 1).transpose(1, 2) / 2 + 0.5
    torch.testing.assert_close(overlaid, expected, atol=2e-3, rtol=0)  # decoded frames were limited to [0, 1]


def test_one_image_serves_all_clips_and_latents_are_not_shown(image_pipe, clips):
    settings = dict(output_type="pt", num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0))
    frames = image_pipe([0, 1, 2], image=clips[:1, :1], **settings).frames
    torch.testing.assert_close(frames[:, 0], clips[:1, 0].expand(3, -1, -1, -1))
    still = clips[:1, :1].expand_as(clips[:1]).transpose(1, 2) * 2 - 1
    latent = image_pipe.vae.unpack(latents_of(image_pipe, still)).structure
    by_latent = [
        image_pipe(1, image=latent, **{**settings, "generator": torch.Generator().manual_seed(0)}, **option).frames
        for option in ({}, {"overlay_image": False})
    ]
    assert torch.equal(*by_latent)


def latents_of(pipe: VidTwinPipeline, video: torch.Tensor) -> torch.Tensor:
    return pipe.vae.encode(video).latent_dist.mode()


@pytest.mark.parametrize("name", WRONG)
def test_errors_about_an_image_name_that_argument(image_pipe, clips, name):
    given, sentence = WRONG[name]
    with pytest.raises(ValueError, match=sentence.replace("structure", "image")) as error:
        generate(image_pipe, 0, image=given(clips) if callable(given) else given)
    assert "structure" not in str(error.value)


def test_images_need_a_model_for_them(pipe, image_pipe, clips):
    with pytest.raises(
        ValueError, match="image: this pipeline's transformer has no image_conditioning; pass structure"
    ):
        pipe(0, image=clips[:1])
    with pytest.raises(ValueError, match="image has length 2, but the batch size is 3: pass one, or 3"):
        image_pipe([0, 1, 2], image=clips)


# --- intervals -------------------------------------------------------------------------------------------------------


@pytest.fixture
def jumps(vae, make_transformer):
    """A pipeline whose transformer has interval conditioning, and what it is called with."""
    transformer = make_transformer(interval_conditioning=True, self_conditioning=True)
    pipeline = VidTwinPipeline(vae, transformer, default_scheduler("v_prediction"))
    pipeline.set_progress_bar_config(disable=True)
    calls = []

    def record(_, args, kwargs):
        assert args[3] is None, "jumps are trained without self-conditioning"
        calls.append((len(args[0]), args[1][0].tolist(), kwargs["target_timestep"][0].tolist()))

    hook = transformer.register_forward_pre_hook(record, with_kwargs=True)
    yield pipeline, calls
    hook.remove()


def test_each_step_knows_the_timestep_it_leads_to(jumps):
    pipeline, calls = jumps
    generate(pipeline, [0, 1], num_inference_steps=4)
    assert calls == [(2, 999, 749), (2, 749, 499), (2, 499, 249), (2, 249, -1)]  # without guidance by default


def test_a_stream_that_waits_has_no_interval(jumps, latents):
    pipeline, calls = jumps
    generate(pipeline, 0, dynamics=latents, dynamics_strength=0.5, num_inference_steps=4)
    assert [call[1:] for call in calls] == [
        ([999, 499], [749, 499]),
        ([749, 499], [499, 499]),
        ([499, 499], [249, 249]),
        ([249, 249], [-1, -1]),
    ]
    calls.clear()
    generate(pipeline, 0, dynamics=latents, num_inference_steps=1)
    assert calls == [(2, [999, 0], [-1, 0])]


def test_guidance_of_jumps_is_possible_with_a_warning(jumps, caplog):
    """Jumps may have been trained without guidance, which the config does not say."""
    pipeline, calls = jumps
    generate(pipeline, [0, 1], num_inference_steps=1)
    generate(pipeline, [0, 1], num_inference_steps=1, guidance_scale=1.0)
    assert not caplog.records
    generate(pipeline, [0, 1], num_inference_steps=1, guidance_scale=2.0)
    assert calls[-1] == (4, 999, -1)
    pipeline.register_modules(guider=ClassifierFreeGuidance(guidance_scale=2.0))
    generate(pipeline, [0, 1], num_inference_steps=1)
    messages = [record.getMessage() for record in caplog.records if record.name == "pipelines.guidance"]
    assert len(messages) == 2 and all("further guidance distorts the clips" in message for message in messages)


def test_jumps_refuse_other_solvers(jumps):
    pipeline, _ = jumps
    with pytest.raises(ValueError, match="DDIM with eta 1 does not support a transformer with interval_conditioning"):
        generate(pipeline, 0, eta=1.0)
