"""Generated clips against their prompts: factors of sprites, and the ranking of captions of real clips.

    python -m benchmarks.text --scale cpu --pipeline FOLDER
    python -m benchmarks.text --scale cpu --real FOLDER --train LIST --test LIST --groups TABLE --detector FILE

`--pipeline` is a model of captioned sprites (`vidgen sprites FOLDER --captions`, trained on captions_seen.csv). The
sprite classifier is trained first, on separate sprites. `--train` and `--test` are lists of real videos with the
columns path,label,caption; a matcher of video and text is fitted to the first and ranks the captions of the second,
for held-out real clips and for those that the model `--real` generates. Both parts can be in one command. Scores of
sprites and generated real clips are kept in WORK_DIR/text, by the weights: repeat the command to continue.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState

from pipelines import VidTwinPipeline
from pipelines.text import TextEncoder
from vidgen.common.config import load_config
from vidgen.common.errors import UserError
from vidgen.common.loading import text_encoder_hash, weights_hash
from vidgen.data.sprite_captions import SEEN, write_captions
from vidgen.data.sprites import write_sprites
from vidgen.metrics.detector_options import parse_detectors
from vidgen.metrics.fvd import Sampling
from vidgen.training.config import DiTTrainingConfig
from vidgen.training.dit_trainer import train_dit

from ..common import generation
from ..common.harness import Benchmark, Results, compute_once, digest
from ..real.clips import read_groups
from ..sprites.classifier import load_classifier, sprite_sizes
from . import page, real
from .sprites import PromptTasks

PER_MOTION = {"smoke": 2, "cpu": 32}  # prompts of each motion in each task
GUIDANCE_SCALES = {"smoke": (1.0, 3.0), "cpu": (1.0, 2.0, 3.0, 5.0, 8.0)}
STEPS = {"smoke": 2, "cpu": 25}
CLIP_SHAPE, FPS = {"smoke": (3, 4, 32, 32), "cpu": (3, 16, 64, 96)}, {"smoke": 4.0, "cpu": 8.0}  # without --real
WINDOWS = {"smoke": 1, "cpu": 3}  # of each training video of the matcher
DETECTORS = {"smoke": ["pooled_pixels"], "cpu": ["squeezenet"]}  # features of the matcher


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pipeline", metavar="FOLDER", help="model of captioned sprites")
    parser.add_argument("--real", metavar="FOLDER", help="model of captioned real video")
    parser.add_argument("--train", nargs="+", type=Path, default=[], metavar="CSV", help="training videos, captioned")
    parser.add_argument("--test", nargs="+", type=Path, default=[], metavar="CSV", help="held-out videos, captioned")
    parser.add_argument("--groups", nargs="+", type=Path, default=[], metavar="CSV", help="groups: path,group")
    parser.add_argument(
        "--guidance",
        type=float,
        nargs="+",
        default=[3.0],
        metavar="SCALE",
        help="classifier-free guidance scale, or one for structure and one for dynamics (default: 3)",
    )
    generation.add_structure_delay(parser)
    generation.add_temperature(parser)
    parser.add_argument(
        "--real-guidance",
        type=float,
        metavar="SCALE",
        help="guidance of real video, without a delay (default: as of sprites)",
    )
    parser.add_argument(
        "--real-temperature", type=float, help="factor on the first noise of real video (default: as of sprites)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of noise and of the prompts of sprites, for other ones (default: 0)"
    )
    generation.add_detector_options(parser, default="squeezenet")


def run(options: argparse.Namespace) -> Results:
    check_options(options)
    sampling = {"steps": STEPS[options.scale], "guidance": options.guidance}
    sampling |= {"structure_delay": options.structure_delay, "temperature": options.temperature, "seed": options.seed}
    results: Results = {"sampling": sampling}
    if options.pipeline:
        results["sprites"] = measure_sprites(options)
    if options.train:
        results["real"] = measure_real(options)
    return results


def check_options(options: argparse.Namespace) -> None:
    """Fill in the smoke scale's model and videos; raise `UserError` for missing options."""
    if options.scale == "paper":
        raise UserError("the paper has no prompts, so there is no --scale paper: take --scale cpu.")
    given = (options.pipeline, options.real, options.train, options.test)
    if options.scale == "smoke" and not any(given):
        options.pipeline = options.real = train_tiny_pipeline(options.work_dir / "text")
        options.train, options.test = ([write_smoke_list(options.work_dir / "text", seed)] for seed in (0, 1))
    elif not any(given):
        raise UserError("name a model of captioned sprites as --pipeline FOLDER, or lists of real videos as --train.")
    if len(options.guidance) > 2:
        raise UserError(f"--guidance takes one scale, or two for structure and dynamics, not {len(options.guidance)}.")
    real_sampling(options)  # raises the errors of its values
    if bool(options.train) != bool(options.test) or (options.real and not options.train):
        raise UserError("real video requires both --train LIST ... and --test LIST ..., with the column caption.")


def sampling_of(options: argparse.Namespace) -> Sampling:
    """How the options sample clips."""
    guidance = options.guidance[0] if len(options.guidance) == 1 else tuple(options.guidance)
    return Sampling(
        seed=options.seed,
        guidance_scale=guidance,
        num_inference_steps=STEPS[options.scale],
        structure_delay=options.structure_delay,
        temperature=options.temperature,
    )


def real_sampling(options: argparse.Namespace) -> Sampling:
    """How the options sample real video."""
    sampling = sampling_of(options)
    if options.real_temperature is not None:
        sampling = replace(sampling, temperature=options.real_temperature)
    if options.real_guidance is None:
        return sampling
    return replace(sampling, guidance_scale=options.real_guidance, structure_delay=0.0)


def measure_sprites(options: argparse.Namespace) -> dict[str, Any]:
    """All scores of a model of captioned sprites."""
    scale = options.scale
    pipeline = load_text_pipeline(options.pipeline, options.dtype)
    sizes = sprite_sizes(pipeline.autoencoder)
    classifier = load_classifier(options.work_dir / "sprites" / "classifier", scale, **sizes)
    tasks = PromptTasks(pipeline, classifier, sampling_of(options), PER_MOTION[scale])
    settings = describe_settings(pipeline, options, sampling_of(options))
    folder = options.work_dir / "text" / f"scores-{digest(settings)}"
    computations = {
        "seen": lambda: tasks.compositions(held_out=False),
        "held_out": lambda: tasks.compositions(held_out=True),
        "swapped_parts": lambda: tasks.swapped_dynamics(whole=False),
        "swapped_whole": lambda: tasks.swapped_dynamics(whole=True),
        "guidance": lambda: tasks.guidance(GUIDANCE_SCALES[scale]),
        "negative_prompts": tasks.negative_prompts,
    }
    scores = {name: compute_once(folder / f"{name}.json", settings, compute) for name, compute in computations.items()}
    return {"pipeline": str(options.pipeline), "per_motion": PER_MOTION[scale], **scores}


def measure_real(options: argparse.Namespace) -> dict[str, Any]:
    """Ranking of captions of real held-out clips, and with a model of reconstructions and generated clips."""
    scale, folder = options.scale, options.work_dir / "text"
    pipeline = load_text_pipeline(options.real, options.dtype) if options.real else None
    detectors = parse_detectors(options.detector or DETECTORS[scale], "squeezenet", options.detector_sha256)
    shape = pipeline.autoencoder.clip_shape if pipeline else CLIP_SHAPE[scale]
    training = real.CaptionedClips.read(options.train, shape, FPS[scale], WINDOWS[scale])
    test = real.CaptionedClips.read(options.test, shape, FPS[scale], 1, read_groups(options.groups))
    matcher = real.fit_matcher(training, detectors, folder)
    sets = {"real": test.clips.pixels}
    if pipeline:
        sampling = real_sampling(options)
        key = digest([describe_settings(pipeline, options, sampling), test.clips.paths, test.first_captions])
        sets["reconstruction"] = real.reconstruct_clips(pipeline, test)
        path = folder / f"generated-{key}.safetensors"
        sets["generated"] = real.sample_captions(pipeline, test, sampling, path)
    names = [detector.name for detector in detectors]
    scores = real.measure_ranking(matcher, sets, test, detectors)
    if pipeline:
        scores["sampling"] = {
            "steps": sampling.num_inference_steps,
            "guidance": options.guidance if options.real_guidance is None else [options.real_guidance],
            "structure_delay": sampling.structure_delay,
            "temperature": sampling.temperature,
        }
        scores["memorization"] = real.measure_copies(sets["generated"], test, training)
    return {"model": options.real, "detectors": names, "training_clips": len(training.clips), **scores}


def load_text_pipeline(folder: str | Path, dtype: str) -> VidTwinPipeline:
    """Load a pipeline that takes prompts.

    Raises:
        UserError: if the model was trained without captions, or has no text encoder.
    """
    pipeline = generation.load_placed_pipeline(folder, PartialState(), dtype)
    if not pipeline.takes_prompts or pipeline.text_encoder is None:
        raise UserError(f"{folder} takes no prompts: train it on captions, with text.encoder.")
    return pipeline


def describe_settings(pipeline: VidTwinPipeline, options: argparse.Namespace, sampling: Sampling) -> dict[str, Any]:
    """Everything that kept scores depend on."""
    encoder = TextEncoder(pipeline.tokenizer, pipeline.text_encoder)
    hashes = {"vae": weights_hash(pipeline.vae), "transformer": weights_hash(pipeline.transformer)}
    hashes["text_encoder"] = text_encoder_hash(encoder)
    return hashes | {"scale": options.scale, "dtype": options.dtype} | asdict(sampling)


def write_smoke_list(folder: Path, seed: int) -> Path:
    """Write a few captioned sprites, unless they exist; returns their list."""
    root = folder / "sprites" / str(seed)
    with PartialState().main_process_first():
        if not (root / SEEN).exists():
            write_captions(root, write_sprites(root, 2, seed=seed, resolution=32))
    return root / SEEN


def train_tiny_pipeline(folder: Path) -> str:
    """Train a tiny DiT on captioned sprites for a few steps, to run all parts; returns the pipeline's folder."""
    final = folder / "dit" / "final"
    if not (final / "model_index.json").exists():
        settings = [f"vae={generation.train_tiny_pipeline(folder.parent / 'ucf101_fvd')}", f"output_dir={folder}/dit"]
        settings += [f"data.root={write_smoke_list(folder, 0)}", "data.fps=4", "model.preset=tiny-test"]
        settings += ["text.encoder=small", "text.hidden_size=16", "text.num_layers=1", "text.num_attention_heads=2"]
        settings += ["train.max_train_steps=4", "train.train_batch_size=4", "train.mixed_precision=no"]
        settings += ["train.report_to=none", "train.ema_decay=0", "train.dataloader_num_workers=0"]
        train_dit(load_config(DiTTrainingConfig, [*settings, "diffusion.num_inference_steps=2"]))
    return str(final)


BENCHMARK = Benchmark("text", "Prompts: generated clips against their text", run, page.tables, page.plot, add_options)

if __name__ == "__main__":
    BENCHMARK.main()
