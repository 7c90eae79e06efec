"""The page of `vidgen app`: a Gradio demo of a trained model. `vidgen.app.service` does the work of its buttons.

All files are in one private folder, which is deleted with the page. No other file can be read through the page, and
uploads by address are refused.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import gradio as gr
from gradio import processing_utils
from PIL import Image

from autoencoder.video_autoencoder import VideoAutoencoder
from pipelines import VidTwinPipeline

from ..common.errors import UserError
from ..data.sprites import write_sprites
from ..data.streams import FrameReader
from .service import GENERATED_FPS, InferenceService
from .uploads import UploadLimits

MAX_QUEUED_RUNS = 32
FILE_LIFETIME = 3600  # seconds for which uploads and results are kept
MAX_PROMPT = 2000  # characters
DEFAULT_GUIDANCE = 3  # the cards of the bundled models use 3 to 5
EXAMPLE_MOTIONS = ("orbit", "bounce", "spin", "swap")

STYLE = """
.gradio-container { width: 100%; }
.gradio-container main { width: 100%; max-width: 1200px; margin: 0 auto; }
"""


def build_app(service: InferenceService, name: str) -> gr.Blocks:
    """Build the page, with two tabs for a VAE and four for a pipeline.

    Args:
        service: does the work; its folder must be Gradio's, as in `serve`.
        name: of the model, for the heading.
    """
    clips, images = _write_examples(service.folder / "examples", service.vae)
    with gr.Blocks(title="vidgen", analytics_enabled=False, delete_cache=(600, FILE_LIFETIME)) as page:
        gr.Markdown(
            "# vidgen\nA video is encoded as two latents: *structure* (appearance and slow motion) and *dynamics* "
            f"(per-frame detail and fast motion). Model: {name}"
        )
        _add_reconstruct_tab(service, clips)
        _add_reenact_tab(service, clips)
        if service.pipeline is not None:
            _add_generate_tab(service)
            _add_animate_tab(service, images)
        page.unload(service.end_session)
    return page.queue(max_size=MAX_QUEUED_RUNS)


def _add_reconstruct_tab(service: InferenceService, clips: list[str]) -> None:
    with _tab("Reconstruct", "Decode a video from both of its latents, from structure alone and from dynamics alone."):
        with gr.Column(scale=2):
            limits = f"at most {service.limits.megabytes:g} MB and {service.limits.seconds:g} s"
            video = _video_input(f"Video ({limits})", "reconstruct-video")
            gr.Examples([[clip] for clip in clips], [video], label="Examples")
            buttons = _buttons("reconstruct")
        with gr.Column(scale=3):
            outputs = [_video_output("reconstruct-result"), gr.Markdown(elem_id="reconstruct-numbers")]
        _connect(service, service.reconstruct, buttons, [video], outputs)


def _add_reenact_tab(service: InferenceService, clips: list[str]) -> None:
    with _tab("Reenact", "Latent swap: decode the structure of video A with the dynamics of video B."):
        with gr.Column(scale=2):
            with gr.Row():
                a = _video_input("A: structure", "reenact-a", height=200)
                b = _video_input("B: dynamics", "reenact-b", height=200)
            gr.Examples([clips[:2], clips[2:4]], [a, b], label="Examples")
            strength = gr.Slider(0, 1, 1, step=0.05, label="Strength", info="0: dynamics of A, 1: dynamics of B")
            buttons = _buttons("reenact")
        with gr.Column(scale=3):
            result = _video_output("reenact-result")
        _connect(service, service.reenact, buttons, [a, b, strength], [result])


def _add_generate_tab(service: InferenceService) -> None:
    with _tab("Generate", "Generate videos from noise." + " Each row shows one class." * bool(service.classes)):
        with gr.Column(scale=2):
            labels = _class_input(service.classes, several=True, preselect=not service.takes_prompts)
            prompt = _prompt_input("Prompt", service.takes_prompts)
            with gr.Accordion("Prompts for structure and dynamics", open=False, visible=service.takes_prompts):
                structure = _prompt_input("Structure prompt", service.takes_prompts, "content, in place of the prompt")
                dynamics = _prompt_input("Dynamics prompt", service.takes_prompts, "motion, in place of the prompt")
                negative = _prompt_input("Negative prompt", service.takes_prompts, "what to avoid")
            settings = _sampling_settings(service)
            buttons = _buttons("generate")
        with gr.Column(scale=3):
            result = _video_output("generate-result")
        prompts = [prompt, structure, dynamics, negative]
        _connect(service, service.generate, buttons, [labels, *prompts, *settings], [result])


def _add_animate_tab(service: InferenceService, images: list[str]) -> None:
    text = "Image-to-video: generate dynamics for the structure of an image or video."
    if service.animates_images:
        text = "Image-to-video: generate a video that begins with an image."
    with _tab("Animate", text):
        with gr.Column(scale=2):
            # A file of any name: the service judges by the content, Gradio's image and video inputs by the name.
            source = gr.File(label="Image or video", height=140, elem_id="animate-source")
            gallery = gr.Gallery(images, columns=4, height=130, show_label=False, allow_preview=False, buttons=[])
            label = _class_input(service.classes, several=False, preselect=not service.takes_prompts)
            prompt = _prompt_input("Prompt", service.takes_prompts)
            strength = gr.Slider(
                0,
                1,
                0,
                step=0.05,
                label="Strength",
                info="0: the structure is unchanged, 1: it is ignored",
                visible=not service.animates_images,
            )
            settings = _sampling_settings(service, has_delay=service.animates_images)
            buttons = _buttons("animate")
        with gr.Column(scale=3):
            result = _video_output("animate-result")

        def select_example(selection: gr.SelectData) -> str:
            return images[selection.index]

        gallery.select(select_example, None, source, queue=False, api_visibility="private")
        _connect(service, service.animate, buttons, [source, label, prompt, strength, *settings], [result])


# --- components -----------------------------------------------------------------------------------------------------


@contextmanager
def _tab(title: str, text: str) -> Iterator[None]:
    """A tab with a text above one row."""
    with gr.Tab(title):
        gr.Markdown(text)
        with gr.Row():
            yield


def _video_input(label: str, element_id: str, height: int = 240) -> gr.Video:
    return gr.Video(sources=["upload"], height=height, label=label, elem_id=element_id)


def _video_output(element_id: str) -> gr.Video:
    """A video that plays in a loop; its label is hidden because it would cover a caption."""
    return gr.Video(
        show_label=False, interactive=False, autoplay=True, loop=True, elem_id=element_id, buttons=["download"]
    )


def _prompt_input(label: str, visible: bool, info: str | None = None) -> gr.Textbox:
    """A text; hidden for a model that takes none."""
    return gr.Textbox(label=label, info=info, lines=1, max_length=MAX_PROMPT, visible=visible)


def _class_input(classes: list[tuple[str, int]], several: bool, preselect: bool) -> gr.Dropdown:
    """A choice of classes, the first by default; hidden for an unconditional model."""
    first = classes[0][1] if classes and preselect else None
    value = [first] * (first is not None) if several else first
    label = "Classes" if several else "Class"
    return gr.Dropdown(classes, value=value, multiselect=several, label=label, visible=bool(classes))


def _sampling_settings(service: InferenceService, has_delay: bool = True) -> list[gr.components.Component]:
    """Fields for count, steps, guidance, temperature, structure delay and seed; those without effect are hidden.

    Args:
        service: of the model.
        has_delay: whether both latents are generated, so that structure can be delayed.
    """
    with gr.Row():
        count = gr.Slider(1, 4, 2, step=1, label="Videos per class")
        steps = gr.Slider(1, 200, service.default_steps, step=1, label="Steps")
    with gr.Row():
        guidance = gr.Slider(
            1,
            15,
            DEFAULT_GUIDANCE,
            step=0.1,
            label="Guidance",
            info="1: no guidance",
            visible=service.takes_guidance,
        )
        temperature = gr.Slider(0, 1.5, 1, step=0.05, label="Temperature", info="below 1: more typical videos")
    with gr.Row():
        delay = gr.Slider(
            0,
            1,
            0,
            step=0.01,
            label="Structure delay",
            info="fraction of the steps by which content follows motion",
            visible=has_delay,
        )
        seed = gr.Number(0, minimum=0, maximum=2**32 - 1, precision=0, label="Random seed")
    return [count, steps, guidance, temperature, delay, seed]


def _buttons(command: str) -> tuple[str, gr.Button, gr.Button]:
    """The command, its button and its Cancel button."""
    with gr.Row():
        start = gr.Button(command.capitalize(), variant="primary", elem_id=command)
        cancel = gr.Button("Cancel", elem_id=f"{command}-cancel")
    return command, start, cancel


def _connect(
    service: InferenceService,
    work: Callable,
    buttons: tuple[str, gr.Button, gr.Button],
    inputs: list[gr.components.Component],
    outputs: list[gr.components.Component],
) -> None:
    """Connect buttons: runs of all visitors are queued; Cancel removes a queued run, and stops one in progress."""
    command, start, cancel = buttons
    run = start.click(work, inputs, outputs, concurrency_limit=1, concurrency_id="model", api_visibility="private")
    cancel.click(service.make_cancel(command), cancels=run, queue=False, api_visibility="private")


def _write_examples(folder: Path, vae: VideoAutoencoder) -> tuple[list[str], list[str]]:
    """Write square sprites of at most the model's size; return the paths of clips and of their first frames."""
    side = 2 * (min(vae.clip_shape[2:]) // 2)
    paths = write_sprites(folder, 1, seed=2026, resolution=side, num_frames=16, fps=GENERATED_FPS)
    clips = [path for motion in EXAMPLE_MOTIONS for path in paths if path.parent.name == motion]
    for clip in clips:
        with FrameReader(clip) as reader:
            Image.fromarray(next(iter(reader))).save(clip.with_suffix(".png"))
    return [str(clip) for clip in clips], [str(clip.with_suffix(".png")) for clip in clips]


# --- server ---------------------------------------------------------------------------------------------------------


@contextmanager
def serve(
    model: VideoAutoencoder | VidTwinPipeline,
    name: str,
    limits: UploadLimits = UploadLimits(),
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    share: bool = False,
) -> Iterator[str]:
    """Serve the page while the block runs, and yield its address; its folder is deleted afterwards.

    Args:
        model: a VAE or a pipeline, in evaluation mode, on the device of the computation.
        name: of the model, for the heading.
        limits: of uploads.
        host, port: address to bind; 0.0.0.0 admits other machines of the network.
        share: also serve at a public address of Gradio's.

    Raises:
        UserError: if the port is in use, or the pipeline has no autoencoder.
    """
    with tempfile.TemporaryDirectory(prefix="vidgen-app-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary).resolve()
        settings = {"GRADIO_TEMP_DIR": str(folder), "GRADIO_EXAMPLES_CACHE": str(folder / "cached-examples")}
        with _environment(**settings), _refuse_addresses():
            service = InferenceService(model, folder, limits)
            page = build_app(service, name)
            try:
                _, local, public = page.launch(
                    server_name=host,
                    server_port=port,
                    share=share,
                    quiet=True,
                    prevent_thread_lock=True,
                    max_file_size=int(limits.megabytes * 1e6),
                    theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
                    css=STYLE,
                    footer_links=[],
                    run_history=False,
                    enable_monitoring=False,
                    ssr_mode=False,
                    mcp_server=False,
                    _frontend=False,  # skips Gradio's request to the local server, which fails behind a proxy
                )
            except OSError as error:
                raise UserError(f"cannot bind to {host}:{port}: {error}") from error
            try:
                yield public or local
            finally:
                service.queue.cancel_all()
                page.close(verbose=False)


@contextmanager
def _refuse_addresses() -> Iterator[None]:
    """Refuse uploads that are given by an address, which Gradio would download if it is public."""

    async def refuse(url: str, cache_dir: str) -> str:
        raise gr.Error("Upload the file itself: addresses are not fetched.", print_exception=False)

    download = processing_utils.async_ssrf_protected_download
    processing_utils.async_ssrf_protected_download = refuse
    try:
        yield
    finally:
        processing_utils.async_ssrf_protected_download = download


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set environment variables within the block."""
    previous = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in previous.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
