"""What the `vidgen` command does: one function for each of its words, with the same names and defaults.

Keyword arguments `reading` are those of `Reading`.

Videos are streamed: a thread reads, one runs the model and this one writes, and memory does not grow with their
length (`vidgen.inference.streaming`). Outputs appear when whole, or not at all.
"""

from __future__ import annotations

import json
import math
import re
import sys
import threading
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from autoencoder import AutoencoderKLVidTwin
from autoencoder.tiling import ClipGeometry
from pipelines.rollout import rollout

from ..common.errors import UserError
from ..common.io import atomic_dir, refuse_to_replace
from ..common.loading import SHIPPED_MODEL, is_pipeline, load_pipeline, load_vae, weights_hash
from ..common.plots import dataset_histograms
from ..common.precision import place_model
from ..common.progress import progress
from ..common.video_writing import exact_rate
from ..data.check import check_videos, write_reports
from ..data.listing import list_videos
from ..data.shards import write_shards
from ..data.sprites import write_sprites
from ..data.streams import FrameReader, open_writer
from ..data.types import VideoFile
from ..data.ucf101 import ucf101_split as official_split
from .latent_file import LatentFile, write_latents
from .streaming import (
    Components,
    WindowLatents,
    component_frames,
    decode_windows,
    encode_windows,
    in_background,
    reenacted_frames,
    video_geometry,
    windows,
)

SAVED_MODEL = re.compile(r"config\.json|README\.md|diffusion_pytorch_model.*\.(safetensors|json)")


@dataclass(frozen=True)
class Reading:
    """What the words that put videos through a model take alike: which model, where, and how videos are read.

    Attributes:
        model: a VAE or pipeline, as `load_vae` takes it.
        device: where the model computes; None: the accelerator there is, or the CPU.
        dtype: in what it computes, as `resolve_dtype` takes it.
        fps, size: frames a second and short side in pixels; None: the video's own.
        tile_overlap, window_overlap: pixels and frames; None: a quarter of the model's own.
    """

    model: str
    device: str | None = None
    dtype: str = "auto"
    fps: float | None = None
    size: int | None = None
    tile_overlap: int | None = None
    window_overlap: int | None = None

    def open(self, video: str) -> FrameReader:
        """The video at the rate and size asked for."""
        return FrameReader(video, fps=self.fps, size=self.size)

    def prepare(self, vae: AutoencoderKLVidTwin) -> AutoencoderKLVidTwin:
        """The model where and in what it computes, and its tiles as far apart as asked for."""
        side, frames = vae.config.sample_size, vae.config.num_frames
        strides: dict[str, int] = {}
        if self.tile_overlap is not None:
            if not 0 <= self.tile_overlap < side:
                raise UserError(f"--tile-overlap must be 0 to {side - 1} pixels here, not {self.tile_overlap}.")
            strides |= dict.fromkeys(
                ("tile_sample_stride_height", "tile_sample_stride_width"), side - self.tile_overlap
            )
        if self.window_overlap is not None:
            if not 0 <= self.window_overlap < frames:
                raise UserError(f"--window-overlap must be 0 to {frames - 1} frames here, not {self.window_overlap}.")
            strides["tile_sample_stride_num_frames"] = frames - self.window_overlap
        vae.enable_tiling(**strides)
        return place_model(vae, _device(self.device), self.dtype)


def encode(
    video: str,
    latents: str,
    **reading: Any,
) -> Path:
    """Video -> latents in a .safetensors file (`vidgen.inference.latent_file`)."""
    setting = Reading(**reading)
    vae = load_vae(setting.model)
    model_hash = weights_hash(vae)
    setting.prepare(vae)
    with setting.open(video) as reader:
        geometry = video_geometry(vae, reader.num_frames, reader.height, reader.width)
        encoded = encode_windows(in_background(windows(reader, geometry)), vae)
        counted = _counted(encoded, geometry, "encoding")
        path = write_latents(latents, counted, vae, geometry, reader.fps, model_hash)
    values, pixels = geometry.num_tiles * vae.latent_size, 3 * torch.Size(geometry.size).numel()
    print(f"{path}: {values:,} values of {pixels:,} ({values / pixels:.3%}), {_size_of(geometry, reader.fps)}")
    return path


def decode(
    latents: str,
    video: str,
    *,
    model: str,
    device: str | None = None,
    dtype: str = "auto",
    components: Components = "both",
    fps: float | None = None,
    any_model: bool = False,
) -> Path:
    """Latents of `encode`, or of one clip that `TwinLatents.save` wrote, -> video."""
    file = LatentFile(latents)
    rate = file.fps if fps is None else exact_rate(fps, video)
    if rate is None:
        raise UserError(f"{latents} was saved without a frame rate; give one with --fps.")
    vae = load_vae(model)
    file.check_model(vae, None if any_model else weights_hash(vae))
    place_model(vae, _device(device), dtype)
    geometry = file.geometry or video_geometry(vae, *vae.clip_shape[1:])
    chunks = decode_windows(file.windows(vae.device, vae.dtype), vae, geometry, components)
    return _write(video, chunks, geometry, rate, "decoding")


def reconstruct(
    video: str,
    output: str,
    *,
    components: Components = "both",
    **reading: Any,
) -> Path:
    """Video -> latents -> video."""
    setting = Reading(**reading)
    vae = setting.prepare(load_vae(setting.model))
    with setting.open(video) as reader:
        geometry = video_geometry(vae, reader.num_frames, reader.height, reader.width)
        encoded = encode_windows(in_background(windows(reader, geometry)), vae)
        return _write(
            output, decode_windows(encoded, vae, geometry, components), geometry, reader.fps, "reconstructing"
        )


def reenact(
    structure: str,
    dynamics: str,
    output: str,
    *,
    strength: float = 1.0,
    **reading: Any,
) -> Path:
    """What video `structure` looks like, moving as video `dynamics` does; `strength` 0 leaves it its own motion."""
    if not 0 <= strength <= 1:
        raise UserError(f"--strength is a share between 0 and 1, not {strength:g}.")
    setting = Reading(**reading)
    vae = setting.prepare(load_vae(setting.model))
    with setting.open(structure) as ours, FrameReader(dynamics, fps=ours.fps) as theirs:
        length = min(ours.num_frames, theirs.num_frames)
        geometry = video_geometry(vae, length, ours.height, ours.width)
        frames = (mixed for _, _, mixed in reenacted_frames(ours, theirs, vae, geometry, strength))
        return _write(output, frames, geometry, ours.fps, "reenacting")


def components(
    video: str,
    output: str,
    **reading: Any,
) -> Path:
    """Original, both, structure and dynamics side by side."""
    setting = Reading(**reading)
    vae = setting.prepare(load_vae(setting.model))
    with setting.open(video) as reader:
        geometry = video_geometry(vae, reader.num_frames, reader.height, reader.width)
        rows = (np.concatenate(together, axis=2) for together in component_frames(reader, vae, geometry))
        return _write(output, rows, geometry, reader.fps, "components", columns=4)


def generate(
    output: str,
    *,
    model: str,
    device: str | None = None,
    dtype: str = "auto",
    class_labels: list[str] | None = None,
    num: int = 1,
    steps: int = 50,
    guidance: float = 5.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
    fps: float = 8.0,
    frames: int | None = None,
    loop: bool = False,
) -> list[Path]:
    """New videos from a trained pipeline: `num` of each class, or of every class.

    A class that is given twice is the same as twice as many videos of it; an unconditional pipeline takes none.
    They are as long as the model's clips, or of `frames` frames, made window by window; with `loop` they end where
    they begin.
    """
    for option, value in (("--num", num), ("--steps", steps), ("--frames", 1 if frames is None else frames)):
        if value < 1:
            raise UserError(f"{option} must be at least 1, not {value}.")
    if not math.isfinite(guidance):
        raise UserError(f"--guidance must be a finite number, not {guidance}.")
    low, high = guidance_interval
    if not 0 <= low <= high <= 1:
        raise UserError(f"--guidance-interval must be two numbers from 0 to 1, the lower first, not {low:g} {high:g}.")
    pipeline = place_model(load_pipeline(model), _device(device), dtype)
    if pipeline.vae is None:
        raise UserError(f"The pipeline in {model} has no autoencoder, which videos need.")
    known = pipeline.labels | pipeline.subclasses
    names = {number: name for name, number in known.items()}
    labels = pipeline.class_ids or [None]
    if class_labels:
        labels = pipeline.get_label_ids([_label(text, known) for text in class_labels])
    own_frames, height, width = pipeline.vae.clip_shape[1:]
    frames = own_frames if frames is None else frames
    paths = _numbered(output, [None if label is None else str(names.get(label, label)) for label in labels], num)
    made = Counter()  # videos by class: another one of the same class has the next seed
    writers = iter([open_writer(path, fps=fps, width=width, height=height) for path in paths])  # wrong ones say so now
    for label in labels:
        pipeline.set_progress_bar_config(
            desc="generating" if label is None else f"generating {names.get(label, label)}"
        )
        videos = rollout(
            pipeline,
            frames,
            label,
            loop=loop,
            num_videos_per_prompt=num,
            guidance_scale=guidance,
            num_inference_steps=steps,
            guidance_interval=guidance_interval,
            generator=[torch.Generator().manual_seed(seed + made[label] + i) for i in range(num)],
        )
        made[label] += num
        for video, writer in zip(videos.movedim(2, -1).float().cpu().numpy(), writers, strict=False):
            with writer:
                writer.write((255 * video).round().astype(np.uint8))
            print(writer.path)
    return paths


def convert(
    checkpoint: str,
    folder: str,
    *,
    attention_heads: int | None = None,
    qformer_heads: int | None = None,
    dtype: str = "float32",
) -> Path:
    """Official checkpoint -> Diffusers folder."""
    if not Path(checkpoint).is_file():
        raise UserError(f"{checkpoint}: no such file; an official .ckpt or .safetensors is wanted.")
    refuse_to_replace(Path(folder), SAVED_MODEL)
    overrides = {"num_attention_heads": attention_heads, "qformer_heads": qformer_heads}
    given = {name: value for name, value in overrides.items() if value is not None}
    vae = AutoencoderKLVidTwin.from_single_file(checkpoint, dtype=getattr(torch, dtype), **given)
    with atomic_dir(folder) as aside:
        vae.save_pretrained(aside)
    print(f"{folder}: {vae.num_parameters():,} parameters, {vae.compression_rate:.3%} of a clip")
    return Path(folder)


def shards(
    root: str,
    folder: str,
    *,
    shard_size_mb: float = 512,
    max_count: int = 10_000,
    ucf101_split: int | None = None,
    split_files: str | None = None,
) -> None:
    """A data set as WebDataset shards in `folder`; with `ucf101_split` in its sub-folders `train` and `test`."""
    parts: dict[str, tuple[list[VideoFile], list[str]]] = (
        {folder: list_videos(root, _print_aside)} if ucf101_split is None else {}
    )
    if ucf101_split is not None:
        train, test, classes = official_split(root, ucf101_split, split_files)
        parts = {str(Path(folder, "train")): (train, classes), str(Path(folder, "test")): (test, classes)}
    for part, (files, classes) in parts.items():
        with progress(description=Path(part).name, total=len(files)) as bar:
            unreadable = write_shards(
                files,
                classes,
                part,
                shard_size_mb=shard_size_mb,
                max_count=max_count,
                report=lambda _, b=bar: b.update(),
            )
        for path, reason in unreadable:
            print(f"left out {path}: {reason}")
        print(f"{len(files) - len(unreadable)} videos in {len(list(Path(part).glob('*.tar')))} shards in {part}")


def sprites(folder: str, *, clips_per_class: int = 80, seed: int = 0) -> list[Path]:
    """Sprites (`vidgen.data.sprites`) as class folders of .mp4 files; clips that are there are written again."""
    if clips_per_class < 1 or seed < 0:
        raise UserError(f"--clips-per-class must be 1 or more and --seed 0 or more, not {clips_per_class} and {seed}.")
    paths = write_sprites(folder, clips_per_class, seed=seed, show_progress=True)
    print(f"{len(paths)} clips in {folder}")
    return paths


def data_check(
    root: str,
    *,
    output: str = "data-check",
    num_frames: int = 16,
    fps: float = 8.0,
    jobs: int | None = None,
    timeout: float = 60.0,
) -> None:
    """Look through a data set: `output`/bad_videos.jsonl, `output`/histograms.png, and a table of totals."""
    if num_frames < 1 or not 0 < fps < math.inf or not timeout > 0 or (jobs is not None and jobs < 1):
        raise UserError("--num-frames, --fps, --jobs and --timeout must be positive")
    files, classes = list_videos(root, _print_aside)
    found = check_videos([f.path for f in files], num_frames=num_frames, fps=fps, jobs=jobs, timeout=timeout)
    reports = list(progress(found, description="checking", total=len(files)))
    listed = write_reports(Path(output, "bad_videos.jsonl"), reports)
    table = Table(title=f"{root}: {len(files)} videos, {len(classes)} classes", title_justify="left")
    for column in ("", "videos", "hours", "for example"):
        table.add_column(column, justify="right" if column in ("videos", "hours") else "left", overflow="fold")
    for kind in ("good", "odd", "short", "unreadable"):
        of_kind = [report for report in reports if report.kind == kind]
        example = min(of_kind, key=lambda report: report.path, default=None)
        said = "" if example is None or kind == "good" else escape(f"{example.path}: {example.reason}")
        table.add_row(kind, str(len(of_kind)), f"{sum(report.duration for report in of_kind) / 3600:.2f}", said)
    Console(highlight=False).print(table)
    print(listed)
    if readable := [report for report in reports if report.kind != "unreadable"]:
        sizes = [min(report.width, report.height) for report in readable]
        durations, rates = [report.duration for report in readable], [report.fps for report in readable]
        print(dataset_histograms(Path(output, "histograms.png"), durations, sizes, rates))


def app(
    *,
    model: str | None = None,
    device: str | None = None,
    dtype: str = "auto",
    host: str = "127.0.0.1",
    port: int = 7860,
    share: bool = False,
    max_upload_mb: float = 50,
    max_seconds: float = 60,
    max_size: int = 256,
) -> None:
    """A page on which to try a model, until interrupted; without `model` the one that comes with the repository."""
    if not max_upload_mb > 0 or not max_seconds > 0 or max_size < 2:
        raise UserError("--max-upload-mb and --max-seconds must be positive, and --max-size at least 2.")
    if model is None:
        if not SHIPPED_MODEL.is_dir():
            raise UserError(f"No model comes with this installation ({SHIPPED_MODEL}): name one with --model.")
        model = str(SHIPPED_MODEL)
    try:
        from ..app.page import serve
        from ..app.uploads import UploadLimits
    except ImportError as error:
        if (error.name or "").split(".")[0] != "gradio":
            raise
        raise UserError("The page needs Gradio: pip install -e '.[web]'.") from error
    load = load_pipeline if is_pipeline(model) else load_vae
    loaded = place_model(load(model), _device(device), dtype)
    limits = UploadLimits(megabytes=max_upload_mb, seconds=max_seconds, short_side=max_size)
    name = "/".join(Path(model).parts[-2:])
    with serve(loaded, name, limits, host=host, port=port, share=share) as address:
        print(f"{address} has the page; Ctrl-C ends it.", flush=True)
        threading.Event().wait()


def info(model: str) -> dict[str, object]:
    """A model's config, parameters, compression rate, and FLOPs of encode and decode."""
    from ..metrics.flops import decode_flops, encode_flops

    vae = load_vae(model)
    facts: dict[str, object] = {
        "parameters": vae.num_parameters(),
        "clip": "{} x {} x {} x {}".format(*vae.clip_shape),
        "structure latent": " x ".join(map(str, vae.structure_shape)),
        "dynamics latent": " x ".join(map(str, vae.dynamics_shape)),
        "latent values": vae.latent_size,
        "compression rate": f"{vae.compression_rate:.4%}",
        "encode": f"{encode_flops(vae) / 1e9:,.1f} GFLOP a clip",
        "decode": f"{decode_flops(vae) / 1e9:,.1f} GFLOP a clip",
        "sha256": weights_hash(vae),
    }
    if is_pipeline(model):
        pipeline = load_pipeline(model)
        facts["DiT parameters"] = pipeline.transformer.num_parameters()
        facts["DiT tokens"] = " + ".join(map(str, pipeline.transformer.num_tokens))
        facts["scheduler"] = type(pipeline.scheduler).__name__
        facts["classes"] = ", ".join(pipeline.labels) or pipeline.transformer.config.num_classes or "unconditional"
        if pipeline.subclasses:
            facts["sub-classes"] = ", ".join(pipeline.subclasses)
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    for name, value in facts.items():
        print(f"{name:17} {value:,}" if isinstance(value, int) else f"{name:17} {value}")
    print("config           ", json.dumps(config))
    return facts | {"config": config}


# --- what they share -------------------------------------------------------------------------------------------------


def _print_aside(text: str) -> None:
    """Print to stderr: stdout holds results."""
    print(text, file=sys.stderr, flush=True)


def _device(name: str | None) -> torch.device:
    if name is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return torch.device(accelerator or "cpu")
    try:
        torch.zeros(1, device=name).item()
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} is not to be had here: {str(error).splitlines()[0]}") from error


def _write(
    path: str, chunks: Iterator[np.ndarray], geometry: ClipGeometry, fps: Fraction, description: str, columns: int = 1
) -> Path:
    """Write frames as they are made; the model works on the next ones meanwhile."""
    frames, height, width = geometry.size
    with (
        open_writer(path, fps=fps, width=columns * width, height=height) as writer,
        progress(description=description, total=frames, unit="frame") as bar,
    ):
        for chunk in in_background(chunks):
            writer.write(chunk)
            bar.update(len(chunk))
    print(f"{path}: {_size_of(geometry, fps, columns)}")
    return Path(path)


def _counted(latents: Iterable[WindowLatents], geometry: ClipGeometry, description: str) -> Iterator[WindowLatents]:
    with progress(description=description, total=geometry.size[0], unit="frame") as bar:
        for window in latents:
            yield window
            bar.update(min(window.start + geometry.tile[0], geometry.size[0]) - bar.n)


def _size_of(geometry: ClipGeometry, fps: Fraction, columns: int = 1) -> str:
    frames, height, width = geometry.size
    return f"{frames} frame{'s'[: frames != 1]} of {columns * width} x {height} at {float(fps):g} fps"


def _numbered(output: str, names: list[str | None], num: int) -> list[str]:
    """A path for each of `num` videos of each class: `output` itself for one, else out-NAME-0.mp4 ...

    Numbers run on where names repeat, or differ only in what file systems do not tell apart.
    """
    if len(names) * num == 1:
        return [output]
    target = Path(output)
    if not target.name:
        raise UserError(f"{output}: several videos need a name to number, such as out.mp4.")
    stems = ["-".join([target.stem, *([] if name is None else [name.replace("/", "_")])]) for name in names]
    taken: Counter[str] = Counter()
    paths = []
    for stem in stems:
        key = unicodedata.normalize("NFC", stem).casefold()
        paths += [str(target.with_name(f"{stem}-{taken[key] + i}{target.suffix}")) for i in range(num)]
        taken[key] += num
    return paths


def _label(text: str, labels: dict[str, int]) -> int | str:
    return int(text) if text.isdigit() and text not in labels else text
