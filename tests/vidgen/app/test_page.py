"""The page of `vidgen app`, by HTTP and in a browser: functions, errors, cancellation and privacy."""

from __future__ import annotations

import itertools
import json
import re
import secrets
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import torch
from command_line import fail
from PIL import Image
from tiny_text import tiny_text_encoder

from autoencoder import AutoencoderKLVidTwin, TwinLatents
from pipelines import VidTwinPipeline, VidTwinTransformer3DModel, default_scheduler
from vidgen.app.uploads import UploadLimits
from vidgen.common import loading
from vidgen.common.images import to_uint8
from vidgen.data.sprites import render_sprite, sample_factors
from vidgen.data.streams import FrameReader
from vidgen.data.transforms import frames_to_clip
from vidgen.data.video import write_video
from vidgen.metrics.reconstruction import psnr

gradio = pytest.importorskip("gradio", reason="the page needs the extra: pip install -e '.[web]'")
import httpx  # noqa: E402, a dependency of gradio

from vidgen.app import page as app  # noqa: E402
from vidgen.app import service  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMIUM_OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 60  # seconds
CELL, CAPTION = service.MIN_CELL, service.CAPTION_HEIGHT


@pytest.fixture(scope="module")
def pipeline() -> VidTwinPipeline:
    torch.manual_seed(0)
    vae = AutoencoderKLVidTwin.from_preset("tiny-test", bottleneck="residual").eval()
    transformer = VidTwinTransformer3DModel.from_preset("tiny-test", vae=vae, num_classes=2)
    for layer in (transformer.structure_out, transformer.dynamics_out, transformer.modulation_out[1]):
        torch.nn.init.normal_(layer.weight)  # a fresh DiT predicts zero, whatever noise it is given
    return VidTwinPipeline(vae, transformer.eval(), default_scheduler(), {"0": "orbit", "1": "spin"})


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return render_sprite(sample_factors(np.random.default_rng(0), "orbit", resolution=48, num_frames=8))


@pytest.fixture(scope="module")
def video(tmp_path_factory, frames) -> Path:
    """8 frames of 48 x 48 at 8 fps."""
    return write_video(tmp_path_factory.mktemp("video") / "mine.mp4", frames, 8)


@dataclass
class Page:
    url: str
    service: service.InferenceService

    @property
    def folder(self) -> Path:
        return self.service.folder

    def awaits(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def runs_of(self, visitor: Visitor) -> list[service.Run]:
        return [run for run in self.service.queue._runs.copy() if run.session == visitor.session]

    def written(self, word: str) -> set[Path]:
        """Results of a word, finished or not."""
        return {path for path in self.folder.rglob("*") if path.is_file() and word in path.name}


@contextmanager
def served(model, **limits) -> Iterator[Page]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    build_app, services = app.build_app, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "build_app", lambda service, name: services.append(service) or build_app(service, name))
        with app.serve(model, "tiny", UploadLimits(**limits), port=port) as url:
            yield Page(url, *services)


@pytest.fixture(scope="module")
def page(pipeline) -> Iterator[Page]:
    with served(pipeline, seconds=5, side=512) as page:
        yield page


class Visitor:
    """A tab, without the browser."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.http = httpx.Client(base_url=page.url, timeout=PATIENCE, trust_env=False)
        self.session = secrets.token_hex(5)
        self.config = self.http.get("/config").json()
        self.names = {part["props"].get("elem_id"): part["id"] for part in self.config["components"]}

    def upload(self, path: Path) -> dict:
        answer = self.http.post("/gradio_api/upload", files={"files": (path.name, path.read_bytes())})
        assert answer.status_code == 200, answer.text
        (path,) = answer.json()
        assert Path(path).is_relative_to(self.page.folder)
        return self.file(path)

    def file(self, path: str) -> dict:
        return {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": Path(path).name}

    def click(self, button: str, *fields) -> str:
        """The event's id."""
        (event,) = (event for event in self.events_of(button) if event["backend_fn"])
        body = {"fn_index": event["id"], "session_hash": self.session, "data": list(fields)}
        path = "/gradio_api/queue/join" if event["queue"] else "/gradio_api/run/predict"
        answer = self.http.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json().get("event_id")

    def cancel(self, word: str, event_id: str) -> None:
        """Send what a click on Cancel sends."""
        (event,) = self.events_of(word)
        body = {"session_hash": self.session, "fn_index": event["id"], "event_id": event_id}
        self.http.post("/gradio_api/cancel", json=body)
        self.click(f"{word}-cancel")

    def events_of(self, button: str) -> list[dict]:
        wanted = [self.names[button], "click"]
        return [event for event in self.config["dependencies"] if wanted in event["targets"]]

    def messages(self) -> Iterator[dict]:
        """The server's messages about this visitor's events, until all have ended."""
        query = {"session_hash": self.session}
        with self.http.stream("GET", "/gradio_api/queue/data", params=query) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    message = json.loads(line.removeprefix("data: "))
                    yield message
                    if message["msg"] == "close_stream":
                        return

    def ending(self) -> dict:
        return next(message for message in self.messages() if message["msg"] == "process_completed")

    def outputs_of(self, button: str, *fields) -> list:
        """The outputs of a click."""
        self.click(button, *fields)
        ending = self.ending()
        assert ending["success"], ending
        return ending["output"]["data"]

    def error_of(self, button: str, *fields) -> str:
        """The error message of a click."""
        self.click(button, *fields)
        ending = self.ending()
        assert not ending["success"], ending
        return ending["output"]["error"]

    def frames_of(self, file: dict) -> np.ndarray:
        """A result's frames (T, H, W, 3), fetched through the page."""
        assert Path(file["path"]).is_relative_to(self.page.folder)
        answer = self.http.get(f"/gradio_api/file={file['path']}")
        assert answer.status_code == 200 and answer.headers["content-type"] == "video/mp4"
        copy = self.page.folder / f"fetched-{secrets.token_hex(5)}"
        copy.write_bytes(answer.content)
        with FrameReader(copy) as reader:
            return np.stack(list(reader))


@pytest.fixture
def visitor(page) -> Visitor:
    return Visitor(page)


@pytest.fixture
def gate(monkeypatch) -> Iterator[threading.Event]:
    """Runs come to a halt at their first step or window, until it is set."""
    gate, begun = threading.Event(), set()
    check = service.Run.check

    def halted(run: service.Run) -> None:
        if run not in begun:  # it takes its turn
            begun.add(run)
            return check(run)
        while not gate.is_set() and not run.cancelled.is_set():
            time.sleep(0.01)
        check(run)

    monkeypatch.setattr(service.Run, "check", halted)
    yield gate
    gate.set()


def cells(frames: np.ndarray, columns: int, side: int) -> list[np.ndarray]:
    """The videos of one row, as small as they were."""
    factor = frames.shape[2] // columns // side
    row = frames[:, CAPTION:, ::factor][:, ::factor]
    return np.split(row, columns, axis=2)


def clip_of(path: Path) -> torch.Tensor:
    """A file's frames as the model sees them, (1, C, T, H, W)."""
    with FrameReader(path) as reader:
        return frames_to_clip(torch.from_numpy(np.stack(list(reader))))[None]


def pixels_of(clip: torch.Tensor) -> np.ndarray:
    """Of the first clip, (T, H, W, C), 0 to 255."""
    return ((clip[0].movedim(0, -1) + 1) * 127.5).clamp(0, 255).numpy()


TEXTS = ("", "", "", "")  # prompts: of both streams, of each, and the negative one
SETTINGS = (1.0, 1.0, 0.0)  # guidance, temperature, structure delay
GENERATE = ([0], *TEXTS, 1, 4, *SETTINGS, 0)  # classes, prompts, count, steps, settings, seed
ANIMATE = (0, "", 0, 1, 4, *SETTINGS, 0)  # class, prompt, change, count, steps, settings, seed


# --- functions ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_reconstruct_shows_components_and_figures(visitor, video, pipeline):
    result, words = visitor.outputs_of("reconstruct", visitor.upload(video))
    shown = visitor.frames_of(result)
    assert shown.shape[0] == 8 and shown.shape[2] == 4 * CELL
    clip = clip_of(video)
    parts = cells(shown, 4, 48)
    assert np.abs(parts[0] - pixels_of(clip)).mean() < 4
    for part, components in zip(parts[1:], ("both", "structure", "dynamics"), strict=True):
        made = pipeline.vae(clip, components=components).sample
        assert np.abs(part - pixels_of(made)).mean() < 6
        assert f"{psnr(made, clip).item():.1f} dB" in words
    assert "8 frames of 48 x 48" in words


@torch.no_grad()
def test_reenact_shows_both_videos_and_the_latent_swap(visitor, video, pipeline, tmp_path):
    other = tmp_path / "other.mp4"
    write_video(other, render_sprite(sample_factors(np.random.default_rng(1), "spin", resolution=48)), 8)
    latents = [pipeline.vae.encode(clip_of(path)[:, :, :8]).latent_dist.mode() for path in (video, other)]
    mixed = TwinLatents(latents[0].structure, latents[1].dynamics, latents[0].geometry)
    expected = [pixels_of(pipeline.vae.decode(z).sample) for z in (latents[0], mixed)]
    a, b = visitor.upload(video), visitor.upload(other)
    for strength in (0, 1):
        (result,) = visitor.outputs_of("reenact", a, b, strength)
        shown = visitor.frames_of(result)
        assert shown.shape == (8, CAPTION + CELL, 3 * CELL, 3)
        first, second, made = cells(shown, 3, 48)
        assert np.abs(first - pixels_of(clip_of(video))).mean() < 4
        assert np.abs(second - pixels_of(clip_of(other))[:8]).mean() < 4
        errors = [np.abs(made - clip).mean() for clip in expected]
        assert np.argmin(errors) == strength


def test_generate_equals_the_pipeline_with_the_same_seed(visitor, pipeline):
    (result,) = visitor.outputs_of("generate", [0, 1], *TEXTS, 2, 4, 1.0, 0.5, 0.25, 7)
    shown = visitor.frames_of(result)
    side, columns = pipeline.vae.clip_shape[3], 2
    enlarged = shown.shape[2] // columns
    assert shown.shape[1:3] == (2 * (CAPTION + enlarged), columns * enlarged)
    expected = pipeline(
        [0, 1],
        num_videos_per_prompt=2,
        num_inference_steps=4,
        guidance_scale=1.0,
        temperature=0.5,
        structure_delay=0.25,
        generator=[torch.Generator().manual_seed(seed) for seed in (7, 8, 7, 8)],
        output_type="np",
    ).frames
    for row, clips in enumerate(np.split(expected, 2)):
        part = shown[:, row * (CAPTION + enlarged) :][:, : CAPTION + enlarged]
        for made, clip in zip(cells(part, columns, side), clips, strict=True):
            assert np.abs(made - 255 * clip).mean() < 8


def test_prompts_are_fields_of_models_with_text_and_stay_text(pipeline):
    """Also of a prompt that is HTML: the page shows it in the video only."""
    encoder = tiny_text_encoder()
    torch.manual_seed(0)
    transformer = VidTwinTransformer3DModel.from_preset("tiny-test", vae=pipeline.vae, caption_channels=16)
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    parts = {"text_encoder": encoder.model, "tokenizer": encoder.tokenizer}
    with served(VidTwinPipeline(pipeline.vae, transformer.eval(), default_scheduler(), **parts)) as page:
        visitor = Visitor(page)
        boxes = [part["props"] for part in visitor.config["components"] if part["type"] == "textbox"]
        labels = {box["label"] for box in boxes if box["visible"]}
        assert labels == {"Prompt", "Structure prompt", "Dynamics prompt", "Negative prompt"}
        prompt = "<img src=x onerror=alert(1)> a red\ndisc " * 20
        videos = []
        for texts in ((prompt, "", "", ""), ("", "a ring", "spins", "a dog"), TEXTS):
            visitor.click("generate", [], *texts, 1, 4, 3.0, 1.0, 0.0, 0)
            messages = list(visitor.messages())
            ending = next(message for message in messages if message["msg"] == "process_completed")
            videos.append(visitor.frames_of(ending["output"]["data"][0]))
            assert "onerror" not in json.dumps(messages)
        assert not np.array_equal(videos[0][:, CAPTION:], videos[1][:, CAPTION:])


def sliders_of(visitor: Visitor) -> dict[str, list[dict]]:
    """The sliders of the tabs Generate and Animate, by label, in this order."""
    sliders: dict[str, list[dict]] = {}
    for part in visitor.config["components"]:
        if part["type"] == "slider":
            sliders.setdefault(part["props"]["label"], []).append(part["props"])
    return sliders


def test_settings_follow_the_model(visitor, pipeline, video, monkeypatch):
    """A few-step model has four steps and no guidance; an animated structure is not delayed."""
    calls = []
    sample = VidTwinPipeline.__call__
    monkeypatch.setattr(VidTwinPipeline, "__call__", lambda *a, **k: calls.append(k) or sample(*a, **k))
    settings = (3.0, 0.5, 0.25)
    sliders = sliders_of(visitor)
    assert [slider["value"] for slider in sliders["Steps"]] == [50, 50]
    assert [slider["visible"] for slider in sliders["Guidance"]] == [True, True]
    assert [slider["visible"] for slider in sliders["Structure delay"]] == [True, False]
    visitor.outputs_of("animate", visitor.upload(video), 0, "", 0, 1, 4, *settings, 0)
    assert (calls[-1]["guidance_scale"], calls[-1]["temperature"]) == (3.0, 0.5)

    options = {"num_classes": 2, "interval_conditioning": True, "image_conditioning": True}
    transformer = VidTwinTransformer3DModel.from_preset("tiny-test", vae=pipeline.vae, **options)
    with served(VidTwinPipeline(pipeline.vae, transformer.eval(), default_scheduler("v_prediction"))) as page:
        sliders = sliders_of(Visitor(page))
        assert [slider["value"] for slider in sliders["Steps"]] == [4, 4]
        assert [slider["visible"] for slider in sliders["Guidance"]] == [False, False]
        assert [slider["visible"] for slider in sliders["Structure delay"]] == [True, True]
        visitor = Visitor(page)
        visitor.outputs_of("generate", [0], *TEXTS, 1, 4, *settings, 0)
        visitor.outputs_of("animate", visitor.upload(video), 0, "", 0, 1, 4, *settings, 0)
        for call in calls[-2:]:
            assert call["guidance_scale"] is None and (call["temperature"], call["structure_delay"]) == (0.5, 0.25)


def test_animate_takes_an_image_or_a_video(visitor, video, frames, tmp_path, pipeline):
    Image.fromarray(frames[0]).save(tmp_path / "still.png")
    still, clip = visitor.upload(tmp_path / "still.png"), visitor.upload(video)
    side, length = pipeline.vae.clip_shape[3], pipeline.vae.clip_shape[1]
    for given in (still, clip):
        (result,) = visitor.outputs_of("animate", given, 1, "", 0, 2, 4, *SETTINGS, 0)
        parts = cells(visitor.frames_of(result), 3, side)
        assert len(parts[0]) == length
        moved = np.abs(parts[0][0].astype(int) - parts[0][-1]).mean()
        assert moved < 1 if given is still else moved > 1
        assert np.abs(parts[1].astype(int) - parts[2]).mean() > 1


def test_animate_recognizes_files_by_content(visitor, video, frames, tmp_path):
    still = tmp_path / "photo.jfif"
    Image.fromarray(frames[0]).save(still, format="JPEG")
    clip = shutil.copy(video, tmp_path / "clip.png")
    nameless = shutil.copy(still, tmp_path / "photo")
    for given in (still, clip, nameless):
        visitor.outputs_of("animate", visitor.upload(given), *ANIMATE)


def test_a_vae_alone_has_two_tabs(pipeline, video):
    with served(pipeline.vae) as page:
        visitor = Visitor(page)
        tabs = [part["props"]["label"] for part in visitor.config["components"] if part["type"] == "tabitem"]
        assert tabs == ["Reconstruct", "Reenact"]
        visitor.outputs_of("reconstruct", visitor.upload(video))
    assert not page.folder.exists()


def test_uploads_and_results_expire_but_examples_do_not(visitor, page, video):
    from gradio.route_utils import delete_files_created_by_app

    upload = visitor.upload(video)
    result, _ = visitor.outputs_of("reconstruct", upload)
    examples = re.findall(r'"path":"([^"]+/examples/[^"]+)"', visitor.http.get("/config").text)
    assert len({Path(path).suffix for path in examples}) == 2
    blocks = next(
        blocks for blocks in gradio.Blocks.get_instances() if blocks.local_url.rstrip("/") == page.url.rstrip("/")
    )
    delete_files_created_by_app(blocks, age=0)
    assert all(visitor.http.get(f"/gradio_api/file={path}").status_code == 200 for path in examples)
    assert not Path(upload["path"]).exists() and not Path(result["path"]).exists()
    said = f"{video.name}: the file has expired; upload it again."
    assert visitor.error_of("reconstruct", upload) == visitor.error_of("animate", upload, *ANIMATE) == said


# --- errors and cancellation ----------------------------------------------------------------------------------------


def bad_files(folder: Path, video: Path) -> dict[Path, str]:
    """Files, and words of the error for each."""
    good = video.read_bytes()
    contents = {
        "text.mp4": (b"just text\n" * 50, "not a whole mp4"),
        "zeros.mp4": (bytes(3000), "not a whole mp4"),
        "cut.mp4": (good[: len(good) // 2], "text"),
        "playlist.mp4": (b"#EXTM3U\n#EXTINF:9,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n", "not a whole mp4"),
        "script.mp4": (b"ffconcat version 1.0\nfile script.mp4\n", "not a whole mp4"),
    }
    contents["cut.mp4"] = (good[: len(good) // 2], "cut.mp4: ")
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    still = np.zeros((6, 16, 16, 3), np.uint8)
    write_video(folder / "long.mp4", still, 1)
    write_video(folder / "wide.mp4", np.zeros((1, 16, 600, 3), np.uint8), 1)
    return {folder / name: words for name, (_, words) in contents.items()} | {
        folder / "long.mp4": "lasts 6.0 s; the maximum is 5 s",
        folder / "wide.mp4": "600 x 16 pixels; the maximum is 512",
    }


def test_bad_videos_are_refused_with_one_sentence(visitor, page, video, tmp_path):
    for path, words in bad_files(tmp_path, video).items():
        said = visitor.error_of("reconstruct", visitor.upload(path))
        assert said.startswith(f"{path.name}: ") and words in said
        assert str(page.folder) not in said and "Traceback" not in said
    empty = tmp_path / "empty.mp4"
    empty.touch()
    assert "the file is empty" in visitor.error_of("reenact", visitor.upload(video), visitor.upload(empty), 1)
    assert visitor.error_of("reconstruct", None) == "Choose a video first."
    visitor.outputs_of("reconstruct", visitor.upload(video))


def test_bad_images_and_fields_are_refused_with_one_sentence(visitor, video, tmp_path):
    Image.new("1", (20000, 20)).save(tmp_path / "wide.png")
    assert "20000 x 20 pixels" in visitor.error_of("animate", visitor.upload(tmp_path / "wide.png"), *ANIMATE)
    no_image = tmp_path / "text.png"
    no_image.write_text("text")
    assert "not a whole PNG" in visitor.error_of("animate", visitor.upload(no_image), *ANIMATE)
    assert visitor.error_of("animate", None, *ANIMATE) == "Choose an image or a video first."
    assert visitor.error_of("generate", [], *GENERATE[1:]) == "Choose at least one class."
    for label, count, steps, seed in (5, 1, 4, 0), (0, 99, 4, 0), (0, 1, 10**6, 0), (0, 1, 4, -1):
        assert visitor.error_of("generate", [label], *TEXTS, count, steps, *SETTINGS, seed)
    assert "At most" in visitor.error_of("generate", [0, 1] * 4, *TEXTS, 4, 4, *SETTINGS, 0)
    visitor.outputs_of("generate", *GENERATE)


def test_internal_errors_show_no_details(visitor, video, monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("secret")

    monkeypatch.setattr(service, "stream_components", broken)
    said = visitor.error_of("reconstruct", visitor.upload(video))
    assert said == "Internal error; see the server's log."
    assert "secret" in capsys.readouterr().err


def test_100_megabytes_are_refused_and_not_stored(visitor, page, tmp_path, video):
    before = sum(path.stat().st_size for path in page.folder.rglob("*") if path.is_file())
    heavy = tmp_path / "heavy.mp4"
    heavy.write_bytes(bytes(100_000_000))
    with heavy.open("rb") as file:
        answer = visitor.http.post("/gradio_api/upload", files={"files": ("heavy.mp4", file)})
    assert answer.status_code == 413 and "maximum allowed size" in answer.text
    after = sum(path.stat().st_size for path in page.folder.rglob("*") if path.is_file())
    assert after - before < 1e6
    visitor.outputs_of("reconstruct", visitor.upload(video))


def test_two_visitors_are_queued_and_get_their_results(page, pipeline, gate):
    visitors, endings = [Visitor(page), Visitor(page)], {}
    for seed, visitor in enumerate(visitors):
        visitor.click("generate", *GENERATE[:-1], seed)
    second = visitors[1].messages()
    waiting = next(message for message in second if message["msg"] == "estimation")
    assert waiting["queue_size"] == 1
    gate.set()
    endings[1] = next(message for message in second if message["msg"] == "process_completed")
    endings[0] = visitors[0].ending()
    for seed, visitor in enumerate(visitors):
        (result,) = endings[seed]["output"]["data"]
        expected = pipeline(
            0,
            num_inference_steps=4,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
        ).frames[0]
        (made,) = cells(visitor.frames_of(result), 1, pipeline.vae.clip_shape[3])
        assert np.abs(made - 255 * expected).mean() < 8


def test_different_tabs_wait_for_each_other(page, video, gate):
    first, second = Visitor(page), Visitor(page)
    first.click("generate", *GENERATE)
    page.awaits(lambda: page.runs_of(first))
    second.click("reconstruct", second.upload(video))
    messages = second.messages()
    assert next(message for message in messages if message["msg"] == "estimation")["queue_size"] == 1
    time.sleep(0.3)
    assert not page.runs_of(second)
    gate.set()
    assert first.ending()["success"]
    assert next(message for message in messages if message["msg"] == "process_completed")["success"]


def test_progress_is_reported(visitor, page, monkeypatch):
    told, checks = set(), itertools.count()

    def waits(run: service.Run) -> None:
        """Gradio reports progress from time to time; wait until it has."""
        number, steps = next(checks), GENERATE[-5]
        if number > 0:  # when the run takes its turn there is nothing to tell
            page.awaits(lambda: ("steps" if number <= steps else "frames") in told)

    monkeypatch.setattr(service.Run, "check", waits)
    visitor.click("generate", *GENERATE)
    for message in visitor.messages():
        told |= {unit["unit"] for unit in message.get("progress_data") or ()}
    assert told == {"steps", "frames"}


@pytest.mark.parametrize("word", ["generate", "reconstruct"])
def test_cancelling_stops_only_the_visitors_run(page, video, gate, word, monkeypatch):
    decoded = []
    monkeypatch.setattr(service, "to_uint8", lambda clips: decoded.append(clips) or to_uint8(clips))
    first, second = Visitor(page), Visitor(page)
    before = page.written(f"{word}.mp4")
    event = first.click(word, *(GENERATE if word == "generate" else (first.upload(video),)))
    page.awaits(lambda: page.runs_of(first))
    second.click("generate", *GENERATE)
    second.click(f"{word}-cancel")
    assert not any(run.cancelled.is_set() for run in page.runs_of(first))
    first.cancel(word, event)
    page.awaits(lambda: not page.runs_of(first))
    assert first.ending()["output"] == {}
    assert page.written(f"{word}.mp4") == before and not decoded
    gate.set()
    assert second.ending()["success"]


def test_a_queued_run_can_be_cancelled(page, gate):
    first, second = Visitor(page), Visitor(page)
    first.click("generate", *GENERATE)
    page.awaits(lambda: page.runs_of(first))
    second.cancel("generate", second.click("generate", *GENERATE))
    assert second.ending()["output"] == {}
    gate.set()
    assert first.ending()["success"]
    assert not page.runs_of(second)


@pytest.mark.parametrize("word", ["generate", "reconstruct"])
def test_a_closed_tab_frees_the_model_and_leaves_no_file(page, video, gate, word):
    leaving, staying = Visitor(page), Visitor(page)
    before = page.written(f"{word}.mp4")
    fields = GENERATE if word == "generate" else (leaving.upload(video),)
    with leaving.http.stream("GET", f"/gradio_api/heartbeat/{leaving.session}") as heartbeat:
        beats = heartbeat.iter_lines()
        next(beats)
        leaving.click(word, *fields)
        page.awaits(lambda: page.runs_of(leaving))
    leaving.http.close()
    page.awaits(lambda: not page.runs_of(leaving))
    assert page.written(f"{word}.mp4") == before
    gate.set()
    staying.outputs_of("generate", *GENERATE)


# --- privacy --------------------------------------------------------------------------------------------------------


def outside(folder: Path) -> list[str]:
    """Paths of files that must not be readable."""
    (folder / "link.mp4").symlink_to("/etc/passwd")
    here = Path(__file__)
    return [
        "/etc/passwd",
        str(here),
        str(here.relative_to(Path.cwd())) if here.is_relative_to(Path.cwd()) else str(here),
        "pyproject.toml",
        f"{folder}/../../etc/passwd",
        f"{folder}-other/secret",
        str(folder / "link.mp4"),
        "file:///etc/passwd",
        "/proc/self/environ",
    ]


def test_no_file_outside_is_readable(visitor, page, video):
    Path(f"{page.folder}-other").mkdir()
    secret = Path(f"{page.folder}-other", "secret")
    secret.write_text("root:")
    try:
        for path in outside(page.folder):
            for written in (path, quote(path, safe=""), path.replace("..", "%2e%2e")):
                for route in ("/gradio_api/file=", "/gradio_api/file/", "/file=", "/gradio_api/deep_link?deep_link="):
                    answer = visitor.http.get(f"{route}{written}")
                    assert answer.status_code in (403, 404) or "root:" not in answer.text
                    assert "root:" not in answer.text and "import annotations" not in answer.text
            assert visitor.error_of("reconstruct", visitor.file(path)) is None  # the error does not mention the path
    finally:
        shutil.rmtree(secret.parent)
        (page.folder / "link.mp4").unlink()


def test_no_address_is_fetched(visitor, page):
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=lambda: asked.append(listener.accept()), daemon=True).start()
        port = listener.getsockname()[1]
        local = [f"http://{host}:{port}/x.mp4" for host in ("127.0.0.1", "localhost")]
        for address in (*local, "https://example.com/x.mp4"):
            assert "addresses are not fetched" in visitor.error_of("reconstruct", visitor.file(address))
            assert "addresses are not fetched" in visitor.error_of("animate", visitor.file(address), *ANIMATE)
        for address in local:
            for route in ("file=", "proxy="):
                for written in (address, quote(address, safe="")):
                    assert visitor.http.get(f"/gradio_api/{route}{written}").status_code in (400, 403, 404)
        assert not asked


def test_the_server_binds_to_loopback_and_reveals_nothing(visitor, page):
    assert page.url.startswith("http://127.0.0.1:")
    assert not visitor.config["analytics_enabled"]
    assert visitor.http.get("/gradio_api/info").json()["named_endpoints"] == {}
    assert visitor.http.get("/monitoring").status_code == 403
    assert page.folder.stat().st_mode & 0o077 == 0
    text = visitor.http.get("/").text + visitor.http.get("/theme.css").text
    assert "fonts.googleapis.com/css" not in text


# --- the command ----------------------------------------------------------------------------------------------------


def test_without_gradio_the_command_names_the_extra(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "vidgen.app.page")
    monkeypatch.delattr("vidgen.app.page")
    assert fail(capsys, "app", "--model", str(tmp_path)) == "error: The page needs Gradio: pip install -e '.[web]'."


def test_wrong_options_end_with_one_sentence(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(loading, "SPRITES_MODEL", tmp_path / "none")
    assert "name one with --model" in fail(capsys, "app")
    assert "No VAE in" in fail(capsys, "app", "--model", str(tmp_path))
    assert "must be positive" in fail(capsys, "app", "--max-seconds", "0")


def test_a_port_in_use_ends_with_one_sentence(pipeline, page, tmp_path, capsys):
    pipeline.save_pretrained(tmp_path)
    port = page.url.rstrip("/").rpartition(":")[2]
    assert f"cannot bind to 127.0.0.1:{port}" in fail(capsys, "app", "--model", str(tmp_path), "--port", port)


# --- a browser ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser test needs playwright")
    if CHROMIUM is None:
        pytest.skip("the browser test needs chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_OPTIONS)
        yield browser
        browser.close()


PLAYS = """async video => {
    video.muted = true;
    await video.play();
    const begin = video.currentTime;
    for (let i = 0; i < 200 && video.currentTime === begin; i++) await new Promise(done => setTimeout(done, 50));
    return video.readyState >= 2 && video.currentTime !== begin && video.videoWidth > 0;
}"""


def test_in_a_browser(browser, page, video, tmp_path, gate):
    gate.set()
    tab = browser.new_page()
    tab.set_default_timeout(1000 * PATIENCE)
    elsewhere, complaints = [], []
    tab.on("request", lambda request: elsewhere.append(request.url))
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.goto(page.url)

    tab.set_input_files("#reconstruct-video input[type=file]", video)
    tab.wait_for_selector("#reconstruct-video video")
    tab.click("#reconstruct")
    tab.wait_for_selector("#reconstruct-numbers :text('PSNR')")
    assert tab.eval_on_selector("#reconstruct-result video", PLAYS)

    bad = tmp_path / "text.mp4"
    bad.write_text("text")
    again = browser.new_page()
    again.set_default_timeout(1000 * PATIENCE)
    again.goto(page.url)
    again.set_input_files("#reconstruct-video input[type=file]", bad)
    again.wait_for_selector("#reconstruct-video >> text=Error")  # the browser cannot play it
    again.click("#reconstruct")
    again.wait_for_selector("text=text.mp4: it is not a whole mp4")

    gate.clear()
    again.get_by_role("tab", name="Generate").click()
    again.click("#generate")
    tab.get_by_role("tab", name="Generate").click()
    tab.click("#generate")
    again.close()  # in the middle of its run
    gate.set()
    tab.wait_for_selector("#generate-result video")
    assert tab.eval_on_selector("#generate-result video", PLAYS)

    gate.clear()
    tab.click("#generate")
    tab.wait_for_selector("#generate-result :text('Denoising')")
    tab.click("#generate-cancel")
    tab.wait_for_selector("#generate-result :text('Denoising')", state="detached")
    page.awaits(lambda: not page.service.queue._runs)
    assert not complaints
    assert not [url for url in elsewhere if not re.match(rf"{page.url}|data:|blob:", url)]
