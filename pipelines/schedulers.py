"""Schedulers: the default ones, other solvers for them, their timesteps, noise levels and clean estimates.

Latents are packed (B, L) tensors, so every Diffusers scheduler works on them elementwise.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin

PREDICTION_TYPES = ("sample", "epsilon", "v_prediction", "flow_prediction")
JUMP_TYPES = ("v_prediction", "flow_prediction")  # of models that can learn steps of any length
DEFAULT_STEPS, FEW_STEPS = 50, 4  # denoising steps without and with interval conditioning


def default_scheduler(
    prediction_type: str = "sample", **overrides: Any
) -> DDIMScheduler | FlowMatchEulerDiscreteScheduler:
    """Build the default scheduler for training and sampling, with 1000 training steps.

    Args:
        prediction_type: "sample" (x0, the paper), "epsilon" or "v_prediction" for DDIM; "flow_prediction", the
            velocity noise - clean, for `FlowMatchEulerDiscreteScheduler`.
        overrides: further arguments of the scheduler, such as `beta_schedule` or `rescale_betas_zero_snr`.

    Raises:
        ValueError: if the prediction type or an override is unknown, or "epsilon" is combined with zero terminal SNR.
    """
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}, not {prediction_type!r}.")
    if prediction_type == "flow_prediction":
        return _build_scheduler(FlowMatchEulerDiscreteScheduler, {"num_train_timesteps": 1000, **overrides})
    # The paper states no noise schedule. Sampling starts from pure noise, so training ends there (zero terminal SNR;
    # W.A.L.T's ablation: FVD 61 with, 84 without). The cosine schedule destroys small, barely redundant latents less
    # early than a linear one. The noise of pure noise does not determine x0, so "epsilon" has DDPM's linear schedule,
    # which ends before pure noise.
    pure_noise_at_end = prediction_type != "epsilon"
    config = {
        "num_train_timesteps": 1000,
        "beta_schedule": "squaredcos_cap_v2" if pure_noise_at_end else "linear",
        "rescale_betas_zero_snr": pure_noise_at_end,
        "timestep_spacing": "trailing",  # the first step is the last training step
        "clip_sample": False,  # normalized latents leave [-1, 1]
        "prediction_type": prediction_type,
        **overrides,
    }
    if prediction_type == "epsilon" and config["rescale_betas_zero_snr"]:
        raise ValueError(
            "prediction_type epsilon cannot have zero terminal SNR, where noise does not determine the clean latents: "
            "use v_prediction or sample, or disable zero terminal SNR."
        )
    return _build_scheduler(DDIMScheduler, config)


def _build_scheduler(scheduler_class: type[SchedulerMixin], config: dict[str, Any]) -> SchedulerMixin:
    try:
        return scheduler_class(**config)
    except (TypeError, NotImplementedError) as error:
        raise ValueError(f"Invalid arguments for {scheduler_class.__name__}: {error}") from error


def other_solver(scheduler: SchedulerMixin, solver_class: type[SchedulerMixin], **overrides: Any) -> SchedulerMixin:
    """Build another Diffusers solver with the noise schedule and the prediction type of a scheduler.

    `solver_class.from_config` alone does not translate flow matching, and solvers predict noise by default.

    Args:
        scheduler: the scheduler that the model was trained with; `pipeline.scheduler`.
        solver_class: such as `DPMSolverMultistepScheduler` or `UniPCMultistepScheduler`.
        overrides: arguments of the solver, such as `solver_order`.

    Raises:
        ValueError: if the solver does not support an override or the training's settings, such as flow matching or
            zero terminal SNR.
    """
    known = inspect.signature(solver_class).parameters
    required = {}
    if prediction_type_of(scheduler) != "flow_prediction":
        required["prediction_type"] = scheduler.config.prediction_type
        if scheduler.config.get("rescale_betas_zero_snr"):
            required["rescale_betas_zero_snr"] = True
    elif "prediction_type" in known:  # schedulers for flow matching only have none
        shift = scheduler.config.get("shift", scheduler.config.get("flow_shift", 1.0))
        required = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    for name in [*required, *overrides]:
        if name not in known:
            hint = ", which this model requires" if name in required else ": leave it out"
            raise ValueError(f"{solver_class.__name__} does not support {name}{hint}.")
    return solver_class.from_config(scheduler.config, **required, **overrides)


def prediction_type_of(scheduler: SchedulerMixin) -> str:
    """Return what a model predicts for this scheduler: one of `PREDICTION_TYPES`."""
    return scheduler.config.get("prediction_type", "flow_prediction")  # schedulers for flow matching have none


def noise_levels(scheduler: SchedulerMixin, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the noise levels at timesteps: (alpha, sigma) of noisy = alpha * clean + sigma * noise.

    Flow matching has sigma = timestep / 1000 and alpha = 1 - sigma; all others have alpha^2 + sigma^2 = 1.

    Args:
        scheduler: any Diffusers scheduler with `alphas_cumprod` or for flow matching.
        timestep: any shape, in [0, num_train_timesteps], or `clean_timestep`.

    Returns:
        Two float32 tensors of that shape.

    Raises:
        ValueError: if the scheduler does not state its noise levels.
    """
    if prediction_type_of(scheduler) == "flow_prediction":
        sigma = timestep.float() / scheduler.config.num_train_timesteps
        return 1 - sigma, sigma
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(f"{type(scheduler).__name__} does not state its noise levels (alphas_cumprod).")
    # Kept on the device, as in Diffusers' add_noise: training reads it in every step.
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(timestep.device)
    index = timestep.round().long()
    squared = scheduler.alphas_cumprod[index].masked_fill(index < 0, 1)
    return squared.sqrt(), (1 - squared).sqrt()


def clean_timestep(scheduler: SchedulerMixin) -> int:
    """Return the timestep of clean latents: 0 for flow matching, -1 for all others, whose timestep 0 has noise."""
    return 0 if prediction_type_of(scheduler) == "flow_prediction" else -1


def jump_coefficients(
    scheduler: SchedulerMixin, timestep: torch.Tensor, target_timestep: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (a, b) of a deterministic step: latents at the target timestep = a * latents - b * prediction.

    For v it is a step of DDIM, a rotation by the difference of the angles atan2(sigma, alpha): a is its cosine, b its
    sine (Salimans and Ho, arXiv 2202.00512, Appendix D). For the velocity of flow matching it is a step of Euler: a is
    1, b the difference of the noise levels.

    Args:
        scheduler: states the prediction type and the noise levels.
        timestep, target_timestep: of one shape, as `noise_levels` takes them.

    Raises:
        ValueError: if the prediction type is neither v nor flow.
    """
    prediction_type = prediction_type_of(scheduler)
    if prediction_type not in JUMP_TYPES:
        raise ValueError(f"A jump needs prediction_type {' or '.join(JUMP_TYPES)}, not {prediction_type}.")
    alpha, sigma = noise_levels(scheduler, timestep)
    target_alpha, target_sigma = noise_levels(scheduler, target_timestep)
    if prediction_type == "flow_prediction":
        return torch.ones_like(sigma), sigma - target_sigma
    return alpha * target_alpha + sigma * target_sigma, sigma * target_alpha - alpha * target_sigma


def default_steps(transformer_config: Mapping[str, Any]) -> int:
    """Return the number of denoising steps to sample with if none is chosen, few with interval conditioning."""
    return FEW_STEPS if transformer_config.get("interval_conditioning") else DEFAULT_STEPS


def check_jumps(scheduler: SchedulerMixin, eta: float = 0.0) -> None:
    """Raise a `ValueError` if a scheduler's steps are not those of `jump_coefficients`."""
    if not isinstance(scheduler, DDIMScheduler | FlowMatchEulerDiscreteScheduler) or eta:
        solver = f"DDIM with eta {eta:g}" if isinstance(scheduler, DDIMScheduler) else type(scheduler).__name__
        raise ValueError(
            f"{solver} does not support a transformer with interval_conditioning; use DDIMScheduler with eta 0, or "
            "FlowMatchEulerDiscreteScheduler."
        )


def retrieve_timesteps(
    scheduler: SchedulerMixin,
    num_inference_steps: int,
    timesteps: list[int] | None = None,
    sigmas: list[float] | None = None,
) -> torch.Tensor:
    """Set the scheduler's timesteps, or a custom schedule of timesteps or sigmas, and return them, on the CPU.

    Schedulers read their timesteps in every step; on a GPU each read would wait for all queued work.

    Raises:
        ValueError: if both custom schedules are passed, or the scheduler does not support them.
    """
    if timesteps is not None and sigmas is not None:
        raise ValueError("Pass either timesteps or sigmas, not both.")
    custom = {k: v for k, v in {"timesteps": timesteps, "sigmas": sigmas}.items() if v is not None}
    for name in custom:
        if name not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ValueError(f"{type(scheduler).__name__} does not support custom {name}.")
    scheduler.set_timesteps(**(custom or {"num_inference_steps": num_inference_steps}), device="cpu")
    return scheduler.timesteps


def estimate_clean(
    scheduler: SchedulerMixin, prediction: torch.Tensor, timestep: torch.Tensor, model_input: torch.Tensor
) -> torch.Tensor:
    """Compute the clean latents (B, L) that a prediction implies.

    Args:
        scheduler: states the prediction type and the noise levels.
        prediction: output of the model (B, L).
        timestep: 0-d, (B,), or (B, L) with one for each value (`pipelines.latents.spread_streams`).
        model_input: noisy latents (B, L) from which the model predicted.

    Raises:
        ValueError: if the prediction type is unknown or the scheduler does not state its noise levels.
    """
    prediction_type = prediction_type_of(scheduler)
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"No clean estimate for prediction_type {prediction_type!r}.")
    if prediction_type == "sample":
        return prediction
    # Scaled model inputs preserve the variance, also where the scheduler's own latents do not.
    alpha, sigma = noise_levels(scheduler, timestep if timestep.ndim == 2 else timestep[..., None])
    if prediction_type == "flow_prediction":
        return model_input - sigma * prediction
    if prediction_type == "v_prediction":
        return alpha * model_input - sigma * prediction
    return (model_input - sigma * prediction) / alpha.clamp(min=1e-4)
