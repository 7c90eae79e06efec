"""Sprite tasks with an ideal classifier, and with pipelines that follow their conditioning or ignore it."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch

from autoencoder import TwinLatents
from benchmarks.sprites.classifier import DrawnSprites
from benchmarks.sprites.tasks import SpriteTasks, score_factors
from pipelines.classes import superclass_name
from vidgen.data.sprites import MOTIONS, subclass
from vidgen.metrics.fvd import Sampling
from vidgen.metrics.reconstruction import downsample_baseline, mean_color_baseline, psnr

SIZES = dict(num_frames=4, resolution=32)


@pytest.fixture(scope="module")
def sprites() -> DrawnSprites:
    return DrawnSprites(32, seed=7, **SIZES)


@pytest.fixture(scope="module")
def others() -> DrawnSprites:
    return DrawnSprites(32, seed=8, **SIZES)


class IdealClassifier:
    """Predicts the factors of the known sprite that is closest to a clip."""

    def __init__(self, *known: DrawnSprites) -> None:
        self.clips = torch.cat([sprites.clips() for sprites in known]).flatten(1)
        self.targets = {n: torch.cat([s.targets[n] for s in known]) for n in known[0].targets if n != "background"}

    def predict(self, clips: torch.Tensor) -> dict[str, torch.Tensor]:
        nearest = torch.cdist(clips.flatten(1), self.clips).argmin(dim=1)
        return {name: values[nearest] for name, values in self.targets.items()}


class Latents:
    """An autoencoder whose structure and dynamics are both the clip."""

    device, dtype, latent_size = torch.device("cpu"), torch.float32, 3 * 2 * 8 * 8

    def encode(self, clips):
        packed = torch.cat([clips.flatten(1), clips.flatten(1)], dim=1)
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: packed))

    def unpack(self, packed):
        a, b = packed.chunk(2, dim=1)
        return TwinLatents(a.unflatten(1, (3, 4, 32, 32)), b.unflatten(1, (3, 4, 32, 32)))

    def __call__(self, clips):
        return SimpleNamespace(sample=clips)


class Pipeline:
    """Returns a sprite of the class, or the conditioning; records its calls."""

    def __init__(self, sprites: DrawnSprites, *, ignores_class: bool = False, subclasses: Sequence[str] = ()) -> None:
        self.autoencoder, self.sprites, self.ignores_class, self.calls = Latents(), sprites, ignores_class, []
        self.subclasses = subclasses

    def __call__(self, class_labels, *, structure=None, dynamics=None, generator, **options):
        self.calls.append(SimpleNamespace(class_labels=class_labels, generator=generator, **options))
        given = structure if dynamics is None else dynamics
        if self.ignores_class or given is None:
            wanted = ["still" if self.ignores_class else name for name in class_labels]
            clips = torch.stack([self._clip(name, i) for i, name in enumerate(wanted)])
        else:
            clips = given
        return SimpleNamespace(frames=((clips + 1) / 2).transpose(1, 2))

    def _clip(self, motion: str, number: int) -> torch.Tensor:
        return self.sprites[MOTIONS.index(motion) + len(MOTIONS) * (number % 3)]["clip"]


def tasks(pipeline: Pipeline, sprites: DrawnSprites, *known: DrawnSprites) -> SpriteTasks:
    return SpriteTasks(
        pipeline,
        IdealClassifier(sprites, *known),
        sprites,
        Sampling(num_inference_steps=3, guidance_scale=1.5, seed=4),
    )


def test_accuracy_with_and_without_the_class(sprites, others):
    found = tasks(Pipeline(others), sprites, others).generate()
    assert {name: score["value"] for name, score in found["accuracy"].items()} == dict.fromkeys(found["accuracy"], 1)
    assert found["accuracy"]["generated"]["chance"] == 1 / 8
    assert found["clips"] == 32 and list(found["per_class"]) == list(MOTIONS)

    pipeline = Pipeline(others, ignores_class=True)
    found = tasks(pipeline, sprites, others).generate()
    assert found["accuracy"]["generated"]["value"] == 1 / 8 and found["accuracy"]["real"]["value"] == 1
    assert {name: score["value"] for name, score in found["per_class"].items() if score["value"]} == {"still": 1}


def test_shape_accuracy_of_subclasses(sprites, others):
    names = [subclass(factors) for factors in sprites.factors]
    known = set(names[:-1])
    asked = [name if name in known else superclass_name(name) for name in names]

    class Shapes(Pipeline):
        """Returns the sprites of its subclasses, or others with the same motion."""

        def __call__(self, class_labels, **options):
            assert class_labels == asked and asked != names
            return super().__call__(class_labels, **options)

        def _clip(self, motion: str, number: int) -> torch.Tensor:
            return self.sprites[number]["clip"]

    right, wrong = (tasks(Shapes(shown, subclasses=known), sprites, others).generate() for shown in (sprites, others))
    assert right["accuracy"]["generated"] == wrong["accuracy"]["generated"]  # of motions
    assert right["shape"]["generated"] == right["shape"]["real"] == wrong["shape"]["reconstructed"]
    assert right["shape"]["generated"]["value"] == 1 and right["shape"]["generated"]["chance"] == 1 / 6
    assert wrong["shape"]["generated"]["value"] < 0.5
    assert "shape" not in tasks(Pipeline(others), sprites, others).generate()


def test_class_and_noise_of_every_clip(sprites, others):
    pipeline = Pipeline(others)
    tasks(pipeline, sprites, others).generate()
    (call,) = pipeline.calls
    assert call.class_labels == [*MOTIONS] * 4
    assert [generator.initial_seed() for generator in call.generator] == [*range(4, 36)]
    assert (call.num_inference_steps, call.guidance_scale) == (3, 1.5)


@pytest.mark.parametrize("task", ["animate", "retarget"])
def test_conditioning_is_preserved(sprites, others, task):
    pipeline = Pipeline(others)
    found = getattr(tasks(pipeline, sprites, others), task)(0.25)
    done = {"animate": "animated", "retarget": "retargeted"}[task]
    for scores in found[done], found["reconstructed"]:
        assert {scores[name]["value"] for name in ("motion", "shape", "texture")} == {1}
        assert scores["colors"]["value"] == scores["position"]["value"] == 0
    (call,) = pipeline.calls
    stream = {"animate": "structure", "retarget": "dynamics"}[task]
    assert getattr(call, f"{stream}_strength") == 0.25
    assert call.class_labels == ([*MOTIONS] * 4 if task == "animate" else None)


def test_unrelated_clips_score_at_chance(sprites):
    targets = {name: values for name, values in sprites.targets.items() if name != "background"}
    mixed = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    scores = score_factors({name: values[mixed] for name, values in targets.items()}, targets)
    for name in ("motion", "shape", "texture"):
        assert abs(scores[name]["value"] - scores[name]["chance"]) < 0.35
    for name in ("colors", "position"):
        assert scores[name]["value"] == pytest.approx(scores[name]["chance"], rel=0.3)


def test_positions_of_two_shapes_do_not_count(sprites):
    targets = {name: values for name, values in sprites.targets.items() if name != "background"}
    two = targets["motion"] == MOTIONS.index("swap")
    moved = targets | {"position": targets["position"] + 5 * two[:, None, None]}
    assert score_factors(moved, targets)["position"]["value"] == 0
    moved = targets | {"position": targets["position"] + 3 * ~two[:, None, None]}
    assert score_factors(moved, targets)["position"]["value"] == pytest.approx(3 * 2**0.5)


def test_reconstruction_psnr_and_baselines(sprites):
    pipeline = Pipeline(sprites)
    clips = sprites.clips()
    pipeline.autoencoder = type("Dull", (Latents,), {"__call__": lambda self, x: SimpleNamespace(sample=0.9 * x)})()
    found = tasks(pipeline, sprites).reconstruct()
    assert found["rate"] == 3 * 2 * 8 * 8 / (3 * 4 * 32 * 32)
    expected = {
        "reconstructed": 0.9 * clips,
        "downsample": downsample_baseline(clips, 384),
        "color": mean_color_baseline(clips),
    }
    for name, made in expected.items():
        assert found["psnr"][name]["value"] == pytest.approx(psnr(made, clips).mean().item())
    assert found["psnr"]["reconstructed"]["value"] > found["psnr"]["downsample"]["value"]
