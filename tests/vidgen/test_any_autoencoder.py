"""Every adapted class through the whole path: files, commands, latent cache, DiT, pipeline, sampling, FVD."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from command_line import fail
from peers import TINY, tiny_peer
from PIL import Image
from safetensors.torch import load_file

from autoencoder.adapters import adapt
from pipelines import VidTwinPipeline, VidTwinTransformer3DModel, default_scheduler
from pipelines.latents import normalize_latents
from vidgen.cli import main
from vidgen.common.config import load_config
from vidgen.common.errors import UserError
from vidgen.common.loading import encoder_hash, load_vae, weights_hash
from vidgen.data.sprites import render_sprite, sample_factors, write_sprites
from vidgen.data.streams import FrameReader
from vidgen.data.video import write_video
from vidgen.inference.operations import generate
from vidgen.metrics import fvd
from vidgen.metrics.detectors import Detector
from vidgen.metrics.frechet import bootstrap_interval
from vidgen.metrics.fvd import Sampling, evaluate_pipeline
from vidgen.metrics.protocols import get_protocol
from vidgen.training.config import DiTTrainingConfig, VAETrainingConfig
from vidgen.training.dit_trainer import train_dit
from vidgen.training.vae_trainer import train_vae

FRAMES = {"AutoencoderKLMochi": 7, "Emu3VQVAE": 4, "AutoencoderKLCogVideoX": 9, "AutoencoderKLCosmos": 9}
FRAMES |= {"AutoencoderKLLTX2Video": 9}
SHORT = ["train.mixed_precision=no", "train.dataloader_num_workers=0", "train.report_to=none"]
SHORT += ["train.train_batch_size=2", "data.fps=8", "data.resolution=16"]


class FewNumbers(Detector):
    """Few features per clip, so that few clips suffice."""

    name, dim, per_frame, sha256 = "few_numbers", 3, False, "0" * 64

    def features(self, clips):
        return clips.mean(dim=(2, 3, 4))


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def sprites(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sprites")
    write_sprites(root, 1, seed=0, resolution=16, num_frames=10)
    return root


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> str:
    clip = render_sprite(sample_factors(np.random.default_rng(0), "orbit", resolution=48, num_frames=20))
    return str(write_video(tmp_path_factory.mktemp("video") / "a.mp4", clip[:, 4:44], 8))


def settings(name: str, sprites: Path, output_dir: Path, *more: str) -> list[str]:
    return [
        *SHORT,
        f"data.root={sprites}",
        f"data.num_frames={FRAMES.get(name, 5)}",
        f"output_dir={output_dir}",
        *more,
    ]


@pytest.mark.parametrize("name", sorted(TINY))
def test_from_a_folder_to_generated_videos(name, sprites, tmp_path, monkeypatch):
    # 1. A folder in the class's format.
    model = tiny_peer(name)
    model.save_pretrained(tmp_path / "vae")
    # 2. Latent cache and DiT.
    dit = ["model.preset=tiny-test", f"vae={tmp_path / 'vae'}", "diffusion.num_inference_steps=2"]
    dit += ["train.max_train_steps=1", "diffusion.guidance_scale=1"]
    final = train_dit(load_config(DiTTrainingConfig, settings(name, sprites, tmp_path / "dit", *dit)))
    # 3. The pipeline holds the class, and its statistics normalize every channel of the training latents.
    pipeline = VidTwinPipeline.from_pretrained(final)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline.vae) is type(model)
    for saved, own in zip(pipeline.vae.parameters(), model.parameters(), strict=True):
        assert torch.equal(saved, own)
    library = type(model).__module__.split(".")[0]
    assert json.loads((final / "model_index.json").read_text())["vae"] == [library, name]
    vae = pipeline.autoencoder
    assert vae.clip_shape == (3, FRAMES.get(name, 5), 16, 16)
    if adapt(model).latents_mean is None:
        shard = load_file(next((tmp_path / "dit" / "latents").glob("*.safetensors")))
        normalized = vae.unpack(normalize_latents(shard["mean"], vae, *pipeline.latent_statistics)).structure
        channels = normalized.transpose(0, 1).flatten(1).double()
        assert channels.mean(1).abs().max() < 1e-3
        assert (channels.std(1, correction=0) - 1).abs().max() < 1e-3
    # 4. Sampling, conditioning, reconstruction and FVD.
    generator = torch.Generator().manual_seed(0)
    frames = pipeline(["orbit"], num_inference_steps=1, output_type="pt", generator=generator).frames
    assert frames.shape == (1, *(vae.clip_shape[i] for i in (1, 0, 2, 3)))
    latents = pipeline([0], num_inference_steps=1, output_type="latent").frames
    assert latents.shape == (1, vae.latent_size)
    with pytest.raises(
        UserError, match=rf"more than {vae.clip_shape[1]} frames need the dynamics latent of a VidTwin"
    ):
        generate(str(tmp_path / "long.mp4"), model=str(final), frames=99)
    check_conditioning(pipeline, str(final), tmp_path)
    monkeypatch.setattr(fvd, "bootstrap_interval", partial(bootstrap_interval, resamples=4))
    protocol = replace(get_protocol("sprites"), frames=FRAMES.get(name, 5), size=16, fps=8, generated=4, real=4)
    sampling = Sampling(num_inference_steps=1, guidance_scale=1)
    options = dict(folder=tmp_path / "fvd", samples=4, sampling=sampling, batch_size=4)
    [result] = evaluate_pipeline(pipeline, sprites, protocol, [FewNumbers()], Accelerator(), **options)
    assert all(np.isfinite(d.value) for d in (result.generated, result.reconstructed, result.mean_color))


def check_conditioning(pipeline: VidTwinPipeline, model: str, folder: Path) -> None:
    """The one latent is structure: without noise a clip is reconstructed; images need a DiT that takes them."""
    clip = random_clip(pipeline)
    kept = pipeline(structure=clip, num_inference_steps=2, output_type="pt").frames
    with torch.no_grad():
        expected = pipeline.autoencoder(clip.transpose(1, 2) * 2 - 1).sample
    expected = pipeline.video_processor.postprocess_video(expected, output_type="pt")
    torch.testing.assert_close(kept, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="image: this pipeline's transformer has no image_conditioning; train one"):
        pipeline(image=clip[:, :1])
    with pytest.raises(ValueError, match="dynamics: this pipeline's autoencoder has no dynamics latent"):
        pipeline(dynamics=clip)
    Image.new("RGB", (16, 16)).save(folder / "image.png")
    with pytest.raises(UserError, match=r"--image requires a DiT trained with model\.overrides\.image_conditioning"):
        generate(str(folder / "still.mp4"), model=model, image=str(folder / "image.png"))


def random_clip(pipeline: VidTwinPipeline) -> torch.Tensor:
    """(1, T, 3, H, W) in [0, 1]."""
    channels, frames, height, width = pipeline.autoencoder.clip_shape
    return torch.rand(1, frames, channels, height, width, generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize("name", ["AutoencoderKLWan", "AutoencoderKLLTXVideo", "Emu3VQVAE"])
def test_conditioning_varies_a_clip_and_animates_an_image(name):
    model = tiny_peer(name)
    vae = adapt(model)
    vae.set_clip_size(FRAMES.get(name, 5), 16, 16)
    transformer = VidTwinTransformer3DModel.from_preset("tiny-test", vae=vae, image_conditioning=True).eval()
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.15, generator=torch.Generator().manual_seed(1))
    pipeline = VidTwinPipeline(model, transformer, default_scheduler())
    pipeline.set_progress_bar_config(disable=True)
    clip = random_clip(pipeline)

    def sample(**conditioning) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipeline(num_inference_steps=2, output_type="latent", generator=generator, **conditioning).frames

    unconditional, kept = sample(), sample(structure=clip)
    varied = sample(structure=clip, structure_strength=0.5)
    assert not torch.allclose(varied, kept, atol=1e-2) and not torch.allclose(varied, unconditional, atol=1e-2)
    assert torch.equal(sample(structure=clip, structure_strength=1.0), unconditional)
    animated = sample(image=clip)
    assert not torch.allclose(animated, unconditional, atol=1e-2)
    assert torch.equal(sample(image=clip[:, :1]), animated)
    with pytest.raises(ValueError, match="kept_frames requires an autoencoder with a dynamics latent"):
        sample(structure=clip, dynamics=clip, kept_frames=[0])


@pytest.mark.parametrize("name", ["AutoencoderKLWan", "AutoencoderKLMochi", "Emu3VQVAE"])
def test_commands_on_a_video(name, video, tmp_path, capsys):
    folder, latents = tmp_path / "vae", tmp_path / "a.safetensors"
    tiny_peer(name).save_pretrained(folder)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "LTXPipeline"}))  # whose VAE is in vae/
    main(["info", str(tmp_path)])
    facts = capsys.readouterr().out
    assert f"class             {name}" in facts and "GFLOPs" in facts
    main(["reconstruct", video, str(tmp_path / "out.mp4"), "--model", str(folder), "--dtype", "float32"])
    main(["encode", video, str(latents), "--model", str(folder), "--dtype", "float32"])
    main(["decode", str(latents), str(tmp_path / "decoded.mp4"), "--model", str(folder), "--dtype", "float32"])
    first, second = (np.stack(list(FrameReader(str(tmp_path / f"{stem}.mp4")))) for stem in ("out", "decoded"))
    assert first.shape == (20, 40, 48, 3)
    np.testing.assert_array_equal(first, second)
    for command, *words in (("reconstruct", "--components", "structure"), ("components",)):
        sentence = fail(capsys, command, video, tmp_path / "x.mp4", "--model", folder, *words)
        assert f"This {name} has one latent" in sentence
    assert not (tmp_path / "x.mp4").exists()


def test_a_peer_trains_resumes_and_is_loaded(sprites, tmp_path):
    overrides = json.dumps(TINY["AutoencoderKLWan"])
    model = ["model.class_name=AutoencoderKLWan", f"model.overrides={overrides}", "perceptual.weight=0"]
    model += ["gan.weight=0.1", "gan.channels=8", "gan.num_layers=2", "gan.start_step=1", "train.ema_decay=0.5"]
    model += ["data.num_validation_videos=2", "train.logging_steps=1", "train.max_train_steps=4"]

    def run(folder: str, *more: str) -> Path:
        config = settings("AutoencoderKLWan", sprites, tmp_path / folder, *model, *more)
        return train_vae(load_config(VAETrainingConfig, config))

    whole = run("whole")
    vae = load_vae(str(whole), 5, 32, 32)
    assert len(vae.latents_mean) == 4 and type(vae.backbone).__name__ == "AutoencoderKLWan"
    assert (whole / "README.md").read_text().count("AutoencoderKLWan") > 1
    run("resumed", "train.checkpointing_steps=2")
    shutil.rmtree(tmp_path / "resumed" / "checkpoint-4")
    shutil.rmtree(tmp_path / "resumed" / "final")
    again = run("resumed", "resume=latest")
    assert weights_hash(load_vae(str(again))) == weights_hash(vae)
    assert load_vae(str(whole), 9, 16, 24).clip_shape == (3, 9, 16, 24)
    with pytest.raises(UserError, match="16 frames do not fit; the next valid number is 17"):
        load_vae(str(whole), 16)


def test_wrong_folders_and_classes_are_one_sentence(sprites, tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderOobleck"}')
    with pytest.raises(UserError, match="there is no adapter for AutoencoderOobleck"):
        load_vae(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config\.json is not the config of a model"):
        load_vae(str(tmp_path))
    for change, message in (
        ("model.class_name=AutoencoderKLWanX", "no adapter for AutoencoderKLWanX"),
        ("model.overrides={base_dimension: 3}", "base_dimension"),
        ("data.num_frames=6", "6 frames do not fit; the next valid number is 9"),
    ):
        config = settings("AutoencoderKLWan", sprites, tmp_path / "run", "model.class_name=AutoencoderKLWan", change)
        with pytest.raises(UserError, match=message):
            train_vae(load_config(VAETrainingConfig, config))


def test_pickled_weights_are_not_loaded(tmp_path):
    model = tiny_peer("AutoencoderKLWan")
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert list(tmp_path.glob("*.bin"))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_vae(str(tmp_path))


def test_a_peer_is_fine_tuned(sprites, tmp_path):
    parent = tiny_peer("AutoencoderKLWan")
    adapt(parent).set_latent_statistics([0.1] * 4, [2.0] * 4)
    parent.save_pretrained(tmp_path / "parent")
    model = [f"model.pretrained={tmp_path / 'parent'}", "perceptual.weight=0", "gan.weight=0", "train.ema_decay=0.5"]
    model += ["data.num_validation_videos=2", "train.max_train_steps=2", "train.freeze=[encoder, quant_conv]"]

    def config(folder: str, *more: str) -> VAETrainingConfig:
        return load_config(VAETrainingConfig, settings("AutoencoderKLWan", sprites, tmp_path / folder, *model, *more))

    untrained = load_vae(str(train_vae(config("untrained", "train.max_train_steps=0"))))
    assert weights_hash(untrained) == weights_hash(parent)
    tuned = load_vae(str(train_vae(config("tuned"))))
    assert encoder_hash(tuned) == encoder_hash(adapt(parent)) and weights_hash(tuned) != weights_hash(parent)
    assert tuned.latents_mean == [0.1] * 4 and tuned.latents_std == [2.0] * 4
    assert weights_hash(parent) in (tmp_path / "tuned" / "final" / "README.md").read_text()
    for change, message in (
        ("model.overrides={base_dim: 16}", "would change the shape of the weight"),
        ("train.freeze=[encodr]", "the model has no module 'encodr'; its modules are encoder, quant_conv"),
        ("model.class_name=AutoencoderKLMochi", "is a AutoencoderKLWan"),
    ):
        with pytest.raises(UserError, match=message):
            train_vae(config("wrong", change))


def test_the_statistics_of_a_dit(sprites, tmp_path):
    """Measured per channel on request; a fine-tuned DiT keeps those of its parent."""
    tiny_peer("AutoencoderKLHunyuanVideo").save_pretrained(tmp_path / "vae")

    def train(folder: str, *more: str) -> VidTwinPipeline:
        dit = [f"vae={tmp_path / 'vae'}", "train.max_train_steps=1", f"latent_cache={tmp_path / 'latents'}"]
        dit += ["diffusion.num_inference_steps=1", "diffusion.guidance_scale=1", *more]
        config = settings("AutoencoderKLHunyuanVideo", sprites, tmp_path / folder, *dit)
        return VidTwinPipeline.from_pretrained(train_dit(load_config(DiTTrainingConfig, config)))

    first = train("first", "model.preset=tiny-test", "latents.statistics=stream")
    mean, std = first.latent_statistics
    assert len(mean) == len(std) == 2 and std[1] == 1
    second = train("second", f"model.pretrained={tmp_path / 'first' / 'final'}", "train.max_train_steps=0")
    assert second.latent_statistics == (mean, std)
    measured = train("third", "model.preset=tiny-test").latent_statistics
    assert len(measured[0]) == len(measured[1]) == 4
