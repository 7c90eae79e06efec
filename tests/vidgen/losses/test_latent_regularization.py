"""Scale equivariance and nested dropout of latents: which clips change, and that their latents change alike."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from peers import tiny_peer
from torch.utils.flop_counter import FlopCounterMode

from autoencoder import AutoencoderKLVidTwin, TwinLatents
from autoencoder.adapters import adapt
from autoencoder.pools import AxisAverages
from autoencoder.presets import ABLATIONS
from vidgen.common.errors import UserError
from vidgen.losses.config import VAELossConfig
from vidgen.losses.latent_regularization import (
    DRAWS,
    LatentRegularization,
    draw_factors,
    drop_last_channels,
    reduce_axis,
)
from vidgen.losses.vae import VAELoss
from vidgen.training.sampler import UNIFORMS

WIDE = dict(sample_size=[24, 40], structure_downsamples=0, dynamics_downsamples=0)  # 3 x 5 positions


def vidtwin(**overrides) -> AutoencoderKLVidTwin:
    torch.manual_seed(0)
    return AutoencoderKLVidTwin.from_preset("tiny-test", bottleneck="residual", **overrides).eval()


def regularize(vae=None, **config) -> LatentRegularization:
    return LatentRegularization(vidtwin() if vae is None else vae, VAELossConfig(**config))


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# --- reduction of an axis --------------------------------------------------------------------------------------------


def test_an_axis_is_averaged_and_repeated():
    x = torch.tensor([[0.0, 1, 2, 3, 4, 5]]).repeat(3, 1)
    reduced = reduce_axis(x, torch.tensor([1, 2, 3]), 1, 3)
    assert reduced.tolist() == [[0, 1, 2, 3, 4, 5], [0.5, 2.5, 4.5] * 2, [1, 4] * 3]


def test_a_length_that_is_no_multiple_of_the_factor_is_continued_periodically():
    x = torch.tensor([[0.0, 1, 2, 3, 4]])
    assert reduce_axis(x, torch.tensor([2]), 1, 2).tolist() == [[0.5, 2.5, 2, 1.5, 3.5]]


@pytest.mark.parametrize(("length", "factor"), [(7, 2), (7, 3), (4, 4), (1, 2)])
def test_the_mean_along_the_axis_is_kept(length, factor):
    x = rand(2, length, 3)
    reduced = reduce_axis(x, torch.tensor([factor, 1]), 1, factor)
    torch.testing.assert_close(reduced.mean(1), x.mean(1))
    assert torch.equal(reduced[1], x[1])


def test_factors_are_drawn_evenly_from_all_pairs_but_the_identity():
    vertical, horizontal = draw_factors((torch.arange(8000) + 0.5) / 8000, 3)
    pairs, counts = torch.stack([vertical, horizontal], dim=1).unique(dim=0, return_counts=True)
    assert set(map(tuple, pairs.tolist())) == set(product((1, 2, 3), repeat=2)) - {(1, 1)}
    assert counts.tolist() == [1000] * 8


# --- clips and latents are reduced alike -----------------------------------------------------------------------------


@pytest.mark.parametrize("factors", [(1, 2), (2, 1), (2, 2), (3, 2)])
def test_rows_and_columns_of_dynamics_are_the_averages_of_the_reduced_frame(factors):
    """Whatever the features are: the pooling of VidTwin commutes with the reduction."""
    regularization = regularize(vidtwin(**WIDE), equivariance=1.0, equivariance_max_factor=3)
    vertical, horizontal = (torch.full((2,), factor) for factor in factors)
    features = rand(2, 6, 4, 3, 5)
    latents = TwinLatents(features, AxisAverages()(features))
    reduced = regularization.reduce_latents(latents, vertical, horizontal)
    torch.testing.assert_close(reduced.dynamics, AxisAverages()(reduced.structure))
    assert not torch.allclose(reduced.dynamics, latents.dynamics)


def test_the_clip_is_reduced_as_the_averages_of_its_patches():
    """So an autoencoder of patch means is equivariant: with it both terms of the comparison agree."""
    vae = vidtwin(**WIDE)
    regularization = regularize(vae, equivariance=1.0, equivariance_max_factor=2)
    video, uniform = rand(8, 3, 4, 24, 40), rand(8, DRAWS)
    patches = F.avg_pool3d(video, (1, 8, 8))
    latents = TwinLatents(patches[:, :, :3].repeat(1, 2, 1, 1, 1)[:, :4], rand(8, *vae.dynamics_shape))
    packed, reduced = regularization(latents.pack(), video, uniform)
    expected = F.avg_pool3d(reduced, (1, 8, 8))[:, :, :3]
    torch.testing.assert_close(vae.unpack(packed).structure[:, :3], expected)
    assert not any(torch.equal(a, b) for a, b in zip(video, reduced, strict=True))


def test_only_the_drawn_fraction_is_reduced_and_the_rest_is_untouched():
    regularization = regularize(equivariance=0.25)
    uniform = rand(64, UNIFORMS)
    latents, video = rand(64, regularization.vae.latent_size), rand(64, 3, 4, 32, 32, seed=1)
    changed_latents, changed_video = regularization(latents, video, uniform)
    for before, after in ((latents, changed_latents), (video, changed_video)):
        assert torch.equal((before != after).flatten(1).any(dim=1), uniform[:, 0] < 0.25)


# --- nested dropout --------------------------------------------------------------------------------------------------


def test_the_number_of_kept_channels_is_drawn_evenly_from_one_to_all():
    uniform = (torch.arange(400) + 0.5) / 400
    kept = drop_last_channels(torch.ones(400, 4, 2, 3), uniform, torch.ones(400, dtype=torch.bool))
    counts = kept[:, :, 0, 0].sum(dim=1)
    assert counts.unique(return_counts=True)[1].tolist() == [100] * 4 and counts.min() == 1
    order = kept[:, :, 0, 0].diff(dim=1)
    assert (order <= 0).all(), "a channel was kept after a dropped one"
    assert torch.equal(kept, kept[:, :, :1, :1].expand_as(kept)), "positions differ"


def test_streams_lose_channels_separately_and_other_clips_none():
    regularization = regularize(nested_dropout=0.5)
    vae, uniform = regularization.vae, rand(200, DRAWS)
    video = rand(200, 3, 4, 32, 32)
    latents, unchanged = regularization(torch.ones(200, vae.latent_size), video, uniform)
    structure, dynamics = (part.flatten(2)[..., 0].sum(1) for part in vars_of(vae.unpack(latents)))
    shortened = uniform[:, 2] < 0.5
    assert (structure[~shortened] == 4).all() and (dynamics[~shortened] == 8).all()
    pairs = set(zip(structure[shortened].tolist(), dynamics[shortened].tolist(), strict=True))
    assert {s for s, _ in pairs} == set(range(1, 5)) and {d for _, d in pairs} == set(range(1, 9))
    assert len(pairs) > 8 and unchanged is video


def vars_of(latents: TwinLatents) -> tuple[torch.Tensor, torch.Tensor]:
    return latents.structure, latents.dynamics


# --- the loss --------------------------------------------------------------------------------------------------------


def test_the_loss_compares_the_changed_clip_with_the_decoded_changed_latent():
    vae, config = vidtwin(), VAELossConfig(equivariance=1.0, nested_dropout=1.0, l2_weight=1.0)
    video, noise, uniform = rand(3, 3, 4, 32, 32) * 2 - 1, rand(3, vae.latent_size, seed=1), rand(3, UNIFORMS, seed=2)
    losses = VAELoss(vae, config)(video, noise, None, uniform)
    posterior = vae.encode(video).latent_dist
    latents, target = LatentRegularization(vae, config)(posterior.mean + posterior.std * noise, video, uniform)
    decoded = vae.decode(latents).sample
    torch.testing.assert_close(losses["l1"], F.l1_loss(decoded, target))
    torch.testing.assert_close(losses["l2"], F.mse_loss(decoded, target))
    torch.testing.assert_close(losses["kl"], posterior.kl().mean() / video[0].numel())


def test_a_clips_loss_does_not_depend_on_its_batch():
    vae = vidtwin()
    objective = VAELoss(vae, VAELossConfig(equivariance=0.5, nested_dropout=0.5))
    inputs = rand(4, 3, 4, 32, 32), rand(4, vae.latent_size, seed=1), rand(4, UNIFORMS, seed=2)
    whole = objective(inputs[0], inputs[1], None, inputs[2])["l1"]
    parts = [objective(*(x[i : i + 1] for x in inputs[:2]), None, inputs[2][i : i + 1])["l1"] for i in range(4)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


def test_without_the_options_the_uniform_numbers_change_nothing():
    vae = vidtwin()
    inputs = rand(2, 3, 4, 32, 32), rand(2, vae.latent_size, seed=1), None
    objective = VAELoss(vae, VAELossConfig())
    losses, with_uniform = objective(*inputs), objective(*inputs, rand(2, UNIFORMS))
    assert all(torch.equal(losses[name], with_uniform[name]) for name in losses)
    regularized = VAELoss(vae, VAELossConfig(equivariance=1.0))(*inputs, rand(2, UNIFORMS))
    assert not torch.equal(losses["l1"], regularized["l1"]) and torch.equal(losses["kl"], regularized["kl"])


def test_dropped_channels_get_no_gradient():
    vae = vidtwin()
    latents = torch.ones(1, vae.latent_size, requires_grad=True)
    regularization = regularize(vae, nested_dropout=1.0)
    uniform = torch.tensor([[0.0, 0.0, 0.0, 0.3, 0.7]])  # keeps 2 of 4 channels, and 6 of 8
    changed, _ = regularization(latents, rand(1, 3, 4, 32, 32), uniform)
    changed.sum().backward()
    gradient = vae.unpack(latents.grad)
    assert gradient.structure.flatten(2)[0, :, 0].tolist() == [1, 1, 0, 0]
    assert gradient.dynamics.flatten(2)[0, :, 0].tolist() == [1] * 6 + [0] * 2


def test_a_training_step_costs_the_same_flops():
    vae = vidtwin()
    flops = []
    for config in (VAELossConfig(), VAELossConfig(equivariance=1.0, nested_dropout=1.0)):
        with FlopCounterMode(display=False) as counter:
            VAELoss(vae, config)(rand(1, 3, 4, 32, 32))["loss"].backward()
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0


# --- other autoencoders ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AutoencoderKLWan", "single"])
def test_an_autoencoder_with_one_latent_is_supported(name):
    if name == "single":
        vae = vidtwin(**ABLATIONS["single"])
    else:
        vae = adapt(tiny_peer(name), num_frames=5, height=16, width=16)
    video, uniform = rand(2, *vae.clip_shape), rand(2, UNIFORMS)
    losses = VAELoss(vae, VAELossConfig(equivariance=1.0, nested_dropout=1.0))(video, None, None, uniform)
    assert losses["loss"].isfinite()
    regularization = regularize(vae, equivariance=1.0)
    latents = rand(2, vae.latent_size)
    changed, _ = regularization(latents, video, torch.tensor([[0.0, 0.0, 0, 0, 0], [0.0, 0.99, 0, 0, 0]]))
    before, after = vae.unpack(latents).structure, vae.unpack(changed).structure
    torch.testing.assert_close(after[0], reduce_axis(before, torch.tensor([2, 2]), 4, 2)[0])  # factors 1 and 2
    torch.testing.assert_close(after.mean(dim=(3, 4)), before.mean(dim=(3, 4)))


@pytest.mark.parametrize(
    ("overrides", "config", "message"),
    [
        ({}, dict(equivariance_max_factor=3), "latent of 2 x 2 positions can be reduced by 2 at most"),
        (ABLATIONS["dynamics_qformer"], {}, "dynamics_pool: average"),
        ({}, dict(equivariance_max_factor=1), "equivariance_max_factor"),
    ],
)
def test_latents_that_cannot_be_reduced_are_refused(overrides, config, message):
    with pytest.raises(UserError, match=message):
        VAELoss(vidtwin(**overrides), VAELossConfig(equivariance=0.5, **config))
    VAELoss(vidtwin(**overrides), VAELossConfig(nested_dropout=0.5))
