"""Schedulers, guidance and normalization, and the denoising loop with every scheduler."""

from __future__ import annotations

import diffusers
import pytest
import torch
from stub import denoise

from pipelines.guidance import apply_guidance, find_guided_steps
from pipelines.latents import denormalize_latents, normalize_latents, spread_streams
from pipelines.schedulers import (
    PREDICTION_TYPES,
    check_jumps,
    clean_timestep,
    default_scheduler,
    estimate_clean,
    jump_coefficients,
    noise_levels,
    other_solver,
    prediction_type_of,
    retrieve_timesteps,
)

SHAPE = (3, 40)
DISCRETE = {"clip_sample": False, "timestep_spacing": "trailing"}

SCHEDULERS = {
    "ddim-x0": lambda: default_scheduler(),
    "ddim-v": lambda: default_scheduler("v_prediction"),
    "ddim-epsilon": lambda: default_scheduler("epsilon"),
    "ddim-linear-v": lambda: default_scheduler("v_prediction", beta_schedule="scaled_linear"),
    "ddim-x0-stops-short": lambda: default_scheduler(rescale_betas_zero_snr=False),
    "flow": lambda: default_scheduler("flow_prediction"),
    "ddpm-x0": lambda: diffusers.DDPMScheduler(prediction_type="sample", **DISCRETE),
    "dpm++-x0": lambda: diffusers.DPMSolverMultistepScheduler.from_config(default_scheduler().config),
    "dpm++-epsilon": lambda: diffusers.DPMSolverMultistepScheduler(prediction_type="epsilon"),
    "dpm++-sde": lambda: diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    "unipc-x0": lambda: diffusers.UniPCMultistepScheduler.from_config(default_scheduler().config),
    "unipc-epsilon": lambda: diffusers.UniPCMultistepScheduler(prediction_type="epsilon"),
    "euler-x0": lambda: diffusers.EulerDiscreteScheduler.from_config(default_scheduler().config),
    "euler-v": lambda: diffusers.EulerDiscreteScheduler(prediction_type="v_prediction"),
    "heun-epsilon": lambda: diffusers.HeunDiscreteScheduler(),
    "flow-euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
    "flow-euler-shifted": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
}


def oracle(scheduler, clean):
    """A model that knows the clean latents, in the units the scheduler asks for."""

    def model_fn(noisy, timestep, estimate):
        kind = scheduler.config.get("prediction_type", "flow")
        if kind == "sample":
            return clean
        if kind == "flow":
            return (noisy - clean) / (timestep / 1000)[:, None]
        alpha = scheduler.alphas_cumprod[timestep.round().long()].sqrt()[:, None]
        sigma = (1 - alpha.square()).sqrt()
        noise = (noisy - alpha * clean) / sigma
        return noise if kind == "epsilon" else alpha * noise - sigma * clean

    return model_fn


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_reaches_the_clean_latents(name):
    scheduler = SCHEDULERS[name]()
    clean = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)) * 2
    seen, generator = [], torch.Generator().manual_seed(0)
    out = denoise(
        oracle(scheduler, clean),
        scheduler,
        torch.randn(SHAPE, generator=generator),
        8,
        generator=generator,
        callback_on_step_end=lambda pipe, i, t, tensors: seen.append(i) or tensors,
    )
    torch.testing.assert_close(out, clean, atol=1e-4, rtol=1e-4)
    assert seen == list(range(len(scheduler.timesteps)))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_first_model_input_has_unit_variance(name):
    scheduler = SCHEDULERS[name]()
    noise, seen = torch.randn(SHAPE), []

    def model_fn(noisy, timestep, estimate):
        seen.append(noisy)
        return torch.zeros_like(noisy)

    denoise(model_fn, scheduler, noise, 8)
    torch.testing.assert_close(seen[0], noise, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_clean_estimates_equal_the_clean_latents(name):
    scheduler = SCHEDULERS[name]()
    clean = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    estimates = []

    def model_fn(noisy, timestep, estimate):
        estimates.append(estimate)
        return oracle(scheduler, clean)(noisy, timestep, estimate)

    denoise(model_fn, scheduler, torch.randn(SHAPE), 6, self_conditioning=True)
    assert estimates[0] is None
    for estimate in estimates[1:]:
        torch.testing.assert_close(estimate, clean, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_no_step_reads_values_from_the_device(name, unchecked):
    scheduler = SCHEDULERS[name]()
    shown = []

    def model_fn(noisy, timestep, estimate):
        shown.append(timestep)
        return noisy

    noise = torch.randn(SHAPE, device="meta")  # has no values: reading one is an error
    denoise(model_fn, scheduler, noise, 5, self_conditioning=True)
    assert all(timestep.device.type == "meta" for timestep in shown)


def test_thresholding_works_on_packed_latents():
    scheduler = default_scheduler(thresholding=True, sample_max_value=3.0)
    clean = torch.randn(SHAPE).clamp(-1, 1)
    out = denoise(oracle(scheduler, clean), scheduler, torch.randn(SHAPE), 4)
    torch.testing.assert_close(out, clean, atol=1e-5, rtol=1e-5)


def test_eta_adds_noise_from_the_generator():
    scheduler = default_scheduler("epsilon")
    noise = torch.randn(SHAPE)

    def run(eta, seed):
        generator = torch.Generator().manual_seed(seed)
        return denoise(lambda x, t, _: 0.5 * x, scheduler, noise, 4, generator=generator, eta=eta)

    assert torch.equal(run(0.0, 0), run(0.0, 1))
    assert torch.equal(run(1.0, 0), run(1.0, 0))
    assert not torch.equal(run(1.0, 0), run(1.0, 1))


@pytest.mark.parametrize("steps", [3, 10, 50])
def test_steps_with_eta_one_from_pure_noise_are_finite(steps):
    scheduler = default_scheduler()
    out = denoise(lambda x, t, _: torch.zeros_like(x), scheduler, torch.randn(SHAPE), steps, eta=1.0)
    torch.testing.assert_close(out, torch.zeros(SHAPE))


def test_default_scheduler_starts_in_pure_noise():
    scheduler = default_scheduler()
    assert scheduler.alphas_cumprod[-1] == 0
    assert retrieve_timesteps(scheduler, 7)[0] == 999
    assert default_scheduler("epsilon").alphas_cumprod[-1] > 1e-5  # noise prediction must be able to divide by it
    with pytest.raises(ValueError, match="prediction_type must be"):
        default_scheduler("flow")


def test_noise_prediction_from_pure_noise_is_refused():
    with pytest.raises(ValueError, match="epsilon cannot have zero terminal SNR"):
        default_scheduler("epsilon", rescale_betas_zero_snr=True)
    assert default_scheduler("epsilon", beta_schedule="squaredcos_cap_v2").alphas_cumprod[-1] > 0


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_an_unknown_option_of_the_default_scheduler_is_refused(prediction_type):
    assert prediction_type_of(default_scheduler(prediction_type)) == prediction_type
    with pytest.raises(ValueError, match="Invalid arguments for"):
        default_scheduler(prediction_type, beta_schedul="linear")


def test_zero_terminal_snr_is_optional():
    assert default_scheduler("v_prediction", rescale_betas_zero_snr=False).alphas_cumprod[-1] > 0
    assert default_scheduler("v_prediction", beta_schedule="linear").alphas_cumprod[-1] == 0


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_noise_levels_are_those_of_diffusers(prediction_type):
    scheduler = default_scheduler(prediction_type)
    clean, noise = torch.randn(2, 6, 10).unbind()
    timestep = torch.tensor([0, 1, 250, 500, 998, 999])
    if prediction_type == "flow_prediction":
        timestep = scheduler.timesteps[timestep]
        expected = scheduler.scale_noise(clean, timestep, noise)
    else:
        expected = scheduler.add_noise(clean, noise, timestep)
    alpha, sigma = noise_levels(scheduler, timestep)
    torch.testing.assert_close(alpha[:, None] * clean + sigma[:, None] * noise, expected)
    assert noise_levels(scheduler, timestep.reshape(3, 2))[0].shape == (3, 2)


def test_values_per_stream_expand_to_packed_latents():
    assert spread_streams(torch.tensor([1, 2]), (2, 3)).tolist() == [[1], [2]]
    spread = spread_streams(torch.tensor([[1, 2], [3, 4]]), (2, 3))
    assert spread.tolist() == [[1, 1, 2, 2, 2], [3, 3, 4, 4, 4]]


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_clean_estimates_take_a_timestep_per_value(prediction_type):
    scheduler = default_scheduler(prediction_type)
    clean, noise = torch.randn(2, 3, 5).unbind()
    timestep = spread_streams(torch.tensor([[100, 900], [500, 20], [7, 600]]), (2, 3))
    alpha, sigma = noise_levels(scheduler, timestep)
    prediction = {
        "sample": clean,
        "epsilon": noise,
        "v_prediction": alpha * noise - sigma * clean,
        "flow_prediction": noise - clean,
    }[prediction_type]
    estimate = estimate_clean(scheduler, prediction, timestep, alpha * clean + sigma * noise)
    torch.testing.assert_close(estimate, clean, rtol=1e-3, atol=1e-3)


def test_retrieve_timesteps():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    assert retrieve_timesteps(scheduler, 5, sigmas=[1.0, 0.5]).tolist() == [1000.0, 500.0]
    assert retrieve_timesteps(diffusers.DDPMScheduler(), 5, timesteps=[900, 3]).tolist() == [900, 3]
    with pytest.raises(ValueError, match="DDIMScheduler does not support custom timesteps"):
        retrieve_timesteps(default_scheduler(), 5, timesteps=[3])
    with pytest.raises(ValueError, match="not both"):
        retrieve_timesteps(scheduler, 5, timesteps=[3], sigmas=[0.3])


# --- fewer steps: solvers, and guidance in an interval --------------------------------------------------------------

SOLVERS = [diffusers.DPMSolverMultistepScheduler, diffusers.UniPCMultistepScheduler]


def ideal(scheduler, deviation):
    """A model of normally distributed clean latents, which knows their best estimate from noisy ones."""

    def model_fn(noisy, timestep, estimate):
        alpha, sigma = (level[:, None] for level in noise_levels(scheduler, timestep))
        clean = alpha * deviation**2 / ((alpha * deviation) ** 2 + sigma**2) * noisy
        noise = (noisy - alpha * clean) / sigma
        kind = prediction_type_of(scheduler)
        if kind == "flow_prediction":
            return noise - clean
        return {"sample": clean, "epsilon": noise, "v_prediction": alpha * noise - sigma * clean}[kind]

    return model_fn


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_solver_of_second_order_needs_fewer_steps(prediction_type, solver):
    """Of normal data the way from noise is known: it shrinks to the data's deviation."""
    noise, deviation = torch.randn(1, 2000, generator=torch.Generator().manual_seed(0)), 0.5

    def error(scheduler, steps):
        out = denoise(ideal(scheduler, deviation), scheduler, noise, steps)
        return (out - deviation * noise).abs().mean().item()

    first_order = default_scheduler(prediction_type)
    second_order = other_solver(first_order, solver)
    assert prediction_type_of(second_order) == prediction_type
    for steps in (10, 25):
        assert error(second_order, steps) < 0.75 * error(first_order, steps)
    assert error(second_order, 25) < error(first_order, 50)
    assert error(second_order, 100) < 2e-3


def test_another_solver_keeps_the_noise_schedule():
    theirs = other_solver(default_scheduler(), diffusers.UniPCMultistepScheduler, solver_order=3)
    assert theirs.config.solver_order == 3 and theirs.config.timestep_spacing == "trailing"
    torch.testing.assert_close(theirs.alphas_cumprod[:-1], default_scheduler().alphas_cumprod[:-1])
    shifted = other_solver(default_scheduler("flow_prediction", shift=3.0), diffusers.DPMSolverMultistepScheduler)
    assert shifted.config.flow_shift == 3.0
    again = other_solver(shifted, diffusers.UniPCMultistepScheduler)
    assert again.config.flow_shift == 3.0 and again.config.use_flow_sigmas
    heun = other_solver(default_scheduler("flow_prediction", shift=3.0), diffusers.FlowMatchHeunDiscreteScheduler)
    assert heun.config.shift == 3.0


@pytest.mark.parametrize(
    ("prediction_type", "solver", "overrides", "sentence"),
    [
        (
            "sample",
            diffusers.HeunDiscreteScheduler,
            {},
            "support rescale_betas_zero_snr, which this model requires",
        ),
        (
            "flow_prediction",
            diffusers.DDIMScheduler,
            {},
            "support use_flow_sigmas, which this model requires",
        ),
        ("sample", diffusers.FlowMatchEulerDiscreteScheduler, {}, "does not support prediction_type"),
        ("sample", diffusers.UniPCMultistepScheduler, {"order": 2}, "does not support order: leave it out"),
    ],
)
def test_unsupported_solvers_are_refused(prediction_type, solver, overrides, sentence):
    with pytest.raises(ValueError, match=sentence):
        other_solver(default_scheduler(prediction_type), solver, **overrides)


@pytest.mark.parametrize("solver", [None, *SOLVERS])
@pytest.mark.parametrize("prediction_type", ["sample", "flow_prediction"])
def test_a_guidance_interval_is_a_fraction_of_training_timesteps(prediction_type, solver):
    scheduler = default_scheduler(prediction_type)
    scheduler = other_solver(scheduler, solver) if solver else scheduler

    def steps(lower, upper, count=10):
        return find_guided_steps(scheduler, retrieve_timesteps(scheduler, count), (lower, upper))

    assert steps(0, 1) == [True] * 10
    assert steps(0.3, 0.3) == [False] * 10
    middle = steps(0.25, 0.75)
    assert middle == sorted(middle[:5]) + sorted(middle[5:], reverse=True) and sum(middle) in (4, 5)
    cuts = [0, 0.3, 0.5, 1]  # intervals that follow on each other share no step, and leave none out
    parts = [steps(*cut) for cut in zip(cuts, cuts[1:], strict=False)]
    assert [sum(step) for step in zip(*parts, strict=True)] == [1] * 10
    assert parts[0][-1] and parts[2][0], "the first step is the noisiest"


def test_bounds_on_the_grid_of_steps_are_exact():
    scheduler = default_scheduler()
    timesteps = retrieve_timesteps(scheduler, 10)
    assert timesteps.tolist() == list(range(999, 0, -100))
    assert find_guided_steps(scheduler, timesteps, (0.3, 0.7)) == [False] * 3 + [True] * 4 + [False] * 3
    assert find_guided_steps(scheduler, timesteps, (0.9995, 1.0)) == [True] + [False] * 9, "pure noise is 1"
    flow = default_scheduler("flow_prediction")
    timesteps = torch.tensor([1.0, 0.7, 0.5, 0.3]).nextafter(torch.tensor(2.0)) * 1000  # a little off, as sigmas are
    assert find_guided_steps(flow, timesteps, (0.3, 0.7)) == [False, True, True, False]


def test_schedulers_without_noise_levels_support_only_the_whole_interval():
    scheduler = diffusers.EDMEulerScheduler()
    timesteps = retrieve_timesteps(scheduler, 4)
    assert find_guided_steps(scheduler, timesteps, (0.0, 1.0)) == [True] * 4
    with pytest.raises(ValueError, match="EDMEulerScheduler does not support guidance_interval"):
        find_guided_steps(scheduler, timesteps, (0.1, 0.9))


def test_guidance_extrapolates_from_the_unconditional_prediction():
    conditional, unconditional = torch.randn(2, 2, 4)
    out = apply_guidance(torch.cat([conditional, unconditional]), 3.0, (3, 1))
    torch.testing.assert_close(out, unconditional + 3.0 * (conditional - unconditional))


def test_normalization_is_per_stream_and_invertible(vae):
    packed = torch.randn(5, vae.latent_size)
    n_structure = torch.Size(vae.structure_shape).numel()
    normal = normalize_latents(packed, vae)
    torch.testing.assert_close(normal[:, :n_structure], (packed[:, :n_structure] - 0.1) / 2.0)
    torch.testing.assert_close(normal[:, n_structure:], (packed[:, n_structure:] + 0.2) / 0.5)
    torch.testing.assert_close(denormalize_latents(normal, vae), packed)


def test_an_autoencoder_without_statistics_leaves_latents_alone():
    from autoencoder import AutoencoderKLVidTwin

    vae = AutoencoderKLVidTwin.from_preset("tiny-test")
    packed = torch.randn(2, vae.latent_size)
    assert torch.equal(normalize_latents(packed, vae), packed)
    assert torch.equal(denormalize_latents(packed, vae), packed)


def test_a_scheduler_without_noise_levels_cannot_self_condition():
    scheduler = diffusers.EDMEulerScheduler()
    with pytest.raises(ValueError, match="EDMEulerScheduler"):
        estimate_clean(scheduler, torch.zeros(1, 2), torch.tensor(1.0), torch.zeros(1, 2))


# --- jumps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "flow_prediction"])
def test_a_jump_is_a_step_of_the_scheduler(prediction_type, steps):
    torch.manual_seed(0)
    scheduler, latents = default_scheduler(prediction_type), torch.randn(SHAPE)
    timesteps = retrieve_timesteps(scheduler, steps)
    targets = [*timesteps[1:], torch.tensor(clean_timestep(scheduler))]
    for timestep, target in zip(timesteps, targets, strict=True):
        prediction = torch.randn(SHAPE)
        keep, remove = jump_coefficients(scheduler, timestep, target)
        expected = scheduler.step(prediction, timestep, latents).prev_sample
        latents = keep * latents - remove * prediction
        torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)


def test_solvers_whose_steps_are_not_jumps_are_refused():
    for scheduler in (default_scheduler("v_prediction"), default_scheduler("flow_prediction")):
        check_jumps(scheduler)
    unipc = other_solver(default_scheduler("v_prediction"), diffusers.UniPCMultistepScheduler)
    with pytest.raises(ValueError, match="UniPCMultistepScheduler does not support a transformer with interval_cond"):
        check_jumps(unipc)
    with pytest.raises(ValueError, match=r"DDIM with eta 0.5 does not support"):
        check_jumps(default_scheduler("v_prediction"), 0.5)
