"""The page of `vidgen app`, by HTTP and in a browser: it works, survives what visitors do, and keeps to itself."""

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
from PIL import Image

from autoencoder import AutoencoderKLVidTwin, TwinLatents
from pipelines import VidTwinPipeline, VidTwinTransformer3DModel, default_scheduler
from vidgen.app.uploads import UploadLimits
from vidgen.cli import main
from vidgen.common.images import to_uint8
from vidgen.data.dataset import frames_to_clip
from vidgen.data.sprites import render_sprite, sample_factors
from vidgen.data.streams import FrameReader
from vidgen.data.video import write_video
from vidgen.inference import operations as commands
from vidgen.metrics.reconstruction import psnr

gradio = pytest.importorskip("gradio", reason="the page needs the extra: pip install -e '.[web]'")
import httpx  # noqa: E402, what gradio comes with

from vidgen.app import page as app  # noqa: E402
from vidgen.app import service as studio  # noqa: E402

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
CELL, CAPTION = studio.SMALLEST_CELL, studio.CAPTION_HEIGHT


@pytest.fixture(scope="module")
def pipeline() -> VidTwinPipeline:
    torch.manual_seed(0)
    vae = AutoencoderKLVidTwin.from_preset("tiny-test", heads="residual").eval()
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
    studio: studio.Studio

    @property
    def folder(self) -> Path:
        return self.studio.folder

    def awaits(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def runs_of(self, visitor: Visitor) -> list[studio.Run]:
        return [run for run in self.studio.turns._runs.copy() if run.session == visitor.session]

    def written(self, word: str) -> set[Path]:
        """Results of a word, finished or not."""
        return {path for path in self.folder.rglob("*") if path.is_file() and word in path.name}


@contextmanager
def served(model, **limits) -> Iterator[Page]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    build_app, studios = app.build_app, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "build_app", lambda studio, name: studios.append(studio) or build_app(studio, name))
        with app.serve(model, "tiny", UploadLimits(**limits), port=port) as url:
            yield Page(url, *studios)


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
        """What a click on Cancel sends."""
        (event,) = self.events_of(word)
        body = {"session_hash": self.session, "fn_index": event["id"], "event_id": event_id}
        self.http.post("/gradio_api/cancel", json=body)
        self.click(f"{word}-cancel")

    def events_of(self, button: str) -> list[dict]:
        wanted = [self.names[button], "click"]
        return [event for event in self.config["dependencies"] if wanted in event["targets"]]

    def messages(self) -> Iterator[dict]:
        """What the server says of this visitor's events, until all have ended."""
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

    def gets(self, button: str, *fields) -> list:
        """What a click puts onto the page."""
        self.click(button, *fields)
        ending = self.ending()
        assert ending["success"], ending
        return ending["output"]["data"]

    def is_told(self, button: str, *fields) -> str:
        """The sentence that a click ends with."""
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
    check = studio.Run.check

    def halted(run: studio.Run) -> None:
        if run not in begun:  # it takes its turn
            begun.add(run)
            return check(run)
        while not gate.is_set() and not run.stop.is_set():
            time.sleep(0.01)
        check(run)

    monkeypatch.setattr(studio.Run, "check", halted)
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


GENERATE = ([0], 1, 4, 1.0, 0)  # classes, count, steps, guidance, seed
ANIMATE = (0, 0, 1, 4, 1.0, 0)  # class, change, count, steps, guidance, seed


# --- what it does ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_reconstruct_shows_the_components_and_says_the_numbers(visitor, video, pipeline):
    result, words = visitor.gets("reconstruct", visitor.upload(video))
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
def test_reenact_shows_both_and_the_mixture(visitor, video, pipeline, tmp_path):
    other = tmp_path / "other.mp4"
    write_video(other, render_sprite(sample_factors(np.random.default_rng(1), "spin", resolution=48)), 8)
    latents = [pipeline.vae.encode(clip_of(path)[:, :, :8]).latent_dist.mode() for path in (video, other)]
    mixed = TwinLatents(latents[0].structure, latents[1].dynamics, latents[0].geometry)
    expected = [pixels_of(pipeline.vae.decode(z).sample) for z in (latents[0], mixed)]
    a, b = visitor.upload(video), visitor.upload(other)
    for strength in (0, 1):
        (result,) = visitor.gets("reenact", a, b, strength)
        shown = visitor.frames_of(result)
        assert shown.shape == (8, CAPTION + CELL, 3 * CELL, 3)
        first, second, made = cells(shown, 3, 48)
        assert np.abs(first - pixels_of(clip_of(video))).mean() < 4
        assert np.abs(second - pixels_of(clip_of(other))[:8]).mean() < 4
        errors = [np.abs(made - clip).mean() for clip in expected]
        assert np.argmin(errors) == strength


def test_generate_makes_what_the_pipeline_makes_of_the_seed(visitor, pipeline):
    (result,) = visitor.gets("generate", [0, 1], 2, 4, 1.0, 7)
    shown = visitor.frames_of(result)
    side, columns = pipeline.vae.clip_shape[3], 2
    enlarged = shown.shape[2] // columns
    assert shown.shape[1:3] == (2 * (CAPTION + enlarged), columns * enlarged)
    expected = pipeline(
        [0, 1],
        num_videos_per_prompt=2,
        num_inference_steps=4,
        guidance_scale=1.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (7, 8, 7, 8)],
        output_type="np",
    ).frames
    for row, clips in enumerate(np.split(expected, 2)):
        part = shown[:, row * (CAPTION + enlarged) :][:, : CAPTION + enlarged]
        for made, clip in zip(cells(part, columns, side), clips, strict=True):
            assert np.abs(made - 255 * clip).mean() < 8


def test_animate_takes_an_image_or_a_video(visitor, video, frames, tmp_path, pipeline):
    Image.fromarray(frames[0]).save(tmp_path / "still.png")
    still, clip = visitor.upload(tmp_path / "still.png"), visitor.upload(video)
    side, length = pipeline.vae.clip_shape[3], pipeline.vae.clip_shape[1]
    for given in (still, clip):
        (result,) = visitor.gets("animate", given, 1, 0, 2, 4, 1.0, 0)
        parts = cells(visitor.frames_of(result), 3, side)
        assert len(parts[0]) == length
        moved = np.abs(parts[0][0].astype(int) - parts[0][-1]).mean()
        assert moved < 1 if given is still else moved > 1
        assert np.abs(parts[1].astype(int) - parts[2]).mean() > 1


def test_animate_goes_by_content_whatever_the_name(visitor, video, frames, tmp_path):
    still = tmp_path / "photo.jfif"
    Image.fromarray(frames[0]).save(still, format="JPEG")
    clip = shutil.copy(video, tmp_path / "clip.png")
    nameless = shutil.copy(still, tmp_path / "photo")
    for given in (still, clip, nameless):
        visitor.gets("animate", visitor.upload(given), *ANIMATE)


def test_a_vae_alone_has_two_tabs(pipeline, video):
    with served(pipeline.vae) as page:
        visitor = Visitor(page)
        tabs = [part["props"]["label"] for part in visitor.config["components"] if part["type"] == "tabitem"]
        assert tabs == ["Reconstruct", "Reenact"]
        visitor.gets("reconstruct", visitor.upload(video))
    assert not page.folder.exists()


def test_examples_stay_and_uploads_and_results_go(visitor, page, video):
    from gradio.route_utils import delete_files_created_by_app

    upload = visitor.upload(video)
    result, _ = visitor.gets("reconstruct", upload)
    examples = re.findall(r'"path":"([^"]+/examples/[^"]+)"', visitor.http.get("/config").text)
    assert len({Path(path).suffix for path in examples}) == 2
    blocks = next(
        blocks for blocks in gradio.Blocks.get_instances() if blocks.local_url.rstrip("/") == page.url.rstrip("/")
    )
    delete_files_created_by_app(blocks, age=0)
    assert all(visitor.http.get(f"/gradio_api/file={path}").status_code == 200 for path in examples)
    assert not Path(upload["path"]).exists() and not Path(result["path"]).exists()
    said = f"{video.name}: the file is no longer kept, and must be uploaded again."
    assert visitor.is_told("reconstruct", upload) == visitor.is_told("animate", upload, *ANIMATE) == said


# --- what it survives -----------------------------------------------------------------------------------------------


def bad_files(folder: Path, video: Path) -> dict[Path, str]:
    """What each is answered."""
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
        folder / "long.mp4": "lasts 6.0 s, and at most 5 s",
        folder / "wide.mp4": "600 x 16 pixels, and at most 512",
    }


def test_bad_videos_are_refused_in_a_sentence(visitor, page, video, tmp_path):
    for path, words in bad_files(tmp_path, video).items():
        said = visitor.is_told("reconstruct", visitor.upload(path))
        assert said.startswith(f"{path.name}: ") and words in said
        assert str(page.folder) not in said and "Traceback" not in said
    empty = tmp_path / "empty.mp4"
    empty.touch()
    assert "the file is empty" in visitor.is_told("reenact", visitor.upload(video), visitor.upload(empty), 1)
    assert visitor.is_told("reconstruct", None) == "Choose a video first."
    visitor.gets("reconstruct", visitor.upload(video))


def test_bad_images_and_fields_are_refused_in_a_sentence(visitor, video, tmp_path):
    Image.new("1", (20000, 20)).save(tmp_path / "wide.png")
    assert "20000 x 20 pixels" in visitor.is_told("animate", visitor.upload(tmp_path / "wide.png"), *ANIMATE)
    no_image = tmp_path / "text.png"
    no_image.write_text("text")
    assert "not a whole PNG" in visitor.is_told("animate", visitor.upload(no_image), *ANIMATE)
    assert visitor.is_told("animate", None, *ANIMATE) == "Choose an image or a video first."
    assert visitor.is_told("generate", [], *GENERATE[1:]) == "Choose a class, or several."
    for wrong in ([5], 1, 4, 1.0, 0), ([0], 99, 4, 1.0, 0), ([0], 1, 10**6, 1.0, 0), ([0], 1, 4, 1.0, -1):
        assert visitor.is_told("generate", *wrong)
    assert "At most" in visitor.is_told("generate", [0, 1] * 4, 4, 4, 1.0, 0)
    visitor.gets("generate", *GENERATE)


def test_an_unforeseen_error_is_told_without_its_details(visitor, video, monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("secret")

    monkeypatch.setattr(studio, "component_frames", broken)
    said = visitor.is_told("reconstruct", visitor.upload(video))
    assert said == "Something went wrong; the server's log says what."
    assert "secret" in capsys.readouterr().err


def test_100_megabytes_are_refused_and_leave_nothing(visitor, page, tmp_path, video):
    before = sum(path.stat().st_size for path in page.folder.rglob("*") if path.is_file())
    heavy = tmp_path / "heavy.mp4"
    heavy.write_bytes(bytes(100_000_000))
    with heavy.open("rb") as file:
        answer = visitor.http.post("/gradio_api/upload", files={"files": ("heavy.mp4", file)})
    assert answer.status_code == 413 and "maximum allowed size" in answer.text
    after = sum(path.stat().st_size for path in page.folder.rglob("*") if path.is_file())
    assert after - before < 1e6
    visitor.gets("reconstruct", visitor.upload(video))


def test_two_visitors_wait_in_line_and_get_their_own(page, pipeline, gate):
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


def test_progress_is_told(visitor, page, monkeypatch):
    told, checks = set(), itertools.count()

    def waits(run: studio.Run) -> None:
        """Gradio tells what is under way from time to time: nothing goes on before it has."""
        number, steps = next(checks), GENERATE[2]
        if number > 0:  # when the run takes its turn there is nothing to tell
            page.awaits(lambda: ("steps" if number <= steps else "frames") in told)

    monkeypatch.setattr(studio.Run, "check", waits)
    visitor.click("generate", *GENERATE)
    for message in visitor.messages():
        told |= {unit["unit"] for unit in message.get("progress_data") or ()}
    assert told == {"steps", "frames"}


@pytest.mark.parametrize("word", ["generate", "reconstruct"])
def test_cancelling_stops_ones_own_run_alone(page, video, gate, word, monkeypatch):
    decoded = []
    monkeypatch.setattr(studio, "to_uint8", lambda clips: decoded.append(clips) or to_uint8(clips))
    first, second = Visitor(page), Visitor(page)
    before = page.written(f"{word}.mp4")
    event = first.click(word, *(GENERATE if word == "generate" else (first.upload(video),)))
    page.awaits(lambda: page.runs_of(first))
    second.click("generate", *GENERATE)
    second.click(f"{word}-cancel")
    assert not any(run.stop.is_set() for run in page.runs_of(first))
    first.cancel(word, event)
    page.awaits(lambda: not page.runs_of(first))
    assert first.ending()["output"] == {}
    assert page.written(f"{word}.mp4") == before and not decoded
    gate.set()
    assert second.ending()["success"]


def test_who_waits_can_leave_the_line(page, gate):
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
    staying.gets("generate", *GENERATE)


# --- what it keeps to itself ----------------------------------------------------------------------------------------


def outside(folder: Path) -> list[str]:
    """Files that are nobody's business, and ways to write them."""
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
            assert visitor.is_told("reconstruct", visitor.file(path)) is None  # the path is not even commented on
    finally:
        shutil.rmtree(secret.parent)
        (page.folder / "link.mp4").unlink()


def test_no_address_is_fetched(visitor, page):
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=lambda: asked.append(listener.accept()), daemon=True).start()
        port = listener.getsockname()[1]
        for address in (
            f"http://127.0.0.1:{port}/x.mp4",
            f"http://localhost:{port}/x.mp4",
            "https://example.com/x.mp4",
        ):
            assert "addresses are not fetched" in visitor.is_told("reconstruct", visitor.file(address))
            given = visitor.file(address)
            assert "addresses are not fetched" in visitor.is_told("animate", given, *ANIMATE)
            for route in ("file=", "proxy="):
                for written in (address, quote(address, safe="")):
                    answer = visitor.http.get(f"/gradio_api/{route}{written}")
                    assert (answer.status_code, answer.text) == (403, "Addresses are not fetched.")
        assert not asked


def test_it_is_this_machines_alone_and_tells_nothing_of_itself(visitor, page):
    assert page.url.startswith("http://127.0.0.1:")
    assert not visitor.config["analytics_enabled"]
    assert visitor.http.get("/gradio_api/info").json()["named_endpoints"] == {}
    assert visitor.http.get("/monitoring").status_code == 403
    assert page.folder.stat().st_mode & 0o077 == 0
    text = visitor.http.get("/").text + visitor.http.get("/theme.css").text
    assert "fonts.googleapis.com/css" not in text


# --- the command ----------------------------------------------------------------------------------------------------


def says(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        main([*words])
    assert end.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_without_gradio_the_command_names_the_extra(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "vidgen.app.page")
    monkeypatch.delattr("vidgen.app.page")
    assert says(capsys, "app", "--model", str(tmp_path)) == "error: The page needs Gradio: pip install -e '.[web]'."


def test_wrong_words_end_in_a_sentence(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(commands, "SHIPPED_MODEL", tmp_path / "none")
    assert "name one with --model" in says(capsys, "app")
    assert "No VAE in" in says(capsys, "app", "--model", str(tmp_path))
    assert "must be positive" in says(capsys, "app", "--max-seconds", "0")


def test_a_taken_port_ends_in_a_sentence(pipeline, page, tmp_path, capsys):
    pipeline.save_pretrained(tmp_path)
    port = page.url.rstrip("/").rpartition(":")[2]
    assert f"127.0.0.1:{port} cannot be listened at" in says(capsys, "app", "--model", str(tmp_path), "--port", port)


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
    page.awaits(lambda: not page.studio.turns._runs)
    assert not complaints
    assert not [url for url in elsewhere if not re.match(rf"{page.url}|data:|blob:", url)]
