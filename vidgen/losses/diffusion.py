"""Denoising loss of the DiT."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin
from torch import nn

from pipelines import VidTwinTransformer3DModel
from pipelines.classes import superclass_ids
from pipelines.latents import split_stages, spread_streams
from pipelines.schedulers import PREDICTION_TYPES, estimate_clean, noise_levels, prediction_type_of
from pipelines.text import embed_tokens, join_streams

from ..common.config import check_config
from ..common.errors import UserError
from ..data.config import TextConfig
from ..losses import Losses
from .config import DiffusionConfig
from .frame_timesteps import FRAME_DRAWS, check_frame_timesteps, draw_frame_fractions
from .self_alignment import choose_layers, self_alignment_loss
from .shortcut import Jumps, check_shortcut, draw_jumps, shortcut_target, shortcut_weight

DRAWS = 6  # uniform random numbers per clip, besides noise; captions need another one
SHORTCUT_DRAWS = 2  # after these, with `diffusion.shortcut`
# Embeddings (B, N, C), or ids (B, N) for a trained encoder, and the mask (B, N); with a caption per stream (B, 2, N).
Text = tuple[torch.Tensor, torch.Tensor]


class Prediction(NamedTuple):
    """The squared error (B, L) of a prediction, the noise levels of its input, and the requested hidden states."""

    error: torch.Tensor
    alpha: torch.Tensor
    sigma: torch.Tensor
    hidden_states: Sequence[torch.Tensor] = ()


class DiffusionLoss(nn.Module):
    """Mean squared error of the DiT's prediction on noisy latents, at random timesteps.

    The target is the scheduler's `prediction_type`: x0 (`sample`, the paper's), `epsilon`, `v_prediction`, or
    `flow_prediction`, the velocity noise - clean. `loss_weighting` "none" is the plain mean; "min_snr" is described at
    `min_snr_weight`.

    A fraction `independent_timesteps` of the clips has a different timestep in each stream, so that the DiT also
    learns one stream given the other; the rest share one. A fraction `class_dropout` has the null class, for
    classifier-free guidance, and a fraction `subclass_dropout` the superclass of their class (`jump` for `jump/dog`).
    With self-conditioning (Chen et al., arXiv 2208.04202) the DiT sees its estimate of the clean latents on half of
    the clips. The estimate is computed for all clips, so that a clip's loss does not depend on its batch. A DiT with
    image conditioning sees the first frame, except for a fraction `image_dropout`; with `image_residual` that fraction
    trains the stage that generates the first frame. Captions are dropped from a
    fraction `caption_dropout`, and from one stream only with `stream_dropout` for each.

    In a fraction `frame_timesteps` of the clips the rows of dynamics frames have different timesteps
    (`vidgen.losses.frame_timesteps`).

    A fraction `shortcut` of the clips trains steps of any length instead (`vidgen.losses.shortcut`), without
    self-conditioning. Where its streams have different timesteps, one of them waits, as in conditional sampling. Their
    targets are of a moving average of the model, `average`; with `shortcut_teacher` the guided velocity is that of a
    frozen copy of the model as it was at the start, `teacher`.

    With the weight `self_alignment`, tokens of an earlier block learn from those of a later one
    (`vidgen.losses.self_alignment`).

    Args:
        transformer: the DiT.
        scheduler: the scheduler that the trained pipeline samples with.
        config: of the loss.
        classes: names of the classes, by id; needed for `subclass_dropout` only.
        text: dropout of captions.
        text_encoder: of transformers, trained with the DiT; None: captions are passed as embeddings.

    Raises:
        UserError: if a value of the config is unknown or out of range.
    """

    def __init__(
        self,
        transformer: VidTwinTransformer3DModel,
        scheduler: SchedulerMixin,
        config: DiffusionConfig,
        classes: Sequence[str] = (),
        text: TextConfig | None = None,
        text_encoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_diffusion(config)
        if config.shortcut:
            check_shortcut(prediction_type_of(scheduler), transformer.config.interval_conditioning)
        if config.subclass_dropout:
            if len(classes) != transformer.config.num_classes:
                raise UserError(
                    "diffusion.subclass_dropout needs the names of all classes of the transformer, "
                    f"{transformer.config.num_classes}, not {len(classes)}."
                )
            ids = [*superclass_ids(classes), len(classes)]  # the null class is its superclass
            self.register_buffer("superclass_ids", torch.tensor(ids), persistent=False)
        self.aligned_layers: tuple[int, ...] = ()
        if config.self_alignment:
            self.aligned_layers = choose_layers(config.self_alignment_layers, transformer.config.num_layers)
        self.transformer = transformer
        self.text_encoder = text_encoder
        self.average = copy.deepcopy(transformer).requires_grad_(False) if config.shortcut else None
        self.teacher = copy.deepcopy(self.average) if config.shortcut_teacher else None
        self.scheduler = scheduler
        self.config = config
        self.text = TextConfig() if text is None else text
        self.sizes = (math.prod(transformer.structure_shape), math.prod(transformer.dynamics_shape))
        self.num_frame_draws = 0  # uniform numbers per clip, after all others
        if config.frame_timesteps:
            check_frame_timesteps(transformer.num_frame_rows, self.sizes[1])
            self.num_frame_draws = FRAME_DRAWS + transformer.num_frame_rows

    def forward(
        self,
        latents: torch.Tensor,
        labels: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        uniform: torch.Tensor | None = None,
        image: torch.Tensor | None = None,
        text: Text | None = None,
        shown_image: torch.Tensor | None = None,
    ) -> Losses:
        """The loss on a batch. All randomness comes from `noise` and `uniform`, which are drawn here if not given.

        Args:
            latents: normalized and packed, (B, L).
            labels: class ids (B,); ignored by an unconditional transformer.
            noise: standard normal (B, L).
            uniform: in [0, 1), (B, DRAWS) or more; with `text` one more, with `shortcut` `SHORTCUT_DRAWS` after it,
                with `frame_timesteps` the last `num_frame_draws`.
            image: structure latents of the first frames (B, L_S), normalized, for a DiT with image conditioning.
            text: of the captions: embeddings (B, N, C), or ids (B, N) for a trained encoder, and bool mask (B, N).
                With a caption for each stream these are (B, 2, N, C) or (B, 2, N), and (B, 2, N).
            shown_image: as `image`, what a DiT with `image_residual` is given in its place; None: `image`.

        Returns:
            `loss`, and the unweighted mean squared error of each stream, detached: `structure`, `dynamics`; with
            `shortcut` these are of the other clips, and `shortcut` is that of jumps. With `self_alignment`, that term
            before its weight, detached.
        """
        noise = torch.randn_like(latents) if noise is None else noise
        if uniform is None:
            draws = DRAWS + 1 + SHORTCUT_DRAWS if self.config.shortcut else DRAWS + (text is not None)
            uniform = torch.rand(len(latents), draws + self.num_frame_draws, device=latents.device)

        # Add noise at random timesteps, and drop some of the labels, images and captions.
        first, second, independent, dropped, conditioned, imageless = uniform[:, :DRAWS].unbind(1)
        jumps = self._draw_jumps(uniform) if self.config.shortcut else None
        counts = None  # the values that have a loss, if not all
        if self.num_frame_draws:
            timestep, counts = self._frame_timesteps(uniform)
        else:
            timestep = self._timesteps(first, second, independent) if jumps is None else jumps.start
        null_class = self.transformer.config.num_classes
        conditions = {"class_labels": None if null_class is None else self._drop_labels(labels, dropped, null_class)}
        if image is not None:
            has_image = imageless >= self.config.image_dropout
            conditions |= {"image_latents": image if shown_image is None else shown_image, "image_mask": has_image}
            if deviation := self.transformer.config.image_residual:
                latents = split_stages(latents, image, deviation, has_image)
        if text is not None:
            conditions |= self._text_conditions(text, uniform[:, DRAWS])

        # Predict, half of the clips given an estimate of the clean latents, and compare with the target.
        error, alpha, sigma, hidden_states = self._predict(
            latents, noise, timestep, conditions, conditioned < 0.5, jumps, self.aligned_layers
        )
        terms = self._average(error.detach(), jumps, counts)
        weight = None
        if self.config.loss_weighting == "min_snr":
            prediction_type = prediction_type_of(self.scheduler)
            weight = min_snr_weight(prediction_type, alpha, sigma, self.config.min_snr_gamma)
        if jumps is not None:
            moves = spread_streams(jumps.moves, self.sizes)
            weight = torch.where(moves, shortcut_weight(error, self.sizes), 1 if weight is None else weight)
        if counts is not None:
            weight = counts if weight is None else weight * counts
        loss = (error if weight is None else error * weight).mean()
        if self.aligned_layers:
            alignment = self_alignment_loss(*hidden_states)
            loss = loss + self.config.self_alignment * alignment
            terms["self_alignment"] = alignment.detach()
        return {"loss": loss, **terms}

    @torch.no_grad()
    def stream_errors(
        self,
        latents: torch.Tensor,
        labels: torch.Tensor | None,
        noise: torch.Tensor,
        timestep: torch.Tensor,
        image: torch.Tensor | None = None,
        text: Text | None = None,
    ) -> Losses:
        """The unweighted mean squared error (B,) of each stream that is not empty, at given timesteps.

        No class or caption is dropped, and a DiT with self-conditioning sees its estimate, as it does when it samples.
        It sees no image, unless it has `image_residual`: then the errors are those of the stage that is given it.

        Args:
            latents: normalized and packed, (B, L).
            labels: class ids (B,); ignored by an unconditional transformer.
            noise: standard normal (B, L).
            timestep: of both streams, (B,), from `scale_timesteps`.
            image, text: as in `forward`.
        """
        conditions = {"class_labels": None if self.transformer.config.num_classes is None else labels}
        if deviation := self.transformer.config.image_residual:
            conditions["image_latents"] = image
            latents = split_stages(latents, image, deviation)
        if text is not None:
            conditions |= self._text_conditions(text)
        conditioned = torch.ones_like(timestep, dtype=torch.bool)
        prediction = self._predict(latents, noise, timestep, conditions, conditioned)
        parts = zip(("structure", "dynamics"), prediction.error.split(self.sizes, dim=1), strict=True)
        return {name: part.mean(dim=1) for name, part in parts if part.numel()}

    def _predict(
        self,
        latents: torch.Tensor,
        noise: torch.Tensor,
        timestep: torch.Tensor,
        conditions: dict[str, torch.Tensor | None],
        conditioned: torch.Tensor,
        jumps: Jumps | None = None,
        hidden_layers: tuple[int, ...] = (),
    ) -> Prediction:
        """Add noise, and compare the DiT's prediction with its target.

        `conditions` are further inputs of the DiT. `conditioned`, bool (B,), selects the clips for which a DiT with
        self-conditioning sees its estimate, unless they jump.
        """
        alpha, sigma = map(self._spread, noise_levels(self.scheduler, timestep))
        noisy = alpha * latents + sigma * noise
        target = denoising_target(prediction_type_of(self.scheduler), latents, noise, alpha, sigma)
        velocity = estimate = None
        inputs = conditions
        if jumps is not None:
            guidance = self.config.shortcut_guidance
            predict = partial(self._predict_jump, self.average, conditions)
            taught = None if self.teacher is None else self._teach(noisy, jumps.start, conditions)
            jump_target, velocity = shortcut_target(
                self.scheduler, predict, noisy, jumps, guidance, self.sizes, taught
            )
            target = torch.where(spread_streams(jumps.moves, self.sizes), jump_target, target)
            inputs = {**conditions, "target_timestep": jumps.target}
            conditioned = conditioned & ~jumps.moves.any(dim=1)
        if self.transformer.config.self_conditioning:
            estimate = self._estimate(noisy, timestep, conditions, velocity) * conditioned[:, None]
        if hidden_layers:
            inputs = {**inputs, "hidden_layers": hidden_layers}
        output = self.transformer(noisy, timestep, self_condition=estimate, **inputs)
        error = F.mse_loss(output.sample.float(), target, reduction="none")
        return Prediction(error, alpha, sigma, output.hidden_states if hidden_layers else ())

    def _drop_labels(self, labels: torch.Tensor, dropped: torch.Tensor, null_class: int) -> torch.Tensor:
        """Labels (B,) with some replaced by the superclass or the null class, by uniform numbers (B,)."""
        threshold = self.config.class_dropout
        if self.config.subclass_dropout:
            widened = dropped < threshold + self.config.subclass_dropout
            labels = torch.where(widened, self.superclass_ids[labels], labels)
        return labels.masked_fill(dropped < threshold, null_class)

    def _text_conditions(self, text: Text, dropped: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Captions as inputs of the DiT, some of them dropped by uniform numbers (B,)."""
        tokens, mask = text
        streams = mask.shape[1:-1]
        if self.text_encoder is None:
            embeddings = tokens
        else:
            ids, attended = (x.flatten(0, len(streams)) for x in text)
            embeddings = embed_tokens(self.text_encoder, ids, attended).unflatten(0, mask.shape[:-1])
        if streams:
            embeddings, mask = join_streams(embeddings, mask)
        if dropped is not None:
            mask = drop_captions(mask, dropped, self.text.caption_dropout, self.text.stream_dropout)
        return {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask}

    def _timesteps(self, first: torch.Tensor, second: torch.Tensor, independent: torch.Tensor) -> torch.Tensor:
        """Timesteps (B,), or (B, 2) if some clips have one per stream, from three uniform numbers (B,)."""
        timestep = self.scale_timesteps(self._fraction(first))
        if self.config.independent_timesteps == 0:
            return timestep
        other = self.scale_timesteps(self._fraction(second))
        other = torch.where(independent < self.config.independent_timesteps, other, timestep)
        return torch.stack([timestep, other], dim=1)

    def _frame_timesteps(self, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Timesteps (B, 1 + R) of structure and each row of dynamics, and the values (B, L) that have a loss."""
        first, second, independent = uniform[:, :3].unbind(1)
        *draws, rows = uniform[:, -self.num_frame_draws :].split([FRAME_DRAWS, self.num_frame_draws - FRAME_DRAWS], 1)
        is_independent = independent < self.config.independent_timesteps
        fraction = self._fraction(first)
        streams = torch.stack([fraction, torch.where(is_independent, self._fraction(second), fraction)], dim=1)
        drawn = draw_frame_fractions(
            self.config.frame_timesteps, streams, self._fraction(rows), is_independent, first, *draws
        )
        return self.scale_timesteps(drawn.fractions), self._spread(~drawn.is_clean)

    def _spread(self, values: torch.Tensor) -> torch.Tensor:
        """Values of clips, streams or rows of dynamics frames, at each of the packed latents."""
        return spread_streams(values, self.sizes, self.transformer.dynamics_shape[0])

    def _fraction(self, uniform: torch.Tensor) -> torch.Tensor:
        """Fractions of the schedule (B,) of the configured distribution from uniform numbers (B,)."""
        if self.config.timestep_sampling == "logit_normal":  # Esser et al., arXiv 2403.03206, Section 3.1
            uniform = (self.config.logit_mean + self.config.logit_std * torch.special.ndtri(uniform)).sigmoid()
        return uniform

    def scale_timesteps(self, fractions: torch.Tensor) -> torch.Tensor:
        """Timesteps from fractions in [0, 1] of the schedule: integers, for flow matching real numbers."""
        steps = self.scheduler.config.num_train_timesteps
        if prediction_type_of(self.scheduler) == "flow_prediction":
            return steps * fractions
        return (steps * fractions).long().clamp(max=steps - 1)

    def _average(self, error: torch.Tensor, jumps: Jumps | None, counts: torch.Tensor | None) -> Losses:
        """The mean error of each stream over the values that count, bool (B, L), and that of jumps."""
        parts = error.split(self.sizes, dim=1)
        if jumps is None and counts is None:
            means = [part.mean() if part.numel() else part.sum() for part in parts]
            return dict(zip(("structure", "dynamics"), means, strict=True))
        moves = None if jumps is None else self._spread(jumps.moves)

        def mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return (values * mask).sum() / mask.sum().clamp(min=1)

        structure, dynamics = map(mean, parts, (~moves if counts is None else counts).split(self.sizes, dim=1))
        terms = {"structure": structure, "dynamics": dynamics}
        return terms if moves is None else {**terms, "shortcut": mean(error, moves)}

    def _draw_jumps(self, uniform: torch.Tensor) -> Jumps:
        """The jumps of a batch from uniform numbers (B, DRAWS + 1 + SHORTCUT_DRAWS)."""
        first, second, independent, _, waiting, _, _, chosen, interval, *_ = uniform.unbind(1)
        independent = independent < self.config.independent_timesteps
        fraction, other = self._fraction(first), self._fraction(second)
        fractions = torch.stack([fraction, torch.where(independent, other, fraction)], dim=1)
        # A clip that jumps has no self-conditioning, so that number chooses the stream that waits.
        waits = torch.stack([waiting < 0.5, waiting >= 0.5], dim=1) & independent[:, None]
        moves = (chosen < self.config.shortcut)[:, None] & ~waits
        return draw_jumps(self.scheduler, self.scale_timesteps, fractions, moves, interval, self.config.shortcut_base)

    def _predict_jump(
        self,
        transformer: VidTwinTransformer3DModel,
        conditions: dict[str, torch.Tensor | None],
        latents: torch.Tensor,
        timestep: torch.Tensor,
        target_timestep: torch.Tensor,
        unconditional: torch.Tensor,
        estimate: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """A model's prediction (B, L) for a jump, without class and caption for some of the clips."""
        if (labels := conditions["class_labels"]) is not None:
            labels = labels.masked_fill(unconditional, self.transformer.config.num_classes)
        conditions = {**conditions, "class_labels": labels}
        if (mask := conditions.get("encoder_attention_mask")) is not None:
            conditions["encoder_attention_mask"] = mask & ~unconditional.reshape(-1, *[1] * (mask.ndim - 1))
        inputs = {"target_timestep": target_timestep, "self_condition": estimate, **conditions}
        return transformer(latents, timestep, **inputs).sample

    @torch.no_grad()
    def _teach(
        self, noisy: torch.Tensor, timestep: torch.Tensor, conditions: dict[str, torch.Tensor | None]
    ) -> torch.Tensor:
        """The teacher's guided velocity (B, L), given its estimate where it has self-conditioning, as it samples."""
        none = torch.zeros(len(noisy), dtype=torch.bool, device=noisy.device)

        def guide(estimate: torch.Tensor | None) -> torch.Tensor:
            conditional, unconditional = (
                self._predict_jump(self.teacher, conditions, noisy, timestep, timestep, drop, estimate).float()
                for drop in (none, ~none)
            )
            return unconditional + self.config.shortcut_guidance * (conditional - unconditional)

        velocity = guide(None)
        if self.transformer.config.self_conditioning:
            velocity = guide(self._estimate(noisy, timestep, conditions, velocity))
        return velocity

    @torch.no_grad()
    def update_average(self, is_finite: torch.Tensor) -> None:
        """Move the average that jumps learn from towards the model, if the update was finite, a scalar bool."""
        if self.average is not None:
            weight = (1 - self.config.shortcut_ema_decay) * is_finite
            for average, parameter in zip(self.average.parameters(), self.transformer.parameters(), strict=True):
                average.lerp_(parameter, weight.to(average))

    @torch.no_grad()
    def _estimate(
        self,
        noisy: torch.Tensor,
        timestep: torch.Tensor,
        conditions: dict[str, torch.Tensor | None],
        prediction: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The model's estimate of the clean latents (B, L) without self-conditioning, from its prediction."""
        if prediction is None:
            prediction = self.transformer(noisy, timestep, **conditions).sample
        timestep = self._spread(timestep)
        return estimate_clean(self.scheduler, prediction, timestep, noisy).to(noisy.dtype)


def check_diffusion(config: DiffusionConfig) -> None:
    """Raise a `UserError` for a value that its key excludes, or for fractions that exclude each other."""
    check_config(config, "diffusion")
    if config.shortcut_teacher and not config.shortcut:
        raise UserError("diffusion.shortcut_teacher teaches jumps: set diffusion.shortcut above 0 too.")
    if config.frame_timesteps and config.shortcut:
        raise UserError(
            "diffusion.frame_timesteps and diffusion.shortcut exclude each other: jumps are not trained with a "
            "timestep per frame. Set one of them to 0."
        )
    if config.class_dropout + config.subclass_dropout > 1:
        raise UserError(
            "diffusion.class_dropout and diffusion.subclass_dropout are fractions of the same clips, at most 1 in sum,"
            f" not {config.class_dropout} and {config.subclass_dropout}."
        )


def drop_captions(
    mask: torch.Tensor, uniform: torch.Tensor, caption_dropout: float, stream_dropout: float
) -> torch.Tensor:
    """The tokens (B, 2, N) that structure and dynamics attend to, of captions with the mask (B, N) or (B, 2, N).

    By uniform numbers (B,), a fraction `caption_dropout` of the clips has no caption, a fraction `stream_dropout` none
    for structure, and another none for dynamics.
    """
    structure_dropout = caption_dropout + stream_dropout
    keeps_structure = uniform >= structure_dropout
    keeps_dynamics = (uniform >= structure_dropout + stream_dropout) | (
        (uniform >= caption_dropout) & (uniform < structure_dropout)
    )
    mask = mask[:, None] if mask.ndim == 2 else mask
    return mask & torch.stack([keeps_structure, keeps_dynamics], dim=1)[..., None]


def denoising_target(
    prediction_type: str, clean: torch.Tensor, noise: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor
) -> torch.Tensor:
    """The prediction target for noisy latents alpha * clean + sigma * noise.

    Raises:
        ValueError: if the prediction type is unknown.
    """
    if prediction_type == "sample":
        return clean
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":  # Salimans and Ho, arXiv 2202.00512
        return alpha * noise - sigma * clean
    if prediction_type == "flow_prediction":  # Liu et al., arXiv 2209.03003; Diffusers' t increases toward noise
        return noise - clean
    raise ValueError(f"prediction_type must be one of {', '.join(PREDICTION_TYPES)}, not {prediction_type!r}.")


def min_snr_weight(prediction_type: str, alpha: torch.Tensor, sigma: torch.Tensor, gamma: float) -> torch.Tensor:
    """The weight that makes a squared error min(SNR, gamma) times that of x0, with SNR = alpha^2 / sigma^2.

    Hang et al., arXiv 2303.09556, Section 3.4. The squared error of x0 is that of epsilon divided by SNR, that of v
    divided by SNR + 1, and that of the velocity times sigma^2. The formulas avoid 0 / 0 at both ends of the schedule.
    At zero terminal SNR all weights except that of epsilon are 0, because the input contains no signal there.
    """
    signal, noise = alpha.square(), sigma.square()
    if prediction_type == "sample":
        return (signal / noise).clamp(max=gamma)
    if prediction_type == "epsilon":
        return (gamma * noise / signal).clamp(max=1)
    return torch.minimum(signal, gamma * noise)  # v: with alpha^2 + sigma^2 = 1; flow: times sigma^2
