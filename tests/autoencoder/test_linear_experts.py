"""Experts of the linear path: the mixture, their fit to clusters of locations, and the routers."""

from __future__ import annotations

import pytest
import torch

from autoencoder import AutoencoderKLVidTwin
from autoencoder.linear_experts import (
    NOISE,
    ExpertDecoder,
    ExpertEncoder,
    expert_levels,
    fit_experts,
    principal_components,
)

SHAPE = (3, 2, 4, 4)  # of the features of a location
FEATURES, VALUES, MIN_STD = 96, 9, 0.05


def build(experts: int = 2) -> tuple[ExpertEncoder, ExpertDecoder]:
    torch.manual_seed(0)
    return ExpertEncoder(SHAPE, VALUES, experts), ExpertDecoder(VALUES, FEATURES, experts)


@pytest.fixture
def locations() -> tuple[torch.Tensor, torch.Tensor]:
    """Features (600, 96) of still locations, whose frequencies over time are 0, and moving ones; which ones move."""
    generator = torch.Generator().manual_seed(0)
    still, moving = torch.randn(2, VALUES - 1, FEATURES, generator=generator)
    still = (still.unflatten(1, SHAPE) * torch.tensor([1.0, 1e-3])[:, None, None]).flatten(1)
    amplitudes = torch.randn(600, VALUES - 1, generator=generator)
    moves = torch.arange(600) % 3 == 0
    return torch.where(moves[:, None], amplitudes @ moving + 1, amplitudes @ still), moves


@torch.no_grad()
def test_the_mixture_is_the_sum_of_weighted_experts():
    encoder, decoder = build(experts=3)
    features, values = torch.randn(2, 5, FEATURES), torch.randn(2, 5, VALUES)
    for experts, x, hints in ((encoder, features, encoder.measure_bands(features)), (decoder, values, values)):
        weights = experts.router(hints).softmax(dim=-1)
        parts = [
            x @ weight.T + bias
            for weight, bias in zip(experts.linear.weight.chunk(3), experts.linear.bias.chunk(3), strict=True)
        ]
        expected = sum(weights[..., k, None] * part for k, part in enumerate(parts))
        torch.testing.assert_close(experts(x), expected)


def test_hints_are_energies_of_quadrants_at_every_frequency_over_time():
    encoder, _ = build()
    features = torch.zeros(SHAPE)
    features[:, 1, 0, 3] = 2.0
    bands = encoder.measure_bands(features.flatten()).unflatten(-1, (2, 2, 2))
    assert bands.exp()[1, 0, 1].item() == pytest.approx(12, rel=1e-3)
    assert (bands.exp() > 0.1).sum() == 1


@torch.no_grad()
def test_two_kinds_of_locations_are_exact_with_two_experts(locations):
    features, moves = locations
    encoder, decoder = build()
    stds = fit_experts(encoder, decoder, features, MIN_STD)
    values = encoder(features)
    torch.testing.assert_close(decoder(values), features, rtol=0.02, atol=0.02)
    # The first value says which expert, and the others have unit variance.
    torch.testing.assert_close(values[:, 0], torch.where(moves, 1.0, -1.0), rtol=0, atol=0.02)
    torch.testing.assert_close(values[:, 1:].std(dim=0), torch.ones(VALUES - 1), rtol=0.2, atol=0)
    assert stds.shape == (VALUES,) and MIN_STD / stds[0].item() == pytest.approx(2 * NOISE)
    noisy = values + torch.randn_like(values) * NOISE * 2 * torch.eye(VALUES)[0]
    assert (decoder(noisy) - features).square().mean() < 1e-3 * features.square().mean()
    mean, basis = principal_components(features, VALUES)
    single = (features - mean) @ basis @ basis.T + mean
    assert (single - features).square().mean() > 100 * (decoder(values) - features).square().mean()


@torch.no_grad()
def test_values_mean_nearly_the_same_to_each_expert(locations):
    """Two experts of locations of one kind: the wrong one decodes nearly as well as the right one."""
    features = locations[0][~locations[1]]
    features = features * torch.linspace(0.5, 1.5, len(features))[:, None] + 0.01 * torch.randn_like(features)
    encoder, decoder = build()
    fit_experts(encoder, decoder, features, MIN_STD)
    values = encoder(features)
    values[:, 0] *= -1
    assert (decoder(values) - features).square().mean() < 0.05 * features.square().mean()


@pytest.mark.parametrize("experts", [2, 3, 5])
def test_levels_have_unit_variance(experts):
    levels = expert_levels(experts)
    assert levels.mean().abs() < 1e-6 and levels.square().mean().item() == pytest.approx(1)
    torch.testing.assert_close(levels.diff(), levels.diff()[:1].expand(experts - 1))


@torch.no_grad()
def test_experts_improve_a_model_on_still_and_moving_clips():
    generator = torch.Generator().manual_seed(0)
    still, moving = (torch.rand(32, 3, *size, generator=generator) * 2 - 1 for size in ((1, 4, 8), (4, 2, 4)))
    parts = [torch.nn.functional.interpolate(part, size=(4, 32, 64), mode="trilinear") for part in (still, moving)]
    clips = torch.cat(parts)[torch.randperm(64, generator=generator)]
    errors = []
    for experts in (1, 2):
        sizes = dict(linear_path=2, sample_size=(32, 64), temporal_patch_size=2, linear_path_experts=experts)
        model = AutoencoderKLVidTwin.from_preset("tiny-test", **sizes)
        model.fit_linear_path(clips.split(16))
        cells = model.linear_encoder.structure(model.linear_encoder.features.analyze_structure(clips))
        decoded = model.linear_decoder.features.synthesize_structure(model.linear_decoder.structure(cells))
        errors.append((decoded - clips).square().mean().item())
    assert errors[1] < 0.9 * errors[0]
