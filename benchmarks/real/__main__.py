"""A pipeline of real video on held-out clips: reconstruction, latents, gestures, image-to-video, FVD, copies.

    python -m benchmarks.real --scale cpu --vae FOLDER --train LIST ... --test LIST ... --groups TABLE ...
    python -m benchmarks.real --scale cpu --model FOLDER --train LIST ... --test LIST ... --groups TABLE ...

A list is a CSV file path,label or a folder; its data set is named after its folder. Every score is kept in
WORK_DIR/real, by the weights and the lists that it depends on: repeat the command to continue. With --vae only the
reconstruction and the latents are measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from autoencoder.video_autoencoder import VideoAutoencoder
from pipelines import MotionClassifier, VidTwinPipeline
from vidgen.common.errors import UserError
from vidgen.common.io import atomic_dir
from vidgen.common.loading import load_vae, weights_hash
from vidgen.common.precision import place_model
from vidgen.data.listing import list_videos
from vidgen.metrics.detector import Detector
from vidgen.metrics.detector_options import parse_detectors
from vidgen.metrics.fvd import Sampling

from ..common import generation as pipelines
from ..common import vae_runs
from ..common.harness import Benchmark, Results, compute_once, digest
from ..latents.clips import write_smoke_videos
from . import clips, components, generation, memorization, page, pictures, reconstruction
from .classifier import AUGMENTATION, train_on_videos

FPS = {"smoke": 4.0, "cpu": 8.0}
CLIPS_PER_VIDEO = {"smoke": 1, "cpu": 2}
BLOCKS = {"smoke": ((4, 8, 8), (4, 4, 4)), "cpu": ((16, 16, 16), (16, 8, 8))}
CLASSIFIER = {"smoke": dict(steps=2, batch_size=4, width=8, dim=8), "cpu": dict(steps=1600)}
WINDOWS = {"smoke": 1, "cpu": 20}  # of each training video of the classifier
DETECTORS = {"smoke": ["pooled_pixels"], "cpu": ["pooled_pixels", "squeezenet"]}
STEPS = {"smoke": 2, "cpu": 25}
IMAGE_OPTIONS = ("guidance", "steps", "temperature")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="FOLDER", help="pipeline to measure")
    parser.add_argument("--vae", metavar="FOLDER", help="VAE to measure without a pipeline")
    parser.add_argument("--train", nargs="+", type=Path, default=[], metavar="FOLDER|CSV", help="training videos")
    parser.add_argument("--test", nargs="+", type=Path, default=[], metavar="FOLDER|CSV", help="held-out videos")
    parser.add_argument("--groups", nargs="+", type=Path, default=[], metavar="CSV", help="groups: path,group")
    parser.add_argument("--motion", metavar="NAME", help="data set whose class is the motion (default: the last one)")
    parser.add_argument("--guidance", type=float, default=3.0, help="classifier-free guidance scale (default: 3)")
    parser.add_argument(
        "--guidance-interval",
        nargs=2,
        type=float,
        default=(0.0, 1.0),
        metavar=("LOWER", "UPPER"),
        help="noise levels with guidance, from 0 to 1 (default: all)",
    )
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps (default: 25, smoke 2)")
    pipelines.add_temperature(parser)
    for name in IMAGE_OPTIONS:
        kind = int if name == "steps" else float
        parser.add_argument(
            f"--image-{name}", type=kind, metavar="X", help=f"--{name} of image-to-video (default: the same)"
        )
    parser.add_argument(
        "--image-candidates",
        type=int,
        default=1,
        metavar="N",
        help="clips of image-to-video of which the pipeline's classifier chooses one (default: 1)",
    )
    parser.add_argument(
        "--repeats", type=int, default=1, metavar="N", help="clips generated for each test clip's class (default: 1)"
    )
    parser.add_argument("--training-clips", type=int, help="the most clips of each list for block PCA and distances")
    vae_runs.add_lpips_options(parser)
    pipelines.add_detector_options(parser, default="pooled_pixels; scale cpu also squeezenet")
    parser.set_defaults(dtype="float32")


def run(options: argparse.Namespace) -> Results:
    check_options(options)
    sampling = Sampling(
        guidance_scale=options.guidance,
        guidance_interval=tuple(options.guidance_interval),
        temperature=options.temperature,
        num_inference_steps=options.steps,
    )
    of_images = replace(
        sampling,
        guidance_scale=options.image_guidance,
        num_inference_steps=options.image_steps,
        temperature=options.image_temperature,
        num_candidates=options.image_candidates,
    )
    scale, folder = options.scale, options.work_dir / "real"
    pipeline = pipelines.load_placed_pipeline(options.model, PartialState(), options.dtype) if options.model else None
    device = PartialState().device
    vae = pipeline.autoencoder if pipeline else place_model(load_vae(options.vae), device, options.dtype)
    names = options.detector or DETECTORS[scale]
    detectors = parse_detectors(names, "squeezenet", options.detector_sha256)
    groups = clips.read_groups(options.groups)
    shape, fps = vae.clip_shape, FPS[scale]
    test = clips.read_clips(options.test, shape, fps, CLIPS_PER_VIDEO[scale], groups)
    training = clips.read_clips(options.train, shape, fps, 1, groups, limit=options.training_clips)
    motion = options.motion or clips.name_of(options.test[-1])
    if motion not in test.data:
        raise UserError(f"--motion {motion}: the data sets are {', '.join(dict.fromkeys(test.data))}.")
    gestures = test.of(motion)
    reconstruct = reconstruction.reconstruct_with(vae)
    settings = describe_settings(vae, pipeline, test, training, motion, detectors, options)
    own = folder / f"scores-{digest(settings)}"

    # Reconstruction and the references.
    scores = score_reconstruction(vae, test, training, own, settings, options)
    classifier = load_classifier(motion, shape, folder, options)
    classify = classify_with(classifier)

    # What each latent holds; class accuracy of real clips and reconstructions.
    results: Results = {
        "name": Path(options.vae or options.model).name,
        "clip_shape": list(shape),
        "latent_size": vae.latent_size,
        "motion": motion,
        "reconstruction": reconstruction.summarize(scores, test.groups, test.data),
    }
    with torch.no_grad():
        reconstructed = torch.cat([clips.to_uint8(reconstruct(clips.to_float(x))) for x in test.pixels.split(8)])
    pictures.save_reconstruction_pictures(test, reconstructed, vae.latent_size, options.results, fps)
    is_motion = [i for i, name in enumerate(test.data) if name == motion]
    sets = {"real": gestures.pixels, "reconstruction": reconstructed[is_motion]}
    accuracy = generation.measure_accuracy(sets, gestures, classify)
    results["components"] = {
        name: compute_once(
            own / f"components-{name}.json",
            settings,
            lambda name=name: components.measure_components(vae, test.of(name), classify if name == motion else None),
        )
        for name in dict.fromkeys(test.data)
        if vae.has_dynamics
    }
    if vae.has_dynamics:
        pictures.save_component_pictures(vae, test, options.results, fps)

    # Generation.
    fvd = {"train": pictures.spread(training.pixels, len(test)), "reconstruction": reconstructed}
    if pipeline:
        generation.check_classes(pipeline, test)
        if options.image_candidates > 1:
            generation.check_classifier(pipeline, gestures)
        results["sampling"] = {"generated": asdict(sampling), "animated": asdict(of_images)}
        results["repeats"] = options.repeats
        fvd["generated"] = generation.generate(pipeline, test, sampling, own / "generated.safetensors")
        repeated = gestures.select(list(range(len(gestures))) * options.repeats)
        generated = generation.generate(pipeline, repeated, sampling, own / "generated_classes.safetensors")
        variants = {"animated": (of_images, True)}
        if options.image_candidates > 1:
            variants["animated, one candidate"] = replace(of_images, num_candidates=1), True
        if pipeline.transformer.config.image_conditioning:
            variants["animated, without overlay"] = of_images, False
        animated = {
            name: generation.generate(pipeline, repeated, settings, own / f"{name}.safetensors", True, overlay)
            for name, (settings, overlay) in variants.items()
        }
        accuracy |= generation.measure_accuracy({"generated": generated, **animated}, repeated, classify)
        results["image_to_video"] = generation.measure_image_to_video(animated, repeated, reconstruct)
        features = [memorization.copy_features(clips.to_float(x)) for x in (fvd["generated"], test.pixels)]
        results["memorization"] = memorization.measure_memorization(
            *features, memorization.copy_features(training.videos)
        )
        pictures.save_animated_pictures(gestures, animated["animated"], options.results, fps)
    results["accuracy"] = accuracy
    results["classes"] = len(classifier.config.classes)
    results["distances"] = compute_once(
        own / "distances.json",
        settings,
        lambda: generation.measure_distances(fvd, test.pixels, detectors),
    )
    return results


def check_options(options: argparse.Namespace) -> None:
    """Fill in the smoke scale's model and videos; raise `UserError` for missing options."""
    if options.scale == "paper":
        raise UserError("the paper has no such table, so there is no --scale paper: take --scale cpu.")
    if options.model and options.vae:
        raise UserError("give a pipeline as --model or a VAE as --vae, not both.")
    if options.scale == "smoke":
        if not (options.model or options.vae):
            options.model = pipelines.train_tiny_pipeline(options.work_dir / "ucf101_fvd")
        if not (options.train or options.test):
            options.train, options.test = write_smoke_videos(options.work_dir / "real" / "data")
    if not (options.model or options.vae):
        raise UserError("name a pipeline as --model FOLDER, or a VAE as --vae FOLDER.")
    for name in ("training_clips", "repeats", "image_candidates"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {value}.")
    if not (options.train and options.test):
        raise UserError("give the training videos as --train LIST ... and held-out ones as --test LIST ....")
    options.steps = STEPS[options.scale] if options.steps is None else options.steps
    for name in IMAGE_OPTIONS:
        if getattr(options, f"image_{name}") is None:
            setattr(options, f"image_{name}", getattr(options, name))


def score_reconstruction(
    vae: VideoAutoencoder,
    test: clips.Clips,
    training: clips.Clips,
    own: Path,
    settings: Any,
    options: argparse.Namespace,
) -> dict[str, reconstruction.Scores]:
    """Scores of every clip, of the VAE and of the references."""
    network, values = vae_runs.load_lpips(options), vae.latent_size
    transforms = {}
    for block in BLOCKS[options.scale]:
        name = "block_pca_" + "x".join(map(str, block))
        path = own.parent / f"{name}-{values}-{settings['training']}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        transforms[name] = reconstruction.fit_block_pca(training, block, values, path)
    codecs = {reconstruction.METHOD: reconstruction.reconstruct_with(vae)}
    codecs |= reconstruction.reference_codecs(values, transforms)
    return {
        name: compute_once(
            own / f"{name}.json", settings, lambda codec=codec: reconstruction.score_codec(codec, test, network)
        )
        for name, codec in codecs.items()
    }


def load_classifier(motion: str, shape: tuple, folder: Path, options: argparse.Namespace) -> MotionClassifier:
    """Load the work folder's classifier of the motions; trained on the training videos if it is missing."""
    scale = options.scale
    lists = [root for root in options.train if clips.name_of(root) == motion]
    if not lists:
        raise UserError(f"--train has no list of the data set {motion}.")
    videos = [[resolve(file.path), file.label] for root in lists for file in list_videos(root)[0]]
    settings = [videos, shape, FPS[scale], WINDOWS[scale], CLASSIFIER[scale], AUGMENTATION]
    path = folder / f"classifier-{motion}-{digest(settings)}"
    if not (path / "config.json").exists():
        classifier = train_on_videos(lists, shape, FPS[scale], WINDOWS[scale], **CLASSIFIER[scale])
        with atomic_dir(path) as unfinished:
            classifier.save_pretrained(unfinished)
    return MotionClassifier.from_pretrained(path).eval()


def resolve(path: str | Path) -> str:
    """The absolute path, so that kept scores and classifiers do not depend on how a list is named."""
    return str(Path(path).resolve())


def classify_with(classifier: MotionClassifier) -> components.Classify:
    """A function from clips to names of classes."""
    classes = classifier.config.classes
    return lambda video: [classes[i] for i in classifier.predict(video).argmax(dim=1).tolist()]


def describe_settings(
    vae: VideoAutoencoder,
    pipeline: VidTwinPipeline | None,
    test: clips.Clips,
    training: clips.Clips,
    motion: str,
    detectors: Sequence[Detector],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Everything that kept scores depend on."""
    settings = {"vae": weights_hash(vae), "scale": options.scale, "dtype": options.dtype}
    tested, trained = ([resolve(path) for path in found.paths] for found in (test, training))
    settings |= {"test": digest([tested, test.labels, test.groups]), "training": digest(trained)}
    settings |= {"motion": motion, "detectors": {detector.name: detector.sha256 for detector in detectors}}
    if pipeline:
        settings |= {"transformer": weights_hash(pipeline.transformer), "guidance": options.guidance}
        settings |= {"guidance_interval": list(options.guidance_interval), "temperature": options.temperature}
        settings |= {"repeats": options.repeats, "image_candidates": options.image_candidates}
        settings |= {"steps": options.steps} | {
            f"image_{name}": getattr(options, f"image_{name}") for name in IMAGE_OPTIONS
        }
    return settings


BENCHMARK = Benchmark(
    "real", "Real video: jobs of one model on held-out clips", run, page.tables, page.plot, add_options
)

if __name__ == "__main__":
    BENCHMARK.main()
