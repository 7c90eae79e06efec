"""Training on clips that are not square, with patches of two frames: VAE, latent cache, DiT, pipeline."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import fail

from autoencoder import AutoencoderKLVidTwin
from pipelines import VidTwinPipeline
from pipelines.rollout import rollout
from runs import logged
from vidgen.cli import main
from vidgen.common.config import load_config
from vidgen.common.errors import UserError
from vidgen.data.config import clip_size
from vidgen.data.streams import FrameReader
from vidgen.metrics.protocols import get_protocol, protocol_clips
from vidgen.training.config import DiTTrainingConfig, VAETrainingConfig
from vidgen.training.dit_trainer import train_dit
from vidgen.training.vae_trainer import build_vae, train_vae

SIZE = ["data.resolution=[32,48]", "model.overrides={bottleneck: residual, temporal_patch_size: 2}"]


@pytest.fixture(scope="module")
def wide_vae(vae_config, tmp_path_factory) -> Path:
    """The final folder of two steps, with the adaptive weight of a GAN."""
    gan = ["gan.weight=0.1", "gan.start_step=0", "gan.channels=8", "gan.num_layers=2"]
    return train_vae(vae_config(tmp_path_factory.mktemp("vae"), "train.max_train_steps=2", *SIZE, *gan))


@pytest.fixture(scope="module")
def wide_pipeline(dit_config, wide_vae, tmp_path_factory) -> Path:
    """The final folder of two steps."""
    folder = tmp_path_factory.mktemp("dit")
    settings = [f"vae={wide_vae}", "train.max_train_steps=2", "diffusion.independent_timesteps=0.5"]
    return train_dit(dit_config(folder, "data.resolution=[32,48]", *settings))


def test_a_vae_trains(wide_vae):
    vae = AutoencoderKLVidTwin.from_pretrained(wide_vae)
    assert vae.clip_shape == (3, 4, 32, 48) and vae.dynamics_shape == (8, 2, 3 + 2)
    entries = logged(wide_vae.parent)
    assert np.isfinite([entry["loss"] for entry in entries if "loss" in entry]).all()
    assert any("gan_weight" in entry for entry in entries)
    assert "validation/psnr_downsample" in entries[-1]
    card = (wide_vae / "README.md").read_text()
    assert "4 frames, 32 x 48 pixels" in card and "torch.rand(1, 3, 4, 32, 48)" in card


def test_a_dit_trains_on_cached_latents_and_samples_clips(wide_pipeline):
    index = json.loads((wide_pipeline.parent / "latents" / "index.json").read_text())
    assert index["source"]["resolution"] == [32, 48] and index["dynamics_shape"] == [8, 2, 5]
    pipeline = VidTwinPipeline.from_pretrained(wide_pipeline)
    video = pipeline(0, num_inference_steps=2, output_type="pt").frames
    assert video.shape == (1, 4, 3, 32, 48)


def test_frames_share_positions_of_the_dynamics_latent(wide_pipeline):
    pipeline = VidTwinPipeline.from_pretrained(wide_pipeline)
    options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
    clip = torch.rand(1, 4, 3, 32, 48)
    encoded = pipeline.vae.unpack(pipeline.vae.encode(2 * clip.transpose(1, 2) - 1).latent_dist.mode())
    conditions = {"dynamics": clip, "dynamics_strength": 1.0}
    out = pipeline.vae.unpack(pipeline(0, **conditions, kept_frames=[2, 3], output_type="latent", **options).frames)
    torch.testing.assert_close(out.dynamics[:, :, 1], encoded.dynamics[:, :, 1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(out.dynamics[:, :, 0], encoded.dynamics[:, :, 0], atol=1e-2)
    with pytest.raises(ValueError, match=r"kept_frames must be whole groups of 2 frames.*not \[1, 2\]"):
        pipeline(0, **conditions, kept_frames=[1, 2], **options)
    with pytest.raises(ValueError, match="kept_frames must be in 0 to 3"):
        pipeline(0, **conditions, kept_frames=[4], **options)
    assert rollout(pipeline, 7, 0, **options).shape == (1, 7, 3, 32, 48)
    with pytest.raises(ValueError, match="overlap must be a multiple of 2"):
        rollout(pipeline, 7, 0, overlap=1, **options)


def test_videos_are_reconstructed_and_generated(wide_pipeline, sprites, tmp_path, capsys):
    video = next(sprites.rglob("*.mp4"))
    main(["reconstruct", str(video), str(tmp_path / "a.mp4"), "--model", str(wide_pipeline), "--tile-overlap", "31"])
    main(["generate", str(tmp_path / "b.mp4"), "--model", str(wide_pipeline), "--class", "orbit", "--steps", "2"])
    for name, shape in (("a", (32, 32)), ("b", (32, 48))):
        with FrameReader(tmp_path / f"{name}.mp4") as reader:
            assert (reader.height, reader.width) == shape
    wrong = ["reconstruct", str(video), "c.mp4", "--model", str(wide_pipeline), "--tile-overlap", "32"]
    assert "--tile-overlap must be 0 to 31 pixels" in fail(capsys, *wrong)


def test_the_caches_size_is_that_of_the_vae(dit_config, wide_vae, tmp_path):
    with pytest.raises(UserError, match=r"data.resolution is 32, but the latents of .* are those of \[32, 48\]"):
        train_dit(dit_config(tmp_path, f"vae={wide_vae}", "data.resolution=32"))


@pytest.mark.parametrize(("text", "value"), [("64", 64), ("[64,96]", [64, 96]), ("[64,64]", 64), ("null", None)])
def test_the_resolution_is_a_number_or_a_pair(text, value, tmp_path):
    file = tmp_path / "file.yaml"
    file.write_text(f"data: {{root: x, resolution: {text}}}")
    for arguments in (["--config", str(file)], ["data.root=x", f"data.resolution={text}"]):
        assert load_config(VAETrainingConfig, arguments).data.resolution == value
    both = ["--config", str(file), "data.resolution=[8,16]"]
    assert load_config(DiTTrainingConfig, ["vae=v", *both]).data.resolution == [8, 16]


@pytest.mark.parametrize("text", ["[64]", "[1,2,3]", "64x96", "[64,9.5]", "6.5", "true"])
def test_other_resolutions_are_refused(text):
    with pytest.raises(
        UserError, match=r"^data.resolution must be a whole number or a list of two, such as \[64, 96\]"
    ):
        load_config(VAETrainingConfig, ["data.root=x", f"data.resolution={text}"])


@pytest.mark.parametrize("text", ["0", "[64,0]"])
def test_resolutions_are_positive(text):
    with pytest.raises(UserError, match=r"^data.resolution must be 1 or more, not"):
        load_config(VAETrainingConfig, ["data.root=x", f"data.resolution={text}"])


def test_a_resolution_that_patches_do_not_divide(vae_config, tmp_path):
    config = vae_config(tmp_path, "data.resolution=[32,44]")
    with pytest.raises(UserError, match=r"sample_size \(\[32, 44\]\) must be a multiple of patch_size \(8\)"):
        build_vae(config.model, *clip_size(config.data))


@pytest.mark.parametrize("shape", [(32, 48), (48, 32), (90, 100), (40, 200)])
def test_protocols_prepare_clips_of_other_proportions(shape):
    protocol = replace(get_protocol("sprites"), size=(32, 48), frames=1)
    clip = torch.linspace(-1, 1, shape[1]).expand(1, 3, 1, *shape)
    assert protocol_clips(clip, protocol).shape == (1, 3, 1, 32, 48)
