"""The linear path: its bases, its fit in closed form, and the model with and without it."""

from __future__ import annotations

import pytest
import torch

from autoencoder import AutoencoderKLVidTwin, TwinLatents
from autoencoder.linear_path import POSTERIOR_STD, LinearFeatures, cosine_basis, lapped_basis

SIZES = dict(linear_path=2, sample_size=(32, 64), temporal_patch_size=2)
SLOW = 2


def tiny(**overrides) -> AutoencoderKLVidTwin:
    torch.manual_seed(0)
    return AutoencoderKLVidTwin.from_preset("tiny-test", **{**SIZES, **overrides}).eval()


@pytest.fixture
def clips() -> torch.Tensor:
    """Smooth moving patterns (32, 3, 4, 32, 64) in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(32, 3, 3, 2, 3, generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(4, 32, 64), mode="trilinear")


def linear_latents(model: AutoencoderKLVidTwin, clips: torch.Tensor) -> tuple[TwinLatents, TwinLatents]:
    """Means and log-variances of the linear path alone."""
    shapes = model.structure_shape, model.dynamics_shape
    moments = [torch.zeros(len(clips), 2 * shape[0], *shape[1:]) for shape in shapes]
    (structure, structure_logvar), (dynamics, dynamics_logvar) = (
        x.chunk(2, dim=1) for x in model.linear_encoder(clips, *moments)
    )
    return TwinLatents(structure, dynamics), TwinLatents(structure_logvar, dynamics_logvar)


# --- bases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("blocks", "length"), [(1, 8), (2, 8), (3, 48), (5, 40)])
def test_bases_are_orthonormal(blocks, length):
    basis = lapped_basis(blocks, length).flatten(0, 1)
    assert basis.shape == (length // 2, length)
    torch.testing.assert_close(basis @ basis.T, torch.eye(length // 2, dtype=torch.float64))
    cosines = cosine_basis(3, length)
    torch.testing.assert_close(cosines @ cosines.T, torch.eye(3, dtype=torch.float64))


def test_blocks_reach_half_a_block_into_the_blocks_beside():
    basis = lapped_basis(4, 64)
    assert (basis[1].abs().amax(dim=0) > 1e-12).nonzero().flatten().tolist() == list(range(8, 40))
    smooth = torch.linspace(0, 3, 64, dtype=torch.float64).sin()
    coefficients = torch.einsum("bkn,n->bk", basis, smooth)
    error = torch.einsum("bkn,bk->n", basis, coefficients) - smooth
    assert error.abs().max() < 0.03


def test_structure_is_slow_and_dynamics_is_fast():
    features = LinearFeatures(tiny().config)
    static = torch.rand(1, 3, 1, 32, 64).expand(-1, -1, 4, -1, -1)
    assert all(part.abs().max() < 1e-5 for part in features.analyze_dynamics(static))
    fast = torch.einsum("kt,kbchw->bcthw", cosine_basis(4, 4)[SLOW:].float(), torch.rand(2, 1, 3, 32, 64))
    assert features.analyze_structure(fast).abs().max() < 1e-5
    assert all(part.abs().max() > 0.1 for part in features.analyze_dynamics(fast))


def test_features_invert_their_synthesis():
    features = LinearFeatures(tiny().config)
    cells = torch.rand(2, 2, 4, features.sizes[0])
    torch.testing.assert_close(features.analyze_structure(features.synthesize_structure(cells)), cells)
    columns, rows = torch.rand(2, 2, 4, features.sizes[1]), torch.rand(2, 2, 2, features.sizes[2])
    synthesized = features.synthesize_dynamics(*features.analyze_dynamics(features.synthesize_dynamics(columns, rows)))
    again = features.synthesize_dynamics(*features.analyze_dynamics(synthesized))
    torch.testing.assert_close(again, synthesized)


# --- fit -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_clips_of_few_components_are_exact():
    """Clips that vary in as many directions as a location of the structure latent has values."""
    model, generator = tiny(), torch.Generator().manual_seed(0)
    features = model.linear_encoder.features
    directions = torch.randn(12, features.sizes[0], generator=generator)
    cells = torch.randn(16, 2, 4, 12, generator=generator) @ directions + 1
    clips = features.synthesize_structure(cells)
    model.fit_linear_path(clips.split(4))
    means, _ = linear_latents(model, clips)
    torch.testing.assert_close(model.linear_decoder(means.structure, None), clips, rtol=1e-3, atol=1e-3)
    fewer = tiny(structure_channels=3)
    fewer.fit_linear_path(clips.split(4))
    assert (fewer.linear_decoder(linear_latents(fewer, clips)[0].structure, None) - clips).abs().max() > 0.1


@torch.no_grad()
def test_latents_have_unit_variance_and_equal_noise_in_pixels(clips):
    model = tiny()
    model.fit_linear_path([clips])
    means, logvars = linear_latents(model, clips)
    for mean, logvar in ((means.structure, logvars.structure), (means.dynamics, logvars.dynamics)):
        assert logvar.max() <= 1e-6
        is_large = logvar < -0.1  # components with less variance than the noise are not scaled up
        std = mean.transpose(0, 1).flatten(2).std(dim=(1, 2)) if mean.ndim == 4 else mean.std(dim=(0, 3, 4))
        assert is_large.any() and std.max() == pytest.approx(1, abs=0.35)
    noisy = means.structure + torch.randn_like(means.structure) * (0.5 * logvars.structure).exp()
    error = model.linear_decoder(noisy, None) - model.linear_decoder(means.structure, None)
    expected = POSTERIOR_STD**2 * means.structure[0].numel() / clips[0].numel()
    assert error.square().mean().item() == pytest.approx(expected, rel=0.15)


@torch.no_grad()
def test_components_add_up_and_improve(clips):
    model = tiny()
    model.fit_linear_path(clips.split(8))
    means, _ = linear_latents(model, clips)
    structure = model.linear_decoder(means.structure, None)
    both = model.linear_decoder(means.structure, means.dynamics)
    torch.testing.assert_close(both, structure + model.linear_decoder(None, means.dynamics))
    errors = [(x - clips).square().mean() for x in (clips.mean(dim=(2, 3, 4), keepdim=True), structure, both)]
    assert errors[0] > 2 * errors[1] and errors[1] > 1.02 * errors[2]
    for components, expected in (("both", both), ("structure", structure)):
        decoded = model.decode(means, components).sample
        assert (decoded - expected).square().mean() < 0.2 * expected.square().mean()


@torch.no_grad()
@pytest.mark.parametrize("experts", [1, 2])
def test_components_depend_on_one_latent(experts, clips):
    model = tiny(linear_path_experts=experts)
    model.fit_linear_path([clips])
    latents, _ = linear_latents(model, clips[:2])
    for components, other in (
        ("structure", TwinLatents(latents.structure, latents.dynamics + 1)),
        ("dynamics", TwinLatents(latents.structure + 1, latents.dynamics)),
    ):
        assert torch.equal(model.decode(latents, components).sample, model.decode(other, components).sample)
        assert not torch.allclose(model.decode(latents).sample, model.decode(other).sample)


@torch.no_grad()
def test_the_fit_depends_on_the_clips_only(clips):
    one, other = tiny(), tiny()
    for model in (one, other):
        model.fit_linear_path(clips.split(8))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    whole = tiny()
    whole.fit_linear_path([clips])
    torch.testing.assert_close(
        whole.linear_decoder(linear_latents(whole, clips)[0].structure, None),
        one.linear_decoder(linear_latents(one, clips)[0].structure, None),
        rtol=1e-3,
        atol=1e-3,
    )


# --- model -----------------------------------------------------------------------------------------------------------


def test_the_network_has_the_weights_of_a_model_without_the_path():
    without, model = tiny(linear_path=0), tiny()
    state = model.state_dict()
    for key, value in without.state_dict().items():
        assert torch.equal(state[key], value) or key == "decoder.proj_out.weight"
    assert {key.split(".")[0] for key in state.keys() - without.state_dict().keys()} == {
        "linear_encoder",
        "linear_decoder",
    }
    assert without.encoder_modules == ("encoder", "structure_encoder", "dynamics_encoder")
    assert model.encoder_modules == (*without.encoder_modules, "linear_encoder")


@torch.no_grad()
@pytest.mark.parametrize(("bottleneck", "experts"), [("plain", 1), ("residual", 3)])
def test_save_and_load(bottleneck, experts, clips, tmp_path):
    model = tiny(bottleneck=bottleneck, linear_path_experts=experts)
    model.fit_linear_path([clips])
    model.save_pretrained(tmp_path)
    loaded = AutoencoderKLVidTwin.from_pretrained(tmp_path)
    assert torch.equal(loaded(clips[:2]).sample, model(clips[:2]).sample)
    assert loaded(torch.zeros(1, 3, 6, 40, 70)).sample.shape == (1, 3, 6, 40, 70)


@pytest.mark.parametrize("experts", [1, 2])
def test_every_parameter_is_trained(experts, clips):
    model = tiny(linear_path_experts=experts).train()
    model.fit_linear_path([clips])
    posterior = model.encode(clips[:2]).latent_dist
    (model.decode(posterior.sample()).sample.square().sum() + posterior.kl().sum()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert [name for name, p in model.named_parameters() if "linear" in name and not p.grad.abs().sum()] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(linear_path=4), "linear_path must be 0 to 3, not 4"),
        (dict(linear_path=-1), "linear_path must be 0 to 3, not -1"),
        (dict(linear_path_experts=0), "linear_path_experts must be at least 1, not 0"),
        (dict(sample_size=(40, 64)), "divide 40 x 64 pixels into blocks of an even size, not 3 x 4"),
        (dict(single_latent=True), "does not support single_latent"),
        (dict(linear_path=1, structure_channels=200), "192 features for the 600 values of a location of structure"),
        (dict(dynamics_channels=80), "48 features for the 80 values of a location of dynamics"),
    ],
)
def test_sizes_that_do_not_fit_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)


def test_fits_that_are_impossible_are_named(clips):
    with pytest.raises(ValueError, match="no linear path: create it with linear_path=4"):
        tiny(linear_path=0).fit_linear_path([clips])
    with pytest.raises(ValueError, match="at least one clip"):
        tiny().fit_linear_path([])
