"""The VAE's loss against its formulas, and against plain autograd."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from autoencoder import AutoencoderKLVidTwin
from vidgen.common.errors import UserError
from vidgen.losses.adversarial import DiscriminatorLoss, PatchDiscriminator
from vidgen.losses.config import GANConfig, PerceptualConfig, VAELossConfig
from vidgen.losses.lpips import LPIPS
from vidgen.losses.vae import VAELoss, value_and_gradient

LOSS = VAELossConfig(l1_weight=2.0, l2_weight=3.0, kl_weight=5.0)
PERCEPTUAL = PerceptualConfig(weight=0.7, backbone="squeeze", chunk_size=3)
GAN = GANConfig(weight=0.3, channels=8, num_layers=2)


def build(loss=LOSS, perceptual=PERCEPTUAL, gan=GAN, judges=True, **overrides) -> VAELoss:
    """A tiny VAE under random judges; the same one every time."""
    torch.manual_seed(0)
    vae = AutoencoderKLVidTwin.from_preset("tiny-test", bottleneck="residual", **overrides)
    lpips = LPIPS(perceptual.backbone) if judges else None
    discriminator = DiscriminatorLoss(PatchDiscriminator(gan), gan) if judges else None
    if judges:
        # At their first scale deep logits hardly depend on a clip.
        nn.init.normal_(discriminator.discriminator.layers[-1].weight)
    return VAELoss(vae.eval(), loss, perceptual, gan, lpips, discriminator)


def video(batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, 3, 4, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def run(objective: VAELoss, clips: torch.Tensor, gan_scale: float | None = None) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)  # of the latent's noise
    return objective(clips, gan_scale=None if gan_scale is None else torch.tensor(gan_scale))


def by_hand(objective: VAELoss, clips: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every term, with its graph through the model."""
    torch.manual_seed(1)
    (lpips,), discriminator = objective._lpips, objective.discriminator
    posterior = objective.vae.encode(clips).latent_dist
    out = objective.vae.decode(posterior.sample()).sample
    terms = {
        "l1": (out - clips).abs().mean(),
        "l2": (out - clips).square().mean(),
        "kl": posterior.kl().mean() / (3 * 4 * 32 * 32),
        "reconstruction": out,
    }
    if lpips is not None:
        frames = zip(out.unbind(2), clips.unbind(2), strict=True)
        terms["lpips"] = torch.stack([lpips(a, b) for a, b in frames]).mean()
        terms["gan"] = -discriminator.discriminator(out).mean()
    return terms


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_same_gradients(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys() and actual
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-3, atol=1e-6 * largest, msg=name)


# --- the terms -----------------------------------------------------------------------------------------------------


def test_terms_are_means_with_the_documented_units():
    objective = build(judges=False)
    losses = run(objective, video())
    expected = by_hand(objective, video())
    for name in ("l1", "l2", "kl"):
        torch.testing.assert_close(losses[name], expected[name])
    torch.testing.assert_close(losses["loss"], 2 * losses["l1"] + 3 * losses["l2"] + 5 * losses["kl"])
    assert losses.keys() == {"loss", "l1", "l2", "kl"}
    assert [name for name, value in losses.items() if value.requires_grad] == ["loss"]


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_lpips_is_the_mean_over_frames_however_they_are_chunked(chunk_size):
    objective = build(perceptual=PerceptualConfig(weight=0.7, backbone="squeeze", chunk_size=chunk_size))
    losses = run(objective, video())
    terms = by_hand(objective, video())
    torch.testing.assert_close(losses["lpips"], terms["lpips"])
    losses["loss"].backward()
    found = gradients(objective.vae)
    objective.zero_grad()
    (2 * terms["l1"] + 3 * terms["l2"] + 5 * terms["kl"] + 0.7 * terms["lpips"]).backward()
    assert_same_gradients(found, gradients(objective.vae))


def test_lpips_of_some_frames_of_each_clip():
    """The noise selects the frames; the others have no gradient, and their mean is that of all frames."""
    clips, values = video(), []
    for num_frames in (1, clips.shape[2]):
        objective = build(perceptual=PerceptualConfig(weight=1.0, backbone="squeeze", num_frames=num_frames))
        fake = (clips + 0.2 * torch.randn(clips.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
        noise = torch.randn(64, len(clips), 32, generator=torch.Generator().manual_seed(1))
        parts = [objective._perceptual(fake, clips, part) for part in noise[: 64 if num_frames == 1 else 1]]
        values.append(torch.stack([value for value, _ in parts]).mean())
        for part, (_, gradient) in zip(noise, parts, strict=False):
            has_gradient = gradient.abs().sum(dim=(1, 3, 4)) > 0
            assert torch.equal(has_gradient.sum(dim=1), torch.full((len(clips),), num_frames))
            if num_frames == 1:
                assert torch.equal(has_gradient.int().argmax(dim=1), part[:, : clips.shape[2]].argmax(dim=1))
    torch.testing.assert_close(values[0], values[1], rtol=0.1, atol=0)


@pytest.mark.parametrize("kind", ["2d", "3d"])
@pytest.mark.parametrize("loss", ["hinge", "non_saturating"])
def test_a_plain_gan_term(kind, loss):
    gan = GANConfig(weight=0.3, channels=8, num_layers=2, adaptive=False, discriminator=kind, loss=loss)
    objective = build(gan=gan)
    losses = run(objective, video(), gan_scale=0.5)
    assert losses["gan_weight"].item() == pytest.approx(0.15)
    expected = objective.discriminator(by_hand(objective, video())["reconstruction"])["loss"]
    torch.testing.assert_close(losses["gan"], expected)
    total = 2 * losses["l1"] + 3 * losses["l2"] + 5 * losses["kl"] + 0.7 * losses["lpips"] + 0.15 * losses["gan"]
    torch.testing.assert_close(losses["loss"], total)


def test_the_discriminator_is_not_run_before_its_start_step():
    objective = build()
    objective.discriminator.discriminator.forward = None
    losses = run(objective, video(), gan_scale=None)
    assert losses.keys() == {"loss", "l1", "l2", "kl", "lpips"}


# --- the adaptive weight -------------------------------------------------------------------------------------------


def test_adaptive_weight_and_gradients_are_those_of_plain_autograd():
    objective = build()
    clips = video()
    losses = run(objective, clips, gan_scale=0.5)
    (64 * losses["loss"]).backward()  # as a scaler would
    found = {name: gradient / 64 for name, gradient in gradients(objective.vae).items()}
    objective.zero_grad()

    terms = by_hand(objective, clips)
    last = objective.vae.decoder.proj_out.weight
    reconstruction = 2 * terms["l1"] + 3 * terms["l2"] + 0.7 * terms["lpips"]
    norms = [
        torch.autograd.grad(term, last, retain_graph=True)[0].norm().item() for term in (reconstruction, terms["gan"])
    ]
    weight = 0.3 * 0.5 * norms[0] / (norms[1] + 1e-6)
    assert norms[1] > 1e-3  # or the test says little
    assert losses["gan_weight"].item() == pytest.approx(weight, rel=1e-5)
    total = reconstruction + 5 * terms["kl"] + weight * terms["gan"]
    torch.testing.assert_close(losses["loss"], total)
    total.backward()
    assert_same_gradients(found, gradients(objective.vae))


def test_patchify_undoes_the_decoders_last_step():
    decoder = build(judges=False).vae.decoder
    tokens = torch.randn(2, 4, 16, 3 * 8 * 8)
    decoder.proj_out.forward = lambda _: tokens
    torch.testing.assert_close(decoder.patchify(decoder(torch.randn(2, 4, 16, 32))), tokens, rtol=0, atol=0)


def test_adaptive_weight_has_a_ceiling():
    gan = GANConfig(weight=0.3, channels=8, num_layers=2)
    objective = build(gan=gan)
    for parameter in objective.discriminator.parameters():
        nn.init.zeros_(parameter)
    losses = run(objective, video(), gan_scale=1.0)
    assert losses["gan_weight"].item() == pytest.approx(0.3 * 1e4)
    assert losses["loss"].isfinite()


def test_adaptive_weight_with_gradient_checkpointing_and_autocast():
    expected = run(build(), video(), gan_scale=1.0)
    objective = build()
    objective.vae.enable_gradient_checkpointing()
    objective.train()
    for module in objective.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    objective.vae.eval()
    losses = run(objective, video(), gan_scale=1.0)
    torch.testing.assert_close(losses["gan_weight"], expected["gan_weight"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = run(objective, video(), gan_scale=1.0)
    assert all(value.dtype == torch.float32 for value in losses.values())
    torch.testing.assert_close(losses["gan_weight"], expected["gan_weight"], rtol=0.05, atol=0)
    losses["loss"].backward()
    assert all(gradient.isfinite().all() for gradient in gradients(objective).values())


def test_adaptive_weight_is_computed_in_float32():
    objective = build()
    gradients = video(), video(seed=1)
    objective._last_layer_input.append(torch.randn(2, 4, 16, 32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = objective._adaptive_weight(gradients[0], *gradients)
    assert half == objective._adaptive_weight(gradients[0], *gradients)


def test_adaptive_weight_refuses_a_sliced_decoder():
    objective = build()
    objective.vae.enable_slicing()
    with pytest.raises(ValueError, match="own size"):
        run(objective, video(), 1.0)


def test_two_processes_weigh_the_gan_as_one(monkeypatch):
    whole = run(build(), video(4), gan_scale=1.0)  # the noise of each half is drawn from the same numbers below
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(dist, "all_reduce", lambda gradient: sent.append(gradient.clone()))
    alone = [half_of(rank)["gan_weight"].item() for rank in range(2)]
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda gradient: gradient.copy_(sent[0] + sent[1]))
    together = [half_of(rank)["gan_weight"].item() for rank in range(2)]
    assert together[0] == together[1] == pytest.approx(whole["gan_weight"].item(), rel=1e-5)
    assert not any(weight == pytest.approx(together[0], rel=1e-3) for weight in alone)


def half_of(rank: int) -> dict[str, torch.Tensor]:
    objective = build()
    noise = torch.randn(4, objective.vae.latent_size, generator=torch.Generator().manual_seed(1))
    own = slice(2 * rank, 2 * rank + 2)
    return objective(video(4)[own], noise[own], torch.tensor(1.0))


# --- the judges ----------------------------------------------------------------------------------------------------


def test_neither_loss_has_a_gradient_in_the_others_parameters():
    objective = build()
    losses = run(objective, video(), gan_scale=1.0)
    losses["loss"].backward()
    found = gradients(objective.discriminator)
    fake = by_hand(objective, video())["reconstruction"].detach()
    objective.zero_grad()
    alone = objective.discriminator(fake, video())
    alone["loss"].backward()
    assert_same_gradients(found, gradients(objective.discriminator))
    for name in ("d_loss", "d_real", "d_fake"):
        torch.testing.assert_close(losses[name], alone[name])


def test_without_the_gan_the_discriminators_gradients_are_zero():
    objective = build()
    run(objective, video())["loss"].backward()
    found = gradients(objective.discriminator)
    assert len(found) == len(list(objective.discriminator.parameters()))  # or wrappers would wait for them
    assert not any(gradient.any() for gradient in found.values())


def test_the_discriminator_is_saved_with_the_model_and_lpips_is_not():
    objective = build()
    assert {name.split(".")[0] for name in objective.state_dict()} == {"vae", "discriminator"}
    assert all(parameter.requires_grad for parameter in objective.parameters())


def test_critics_too_large_for_the_clips_are_refused_before_training():
    with pytest.raises(UserError, match="48 x 48"):
        build(gan=GANConfig(channels=8, num_layers=4))
    with pytest.raises(UserError, match="31 x 31"):
        build(perceptual=PerceptualConfig(backbone="alex"), gan=GANConfig(num_layers=1), sample_size=24)


def test_without_gradients_only_the_terms_are_computed():
    objective = build()
    expected = run(objective, video(), gan_scale=1.0)
    with torch.no_grad():
        losses = run(objective, video(), gan_scale=1.0)
    for name in ("l1", "l2", "lpips", "kl", "gan"):
        torch.testing.assert_close(losses[name], expected[name])
    assert losses["gan_weight"].item() == pytest.approx(0.3)
    assert not losses["loss"].requires_grad
    with torch.no_grad():
        objective.vae(video())
    assert not objective._last_layer_input  # nothing is kept of a validation


def test_a_copy_of_the_objective_works_by_itself():
    objective = copy.deepcopy(build())
    expected = run(build(), video(), gan_scale=1.0)
    losses = run(objective, video(), gan_scale=1.0)
    torch.testing.assert_close(losses["gan_weight"], expected["gan_weight"])


def test_gradients_survive_float16():
    """Each value's share of a mean over very many would round to nothing."""
    weight = torch.tensor(1.0, dtype=torch.float16)
    x = torch.rand(100_000)
    function = lambda x: 1e-4 * (x.half() * weight).float().mean()  # noqa: E731
    _, gradient = value_and_gradient(function, x)
    torch.testing.assert_close(gradient, torch.full_like(x, 1e-9), rtol=1e-3, atol=0)


# --- stability -----------------------------------------------------------------------------------------------------


class Black(nn.Module):
    """Replaces a VAE that has learned one constant clip exactly: its output is cut at black."""

    clip_shape = (3, 2, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.zeros(()))

    def encode(self, clips: torch.Tensor) -> SimpleNamespace:
        self.shape = clips.shape
        zero = torch.zeros(len(clips), 1)
        posterior = SimpleNamespace(mean=zero, std=zero, kl=lambda: self.level.square().expand(len(clips)))
        return SimpleNamespace(latent_dist=posterior)

    def decode(self, latents: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=self.level.clamp(-1, 1).expand(self.shape))


def test_the_released_loss_reaches_nan_on_a_constant_clip_and_ours_does_not():
    """The released code minimizes |error| / exp(logvar) + logvar, summed over pixels, with a free scalar logvar.

    Once a clip is reconstructed without error nothing holds the log-variance: it falls at every step, until
    exp(-logvar) is infinite and its product with no error is not a number. Here no log-variance is learned.
    """
    clips = torch.full((1, *Black.clip_shape), -1.0)
    model, logvar = Black(), nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.Adam([*model.parameters(), logvar], lr=0.5)
    values = []
    for _ in range(300):
        posterior = model.encode(clips).latent_dist
        error = (model.decode(posterior.mean).sample - clips).abs()
        loss = (error * torch.exp(-logvar) + logvar).sum() + 1e-3 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert math.isfinite(values[50]) and values[50] < -1000 and math.isnan(values[-1])

    model = Black()
    objective = VAELoss(model, VAELossConfig())
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.5)
    for _ in range(300):
        losses = objective(clips)
        optimizer.zero_grad()
        losses["loss"].backward()
        assert model.level.grad.abs() <= 2  # bounded, whatever the error
        optimizer.step()
        assert losses["loss"].isfinite()
    assert list(objective.parameters()) == [model.level]
