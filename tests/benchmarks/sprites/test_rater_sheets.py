"""Sheets for blind raters: clips, key and the score of answers."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from autoencoder import AutoencoderKLVidTwin
from benchmarks.sprites import rater_sheets
from pipelines import VidTwinPipeline, VidTwinTransformer3DModel, default_scheduler
from vidgen.common.errors import UserError
from vidgen.data.sprites import MOTIONS

NAMES = [*MOTIONS, *(f"{motion}/star" for motion in MOTIONS if motion != "swap"), "swap/ring-disc"]


@pytest.fixture(scope="module", autouse=True)
def _few_steps():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rater_sheets, "STEPS", 2)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    vae = AutoencoderKLVidTwin.from_preset("tiny-test", bottleneck="residual")
    transformer = VidTwinTransformer3DModel.from_preset("tiny-test", vae=vae, num_classes=len(NAMES))
    pipeline = VidTwinPipeline(vae, transformer, default_scheduler(), {str(i): n for i, n in enumerate(NAMES)})
    pipeline.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def sheets(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sheets")
    rater_sheets.main([str(folder), "--pipeline", model])
    return folder


def test_sheets_have_every_clip_and_a_key(sheets, model, tmp_path):
    key = json.loads((sheets / "key.json").read_text())
    generated = [clip for clip in key if clip["kind"] == "generated"]
    assert len(key) == 32 and sorted(clip["motion"] for clip in generated) == sorted([*MOTIONS] * 3)
    assert all(clip["shapes"] == (["disc", "ring"] if clip["motion"] == "swap" else ["star"]) for clip in generated)
    assert {clip["motion"] for clip in key if clip["kind"] == "reconstructed"} == set(MOTIONS)
    assert [clip["kind"] for clip in key[-8:]] != ["reconstructed"] * 8  # shuffled
    pictures = [Image.open(path).size for path in sorted(sheets.glob("sheet-*.png"))]
    assert len(pictures) == 4 and all(width > 2 * 64 and height > 8 * 64 for width, height in pictures)
    assert "star" in (sheets / "question.txt").read_text()
    rater_sheets.main([str(tmp_path), "--pipeline", model, "--seed", "1"])
    assert json.loads((tmp_path / "key.json").read_text()) != key


def test_key_matches_the_order_of_clips(model, tmp_path, monkeypatch):
    """With reconstructions of one color: they are in the rows that the key calls reconstructed."""
    pipeline = VidTwinPipeline.from_pretrained(model)
    monkeypatch.setattr(
        type(pipeline.vae), "forward", lambda self, x: type("Made", (), {"sample": torch.ones_like(x)})
    )
    shown = []
    monkeypatch.setattr(
        rater_sheets,
        "class_grid",
        lambda path, clips, names, num_frames: shown.extend(zip(names, clips, strict=True)),
    )
    rater_sheets.make_sheets(tmp_path, pipeline, seed=0)
    key = json.loads((tmp_path / "key.json").read_text())
    assert [name for name, _ in shown] == [f"clip {i}" for i in range(1, 33)]
    assert [bool((clip == 1).all()) for _, clip in shown] == [clip["kind"] == "reconstructed" for clip in key]


def test_answers_are_counted(sheets, tmp_path, capsys):
    key = json.loads((sheets / "key.json").read_text())
    file = tmp_path / "answers.txt"
    right = [f"{i}: {clip['motion']}, {', '.join(clip['shapes'])}" for i, clip in enumerate(key, 1)]
    file.write_text("Here is what I see:\n" + "\n".join(right))
    rater_sheets.main([str(sheets), "--answers", str(file)])
    assert "| generated | 24 | 24 | 24 | 24 | 24 |\n| reconstructed | 8 | 8 | 8 | 8 | 8 |" in capsys.readouterr().out

    first, second, third = [
        i for i, clip in enumerate(key) if clip["kind"] == "generated" and clip["motion"] != "swap"
    ][:3]
    swap = next(i for i, clip in enumerate(key) if clip["kind"] == "generated" and clip["motion"] == "swap")
    right[first] = f"{first + 1}: {key[first]['motion']}, unclear"
    right[second] = f"{second + 1}: swap, star"
    right[third] = f"{third + 1}: {key[third]['motion']}, ring"
    right[swap] = f"{swap + 1}: swap, ring, disc"  # the other way round
    file.write_text("\n".join(right))
    rater_sheets.main([str(sheets), "--answers", str(file)])
    assert "| generated | 24 | 23 | 23 | 21 | 20 |" in capsys.readouterr().out


def test_a_model_without_subclasses_has_no_shape_score(tmp_path, capsys):
    vae = AutoencoderKLVidTwin.from_preset("tiny-test", bottleneck="residual")
    transformer = VidTwinTransformer3DModel.from_preset("tiny-test", vae=vae, num_classes=8)
    names = dict(enumerate(MOTIONS))
    pipeline = VidTwinPipeline(vae, transformer, default_scheduler(), names)
    rater_sheets.make_sheets(tmp_path, pipeline, seed=0)
    (tmp_path / "answers.txt").write_text("\n".join(f"{i}: still, unclear" for i in range(1, 33)))
    rater_sheets.main([str(tmp_path), "--answers", str(tmp_path / "answers.txt")])
    assert "| generated | 24 | 3 | 0 |  |  |\n| reconstructed | 8 | 1 | 0 | 0 | 0 |" in capsys.readouterr().out

    others = VidTwinPipeline(vae, transformer, default_scheduler(), names | {0: "walk"})
    with pytest.raises(UserError, match="it has no class 'slide'"):
        rater_sheets.make_sheets(tmp_path, others, seed=0)


@pytest.mark.parametrize("line", ["", "7: fly, star", "7: slide", "7: slide, blob"])
def test_incomplete_answers_are_refused(sheets, tmp_path, line):
    file = tmp_path / "answers.txt"
    file.write_text("\n".join([f"{i}: slide, star" if i != 7 else line for i in range(1, 33)]))
    with pytest.raises(UserError, match="clip 7 needs a line"):
        rater_sheets.main([str(sheets), "--answers", str(file)])


def test_mistakes_are_one_sentence(tmp_path, capsys):
    for words in ([], ["--pipeline", "a", "--answers", "b"]):
        with pytest.raises(SystemExit):
            rater_sheets.main([str(tmp_path), *words])
        assert "--pipeline" in capsys.readouterr().err
    with pytest.raises(UserError, match="cannot read the key of the sheets"):
        rater_sheets.main([str(tmp_path), "--answers", "absent.txt"])
