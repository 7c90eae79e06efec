"""The paper's ablations: values of the same class, about as large, that train and come back from disk."""

from __future__ import annotations

import pytest
import torch

from autoencoder import AutoencoderKLVidTwin
from autoencoder.presets import ABLATIONS, SIZES


def tiny(name: str, bottleneck: str) -> AutoencoderKLVidTwin:
    torch.manual_seed(0)
    return AutoencoderKLVidTwin.from_preset("tiny-test", bottleneck=bottleneck, **ABLATIONS[name])


@pytest.mark.parametrize("bottleneck", ["plain", "residual"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ABLATIONS)
def test_parameters_and_rate_are_within_a_tenth_of_the_full_models(name, size, bottleneck):
    with torch.device("meta"):
        full = AutoencoderKLVidTwin.from_preset(size, bottleneck=bottleneck)
        ablated = AutoencoderKLVidTwin.from_preset(size, bottleneck=bottleneck, **ABLATIONS[name])
    assert ablated.num_parameters() != full.num_parameters()
    assert ablated.num_parameters() == pytest.approx(full.num_parameters(), rel=0.1)
    assert ablated.latent_size == pytest.approx(full.latent_size, rel=0.1)


@pytest.mark.parametrize("bottleneck", ["plain", "residual"])
@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_train_and_round_trip(name, bottleneck, tmp_path):
    model = tiny(name, bottleneck)
    clip = torch.rand(2, *model.clip_shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        posterior = model.encode(clip).latent_dist
        loss = (model.decode(posterior.sample()).sample - clip).square().mean() + 1e-3 * posterior.kl().mean() / 1e4
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    model.eval().save_pretrained(tmp_path)
    loaded = AutoencoderKLVidTwin.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(clip).sample, model(clip).sample)
        odd = torch.rand(1, 3, 5, 40, 24)
        assert model(odd).sample.shape == odd.shape
    for option, value in ABLATIONS[name].items():
        assert loaded.config[option] == value


@pytest.mark.parametrize("bottleneck", ["plain", "residual"])
@torch.no_grad()
def test_a_single_latent_has_an_empty_dynamics_latent(bottleneck):
    model = tiny("single", bottleneck).eval()
    latents = model.unpack(model.encode(torch.rand(2, *model.clip_shape)).latent_dist.mode())
    assert latents.structure.shape == (2, 11, 4, 2, 2) and latents.dynamics.numel() == 0
    both, structure, dynamics = (model.decode(latents, c).sample for c in ("both", "structure", "dynamics"))
    assert torch.equal(both, structure)
    assert torch.equal(dynamics[0], dynamics[1]) and not torch.allclose(both, dynamics)


@torch.no_grad()
def test_spatial_queries_attend_to_one_whole_frame():
    model = tiny("dynamics_qformer", "plain").eval()
    z = torch.randn(1, 32, 4, 4, 4)
    changed = z.clone()
    changed[:, :, 2, 3, 3] += 1
    before, after = (model.dynamics_encoder.spatial_pool(x) for x in (z, changed))
    assert before.shape == (1, 16, 4, 4)  # two queries for columns, two for rows
    moved = (before != after).any(dim=1)[0]
    assert moved[2].all() and not moved[[0, 1, 3]].any()


@torch.no_grad()
def test_temporal_pools_depend_on_the_right_locations():
    """The paper's Q-Former keeps places apart; folded ones do not; the convolution sees one place further."""
    z = torch.randn(1, 32, 4, 4, 4)
    changed = z.clone()
    changed[:, :, 2, 0, 0] += 1
    reach = {}
    for name in ("dynamics_qformer", "structure_conv", "structure_hidden"):
        pool = tiny(name, "plain").eval().structure_encoder.temporal_pool
        before, after = pool(z), pool(changed)
        assert before.shape == (3, 16, 4, 4)
        reach[name] = (before != after).any(dim=1).any(dim=0).sum().item()
    assert reach == {"dynamics_qformer": 1, "structure_conv": 4, "structure_hidden": 16}


def test_unknown_values_are_named():
    for option in ("structure_pool", "structure_fold", "dynamics_pool"):
        with pytest.raises(ValueError, match=f"{option} must be one of"):
            AutoencoderKLVidTwin.from_preset("tiny-test", **{option: "other"})
    with pytest.raises(ValueError, match="requires structure_pool"):
        AutoencoderKLVidTwin.from_preset("tiny-test", structure_pool="conv", structure_fold="hidden")
