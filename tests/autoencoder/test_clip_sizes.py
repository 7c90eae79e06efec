"""Frames that are not square, and patches of several frames."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from autoencoder import AutoencoderKLVidTwin
from autoencoder.bottleneck import DynamicsDecoder, ResidualDynamicsDecoder
from autoencoder.presets import ABLATIONS

WIDE = dict(sample_size=(24, 40), temporal_patch_size=2)


def tiny(**overrides) -> AutoencoderKLVidTwin:
    torch.manual_seed(0)
    return AutoencoderKLVidTwin.from_preset("tiny-test", **overrides).eval()


@torch.no_grad()
@pytest.mark.parametrize("ablation", [{}, *ABLATIONS.values()], ids=["default", *ABLATIONS])
@pytest.mark.parametrize("bottleneck", ["plain", "residual"])
def test_every_bottleneck_encodes_and_decodes_wide_clips(bottleneck, ablation):
    model = tiny(bottleneck=bottleneck, **WIDE, **ablation)
    assert model.clip_shape == (3, 4, 24, 40)
    if not model.config.single_latent:
        assert (model.structure_shape, model.dynamics_shape) == ((4, 3, 2, 3), (8, 2, 3 + 2))
    clip = torch.rand(2, *model.clip_shape) * 2 - 1
    latents = model.unpack(model.encode(clip).latent_dist.mode())
    assert model.decode(latents).sample.shape == clip.shape
    if model.has_dynamics:
        assert model.decode(latents, "dynamics").sample.shape == clip.shape


@torch.no_grad()
def test_a_pair_of_equal_sides_is_a_side():
    side, pair = tiny(), tiny(sample_size=[32, 32])
    assert side.config.sample_size == 32
    assert side.state_dict().keys() == pair.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(side.parameters(), pair.parameters(), strict=True))
    clip = torch.rand(1, *side.clip_shape)
    assert torch.equal(side(clip).sample, pair(clip).sample)


@torch.no_grad()
def test_saved_configs_keep_the_size(tmp_path):
    for name, size, saved in (("square", 32, 32), ("wide", (24, 40), [24, 40])):
        model = tiny(sample_size=size)
        model.save_pretrained(tmp_path / name)
        assert json.loads((tmp_path / name / "config.json").read_text())["sample_size"] == saved
        loaded = AutoencoderKLVidTwin.from_pretrained(tmp_path / name)
        clip = torch.rand(1, *model.clip_shape)
        assert torch.equal(loaded(clip).sample, model(clip).sample)


@torch.no_grad()
def test_configs_without_temporal_patches_load(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    assert config.pop("temporal_patch_size") == 1
    path.write_text(json.dumps(config))
    clip = torch.rand(1, *model.clip_shape)
    assert torch.equal(AutoencoderKLVidTwin.from_pretrained(tmp_path)(clip).sample, model(clip).sample)


@torch.no_grad()
@pytest.mark.parametrize("decoder_class", [DynamicsDecoder, ResidualDynamicsDecoder])
def test_transposed_dynamics_decode_to_transposed_features(decoder_class):
    wide, tall = (decoder_class(tiny(sample_size=size).config) for size in ((24, 40), (40, 24)))
    swapped = {
        (f"row_{key}" if key.startswith("positions") else key.removeprefix("row_")): value
        for key, value in wide.state_dict().items()
    }
    tall.load_state_dict(swapped)
    columns, rows = torch.rand(1, 8, 4, 3), torch.rand(1, 8, 4, 2)
    out = wide(torch.cat([columns, rows], dim=3))
    assert out.shape == (1, 32, 4, 3, 5)
    torch.testing.assert_close(tall(torch.cat([rows, columns], dim=3)), out.transpose(3, 4))


@torch.no_grad()
def test_columns_and_rows_of_dynamics_are_encoded_separately():
    encoder = tiny(**WIDE, dynamics_downsamples=0).dynamics_encoder
    z = torch.rand(1, 32, 2, 3, 5)
    expected = [encoder.conv_out(z.mean(dim=3)), encoder.conv_out(z.mean(dim=4))]
    torch.testing.assert_close(encoder(z), torch.cat(expected, dim=3))


@torch.no_grad()
@pytest.mark.parametrize("size", [(7, 24, 40), (4, 33, 50), (3, 8, 96)])
def test_clips_of_other_sizes_are_tiled(size):
    model = tiny(bottleneck="residual", **WIDE)
    clip = torch.rand(1, 3, *size) * 2 - 1
    latents = model.encode(clip).latent_dist.mode()
    assert latents.geometry.tile == (4, 24, 40) and latents.geometry.stride == (3, 18, 30)
    assert model.decode(latents).sample.shape == clip.shape


@torch.no_grad()
def test_patchify_inverts_the_decoders_last_step():
    decoder = tiny(**WIDE).decoder
    clip = torch.rand(2, 3, 4, 24, 40)
    tokens = decoder.patchify(clip)
    assert tokens.shape == (2, 2, 3 * 5, 2 * 8 * 8 * 3)
    decoder.transformer, decoder.norm_out, decoder.proj_out = nn.Identity(), nn.Identity(), nn.Identity()
    decoder.scale_shift_table = nn.Parameter(torch.zeros(2, 1))
    assert torch.equal(decoder(tokens), clip)


@torch.no_grad()
def test_a_patch_holds_its_pixels_and_frames():
    model = tiny(**WIDE)
    clip, changed = torch.zeros(2, 1, 3, 4, 24, 40)
    changed[:, :, 2:, 8:16, 32:] = 1  # the patch in the second position in time, row 1, column 4
    model.encoder.transformer = nn.Identity()
    difference = (model.encoder(changed) - model.encoder(clip)).abs().sum(dim=3)
    assert difference.nonzero().tolist() == [[0, 1, 1 * 5 + 4]]


def test_fewer_tokens_along_time():
    model = tiny(temporal_patch_size=4, **{"sample_size": (24, 40)})
    assert model.dynamics_shape == (8, 1, 5) and model.temporal_compression_ratio == 4
    assert model.encoder.transformer.temporal_position.shape[0] == 1
    assert tiny().temporal_compression_ratio == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(sample_size=(24, 36)), r"sample_size \(\(24, 36\)\) must be a multiple of patch_size \(8\)"),
        (dict(sample_size=(24,)), r"sample_size must be a positive whole number, or \(height, width\) of two"),
        (dict(sample_size=(24, 40, 8)), "sample_size must be a positive whole number"),
        (dict(sample_size=(24, 40.0)), "sample_size must be a positive whole number"),
        (dict(sample_size=0), "sample_size must be a positive whole number"),
        (dict(sample_size="24x40"), "sample_size must be a positive whole number"),
        (dict(temporal_patch_size=3), r"num_frames \(4\) must be a multiple of temporal_patch_size \(3\)"),
        (dict(temporal_patch_size=0), "must be at least 1"),
    ],
)
def test_wrong_sizes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)


def test_clips_of_a_wrong_size_name_the_models():
    with pytest.raises(ValueError, match=r"\(B, 3, 4, 24, 40\)"):
        tiny(**WIDE).encode(torch.zeros(1, 1, 4, 24, 40))
