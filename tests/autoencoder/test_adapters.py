"""Adapters of other video autoencoders: the class's own results, shapes, sizes that do not fit, statistics."""

from __future__ import annotations

import pytest
import torch
from peers import TINY, tiny_peer

from autoencoder import AutoencoderKLVidTwin, TwinLatents
from autoencoder.adapters import RULES, LatentRule, adapt, adapt_to_latents, build_model, find_class

ONE_STREAM = sorted(TINY)


def valid_clip(vae, batch: int = 1) -> torch.Tensor:
    return torch.rand(batch, *vae.clip_shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def own_round_trip(model, clip: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Latents and reconstruction by the calls of the class's documentation."""
    name = type(model).__name__
    if name == "AutoencoderVidTok":
        return None, model(clip, sample_posterior=False).sample
    if name == "Emu3VQVAE":
        latents = model.quant_conv(model.encoder(clip.transpose(1, 2)).transpose(1, 2))
        frames = model.decoder(model.post_quant_conv(latents).transpose(1, 2), latents.transpose(1, 2))
        return latents, frames.view(len(clip), clip.shape[2], 3, *clip.shape[3:]).transpose(1, 2)
    if name == "AutoencoderKLHunyuanVideo15":  # its attention fails on a batch
        pairs = [own_round_trip(model, part) for part in clip.split(1)] if len(clip) > 1 else None
        if pairs:
            return tuple(torch.cat(parts) for parts in zip(*pairs, strict=True))
    latents = model.encode(clip).latent_dist.mode()
    return latents, model.decode(latents).sample


@torch.no_grad()
@pytest.mark.parametrize("name", ONE_STREAM)
def test_results_and_shapes_are_those_of_the_class(name):
    model = tiny_peer(name)
    vae = adapt(model)
    vae.fit_clip_size(9, 32, 48)
    clip = valid_clip(vae, batch=2)
    posterior = vae.encode(clip).latent_dist
    latents = vae.unpack(posterior.mode())
    sample = vae.decode(posterior.mode()).sample
    own_latents, own_sample = own_round_trip(model, clip)
    if own_latents is not None:
        assert latents.structure.shape[1:] == own_latents.shape[1:] == vae.structure_shape
        torch.testing.assert_close(latents.structure, own_latents, rtol=0, atol=1e-6)
    torch.testing.assert_close(sample, own_sample, rtol=0, atol=1e-6)
    assert sample.shape == clip.shape
    assert vae.latent_size == posterior.mean.shape[1] and not vae.has_dynamics
    assert vae.rule.clip_of(vae.structure_shape) == vae.clip_shape[1:]
    assert posterior.kl().isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("name", ["AutoencoderKLWan", "AutoencoderKLCogVideoX", "Emu3VQVAE"])
@pytest.mark.parametrize("size", [(3, 21, 40), (14, 32, 32), (1, 8, 8)])
def test_other_sizes_are_padded_tiled_and_cut_back(name, size):
    vae = adapt(tiny_peer(name))
    vae.fit_clip_size(9, 32, 32)
    clip = torch.rand(1, 3, *size) * 2 - 1
    latents = vae.encode(clip).latent_dist.mode()
    assert isinstance(latents, TwinLatents)
    sample = vae.decode(latents).sample
    assert sample.shape == clip.shape
    # A clip that is padded by hand gives the same frames.
    vae.disable_tiling()
    with pytest.raises(ValueError, match="Without tiling"):
        vae.encode(clip)
    if all(length <= limit for length, limit in zip(size, vae.clip_shape[1:], strict=True)):
        t, h, w = (limit - length for length, limit in zip(size, vae.clip_shape[1:], strict=True))
        padded = torch.nn.functional.pad(clip, (0, w, 0, h, 0, t), mode="replicate")
        torch.testing.assert_close(vae(padded).sample[:, :, : size[0], : size[1], : size[2]], sample)


@torch.no_grad()
def test_slicing_changes_nothing():
    vae = adapt(tiny_peer("AutoencoderKLHunyuanVideo"), num_frames=5, height=16, width=16)
    clip = valid_clip(vae, batch=3)
    expected = vae(clip).sample
    vae.enable_slicing()
    torch.testing.assert_close(vae(clip).sample, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (dict(num_frames=16), r"encodes 4k \+ 1 frames, of multiples of 4 pixels, so 16 frames do not fit; .* is 17"),
        (dict(height=30), "30 rows do not fit; the next valid number is 32"),
        (dict(width=5), "5 columns do not fit; the next valid number is 8"),
    ],
)
def test_a_size_against_the_rule_is_an_error(size, message):
    with pytest.raises(ValueError, match=message):
        adapt(tiny_peer("AutoencoderKLWan"), **size)


def test_rules_are_consistent():
    causal, plain = LatentRule(4, 8, 4), LatentRule(4, 8, 4, causal=False)
    assert causal.valid_clip(1, 8, 8) == (1, 8, 8) and plain.valid_clip(1, 8, 8) == (4, 8, 8)
    assert causal.valid_clip(6, 9, 16) == (9, 16, 16) and plain.valid_clip(9, 1, 1) == (12, 8, 8)
    assert causal.latent_shape(17, 16, 24) == (4, 5, 2, 3) and plain.latent_shape(16, 16, 24) == (4, 4, 2, 3)
    assert LatentRule(4, 8, 4, frame_step=8).valid_clip(10, 8, 8) == (17, 8, 8)
    for rule in (causal, plain):
        for frames in range(1, 20):
            clip = rule.valid_clip(frames, 20, 20)
            assert clip[0] >= frames and rule.valid_clip(*clip) == clip
            assert rule.clip_of(rule.latent_shape(*clip)) == clip


def test_one_latent_has_no_components():
    vae = adapt(tiny_peer("AutoencoderKLWan"), num_frames=5, height=8, width=8)
    with pytest.raises(ValueError, match="AutoencoderKLWan has one latent, so components must be 'both'"):
        vae.decode(torch.zeros(1, vae.latent_size), components="structure")


def test_statistics_that_a_model_states():
    wan = build_model("AutoencoderKLWan", base_dim=8, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False])
    assert adapt(wan).latents_mean == pytest.approx(wan.config.latents_mean)
    assert adapt(wan).latents_std == pytest.approx(wan.config.latents_std)
    assert adapt(tiny_peer("AutoencoderKLWan")).latents_mean is None  # 16 defaults are not those of 4 channels
    # Mochi's pipelines multiply by scaling_factor / std; Cosmos has a mean for each of 16 frames of a channel.
    mochi = build_model(
        "AutoencoderKLMochi", **TINY["AutoencoderKLMochi"] | dict(latent_channels=12, scaling_factor=2)
    )
    assert adapt(mochi).latents_std == pytest.approx([std / 2 for std in mochi.config.latents_std])
    cosmos = adapt(tiny_peer("AutoencoderKLCosmos"))
    frames = torch.tensor(cosmos.config.latents_mean, dtype=torch.float64).view(4, -1)
    assert frames.shape[1] > 1 and cosmos.latents_mean == pytest.approx(frames.mean(1).tolist())


@pytest.mark.parametrize("name", ["AutoencoderKLWan", "AutoencoderKLLTXVideo", "AutoencoderKLCogVideoX"])
def test_measured_statistics_are_saved_with_the_class(name, tmp_path):
    model = tiny_peer(name)
    vae = adapt(model)
    assert vae.latents_mean is None
    mean = [0.5 + i for i in range(vae.rule.channels)]
    vae.set_latent_statistics(mean, [2.0] * len(mean))
    vae.save_pretrained(tmp_path)
    loaded = adapt(find_class(name).from_pretrained(tmp_path))
    assert loaded.latents_mean == pytest.approx(mean) and loaded.latents_std == pytest.approx([2.0] * len(mean))


@torch.no_grad()
def test_ltx_with_a_decoding_timestep():
    model = build_model(
        "AutoencoderKLLTXVideo", **TINY["AutoencoderKLLTXVideo"] | dict(timestep_conditioning=True)
    ).eval()
    vae = adapt(model, num_frames=5, height=16, width=16)
    clip = valid_clip(vae)
    latents = model.encode(clip).latent_dist.mode()
    torch.testing.assert_close(vae(clip).sample, model.decode(latents, torch.zeros(1)).sample, rtol=0, atol=1e-6)


@torch.no_grad()
def test_vidtok_with_fsq_and_without_causality():
    quantized = TINY["AutoencoderVidTok"] | dict(regularizer="fsq", z_channels=6, double_z=False)
    vae = adapt(build_model("AutoencoderVidTok", **quantized).eval(), num_frames=5, height=16, width=16)
    assert vae(valid_clip(vae)).sample.shape == (1, *vae.clip_shape)
    plain = build_model("AutoencoderVidTok", **TINY["AutoencoderVidTok"] | dict(is_causal=False)).eval()
    vae = adapt(plain, num_frames=16, height=16, width=16)
    clip = valid_clip(vae)
    torch.testing.assert_close(vae(clip).sample, plain(clip, sample_posterior=False).sample, rtol=0, atol=1e-6)


def test_a_vidtwin_needs_no_adapter():
    vidtwin = AutoencoderKLVidTwin.from_preset("tiny-test")
    assert adapt(vidtwin) is vidtwin and vidtwin.backbone is vidtwin and vidtwin.has_dynamics
    assert adapt_to_latents(vidtwin, (1, 2, 3)) is vidtwin


@pytest.mark.parametrize("name", ["AutoencoderKL", "os.system", "AutoencoderOobleck"])
def test_an_unknown_class_is_an_error(name):
    with pytest.raises(ValueError, match=f"there is no adapter for {name}; the supported classes are"):
        find_class(name)
    with pytest.raises(ValueError, match="there is no adapter for Linear"):
        adapt(torch.nn.Linear(1, 1))


def test_every_class_exists_in_the_tested_libraries():
    for name in RULES:
        assert find_class(name).__name__ == name
