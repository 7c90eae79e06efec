"""One model, four tasks: generation, image-to-video, motion transfer and roll-outs of sprites, scored by a classifier.

    python -m benchmarks.sprites --scale cpu --pipeline FOLDER

The classifier is trained first, on separate sprites, and its accuracy on held-out sprites is reported.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from accelerate import PartialState

from pipelines import VidTwinPipeline
from pipelines.rollout import rollout
from vidgen.common.errors import UserError
from vidgen.data.sprites import MOTIONS
from vidgen.metrics.fvd import Sampling

from ..common import generation
from ..common.harness import Benchmark, Results
from ..common.tables import markdown_table, score_cell
from .classifier import SEEDS, DrawnSprites, SpriteClassifier, load_classifier, sprite_sizes
from .latent_swap import CLASSES
from .rollouts import rollout_scores
from .tasks import PER_MOTION, SpriteTasks, score_factors

ROLLOUTS = {"smoke": 1, "cpu": 4}  # of each motion
ROLLOUT_FRAMES, OVERLAP = 64, 2
STEPS = {"smoke": 2, "cpu": 25}
STRENGTHS = (0.0, 0.5)  # of the conditioning latent
FACTORS = {  # keys of `score_factors`, with headings
    "motion": "motion accuracy",
    "shape": "shape accuracy",
    "colors": "color error (RGB L2)",
    "position": "position error, px",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pipeline", metavar="FOLDER", help="model of sprites, trained with independent timesteps")
    parser.add_argument("--guidance", type=float, default=3.0, help="classifier-free guidance scale (default: 3)")
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps (default: 25)")
    generation.add_temperature(parser)


def run(options: argparse.Namespace) -> Results | None:
    scale = options.scale
    if scale == "paper":
        raise UserError("the paper has no sprites, so there is no --scale paper: take --scale cpu.")
    if options.pipeline is None and scale == "smoke":
        options.pipeline = generation.train_tiny_pipeline(options.work_dir / "ucf101_fvd")
    if options.pipeline is None:
        raise UserError("name a pipeline that was trained on sprites with independent timesteps: --pipeline FOLDER.")
    pipeline = generation.load_placed_pipeline(options.pipeline, PartialState(), options.dtype)
    if missing := [motion for motion in MOTIONS if motion not in pipeline.labels]:
        raise UserError(f"the pipeline must know the motions of sprites as classes; it has no {missing[0]!r}.")
    sizes = sprite_sizes(pipeline.autoencoder)
    count = len(MOTIONS) * PER_MOTION[scale]
    sprites, others = (DrawnSprites(count, SEEDS[name], **sizes) for name in ("tested", "others"))

    options.steps = STEPS[scale] if options.steps is None else options.steps
    sampling = Sampling(
        guidance_scale=options.guidance, num_inference_steps=options.steps, temperature=options.temperature
    )
    classifier = load_classifier(options.work_dir / "sprites" / "classifier", scale, **sizes)
    if not PartialState().is_main_process:
        return None
    tasks = SpriteTasks(pipeline, classifier, sprites, sampling)
    return {
        "pipeline": str(options.pipeline),
        "sampling": {"steps": options.steps, "guidance": options.guidance, "temperature": options.temperature},
        "classifier": score_factors(classifier.predict(others.clips()), others.targets),
        "generate": tasks.generate(),
        "animate": {str(strength): tasks.animate(strength) for strength in STRENGTHS},
        "retarget": {str(strength): tasks.retarget(strength) for strength in STRENGTHS},
        "reconstruct": tasks.reconstruct(),
        "rollouts": score_rollouts(pipeline, classifier, options),
    }


def score_rollouts(
    pipeline: VidTwinPipeline, classifier: SpriteClassifier, options: argparse.Namespace
) -> dict[str, Any]:
    """Scores of roll-outs of every class, of three windows or more."""
    window = pipeline.autoencoder.clip_shape[1]
    labels = torch.arange(len(MOTIONS)).repeat_interleave(ROLLOUTS[options.scale])
    frames = ROLLOUT_FRAMES if options.scale == "cpu" else 3 * window
    videos = rollout(
        pipeline,
        frames,
        [MOTIONS[label] for label in labels.tolist()],
        overlap=OVERLAP,
        guidance_scale=options.guidance,
        num_inference_steps=options.steps,
        temperature=options.temperature,
        generator=[torch.Generator().manual_seed(i) for i in range(len(labels))],
    )
    clips = 2 * videos.float().cpu().transpose(1, 2) - 1
    scores = rollout_scores(clips, labels, classifier, window=window, overlap=OVERLAP)
    return {"frames": frames, "overlap": OVERLAP, "videos": len(labels), **scores}


# --- tables ----------------------------------------------------------------------------------------------------------


def tables(results: Results) -> str:
    sampling, generated, real = results["sampling"], results["generate"], results["classifier"]
    reconstruct = results["reconstruct"]
    psnr = {name: f"{score['value']:.2f} dB" for name, score in reconstruct["psnr"].items()}
    parts = [
        f"Classifier on {generated['clips']} held-out real sprites: accuracy of the motion {_text(real, 'motion')}, "
        f"of the shape {_text(real, 'shape')}, of the texture {_text(real, 'texture')}; color error "
        f"{_text(real, 'colors')}, an RGB L2 distance of at most 441; position error {_text(real, 'position')} px. In "
        "the tables: 95 % bootstrap intervals in brackets, chance after the bar. "
        f"{sampling['steps']} steps, guidance {sampling['guidance']:g}, temperature "
        f"{sampling.get('temperature', 1):g}.",
        f"Reconstruction PSNR at a rate of {reconstruct['rate']:.2%}: {psnr['reconstructed']}; baselines: "
        f"rate-matched downsampling {psnr['downsample']}, per-clip mean color {psnr['color']}.",
        "Generation by class:",
        _generation_table(generated),
        markdown_table(
            ["class", "motion accuracy of generated clips"],
            [[name, score_cell(generated["per_class"][name])] for name in MOTIONS],
        ),
        "Image-to-video (`animate`): keep the structure of a sprite, generate its dynamics by class.",
        _conditioning_table(results["animate"], "animated"),
        "Motion transfer (`retarget`): keep the dynamics of a sprite, resample its structure without a class.",
        _conditioning_table(results["retarget"], "retargeted"),
    ]
    return "\n\n".join([*parts, rollout_text(results["rollouts"])])


def _generation_table(generated: dict[str, Any]) -> str:
    keys = {"accuracy": "motion accuracy", "shape": "shape accuracy"}
    keys = {key: label for key, label in keys.items() if key in generated}
    rows = [
        [name, *(score_cell(generated[key][name]) for key in keys)] for name in ("generated", "reconstructed", "real")
    ]
    return markdown_table([f"{generated['clips']} clips", *keys.values()], rows)


def _conditioning_table(by_strength: dict[str, Any], key: str) -> str:
    scores = {f"strength {float(strength):g}": found[key] for strength, found in by_strength.items()}
    scores["reconstruction of the sprite"] = next(iter(by_strength.values()))["reconstructed"]
    rows = [[label, *(score_cell(found[name]) for name in FACTORS)] for label, found in scores.items()]
    return markdown_table(["clips", *FACTORS.values()], rows)


def rollout_text(rollouts: dict[str, Any]) -> str:
    seams = rollouts["seams"]
    rows = [
        [window["first_frame"], *(score_cell(window[name]) for name in ("motion", "shape", "colors"))]
        for window in rollouts["windows"]
    ]
    header = ["first frame of the window", "motion accuracy", "same shape as first window", "color drift (RGB L2)"]
    text = f"Roll-outs: {rollouts['videos']} videos of {rollouts['frames']} frames, overlap {rollouts['overlap']}."
    if "jumps" in seams:
        text += (
            f" At the seams between windows, relative to all other steps, shapes move {seams['moved']:.2f} times as "
            f"far; {seams['jumps']:.1%} of the steps there are "
            "jumps, which exceed the longest step of the first window by a quarter and a pixel."
        )
    return f"{text}\n\n{markdown_table(header, rows)}"


def _text(scores: dict[str, dict[str, float]], name: str) -> str:
    form = ".1%" if name in CLASSES else ".3g"
    return f"{scores[name]['value']:{form}} (chance {scores[name]['chance']:{form}})"


BENCHMARK = Benchmark("sprites", "One model, four tasks, on sprites", run, tables, add_options=add_options)

if __name__ == "__main__":
    BENCHMARK.main()
