"""The autoencoder as a Diffusers model, with both bottlenecks."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from autoencoder import AutoencoderKLVidTwin, TwinLatents, TwinPosterior
from autoencoder.presets import LATENT_SETTINGS, SIZES


def tiny(**overrides) -> AutoencoderKLVidTwin:
    torch.manual_seed(0)
    return AutoencoderKLVidTwin.from_preset("tiny-test", **overrides)


@pytest.fixture(params=["plain", "residual"])
def model(request) -> AutoencoderKLVidTwin:
    return tiny(bottleneck=request.param).eval()


@pytest.fixture
def clip() -> torch.Tensor:
    return torch.rand(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
def test_save_and_load_is_bit_equal(model, clip, tmp_path):
    model.register_to_config(latents_mean=[0.1, -0.2], latents_std=[1.5, 0.5])
    model.save_pretrained(tmp_path)
    loaded = AutoencoderKLVidTwin.from_pretrained(tmp_path)
    assert loaded.config.bottleneck == model.config.bottleneck
    assert loaded.config.latents_std == [1.5, 0.5]
    assert torch.equal(loaded(clip).sample, model(clip).sample)
    assert torch.equal(loaded.encode(clip).latent_dist.mean, model.encode(clip).latent_dist.mean)


@torch.no_grad()
def test_bf16_loading_and_running(model, clip, tmp_path):
    model.save_pretrained(tmp_path)
    half = AutoencoderKLVidTwin.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    out, exact = half(clip.bfloat16()).sample, model(clip).sample
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).square().mean() < 1e-2 * exact.square().mean()


@torch.no_grad()
def test_shapes_and_return_types(model, clip):
    posterior = model.encode(clip).latent_dist
    assert isinstance(posterior, TwinPosterior)
    assert posterior.mode().shape == (2, model.latent_size)
    assert posterior.kl().shape == (2,)
    latents = model.unpack(posterior.mode())
    assert tuple(latents.structure.shape[1:]) == model.structure_shape == (4, 3, 2, 2)
    assert tuple(latents.dynamics.shape[1:]) == model.dynamics_shape == (8, 4, 4)
    assert model.decode(latents).sample.shape == clip.shape
    assert torch.equal(model.decode(latents, return_dict=False)[0], model.decode(posterior.mode()).sample)
    assert torch.equal(model.encode(clip, return_dict=False)[0].mean, posterior.mean)
    assert torch.equal(model(clip, return_dict=False)[0], model(clip).sample)


@torch.no_grad()
def test_components_depend_on_one_latent(model, clip):
    latents = model.unpack(model.encode(clip).latent_dist.mode())
    other = TwinLatents(latents.structure, latents.dynamics + 1)
    assert torch.equal(model.decode(latents, "structure").sample, model.decode(other, "structure").sample)
    assert not torch.allclose(model.decode(latents, "dynamics").sample, model.decode(other, "dynamics").sample)
    both, structure, dynamics = (model.decode(latents, c).sample for c in ("both", "structure", "dynamics"))
    assert not torch.allclose(structure, dynamics)
    assert not torch.allclose(both, structure)


@torch.no_grad()
def test_dynamics_alone_is_a_sum_over_rows_and_columns(model):
    z = torch.randn(1, *model.dynamics_shape)
    features = model.dynamics_decoder(z)
    rows = features - features.mean(dim=3, keepdim=True)
    torch.testing.assert_close(rows, rows.mean(dim=4, keepdim=True).expand_as(rows), rtol=0, atol=1e-5)


@torch.no_grad()
def test_samples_follow_the_generator(model, clip):
    def sample(seed: int) -> torch.Tensor:
        return model(clip, sample_posterior=True, generator=torch.Generator().manual_seed(seed)).sample

    assert torch.equal(sample(0), sample(0))
    assert not torch.allclose(sample(0), sample(1))


@torch.no_grad()
def test_slicing_and_batches_equal_singles(model, clip):
    whole = model(clip).sample
    singles = torch.cat([model(one).sample for one in clip.split(1)])
    torch.testing.assert_close(whole, singles, rtol=1e-4, atol=1e-5)
    model.enable_slicing()
    assert torch.equal(model(clip).sample, singles)


def test_gradient_checkpointing_changes_nothing(clip):
    def gradients(checkpointing: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model = tiny(bottleneck="residual", qformer_dropout=0.1).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        torch.manual_seed(3)
        loss = (model(clip).sample - clip).square().mean()
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    (loss, plain), (loss_checkpointed, checkpointed) = gradients(False), gradients(True)
    torch.testing.assert_close(loss, loss_checkpointed, rtol=0, atol=1e-5)
    assert plain.keys() == checkpointed.keys()
    for name in plain:
        torch.testing.assert_close(plain[name], checkpointed[name], rtol=0, atol=5e-5)


def test_gradient_checkpointing_recomputes_blocks_and_heads(clip, monkeypatch):
    from autoencoder.blocks import VidTwinBlock

    calls = []
    forward = VidTwinBlock.forward
    monkeypatch.setattr(VidTwinBlock, "forward", lambda self, *a: calls.append(self) or forward(self, *a))
    model = tiny().train()
    model.enable_gradient_checkpointing()
    model(clip).sample.sum().backward()
    assert len(calls) == 2 * 4, "each of the four blocks should run once forward and once again backward"


def test_every_parameter_is_trained(model, clip):
    model.train()
    posterior = model.encode(clip).latent_dist
    (model.decode(posterior.sample()).sample.sum() + posterior.kl().sum()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_kl_and_nll_equal_torch_distributions():
    torch.manual_seed(0)
    mean, logvar, z = torch.randn(3, 2, 10)
    posterior = TwinPosterior(mean, logvar)
    normal = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(posterior.kl(), expected)
    torch.testing.assert_close(posterior.nll(z), -normal.log_prob(z).sum(1))


def test_log_variance_is_clamped():
    posterior = TwinPosterior(torch.zeros(1, 2), torch.tensor([[-100.0, 100.0]]))
    assert posterior.logvar.tolist() == [[-30.0, 20.0]]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.tuples(*[st.integers(1, 4)] * 4), st.tuples(*[st.integers(1, 4)] * 3))
def test_pack_and_unpack_are_inverses(batch, structure_shape, dynamics_shape):
    latents = TwinLatents(torch.randn(batch, *structure_shape), torch.randn(batch, *dynamics_shape))
    packed = latents.pack()
    again = TwinLatents.unpack(packed, structure_shape, dynamics_shape)
    assert torch.equal(again.structure, latents.structure)
    assert torch.equal(again.dynamics, latents.dynamics)
    assert torch.equal(again.pack(), packed)
    assert torch.equal(packed[:, : latents.structure[0].numel()], latents.structure.flatten(1))


@pytest.mark.parametrize(("setting", "rate"), [(1, 0.2046), (2, 0.2153), (3, 0.1721)])
def test_latent_settings_have_the_papers_rates(setting, rate):
    with torch.device("meta"):
        model = AutoencoderKLVidTwin.from_preset("small", setting, num_layers=1)
    assert 100 * model.compression_rate == pytest.approx(rate, abs=5e-4)


def test_default_latent_has_the_papers_shape():
    with torch.device("meta"):
        model = AutoencoderKLVidTwin.from_preset("base", 1, num_layers=1)
    assert (model.structure_shape, model.dynamics_shape) == ((4, 16, 7, 7), (8, 16, 14))
    assert (model.spatial_compression_ratio, model.temporal_compression_ratio) == (32, 1)


def test_fast_preset_has_half_the_tokens_and_a_latent_of_bases_size():
    with torch.device("meta"):
        base, fast = (AutoencoderKLVidTwin.from_preset(name, num_layers=1) for name in ("base", "fast"))
    assert fast.latent_size == base.latent_size
    assert (base.config.temporal_patch_size, fast.config.temporal_patch_size) == (1, 2)
    assert fast.dynamics_shape == (16, 8, 14)


@pytest.mark.parametrize(
    ("name", "setting", "bottleneck"),
    [(name, None, "plain") for name in SIZES] + [("small", s, "residual") for s in LATENT_SETTINGS],
)
def test_every_preset_and_setting_runs(name, setting, bottleneck):
    with torch.device("meta"):
        model = AutoencoderKLVidTwin.from_preset(name, setting, bottleneck=bottleneck, num_layers=1)
        out = model(torch.empty(1, *model.clip_shape)).sample
    assert tuple(out.shape[1:]) == model.clip_shape


@pytest.mark.parametrize("bottleneck", ["plain", "residual"])
@torch.no_grad()
def test_odd_grids_keep_their_size(bottleneck):
    model = tiny(sample_size=40, structure_downsamples=2, dynamics_downsamples=2, bottleneck=bottleneck).eval()
    assert model(torch.zeros(1, 3, 4, 40, 40)).sample.shape == (1, 3, 4, 40, 40)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(sample_size=33), "multiple of patch_size"),
        (dict(hidden_size=30), "hidden_size"),
        (dict(query_dim=15), "query_dim"),
        (dict(bottleneck="other"), "plain, residual"),
    ],
)
def test_invalid_sizes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)


def test_wrong_inputs_are_named(model, clip):
    with pytest.raises(ValueError, match=r"\(B, 3, 4, 32, 32\)"):
        model.encode(clip[:, :2])
    with pytest.raises(ValueError, match="packed latents must be"):
        model.decode(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="components must be"):
        model.decode(torch.zeros(1, model.latent_size), components="all")
    with pytest.raises(ValueError, match="Unknown VidTwin preset 'huge'"):
        AutoencoderKLVidTwin.from_preset("huge")
    with pytest.raises(ValueError, match="the paper has 1, 2 and 3"):
        AutoencoderKLVidTwin.from_preset("base", 4)


@pytest.mark.parametrize("bottleneck", ["plain", "residual"])
def test_frozen_weights_are_not_repeated_for_every_row(bottleneck):
    """For a strided input, PyTorch copies a weight without gradient for every row, which takes three times as long.

    Under autocast in `inference_mode` no weight has a gradient.
    """
    model = AutoencoderKLVidTwin.from_preset("tiny-test", bottleneck=bottleneck).eval()
    clip = torch.rand(1, *model.clip_shape)

    def products() -> tuple[int, int]:
        """FLOPs of batched matrix products, of which attention has a few, and all FLOPs."""
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(clip)
        counts = counter.get_flop_counts()["Global"]
        return counts.get(torch.ops.aten.bmm, 0), sum(counts.values())

    trained, _ = products()
    model.requires_grad_(False)
    frozen, everything = products()
    assert frozen - trained < 0.02 * everything


@pytest.mark.parametrize(("heads", "bottleneck"), [("official", "plain"), ("residual", "residual")])
def test_configs_of_older_versions_load(heads, bottleneck, tmp_path):
    """`bottleneck` was called `heads`, and "plain" was called "official"."""
    model = tiny(bottleneck=bottleneck)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    assert config.pop("bottleneck") == bottleneck
    path.write_text(json.dumps({**config, "heads": heads}))
    for loaded in (AutoencoderKLVidTwin.from_pretrained(tmp_path), tiny(heads=heads)):
        assert loaded.config.bottleneck == bottleneck and "heads" not in loaded.config
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
