"""What each of a VAE's two latents holds: probes of sprites, clips decoded from one latent, and reenactments.

Needs no data: sprites are drawn as they are needed, so their factors are known, and no VAE was trained on them unless
on the same seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from autoencoder import AutoencoderKLVidTwin, TwinLatents
from vidgen.common.progress import progress
from vidgen.data.dataset import frames_to_clip
from vidgen.data.sprites import MOTIONS, render_sprite, sample_factors
from vidgen.metrics.reconstruction import downsample_grids, psnr

from .latent_swap import (
    CLASSES,
    SpriteReaders,
    cross_factors,
    crossed_pairs,
    pixel_measurements,
    sprite_targets,
    strangers,
    whose,
)
from .probes import Ridge, Score, mean, probe_classes, probe_points, ratio, share

FEATURES = ("structure", "dynamics", "both", "pixels")  # what is probed
COMPONENTS = ("both", "structure", "dynamics")  # what is decoded
ENDS = ("a", "a_as_b", "b_as_a", "b")  # what a reenactment may look like: A, A moving as B does, ...
FPS = 8
BATCH = 16


class Sprites:
    """Sprites, N / 8 of each motion, and what a VAE makes of them; all tensors on the CPU.

    Args:
        vae: its clips' size is the sprites'.
        per_motion: how many of each.
        seed: of the sprites, as in `write_sprites`: VAEs should be trained on another.

    Attributes:
        factors: of the N clips, motion by motion.
        targets: (N, ...), from `sprite_targets`.
        features: (N, ·) each, by the names in `FEATURES`: posterior means; `both` is packed. `pixels` are every frame
            shrunk alike, to no fewer values than `both` has.
        measurements: (N, ·) each, from `pixel_measurements`.
    """

    def __init__(self, vae: AutoencoderKLVidTwin, per_motion: int, seed: int) -> None:
        self.factors = sprites_factors(vae, per_motion, seed)
        self.targets = sprite_targets(self.factors)
        parts = [self._look_at(vae, batch) for batch in _batches(torch.arange(len(self.factors)), "encoding sprites")]
        self.features, self.measurements = (_concatenated(column) for column in zip(*parts, strict=True))

    def _look_at(self, vae: AutoencoderKLVidTwin, batch: torch.Tensor) -> tuple[dict, dict]:
        clips = render([self.factors[i] for i in batch.tolist()]).to(vae.device)
        packed = vae.encode(clips).latent_dist.mode().float()
        latents = vae.unpack(packed)
        _, height, width = downsample_grids(tuple(clips.shape[1:]), packed.shape[1])[-1]
        small = F.interpolate(clips.flatten(1, 2), size=(height, width), mode="bilinear", antialias=True)
        values = (latents.structure, latents.dynamics, packed, small)
        features = {name: x.flatten(1).cpu() for name, x in zip(FEATURES, values, strict=True)}
        return features, {name: x.cpu() for name, x in pixel_measurements(clips).items()}


def sprites_factors(vae: AutoencoderKLVidTwin, per_motion: int, seed: int) -> list[dict]:
    """The factors of sprites of a VAE's own size, motion by motion: those that `write_sprites` gives."""
    _, num_frames, resolution, _ = vae.clip_shape
    sizes = dict(resolution=resolution, num_frames=num_frames, fps=FPS)
    return [
        sample_factors(np.random.default_rng([seed, label, i]), motion, **sizes)
        for label, motion in enumerate(MOTIONS)
        for i in range(per_motion)
    ]


def render(factors: Sequence[dict]) -> torch.Tensor:
    """The clips (N, 3, T, H, W) in [-1, 1] of N sprites' factors."""
    return frames_to_clip(torch.from_numpy(np.stack([render_sprite(clip) for clip in factors])))


@torch.no_grad()
def sprite_roles(vae: AutoencoderKLVidTwin, per_motion: tuple[int, int], seeds: tuple[int, int]) -> dict[str, Any]:
    """How a VAE's two latents share what is in sprites.

    Args:
        vae: with two latents.
        per_motion: sprites of each motion to fit probes and readers on, and to test them on.
        seeds: of these sprites; no seed that the VAE was trained on.

    Returns:
        `values`, how many numbers each of `FEATURES` has. `probes`: for each target of `sprite_targets` and each of
        `FEATURES` the scores of a linear probe, `accuracy` or `r2` and `distance`. `components`: what clips as drawn,
        and decoded from both latents or one, show, see `component_scores` and `SpriteReaders.scores`. `reenactment`:
        `whose` factors clips of crossed latents show (see there), and `likeness`: by `ENDS`, the mean PSNR to what
        they may look like and how often it is the `nearest`. The last two are without `swap`.

    Raises:
        ValueError: if the VAE has one latent only.
    """
    if 0 in vae.dynamics_shape:
        raise ValueError("a VAE with one latent has no roles to tell apart.")
    fitted, tested = (Sprites(vae, count, seed) for count, seed in zip(per_motion, seeds, strict=True))
    probes: dict[str, dict[str, dict[str, Score]]] = {target: {} for target in fitted.targets}
    for name in FEATURES:
        ridge, features = Ridge(fitted.features[name].to(vae.device)), tested.features[name]
        for target, scores in probes.items():
            own, others = fitted.targets[target], tested.targets[target]
            if target in CLASSES:
                scores[name] = {"accuracy": probe_classes(ridge, own, features, others)}
            else:
                scores[name] = probe_points(ridge, own, features, others)
    single = fitted.targets["motion"] != MOTIONS.index("swap")
    readers = SpriteReaders(
        {name: values[single] for name, values in fitted.measurements.items()},
        {name: values[single] for name, values in fitted.targets.items()},
    )
    values = {name: features.shape[1] for name, features in tested.features.items()}
    return {"values": values, "probes": probes, **_decoded_roles(vae, tested, readers)}


def _decoded_roles(vae: AutoencoderKLVidTwin, sprites: Sprites, readers: SpriteReaders) -> dict[str, Any]:
    kept = (sprites.targets["motion"] != MOTIONS.index("swap")).nonzero().flatten()
    factors = [sprites.factors[i] for i in kept.tolist()]
    targets = {name: values[kept] for name, values in sprites.targets.items()}
    packed = sprites.features["both"][kept]
    partner = crossed_pairs(targets["motion"])
    shown: dict[str, list] = {name: [] for name in ("drawn", *COMPONENTS, "crossed")}
    errors: dict[str, list] = {name: [] for name in ("drawn", *COMPONENTS)}
    likeness = []
    for batch in _batches(torch.arange(len(kept)), "decoding sprites"):
        a, b = ([factors[i] for i in chosen.tolist()] for chosen in (batch, partner[batch]))
        crossings = [cross_factors(*pair) for pair in zip(a, b, strict=True)]
        returns = [cross_factors(*pair) for pair in zip(b, a, strict=True)]
        ends = [render(clips).to(vae.device) for clips in (a, crossings, returns, b)]
        own, lent = (vae.unpack(packed[chosen].to(vae.device)) for chosen in (batch, partner[batch]))
        decoded = {"drawn": ends[0]}
        decoded |= {name: vae.decode(own, name).sample.float() for name in COMPONENTS}
        for name, clips in decoded.items():
            shown[name].append(readers.read(clips))
            errors[name].append(component_errors(clips, ends[0]))
        crossed = vae.decode(TwinLatents(own.structure, lent.dynamics)).sample.float()
        shown["crossed"].append(readers.read(crossed))
        likeness.append(torch.stack([psnr(crossed, end) for end in ends]).cpu())
    read = {name: _concatenated(parts) for name, parts in shown.items()}
    others = strangers(partner)
    unrelated = {name: values[others] for name, values in read["drawn"].items()}
    lenders = {name: values[partner] for name, values in targets.items()}
    near = torch.cat(likeness, dim=1)
    nearest = near.argmax(dim=0)
    return {
        "components": {
            name: component_scores(parts) | readers.scores(read[name], targets) for name, parts in errors.items()
        },
        "reenactment": {
            "whose": whose(read["crossed"], targets, lenders, unrelated),
            "likeness": {
                end: {"psnr": mean(near[i]), "nearest": share(nearest == i, chance=1 / len(ENDS))}
                for i, end in enumerate(ENDS)
            },
        },
    }


def component_errors(decoded: torch.Tensor, originals: torch.Tensor) -> dict[str, torch.Tensor]:
    """What `component_scores` needs of a batch of clips (B, 3, T, H, W) in [-1, 1]: (B,) each, on the CPU."""
    change = originals.diff(dim=2).double()
    missed = decoded.clamp(-1, 1).diff(dim=2).double() - change
    squares = {"missed": missed, "change": change}
    sums = {name: x.square().sum(dim=(1, 2, 3, 4)).cpu() for name, x in squares.items()}
    return {"psnr": psnr(decoded, originals).cpu(), **sums}


def component_scores(batches: Sequence[dict[str, torch.Tensor]]) -> dict[str, Score]:
    """How much of the originals clips show: `psnr` in dB, the mean over clips, and `change`.

    That is the share of the change from frame to frame that is right: 1 at best, 0 for a still picture (its chance),
    below 0 for more wrong than right.
    """
    values = _concatenated(batches)
    missed = ratio(values["missed"], values["change"])
    change = Score(1 - missed.value, 1 - missed.high, 1 - missed.low, chance=0.0)
    return {"psnr": mean(values["psnr"]), "change": change}


def _batches(indices: torch.Tensor, label: str) -> Iterator[torch.Tensor]:
    return iter(progress(indices.split(BATCH), label))


def _concatenated(parts: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
