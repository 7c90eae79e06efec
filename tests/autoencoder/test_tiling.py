"""Clips of any size: tiles cover them, blend without a seam, and change nothing where one suffices."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoencoder import AutoencoderKLVidTwin, TwinLatents
from autoencoder.latents import layout_metadata
from autoencoder.tiling import Blender, ClipGeometry, axis_starts, axis_weights, cut

TILE = (4, 32, 32)


def tiny(**overrides) -> AutoencoderKLVidTwin:
    torch.manual_seed(0)
    return AutoencoderKLVidTwin.from_preset("tiny-test", **overrides).eval()


@pytest.fixture(scope="module")
def model() -> AutoencoderKLVidTwin:
    return tiny(bottleneck="residual")


def clip(*size: int, batch: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 60), st.integers(1, 16), st.data())
def test_tiles_cover_an_axis_and_their_weights_add_up_to_one(size, tile, data):
    stride = data.draw(st.integers(1, tile))
    starts = axis_starts(size, tile, stride)
    assert starts[0] == 0 and starts[-1] == max(size - tile, 0)
    assert all(0 < b - a <= stride for a, b in zip(starts, starts[1:], strict=False))
    weights = axis_weights(starts, tile)
    assert (weights >= 0).all()
    total = torch.zeros(max(size, tile))
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + tile] += weight
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.tuples(st.integers(1, 9), st.integers(1, 40), st.integers(1, 40)), st.integers(1, 3))
def test_cutting_and_blending_are_inverses(size, stride):
    geometry = ClipGeometry(size, (4, 12, 12), (stride, 4 * stride, 4 * stride))
    x = clip(*size, batch=2)
    blender = Blender(geometry)
    tiles = cut(x, geometry)
    assert len(tiles) == geometry.num_tiles == len(geometry.tile_starts())
    for tile in tiles:
        assert tile.shape == (2, 3, 4, 12, 12)
        blender.add(tile)
    torch.testing.assert_close(blender.clip(), x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(1, 8, 8), (1, 32, 32), (4, 33, 32), (5, 40, 70), (11, 16, 64), (4, 31, 9)])
@torch.no_grad()
def test_output_shape_equals_input_shape(model, size):
    x = clip(*size, batch=2)
    latents = model.encode(x).latent_dist.mode()
    assert isinstance(latents, TwinLatents) and latents.geometry.size == size
    assert latents.pack().shape == (2, latents.geometry.num_tiles * model.latent_size)
    assert latents.structure.shape == (2, latents.geometry.num_tiles, *model.structure_shape)
    for components in ("both", "structure", "dynamics"):
        assert model.decode(latents, components).sample.shape == x.shape
    assert torch.equal(model(x).sample, model.decode(latents).sample)
    assert model(x, sample_posterior=True, generator=torch.Generator().manual_seed(0)).sample.shape == x.shape


@pytest.mark.parametrize("bottleneck", ["plain", "residual"])
@torch.no_grad()
def test_one_tile_equals_the_model(bottleneck):
    model, x = tiny(bottleneck=bottleneck), clip(*TILE)
    plain = model(x).sample
    still = clip(3, 20, 27)
    padded = torch.nn.functional.pad(still, (0, 5, 0, 12, 0, 1), mode="replicate")
    assert torch.equal(model(still).sample, model(padded).sample[:, :, :3, :20, :27])
    model.disable_tiling()
    assert torch.equal(model(x).sample, plain)


@torch.no_grad()
def test_each_tile_equals_the_model_on_its_crop(model):
    x = clip(6, 50, 32)
    latents = model.encode(x).latent_dist.mode()
    geometry = latents.geometry
    assert geometry.grid == (2, 2, 1)
    for (f, r, c), tile in zip(geometry.tile_starts(), latents.tiles(), strict=True):
        part = x[:, :, f : f + 4, r : r + 32, c : c + 32]
        torch.testing.assert_close(tile.pack(), model.encode(part).latent_dist.mode(), rtol=1e-4, atol=1e-5)
    # Where only one tile reaches, the clip is that tile's.
    first = model.decode(latents.tiles()[0]).sample
    torch.testing.assert_close(model.decode(latents).sample[:, :, :2, :18], first[:, :, :2, :18])


@torch.no_grad()
def test_blending_leaves_no_visible_seams():
    """Blended tiles pass from one's shade to the next's in small steps, in every direction and dtype."""
    geometry = ClipGeometry((7, 50, 50), TILE, (3, 24, 24))
    for dtype in (torch.float32, torch.bfloat16):
        same, shades = Blender(geometry), Blender(geometry)
        for i in range(geometry.num_tiles):
            same.add(torch.full((1, 3, *TILE), 0.3, dtype=dtype))
            shades.add(torch.full((1, 3, *TILE), 0.1 * (i % 2), dtype=dtype))
        assert same.clip().dtype == dtype
        assert (same.clip().float() - 0.3).abs().max() <= (1e-6 if dtype == torch.float32 else 2e-3)
        steps = [shades.clip().float().diff(dim=dim).abs().max() for dim in (3, 4)]
        assert max(steps) <= 0.1 / 8 + 1e-3  # 8 pixels and more of overlap


@torch.no_grad()
def test_a_constant_clip_has_no_seams(model):
    x = torch.full((1, 3, 10, 80, 80), 0.2)
    geometry = model.geometry(10, 80, 80)
    out = model(x).sample
    inside = model(x[:, :, :4, :32, :32]).sample
    for dim in (2, 3, 4):
        assert out.diff(dim=dim).abs().max() <= 1.05 * inside.diff(dim=dim).abs().max(), geometry


@pytest.mark.parametrize("size", [TILE, (6, 40, 33)])
@torch.no_grad()
def test_saved_latents_decode_without_the_clip(model, size, tmp_path):
    x = clip(*size, batch=2)
    latents = model.encode(x).latent_dist.mode()
    latents = latents if isinstance(latents, TwinLatents) else model.unpack(latents)
    latents.save(tmp_path / "latents.safetensors")
    loaded = TwinLatents.load(tmp_path / "latents.safetensors")
    assert loaded.geometry == latents.geometry
    assert torch.equal(loaded.pack(), latents.pack())
    assert torch.equal(model.decode(loaded).sample, model.decode(latents).sample)
    assert torch.equal(model.unpack(latents.pack(), latents.geometry).dynamics, latents.dynamics)
    half = latents.to(torch.bfloat16)
    assert half.geometry == latents.geometry and half.structure.dtype == torch.bfloat16


@torch.no_grad()
def test_tiles_with_slicing_and_gradients(model):
    x = clip(5, 40, 40, batch=2)
    whole = model(x).sample
    model.enable_slicing()
    try:
        torch.testing.assert_close(model(x).sample, whole, rtol=1e-4, atol=1e-5)
    finally:
        model.disable_slicing()
    with torch.enable_grad():
        model(x).sample.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()


def test_kl_and_nll_of_a_tiled_clip_are_sums_over_its_tiles(model):
    posterior = model.encode(clip(5, 32, 32, batch=2)).latent_dist
    assert posterior.kl().shape == (2,)
    sample = posterior.sample(torch.Generator().manual_seed(0))
    assert torch.equal(posterior.nll(sample), posterior.nll(sample.pack()))


def test_strides_are_arguments(model):
    tiled = tiny()
    tiled.enable_tiling(tile_sample_stride_width=16, tile_sample_stride_num_frames=4)
    assert tiled.geometry(8, 32, 64).stride == (4, 24, 16)
    assert tiled.geometry(8, 32, 64).grid == (2, 1, 3)
    tiled.disable_tiling()
    tiled.enable_tiling()
    assert tiled.geometry(8, 32, 64).stride == (4, 24, 16)  # as they were left
    assert model.geometry(*TILE) is None


def test_tiling_arguments_are_those_of_diffusers():
    tiled = tiny()
    tiled.enable_tiling(tile_sample_stride_width=16)
    for on in (dict(use_tiling=True), dict(tile_sample_min_height=True), {}):
        tiled.disable_tiling()
        tiled.enable_tiling(**on)
        assert tiled.use_tiling and tiled.geometry(8, 32, 64).stride == (3, 24, 16)
    for off in (dict(use_tiling=False), dict(tile_sample_min_height=False)):
        tiled.enable_tiling()
        tiled.enable_tiling(**off)
        assert not tiled.use_tiling
    tiled.enable_tiling(32, 32, 4, 16, np.int64(8), 2)  # the order of Diffusers' video autoencoders
    geometry = tiled.geometry(8, 32, 64)
    assert geometry.tile == TILE and geometry.stride == (2, 16, 8)
    assert json.loads(layout_metadata((1,), (1,), geometry)["vidtwin_latents"])["geometry"]["stride"] == [2, 16, 8]


@pytest.mark.parametrize("value", [True, False, 0, -1, 33, 16.0, 16.5, float("nan"), "16"])
@pytest.mark.parametrize("axis", ["height", "width", "num_frames"])
def test_a_stride_is_a_whole_number_up_to_a_tile(value, axis):
    tiled = tiny()
    tile = {"height": 32, "width": 32, "num_frames": 4}[axis]
    with pytest.raises(ValueError, match=f"tile_sample_stride_{axis} must be a whole number between 1 and .*{tile}"):
        tiled.enable_tiling(**{f"tile_sample_stride_{axis}": value})
    assert tiled.geometry(8, 32, 64).stride == (3, 24, 24), "nothing was changed"


@pytest.mark.parametrize("axis", ["width", "num_frames"])
@pytest.mark.parametrize("value", [True, 0, 64, float("nan")])
def test_a_tile_has_the_models_size(value, axis):
    with pytest.raises(ValueError, match=f"tile_sample_min_{axis} can only be .*tile_sample_stride_{axis}"):
        tiny().enable_tiling(**{f"tile_sample_min_{axis}": value})
    with pytest.raises(ValueError, match="use_tiling must be True or False"):
        tiny().enable_tiling(use_tiling=value if value is not True else None)


@pytest.mark.parametrize("stride", [(True, 8, 8), (1.0, 8, 8), (0, 8, 8)])
def test_geometries_require_whole_numbers(stride):
    with pytest.raises(ValueError, match="three positive numbers"):
        ClipGeometry((8, 32, 64), TILE, stride)


def test_unsupported_clips_and_latents_are_named(model, tmp_path):
    for size in ((4, 7, 32), (4, 32, 7), (0, 32, 32)):
        with pytest.raises(ValueError, match="8 x 8 pixels or more"):
            model.encode(torch.zeros(1, 3, *size))
    with pytest.raises(ValueError, match=r"\(B, 3, 4, 32, 32\)"):
        model.encode(torch.zeros(1, 1, 4, 40, 40))
    with pytest.raises(ValueError, match=r"have shape \(0, 3, 4, 32, 32\)"):
        model.encode(torch.zeros(0, 3, 4, 32, 32))
    strict = tiny()
    strict.disable_tiling()
    with pytest.raises(ValueError, match=r"not \(5, 32, 32\): call enable_tiling"):
        strict.encode(torch.zeros(1, 3, 5, 32, 32))
    latents = model.encode(clip(5, 32, 32)).latent_dist.mode()
    with pytest.raises(ValueError, match=r"tiles \(T, H, W\) = \(4, 32, 32\), but this model has tiles"):
        tiny(sample_size=64, patch_size=16).decode(latents)
    with pytest.raises(ValueError, match="in 2 tiles"):
        model.unpack(latents.pack()[:, :-1], latents.geometry)
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="does not hold VidTwin latents"):
        TwinLatents.load(tmp_path / "broken.safetensors")
    from safetensors.torch import save_file

    for shape in ("abc", ["a", 1, 1, 1], 3):
        layout = json.dumps({"structure_shape": shape, "dynamics_shape": [1, 1, 1], "geometry": None})
        save_file({"latents": torch.zeros(1, 3)}, tmp_path / "odd.safetensors", {"vidtwin_latents": layout})
        with pytest.raises(ValueError, match="cannot be read"):
            TwinLatents.load(tmp_path / "odd.safetensors")
    save_file({"latents": torch.zeros(1, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no vidtwin_latents"):
        TwinLatents.load(tmp_path / "other.safetensors")


def test_a_geometry_of_numpy_integers_is_saved():
    geometry = ClipGeometry((8, 32, 64), TILE, tuple(np.array([2, 16, 8])))
    assert json.loads(layout_metadata((1,), (1,), geometry)["vidtwin_latents"])["geometry"]["stride"] == [2, 16, 8]
