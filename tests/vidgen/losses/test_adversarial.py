"""The discriminators, and their losses against formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from vidgen.common.errors import UserError
from vidgen.losses.adversarial import DiscriminatorLoss, PatchDiscriminator, gan_scale
from vidgen.losses.config import GANConfig

KINDS = ["2d", "3d"]


def clips(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def build(**config) -> DiscriminatorLoss:
    config = GANConfig(**{"channels": 8, **config})
    torch.manual_seed(0)
    return DiscriminatorLoss(PatchDiscriminator(config), config)


class Judge(nn.Module):
    """Says the first value of each clip, so that a test chooses the logits."""

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        return clips[:, 0, 0, 0, 0]


def judged(values: list[float]) -> torch.Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1, 1).expand(-1, 3, 1, 4, 4)


def chosen(**config) -> DiscriminatorLoss:
    return DiscriminatorLoss(Judge(), GANConfig(**config))


# --- the discriminators --------------------------------------------------------------------------------------------


def test_the_default_is_the_70_pixel_patchgan():
    discriminator = PatchDiscriminator(GANConfig())
    convolutions = [layer for layer in discriminator.layers if isinstance(layer, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.stride[0]) for c in convolutions] == [
        (3, 64, 2),
        (64, 128, 2),
        (128, 256, 2),
        (256, 512, 1),
        (512, 1, 1),
    ]
    field = 1
    for convolution in reversed(convolutions):
        field = field * convolution.stride[0] + convolution.kernel_size[0] - convolution.stride[0]
    assert field == 70
    assert discriminator(clips(2, 3, 3, 64, 64)).shape == (6, 1, 6, 6)


def test_three_dimensions_see_motion_and_halve_the_length():
    frames, clip = (PatchDiscriminator(GANConfig(channels=8, discriminator=kind)) for kind in KINDS)
    video = clips(1, 3, 16, 32, 32)
    shuffled = video[:, :, torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    assert clip(video).shape == (1, 1, 2, 2, 2)
    kernels = [(c.kernel_size, c.stride) for c in clip.layers if isinstance(c, nn.Conv3d)]
    assert kernels == 3 * [((3, 4, 4), (2, 2, 2))] + 2 * [((1, 4, 4), (1, 1, 1))]
    torch.testing.assert_close(frames(video).mean(), frames(shuffled).mean())
    assert not torch.isclose(clip(video).mean(), clip(shuffled).mean(), rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_the_minimum_size_is_the_minimum(kind, num_layers):
    discriminator = PatchDiscriminator(GANConfig(channels=8, num_layers=num_layers, discriminator=kind))
    least = 3 * 2**num_layers
    assert discriminator(clips(1, 3, 1, least, least)).shape[-2:] == (1, 1)
    with pytest.raises(UserError, match=f"{least} x {least} pixels or more, not {least - 1} x {least}"):
        discriminator(clips(1, 3, 1, least - 1, least))
    with pytest.raises(RuntimeError):
        discriminator.layers(clips(1, 3, *([1] if kind == "3d" else []), least - 1, least))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lecam_weight", [0.0, 1.0])
def test_micro_batches_give_the_gradients_of_the_whole_batch(kind, lecam_weight):
    real, fake = clips(4, 3, 4, 32, 32), clips(4, 3, 4, 32, 32, seed=1)
    gradients = []
    for parts in (1, 2, 4):
        objective = build(discriminator=kind, lecam_weight=lecam_weight)
        objective.update_lecam(torch.tensor(0.5), torch.tensor(-0.5))
        for real_part, fake_part in zip(real.chunk(parts), fake.chunk(parts), strict=True):
            (objective(fake_part, real_part)["loss"] / parts).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in objective.parameters()]))
    assert gradients[0].abs().max() > 1e-3
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-3, atol=1e-5 * gradients[0].abs().max().item())


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_float32_under_autocast(kind):
    objective = build(discriminator=kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (
            objective.discriminator.layers(
                clips(1, 3, 4, 32, 32)[:, :, 0] if kind == "2d" else clips(1, 3, 4, 32, 32)
            ).dtype
            == torch.bfloat16
        )
        assert objective.discriminator(clips(1, 3, 4, 32, 32)).dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_frames", [1, 2, 4, 8, 16])
def test_gradients_in_bfloat16_are_those_in_float32(kind, num_frames):
    """oneDNN's were not, of a kernel of three frames over two that are padded."""
    objective = build(discriminator=kind, loss="non_saturating", channels=16, num_layers=2)
    real, fake = clips(2, 3, num_frames, 16, 16), clips(2, 3, num_frames, 16, 16, seed=1)
    gradients = []
    for half in (False, True):
        objective.zero_grad()
        unwritten = [torch.full((size,), float("nan")) for size in (1000, 5000, 50_000, 200_000)]
        del unwritten  # whoever reads memory that is not theirs shall see it
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            losses = objective(fake, real)
        losses["loss"].backward()
        gradients.append([p.grad.clone() for p in objective.parameters()])
    for exact, rounded in zip(*gradients, strict=True):
        assert (rounded - exact).norm() < 0.15 * exact.norm()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"discriminator": "4d"}, "must be one of 2d, 3d, not '4d'"),
        ({"num_layers": 0}, "1 or more"),
        ({"channels": 0}, "1 or more"),
        ({"loss": "wasserstein"}, "hinge, non_saturating, not 'wasserstein'"),
    ],
)
def test_wrong_settings_are_named(wrong, message):
    with pytest.raises(UserError, match=message):
        build(**wrong)


# --- the losses ----------------------------------------------------------------------------------------------------


def test_hinge():
    real, fake = judged([0.5, 3.0]), judged([-0.25, -2.0])
    losses = chosen()(fake, real)
    assert losses["d_loss"].item() == pytest.approx(0.5 * ((0.5 + 0) / 2 + (0.75 + 0) / 2))
    assert losses["loss"].item() == losses["d_loss"].item()
    assert losses["d_real"].item() == pytest.approx(1.75)
    assert losses["d_fake"].item() == pytest.approx(-1.125)
    assert "lecam" not in losses
    assert chosen()(fake)["loss"].item() == pytest.approx(1.125)


def test_non_saturating():
    def softplus(x: float) -> float:
        return math.log1p(math.exp(x))

    real, fake = judged([0.5, 3.0]), judged([-0.25, -2.0])
    losses = chosen(loss="non_saturating")(fake, real)
    expected = 0.5 * ((softplus(-0.5) + softplus(-3)) / 2 + (softplus(-0.25) + softplus(-2)) / 2)
    assert losses["d_loss"].item() == pytest.approx(expected)
    assert chosen(loss="non_saturating")(fake)["loss"].item() == pytest.approx((softplus(0.25) + softplus(2)) / 2)


def test_lecam_holds_logits_by_the_other_sides_running_mean():
    objective = chosen(lecam_weight=0.1)
    real, fake = judged([0.5, -3.0]), judged([-0.25, 2.0])
    assert objective(fake, real)["lecam"].item() == 0  # nothing to hold them by yet
    objective.update_lecam(torch.tensor(1.0), torch.tensor(-1.0))
    losses = objective(fake, real)
    # real above -1: 0.5 by 1.5; fake below 1: -0.25 by 1.25.
    assert losses["lecam"].item() == pytest.approx((1.5**2 + 0) / 2 + (1.25**2 + 0) / 2)
    assert losses["loss"].item() == pytest.approx(losses["d_loss"].item() + 0.1 * losses["lecam"].item())
    reals, fakes = real.clone().requires_grad_(), fake.clone().requires_grad_()
    (losses["loss"].new_tensor(0) + objective(fakes, reals)["loss"]).backward()
    plain_reals, plain_fakes = real.clone().requires_grad_(), fake.clone().requires_grad_()
    chosen()(plain_fakes, plain_reals)["loss"].backward()
    assert (reals.grad - plain_reals.grad)[0].sum().item() == pytest.approx(0.1 * 2 * 1.5 / 2)
    assert (fakes.grad - plain_fakes.grad)[0].sum().item() == pytest.approx(-0.1 * 2 * 1.25 / 2)


def test_lecam_means_start_as_plain_means_then_decay():
    objective = chosen(lecam_weight=1.0)
    for real, fake in [(1.0, -1.0), (2.0, -3.0), (6.0, -8.0)]:
        objective.update_lecam(torch.tensor(real), torch.tensor(fake))
    assert objective.lecam_means.tolist() == pytest.approx([3.0, -4.0])
    for _ in range(97):
        objective.update_lecam(torch.tensor(3.0), torch.tensor(-4.0))
    assert objective.lecam_updates.item() == 100
    objective.lecam_updates.fill_(10_000)
    objective.update_lecam(torch.tensor(4.0), torch.tensor(-5.0))
    assert objective.lecam_means.tolist() == pytest.approx([3.01, -4.01])
    restored = chosen(lecam_weight=1.0)
    restored.load_state_dict(objective.state_dict())
    assert torch.equal(restored.lecam_means, objective.lecam_means)
    assert restored.lecam_updates == objective.lecam_updates


def test_the_terms_are_detached_and_the_loss_is_not():
    objective = build(lecam_weight=1.0)
    losses = objective(clips(1, 3, 2, 32, 32), clips(1, 3, 2, 32, 32, seed=1))
    assert [name for name, value in losses.items() if value.requires_grad] == ["loss"]


def test_learns_to_tell_two_kinds_of_clips():
    for kind in KINDS:
        objective = build(discriminator=kind, num_layers=2)
        optimizer = torch.optim.Adam(objective.parameters(), lr=1e-3)
        for step in range(15):
            noise = clips(4, 3, 4, 16, 16, seed=step)
            losses = objective(noise, noise.mean(dim=(3, 4), keepdim=True).expand_as(noise))
            optimizer.zero_grad()
            losses["loss"].backward()
            optimizer.step()
        assert losses["d_real"] > losses["d_fake"] + 1


# --- when it counts ------------------------------------------------------------------------------------------------


def test_gan_scale():
    config = GANConfig(start_step=20_000, warmup_steps=0)
    assert [gan_scale(step, config) for step in (0, 19_999, 20_000, 10**9)] == [0, 0, 1, 1]  # from step 20 001 on
    config = GANConfig(start_step=10, warmup_steps=3)
    assert [gan_scale(step, config) for step in range(9, 15)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert gan_scale(100, GANConfig(weight=0, start_step=0)) == 0
