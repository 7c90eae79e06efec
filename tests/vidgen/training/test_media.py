"""Grids and short videos of validations reach TensorBoard, and wandb and trackio, which are fakes here."""

from __future__ import annotations

import sys
from io import BytesIO
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vidgen.training.dit_trainer import train_dit
from vidgen.training.tracking import log_media
from vidgen.training.vae_trainer import train_vae


def logged_images(run) -> dict[str, list]:
    """The images in a run's TensorBoard files, by tag."""
    events = EventAccumulator(str(run / "logs"), size_guidance={"images": 0})
    events.Reload()
    return {tag: events.Images(tag) for tag in events.Tags()["images"]}


def test_grids_and_videos_are_in_tensorboard(vae_config, dit_config, tmp_path):
    settings = ["train.max_train_steps=2", "train.validation_steps=1", "train.report_to=tensorboard"]
    train_vae(vae_config(tmp_path / "vae", *settings))
    train_dit(dit_config(tmp_path / "dit", *settings))
    images = logged_images(tmp_path / "vae") | logged_images(tmp_path / "dit")
    names = ["reconstruction", "reconstruction_video", "reenactment", "samples", "samples_video"]
    assert sorted(images) == [f"validation/{name}" for name in names]
    files = {"samples": "dit/samples", "samples_video": "dit/samples", "reconstruction_video": "vae/validation"}
    for name, folder in files.items():
        events = images[f"validation/{name}"]
        assert [event.step for event in events] == [1, 2]
        suffix = "gif" if name.endswith("video") else "png"
        assert events[1].encoded_image_string == (tmp_path / folder / f"step-2.{suffix}").read_bytes()
        with Image.open(BytesIO(events[1].encoded_image_string)) as image:
            assert image.size == (events[1].width, events[1].height)
            assert getattr(image, "n_frames", 1) == (4 if suffix == "gif" else 1)


@pytest.mark.parametrize("library", ["wandb", "trackio"])
def test_wandb_and_trackio_get_images_and_videos_of_the_files(library, tmp_path, monkeypatch):
    fake = ModuleType(library)
    fake.Image = lambda path: ("image", path)
    fake.Video = lambda path: ("video", path)
    monkeypatch.setitem(sys.modules, library, fake)
    entries = []
    tracker = SimpleNamespace(name=library, log=lambda values, step: entries.append((values, step)))
    others = [SimpleNamespace(name=name) for name in ("jsonl", "mlflow")]
    log_media([*others, tracker], {"a": tmp_path / "a.png", "b": tmp_path / "b.gif"}, step=7)
    assert entries == [({"a": ("image", f"{tmp_path}/a.png"), "b": ("video", f"{tmp_path}/b.gif")}, 7)]
