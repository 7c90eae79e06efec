"""Mean and standard deviation by which latents are normalized for the DiT."""

from __future__ import annotations

import torch
from accelerate.utils import broadcast_object_list

from autoencoder.video_autoencoder import VideoAutoencoder

from ..common.errors import UserError
from ..data.latent_cache import LatentCache
from ..data.latent_encoding import split_latents
from .config import DiTTrainingConfig
from .pretrained import Parent

Statistics = tuple[list[float], list[float]]  # mean and standard deviation, of each part of `split_latents`

RESPONSE_CLIPS = 8  # evenly spaced in the cache
MIN_RESPONSE = 0.02  # relative to a stream's; parts without effect would be divided by 0


def check_statistics(config: DiTTrainingConfig, parent: Parent | None) -> None:
    """Raise a `UserError` for `latents.statistics` beside a parent, whose normalization is kept.

    A resumed run keeps the statistics of its start.
    """
    if parent is not None and parent.weights and config.latents.statistics != "auto":
        raise UserError(
            f"latents.statistics={config.latents.statistics} would normalize the latents in another way than "
            f"model.pretrained={parent.name} was trained with; leave it out, or set latents.statistics=auto."
        )


def choose_statistics(
    config: DiTTrainingConfig, vae: VideoAutoencoder, cache: LatentCache, parent: Parent | None
) -> Statistics:
    """Mean and standard deviation that normalize the latents: the parent's, the VAE's, or measured on the cache.

    A VAE without statistics, such as a converted official one, gets the measured ones.
    """
    if parent is not None and parent.statistics is not None:
        return parent.statistics
    if config.latents.statistics == "response":
        return scale_by_response(vae, cache)
    if config.latents.statistics != "auto":
        return cache.measure_statistics(vae, config.latents.statistics)
    if vae.latents_mean is None:
        vae.set_latent_statistics(cache.mean, cache.std)
    return vae.latents_mean, vae.latents_std


def scale_by_response(vae: VideoAutoencoder, cache: LatentCache) -> Statistics:
    """Statistics after which the deviation of a part of a stream is in proportion to its effect on the pixels.

    An autoencoder whose values all have a deviation of 1 hides which of them matter: noise destroys coarse and fine
    ones at the same noise level, and the loss counts them alike. After this normalization fine values are noise first,
    as in pixels, so that the DiT generates from coarse to fine. The mean square of each stream is 1.

    A part is a channel, of VidTwin's structure latent a channel of a query.
    """
    by = "channel" if vae.normalizes_channels else "query"
    mean, std = cache.measure_statistics(vae, by)
    rows = torch.linspace(0, len(cache) - 1, min(RESPONSE_CLIPS, len(cache))).long().tolist()
    [response] = broadcast_object_list([measure_response(vae, torch.stack([cache[i]["mean"] for i in rows]), std, by)])
    scaled, start = [], 0
    for size in (len(std) - vae.dynamics_shape[0], vae.dynamics_shape[0]):  # parts of each stream
        own = torch.tensor(response[start : start + size], dtype=torch.float64)
        relative = own / own.square().mean().sqrt().clamp(min=1e-12) if size else own
        divisors = relative.clamp(min=MIN_RESPONSE).tolist()
        scaled += [s / divisor for s, divisor in zip(std[start : start + size], divisors, strict=True)]
        start += size
    return mean, scaled


@torch.no_grad()
def measure_response(vae: VideoAutoencoder, latents: torch.Tensor, std: list[float], by: str) -> list[float]:
    """Root mean square change of the pixels if a part of the latents changes by its deviation.

    All values of a part change at once, each up or down at random.

    Args:
        vae: the autoencoder.
        latents: packed (N, L).
        std: of each part.
        by: the parts, as in `split_latents`.
    """
    latents = latents.to(vae.device, vae.dtype)
    generator = torch.Generator().manual_seed(0)
    before = vae.decode(latents).sample.float()
    responses = []
    for number, deviation in enumerate(std):
        changed = latents.clone()
        part = split_latents(vae.unpack(changed), by)[number]  # a view
        signs = torch.randint(0, 2, part.shape, generator=generator) * 2 - 1
        part += deviation * signs.to(part)
        responses.append((vae.decode(changed).sample.float() - before).square().mean().sqrt().item())
    return responses
