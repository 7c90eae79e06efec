"""Schedules of streams that wait, and `structure_delay`."""

from __future__ import annotations

import diffusers
import pytest
import torch
from stub import denoise

from pipelines import VidTwinPipeline, default_scheduler
from pipelines.latents import spread_streams
from pipelines.rollout import rollout
from pipelines.schedulers import noise_levels, other_solver
from pipelines.stream_schedule import StreamSchedule

TIMESTEPS = torch.tensor([9, 6, 3])
STEPS, SIZES = 8, (24, 16)


def generate(pipe, *args, seed=0, **kwargs):
    settings = {"num_inference_steps": 4, "output_type": "latent", "generator": torch.Generator().manual_seed(seed)}
    return pipe(*args, **{**settings, **kwargs}).frames


# --- the schedule ----------------------------------------------------------------------------------------------------


def moves(schedule: StreamSchedule) -> list[list[int | None]]:
    """The timestep of each stream at each step."""
    steps = range(len(schedule))
    rows = [[schedule.at(stream, step) for stream in range(len(schedule.waits))] for step in steps]
    return [[None if t is None else int(t) for t in row] for row in rows]


def test_shared_steps():
    schedule = StreamSchedule(TIMESTEPS)
    assert moves(schedule) == [[9], [6], [3]]
    assert torch.equal(schedule.model_timesteps(), TIMESTEPS)
    assert schedule.target_timesteps(-1).tolist() == [6, 3, -1]
    assert [int(schedule.latest(step)) for step in range(3)] == [9, 6, 3]


@pytest.mark.parametrize(
    ("strengths", "model", "targets"),
    [
        ((1, 1), [[9, 9], [6, 6], [3, 3]], [[6, 6], [3, 3], [-1, -1]]),
        ((0.67, 0), [[6, 0], [6, 0], [3, 0]], [[6, 0], [3, 0], [-1, 0]]),
        ((0, 0), [[0, 0], [0, 0], [0, 0]], [[0, 0], [0, 0], [0, 0]]),
    ],
)
def test_steps_of_given_streams(strengths, model, targets):
    schedule = StreamSchedule.from_strengths(TIMESTEPS, strengths)
    assert schedule.model_timesteps().tolist() == model
    assert schedule.target_timesteps(-1).tolist() == targets
    assert [int(schedule.latest(step)) for step in range(len(schedule))] == [9, 6, 3]
    assert moves(schedule) == [
        [m if i >= wait else None for m, wait in zip(row, schedule.waits, strict=True)] for i, row in enumerate(model)
    ]


def test_strengths_are_fractions_of_the_steps():
    assert StreamSchedule.from_strengths(torch.arange(50), (0.0, 0.5)).waits == (50, 25)


def test_steps_of_a_delayed_structure():
    schedule = StreamSchedule.with_structure_delay(TIMESTEPS, 0.67)
    assert moves(schedule) == [[None, 9], [None, 6], [9, 3], [6, None], [3, None]]
    assert schedule.model_timesteps().tolist() == [[9, 9], [9, 6], [9, 3], [6, 0], [3, 0]]
    assert schedule.target_timesteps(-1).tolist() == [[9, 6], [9, 3], [6, -1], [3, 0], [-1, 0]]
    assert [int(schedule.latest(step)) for step in range(len(schedule))] == [9, 9, 9, 6, 3]
    assert schedule.is_any([True, False, False]) == [True, False, True, False, False]


# --- structure_delay -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [None, diffusers.DPMSolverMultistepScheduler, diffusers.UniPCMultistepScheduler])
@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction", "flow_prediction"])
@pytest.mark.parametrize("self_conditioning", [False, True])
def test_streams_that_ignore_each_other_end_as_without_delay(prediction_type, solver, self_conditioning):
    scheduler = default_scheduler(prediction_type)
    scheduler = scheduler if solver is None else other_solver(scheduler, solver)
    noise = torch.randn(2, sum(SIZES), generator=torch.Generator().manual_seed(0))

    def model_fn(noisy, timestep, estimate):
        levels = timestep if timestep.ndim == 1 else spread_streams(timestep, SIZES)
        alpha, sigma = noise_levels(scheduler, levels if levels.ndim == 2 else levels[:, None])
        return alpha * noisy.tanh() - sigma * noisy + (0 if estimate is None else 0.1 * estimate)

    def run(delay: float) -> torch.Tensor:
        options = {"self_conditioning": self_conditioning, "structure_delay": delay}
        return denoise(model_fn, scheduler, noise, STEPS, SIZES, **options)

    expected = run(0.0)
    for delay in (0.25, 1.0):
        out = run(delay)
        torch.testing.assert_close(out[:, SIZES[0] :], expected[:, SIZES[0] :])
        if not self_conditioning:  # its first estimate is made while structure waits
            torch.testing.assert_close(out[:, : SIZES[0]], expected[:, : SIZES[0]])


def test_structure_waits_as_noise_and_dynamics_clean():
    noise = torch.randn(2, sum(SIZES), generator=torch.Generator().manual_seed(0))
    inputs = []

    def model_fn(noisy, timestep, estimate):
        inputs.append((noisy, timestep))
        return 0.3 * noisy

    out = denoise(model_fn, default_scheduler(), noise, 4, SIZES, structure_delay=0.5)
    first = inputs[0][1][0, 0]
    assert len(inputs) == 6
    for noisy, timestep in inputs[:3]:
        assert torch.equal(noisy[:, : SIZES[0]], noise[:, : SIZES[0]]) and (timestep[:, 0] == first).all()
    for noisy, timestep in inputs[4:]:
        assert torch.equal(noisy[:, SIZES[0] :], out[:, SIZES[0] :]) and (timestep[:, 1] == 0).all()
    assert not torch.equal(inputs[3][0][:, : SIZES[0]], noise[:, : SIZES[0]])


def test_a_delay_of_less_than_half_a_step_changes_nothing(pipe):
    expected = generate(pipe, [0, 2])
    torch.testing.assert_close(generate(pipe, [0, 2], structure_delay=0.1), expected)
    assert torch.equal(generate(pipe, [0, 2], structure_delay=0.0), expected)
    assert not torch.allclose(generate(pipe, [0, 2], structure_delay=0.25), expected, atol=1e-3)


def test_structure_sees_the_motion_and_dynamics_only_noise(pipe):
    """Dynamics are done before structure begins, so what guidance does to structure cannot reach them."""

    def run(guidance: tuple[float, float], delay: float) -> tuple[torch.Tensor, torch.Tensor]:
        return generate(pipe, 0, guidance_scale=guidance, structure_delay=delay).split(pipe._stream_sizes, dim=1)

    for delay, reaches in ((1.0, False), (0.0, True)):
        pairs = zip(run((1.0, 3.0), delay), run((6.0, 3.0), delay), strict=True)
        changes = [not torch.allclose(a, b, atol=1e-4) for a, b in pairs]
        assert changes == [True, reaches]


def test_callbacks_get_the_timestep_of_structure(pipe):
    seen = []
    callback = lambda pipeline, step, timestep, tensors: seen.append((step, int(timestep))) or {}  # noqa: E731
    generate(pipe, 0, structure_delay=0.5, callback_on_step_end=callback)
    steps = pipe.scheduler.timesteps.tolist()
    assert seen == list(enumerate([steps[0], steps[0], *steps])) and pipe.num_timesteps == 6


@pytest.mark.parametrize("interval", [(0.0, 0.4), (0.6, 1.0)])
def test_steps_are_guided_where_one_stream_is_in_the_interval(pipe, interval):
    rows = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    generate(pipe, 0, structure_delay=0.25, guidance_interval=interval, guidance_scale=3.0)
    hook.remove()
    assert rows == ([1, 1, 1, 2, 2] if interval[0] == 0 else [2, 2, 2, 1, 1])


def test_a_model_with_an_image_takes_a_delay(vae, make_transformer):
    pipe = VidTwinPipeline(vae, make_transformer(image_conditioning=True), default_scheduler())
    pipe.set_progress_bar_config(disable=True)
    channels, _, height, width = vae.clip_shape
    images = torch.rand(2, 1, channels, height, width)
    a, b = generate(pipe, 0, image=images, structure_delay=0.5)
    assert not torch.allclose(a, b, atol=1e-3)


def test_roll_outs_delay_the_first_window_only(pipe, vae):
    options = {"output_type": "pt", "num_inference_steps": 4}
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    length = vae.clip_shape[1]
    video = rollout(pipe, length + 1, 0, structure_delay=0.5, generator=generators[0], num_inference_steps=4)
    first = pipe(0, structure_delay=0.5, generator=generators[1], **options).frames
    assert torch.equal(video[:, : length - 2], first[:, : length - 2]) and video.shape[1] == length + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structure_delay": 1.5}, "structure_delay must be between 0 and 1, not 1.5"),
        ({"structure_delay": True}, "structure_delay must be a number, not True"),
        ({"structure_delay": float("nan")}, "structure_delay must be between 0 and 1, not nan"),
        (
            {"structure_delay": 0.5, "dynamics": torch.zeros(1)},
            "of both streams, but `dynamics` is given",
        ),
    ],
)
def test_bad_delays_are_refused(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        generate(pipe, 0, **options)


def test_a_solver_with_scaled_latents_takes_no_delay(pipe):
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="does not support conditioning or structure_delay"):
        generate(pipe, 0, structure_delay=0.5)


def test_an_autoencoder_with_one_latent_takes_no_delay():
    with pytest.raises(ValueError, match="structure_delay requires an autoencoder with a dynamics latent"):
        denoise(lambda x, t, _: x, default_scheduler(), torch.randn(2, 8), STEPS, (8, 0), structure_delay=0.5)
