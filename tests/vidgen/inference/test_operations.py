"""The `vidgen` command, word by word, on real files with a tiny untrained model."""

from __future__ import annotations

import json
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
from PIL import Image
from safetensors import safe_open

from autoencoder import AutoencoderKLVidTwin, TwinLatents
from pipelines import VidTwinPipeline, VidTwinTransformer3DModel, default_scheduler
from vidgen.cli import build_parser, main
from vidgen.data.sprites import render_sprite, sample_factors
from vidgen.data.streams import FrameReader
from vidgen.data.video import write_video
from vidgen.inference.operations import _numbered

FPS = Fraction(30000, 1001)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A whole pipeline's folder."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    vae = AutoencoderKLVidTwin.from_preset("tiny-test", bottleneck="residual")
    transformer = VidTwinTransformer3DModel.from_preset("tiny-test", vae=vae, num_classes=2)
    for layer in (transformer.structure_out, transformer.dynamics_out, transformer.modulation_out[1]):
        torch.nn.init.normal_(layer.weight)  # a fresh DiT predicts zero, whatever noise it is given
    VidTwinPipeline(vae, transformer, default_scheduler(), {"0": "orbit", "1": "spin"}).save_pretrained(folder)
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


def says(capsys, *words: str) -> str:
    """The one sentence a wrong command ends with."""
    with pytest.raises(SystemExit) as end:
        main([*map(str, words)])
    assert end.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    return error


def test_reconstruct_keeps_size_rate_and_count(model, video, tmp_path):
    out = tmp_path / "out.mp4"
    main(["reconstruct", video, str(out), "--model", model])
    pictures, fps = read(out)
    assert pictures.shape == (11, 40, 48, 3) and fps == FPS
    with av.open(str(out)) as container:
        assert container.streams.video[0].codec_context.name == "h264"


@torch.no_grad()
def test_reconstruct_is_the_models_own_round_trip(model, video, tmp_path):
    main(["reconstruct", video, str(tmp_path / "frames"), "--model", model])
    written, _ = read_folder(tmp_path / "frames")
    source, _ = read(video)
    vae = AutoencoderKLVidTwin.from_pretrained(model, subfolder="vae").eval()
    clip = torch.from_numpy(source).permute(3, 0, 1, 2)[None] / 127.5 - 1
    expected = ((vae(clip).sample[0].permute(1, 2, 3, 0) + 1) * 127.5).round().clamp(0, 255)
    assert np.abs(written - expected.numpy()).max() <= 1


def read_folder(folder: Path) -> tuple[np.ndarray, list[str]]:
    from PIL import Image

    files = sorted(folder.iterdir())
    return np.stack([np.asarray(Image.open(file)).astype(int) for file in files]), [file.name for file in files]


def test_encode_and_decode_are_reconstruct(model, video, tmp_path):
    latents = tmp_path / "z.safetensors"
    main(["encode", video, str(latents), "--model", model])
    main(["decode", str(latents), str(tmp_path / "a"), "--model", model])
    main(["reconstruct", video, str(tmp_path / "b"), "--model", model])
    a, b = read_folder(tmp_path / "a")[0], read_folder(tmp_path / "b")[0]
    np.testing.assert_array_equal(a, b)
    whole = TwinLatents.load(latents)
    assert whole.geometry.size == (11, 40, 48) and len(whole.structure) == 1
    with safe_open(latents, "pt") as file:
        assert Fraction(file.metadata()["fps"]) == FPS and len(file.metadata()["model_sha256"]) == 64
    main(["decode", str(latents), str(tmp_path / "c.mp4"), "--model", model, "--components", "structure"])
    assert read(tmp_path / "c.mp4")[1] == FPS


def test_rate_size_overlap_and_dtype_are_the_users(model, video, tmp_path):
    out = tmp_path / "out.gif"
    options = ["--fps", "10", "--size", "32", "--dtype", "bfloat16", "--tile-overlap", "4", "--window-overlap", "0"]
    main(["reconstruct", video, str(out), "--model", model, "--device", "cpu", *options])
    pictures, fps = read(out)
    assert pictures.shape[1:3] == (32, 38) and fps == 10 and len(pictures) == 4
    latents = tmp_path / "z.safetensors"
    main(["encode", video, str(latents), "--model", model, *options])
    loaded = TwinLatents.load(latents)
    assert loaded.geometry.stride == (4, 28, 28) and loaded.structure.dtype == torch.bfloat16


def test_components_stand_side_by_side(model, video, tmp_path):
    main(["components", video, str(tmp_path / "c"), "--model", model])
    rows, _ = read_folder(tmp_path / "c")
    source, _ = read(video)
    assert rows.shape == (11, 40, 4 * 48, 3)
    original, *parts = np.split(rows, 4, axis=2)
    np.testing.assert_array_equal(original, source)
    for kind, part in zip(("both", "structure", "dynamics"), parts, strict=True):
        main(["reconstruct", video, str(tmp_path / kind), "--model", model, "--components", kind])
        np.testing.assert_array_equal(part, read_folder(tmp_path / kind)[0])


def test_reenact_goes_from_ones_own_motion_to_the_others(model, video, other, tmp_path):
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
    capsys.readouterr()
    assert "did you mean 'spin'" in says(capsys, *words, tmp_path / "x.mp4", "--class", "spinn")


def test_a_class_given_twice_is_two_videos_of_it(model, tmp_path, capsys):
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
def test_no_two_generated_videos_have_one_name(names, num):
    paths = _numbered("folder/out.mp4", names, num)
    assert len(paths) == len(names) * num
    keys = {unicodedata.normalize("NFC", path).casefold() for path in paths}
    assert len(keys) == len(paths)
    assert all(Path(path).parent == Path("folder") and path.endswith(".mp4") for path in paths)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_guidance_that_is_not_finite_is_refused(model, tmp_path, capsys, value):
    words = ["generate", "--model", model, tmp_path / "x.mp4"]
    assert f"--guidance must be a finite number, not {value}" in says(capsys, *words, f"--guidance={value}")
    assert "--guidance-interval must be" in says(capsys, *words, "--guidance-interval", "0", value.lstrip("-"))
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
    assert "Use bfloat16 or float32" in says(capsys, "generate", tmp_path / "g.mp4", "--steps", "2", *words)
    assert "Use bfloat16 or float32" in says(capsys, "reconstruct", video, tmp_path / "r.mp4", *words)
    assert not (tmp_path / "g.mp4").exists() and not (tmp_path / "r.mp4").exists()


def test_generate_draws_sub_classes_or_takes_the_one_named(tmp_path, capsys):
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
    assert "sub-classes       orbit/star, spin/disc" in capsys.readouterr().out


def test_convert_and_info(tmp_path, capsys, golden):
    folder = tmp_path / "vae"
    main(["convert", str(golden), str(folder), "--attention-heads", "4", "--qformer-heads", "4"])
    vae = AutoencoderKLVidTwin.from_pretrained(folder)
    capsys.readouterr()
    main(["info", str(folder)])
    out = capsys.readouterr().out
    assert f"{vae.num_parameters():,}" in out and f"{vae.compression_rate:.4%}" in out and "GFLOP" in out
    assert json.loads(out[out.index("{") :])["num_attention_heads"] == 4
    main(["convert", str(golden), str(folder), "--attention-heads", "4", "--qformer-heads", "4"])  # replaces its own
    assert "holds other things (vae)" in says(capsys, "convert", golden, tmp_path)
    assert "at least 1" in says(capsys, "convert", golden, tmp_path / "new", "--attention-heads", "0")
    assert "at least 1" in says(capsys, "convert", golden, tmp_path / "new", "--attention-heads", "-2")
    (tmp_path / "evil.ckpt").write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    assert "evil.ckpt" in says(capsys, "convert", tmp_path / "evil.ckpt", tmp_path / "new")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "new").exists()


@pytest.fixture
def golden() -> Path:
    return Path(__file__).parents[2] / "data" / "official_golden" / "mini_weights.safetensors"


def test_convert_never_replaces_what_it_did_not_make(tmp_path, capsys, golden):
    """A downloaded folder looks like a model's, and holds the checkpoint itself."""
    for name, content in (("vidtwin.safetensors", golden.read_bytes()), ("config.json", b"{}"), ("notes.txt", b"x")):
        (tmp_path / name).write_bytes(content)
    assert "holds other things" in says(capsys, "convert", tmp_path / "vidtwin.safetensors", tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "notes.txt", "vidtwin.safetensors"]


def test_latents_saved_from_python_decode_with_a_given_rate(model, tmp_path, capsys):
    vae = AutoencoderKLVidTwin.from_pretrained(model, subfolder="vae").eval()
    for name, size in (("own", (4, 32, 32)), ("tiled", (6, 40, 32))):
        with torch.no_grad():
            z = vae.encode(torch.rand(1, 3, *size)).latent_dist.mode()
        path = tmp_path / f"{name}.safetensors"
        (z if isinstance(z, TwinLatents) else vae.unpack(z)).save(path)
        assert "--fps" in says(capsys, "decode", path, tmp_path / "a.mp4", "--model", model)
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
    assert "the nearest is 8" in says(capsys, *words, tmp_path / "x.mp4", "--frames", "7", "--loop")
    assert "--frames must be at least 1" in says(capsys, *words, tmp_path / "x.mp4", "--frames", "0")
    assert not (tmp_path / "x.mp4").exists()


def test_generate_checks_before_it_samples(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(VidTwinPipeline, "__call__", lambda *a, **k: pytest.fail("it sampled"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    words = ["generate", "--model", model]
    for changed, sentence in (
        (["out.mp4", "--num", "0"], "--num must be at least 1"),
        (["out.mp4", "--steps", "0"], "--steps must be at least 1"),
        (["out.mp4", "--guidance-interval", "0.7", "0.2"], "--guidance-interval must be two numbers from 0 to 1"),
        (["out.mp4", "--fps", "0"], "fps must be positive"),
        (["out.avi"], ".mp4"),
        (["mine", "--class", "0"], "holds other things"),
        (["out.mp4", "--class", "7"], "0 to 1"),
        ([".", "--num", "2"], "a name to number"),
    ):
        target = "." if changed[0] == "." else tmp_path / changed[0]
        assert sentence in says(capsys, *words, target, *changed[1:])
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def start(*words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "vidgen", *words],
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what runs in its background with SIGINT ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGTERM"])
def test_an_interrupt_ends_it_soon_and_leaves_nothing(signal_name, model, tmp_path):
    clip = render_sprite(sample_factors(np.random.default_rng(0), "orbit", num_frames=600))
    video = write_video(tmp_path / "long.mp4", clip, 8)
    words = ["reconstruct", str(video), str(tmp_path / "out" / "a.mp4"), "--model", model, "--window-overlap", "3"]
    process = start(*words)
    begun = time.monotonic()
    while not (tmp_path / "out").exists() and time.monotonic() - begun < 60:
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(getattr(signal, signal_name))
    assert process.wait(20) == 130
    assert process.stderr.read().strip().splitlines()[-1] == "interrupted"
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGTERM"])
def test_an_interrupt_while_libraries_are_imported_ends_it_too(signal_name, tmp_path, monkeypatch):
    """A module that swallows a KeyboardInterrupt, as some do, stands in the place of torch."""
    (tmp_path / "torch.py").write_text(
        "import sys, time\n"
        "try:\n    print('importing', file=sys.stderr, flush=True)\n    time.sleep(20)\n"
        "except BaseException:\n    raise RuntimeError('lost')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    process = start("info", "anything")
    assert process.stderr.readline() == "importing\n"
    process.send_signal(getattr(signal, signal_name))
    assert process.wait(20) == 130
    assert process.stderr.read() == "interrupted\n"


def test_called_from_python_it_leaves_the_signals_as_they_were(model, capsys):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    main(["info", model])
    says(capsys, "info", "nowhere")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_mistakes_are_one_sentence_and_leave_nothing(model, video, tmp_path, capsys):
    out = tmp_path / "out.mp4"
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video\n" * 50)
    assert "no such file" in says(capsys, "reconstruct", tmp_path / "absent.mp4", out, "--model", model)
    assert "the file is empty" in says(capsys, "reconstruct", tmp_path / "empty.mp4", out, "--model", model)
    assert "not a readable video" in says(capsys, "encode", tmp_path / "text.mp4", out, "--model", model)
    assert "No VAE in" in says(capsys, "reconstruct", video, out, "--model", tmp_path / "nowhere")
    assert "vidgen convert" in says(capsys, "reconstruct", video, out, "--model", video)
    assert ".mp4" in says(capsys, "reconstruct", video, tmp_path / "out.avi", "--model", model)
    assert ".safetensors" in says(capsys, "encode", video, tmp_path / "z.pt", "--model", model)
    assert "--device nowhere" in says(capsys, "reconstruct", video, out, "--model", model, "--device", "nowhere")
    assert "--device meta" in says(capsys, "reconstruct", video, out, "--model", model, "--device", "meta")
    assert "at most 1000" in says(capsys, "reconstruct", video, out, "--model", model, "--fps", "1e9")
    assert "at most 16384" in says(capsys, "reconstruct", video, out, "--model", model, "--size", "100000")
    assert ".mp4" in says(capsys, "reconstruct", video, tmp_path / ".mp4", "--model", model)
    assert "0 to 31 pixels" in says(capsys, "reconstruct", video, out, "--model", model, "--tile-overlap", "32")
    assert "8 x 8 pixels or more" in says(capsys, "reconstruct", video, out, "--model", model, "--size", "4")
    assert "between 0 and 1" in says(capsys, "reenact", video, video, out, "--model", model, "--strength", "2")
    assert "does not hold the latents" in says(capsys, "decode", _not_latents(tmp_path), out, "--model", model)
    assert not out.exists() and sorted(p.name for p in tmp_path.iterdir()) == [
        "empty.mp4",
        "other.safetensors",
        "text.mp4",
    ]


def _not_latents(folder: Path) -> Path:
    from safetensors.torch import save_file

    save_file({"latents": torch.zeros(1, 3)}, folder / "other.safetensors")
    return folder / "other.safetensors"


def test_latents_are_decoded_by_the_model_that_made_them(model, video, tmp_path, capsys):
    torch.manual_seed(1)
    AutoencoderKLVidTwin.from_preset("tiny-test", bottleneck="residual").save_pretrained(tmp_path / "another")
    AutoencoderKLVidTwin.from_preset("tiny-test", num_queries=2).save_pretrained(tmp_path / "smaller")
    latents = tmp_path / "z.safetensors"
    main(["encode", video, str(latents), "--model", model])
    assert "another model" in says(capsys, "decode", latents, tmp_path / "a.mp4", "--model", tmp_path / "another")
    assert "this model's are" in says(capsys, "decode", latents, tmp_path / "a.mp4", "--model", tmp_path / "smaller")
    main(["decode", str(latents), str(tmp_path / "a.mp4"), "--model", str(tmp_path / "another"), "--any-model"])
    assert len(read(tmp_path / "a.mp4")[0]) == 11


def test_weights_that_are_not_the_models_are_refused(model, video, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    vae = AutoencoderKLVidTwin.from_pretrained(model, subfolder="vae")
    vae.save_pretrained(tmp_path / "vae")
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["stranger"] = tensors.pop("decoder.proj_out.bias")
    save_file(tensors, weights, {"format": "pt"})
    error = says(capsys, "info", tmp_path / "vae")
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
        assert "frame 30 is damaged" in says(capsys, word, path, tmp_path / name, "--model", model)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_help_says_enough_to_work_from():
    parser = build_parser()
    text = parser.format_help()
    commands = parser._subparsers._group_actions[0].choices
    assert list(commands) == [
        "encode", "decode", "reconstruct", "reenact", "components", "generate", "convert", "shards",
        "sprites", "data", "app", "info",
    ]  # fmt: skip
    for name, command in commands.items():
        assert name in text
        below = command._subparsers._group_actions[0].choices.values() if command._subparsers else [command]
        for action in (action for parser in below for action in parser._actions):
            assert action.help, f"vidgen {name} {action.dest} has no help"


def test_the_shells_view():
    result = subprocess.run([sys.executable, "-m", "vidgen", "info", "absent"], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.strip().startswith("error: No VAE in absent") and "Traceback" not in result.stderr
    code = "import sys, vidgen.cli; vidgen.cli.build_parser(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


# --- data sets ------------------------------------------------------------------------------------------------------


@pytest.fixture
def videos(tmp_path) -> Path:
    """Three sprites of two classes, and a text that calls itself a video."""
    from vidgen.data.sprites import write_sprites

    write_sprites(tmp_path / "all", 2, seed=0)
    root = tmp_path / "videos"
    for number, path in enumerate(
        sorted(tmp_path.glob("all/*/orbit*.mp4")) + sorted(tmp_path.glob("all/*/spin_0000.mp4"))
    ):
        (root / path.parent.name).mkdir(parents=True, exist_ok=True)
        path.rename(root / path.parent.name / f"{number}.mp4")
    (root / "spin" / "text.mp4").write_text("no video")
    return root


def test_sprites_are_written_by_seed(tmp_path, capsys):
    main(["sprites", str(tmp_path / "few"), "--clips-per-class", "1", "--seed", "3"])
    assert capsys.readouterr().out == f"8 clips in {tmp_path / 'few'}\n"
    main(["sprites", str(tmp_path / "more"), "--clips-per-class", "2", "--seed", "3"])
    few, more = ({p.name: p.read_bytes() for p in (tmp_path / n).glob("*/*")} for n in ("few", "more"))
    assert len(few) == 16 and len(more) == 32 and few.items() <= more.items()
    main(["sprites", str(tmp_path / "others"), "--clips-per-class", "1", "--seed", "4"])
    assert not few.items() & {p.name: p.read_bytes() for p in (tmp_path / "others").glob("*/*")}.items()
    capsys.readouterr()
    assert "--clips-per-class must be 1 or more" in says(capsys, "sprites", tmp_path / "x", "--clips-per-class", "0")
    assert not (tmp_path / "x").exists()


def test_data_check_lists_counts_and_draws(videos, tmp_path, capsys):
    out = tmp_path / "found"
    main(["data", "check", str(videos), "--output", str(out), "--jobs", "1", "--fps", "8", "--num-frames", "16"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "4 videos, 2 classes" in printed and "│ good │ 3 │" in printed and "│ unreadable │ 1 │" in printed
    (entry,) = [json.loads(line) for line in (out / "bad_videos.jsonl").read_text().splitlines()]
    assert entry["path"] == str(videos / "spin" / "text.mp4") and "not a readable video" in entry["reason"]
    with Image.open(out / "histograms.png") as picture:
        assert picture.size == (1386, 319)


def test_shards_hold_the_data_set(videos, tmp_path, capsys):
    from vidgen.data.listing import list_videos

    main(["shards", str(videos), str(tmp_path / "out"), "--max-count", "3"])
    printed = capsys.readouterr()
    assert printed.out == f"4 videos in 2 shards in {tmp_path / 'out'}\n"
    assert printed.err.startswith(f"{videos}: 4 videos, 2 classes (orbit, spin)\n")
    files, classes = list_videos(tmp_path / "out")
    assert [file.label for file in files] == [0, 0, 1, 1] and classes == ["orbit", "spin"]


def test_shards_of_an_official_split(videos, tmp_path):
    from vidgen.data.listing import list_videos

    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 spin\n2 orbit\n")
    (lists / "trainlist02.txt").write_text("orbit/0.mp4 2\nspin/2.mp4 1\n")
    (lists / "testlist02.txt").write_text("orbit/1.mp4\n")
    words = ["shards", str(videos), str(tmp_path / "out"), "--ucf101-split", "2", "--split-files", str(lists)]
    main(words)
    for part, labels in (("train", [1, 0]), ("test", [1])):
        files, classes = list_videos(tmp_path / "out" / part)
        assert [file.label for file in files] == labels and classes == ["spin", "orbit"]


def test_wrong_data_sets_are_said(tmp_path, capsys):
    assert "no dataset at" in says(capsys, "data", "check", tmp_path / "absent")
    assert "must be positive" in says(capsys, "data", "check", tmp_path, "--jobs", "0")
    (tmp_path / "a.tar").write_bytes(b"x" * 2000)
    assert "a.tar is not a whole, uncompressed tar file" in says(capsys, "shards", tmp_path, tmp_path / "out")
