"""How well a pipeline does its jobs, on sprites, where the truth is known: rebuild, generate, animate and retarget.

A scorer (`benchmarks.sprites.classifier`) reads what clips show. Beside every figure stands what would be had by
chance, from clips that have nothing to do with the one in question, and what the scorer makes of the real clips and of
the autoencoder's reconstructions of them: no generated clip can be read better than that.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers import SchedulerMixin

from autoencoder import TwinLatents
from pipelines import VidTwinPipeline
from pipelines.classes import superclass_name
from pipelines.latents import normalize_latents
from pipelines.schedulers import estimate_clean, noise_levels
from vidgen.common.progress import progress
from vidgen.data.sprites import MOTIONS, SHAPES, subclass
from vidgen.metrics.frechet import FeatureStatistics, frechet_distance, quiet_about_rank
from vidgen.metrics.reconstruction import downsample_baseline, mean_color_baseline, psnr

from .classifier import DrawnSprites, Reading, SpriteScorer
from .latent_swap import CLASSES, strangers
from .probes import Score, mean, share

BATCH = 32


@dataclass(frozen=True)
class SpriteSampling:
    """How clips are sampled.

    Attributes:
        steps: of the pipeline's solver.
        guidance: classifier-free, of clips made by class.
        seed: of the noise.
    """

    steps: int = 50
    guidance: float = 2.0
    seed: int = 0


@dataclass(frozen=True)
class SpriteJobs:
    """The jobs of one pipeline, judged by one scorer on the same sprites.

    Args:
        pipeline: of a model of sprites; its classes have the names of `MOTIONS`, in whatever order, and its
            sub-classes, if any, those of `subclass`.
        scorer: the judge.
        sprites: real clips that neither was trained on, motions in turn, as many of each: to compare with, and to
            take structure and dynamics from.
        sampling: of all clips.
    """

    pipeline: VidTwinPipeline
    scorer: SpriteScorer
    sprites: DrawnSprites
    sampling: SpriteSampling

    def reconstruct(self) -> dict[str, Any]:
        """The sprites through the autoencoder: PSNR in dB, per clip, beside that of two cheap ways.

        Returns:
            `psnr` by what was shown: `reconstructed`, the clip `shrunk` to as many values as a latent has, and its
            mean `color`; `rate`, the latent's values for each of the clip's.
        """
        clips, values = self.sprites.clips(), self.pipeline.vae.latent_size
        shown = {
            "reconstructed": self._reconstructed(),
            "downsample": downsample_baseline(clips, values),
            "color": mean_color_baseline(clips),
        }
        return {
            "psnr": {name: _score(mean(psnr(made, clips))) for name, made in shown.items()},
            "rate": values / clips[0].numel(),
        }

    @torch.no_grad()
    def denoise(self, levels: int = 10) -> dict[str, float]:
        """How well the model knows clean latents from noisy ones, both streams noised alike and the class given.

        Nothing is sampled, so it tells models of one autoencoder apart that are too close for the scorer.

        Args:
            levels: of noise, the same whatever the model's schedule (`even_timesteps`).

        Returns:
            `error`, the mean square of what the estimate of normalized latents is off, made without self-conditioning;
            and `chance`, the same with the sprites' mean for the estimate.
        """
        pipeline, transformer = self.pipeline, self.pipeline.transformer
        clean = normalize_latents(TwinLatents(*self._latents()).pack(), pipeline.vae)
        labels = torch.tensor(pipeline.get_label_ids([MOTIONS[i] for i in self.sprites.targets["motion"].tolist()]))
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(self.sampling.seed)).to(clean)
        off = []
        for timestep in even_timesteps(pipeline.scheduler, levels):
            for z, e, label in zip(*(x.split(BATCH) for x in (clean, noise, labels.to(clean.device))), strict=True):
                times = torch.full((len(z),), timestep, device=z.device)
                alpha, sigma = (level[:, None] for level in noise_levels(pipeline.scheduler, times))
                noisy = alpha * z + sigma * e
                prediction = transformer(noisy.to(transformer.dtype), times, label).sample.float()
                off.append((estimate_clean(pipeline.scheduler, prediction, times, noisy) - z).square().mean(dim=1))
        chance = (clean - clean.mean(dim=0)).square().mean()
        return {"error": torch.cat(off).mean().item(), "chance": chance.item()}

    def generate(self, others: DrawnSprites) -> dict[str, Any]:
        """A clip of each sprite's class: does it move as that says, and how far is it from real ones?

        Where the pipeline has sub-classes they are asked for, and the shapes that they name are looked for.

        Args:
            others: more real clips, as many, whose distance from the first is what chance alone makes.

        Returns:
            `accuracy` by what was read: `generated`, `real`, `reconstructed`; `per_class` that of the generated;
            `distance`, Fréchet distances of the scorer's features from those of `others`; and with sub-classes
            `shape`, as `accuracy`.
        """
        labels = self.sprites.targets["motion"]
        known = self.pipeline.subclasses
        names = [subclass(factors) for factors in self.sprites.factors]
        clips = {
            "generated": self._sampled([name if name in known else superclass_name(name) for name in names]),
            "real": self.sprites.clips(),
            "reconstructed": self._reconstructed(),
        }
        read = {name: self.scorer.read(batch) for name, batch in clips.items()}
        right = {name: reading["motion"] == labels for name, reading in read.items()}
        reference = FeatureStatistics.of(self.scorer.read(others.clips())["features"])
        with quiet_about_rank():
            distance = {
                name: frechet_distance(FeatureStatistics.of(reading["features"]), reference)
                for name, reading in read.items()
            }
        chance = 1 / len(MOTIONS)
        found = {
            "accuracy": {name: _score(share(hits, chance)) for name, hits in right.items()},
            "per_class": {
                name: _score(share(right["generated"][labels == label], chance)) for label, name in enumerate(MOTIONS)
            },
            "distance": distance,
            "clips": len(labels),
        }
        if known:
            asked = torch.tensor([name in known for name in names])
            shapes = self.sprites.targets["shape"]
            hits = {name: (reading["shape"] == shapes)[asked] for name, reading in read.items()}
            found["shape"] = {name: _score(share(those, 1 / len(SHAPES))) for name, those in hits.items()}
        return found

    def animate(self, strength: float = 0.0) -> dict[str, Any]:
        """Dynamics made for the structure of real clips, by their class: is what they look like kept?

        Returns:
            By what was read, `animated` and `reconstructed`, the scores of `kept`.
        """
        given = TwinLatents(*self._latents())
        motions = [MOTIONS[i] for i in self.sprites.targets["motion"].tolist()]
        animated = self._sampled(motions, structure=given.structure, structure_strength=strength)
        return self._compared(animated=animated)

    def retarget(self, strength: float = 0.0) -> dict[str, Any]:
        """Structure made for the dynamics of real clips, without saying their class: is the motion kept?

        Returns:
            By what was read, `retargeted` and `reconstructed`, the scores of `kept`.
        """
        given = TwinLatents(*self._latents())
        return self._compared(retargeted=self._sampled(None, dynamics=given.dynamics, dynamics_strength=strength))

    def _compared(self, **clips: torch.Tensor) -> dict[str, Any]:
        clips["reconstructed"] = self._reconstructed()
        return {name: kept(self.scorer.read(batch), self.sprites.targets) for name, batch in clips.items()}

    @torch.no_grad()
    def _reconstructed(self) -> torch.Tensor:
        vae = self.pipeline.vae
        return torch.cat(
            [vae(x.to(vae.device, vae.dtype)).sample.float().cpu() for x in self.sprites.clips().split(BATCH)]
        )

    @torch.no_grad()
    def _latents(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Structure and dynamics of the sprites."""
        vae = self.pipeline.vae
        clips = self.sprites.clips().split(BATCH)
        packed = torch.cat([vae.encode(x.to(vae.device, vae.dtype)).latent_dist.mode().float() for x in clips])
        latents = vae.unpack(packed)
        return latents.structure, latents.dynamics

    def _sampled(self, labels: list[str] | None, **given: Any) -> torch.Tensor:
        """Clips (N, 3, T, H, W) in [-1, 1], on the CPU; each has its own noise, whatever the batch."""
        made = []
        streams = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
        strengths = {name: value for name, value in given.items() if name not in streams}
        for chosen in progress(torch.arange(len(self.sprites)).split(BATCH), "sampling"):
            generators = [torch.Generator().manual_seed(self.sampling.seed + i) for i in chosen.tolist()]
            frames = self.pipeline(
                class_labels=None if labels is None else [labels[i] for i in chosen.tolist()],
                guidance_scale=self.sampling.guidance,
                num_inference_steps=self.sampling.steps,
                generator=generators,
                output_type="pt",
                **{name: value[chosen] for name, value in streams.items()},
                **strengths,
            ).frames
            made.append(2 * frames.float().cpu().transpose(1, 2) - 1)
        return torch.cat(made)


def kept(shown: Reading, targets: Reading) -> dict[str, dict[str, float]]:
    """How much of the sprites' factors clips made from them show, with chance from the factors of other sprites.

    Args:
        shown: what N clips show, from `SpriteScorer.read`.
        targets: `sprite_targets` of the N sprites they were made from.

    Returns:
        Shares for `motion`, `shape` and `texture`; for `colors` how far they are off, a distance in RGB of levels of
        255, so at most 441, and for `position`, of sprites with one shape, how many pixels.
    """
    n = len(targets["motion"])
    other = strangers((torch.arange(n) + 1) % n)
    result = {}
    for name in CLASSES:
        chance = (shown[name] == targets[name][other]).double().mean().item()
        result[name] = _score(share(shown[name] == targets[name], chance))
    one_shape = targets["motion"] != MOTIONS.index("swap")
    for name in ("colors", "position"):
        counted = one_shape if name == "position" else torch.ones(n, dtype=torch.bool)
        off = _off(shown[name], targets[name])[counted]
        result[name] = _score(mean(off, _off(shown[name], targets[name][other])[counted].mean().item()))
    return result


def even_timesteps(scheduler: SchedulerMixin, levels: int) -> list[int]:
    """A schedule's timesteps that are nearest to given shares of noise in the variance, the same for every schedule.

    The shares are those of the cosine schedule at the middles of equal parts of its time. So pure noise is none of
    them, which a schedule without zero terminal SNR does not have.
    """
    alpha, sigma = noise_levels(scheduler, torch.arange(scheduler.config.num_train_timesteps))
    noise = sigma.square() / (alpha.square() + sigma.square())  # flow matching does not preserve the variance
    wanted = torch.sin(torch.pi / 2 * (torch.arange(levels) + 0.5) / levels).square()
    return (noise - wanted[:, None]).abs().argmin(dim=1).tolist()


def _off(points: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """(N,): the mean Euclidean distance of a clip's points."""
    return (points - others).norm(dim=2).mean(dim=1)


def _score(score: Score) -> dict[str, float]:
    return {name: value for name, value in asdict(score).items() if value is not None}
