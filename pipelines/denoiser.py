"""The transformer with the conditions of one call of the pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .transformer_vidtwin import VidTwinTransformer3DModel


class Denoiser:
    """Predicts with the classes and prompts of a batch ("conditional"), without them ("unconditional"), or "both".

    Args:
        transformer: its enabled cache restarts where the number of rows changes.
        labels: class labels (B,), or None for an unconditional model.
        text_inputs: from `get_text_inputs`.
        modulations: of all steps, from `prepare_modulations`, or None.
        image_latents: (B, L_S), or None.
    """

    def __init__(
        self,
        transformer: VidTwinTransformer3DModel,
        labels: torch.Tensor | None,
        text_inputs: dict[str, dict[str, torch.Tensor]],
        modulations: list[torch.Tensor] | None,
        image_latents: torch.Tensor | None,
    ) -> None:
        self.transformer = transformer
        self.dtype = transformer.dtype
        self.labels = dict.fromkeys(text_inputs)
        self.rows = dict.fromkeys(text_inputs, slice(None))  # of the modulations, which without labels have one
        if labels is not None:
            null, batch = torch.full_like(labels, transformer.config.num_classes), len(labels)
            self.labels = {"conditional": labels, "unconditional": null, "both": torch.cat([labels, null])}
            self.rows = {
                "conditional": slice(batch),
                "unconditional": slice(batch, 2 * batch),
                "both": slice(2 * batch),
            }
        self.text_inputs = text_inputs
        self.modulations = modulations
        self.image_latents = None if image_latents is None else image_latents.to(self.dtype)
        self._cached_rows = None  # batch size of the activations in the transformer's cache

    def __call__(
        self,
        conditions: str,
        step: int,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        target_timestep: torch.Tensor | None = None,
        self_condition: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predict in the transformer's dtype: (B, L), or for "both" (2 B, L), the conditional half first.

        Args:
            conditions: "conditional", "unconditional" or "both".
            step: number of the denoising step.
            latents: scaled as the transformer's input (B, L).
            timestep, target_timestep, self_condition: as in the transformer, with B rows.
        """
        copies = 2 if conditions == "both" else 1
        self._restart_cache(copies * len(latents))

        def expand(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else torch.cat([x] * copies)

        rows = self.rows[conditions]
        modulations = None if self.modulations is None else [layer[step, rows] for layer in self.modulations]
        with self.transformer.cache_context("cond_uncond"):
            return self.transformer(
                expand(latents).to(self.dtype),
                expand(timestep),
                self.labels[conditions],
                None if self_condition is None else expand(self_condition).to(self.dtype),
                modulations=modulations,
                image_latents=expand(self.image_latents),
                target_timestep=expand(target_timestep),
                return_dict=False,
                **self.text_inputs[conditions],
            )[0]

    def _restart_cache(self, rows: int) -> None:
        """Empty the cache if it holds activations of another batch size, or of an earlier call."""
        if rows == self._cached_rows:
            return
        if self._cached_rows is not None:
            self.transformer.check_cache_can_restart()
        self.transformer._reset_stateful_cache()
        self._cached_rows = rows
