"""The benchmark of prompts: smoke scale, measured names, and pipelines that follow prompts or ignore them."""

from __future__ import annotations

import colorsys
import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.text import __main__ as text
from benchmarks.text import sprites as tasks
from benchmarks.text.factors import FACTORS, PromptedSprites, measure_colors, name_factors, score_names
from pipelines import VidTwinPipeline
from vidgen.data.sprite_captions import BACKGROUNDS, COLORS, name_color
from vidgen.data.sprites import MOTIONS, SHAPES, render_sprite, sample_factors
from vidgen.metrics.fvd import Sampling

SIZES = dict(num_frames=8, resolution=32)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


class Obedient:
    """A pipeline that draws the requested sprites, and a classifier that knows every clip that was drawn.

    Prompts are descriptions in JSON. Structure prompts give the appearance and dynamics prompts the motion; what they
    leave open is the first choice that the negative prompt does not name.
    """

    def __init__(self) -> None:
        shape = dict(clip_shape=(3, 8, 32, 32), device="cpu", dtype=torch.float32)
        self.autoencoder = type("VAE", (), {**shape, "__call__": lambda _, x: SimpleNamespace(sample=x)})()
        self.clips, self.labels, self.calls = [], [], []

    def __call__(self, *, prompt=None, structure_prompt=None, dynamics_prompt=None, negative_prompt=None, **options):
        self.calls.append(options)
        structure, dynamics = structure_prompt or prompt, dynamics_prompt or prompt
        negative = negative_prompt or ["{}"] * len(structure)
        rows = [map(json.loads, row) for row in zip(structure, dynamics, negative, strict=True)]
        return SimpleNamespace(frames=torch.stack([self.draw(*row) for row in rows]))

    def draw(self, structure: dict, dynamics: dict, negative: dict) -> torch.Tensor:
        motion = dynamics["motion"] or self.choose(("still", "spin"), negative.get("motion"))
        factors = sample_factors(np.random.default_rng(0), motion, **SIZES)
        (avoided, *_) = negative.get("colors") or [None]
        for shape, kind, color in zip(factors["shapes"], structure["shapes"], structure["colors"], strict=False):
            hue = COLORS[color or self.choose(("red", "green"), avoided)] / 360
            colors = [colorsys.hsv_to_rgb(hue, saturation, 0.95) for saturation in (0.9, 0.36)]
            shape.update(kind=kind, colors=colors)
        hue = BACKGROUNDS[structure["background"]] / 360
        factors["background"]["colors"] = [colorsys.hsv_to_rgb(hue, 0.4, value) for value in (0.15, 0.45)]
        frames = torch.from_numpy(render_sprite(factors)).movedim(-1, 1).float() / 255
        self.remember(2 * frames.transpose(0, 1) - 1, motion, structure["shapes"][0])
        return frames

    def choose(self, options: tuple[str, ...], avoided: str | None) -> str:
        return next(option for option in options if option != avoided)

    def remember(self, clip: torch.Tensor, motion: str, shape: str) -> None:
        self.clips.append(clip.flatten())
        self.labels.append((MOTIONS.index(motion), SHAPES.index(shape)))

    def predict(self, clips: torch.Tensor) -> dict[str, torch.Tensor]:
        nearest = torch.cdist(clips.flatten(1), torch.stack(self.clips)).argmin(dim=1)
        motion, shape = torch.tensor(self.labels)[nearest].T
        return {"motion": motion, "shape": shape}


class IgnoresDynamics(Obedient):
    """Moves as the structure prompt describes, in any color."""

    def draw(self, structure: dict, dynamics: dict, negative: dict) -> torch.Tensor:
        colors = ["cyan"] * len(structure["colors"])
        return super().draw({**structure, "colors": colors}, structure, negative)


@pytest.fixture
def prompt_tasks(monkeypatch):
    """Tasks of a stub, with descriptions in JSON as prompts."""
    write = lambda descriptions, seed=0: [json.dumps(asdict(each)) for each in descriptions]  # noqa: E731
    monkeypatch.setattr(tasks, "write_prompts", write)
    monkeypatch.setattr(text.generation, "BATCH", 5)
    return lambda stub: tasks.PromptTasks(stub, stub, Sampling(num_inference_steps=2), per_motion=2)


def values(scores: dict) -> dict[str, float]:
    return {name: scores[name]["value"] for name in FACTORS}


def test_a_pipeline_that_follows_prompts_is_right(prompt_tasks):
    stub = Obedient()
    found = prompt_tasks(stub)
    for held_out in (False, True):
        sprites = found._draw(held_out)
        for clip, names in zip(sprites.clips(), sprites.descriptions, strict=True):
            stub.remember(clip, names.motion, names.shapes[0])
        for scores in found.compositions(held_out).values():
            assert set(values(scores).values()) == {1.0} and scores["all"]["value"] == 1
    swapped = found.swapped_dynamics(whole=True)
    assert set(values(swapped["swapped"]).values()) == set(values(swapped["unswapped"]).values()) == {1.0}
    assert swapped["motion_of_structure"]["value"] == 0
    assert set(values(swapped["relative"]).values()) == {1.0}
    negative = found.negative_prompts()
    assert {factor: scores["same"]["value"] for factor, scores in negative.items()} == {"color": 0, "motion": 0}


def test_a_pipeline_that_ignores_a_prompt_is_found(prompt_tasks):
    swapped = prompt_tasks(IgnoresDynamics()).swapped_dynamics(whole=True)
    assert swapped["swapped"]["motion"]["value"] == 0 and swapped["motion_of_structure"]["value"] == 1
    assert swapped["swapped"]["shape"]["value"] == swapped["relative"]["shape"]["value"] == 1
    color = swapped["swapped"]["color"]
    assert color["value"] <= color["chance"] < 0.6


def test_guidance_reaches_the_pipeline(prompt_tasks):
    stub = Obedient()
    delayed = replace(prompt_tasks(stub), sampling=Sampling(num_inference_steps=2, structure_delay=0.5))
    assert list(delayed.guidance((1.0, 5.0))) == ["1", "5"]
    assert [call["guidance_scale"] for call in stub.calls] == [1.0] * 4 + [5.0] * 4  # batches of 5
    assert {call["structure_delay"] for call in stub.calls} == {0.5}


def test_another_seed_has_other_prompts(prompt_tasks):
    drawn = [
        replace(prompt_tasks(Obedient()), sampling=Sampling(seed))._draw(held_out=False).descriptions
        for seed in (0, 0, 5)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert text.page.describe_sampling({"steps": 2, "guidance": [2.0], "structure_delay": 0.0, "seed": 5}).endswith(
        "seed 5"
    )


def test_real_video_can_be_sampled_in_another_way():
    options = SimpleNamespace(
        guidance=[4.0],
        scale="smoke",
        structure_delay=0.3,
        temperature=0.8,
        seed=0,
        real_guidance=None,
        real_temperature=0.5,
    )
    sampling = text.real_sampling(options)
    assert (sampling.guidance_scale, sampling.structure_delay, sampling.temperature) == (4.0, 0.3, 0.5)
    options.real_guidance = 2.0
    sampling = text.real_sampling(options)
    assert (sampling.guidance_scale, sampling.structure_delay, sampling.temperature) == (2.0, 0.0, 0.5)
    options.real_temperature = None
    assert text.real_sampling(options).temperature == 0.8
    stated = text.page.describe_sampling({"steps": 2, "guidance": [2.0], "structure_delay": 0.0, "temperature": 0.5})
    assert stated == "2 steps, guidance 2, temperature 0.5"


@pytest.mark.parametrize(("guidance", "expected"), [([3.0], 3.0), ([3.0, 5.0], (3.0, 5.0))])
def test_guidance_is_one_scale_or_one_per_stream(guidance, expected):
    options = SimpleNamespace(guidance=guidance, scale="smoke", structure_delay=0.3, temperature=0.8, seed=7)
    assert text.sampling_of(options) == Sampling(7, expected, 2, structure_delay=0.3, temperature=0.8)
    stated = text.page.tables({"sampling": {"steps": 2, "guidance": guidance}})
    assert ("guidance 3 of structure and 5 of dynamics." if len(guidance) > 1 else "guidance 3.") in stated
    delayed = text.page.tables({"sampling": {"steps": 2, "guidance": guidance, "structure_delay": 0.3}})
    assert delayed.startswith("2 steps, structure delayed by 0.3 of the steps, guidance 3")


@pytest.mark.parametrize("held_out", [False, True])
def test_prompted_sprites_are_of_one_kind_and_clearly_named(held_out):
    sprites = PromptedSprites.draw(3, 7, held_out=held_out, **SIZES)
    assert [names.motion for names in sprites.descriptions] == [motion for motion in MOTIONS for _ in range(3)]
    assert all(names.is_complete and names.is_held_out == held_out for names in sprites.descriptions)
    longer = PromptedSprites.draw(4, 7, held_out=held_out, **SIZES)
    assert longer.factors[:3] == sprites.factors[:3]


def test_names_of_real_colors_are_those_of_the_factors():
    sprites = PromptedSprites.draw(4, 7, held_out=False, num_frames=4, resolution=64)
    wanted, clips = sprites.names(), sprites.clips()
    colors, backgrounds = measure_colors(clips, torch.tensor([motion == "swap" for motion in wanted["motion"]]))
    assert [name_color(rgb, COLORS) for rgb in colors.tolist()] == wanted["color"]
    assert [name_color(rgb, BACKGROUNDS) for rgb in backgrounds.tolist()] == wanted["background"]
    stub = SimpleNamespace(predict=lambda clips: {name: torch.zeros(len(clips)).long() for name in FACTORS[:2]})
    found = name_factors(torch.zeros(2, 3, 4, 8, 8), ["still", "swap"], stub)  # without a shape
    assert found["motion"] == ["slide"] * 2 and set(found["color"]) <= set(COLORS)


def test_all_counts_clips_that_are_right_in_every_factor():
    wanted = {name: ["a", "b"] for name in FACTORS}
    scores = score_names(wanted | {"shape": ["a", "a"]}, wanted)
    assert scores["shape"]["value"] == scores["all"]["value"] == 0.5 and scores["motion"]["value"] == 1
    assert scores["shape"]["chance"] == 0.5 and scores["all"]["chance"] is None


def test_copies_of_training_clips_are_counted():
    training, test = (
        SimpleNamespace(clips=SimpleNamespace(pixels=torch.randint(256, (9, 3, 4, 24, 36), dtype=torch.uint8)))
        for _ in range(2)
    )
    generated = torch.cat([training.clips.pixels[:3], 255 - training.clips.pixels[3:4]])
    scores = text.real.measure_copies(generated, test, training)
    assert scores["copies"]["generated"]["value"] == 0.75 and scores["median"]["generated"] == 0


def test_smoke_and_a_second_run_computes_nothing(work_dir, monkeypatch):
    arguments = ["--work-dir", str(work_dir)]
    text.BENCHMARK.main(arguments)
    results = json.loads((work_dir / "smoke" / "text.json").read_text())["results"]
    assert set(results["real"]["sets"]) == {"real", "reconstruction", "generated"}
    assert results["real"]["relative"]["real"] == 1
    page = (work_dir / "text.md").read_text()
    assert "| generated, held-out |" in page and "whole caption of A" in page and "| chance | 0.293 |" in page
    assert "Nearest training clip" in page
    monkeypatch.setattr(VidTwinPipeline, "__call__", lambda *args, **kwargs: pytest.fail("sampled again"))
    text.BENCHMARK.main(arguments)
    assert json.loads((work_dir / "smoke" / "text.json").read_text())["results"] == results


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scale", "paper"], "take --scale cpu"),
        (["--scale", "cpu"], "--pipeline FOLDER"),
        (["--scale", "cpu", "--real", "x"], "require"),
        (["--scale", "cpu", "--train", "x"], "--test LIST"),
        (["--pipeline", "x", "--guidance", "1", "2", "3"], "two for structure and dynamics, not 3"),
        (["--pipeline", "x", "--guidance", "1", "nan"], "--guidance must be a finite number, not nan"),
        (["--pipeline", "x", "--real-temperature", "-1"], "temperature must be a finite number of at least 0, not -1"),
    ],
)
def test_missing_options_are_one_sentence(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        text.BENCHMARK.main([*arguments, "--work-dir", str(tmp_path)])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_model_without_prompts_is_refused(monkeypatch):
    monkeypatch.setattr(
        text.generation, "load_placed_pipeline", lambda *_: SimpleNamespace(takes_prompts=False, text_encoder=None)
    )
    with pytest.raises(text.UserError, match="classes takes no prompts: train it on captions"):
        text.load_text_pipeline("classes", "float32")
