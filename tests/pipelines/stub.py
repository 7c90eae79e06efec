"""`VidTwinPipeline` with a function in place of its transformer, on packed latents of any size."""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.cache_utils import CacheMixin
from torch import nn

from pipelines import VidTwinPipeline

# (noisy latents (B, L), timestep (B,) or (B, 2), clean estimate (B, L) or None) -> prediction (B, L)
ModelFn = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]


class StubTransformer(ModelMixin, ConfigMixin, CacheMixin):
    @register_to_config
    def __init__(
        self,
        sizes: tuple[int, int],
        self_conditioning: bool = False,
        num_classes: int | None = None,
        num_attention_heads: int = 0,
        attention_head_dim: int = 0,
        interval_conditioning: bool = False,
        caption_pooling: bool = False,
        independent_timesteps: bool | None = None,
        image_residual: float = 0.0,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.structure_shape, self.dynamics_shape = (sizes[0],), (sizes[1], 1)
        self.latent_size = sum(sizes)
        self.model_fn: ModelFn

    def forward(
        self,
        hidden_states,
        timestep,
        class_labels,
        self_condition,
        modulations,
        image_latents,
        return_dict,
        target_timestep,
    ):
        return (self.model_fn(hidden_states, timestep, self_condition),)


class StubPipeline(VidTwinPipeline):
    """Its conditioning inputs are packed normalized latents (B, L)."""

    def prepare_conditioning(self, conditions, counts, device):
        return next(iter(conditions.values()), None), None, self.batch_size


def denoise(
    model_fn: ModelFn,
    scheduler,
    noise: torch.Tensor,
    num_steps: int,
    sizes: tuple[int, int] | None = None,
    self_conditioning: bool = False,
    **options,
) -> torch.Tensor:
    """Run the pipeline's denoising loop from noise (B, L) to clean latents (B, L)."""
    transformer = StubTransformer(sizes or (noise.shape[1] - 1, 1), self_conditioning).to(noise.device)
    transformer.model_fn = model_fn
    pipeline = StubPipeline(None, transformer, scheduler)
    pipeline.batch_size = len(noise)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(latents=noise, num_inference_steps=num_steps, output_type="latent", **options).frames
