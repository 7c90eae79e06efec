"""How much of the DiT's conditioning vector the blocks cannot see.

The vector of timestep and class passes a SiLU before the modulations of adaLN. Where it is far below zero, the SiLU
and its gradient are nearly zero, so what the vector says there is lost, and does not come back. Too high a learning
rate drives it there; the loss falls on, and only the classes are ignored.
"""

from __future__ import annotations

import torch

from pipelines.transformer_vidtwin import VidTwinTransformer3DModel

SATURATION_BOUND = -4.0  # where SiLU is -0.07 and its slope -0.05
NUM_TIMESTEPS = 8
MAX_CLASSES = 64
MAX_SATURATION = 0.5


@torch.no_grad()
def measure_saturation(transformer: VidTwinTransformer3DModel, num_train_timesteps: int) -> float:
    """Fraction of the values of the vectors of timestep and class that are below -4.

    Over `NUM_TIMESTEPS` evenly spaced timesteps, equal in both streams, and at most `MAX_CLASSES` evenly spaced
    classes, "no class" included.
    """
    embed = transformer.condition_embed
    device = embed.stream_embed.device
    timestep = torch.linspace(0, num_train_timesteps - 1, NUM_TIMESTEPS, device=device).round()
    labels = None
    if embed.class_embed is not None:
        last = embed.class_embed.num_embeddings - 1
        labels = torch.linspace(0, last, min(last + 1, MAX_CLASSES), device=device).round().long()
        timestep, labels = timestep.repeat_interleave(len(labels)), labels.repeat(NUM_TIMESTEPS)
    vectors = embed(timestep[:, None].expand(-1, 2), labels, embed.stream_embed.dtype)
    return (vectors < SATURATION_BOUND).float().mean().item()


def describe_saturation(saturation: float) -> str | None:
    """A warning, if more than `MAX_SATURATION` of the vector is lost."""
    if saturation <= MAX_SATURATION:
        return None
    return (
        f"{saturation:.0%} of the vector of timestep and class is below {SATURATION_BOUND:g}, where the SiLU before "
        "the modulations is nearly zero: the model hardly knows its class. Start again with a lower "
        "optim.learning_rate, or beside Muon with a lower optim.adamw_lr_scale."
    )
