"""The page of `vidgen app`: a trained model to try in a browser. What its buttons do is `vidgen.app.service`.

All files lie in one private folder, which is gone when the page is; nothing else can be read through the page, and
nothing is fetched for it.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
from gradio import processing_utils
from PIL import Image
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from autoencoder import AutoencoderKLVidTwin
from pipelines import VidTwinPipeline

from ..common.errors import UserError
from ..data.sprites import write_sprites
from ..data.streams import FrameReader
from .service import GENERATED_FPS, Studio
from .uploads import UploadLimits

MOST_WAITING = 32  # runs in the queue
KEPT_SECONDS = 3600  # uploads and results
EXAMPLE_MOTIONS = ("orbit", "bounce", "spin", "swap")

STYLE = """
.gradio-container { width: 100%; }
.gradio-container main { width: 100%; max-width: 1200px; margin: 0 auto; }
"""


class _NoAddressServed:
    """Refuses what would make Gradio fetch an address, and hand on what is there."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if "/proxy=" in path or re.search(r"/file=\s*[a-z][a-z0-9+.-]*:/", path, re.IGNORECASE):
            await PlainTextResponse("Addresses are not fetched.", 403)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def build_app(studio: Studio, name: str) -> gr.Blocks:
    """The page, with two tabs for a VAE and four for a pipeline.

    Args:
        studio: what is behind it; its folder must be Gradio's, as in `serve`.
        name: of the model, for the heading.
    """
    clips, stills = _write_examples(studio.folder / "examples", studio.vae)
    taken = f"at most {studio.limits.megabytes:g} MB and {studio.limits.seconds:g} s"
    with gr.Blocks(title="vidgen", analytics_enabled=False, delete_cache=(600, KEPT_SECONDS)) as page:
        gr.Markdown(
            f"# vidgen\nVideos as two latents, *structure*: what is there, and *dynamics*: how it moves. Model: {name}"
        )
        with gr.Tab("Reconstruct"):
            gr.Markdown("A video through the autoencoder and back, from both of its latents and from each alone.")
            with gr.Row():
                with gr.Column(scale=2):
                    video = _video_input(f"Video ({taken})", "reconstruct-video")
                    gr.Examples([[clip] for clip in clips], [video], label="Or one of these")
                    buttons = _buttons("Reconstruct")
                with gr.Column(scale=3):
                    result = _video_output("reconstruct-result")
                    numbers = gr.Markdown(elem_id="reconstruct-numbers")
            _connect(studio.reconstruct, studio, buttons, [video], [result, numbers])
        with gr.Tab("Reenact"):
            gr.Markdown("What A looks like, moving as B does: the structure of A with the dynamics of B.")
            with gr.Row():
                with gr.Column(scale=2):
                    with gr.Row():
                        a = _video_input("A: the look", "reenact-a", height=200)
                        b = _video_input("B: the motion", "reenact-b", height=200)
                    gr.Examples([clips[:2], clips[2:4]], [a, b], label="Or one of these")
                    strength = gr.Slider(0, 1, 1, step=0.05, label="Strength", info="0: A's own motion, 1: B's")
                    buttons = _buttons("Reenact")
                with gr.Column(scale=3):
                    result = _video_output("reenact-result")
            _connect(studio.reenact, studio, buttons, [a, b, strength], [result])
        if studio.pipeline is not None:
            with gr.Tab("Generate"):
                gr.Markdown("New videos, from noise alone." + " A class to a row." * bool(studio.classes))
                with gr.Row():
                    with gr.Column(scale=2):
                        labels = _class_input(studio.classes, several=True)
                        settings = _sampling_settings(bool(studio.classes))
                        buttons = _buttons("Generate")
                    with gr.Column(scale=3):
                        result = _video_output("generate-result")
                _connect(studio.generate, studio, buttons, [labels, *settings], [result])
            with gr.Tab("Animate"):
                gr.Markdown("The structure of an image or video, with a motion that is generated.")
                with gr.Row():
                    with gr.Column(scale=2):
                        given = gr.File(  # of any name: Gradio would judge by that, `Studio` does by the content
                            label="Image or video, or one of these",
                            height=140,
                            elem_id="animate-given",
                        )
                        gallery = gr.Gallery(
                            stills, columns=4, height=130, show_label=False, allow_preview=False, buttons=[]
                        )
                        label = _class_input(studio.classes, several=False)
                        change = gr.Slider(
                            0,
                            1,
                            0,
                            step=0.05,
                            label="Change",
                            info="0: its own look is kept, 1: nothing of it is left",
                        )
                        settings = _sampling_settings(bool(studio.classes))
                        buttons = _buttons("Animate")
                    with gr.Column(scale=3):
                        result = _video_output("animate-result")

                def choose(chosen: gr.SelectData) -> str:
                    return stills[chosen.index]

                gallery.select(choose, None, given, queue=False, api_visibility="private")
                _connect(studio.animate, studio, buttons, [given, label, change, *settings], [result])
        page.unload(studio.leave)
    return page.queue(max_size=MOST_WAITING)


@contextmanager
def _no_address_uploaded() -> Iterator[None]:
    """What is uploaded by its address Gradio fetches, if it is a public one; here it is refused."""

    async def refuse(url: str, cache_dir: str) -> str:
        raise gr.Error("Upload the file itself: addresses are not fetched.", print_exception=False)

    fetch = processing_utils.async_ssrf_protected_download
    processing_utils.async_ssrf_protected_download = refuse
    try:
        yield
    finally:
        processing_utils.async_ssrf_protected_download = fetch


def _video_input(label: str, name: str, height: int = 240, **options: Any) -> gr.Video:
    return gr.Video(sources=["upload"], height=height, label=label, elem_id=name, **options)


def _video_output(name: str) -> gr.Video:
    return gr.Video(
        show_label=False,  # it would cover a caption
        interactive=False,
        autoplay=True,
        loop=True,
        elem_id=name,
        buttons=["download"],
    )


def _class_input(classes: list[tuple[str, int]], several: bool) -> gr.Dropdown:
    """Hidden where the model has no classes."""
    first = classes[0][1] if classes else None
    value = [first] * bool(classes) if several else first
    label = "Classes" if several else "Class of the motion"
    return gr.Dropdown(classes, value=value, multiselect=several, label=label, visible=bool(classes))


def _sampling_settings(conditional: bool) -> list[gr.components.Component]:
    """Fields for `count`, `steps`, `guidance` and `seed`; without classes there is no guidance to choose."""
    with gr.Row():
        count = gr.Slider(1, 4, 2, step=1, label="Videos of each")
        steps = gr.Slider(1, 200, 50, step=1, label="Steps")
    with gr.Row():
        guidance = gr.Slider(1, 15, 3, step=0.1, label="Guidance", info="To the class; 1: none", visible=conditional)
        seed = gr.Number(0, minimum=0, maximum=2**32 - 1, precision=0, label="Seed", info="The same gives the same")
    return [count, steps, guidance, seed]


def _buttons(word: str) -> tuple[str, gr.Button, gr.Button]:
    name = word.lower()
    with gr.Row():
        begin = gr.Button(word, variant="primary", elem_id=name)
        cancel = gr.Button("Cancel", elem_id=f"{name}-cancel")
    return name, begin, cancel


def _connect(
    work: Callable,
    studio: Studio,
    buttons: tuple[str, gr.Button, gr.Button],
    inputs: list[gr.components.Component],
    outputs: list[gr.components.Component],
) -> None:
    """Clicks: one run of all at a time; cancelling takes a waiting run from the queue, and stops one that runs."""
    word, begin, cancel = buttons
    running = begin.click(work, inputs, outputs, concurrency_limit=1, concurrency_id="model", api_visibility="private")
    cancel.click(studio.stop(word), cancels=running, queue=False, api_visibility="private")


def _write_examples(folder: Path, vae: AutoencoderKLVidTwin) -> tuple[list[str], list[str]]:
    """Sprites of the model's size, so that there is something to click at once: clips, and their first frames."""
    side = 2 * (vae.config.sample_size // 2)
    written = write_sprites(folder, 1, seed=2026, resolution=side, num_frames=16, fps=GENERATED_FPS)
    clips = [path for motion in EXAMPLE_MOTIONS for path in written if path.parent.name == motion]
    for clip in clips:
        with FrameReader(clip) as reader:
            Image.fromarray(next(iter(reader))).save(clip.with_suffix(".png"))
    return [str(clip) for clip in clips], [str(clip.with_suffix(".png")) for clip in clips]


@contextmanager
def serve(
    model: AutoencoderKLVidTwin | VidTwinPipeline,
    name: str,
    limits: UploadLimits = UploadLimits(),
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    share: bool = False,
) -> Iterator[str]:
    """The page, for as long as the block lasts; yields its address. Afterwards its folder is gone.

    Args:
        model: a VAE or a pipeline, in evaluation mode, where it is to compute.
        name: of the model, for the heading.
        limits: of uploads.
        host, port: where it listens; with 0.0.0.0 others on the network reach it.
        share: also through a public address of Gradio's.

    Raises:
        UserError: if the port is taken, or the pipeline has no autoencoder.
    """
    with tempfile.TemporaryDirectory(prefix="vidgen-app-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary).resolve()
        settings = {"GRADIO_TEMP_DIR": str(folder), "GRADIO_EXAMPLES_CACHE": str(folder / "cached-examples")}
        with _environment(**settings), _no_address_uploaded():
            studio = Studio(model, folder, limits)
            page = build_app(studio, name)
            try:
                _, local, public = page.launch(
                    server_name=host,
                    server_port=port,
                    share=share,
                    quiet=True,
                    prevent_thread_lock=True,
                    max_file_size=int(limits.megabytes * 1e6),
                    app_kwargs={"middleware": [Middleware(_NoAddressServed)]},
                    theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
                    css=STYLE,
                    footer_links=[],
                    run_history=False,
                    enable_monitoring=False,
                    ssr_mode=False,
                    mcp_server=False,
                    pwa=False,
                    _frontend=False,  # it would ask itself, by any proxy, and give up where the answer is slow
                    inbrowser=False,
                )
            except OSError as error:
                raise UserError(f"{host}:{port} cannot be listened at: {error}") from error
            try:
                yield public or local
            finally:
                studio.turns.stop_all()
                page.close(verbose=False)


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    former = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in former.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
