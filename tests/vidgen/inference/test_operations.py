"""The commands of `vidgen` on real files with a tiny untrained model."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import unicodedata
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from command_line import fail
from diffusers.guiders import ClassifierFreeZeroStarGuidance
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_text import tiny_text_encoder

from autoencoder import AutoencoderKLVidTwin, TwinLatents
from pipelines import VidTwinPipeline, VidTwinTransformer3DModel, default_scheduler
from vidgen.cli import main
from vidgen.common.loading import load_vae, weights_hash
from vidgen.data.sprites import render_sprite, sample_factors
from vidgen.data.streams import FrameReader
from vidgen.data.video import write_video
from vidgen.inference.operations import _number_paths

FPS = Fraction(30000, 1001)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A whole pipeline's folder; its DiT counts as one that was trained for history."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    vae = AutoencoderKLVidTwin.from_preset("tiny-test", bottleneck="residual")
    transformer = VidTwinTransformer3DModel.from_preset("tiny-test", vae=vae, num_classes=2, frame_timesteps=True)
    for layer in (transformer.structure_out, transformer.dynamics_out, transformer.modulation_out[1]):
        torch.nn.init.normal_(layer.weight)  # a fresh DiT predicts zero, whatever noise it is given
    VidTwinPipeline(vae, transformer, default_scheduler(), {"0": "orbit", "1": "spin"}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def few_steps_model(model, tmp_path_factory) -> str:
    """A pipeline with interval conditioning and prompts."""
    folder, encoder = tmp_path_factory.mktemp("few_steps"), tiny_text_encoder()
    vae = AutoencoderKLVidTwin.from_pretrained(model, subfolder="vae")
    options = {"num_classes": 2, "caption_channels": 16, "interval_conditioning": True}
    transformer = VidTwinTransformer3DModel.from_preset("tiny-test", vae=vae, **options)
    parts = {"text_encoder": encoder.model, "tokenizer": encoder.tokenizer}
    VidTwinPipeline(vae, transformer, default_scheduler("v_prediction"), **parts).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> str:
    """11 frames of 48 x 40 at 29.97 fps."""
    clip = render_sprite(sample_factors(np.random.default_rng(0), "orbit", resolution=48, num_frames=11))
    return str(write_video(tmp_path_factory.mktemp("video") / "a.mp4", clip[:, 4:44], FPS))


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> str:
    """8 frames of 64 x 64 at 8 fps: a second, 30 frames at the rate of `video`."""
    clip = render_sprite(sample_factors(np.random.default_rng(1), "spin", num_frames=8))
    return str(write_video(tmp_path_factory.mktemp("video") / "b.mp4", clip, 8))


def read(path: Path | str) -> tuple[np.ndarray, Fraction]:
    with FrameReader(path) as reader:
        return np.stack(list(reader)), reader.fps


def test_reconstruct_keeps_size_rate_and_count(model, video, tmp_path):
    out = tmp_path / "out.mp4"
    main(["reconstruct", video, str(out), "--model", model])
    pictures, fps = read(out)
    assert pictures.shape == (11, 40, 48, 3) and fps == FPS
    with av.open(str(out)) as container:
        assert container.streams.video[0].codec_context.name == "h264"


@torch.no_grad()
def test_reconstruct_equals_the_models_forward_pass(model, video, tmp_path):
    main(["reconstruct", video, str(tmp_path / "frames"), "--model", model])
    written, _ = read_folder(tmp_path / "frames")
    source, _ = read(video)
    vae = AutoencoderKLVidTwin.from_pretrained(model, subfolder="vae").eval()
    clip = torch.from_numpy(source).permute(3, 0, 1, 2)[None] / 127.5 - 1
    expected = ((vae(clip).sample[0].permute(1, 2, 3, 0) + 1) * 127.5).round().clamp(0, 255)
    assert np.abs(written - expected.numpy()).max() <= 1


def read_folder(folder: Path) -> tuple[np.ndarray, list[str]]:

    files = sorted(folder.iterdir())
    return np.stack([np.asarray(Image.open(file)).astype(int) for file in files]), [file.name for file in files]


def test_encode_and_decode_equal_reconstruct(model, video, tmp_path):
    latents = tmp_path / "z.safetensors"
    main(["encode", video, str(latents), "--model", model])
    main(["decode", str(latents), str(tmp_path / "a"), "--model", model])
    main(["reconstruct", video, str(tmp_path / "b"), "--model", model])
    a, b = read_folder(tmp_path / "a")[0], read_folder(tmp_path / "b")[0]
    np.testing.assert_array_equal(a, b)
    whole = TwinLatents.load(latents)
    assert whole.geometry.size == (11, 40, 48) and len(whole.structure) == 1
    with safe_open(latents, "pt") as file:
        assert Fraction(file.metadata()["fps"]) == FPS and len(file.metadata()["encoder_sha256"]) == 64
    main(["decode", str(latents), str(tmp_path / "c.mp4"), "--model", model, "--components", "structure"])
    assert read(tmp_path / "c.mp4")[1] == FPS


def test_rate_size_overlap_and_dtype_can_be_set(model, video, tmp_path):
    out = tmp_path / "out.gif"
    options = ["--fps", "10", "--size", "32", "--dtype", "bfloat16", "--tile-overlap", "4", "--window-overlap", "0"]
    main(["reconstruct", video, str(out), "--model", model, "--device", "cpu", *options])
    pictures, fps = read(out)
    assert pictures.shape[1:3] == (32, 38) and fps == 10 and len(pictures) == 4
    latents = tmp_path / "z.safetensors"
    main(["encode", video, str(latents), "--model", model, *options])
    loaded = TwinLatents.load(latents)
    assert loaded.geometry.stride == (4, 28, 28) and loaded.structure.dtype == torch.bfloat16


def test_components_are_side_by_side(model, video, tmp_path):
    main(["components", video, str(tmp_path / "c"), "--model", model])
    rows, _ = read_folder(tmp_path / "c")
    source, _ = read(video)
    assert rows.shape == (11, 40, 4 * 48, 3)
    original, *parts = np.split(rows, 4, axis=2)
    np.testing.assert_array_equal(original, source)
    for kind, part in zip(("both", "structure", "dynamics"), parts, strict=True):
        main(["reconstruct", video, str(tmp_path / kind), "--model", model, "--components", kind])
        np.testing.assert_array_equal(part, read_folder(tmp_path / kind)[0])


def test_reenact_interpolates_the_dynamics(model, video, other, tmp_path):
    def reenacted(name: str, *options: str) -> np.ndarray:
        main(["reenact", video, other, str(tmp_path / name), "--model", model, *options])
        return read_folder(tmp_path / name)[0]

    own, half, full = reenacted("0", "--strength", "0"), reenacted("5", "--strength", "0.5"), reenacted("1")
    assert own.shape == full.shape == (11, 40, 48, 3)
    main(["reconstruct", video, str(tmp_path / "r"), "--model", model])
    np.testing.assert_array_equal(own, read_folder(tmp_path / "r")[0])
    far, near = np.abs(full - own).mean(), np.abs(half - own).mean()
    assert 0 < near < far
    main(["reenact", other, video, str(tmp_path / "shorter"), "--model", model])  # 11 frames at 29.97 are 3 at 8 fps
    assert read_folder(tmp_path / "shorter")[0].shape == (3, 64, 64, 3)


def test_generate_writes_a_video_for_each_class_and_number(model, tmp_path, capsys):
    words = ["generate", "--model", model, "--steps", "2", "--fps", "5"]
    main([*words, str(tmp_path / "one.mp4"), "--class", "spin"])
    pictures, fps = read(tmp_path / "one.mp4")
    assert pictures.shape == (4, 32, 32, 3) and fps == 5
    main([*words, str(tmp_path / "all.gif"), "--num", "2", "--seed", "3"])
    names = ["all-orbit-0.gif", "all-orbit-1.gif", "all-spin-0.gif", "all-spin-1.gif"]
    assert sorted(path.name for path in tmp_path.glob("*.gif")) == names
    main([*words, str(tmp_path / "again.gif"), "--class", "1", "--seed", "4"])
    assert (tmp_path / "again.gif").read_bytes() == (tmp_path / names[-1]).read_bytes()
    for interval, same in (("0", "1"), True), (("0", "0.5"), False):
        main([*words, str(tmp_path / "w.gif"), "--class", "1", "--seed", "4", "--guidance-interval", *interval])
        assert ((tmp_path / "w.gif").read_bytes() == (tmp_path / names[-1]).read_bytes()) is same
    main([*words, str(tmp_path / "d.gif"), "--class", "1", "--seed", "4", "--structure-delay", "0.5"])
    assert (tmp_path / "d.gif").read_bytes() != (tmp_path / names[-1]).read_bytes()
    capsys.readouterr()
    assert "did you mean 'spin'" in fail(capsys, *words, tmp_path / "x.mp4", "--class", "spinn")


def test_generate_takes_prompts_that_are_in_no_file_name(model, tmp_path, capsys):
    encoder = tiny_text_encoder()
    pipeline = VidTwinPipeline.from_pretrained(model)
    config = {name: value for name, value in pipeline.transformer.config.items() if not name.startswith("_")}
    torch.manual_seed(0)
    transformer = VidTwinTransformer3DModel.from_config({**config, "caption_channels": 16})
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    pipeline.register_modules(transformer=transformer, text_encoder=encoder.model, tokenizer=encoder.tokenizer)
    pipeline.save_pretrained(tmp_path / "text")
    words = ["generate", "--model", str(tmp_path / "text"), "--steps", "2", "--seed", "3", "--dtype", "float32"]

    prompts = ['a red disc "$(touch x)" \x1b[31m/../<b>', "星 🙂"]
    options = [word for prompt in prompts for word in ("--dynamics-prompt", prompt)]
    main([*words, str(tmp_path / "out.gif"), "--structure-prompt", "a ring", *options, "--stream-guidance", "2", "3"])
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [str(tmp_path / f"out-{i}.gif") for i in range(2)]
    assert "touch" not in printed.err and "\x1b[31m/" not in printed.err
    clips = [read(tmp_path / f"out-{i}.gif")[0] for i in range(2)]
    assert not np.array_equal(*clips)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "output_type": "np", "generator": torch.Generator().manual_seed(3)}
    texts = {"structure_prompt": "a ring", "dynamics_prompt": prompts[1]}
    expected = pipeline(guidance_scale=(2.0, 3.0), **texts, **settings).frames[0]
    main([*words, str(tmp_path / "one"), "--structure-prompt", "a ring", *options[2:], "--stream-guidance", "2", "3"])
    pixels = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "one").glob("*.png"))]
    assert np.array_equal(np.stack(pixels), (255 * expected).round().astype(np.uint8))

    main([*words, str(tmp_path / "class.gif"), "--prompt", "a ring", "--class", "spin", "--class", "orbit"])
    assert sorted(path.name for path in tmp_path.glob("class*")) == ["class-orbit-0.gif", "class-spin-0.gif"]
    for options, message in (
        (["--prompt", "a", "--prompt", "b", *["--class", "spin"] * 3], "--prompt is given 2 times, but another 3"),
        (["--prompt", "a", "--stream-guidance", "1", "nan"], "--stream-guidance must be a finite number"),
    ):
        assert message in fail(capsys, *words, tmp_path / "x.mp4", *options)
    assert "was not trained on captions: leave prompt out" in fail(
        capsys, "generate", "--model", model, tmp_path / "x.mp4", "--prompt", "a"
    )


def test_generate_uses_a_guider(model, tmp_path, capsys):
    def generate(*options: str, folder: str | Path = model) -> np.ndarray:
        path = tmp_path / "x.gif"
        main(["generate", str(path), "--model", str(folder), "--steps", "3", "--class", "spin", *options])
        return read(path)[0]

    plain = generate("--guidance", "3")
    assert np.array_equal(
        generate("--guider", "ClassifierFreeGuidance", "--guider-options", "guidance_scale=3"), plain
    )
    zero = ["--guider", "ClassifierFreeZeroStarGuidance", "--guider-options", "guidance_scale=3", "zero_init_steps=2"]
    guided = generate(*zero)
    assert not np.array_equal(guided, plain)

    # A guider that is saved with the pipeline is the default.
    guider = ClassifierFreeZeroStarGuidance(guidance_scale=3, zero_init_steps=2)
    VidTwinPipeline.from_pretrained(model, guider=guider).save_pretrained(tmp_path / "guided")
    assert np.array_equal(generate(folder=tmp_path / "guided"), guided)
    assert np.array_equal(generate("--guidance", "3", folder=tmp_path / "guided"), plain)

    layers = ["--guider", "AutoGuidance", "--guider-options", "auto_guidance_layers=[9]", "dropout=1"]
    words = ["generate", tmp_path / "x.gif", "--model", model, *layers]
    assert "layers of AutoGuidance must be in 0 to 1, not [9]" in fail(capsys, *words)


def test_a_few_steps_model_takes_four_steps_and_no_guidance(few_steps_model, model, tmp_path, capsys, monkeypatch):
    calls = []
    sample = VidTwinPipeline.__call__
    monkeypatch.setattr(VidTwinPipeline, "__call__", lambda *a, **k: calls.append(k) or sample(*a, **k))
    words = ["generate", "--model", few_steps_model, "--class", "0"]
    for options in (
        ["--guidance", "3"],
        ["--stream-guidance", "4", "4"],
        ["--guidance-interval", "0.2", "0.8"],
        ["--guider", "AutoGuidance", "--guider-options", "auto_guidance_layers=[1]", "dropout=1"],
    ):
        assert "few-step model, which includes the guidance" in fail(capsys, *words, tmp_path / "x.mp4", *options)
    assert not calls and not any(tmp_path.iterdir())
    for options in ([], ["--steps", "2", "--guidance", "1"], ["--stream-guidance", "1", "1"]):
        main([*words, str(tmp_path / "x.gif"), *options])
    main(["generate", "--model", model, "--class", "0", str(tmp_path / "x.gif")])
    assert [call["num_inference_steps"] for call in calls] == [4, 2, 4, 50]


def test_guidance_and_stream_guidance_exclude_each_other(model, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["generate", "x.mp4", "--model", model, "--guidance", "3", "--stream-guidance", "2", "4"])
    assert end.value.code == 2
    assert "--stream-guidance: not allowed with argument --guidance" in capsys.readouterr().err


def test_a_prompt_that_is_no_unicode_ends_with_one_sentence(few_steps_model, tmp_path, capsys):
    words = ["generate", tmp_path / "x.mp4", "--model", few_steps_model, "--prompt", "a \udcff star"]
    assert r"'a \udcff star' is not valid Unicode" in fail(capsys, *words)
    assert not any(tmp_path.iterdir())


def test_info_says_what_a_pipeline_takes(few_steps_model, model, tmp_path, capsys):
    main(["info", few_steps_model])
    facts = capsys.readouterr().out
    for line in (
        "prompts           encoded by DistilBertModel",
        "images            as the structure",
        "denoising steps   4",
        "guidance          included (few-step model)",
    ):
        assert f"\n{line}\n" in facts
    main(["info", model])
    facts = capsys.readouterr().out
    assert "\ndenoising steps   50\n" in facts and "\nprompts" not in facts and "\nguidance" not in facts

    vae = AutoencoderKLVidTwin.from_pretrained(model, subfolder="vae")
    options = {"image_conditioning": True, "caption_channels": 16}
    transformer = VidTwinTransformer3DModel.from_preset("tiny-test", vae=vae, **options)
    VidTwinPipeline(vae, transformer, default_scheduler()).save_pretrained(tmp_path)
    main(["info", str(tmp_path)])
    facts = capsys.readouterr().out
    assert "images            as the first frame" in facts and "prompts           as embeddings only" in facts
    assert "classes           none" in facts


def test_generate_animates_an_image(model, tmp_path, capsys):
    """As the structure, or as the first frame of a model with image conditioning; also of longer videos."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        Image.fromarray(rng.integers(0, 255, (48, 40, 3), np.uint8)).save(tmp_path / f"{name}.png")
    pipeline = VidTwinPipeline.from_pretrained(model)
    config = {**pipeline.transformer.config, "image_conditioning": True}
    torch.manual_seed(0)
    with_images = VidTwinTransformer3DModel.from_config(config)
    for parameter in with_images.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    pipeline.register_modules(transformer=with_images)
    pipeline.save_pretrained(tmp_path / "animator")
    for folder in (model, str(tmp_path / "animator")):
        words = ["generate", "--model", folder, "--steps", "2", "--class", "spin"]
        videos = {}
        for name, image, frames in (("free", None, 4), ("a", "a", 4), ("b", "b", 4), ("long", "a", 6)):
            options = ["--frames", str(frames), *(["--image", str(tmp_path / f"{image}.png")] if image else [])]
            main([*words, str(tmp_path / "out.gif"), *options])
            videos[name], _ = read(tmp_path / "out.gif")
        assert videos["long"].shape[0] == 6
        for one, other in (("free", "a"), ("a", "b")):
            assert not np.array_equal(videos[one], videos[other])
    capsys.readouterr()
    (tmp_path / "c.png").write_bytes(b"no image")
    assert "c.png: it is not a whole PNG" in fail(capsys, *words, tmp_path / "x.gif", "--image", tmp_path / "c.png")
    assert "d.png does not exist" in fail(capsys, *words, tmp_path / "x.gif", "--image", tmp_path / "d.png")
    assert not (tmp_path / "x.gif").exists()


def test_a_repeated_class_gives_further_videos(model, tmp_path, capsys):
    words = ["generate", "--model", model, "--steps", "2", "--seed", "3"]
    main([*words, str(tmp_path / "num.gif"), "--class", "orbit", "--num", "3"])
    capsys.readouterr()
    main([*words, str(tmp_path / "twice.gif"), "--class", "orbit", "--class", "spin", "--class", "0", "--class", "0"])
    printed = [Path(line).name for line in capsys.readouterr().out.splitlines()]
    assert printed == ["twice-orbit-0.gif", "twice-spin-0.gif", "twice-orbit-1.gif", "twice-orbit-2.gif"]
    for i in range(3):
        expected = (tmp_path / f"num-orbit-{i}.gif").read_bytes()
        assert (tmp_path / f"twice-orbit-{i}.gif").read_bytes() == expected
    main([*words, str(tmp_path / "both.gif"), "--class", "1", "--class", "1", "--num", "2"])
    assert sorted(path.name for path in tmp_path.glob("both*")) == [f"both-spin-{i}.gif" for i in range(4)]


@pytest.mark.parametrize("num", [1, 2, 11])
@pytest.mark.parametrize(
    "names",
    [
        ["orbit/star", "orbit_star", "orbit/star"],  # equal once they are file names
        ["Orbit", "orbit", "ORBIT"],  # equal on macOS and Windows
        ["caf\u00e9", "cafe\u0301"],  # equal on macOS
        ["a", "a-0", "a-0-0", "a-1", "a"],
        [None],
        ["0", "0-0", "00"],
    ],
)
def test_generated_videos_have_unique_names(names, num):
    paths = _number_paths("folder/out.mp4", names, num)
    assert len(paths) == len(names) * num
    keys = {unicodedata.normalize("NFC", path).casefold() for path in paths}
    assert len(keys) == len(paths)
    assert all(Path(path).parent == Path("folder") and path.endswith(".mp4") for path in paths)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_guidance_that_is_not_finite_is_refused(model, tmp_path, capsys, value):
    words = ["generate", "--model", model, tmp_path / "x.mp4"]
    assert f"--guidance must be a finite number, not {value}" in fail(capsys, *words, f"--guidance={value}")
    assert "--guidance-interval must be" in fail(capsys, *words, "--guidance-interval", "0", value.lstrip("-"))
    assert not list(tmp_path.iterdir())


def test_the_commands_work_in_float16_or_name_a_dtype_that_does(model, video, tmp_path, capsys):
    half = ["--dtype", "float16"]
    main(["generate", str(tmp_path / "x.mp4"), "--model", model, "--steps", "2", "--class", "orbit", *half])
    main(["reconstruct", video, str(tmp_path / "y.mp4"), "--model", model, *half])
    broken, folder = VidTwinPipeline.from_pretrained(model), tmp_path / "broken"
    with torch.no_grad():  # within float32's range
        for layer in broken.transformer.structure_out, next(broken.vae.decoder.children()):
            next(layer.parameters()).mul_(1e6)
    broken.save_pretrained(folder)
    words = ["--model", folder, *half]
    assert "Use bfloat16 or float32" in fail(capsys, "generate", tmp_path / "g.mp4", "--steps", "2", *words)
    assert "Use bfloat16 or float32" in fail(capsys, "reconstruct", video, tmp_path / "r.mp4", *words)
    assert not (tmp_path / "g.mp4").exists() and not (tmp_path / "r.mp4").exists()


def test_generate_draws_subclasses_or_uses_the_given_one(tmp_path, capsys):
    torch.manual_seed(0)
    vae = AutoencoderKLVidTwin.from_preset("tiny-test", bottleneck="residual")
    transformer = VidTwinTransformer3DModel.from_preset("tiny-test", vae=vae, num_classes=4)
    names = {"0": "orbit", "1": "spin", "2": "orbit/star", "3": "spin/disc"}
    model = tmp_path / "model"
    VidTwinPipeline(vae, transformer, default_scheduler(), names).save_pretrained(model)
    words = ["generate", "--model", str(model), "--steps", "2"]
    main([*words, str(tmp_path / "all.gif")])
    assert sorted(path.name for path in tmp_path.glob("*.gif")) == ["all-orbit-0.gif", "all-spin-0.gif"]
    main([*words, str(tmp_path / "two.gif"), "--class", "orbit/star", "--class", "spin"])
    assert (tmp_path / "two-orbit_star-0.gif").exists() and (tmp_path / "two-spin-0.gif").exists()
    main(["info", str(model)])
    assert "subclasses        orbit/star, spin/disc" in capsys.readouterr().out


def test_latents_saved_from_python_decode_with_a_given_rate(model, tmp_path, capsys):
    vae = AutoencoderKLVidTwin.from_pretrained(model, subfolder="vae").eval()
    for name, size in (("own", (4, 32, 32)), ("tiled", (6, 40, 32))):
        with torch.no_grad():
            z = vae.encode(torch.rand(1, 3, *size)).latent_dist.mode()
        path = tmp_path / f"{name}.safetensors"
        (z if isinstance(z, TwinLatents) else vae.unpack(z)).save(path)
        assert "--fps" in fail(capsys, "decode", path, tmp_path / "a.mp4", "--model", model)
        main(["decode", str(path), str(tmp_path / f"{name}.mp4"), "--model", model, "--fps", "12"])
        pictures, fps = read(tmp_path / f"{name}.mp4")
        assert pictures.shape[:3] == size and fps == 12
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".mp4"] * 2 + [".safetensors"] * 2


def test_generate_makes_videos_of_any_length_and_loops(model, tmp_path, capsys):
    words = ["generate", "--model", model, "--steps", "2", "--class", "spin"]
    main([*words, str(tmp_path / "clip"), "--num", "1"])
    main([*words, str(tmp_path / "long"), "--frames", "9"])
    main([*words, str(tmp_path / "loop"), "--frames", "6", "--loop"])
    clip, long, loop = (read_folder(tmp_path / name)[0] for name in ("clip", "long", "loop"))
    assert [len(pictures) for pictures in (clip, long, loop)] == [4, 9, 6]
    assert np.array_equal(long[:2], clip[:2])  # before the windows meet
    assert not np.array_equal(loop[:2], clip[:2])  # where the loop closes
    capsys.readouterr()
    assert "the nearest is 8" in fail(capsys, *words, tmp_path / "x.mp4", "--frames", "7", "--loop")


def test_generate_continues_a_history(model, tmp_path, capsys):
    words = ["generate", "--model", str(model), "--steps", "2", "--class", "orbit", "--frames", "6"]
    main([*words, str(tmp_path / "varied")])
    main([*words, str(tmp_path / "matched"), "--match-colors"])
    main([*words, str(tmp_path / "history"), "--history-noise", "0.1", "--history-guidance", "2"])
    varied, matched, history = (read_folder(tmp_path / name)[0] for name in ("varied", "matched", "history"))
    assert len(history) == 6 and not np.array_equal(varied, history)
    assert np.array_equal(varied[:2], matched[:2]) and not np.array_equal(varied[4:], matched[4:])
    assert "below 1, not 1.0" in fail(capsys, *words, tmp_path / "x.mp4", "--history-noise", "1")
    assert "needs --history-noise" in fail(capsys, *words, tmp_path / "x.mp4", "--history-guidance", "2")
    assert "--frames must be at least 1" in fail(capsys, *words, tmp_path / "x.mp4", "--frames", "0")
    assert not (tmp_path / "x.mp4").exists()


def test_generate_checks_before_it_samples(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(VidTwinPipeline, "__call__", lambda *a, **k: pytest.fail("it sampled"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    picture = str(tmp_path / "mine" / "image.png")
    Image.new("RGB", (32, 32)).save(picture)
    words = ["generate", "--model", model]
    for changed, sentence in (
        (["out.mp4", "--num", "0"], "--num must be at least 1"),
        (["out.mp4", "--steps", "0"], "--steps must be at least 1"),
        (["out.mp4", "--guidance-interval", "0.7", "0.2"], "--guidance-interval must be two numbers from 0 to 1"),
        (["out.mp4", "--structure-delay", "1.2"], "--structure-delay must be between 0 and 1, not 1.2"),
        (["out.mp4", "--temperature", "-1"], "--temperature must be a finite number of at least 0, not -1"),
        (["out.mp4", "--candidates", "0"], "--candidates must be at least 1"),
        (
            ["out.mp4", "--candidates", "2"],
            "--candidates 2: num_candidates above 1 requires a pipeline with a classif",
        ),
        (["out.mp4", "--structure-delay", "0.2", "--image", picture], "leave one of them out"),
        (["out.mp4", "--guider", "CFG"], "must be one of AdaptiveProjectedGuidance, "),
        (["out.mp4", "--guider", "AutoGuidance", "--guidance", "3"], "--guider excludes --guidance"),
        (["out.mp4", "--guider-options", "stop=0.5"], "--guider-options requires --guider"),
        (["out.mp4", "--guider", "AutoGuidance", "--guider-options", "stop"], "takes key=value, not 'stop'"),
        (["out.mp4", "--fps", "0"], "fps must be positive"),
        (["out.avi"], ".mp4"),
        (["mine", "--class", "0"], "holds other things"),
        (["out.mp4", "--class", "7"], "0 to 1"),
        ([".", "--num", "2"], "name to number"),
    ):
        target = "." if changed[0] == "." else tmp_path / changed[0]
        assert sentence in fail(capsys, *words, target, *changed[1:])
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def start(*words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "vidgen", *words],
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what runs in its background with SIGINT ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_an_interrupt_ends_the_command_and_leaves_no_file(model, tmp_path):
    clip = render_sprite(sample_factors(np.random.default_rng(0), "orbit", num_frames=600))
    video = write_video(tmp_path / "long.mp4", clip, 8)
    words = ["reconstruct", str(video), str(tmp_path / "out" / "a.mp4"), "--model", model, "--window-overlap", "3"]
    process = start(*words)
    begun = time.monotonic()
    while not (tmp_path / "out").exists() and time.monotonic() - begun < 60:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 130
    assert process.stderr.read().strip().splitlines()[-1] == "interrupted"
    assert list((tmp_path / "out").iterdir()) == []


def test_main_restores_signal_handlers(model, capsys):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    main(["info", model])
    fail(capsys, "info", "nowhere")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_mistakes_end_with_one_sentence_and_leave_no_file(model, video, tmp_path, capsys):
    out = tmp_path / "out.mp4"
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video\n" * 50)
    assert "no such file" in fail(capsys, "reconstruct", tmp_path / "absent.mp4", out, "--model", model)
    assert "the file is empty" in fail(capsys, "reconstruct", tmp_path / "empty.mp4", out, "--model", model)
    assert "not a readable video" in fail(capsys, "encode", tmp_path / "text.mp4", out, "--model", model)
    assert "No VAE in" in fail(capsys, "reconstruct", video, out, "--model", tmp_path / "nowhere")
    assert "vidgen convert" in fail(capsys, "reconstruct", video, out, "--model", video)
    assert ".mp4" in fail(capsys, "reconstruct", video, tmp_path / "out.avi", "--model", model)
    assert ".safetensors" in fail(capsys, "encode", video, tmp_path / "z.pt", "--model", model)
    assert "--device nowhere" in fail(capsys, "reconstruct", video, out, "--model", model, "--device", "nowhere")
    assert "--device meta" in fail(capsys, "reconstruct", video, out, "--model", model, "--device", "meta")
    assert "at most 1000" in fail(capsys, "reconstruct", video, out, "--model", model, "--fps", "1e9")
    assert "at most 16384" in fail(capsys, "reconstruct", video, out, "--model", model, "--size", "100000")
    assert ".mp4" in fail(capsys, "reconstruct", video, tmp_path / ".mp4", "--model", model)
    assert "0 to 31 pixels" in fail(capsys, "reconstruct", video, out, "--model", model, "--tile-overlap", "32")
    assert "8 x 8 pixels or more" in fail(capsys, "reconstruct", video, out, "--model", model, "--size", "4")
    assert "between 0 and 1" in fail(capsys, "reenact", video, video, out, "--model", model, "--strength", "2")
    assert "does not hold the latents" in fail(capsys, "decode", _not_latents(tmp_path), out, "--model", model)
    assert not out.exists() and sorted(p.name for p in tmp_path.iterdir()) == [
        "empty.mp4",
        "other.safetensors",
        "text.mp4",
    ]


def _not_latents(folder: Path) -> Path:
    from safetensors.torch import save_file

    save_file({"latents": torch.zeros(1, 3)}, folder / "other.safetensors")
    return folder / "other.safetensors"


def test_latents_are_decoded_only_by_their_model(model, video, tmp_path, capsys):
    torch.manual_seed(1)
    AutoencoderKLVidTwin.from_preset("tiny-test", bottleneck="residual").save_pretrained(tmp_path / "another")
    AutoencoderKLVidTwin.from_preset("tiny-test", num_queries=2).save_pretrained(tmp_path / "smaller")
    latents = tmp_path / "z.safetensors"
    main(["encode", video, str(latents), "--model", model])
    assert "another model" in fail(capsys, "decode", latents, tmp_path / "a.mp4", "--model", tmp_path / "another")
    assert "this model's are" in fail(capsys, "decode", latents, tmp_path / "a.mp4", "--model", tmp_path / "smaller")
    main(["decode", str(latents), str(tmp_path / "a.mp4"), "--model", str(tmp_path / "another"), "--any-model"])


def test_latents_of_the_same_encoder_are_decoded(model, video, tmp_path, capsys):
    """A model whose decoder was tuned decodes the latents of its parent; files of earlier versions need the parent."""
    latents, tuned = tmp_path / "z.safetensors", AutoencoderKLVidTwin.from_pretrained(model, subfolder="vae")
    main(["encode", video, str(latents), "--model", model])
    tuned.decoder.proj_out.bias.data += 1
    tuned.save_pretrained(tmp_path / "tuned")
    main(["decode", str(latents), str(tmp_path / "a.mp4"), "--model", str(tmp_path / "tuned")])
    with safe_open(latents, "pt") as file:
        metadata = file.metadata() | {"model_sha256": weights_hash(load_vae(model))}
        packed = file.get_tensor("latents")
    del metadata["encoder_sha256"]
    save_file({"latents": packed}, latents, metadata)
    main(["decode", str(latents), str(tmp_path / "a.mp4"), "--model", model])
    assert "another model" in fail(capsys, "decode", latents, tmp_path / "a.mp4", "--model", tmp_path / "tuned")
    assert len(read(tmp_path / "a.mp4")[0]) == 11


def test_weights_that_do_not_fit_are_refused(model, video, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    vae = AutoencoderKLVidTwin.from_pretrained(model, subfolder="vae")
    vae.save_pretrained(tmp_path / "vae")
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["stranger"] = tensors.pop("decoder.proj_out.bias")
    save_file(tensors, weights, {"format": "pt"})
    error = fail(capsys, "info", tmp_path / "vae")
    assert "missing 1 keys, the first decoder.proj_out.bias" in error and "stranger" in error


def test_a_damaged_video_leaves_no_half_written_output(model, tmp_path, capsys, monkeypatch):
    from vidgen.data import streams

    clip = render_sprite(sample_factors(np.random.default_rng(0), "orbit", num_frames=40))
    path = write_video(tmp_path / "a.mp4", clip, 8)
    real = streams.FrameReader.__iter__

    def breaks(self):
        for i, frame in enumerate(real(self)):
            if i == 30:
                raise streams.VideoError("frame 30 is damaged", self.path)
            yield frame

    monkeypatch.setattr(streams.FrameReader, "__iter__", breaks)
    for word, name in (("reconstruct", "out.mp4"), ("encode", "z.safetensors"), ("components", "frames")):
        assert "frame 30 is damaged" in fail(capsys, word, path, tmp_path / name, "--model", model)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
