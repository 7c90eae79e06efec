"""Inference on video files: encode, decode, reconstruct, reenact, show the components, and generate.

Each function does the work of the command of this name. Videos are streamed (`vidgen.inference.streaming`): one thread
reads, one runs the model and this one writes, so memory does not grow with their length. Output files appear only when
they are complete.
"""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from autoencoder.tiling import ClipGeometry
from autoencoder.video_autoencoder import VideoAutoencoder
from pipelines.candidates import check_candidates
from pipelines.guiders import create_guider
from pipelines.rollout import rollout
from pipelines.schedulers import default_steps

from ..common.config import parse_values
from ..common.errors import UserError
from ..common.images import read_image
from ..common.loading import encoder_hash, load_pipeline, load_vae
from ..common.precision import place_model
from ..common.progress import progress
from ..common.video_writing import exact_rate
from ..data.streams import FrameReader, open_writer
from .latent_file import LatentFile, write_latents
from .streaming import (
    Components,
    WindowLatents,
    decode_windows,
    encode_windows,
    in_background,
    stream_components,
    stream_reenactment,
    video_geometry,
    windows,
)


@dataclass(frozen=True)
class VideoOptions:
    """How a video is read and by which model it is processed.

    Attributes:
        model: a VAE or pipeline, as `load_vae` takes it.
        device: device of the computation; None selects the accelerator, or the CPU if there is none.
        dtype: dtype of the computation, as `resolve_dtype` takes it.
        fps: frame rate at which the video is read; None: the video's.
        size: short side in pixels to which frames are resized; None: the video's.
        tile_overlap: pixels that neighboring tiles share; None: a quarter of the model's frame size.
        window_overlap: frames that successive windows share; None: a quarter of the model's number of frames.
    """

    model: str
    device: str | None = None
    dtype: str = "auto"
    fps: float | None = None
    size: int | None = None
    tile_overlap: int | None = None
    window_overlap: int | None = None

    def open(self, video: str) -> FrameReader:
        """Open a video at this rate and size."""
        return FrameReader(video, fps=self.fps, size=self.size)

    def prepare(self, vae: VideoAutoencoder, video: FrameReader) -> VideoAutoencoder:
        """Fit a model to a video, place it on the device, in the dtype, and enable tiling with these overlaps."""
        vae.fit_clip_size(video.num_frames, video.height, video.width)
        _, frames, height, width = vae.clip_shape
        strides: dict[str, int] = {}
        for option, overlap, unit, sizes in (
            ("--tile-overlap", self.tile_overlap, "pixels", {"height": height, "width": width}),
            ("--window-overlap", self.window_overlap, "frames", {"num_frames": frames}),
        ):
            if overlap is None:
                continue
            least = min(sizes.values())
            if not 0 <= overlap < least:
                raise UserError(f"{option} must be 0 to {least - 1} {unit} for this model, not {overlap}.")
            strides |= {f"tile_sample_stride_{axis}": size - overlap for axis, size in sizes.items()}
        vae.enable_tiling(**strides)
        return place_model(vae, resolve_device(self.device), self.dtype)


def encode(video: str, latents: str, **options: Any) -> Path:
    """Encode a video into a .safetensors file of latents (`vidgen.inference.latent_file`).

    Args:
        options: the fields of `VideoOptions`, here and below.
    """
    settings = VideoOptions(**options)
    vae = load_vae(settings.model)
    sha256 = encoder_hash(vae)
    with settings.open(video) as reader:
        settings.prepare(vae, reader)
        geometry = video_geometry(vae, reader.num_frames, reader.height, reader.width)
        encoded = encode_windows(in_background(windows(reader, geometry)), vae)
        path = write_latents(latents, _show_progress(encoded, geometry), vae, geometry, reader.fps, sha256)
    values, pixels = geometry.num_tiles * vae.latent_size, 3 * math.prod(geometry.size)
    print(f"{path}: {values:,} values of {pixels:,} ({values / pixels:.3%}), {_describe(geometry, reader.fps)}")
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
    """Decode the latents that `encode` wrote, or those of one clip from `TwinLatents.save`, into a video.

    Args:
        fps: frame rate of the video; None: that of the latents.
        any_model: accept latents of another model with the same latent shapes.
    """
    file = LatentFile(latents)
    rate = file.fps if fps is None else exact_rate(fps, video)
    if rate is None:
        raise UserError(f"{latents} was saved without a frame rate; set one with --fps.")
    vae = load_vae(model)
    vae.fit_latent_shape(file.structure_shape)
    check_components(vae, components)
    file.check_model(vae, any_model)
    place_model(vae, resolve_device(device), dtype)
    geometry = file.geometry or video_geometry(vae, *vae.clip_shape[1:])
    chunks = decode_windows(file.windows(vae.device, vae.dtype), vae, geometry, components)
    return _write_video(video, chunks, geometry, rate, "decoding")


def reconstruct(video: str, output: str, *, components: Components = "both", **options: Any) -> Path:
    """Encode and decode a video."""
    settings = VideoOptions(**options)
    vae = load_vae(settings.model)
    check_components(vae, components)
    with settings.open(video) as reader:
        settings.prepare(vae, reader)
        geometry = video_geometry(vae, reader.num_frames, reader.height, reader.width)
        encoded = encode_windows(in_background(windows(reader, geometry)), vae)
        chunks = decode_windows(encoded, vae, geometry, components)
        return _write_video(output, chunks, geometry, reader.fps, "reconstructing")


def reenact(structure: str, dynamics: str, output: str, *, strength: float = 1.0, **options: Any) -> Path:
    """Decode the structure of one video with the dynamics of another.

    Args:
        strength: interpolation from the dynamics of `structure` (0) to those of `dynamics` (1).
    """
    if not 0 <= strength <= 1:
        raise UserError(f"--strength must be between 0 and 1, not {strength:g}.")
    settings = VideoOptions(**options)
    vae = load_vae(settings.model)
    check_components(vae, "dynamics")
    with settings.open(structure) as source, FrameReader(dynamics, fps=source.fps) as driver:
        settings.prepare(vae, source)
        length = min(source.num_frames, driver.num_frames)
        geometry = video_geometry(vae, length, source.height, source.width)
        frames = (swapped for _, _, swapped in stream_reenactment(source, driver, vae, geometry, strength))
        return _write_video(output, frames, geometry, source.fps, "reenacting")


def components(video: str, output: str, **options: Any) -> Path:
    """Write a video's original frames and its decoded components side by side."""
    settings = VideoOptions(**options)
    vae = load_vae(settings.model)
    check_components(vae, "dynamics")
    with settings.open(video) as reader:
        settings.prepare(vae, reader)
        geometry = video_geometry(vae, reader.num_frames, reader.height, reader.width)
        rows = (np.concatenate(videos, axis=2) for videos in stream_components(reader, vae, geometry))
        return _write_video(output, rows, geometry, reader.fps, "components", columns=4)


def generate(
    output: str,
    *,
    model: str,
    device: str | None = None,
    dtype: str = "auto",
    class_labels: list[str] | None = None,
    prompt: list[str] | None = None,
    structure_prompt: list[str] | None = None,
    dynamics_prompt: list[str] | None = None,
    negative_prompt: str | None = None,
    num: int = 1,
    steps: int | None = None,
    guidance: float | None = None,
    stream_guidance: tuple[float, float] | None = None,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    structure_delay: float = 0.0,
    temperature: float = 1.0,
    candidates: int = 1,
    guider: str | None = None,
    guider_options: list[str] | None = None,
    seed: int = 0,
    fps: float = 8.0,
    frames: int | None = None,
    loop: bool = False,
    image: str | None = None,
    history_noise: float | None = None,
    history_guidance: float = 1.0,
    match_colors: bool = False,
) -> list[Path]:
    """Generate `num` videos of each class or prompt with a trained pipeline.

    Args:
        class_labels: names or numbers; None: every class, with a prompt none. A repeated class gives further videos
            of it. An unconditional pipeline takes none.
        prompt, structure_prompt, dynamics_prompt, negative_prompt: of the pipeline. Lists of one text serve those of
            any length.
        steps: denoising steps; None: 50, or 4 of a few-step model.
        stream_guidance: guidance scales of structure and of dynamics, in place of `guidance`.
        temperature: of the pipeline.
        candidates: `num_candidates` of the pipeline.
        structure_delay: of the pipeline; of long videos it concerns the first window.
        guider: class of `diffusers.guiders`, in place of guidance scales and their interval.
        guider_options: its arguments as key=value.
        seed: random seed of the first video of a class or prompt; the next ones have the following seeds.
        frames: frames per video; None: the model's clip length. Longer videos are generated window by window.
        loop: generate a seamless loop.
        image: file of an image to animate: the first frame for a model with `image_conditioning`, otherwise the
            structure, which requires an autoencoder with a dynamics latent.
        history_noise, history_guidance, match_colors: of long videos and loops, as `history_noise`,
            `history_guidance_scale` and `match_colors` of `pipelines.rollout.rollout`.
    """
    # Check all options before anything is sampled.
    for option, value in (("--num", num), ("--steps", steps), ("--frames", frames), ("--candidates", candidates)):
        if value is not None and value < 1:
            raise UserError(f"{option} must be at least 1, not {value}.")
    if guidance is not None and not math.isfinite(guidance):
        raise UserError(f"--guidance must be a finite number, not {guidance}.")
    if stream_guidance is not None and not all(map(math.isfinite, stream_guidance)):
        raise UserError(f"--stream-guidance must be two finite numbers, not {stream_guidance}.")
    if history_noise is not None and not 0 <= history_noise < 1:
        raise UserError(f"--history-noise must be at least 0 and below 1, not {history_noise}.")
    if not math.isfinite(history_guidance) or (history_guidance != 1 and history_noise is None):
        raise UserError("--history-guidance must be a finite number, and needs --history-noise, such as 0.1.")
    low, high = guidance_interval
    if not 0 <= low <= high <= 1:
        raise UserError(f"--guidance-interval must be two numbers from 0 to 1, the lower first, not {low:g} {high:g}.")
    if not 0 <= structure_delay <= 1:
        raise UserError(f"--structure-delay must be between 0 and 1, not {structure_delay:g}.")
    if not 0 <= temperature < math.inf:
        raise UserError(f"--temperature must be a finite number of at least 0, not {temperature:g}.")
    has_guidance = guidance is not None or stream_guidance is not None or (low, high) != (0, 1)
    if guider is not None and has_guidance:
        raise UserError(
            "--guider excludes --guidance, --stream-guidance and --guidance-interval; pass --guider-options "
            "guidance_scale=... start=... stop=..."
        )
    if guider is None and guider_options:
        raise UserError("--guider-options requires --guider.")
    values = parse_values(guider_options or [], "--guider-options")
    new_guider = None if guider is None else create_guider(guider, values)
    picture = None if image is None else read_image(image)
    pipeline = place_model(load_pipeline(model), resolve_device(device), dtype)
    if pipeline.transformer.config.interval_conditioning:
        scales = {guidance, *(stream_guidance or ())} - {None, 1}
        if scales or guider is not None or (low, high) != (0, 1):
            raise UserError(
                f"{model} is a few-step model, which includes the guidance of its training: leave --guidance, "
                "--stream-guidance, --guidance-interval and --guider out."
            )
    if guider is not None or has_guidance:
        pipeline.guider = new_guider  # in place of one that was saved with the pipeline
    if pipeline.vae is None:
        raise UserError(f"The pipeline in {model} has no autoencoder, so it cannot decode videos.")

    # Resolve classes, sizes and output files.
    ids = pipeline.labels | pipeline.subclasses
    names = {number: name for name, number in ids.items()}
    prompts = {"prompt": prompt, "structure_prompt": structure_prompt, "dynamics_prompt": dynamics_prompt}
    prompts = {name: texts for name, texts in prompts.items() if texts}
    labels = [None] if prompts else pipeline.class_ids or [None]
    if class_labels:
        labels = pipeline.get_label_ids([_parse_label(text, ids) for text in class_labels])
    if candidates > 1:
        try:
            check_candidates(pipeline.classifier, pipeline.get_label_names(labels), "pt")
        except ValueError as error:
            raise UserError(f"--candidates {candidates}: {error}") from error
    requests = _pair_requests(labels, prompts)
    clip_frames, height, width = pipeline.autoencoder.clip_shape[1:]
    frames = clip_frames if frames is None else frames
    if (loop or frames > clip_frames) and not pipeline.autoencoder.has_dynamics:
        raise UserError(
            f"Loops and videos of more than {clip_frames} frames need the dynamics latent of a VidTwin; this model's "
            f"autoencoder is {type(pipeline.vae).__name__}."
        )
    if (
        image is not None
        and not pipeline.transformer.config.image_conditioning
        and not pipeline.autoencoder.has_dynamics
    ):
        raise UserError(
            f"--image requires a DiT trained with model.overrides.image_conditioning=true: this model's autoencoder, "
            f"{type(pipeline.vae).__name__}, has no dynamics latent to generate for an image."
        )
    if structure_delay and not pipeline.autoencoder.has_dynamics:
        raise UserError(
            f"--structure-delay needs the dynamics latent of a VidTwin; this model's autoencoder is "
            f"{type(pipeline.vae).__name__}."
        )
    if structure_delay and image is not None and not pipeline.transformer.config.image_conditioning:
        raise UserError(
            "--structure-delay orders the generation of both latents, but this model takes --image as the structure: "
            "leave one of them out."
        )
    stems = [None if label is None else str(names.get(label, label)) for label, _ in requests]
    paths = _number_paths(output, stems, num)  # without the prompts, which may be long and hold any character
    writers = iter([open_writer(path, fps=fps, width=width, height=height) for path in paths])

    # Sample request by request.
    num_sampled = Counter()  # videos per request: a repeated one has the next seeds
    for label, texts in requests:
        request = (label, *texts.items())
        pipeline.set_progress_bar_config(
            desc="generating" if label is None else f"generating {names.get(label, label)}"
        )
        settings = {
            "num_videos_per_prompt": num,
            "guidance_scale": guidance if stream_guidance is None else tuple(stream_guidance),
            "num_inference_steps": default_steps(pipeline.transformer.config) if steps is None else steps,
            "guidance_interval": guidance_interval,
            "structure_delay": structure_delay,
            "temperature": temperature,
            "num_candidates": candidates,
            "generator": [torch.Generator().manual_seed(seed + num_sampled[request] + i) for i in range(num)],
            "negative_prompt": negative_prompt,
            **texts,
        }
        first = None
        if picture is not None and pipeline.transformer.config.image_conditioning:
            settings["image"] = picture
        elif picture is not None:
            first = pipeline(label, structure=picture, output_type="pt", **settings).frames
        windows = {
            "history_noise": history_noise,
            "history_guidance_scale": history_guidance,
            "match_colors": match_colors,
        }
        videos = rollout(pipeline, frames, label, loop=loop, first=first, **windows, **settings)
        num_sampled[request] += num
        for video, writer in zip(videos.movedim(2, -1).float().cpu().numpy(), writers, strict=False):
            with writer:
                writer.write((255 * video).round().astype(np.uint8))
            print(writer.path)
    return paths


def resolve_device(name: str | None) -> torch.device:
    """Return the device of this name; None selects the accelerator, or the CPU if there is none.

    Raises:
        UserError: if the device is not available.
    """
    if name is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        torch.zeros(1, device=name).item()
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} is not available: {str(error).splitlines()[0]}") from error


def check_components(vae: VideoAutoencoder, components: Components) -> None:
    """Raise a `UserError` if a model has no dynamics latent, and one of the two latents alone is requested."""
    if components != "both" and not vae.has_dynamics:
        raise UserError(
            f"This {type(vae.backbone).__name__} has one latent, so structure and dynamics cannot be separated; leave "
            "--components out, or use a VidTwin with two latents."
        )


def _write_video(
    path: str, chunks: Iterator[np.ndarray], geometry: ClipGeometry, fps: Fraction, description: str, columns: int = 1
) -> Path:
    """Write frames as they are decoded, while the model works on the next ones."""
    frames, height, width = geometry.size
    with (
        open_writer(path, fps=fps, width=columns * width, height=height) as writer,
        progress(description=description, total=frames, unit="frame") as bar,
    ):
        for chunk in in_background(chunks):
            writer.write(chunk)
            bar.update(len(chunk))
    print(f"{path}: {_describe(geometry, fps, columns)}")
    return Path(path)


def _show_progress(latents: Iterable[WindowLatents], geometry: ClipGeometry) -> Iterator[WindowLatents]:
    """Pass windows on and count their frames in a progress bar."""
    with progress(description="encoding", total=geometry.size[0], unit="frame") as bar:
        for window in latents:
            yield window
            bar.update(min(window.start + geometry.tile[0], geometry.size[0]) - bar.n)


def _describe(geometry: ClipGeometry, fps: Fraction, columns: int = 1) -> str:
    frames, height, width = geometry.size
    return f"{frames} frame{'s'[: frames != 1]} of {columns * width} x {height} at {float(fps):g} fps"


def _number_paths(output: str, names: list[str | None], num: int) -> list[str]:
    """Return a path for each of `num` videos of each class: `output` for a single one, else out-NAME-0.mp4 ...

    Numbers continue where names repeat, or differ only in ways that file systems ignore.
    """
    if len(names) * num == 1:
        return [output]
    target = Path(output)
    if not target.name:
        raise UserError(f"{output}: several videos need a file name to number, such as out.mp4.")
    stems = ["-".join([target.stem, *([] if name is None else [name.replace("/", "_")])]) for name in names]
    num_used: Counter[str] = Counter()
    paths = []
    for stem in stems:
        key = unicodedata.normalize("NFC", stem).casefold()
        paths += [str(target.with_name(f"{stem}-{num_used[key] + i}{target.suffix}")) for i in range(num)]
        num_used[key] += num
    return paths


def _pair_requests(labels: list[int | None], prompts: dict[str, list[str]]) -> list[tuple[int | None, dict[str, str]]]:
    """The class and the prompts of each request; lists of one serve those of any length."""
    count = max(len(labels), *map(len, prompts.values())) if prompts else len(labels)
    for name, values in {"class": labels, **prompts}.items():
        if len(values) not in (1, count):
            raise UserError(f"--{name.replace('_', '-')} is given {len(values)} times, but another {count}; give one.")
    texts = [{name: values[i % len(values)] for name, values in prompts.items()} for i in range(count)]
    return [(labels[i % len(labels)], texts[i]) for i in range(count)]


def _parse_label(text: str, ids: dict[str, int]) -> int | str:
    return int(text) if text.isdigit() and text not in ids else text
