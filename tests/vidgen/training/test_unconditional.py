"""Data without classes: an unconditional DiT, from its training to generated videos."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from pipelines import VidTwinPipeline
from runs import losses
from vidgen.cli import main
from vidgen.data.streams import FrameReader
from vidgen.metrics.fvd import Sampling, class_frequencies, evaluate_pipeline
from vidgen.metrics.protocols import get_protocol
from vidgen.training.dit_trainer import train_dit


@pytest.fixture(scope="module")
def flat(sprites, tmp_path_factory) -> Path:
    """The sprites in one folder, without classes."""
    root = tmp_path_factory.mktemp("flat")
    for number, path in enumerate(sorted(sprites.rglob("*.mp4"))):
        shutil.copy2(path, root / f"{number}.mp4")
    return root


@pytest.fixture(scope="module")
def final(dit_config, flat, tmp_path_factory) -> Path:
    """The final folder of a short run with the default class dropout and guidance, interrupted and resumed."""
    output_dir = tmp_path_factory.mktemp("dit")
    settings = [f"data.root={flat}", "diffusion.independent_timesteps=0.5"]
    train_dit(dit_config(output_dir, *settings, "train.max_train_steps=2"))
    return train_dit(dit_config(output_dir, *settings, "train.max_train_steps=4", "resume=latest"))


def test_it_trains_and_validates_without_classes(final):
    assert list(losses(final.parent)) == [1, 2, 3, 4]
    assert (final.parent / "samples" / "step-4.png").stat().st_size > 1000
    pipeline = VidTwinPipeline.from_pretrained(final)
    assert pipeline.transformer.config.num_classes is None and not pipeline.labels
    frames = pipeline(num_inference_steps=2, output_type="pt").frames
    assert frames.shape == (1, 4, 3, 32, 32)
    card = (final / "README.md").read_text()
    assert "Unconditional generation" in card and "pipeline().frames" in card


def test_cross_attention_and_self_conditioning_do_without_classes_too(dit_config, flat, tmp_path):
    overrides = "model.overrides={class_conditioning: cross_attention, self_conditioning: true}"
    settings = [f"data.root={flat}", overrides, "latents.sample=true", "train.max_train_steps=1"]
    final = train_dit(dit_config(tmp_path, *settings))
    assert VidTwinPipeline.from_pretrained(final).transformer.class_embed is None


def test_the_command_generates_without_a_class(final, tmp_path, capsys):
    words = ["generate", "--model", str(final), "--steps", "2"]
    main([*words, str(tmp_path / "one.mp4")])
    main([*words, str(tmp_path / "long.mp4"), "--num", "2", "--frames", "7", "--guidance-interval", "0.2", "0.8"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["long-0.mp4", "long-1.mp4", "one.mp4"]
    for name, count in (("one", 4), ("long-1", 7)):
        with FrameReader(tmp_path / f"{name}.mp4") as reader:
            assert sum(1 for _ in reader) == count
    main(["info", str(final)])
    assert "classes           unconditional" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*words, str(tmp_path / "none.mp4"), "--class", "orbit"])
    assert "unconditional and has no class 'orbit': leave class_labels out" in capsys.readouterr().err


class MeanColor(torch.nn.Module):
    """A detector of three numbers, for which few clips suffice."""

    name, dim, per_frame, row, sha256, published = "mean_color", 3, False, "clip", "0" * 64, True
    settings = None

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        return clips.mean(dim=(2, 3, 4))

    def describe(self) -> dict:
        return {"name": self.name}


def test_its_frechet_distance_needs_no_classes(final, flat, tmp_path):
    pipeline = VidTwinPipeline.from_pretrained(final)
    pipeline.set_progress_bar_config(disable=True)
    protocol = get_protocol("sprites")
    protocol = type(protocol)(**{**vars(protocol), "frames": 4, "size": 32, "fps": 4, "generated": 6, "real": 6})
    assert class_frequencies(pipeline, [], []) is None
    for class_sampling in ("balanced", "prior"):
        sampling = Sampling(num_inference_steps=2, class_sampling=class_sampling)
        [result] = evaluate_pipeline(
            pipeline, flat, protocol, [MeanColor()], Accelerator(), folder=tmp_path, sampling=sampling
        )
        assert result.generated.samples == 6 and result.generated.value > 0
        assert "The pipeline is unconditional: its clips have no class." in result.notes
        assert not any(note.startswith("Classes are") for note in result.notes)


def test_the_page_generates_and_animates_without_classes(final, tmp_path):
    pytest.importorskip("gradio")
    from PIL import Image

    from vidgen.app.service import InferenceService
    from vidgen.app.uploads import UploadLimits

    service = InferenceService(VidTwinPipeline.from_pretrained(final), tmp_path, UploadLimits())
    visitor, bar = SimpleNamespace(session_hash="visitor"), lambda *args, **options: None
    assert service.classes == []
    still = tmp_path / "still.png"
    Image.new("RGB", (40, 30), "red").save(still)
    for path in (
        service.generate([], "", "", "", "", 2, 2, 3.0, 1.0, 0.0, 0, visitor, bar),
        service.animate(str(still), None, "", 0.5, 1, 2, 3.0, 1.0, 0.0, 0, visitor, bar),
    ):
        with FrameReader(path) as reader:
            assert sum(1 for _ in reader) == 4
