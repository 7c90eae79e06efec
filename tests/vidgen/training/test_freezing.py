"""`train.freeze`: frozen tensors stay bit-identical, and with them latents, statistics and caches."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from autoencoder import AutoencoderKLVidTwin
from pipelines import VidTwinPipeline
from runs import FULL, assert_same_tensors, from_parent, tensors
from vidgen.common.errors import UserError
from vidgen.common.loading import encoder_hash, load_vae, weights_hash
from vidgen.data import latent_cache
from vidgen.training.dit_trainer import encode_latents, train_dit
from vidgen.training.vae_trainer import VAETrainer, train_vae

NO_VALIDATION = "data.num_validation_videos=0"
ENCODER = "train.freeze=[encoder, structure_encoder, dynamics_encoder]"


@pytest.fixture(scope="module")
def decoder_only(vae_config, trained_vae, tmp_path_factory) -> Path:
    """The final VAE of a decoder-only run with a GAN, from `trained_vae`."""
    settings = from_parent(trained_vae, NO_VALIDATION, ENCODER, "train.ema_decay=0.9", *FULL)
    settings += ["train.max_train_steps=4", "train.gradient_checkpointing=true"]
    return train_vae(vae_config(tmp_path_factory.mktemp("decoder_only"), *settings))


def is_frozen(name: str) -> bool:
    return name.split(":")[-1].startswith(("encoder.", "structure_encoder.", "dynamics_encoder."))


def test_frozen_tensors_are_bit_identical_and_all_others_are_trained(decoder_only, trained_vae):
    before, after = tensors(trained_vae), tensors(decoder_only)
    assert before.keys() == after.keys()
    assert {name for name in before if torch.equal(before[name], after[name])} == set(filter(is_frozen, before))
    # The checkpoint has the current weights, and the average of the trained ones only.
    checkpoint = decoder_only.parent / "checkpoint-4"
    current = load_file(checkpoint / "model.safetensors")
    original = load_vae(str(trained_vae)).state_dict()
    for name, tensor in original.items():
        assert torch.equal(tensor, current[f"vae.{name}"]) == is_frozen(name), name
    assert set(load_file(checkpoint / "ema.safetensors")) == {name for name in original if not is_frozen(name)}


def test_with_a_frozen_encoder_the_statistics_are_kept(decoder_only, trained_vae, vae_config, tmp_path):
    parent, tuned = (load_vae(str(folder)).config for folder in (trained_vae, decoder_only))
    assert tuned.latents_mean == parent.latents_mean and tuned.latents_std == parent.latents_std
    # One trained module of the encoder side is enough for new statistics.
    settings = from_parent(trained_vae, NO_VALIDATION, "train.freeze=[encoder,structure_encoder]")
    changed = load_vae(str(train_vae(vae_config(tmp_path, *settings, "train.max_train_steps=2"))))
    assert changed.config.latents_mean != parent.latents_mean


def test_a_pipeline_of_the_parent_works_with_the_new_decoder(trained_dit, decoder_only):
    def generate(**parts: object) -> list[torch.Tensor]:
        pipeline = VidTwinPipeline.from_pretrained(trained_dit, **parts)
        pipeline.set_progress_bar_config(disable=True)
        options = dict(class_labels=1, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
        return [pipeline(**options, output_type=kind).frames for kind in ("latent", "pt")]

    before, after = generate(), generate(vae=load_vae(str(decoder_only)))
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])


def test_counts_are_printed_and_frozen_modules_do_not_drop_out(vae_config, trained_vae, tmp_path, capsys, monkeypatch):
    compute, modes = VAETrainer.compute_losses, []

    def compute_and_look(self, batch):
        modes.append({name: module.training for name, module in self.model.named_modules()})
        return compute(self, batch)

    monkeypatch.setattr(VAETrainer, "compute_losses", compute_and_look)
    settings = from_parent(trained_vae, NO_VALIDATION, "train.freeze=[structure_encoder]")
    train_vae(vae_config(tmp_path, *settings, "train.max_train_steps=3", "train.validation_steps=1"))
    vae = load_vae(str(trained_vae))
    frozen = vae.structure_encoder
    count = sum(parameter.numel() for parameter in frozen.parameters())
    total = vae.num_parameters()
    assert f"{total:,} parameters, {total - count:,} trainable and {count:,} frozen" in capsys.readouterr().out
    for mode in modes:  # also after a validation
        assert {name for name, training in mode.items() if not training} == {
            name for name in mode if name.startswith("structure_encoder")
        }


def test_a_frozen_dit_module_is_bit_identical(dit_config, tmp_path):
    settings = ["train.freeze=[transformer_blocks.0, structure_embed]", "train.ema_decay=0.9"]
    start, end = (
        load_file(train_dit(dit_config(tmp_path / steps, f"train.max_train_steps={steps}", *settings))
        / "transformer" / "diffusion_pytorch_model.safetensors")
        for steps in ("0", "3")
    )  # fmt: skip
    kept = {name for name in start if torch.equal(start[name], end[name])}
    assert {name for name in start if name.startswith(("transformer_blocks.0.", "structure_embed."))} <= kept
    assert len(kept) < len(start) / 2 + 5


# --- Caches ----------------------------------------------------------------------------------------------------------


def test_a_cache_of_the_parent_is_accepted_after_decoder_training_and_refused_after_an_encoder_step(
    dit_config, vae_config, trained_vae, decoder_only, tmp_path, monkeypatch
):
    cache = encode_latents(dit_config(tmp_path / "dit", f"latent_cache={tmp_path / 'cache'}"))
    settings = from_parent(trained_vae, NO_VALIDATION, "train.max_train_steps=1", "train.ema_decay=0")
    settings += ["train.freeze=[encoder, structure_encoder, decoder]", "optim.lr_scheduler=constant"]
    changed = train_vae(vae_config(tmp_path / "changed", *settings))
    with pytest.raises(UserError, match="was made with another vae"):
        encode_latents(dit_config(tmp_path / "dit", f"latent_cache={cache}", f"vae={changed}"))
    monkeypatch.setattr(latent_cache, "encode_shards", None)  # nothing is encoded again
    encode_latents(dit_config(tmp_path / "dit", f"latent_cache={cache}", f"vae={decoder_only}"))


@pytest.mark.parametrize("complete", [True, False])
def test_a_cache_with_the_hash_of_the_whole_model_is_accepted_for_that_model(
    dit_config, trained_vae, decoder_only, tmp_path, monkeypatch, complete
):
    settings = [f"latent_cache={tmp_path / 'cache'}", "latents.shard_size=8"]
    with monkeypatch.context() as patch:  # as earlier versions wrote it
        patch.setattr(latent_cache, "encoder_hash", weights_hash)
        cache = encode_latents(dit_config(tmp_path / "dit", *settings))
    if not complete:
        (cache / "index.json").unlink()
        sorted(cache.glob("latents-*"))[1].unlink()
    encode_latents(dit_config(tmp_path / "dit", *settings))
    assert f'"vae": "{weights_hash(load_vae(str(trained_vae)))}"' in (cache / "index.json").read_text()
    with pytest.raises(UserError, match="was made with another vae"):
        encode_latents(dit_config(tmp_path / "dit", *settings, f"vae={decoder_only}"))


def test_a_dit_run_resumes_with_a_vae_of_the_same_encoder(dit_config, decoder_only, tmp_path, capsys):
    steady = "optim.lr_scheduler=constant_with_warmup"
    train_dit(dit_config(tmp_path, "train.max_train_steps=2", steady))
    swapped = [f"vae={decoder_only}", "train.max_train_steps=3", "resume=latest", steady]
    final = train_dit(dit_config(tmp_path, *swapped))
    assert "will not equal" not in capsys.readouterr().out
    assert_same_tensors(final / "vae", decoder_only)


def test_the_encoder_hash_covers_what_encode_uses():
    torch.manual_seed(0)
    vae = AutoencoderKLVidTwin.from_preset("tiny-test").eval()
    before, clip = encoder_hash(vae), torch.rand(1, *vae.clip_shape) * 2 - 1
    latents = vae.encode(clip).latent_dist.mean
    for name, parameter in vae.named_parameters():
        original = parameter.data.clone()
        parameter.data += 0.1 * torch.randn_like(parameter)
        if re.match(r"(structure_|dynamics_)?encoder\.", name):
            assert encoder_hash(vae) != before, name
        else:
            assert encoder_hash(vae) == before, name
            assert torch.equal(vae.encode(clip).latent_dist.mean, latents), name
        parameter.data = original
