"""Sampling as pure functions: noise, guidance, the denoising loop, and latents in and out of the DiT's units.

Latents are packed (B, L) tensors, so every Diffusers scheduler works on them elementwise.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

if TYPE_CHECKING:
    from autoencoder.autoencoder_kl_vidtwin import AutoencoderKLVidTwin

Generator = torch.Generator | list[torch.Generator] | None
# (latents (B, L), timestep (B,), estimate of the clean latents (B, L) or None) -> prediction (B, L)
ModelFn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


PREDICTION_TYPES = ("sample", "epsilon", "v_prediction", "flow_prediction")


def default_scheduler(
    prediction_type: str = "sample", **overrides: Any
) -> DDIMScheduler | FlowMatchEulerDiscreteScheduler:
    """The scheduler we train with and sample from, with 1000 training steps: DDIM, and for flow matching Euler's.

    Args:
        prediction_type: "sample" (x0, the paper), "epsilon" or "v_prediction" for DDIM; "flow_prediction", the
            velocity noise - clean, for `FlowMatchEulerDiscreteScheduler`.
        overrides: further arguments of the scheduler, such as `beta_schedule` or `rescale_betas_zero_snr`.

    Raises:
        ValueError: if the prediction type is none of these, the scheduler does not know an override, or noise is to be
            predicted where the noisy latents are nothing else (zero terminal SNR).
    """
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}, not {prediction_type!r}.")
    if prediction_type == "flow_prediction":
        return _build_scheduler(FlowMatchEulerDiscreteScheduler, {"num_train_timesteps": 1000, **overrides})
    # The paper states no noise schedule. Ending in pure noise is what sampling starts from (W.A.L.T's ablation: FVD 61
    # with zero terminal SNR, 84 without), and the cosine spares few, little redundant values from drowning early.
    # Noise prediction says nothing about x0 there, so it has DDPM's linear schedule, which stops short of it.
    pure_noise_at_end = prediction_type != "epsilon"
    config = {
        "num_train_timesteps": 1000,
        "beta_schedule": "squaredcos_cap_v2" if pure_noise_at_end else "linear",
        "rescale_betas_zero_snr": pure_noise_at_end,
        "timestep_spacing": "trailing",  # start at the last step, whatever the number of steps
        "clip_sample": False,  # normalized latents leave [-1, 1]
        "prediction_type": prediction_type,
        **overrides,
    }
    if prediction_type == "epsilon" and config["rescale_betas_zero_snr"]:
        raise ValueError(
            "prediction_type epsilon cannot have zero terminal SNR: the noise of pure noise says nothing of the clean "
            "latents; predict v_prediction or sample, or leave zero terminal SNR off."
        )
    return _build_scheduler(DDIMScheduler, config)


def _build_scheduler(scheduler_class: type[SchedulerMixin], config: dict[str, Any]) -> SchedulerMixin:
    try:
        return scheduler_class(**config)
    except (TypeError, NotImplementedError) as error:
        raise ValueError(f"{scheduler_class.__name__} cannot be made so: {error}") from error


def other_solver(scheduler: SchedulerMixin, solver_class: type[SchedulerMixin], **overrides: Any) -> SchedulerMixin:
    """Another of Diffusers' solvers for what a model was trained with: the same noise schedule and prediction type.

    `solver_class.from_config` alone leaves flow matching out, and the solvers' default is noise prediction.

    Args:
        scheduler: what the model was trained with; `pipeline.scheduler`.
        solver_class: such as `DPMSolverMultistepScheduler` or `UniPCMultistepScheduler`.
        overrides: arguments of the solver, such as `solver_order`.

    Raises:
        ValueError: if the solver does not know what the model was trained with, such as flow matching or zero
            terminal SNR, or does not know an override.
    """
    known = inspect.signature(solver_class).parameters
    needed = {}
    if prediction_type_of(scheduler) != "flow_prediction":
        needed["prediction_type"] = scheduler.config.prediction_type
        if scheduler.config.get("rescale_betas_zero_snr"):
            needed["rescale_betas_zero_snr"] = True
    elif "prediction_type" in known:  # schedulers of flow matching alone have none
        shift = scheduler.config.get("shift", scheduler.config.get("flow_shift", 1.0))
        needed = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    for name in [*needed, *overrides]:
        if name not in known:
            why = "this model was trained so" if name in needed else "leave it out"
            raise ValueError(f"{solver_class.__name__} knows no {name}: {why}.")
    return solver_class.from_config(scheduler.config, **needed, **overrides)


def prediction_type_of(scheduler: SchedulerMixin) -> str:
    """What a model predicts for this scheduler: one of `PREDICTION_TYPES`."""
    return scheduler.config.get("prediction_type", "flow_prediction")  # flow schedulers state none


def noise_levels(scheduler: SchedulerMixin, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Shares of signal and noise at timesteps: (alpha, sigma) of noisy = alpha * clean + sigma * noise.

    Flow matching goes straight, sigma = timestep / 1000 and alpha = 1 - sigma; all else preserves the variance.

    Args:
        timestep: any shape, in [0, num_train_timesteps].

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
    # Kept on the device, as Diffusers' add_noise does: training asks at every step.
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(timestep.device)
    squared = scheduler.alphas_cumprod[timestep.round().long()]
    return squared.sqrt(), (1 - squared).sqrt()


def spread_streams(values: torch.Tensor, sizes: tuple[int, int]) -> torch.Tensor:
    """A value per clip (B,) or per stream (B, 2), laid against packed latents: (B, 1) or (B, L).

    Args:
        sizes: values in the structure and in the dynamics latent; together L.
    """
    if values.ndim == 1:
        return values[:, None]
    return torch.cat([values[:, i : i + 1].expand(-1, size) for i, size in enumerate(sizes)], dim=1)


def normalize_latents(latents: torch.Tensor, vae: AutoencoderKLVidTwin) -> torch.Tensor:
    """Packed latents (B, L) of the autoencoder to the DiT's units: zero mean and unit deviation per stream.

    The statistics are `latents_mean` and `latents_std` of the autoencoder's config, [structure, dynamics] each; an
    autoencoder without them leaves latents as they are.
    """
    if vae.config.latents_mean is None:
        return latents
    mean, std = _per_value(vae.config.latents_mean, vae, latents), _per_value(vae.config.latents_std, vae, latents)
    return (latents - mean) / std


def denormalize_latents(latents: torch.Tensor, vae: AutoencoderKLVidTwin) -> torch.Tensor:
    """The inverse of `normalize_latents`: (B, L) ready for `vae.decode`."""
    if vae.config.latents_mean is None:
        return latents
    mean, std = _per_value(vae.config.latents_mean, vae, latents), _per_value(vae.config.latents_std, vae, latents)
    return latents * std + mean


def _per_value(per_stream: list[float], vae: AutoencoderKLVidTwin, like: torch.Tensor) -> torch.Tensor:
    sizes = (math.prod(vae.structure_shape), math.prod(vae.dynamics_shape))
    return torch.cat([like.new_full((size,), value) for size, value in zip(sizes, per_stream, strict=True)])


@dataclass(frozen=True)
class GivenStreams:
    """Streams that do not begin as noise.

    Args:
        clean: the given latents, packed and normalized (B, L); for a stream that begins at once, anything.
        begins: the step at which structure and dynamics begin to be denoised, from `stream_begins`.
        sizes: values in the structure and in the dynamics latent; together L.
        known: values (L,) that are kept while the rest of their stream is made to fit, as RePaint does (Lugmayr et
            al., arXiv 2201.09865).
    """

    clean: torch.Tensor
    begins: tuple[int, int]
    sizes: tuple[int, int]
    known: torch.Tensor | None = None

    def start(self, scheduler: SchedulerMixin, timesteps: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Latents (B, L) to start from: of each stream noise, what is given with noise, or what is given.

        Args:
            timesteps: (N, 2), from `stream_timesteps`.
            noise: standard normal (B, L).
        """
        alpha, sigma = noise_levels(scheduler, timesteps[0])
        streams = []
        for i, (clean, drawn) in enumerate(
            zip(self.clean.split(self.sizes, 1), noise.split(self.sizes, 1), strict=True)
        ):
            if 0 < self.begins[i] < len(timesteps):
                streams.append(alpha[i] * clean + sigma[i] * drawn)
            else:
                streams.append(clean if self.begins[i] else drawn)
        return torch.cat(streams, dim=1)

    def imposed(
        self, scheduler: SchedulerMixin, timestep: torch.Tensor | None, latents: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """Latents (B, L) with the known values as they are at a timestep (2,), or clean where that is None."""
        if self.known is None:
            return latents
        if timestep is None:
            return torch.where(self.known, self.clean, latents)
        alpha, sigma = (spread_streams(level, self.sizes) for level in noise_levels(scheduler, timestep[None]))
        return torch.where(self.known, alpha * self.clean + sigma * noise, latents)


def retrieve_timesteps(
    scheduler: SchedulerMixin,
    num_inference_steps: int,
    timesteps: list[int] | None = None,
    sigmas: list[float] | None = None,
) -> torch.Tensor:
    """Set the scheduler's timesteps, or a custom schedule of them or of sigmas, and return them, on the CPU.

    There because schedulers look at them in every step, and a look at a GPU's waits for all it has been given to do.

    Raises:
        ValueError: if both custom schedules are given, or the scheduler takes none of that kind.
    """
    if timesteps is not None and sigmas is not None:
        raise ValueError("Give timesteps or sigmas, not both.")
    custom = {k: v for k, v in {"timesteps": timesteps, "sigmas": sigmas}.items() if v is not None}
    for name in custom:
        if name not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ValueError(f"{type(scheduler).__name__} does not take custom {name}.")
    scheduler.set_timesteps(**(custom or {"num_inference_steps": num_inference_steps}), device="cpu")
    return scheduler.timesteps


def guidance_steps(scheduler: SchedulerMixin, timesteps: torch.Tensor, interval: tuple[float, float]) -> list[bool]:
    """Whether guidance acts at each step: where the step's noise level lies in an interval.

    Guidance at high noise costs variety and at low noise does nothing (Kynkäänniemi et al., arXiv 2404.07724).

    Args:
        timesteps: `scheduler.timesteps`.
        interval: (lower, upper], as shares of the training timesteps: 0 is clean, 1 pure noise.

    Raises:
        ValueError: if the interval leaves something out, and the scheduler's timesteps say nothing of noise.
    """
    lower, upper = interval
    if (lower, upper) == (0, 1):
        return [True] * len(timesteps)
    flow = prediction_type_of(scheduler) == "flow_prediction"
    if not flow and not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(f"{type(scheduler).__name__} has timesteps of its own, which tell no guidance interval.")
    # Flow matching counts 1 to N, all else 0 to N - 1. Rounded, so that a bound on the grid of steps is on it.
    first = 0 if flow else 1
    levels = [round((t + first) / scheduler.config.num_train_timesteps, 6) for t in timesteps.tolist()]
    return [lower < level <= upper for level in levels]


def stream_begins(scheduler: SchedulerMixin, num_timesteps: int, strengths: tuple[float, float]) -> tuple[int, int]:
    """The step at which each stream begins to be denoised, for one that is given to be kept or varied.

    Args:
        num_timesteps: of the whole sampling.
        strengths: of structure and of dynamics: the share of the steps that a stream takes. 0 keeps what is given, 1
            leaves no trace of it.

    Raises:
        ValueError: if the scheduler's latents are not what a model is shown (`init_noise_sigma`): it would take a
            stream that waits for one of another noise level.
    """
    if strengths != (1, 1) and getattr(scheduler, "init_noise_sigma", 1.0) != 1:
        raise ValueError(
            f"{type(scheduler).__name__} cannot keep or vary a stream: use DDIM, DPM-Solver++, UniPC or flow matching."
        )
    structure, dynamics = (num_timesteps - round(num_timesteps * strength) for strength in strengths)
    return structure, dynamics


def stream_timesteps(timesteps: torch.Tensor, begins: tuple[int, int]) -> torch.Tensor:
    """What each stream is said to be at: (N,) timesteps -> (N, 2).

    A stream that begins later waits at its first timestep; one that never does is clean, at 0.
    """
    waiting = torch.cat([timesteps, timesteps.new_zeros(1)])
    streams = [torch.cat([waiting[begin].expand(begin), timesteps[begin:]]) for begin in begins]
    return torch.stack(streams, dim=1)


def initial_noise(
    shape: tuple[int, int],
    generator: Generator = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Standard normal noise (B, L); a list of generators makes each row from its own.

    Raises:
        ValueError: if the list is not B long.
    """
    check_generators(generator, shape[0])
    return randn_tensor(shape, generator=generator, device=torch.device(device or "cpu"), dtype=dtype)


def check_generators(generator: Generator, batch_size: int) -> None:
    """Raise a `ValueError` for a list of generators that is not one for each video."""
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(f"{len(generator)} generators were given for {batch_size} videos; give one, or one for each.")


def guided(
    predict: Callable[..., torch.Tensor],
    latents: torch.Tensor,
    timestep: torch.Tensor,
    class_labels: torch.Tensor | None,
    null_class: int | None,
    guidance_scale: float | tuple[float, float],
    self_condition: torch.Tensor | None = None,
    sizes: tuple[int, int] | None = None,
) -> torch.Tensor:
    """A prediction with classifier-free guidance (Ho and Salimans, arXiv 2207.12598), both halves in one batch.

    Args:
        predict: (latents, timestep, class_labels, self_condition) -> (B, L).
        latents: (B, L).
        timestep: (B,) or (B, 2).
        class_labels: (B,), or None for an unconditional model.
        null_class: the id of "no class".
        guidance_scale: weight w of uncond + w (cond - uncond); up to 1, or without labels, the batch is not doubled.
            Or one for structure and one for dynamics.
        self_condition: (B, L) or None.
        sizes: values in the structure and in the dynamics latent, for a weight each.
    """
    weights = guidance_scale if isinstance(guidance_scale, tuple) else (guidance_scale,)
    if class_labels is None or max(weights) <= 1:
        return predict(latents, timestep, class_labels, self_condition)
    labels = torch.cat([class_labels, torch.full_like(class_labels, null_class)])
    latents, timestep = latents.repeat(2, 1), torch.cat([timestep, timestep])
    if self_condition is not None:
        self_condition = self_condition.repeat(2, 1)
    conditional, unconditional = predict(latents, timestep, labels, self_condition).chunk(2)
    steps = (conditional - unconditional).split(sizes if len(weights) == 2 else conditional.shape[1], dim=1)
    return unconditional + torch.cat([weight * step for weight, step in zip(weights, steps, strict=True)], dim=1)


def estimate_clean(
    scheduler: SchedulerMixin, prediction: torch.Tensor, timestep: torch.Tensor, model_input: torch.Tensor
) -> torch.Tensor:
    """The clean latents (B, L) that a prediction at `timestep` implies, from what the model was shown.

    Args:
        timestep: 0-d, (B,), or (B, L) with one for each value (`spread_streams`).

    Raises:
        ValueError: if the scheduler's `prediction_type` is none of Diffusers', or its noise levels are not stated.
    """
    prediction_type = prediction_type_of(scheduler)
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"No estimate of the clean latents for prediction_type {prediction_type!r}.")
    if prediction_type == "sample":
        return prediction
    # Scaled model inputs are variance preserving, whatever the scheduler itself computes in.
    alpha, sigma = noise_levels(scheduler, timestep if timestep.ndim == 2 else timestep[..., None])
    if prediction_type == "flow_prediction":
        return model_input - sigma * prediction
    if prediction_type == "v_prediction":
        return alpha * model_input - sigma * prediction
    return (model_input - sigma * prediction) / alpha.clamp(min=1e-4)


def denoise(
    model_fn: ModelFn,
    scheduler: SchedulerMixin,
    latents: torch.Tensor,
    timesteps: torch.Tensor,
    *,
    generator: Generator = None,
    eta: float = 0.0,
    self_conditioning: bool = False,
    given: GivenStreams | None = None,
    callback: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> torch.Tensor:
    """Follow a scheduler from noise to clean latents.

    No step waits for a GPU: the scheduler counts on the CPU, and the model has its timesteps from the start.

    Args:
        model_fn: (latents (B, L), timestep (B,), estimate (B, L) or None) -> prediction (B, L); with `given` streams
            the timestep is (B, 2).
        scheduler: any of Diffusers', its timesteps set.
        latents: standard normal noise (B, L).
        timesteps: `scheduler.timesteps`, from `retrieve_timesteps`.
        generator: for schedulers that add noise.
        eta: DDIM's share of noise, 0 to 1; other schedulers have none.
        self_conditioning: show the model its previous estimate of the clean latents.
        given: streams to keep or to vary; all is made from noise where None.
        callback: (step index, timestep, latents) -> the latents to go on with.
        interrupted: asked before every step; where true, no more steps are taken.

    Returns:
        Clean latents (B, L) in the DiT's units.

    Raises:
        ValueError: if a list of generators is not B long.
    """
    check_generators(generator, latents.shape[0])
    # DDIM takes the root of 1 - alpha - sigma^2, which at eta = 1 and zero terminal SNR rounds to below zero.
    extra = {"eta": min(eta, 1 - 1e-5), "generator": generator}
    step_kwargs = {k: v for k, v in extra.items() if k in inspect.signature(scheduler.step).parameters}
    latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)  # flow schedulers have none
    shown = timesteps.to(latents.device)
    solvers, begins, sizes = [scheduler], (0,), (latents.shape[1],)
    if given is not None:
        # Solvers go by the steps they took before, and those are not the same where one stream begins later.
        solvers, begins, sizes = [scheduler, copy.deepcopy(scheduler)], given.begins, given.sizes
        shown = stream_timesteps(timesteps, given.begins).to(latents.device)
        noise, latents = latents, given.start(scheduler, shown, latents)
    estimate = None
    for i, t in enumerate(timesteps):
        if interrupted():
            break
        if given is not None:
            latents = given.imposed(scheduler, shown[i], latents, noise)
        model_input = scheduler.scale_model_input(latents, t) if hasattr(scheduler, "scale_model_input") else latents
        timestep = shown[i].expand(latents.shape[0], *shown.shape[1:])
        prediction = model_fn(model_input, timestep, estimate).to(latents.dtype)
        if self_conditioning:
            levels = timestep if given is None else spread_streams(timestep, given.sizes)
            estimate = estimate_clean(scheduler, prediction, levels, model_input)
        streams = list(latents.split(sizes, dim=1))
        for j, predicted in enumerate(prediction.split(sizes, dim=1)):
            if i >= begins[j]:
                # A third axis: some schedulers (thresholding) ask for more than batch and channel.
                x = streams[j][..., None]
                x = solvers[j].step(predicted[..., None], t, x, **step_kwargs, return_dict=False)[0]
                streams[j] = x.squeeze(-1)
        latents = torch.cat(streams, dim=1)
        if callback is not None:
            latents = callback(i, t, latents)
    return latents if given is None else given.imposed(scheduler, None, latents, noise)
