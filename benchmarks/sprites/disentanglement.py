"""Disentanglement of a VAE's two latents, on sprites: probes, clips decoded from one latent, and latent swaps.

Sprites are drawn as they are needed, so their factors are known. Use seeds that the VAE was not trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from autoencoder import AutoencoderKLVidTwin, TwinLatents
from vidgen.common.progress import progress
from vidgen.data.sprites import MOTIONS, render_sprite, sample_factors
from vidgen.data.transforms import frames_to_clip
from vidgen.metrics.reconstruction import downsample_grids, psnr
from vidgen.metrics.stats import Score, mean, ratio, share

from .latent_swap import (
    CLASSES,
    PixelProbes,
    factor_attribution,
    pair_motions,
    pixel_measurements,
    sprite_targets,
    swap_factors,
    unrelated_pairs,
)
from .probes import Ridge, probe_classes, probe_points

FEATURES = ("structure", "dynamics", "both", "pixels")  # inputs of the probes
COMPONENTS = ("both", "structure", "dynamics")  # latents to decode
ENDS = ("a", "a_as_b", "b_as_a", "b")  # clips that a swapped clip may resemble: A, A moving like B, ...
FPS = 8
BATCH = 16


class EncodedSprites:
    """Sprites, N / 8 of each motion, with their latents and pixel measurements; all tensors on the CPU.

    Args:
        vae: its clips' size is the sprites'.
        per_motion: number of sprites of each motion.
        seed: of the sprites, as in `write_sprites`; a seed that the VAE was not trained on.

    Attributes:
        factors: of the N clips, motion by motion.
        targets: (N, ...), from `sprite_targets`.
        features: (N, ·) each, by the names in `FEATURES`: posterior means; `both` is packed. `pixels` are downsampled
            frames with no fewer values than `both`.
        measurements: (N, ·) each, from `pixel_measurements`.
    """

    def __init__(self, vae: AutoencoderKLVidTwin, per_motion: int, seed: int) -> None:
        self.factors = sample_sprites(vae, per_motion, seed)
        self.targets = sprite_targets(self.factors)
        parts = [self._encode(vae, batch) for batch in _batches(torch.arange(len(self.factors)), "encoding sprites")]
        self.features, self.measurements = (_concatenate(column) for column in zip(*parts, strict=True))

    def _encode(self, vae: AutoencoderKLVidTwin, batch: torch.Tensor) -> tuple[dict, dict]:
        clips = render([self.factors[i] for i in batch.tolist()]).to(vae.device)
        packed = vae.encode(clips).latent_dist.mode().float()
        latents = vae.unpack(packed)
        _, height, width = downsample_grids(tuple(clips.shape[1:]), packed.shape[1])[-1]
        small = F.interpolate(clips.flatten(1, 2), size=(height, width), mode="bilinear", antialias=True)
        values = (latents.structure, latents.dynamics, packed, small)
        features = {name: x.flatten(1).cpu() for name, x in zip(FEATURES, values, strict=True)}
        return features, {name: x.cpu() for name, x in pixel_measurements(clips).items()}


def sample_sprites(vae: AutoencoderKLVidTwin, per_motion: int, seed: int) -> list[dict]:
    """The factors of sprites of the VAE's clip size, motion by motion, as `write_sprites` draws them."""
    _, num_frames, resolution, _ = vae.clip_shape
    sizes = dict(resolution=resolution, num_frames=num_frames, fps=FPS)
    return [
        sample_factors(np.random.default_rng([seed, label, i]), motion, **sizes)
        for label, motion in enumerate(MOTIONS)
        for i in range(per_motion)
    ]


def render(factors: Sequence[dict]) -> torch.Tensor:
    """Render N sprites from their factors: (N, 3, T, H, W) in [-1, 1]."""
    return frames_to_clip(torch.from_numpy(np.stack([render_sprite(clip) for clip in factors])))


@torch.no_grad()
def measure_disentanglement(
    vae: AutoencoderKLVidTwin, per_motion: tuple[int, int], seeds: tuple[int, int]
) -> dict[str, Any]:
    """How a VAE's two latents divide the factors of sprites.

    Args:
        vae: with two latents.
        per_motion: sprites of each motion to fit probes on, and to test them on.
        seeds: of these sprites; seeds that the VAE was not trained on.

    Returns:
        `values`: the number of values of each of `FEATURES`. `probes`: for each target of `sprite_targets` and each of
        `FEATURES` the scores of a linear probe, `accuracy` or `r2` and `distance`. `components`: scores of original
        clips, and of clips decoded from both latents or one, see `component_scores` and `PixelProbes.score`.
        `latent_swap`: `factor_attribution` of swapped clips, and `likeness`: for each of `ENDS` the mean PSNR to it
        and how often it is the `nearest`. The last two leave out `swap`.

    Raises:
        ValueError: if the VAE has a single latent.
    """
    if 0 in vae.dynamics_shape:
        raise ValueError("a VAE with one latent has nothing to disentangle.")
    train, test = (EncodedSprites(vae, count, seed) for count, seed in zip(per_motion, seeds, strict=True))

    # Probe each latent.
    probes: dict[str, dict[str, dict[str, Score]]] = {target: {} for target in train.targets}
    for name in FEATURES:
        ridge, features = Ridge(train.features[name].to(vae.device)), test.features[name]
        for target, scores in probes.items():
            targets, test_targets = train.targets[target], test.targets[target]
            if target in CLASSES:
                scores[name] = {"accuracy": probe_classes(ridge, targets, features, test_targets)}
            else:
                scores[name] = probe_points(ridge, targets, features, test_targets)

    # Fit probes of pixels, and apply them to decoded clips.
    single = train.targets["motion"] != MOTIONS.index("swap")
    pixel_probes = PixelProbes(
        {name: values[single] for name, values in train.measurements.items()},
        {name: values[single] for name, values in train.targets.items()},
    )
    values = {name: features.shape[1] for name, features in test.features.items()}
    return {"values": values, "probes": probes, **_measure_decoded(vae, test, pixel_probes)}


def _measure_decoded(vae: AutoencoderKLVidTwin, sprites: EncodedSprites, probes: PixelProbes) -> dict[str, Any]:
    kept = (sprites.targets["motion"] != MOTIONS.index("swap")).nonzero().flatten()
    factors = [sprites.factors[i] for i in kept.tolist()]
    targets = {name: values[kept] for name, values in sprites.targets.items()}
    packed = sprites.features["both"][kept]
    partner = pair_motions(targets["motion"])
    predictions: dict[str, list] = {name: [] for name in ("original", *COMPONENTS, "swapped")}
    errors: dict[str, list] = {name: [] for name in ("original", *COMPONENTS)}
    likeness = []
    for batch in _batches(torch.arange(len(kept)), "decoding sprites"):
        # Original clips, and ideal swaps in both directions.
        a, b = ([factors[i] for i in indices.tolist()] for indices in (batch, partner[batch]))
        a_as_b = [swap_factors(*pair) for pair in zip(a, b, strict=True)]
        b_as_a = [swap_factors(*pair) for pair in zip(b, a, strict=True)]
        ends = [render(clips).to(vae.device) for clips in (a, a_as_b, b_as_a, b)]

        # Decode one latent or both, then the structure of A with the dynamics of B.
        source, motion_source = (vae.unpack(packed[indices].to(vae.device)) for indices in (batch, partner[batch]))
        decoded = {"original": ends[0]}
        decoded |= {name: vae.decode(source, name).sample.float() for name in COMPONENTS}
        for name, clips in decoded.items():
            predictions[name].append(probes.predict(clips))
            errors[name].append(component_errors(clips, ends[0]))
        swapped = vae.decode(TwinLatents(source.structure, motion_source.dynamics)).sample.float()
        predictions["swapped"].append(probes.predict(swapped))
        likeness.append(torch.stack([psnr(swapped, end) for end in ends]).cpu())
    predicted = {name: _concatenate(parts) for name, parts in predictions.items()}
    others = unrelated_pairs(partner)
    unrelated = {name: values[others] for name, values in predicted["original"].items()}
    partner_targets = {name: values[partner] for name, values in targets.items()}
    near = torch.cat(likeness, dim=1)
    nearest = near.argmax(dim=0)
    return {
        "components": {
            name: component_scores(parts) | probes.score(predicted[name], targets) for name, parts in errors.items()
        },
        "latent_swap": {
            "factor_attribution": factor_attribution(predicted["swapped"], targets, partner_targets, unrelated),
            "likeness": {
                end: {"psnr": mean(near[i]), "nearest": share(nearest == i, chance=1 / len(ENDS))}
                for i, end in enumerate(ENDS)
            },
        },
    }


def component_errors(decoded: torch.Tensor, originals: torch.Tensor) -> dict[str, torch.Tensor]:
    """The input of `component_scores` for a batch of clips (B, 3, T, H, W) in [-1, 1]: (B,) each, on the CPU."""
    change = originals.diff(dim=2).double()
    error = decoded.clamp(-1, 1).diff(dim=2).double() - change
    sums = {name: x.square().sum(dim=(1, 2, 3, 4)).cpu() for name, x in {"error": error, "change": change}.items()}
    return {"psnr": psnr(decoded, originals).cpu(), **sums}


def component_scores(batches: Sequence[dict[str, torch.Tensor]]) -> dict[str, Score]:
    """How much of the originals the clips show: `psnr` in dB, averaged over clips, and `change`.

    `change` is R² of the differences between frames: 1 at best, 0 for a still picture (chance).
    """
    values = _concatenate(batches)
    unexplained = ratio(values["error"], values["change"])
    change = Score(1 - unexplained.value, 1 - unexplained.high, 1 - unexplained.low, chance=0.0)
    return {"psnr": mean(values["psnr"]), "change": change}


def _batches(indices: torch.Tensor, label: str) -> Iterator[torch.Tensor]:
    return iter(progress(indices.split(BATCH), label))


def _concatenate(parts: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
