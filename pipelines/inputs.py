"""Checks of a pipeline's arguments: values that Python would silently convert are refused."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from autoencoder.tiling import is_whole

from .finite import check_finite_number
from .latents import frames_per_position

if TYPE_CHECKING:
    from autoencoder.video_autoencoder import VideoAutoencoder

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

Generator = torch.Generator | list[torch.Generator] | None


def check_whole_numbers(**values: Any) -> None:
    """Raise a `ValueError` for a value, or a value in a sequence, that is no whole number, such as True or 2.5."""
    for name, value in values.items():
        is_sequence = isinstance(value, tuple | list | range)
        if not all(is_whole(v) for v in (value if is_sequence else [value])):
            expected = "whole numbers" if is_sequence else "a whole number"
            raise ValueError(f"{name} must be {expected}, not {value!r}.")


def check_numbers(**values: Any) -> None:
    """Raise a `ValueError` for a value, or a value in a sequence, that is no number, such as True or "3"."""
    for name, value in values.items():
        for v in value if isinstance(value, tuple | list) else [value]:
            number = v.item() if isinstance(v, torch.Tensor) and v.ndim == 0 else v
            if not isinstance(number, numbers.Real) or isinstance(number, bool | np.bool_):
                raise ValueError(f"{name} must be a number, not {v!r}.")


def check_generators(generator: Generator, batch_size: int) -> None:
    """Raise a `ValueError` for a list of generators whose length is not the number of videos."""
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(
            f"{len(generator)} generators were passed for {batch_size} videos: pass one, or one per video."
        )


def as_labels(class_labels: Any) -> list[Any]:
    """Convert one or several class labels to a list; labels of a tensor or an array to Python numbers."""
    if isinstance(class_labels, torch.Tensor | np.ndarray):
        class_labels = class_labels.tolist()
    return list(class_labels) if isinstance(class_labels, list | tuple) else [class_labels]


def as_generators(generator: Any) -> Generator:
    """Return a generator or a list of generators.

    Raises:
        ValueError: for anything else, such as a seed.
    """
    if isinstance(generator, tuple):
        generator = list(generator)
    for item in generator if isinstance(generator, list) else [generator]:
        if item is not None and not isinstance(item, torch.Generator):
            raise ValueError(
                f"generator must be a torch.Generator or a list of them, not {item!r}; for a seed, pass "
                "torch.Generator().manual_seed(seed)."
            )
    return generator


def common_length(lengths: dict[str, int]) -> int:
    """The length of all lists, where lists of one serve any.

    Raises:
        ValueError: if there are two lengths above one.
    """
    count = max(lengths.values(), default=1)
    for name, length in lengths.items():
        if length not in (1, count):
            raise ValueError(f"{name} has length {length}, but the batch size is {count}: pass one, or {count}.")
    return count


class CheckInputsMixin:
    """Checks of the arguments of a pipeline's call."""

    autoencoder: VideoAutoencoder | None
    transformer: Any
    vae: nn.Module | None
    _callback_tensor_inputs: list[str]

    def check_inputs(
        self,
        num_videos_per_prompt: int,
        num_candidates: int,
        num_inference_steps: int,
        timesteps: Sequence[float] | None,
        sigmas: Sequence[float] | None,
        guidance_scale: float | tuple[float, float],
        guidance_interval: tuple[float, float],
        structure_strength: float,
        dynamics_strength: float,
        structure_delay: float,
        temperature: float,
        structure: Any,
        dynamics: Any,
        kept_frames: Sequence[int],
        history_noise: float | None,
        history_guidance_scale: float,
        eta: float,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> None:
        """Raise a `ValueError` for an argument of a wrong type or out of range."""
        counts = {"num_videos_per_prompt": num_videos_per_prompt, "num_candidates": num_candidates}
        counts["num_inference_steps"] = num_inference_steps
        strengths = {"structure_strength": structure_strength, "dynamics_strength": dynamics_strength}
        check_whole_numbers(**counts, kept_frames=kept_frames)
        fractions = {**strengths, "structure_delay": structure_delay, "eta": eta}
        check_numbers(
            guidance_scale=guidance_scale, guidance_interval=guidance_interval, temperature=temperature, **fractions
        )
        for name, value in counts.items():
            if not 1 <= value < math.inf:
                raise ValueError(f"{name} must be at least 1, not {value}.")
        check_finite_number("guidance_scale", guidance_scale)
        for name, schedule in {"timesteps": timesteps, "sigmas": sigmas}.items():
            if schedule is not None:
                check_finite_number(name, list(schedule))
        if isinstance(guidance_scale, tuple | list) and len(guidance_scale) != 2:
            raise ValueError(f"guidance_scale must be a number or (structure, dynamics), not {guidance_scale}.")
        if (
            not isinstance(guidance_interval, tuple | list)
            or len(guidance_interval) != 2
            or not 0 <= guidance_interval[0] <= guidance_interval[1] <= 1
        ):
            raise ValueError(
                "guidance_interval must be (lower, upper) with 0 <= lower <= upper <= 1, where 0 is clean and 1 pure "
                f"noise, not {guidance_interval}."
            )
        for name, value in fractions.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} must be between 0 and 1, not {value}.")
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be a finite number of at least 0, not {temperature}.")
        if structure_delay and not (structure is None and dynamics is None):
            given = "dynamics" if structure is None else "structure"
            raise ValueError(f"structure_delay orders the generation of both streams, but `{given}` is given.")
        if structure_delay and not math.prod(self.transformer.dynamics_shape):
            raise ValueError("structure_delay requires an autoencoder with a dynamics latent.")
        if kept_frames and dynamics is None:
            raise ValueError("kept_frames requires `dynamics`.")
        if kept_frames and not math.prod(self.transformer.dynamics_shape):
            raise ValueError("kept_frames requires an autoencoder with a dynamics latent.")
        frames = self.transformer.dynamics_shape[1] * frames_per_position(self.autoencoder)
        if not all(0 <= frame < frames for frame in kept_frames):
            raise ValueError(f"kept_frames must be in 0 to {frames - 1}, not {list(kept_frames)}.")
        check_numbers(history_noise=history_noise or 0.0, history_guidance_scale=history_guidance_scale)
        check_finite_number("history_guidance_scale", history_guidance_scale)
        if history_noise is not None and not 0 <= history_noise < 1:
            raise ValueError(f"history_noise must be at least 0, clean, and below 1, pure noise, not {history_noise}.")
        if history_noise is not None and not kept_frames:
            raise ValueError("history_noise requires kept_frames, which are the history.")
        if history_guidance_scale != 1 and history_noise is None:
            raise ValueError("history_guidance_scale requires history_noise, such as 0.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, not {output_type!r}.")
        if self.vae is None and output_type != "latent":
            raise ValueError(f'Without a vae output_type must be "latent", not {output_type!r}.')
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be among {self._callback_tensor_inputs}, not "
                f"{sorted(unknown)}."
            )
