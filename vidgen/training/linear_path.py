"""Fit the linear path of a VAE to training clips before the first step (`autoencoder.linear_path`)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.utils.data import DataLoader

from autoencoder import AutoencoderKLVidTwin

from ..common.errors import UserError
from ..common.progress import progress
from ..data.dataset import ClipDataset, collate_clips
from ..data.latent_encoding import split_evenly


def has_linear_path(model: nn.Module) -> bool:
    """Whether a model has a linear path."""
    return isinstance(model, AutoencoderKLVidTwin) and model.linear_encoder is not None


def fit_linear_path(
    model: AutoencoderKLVidTwin, clips: ClipDataset, count: int, batch_size: int, num_workers: int = 0
) -> None:
    """Fit the linear path of a model to clips, which depend on the seed of the data set only.

    All processes fit it to the same clips.

    Args:
        model: with a linear path.
        clips: the training clips.
        count: number of clips, from all videos in turn.
        batch_size: clips read at a time.
        num_workers: reading processes.

    Raises:
        UserError: if no clip can be read.
    """
    batches = [[choose_clip(n, count, len(clips)) for n in batch] for batch in split_evenly(range(count), batch_size)]
    # By default a loader draws from the global generator, which training uses.
    loader = DataLoader(
        clips, batch_sampler=batches, num_workers=num_workers, collate_fn=collate_clips, generator=torch.Generator()
    )

    def read_videos() -> Iterator[torch.Tensor]:
        for batch in progress(loader, "fitting the linear path"):
            if batch["own"].any():
                yield batch["video"][batch["own"]]

    try:
        model.fit_linear_path(read_videos())
    except ValueError as error:
        raise UserError(f"No clip could be read to fit the linear path: {error}") from error


def choose_clip(number: int, count: int, num_clips: int) -> tuple[int, int]:
    """Return (epoch, index) of one of `count` clips: evenly spaced, or of several epochs if there are fewer."""
    return divmod(number, num_clips) if count > num_clips else (0, number * num_clips // count)


def linear_projections(model: nn.Module) -> list[nn.Parameter]:
    """Weights and biases of the projections of a linear path; none without one."""
    if not has_linear_path(model):
        return []
    parts = (model.linear_encoder, model.linear_decoder)
    return [p for part in parts for m in part.modules() if isinstance(m, nn.Linear) for p in m.parameters()]
