"""What the buttons of `vidgen app` do: runs of one model, each for one visitor.

One run at a time has the model; others wait in Gradio's queue. A run ends early when its own visitor cancels it or
closes the tab. The page itself is `vidgen.app.page`.
"""

from __future__ import annotations

import itertools
import re
import secrets
import threading
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from autoencoder import AutoencoderKLVidTwin
from pipelines import VidTwinPipeline

from ..common.errors import UserError
from ..common.images import to_uint8
from ..data.streams import FrameReader, open_writer
from ..inference.streaming import Together, component_frames, reenacted_frames, video_geometry
from ..metrics.reconstruction import psnr_of
from .uploads import UploadLimits, open_image_or_video, open_video

GENERATED_FPS = 8  # frames a second, as `vidgen generate` has it
MOST_VIDEOS = 16  # made at once
SMALLEST_CELL = 192  # pixels; smaller videos are enlarged by a whole factor
WIDEST_GRID = 4096  # pixels, to which videos are enlarged; beyond 16384 x264 writes none
CAPTION_HEIGHT = 24  # pixels
COMPONENTS = ("original", "both latents", "structure alone", "dynamics alone")
ANY_FOLDER = "(?:[^\\s/]+/)*"


# --- runs -----------------------------------------------------------------------------------------------------------


class RunCancelled(Exception):
    """The visitor cancelled the run, or is gone."""


@dataclass(eq=False)
class Run:
    """Something the model does for a visitor."""

    session: str | None
    word: str
    stop: threading.Event

    def check(self) -> None:
        """Raises `RunCancelled` where nobody waits for it any more."""
        if self.stop.is_set():
            raise RunCancelled


class Turns:
    """Who has the model: one run at a time, which only its own visitor can stop."""

    def __init__(self) -> None:
        self._model = threading.Lock()  # Gradio's queue lets the next one in while a cancelled one is still leaving
        self._runs: set[Run] = set()

    @contextmanager
    def take(self, session: str | None, word: str) -> Iterator[Run]:
        """The model for the length of the block; raises `RunCancelled` if that came first."""
        run = Run(session, word, threading.Event())
        self._runs.add(run)
        try:
            with self._model:
                run.check()
                yield run
        finally:
            self._runs.discard(run)

    def stop(self, session: str | None, word: str | None = None) -> None:
        """Stop a visitor's runs: those of one word, or all."""
        for run in self._runs.copy():
            if run.session == session and word in (None, run.word):
                run.stop.set()

    def stop_all(self) -> None:
        """Stop everybody's."""
        for run in self._runs.copy():
            run.stop.set()


# --- what is computed -----------------------------------------------------------------------------------------------


class Studio:
    """What the page's buttons do; their arguments are what the page's fields hold.

    Args:
        model: a VAE, or a pipeline with one, in evaluation mode, where it is to compute.
        folder: for results.
        limits: of uploads.

    Raises:
        UserError: if the pipeline has no autoencoder.
    """

    def __init__(self, model: AutoencoderKLVidTwin | VidTwinPipeline, folder: Path, limits: UploadLimits) -> None:
        self.pipeline = model if isinstance(model, VidTwinPipeline) else None
        self.vae = model if self.pipeline is None else self.pipeline.vae
        if self.vae is None:
            raise UserError("The pipeline has no autoencoder, which videos need.")
        self.vae.enable_tiling()
        self.vae.enable_slicing()
        if self.pipeline is not None:
            self.pipeline.set_progress_bar_config(disable=True)
        self.folder = folder
        self.limits = limits
        self.turns = Turns()

    @property
    def classes(self) -> list[tuple[str, int]]:
        """Names and ids of what the pipeline can be asked for, sub-classes last; none without classes."""
        if self.pipeline is None:
            return []
        names = {number: name for name, number in self.pipeline.labels.items()}
        classes = [(names.get(i, str(i)), i) for i in self.pipeline.class_ids]
        return classes + list(self.pipeline.subclasses.items())

    def reconstruct(
        self, video: str | None, request: gr.Request, progress: gr.Progress = gr.Progress()
    ) -> tuple[str, str]:
        """A video beside what the latents hold of it, and that in numbers."""
        with self._run(request, "reconstruct") as run, self._open(video) as reader:
            geometry = video_geometry(self.vae, reader.num_frames, reader.height, reader.width)
            squared_errors = np.zeros(len(COMPONENTS) - 1)

            def measured() -> Iterator[Together]:
                for original, *made in component_frames(reader, self.vae, geometry):
                    squared_errors[:] += [np.square(part - original.astype(np.float64)).sum() for part in made]
                    yield original, *made

            path = self._write(run, progress, measured(), reader.fps, reader.num_frames, COMPONENTS)
        pixels = 3 * torch.Size(geometry.size).numel()
        values = geometry.num_tiles * self.vae.latent_size
        both, structure, dynamics = psnr_of(torch.from_numpy(squared_errors / pixels)).tolist()
        return path, (
            f"PSNR **{both:.1f} dB** from both latents, {structure:.1f} dB from structure alone, {dynamics:.1f} dB "
            f"from dynamics alone. The latents are **{values:,} numbers** for the {pixels:,} of {reader.num_frames} "
            f"frames of {reader.width} x {reader.height}: {values / pixels:.1%}."
        )

    def reenact(
        self,
        structure: str | None,
        dynamics: str | None,
        strength: float,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),
    ) -> str:
        """Video A, video B, and what A looks like, moving as B does."""
        with (
            self._run(request, "reenact") as run,
            self._open(structure, "A") as ours,
            self._open(dynamics, "B", fps=float(ours.fps)) as theirs,
        ):
            length = min(ours.num_frames, theirs.num_frames)
            geometry = video_geometry(self.vae, length, ours.height, ours.width)
            frames = reenacted_frames(ours, theirs, self.vae, geometry, strength)
            return self._write(run, progress, frames, ours.fps, length, ("A", "B", "A, moving as B"))

    def generate(
        self,
        labels: list[int],
        count: int,
        steps: int,
        guidance: float,
        seed: int,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),
    ) -> str:
        """New videos: `count` of each class, a class to a row where there are several."""
        with self._run(request, "generate") as run:
            names = {number: name for name, number in self.classes}
            if names and not labels:
                raise UserError("Choose a class, or several.")
            labels = labels if names else []
            if count * max(1, len(labels)) > MOST_VIDEOS:
                raise UserError(
                    f"At most {MOST_VIDEOS} videos are made at once: choose fewer classes, or fewer of each."
                )
            clips = self._sample(run, progress, count, steps, guidance, seed, class_labels=labels or None)
            captions = [names[label] for label in labels for _ in range(count)] or [""] * count
            return self._write(run, progress, [tuple(clips)], GENERATED_FPS, clips.shape[1], captions, columns=count)

    def animate(
        self,
        given: str | None,
        label: int | None,
        strength: float,
        count: int,
        steps: int,
        guidance: float,
        seed: int,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),
    ) -> str:
        """An image or video, and `count` videos with its structure (`strength` 0: kept) and motion of a class."""
        with self._run(request, "animate") as run:
            _, frames, height, width = self.vae.clip_shape
            if given is None:
                raise UserError("Choose an image or a video first.")
            opened = open_image_or_video(given, self.limits, GENERATED_FPS)
            if isinstance(opened, Image.Image):
                pictures = [opened]
            else:
                with opened as reader:
                    pictures = [Image.fromarray(frame) for frame in itertools.islice(reader, frames)]
                pictures += pictures[-1:] * (frames - len(pictures))
            pictures = [ImageOps.fit(picture, (width, height)) for picture in pictures]
            made = self._sample(
                run,
                progress,
                count,
                steps,
                guidance,
                seed,
                class_labels=label,
                structure=pictures,
                structure_strength=strength,
            )
            shown = np.broadcast_to(np.stack(pictures), made.shape[1:])
            name = next((f", {name}" for name, number in self.classes if number == label), "")
            captions = ["given", *[f"animated{name}"] * count]
            return self._write(run, progress, [(shown, *made)], GENERATED_FPS, frames, captions)

    def stop(self, word: str) -> Callable[[gr.Request], None]:
        """What a Cancel button does: stop this visitor's runs of a word."""

        def stop(request: gr.Request) -> None:
            self.turns.stop(request.session_hash, word)

        return stop

    def leave(self, request: gr.Request) -> None:
        """The visitor's tab is closed."""
        self.turns.stop(request.session_hash)

    @contextmanager
    def _run(self, request: gr.Request, word: str) -> Iterator[Run]:
        """A turn at the model; what goes wrong is said in the page."""
        try:
            with self.turns.take(request.session_hash, word) as run:
                yield run
        except RunCancelled as error:
            raise gr.Error("Cancelled.", print_exception=False) from error
        except ValueError as error:
            # A path would tell where files lie, and the visitor knows the file by its name.
            message = re.sub(re.escape(f"{self.folder}/") + ANY_FOLDER, "", str(error))
            raise gr.Error(message, duration=None, title="This cannot be done", print_exception=False) from error
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise gr.Error("Out of memory: try a smaller or shorter video.", print_exception=False) from error
        except Exception as error:
            traceback.print_exc()
            raise gr.Error("Something went wrong; the server's log says what.", print_exception=False) from error

    def _open(self, video: str | None, name: str = "", fps: float | None = None) -> FrameReader:
        if video is None:
            raise UserError(f"Choose {f'video {name}' if name else 'a video'} first.")
        return open_video(video, self.limits, fps)

    def _sample(
        self,
        run: Run,
        progress: gr.Progress,
        count: int,
        steps: int,
        guidance: float,
        seed: int,
        *,
        class_labels: list[int] | int | None,
        **given: Any,
    ) -> np.ndarray:
        """`count` clips of each class, uint8 (N, T, H, W, 3), as `vidgen generate` makes them of this seed."""

        def stepped(pipeline: VidTwinPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
            progress((step + 1, pipeline.num_timesteps), desc="Denoising", unit="steps")
            run.check()
            return tensors

        classes = len(class_labels) if isinstance(class_labels, list) else 1
        clips = self.pipeline(
            class_labels,
            num_videos_per_prompt=count,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[
                torch.Generator().manual_seed(int(seed or 0) + i) for _ in range(classes) for i in range(count)
            ],
            output_type="pt",
            callback_on_step_end=stepped,
            **given,
        ).frames
        return to_uint8(2 * clips - 1).movedim(2, -1).cpu().numpy()

    def _write(
        self,
        run: Run,
        progress: gr.Progress,
        together: Iterable[Together],
        fps: float | Fraction,
        num_frames: int,
        captions: Sequence[str],
        columns: int | None = None,
    ) -> str:
        """A new video in which several play beside each other; its file appears when whole."""
        path = self.folder / secrets.token_hex(16) / f"{run.word}.mp4"
        chunks = (grid(clips, captions, columns or len(captions)) for clips in together)
        progress((0, num_frames), desc="Reading", unit="frames")
        try:
            first = next(chunks)
            done = 0
            with open_writer(path, fps=fps, width=first.shape[2], height=first.shape[1]) as writer:
                for chunk in itertools.chain([first], chunks):
                    run.check()
                    writer.write(chunk)
                    done += len(chunk)
                    progress((done, num_frames), desc="Making the video", unit="frames")
        finally:
            if isinstance(together, Generator):
                together.close()  # at once, not when the error that stopped it is forgotten: a thread reads ahead
        return str(path)


def grid(clips: Sequence[np.ndarray], captions: Sequence[str], columns: int) -> np.ndarray:
    """Clips side by side, in rows from the left, each under its caption, small ones enlarged.

    Args:
        clips: uint8 (T, H, W, 3), all of one shape, H and W even.
        captions: one for each.
        columns: in a row.
    """
    height, width = clips[0].shape[1:3]
    factor = max(1, min(-(-SMALLEST_CELL // height), WIDEST_GRID // (columns * width)))
    cells = []
    for clip, caption in zip(clips, captions, strict=True):
        large = clip.repeat(factor, axis=1).repeat(factor, axis=2)
        above = np.broadcast_to(_caption(caption, large.shape[2]), (len(large), CAPTION_HEIGHT, large.shape[2], 3))
        cells.append(np.concatenate([above, large], axis=1))
    cells += [np.zeros_like(cells[0])] * (-len(cells) % columns)
    rows = [np.concatenate(cells[start : start + columns], axis=2) for start in range(0, len(cells), columns)]
    return np.concatenate(rows, axis=1)


@lru_cache(maxsize=256)
def _caption(text: str, width: int) -> np.ndarray:
    """White on nearly black, uint8 (CAPTION_HEIGHT, width, 3)."""
    strip = Image.new("RGB", (width, CAPTION_HEIGHT), (24, 24, 27))
    middle = (width / 2, CAPTION_HEIGHT / 2)
    ImageDraw.Draw(strip).text(middle, text, "white", ImageFont.load_default(size=14), anchor="mm")
    return np.asarray(strip)
