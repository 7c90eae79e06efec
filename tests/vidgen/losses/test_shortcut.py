"""Shortcut training against flow maps that are known in closed form."""

from __future__ import annotations

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pipelines import VidTwinTransformer3DModel, default_scheduler
from pipelines.latents import spread_streams
from pipelines.schedulers import JUMP_TYPES, estimate_clean, jump_coefficients, noise_levels
from vidgen.common.errors import UserError
from vidgen.losses.config import DiffusionConfig
from vidgen.losses.diffusion import DRAWS, SHORTCUT_DRAWS, DiffusionLoss
from vidgen.losses.shortcut import Jumps, draw_jumps, shortcut_target

SIZES = (6, 4)
STEPS = 1000


class Oracle(nn.Module):
    """The flow map of data whose latents along a trajectory are scale * u + shift with one u.

    Args:
        scheduler: states the noise levels.
        flow: maps the noise levels alpha and sigma to the scale and the shift.
        only_velocity: predict the velocity for every target timestep.
    """

    structure_shape, dynamics_shape = (SIZES[0], 1, 1, 1), (SIZES[1], 1, 1)

    def __init__(self, scheduler, flow, only_velocity: bool = False) -> None:
        super().__init__()
        self.scheduler, self.flow, self.only_velocity = scheduler, flow, only_velocity
        self.config = SimpleNamespace(num_classes=3, self_conditioning=False, interval_conditioning=True)
        self.calls: list[SimpleNamespace] = []

    def forward(self, noisy, timestep, class_labels, self_condition=None, target_timestep=None):
        grad = torch.is_grad_enabled()
        self.calls.append(SimpleNamespace(t=timestep, r=target_timestep, labels=class_labels, grad=grad))
        target_timestep = timestep if self.only_velocity or target_timestep is None else target_timestep
        place, end = (self.place(spread_streams(x, SIZES)) for x in (timestep, target_timestep))
        end = torch.where(place == end, place - 1e-5, end)  # the velocity is a tiny jump
        scale, shift = self.flow(*self.levels(place))
        end_scale, end_shift = self.flow(*self.levels(end))
        reached = (noisy.double() - shift) / scale * end_scale + end_shift
        if self.is_flow:
            sample = (noisy - reached) / (place - end)
        else:
            sample = ((place - end).cos() * noisy - reached) / (place - end).sin()
        return SimpleNamespace(sample=sample.float())

    @property
    def is_flow(self) -> bool:
        return "prediction_type" not in self.scheduler.config

    def place(self, timestep: torch.Tensor) -> torch.Tensor:
        """The noise level for flow matching, otherwise the angle atan2(sigma, alpha), both real numbers."""
        alpha, sigma = (level.double() for level in noise_levels(self.scheduler, timestep))
        return sigma if self.is_flow else torch.atan2(sigma, alpha)

    def levels(self, place: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (1 - place, place) if self.is_flow else (place.cos(), place.sin())


def gaussian(alpha, sigma):
    """Normal data of standard deviation 0.3: latents keep their place within the normal distribution."""
    return ((0.3 * alpha) ** 2 + sigma**2).sqrt(), 0.0


def point(alpha, sigma):
    """All data are 0.7: latents are 0.7 alpha + sigma * noise."""
    return sigma.clamp(min=1e-12), 0.7 * alpha


def make(prediction_type, flow=gaussian, only_velocity=False, **config):
    scheduler = default_scheduler(prediction_type)
    oracle = Oracle(scheduler, flow, only_velocity)
    return DiffusionLoss(oracle, scheduler, DiffusionConfig(**{"shortcut": 1.0, "class_dropout": 0.0, **config}))


def batch(count: int = 256, std: float = 0.3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, count, sum(SIZES), generator=generator)
    return [
        std * clean,
        torch.arange(count) % 3,
        noise,
        torch.rand(count, DRAWS + 1 + SHORTCUT_DRAWS, generator=generator),
    ]


# --- targets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("independent", [0.0, 1.0])
@pytest.mark.parametrize("prediction_type", JUMP_TYPES)
def test_the_flow_map_of_normal_data_has_no_loss(prediction_type, independent):
    """Two half jumps of a flow map are its whole jump; those of the velocity are not."""
    *arguments, uniform = batch()
    uniform[:, -1] = 0.2 + 0.8 * uniform[:, -1]  # no short jumps, which learn the velocity
    exact, wrong = (
        make(prediction_type, only_velocity=only, independent_timesteps=independent)(*arguments, uniform)
        for only in (False, True)
    )
    assert exact["shortcut"] < 1e-4
    assert wrong["shortcut"] > 30 * exact["shortcut"]


@pytest.mark.parametrize("prediction_type", JUMP_TYPES)
def test_the_velocity_of_a_single_clip_is_its_flow_map(prediction_type):
    clean, labels, noise, uniform = batch()
    objective = make(prediction_type, flow=point, only_velocity=True, shortcut_guidance=3.0)
    losses = objective(torch.full_like(clean, 0.7), labels, noise, uniform)
    assert losses["shortcut"] < 1e-3 and losses["structure"] == losses["dynamics"] == 0


def test_short_jumps_have_the_guided_velocity():
    def predict(latents, timestep, target, without_class):
        assert torch.equal(timestep, target)
        return torch.where(without_class[:, None], 1.0, 2.0).expand_as(latents)

    start = torch.tensor([[500, 500]])
    jumps = Jumps(start, start - 20, torch.tensor([True]))
    target, velocity = shortcut_target(
        default_scheduler("v_prediction"), predict, torch.ones(1, 10), jumps, 3.0, SIZES
    )
    assert (target == 4).all() and (velocity == 2).all()


@pytest.mark.parametrize("self_conditioning", [False, True])
def test_a_teacher_stays_as_it_was_and_gives_the_velocity_of_short_jumps_only(self_conditioning):
    """Two predictions, and with self-conditioning two more with the estimate of the guided velocity."""
    torch.manual_seed(0)
    model = make_model(self_conditioning=self_conditioning).eval()
    options = dict(shortcut=1.0, shortcut_guidance=3.0, class_dropout=0.0, shortcut_ema_decay=0.0)
    objective = DiffusionLoss(
        model, default_scheduler("v_prediction"), DiffusionConfig(shortcut_teacher=True, **options)
    )
    start = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    objective.update_average(torch.tensor(True))

    noisy, labels = torch.randn(2, model.latent_size), torch.tensor([0, 1])
    jumps = Jumps(torch.full((2, 2), 500), torch.tensor([[480, 480], [100, 100]]), torch.tensor([True, False]))
    conditions = {"class_labels": labels}
    taught = objective._teach(noisy, jumps.start, conditions)
    null = torch.full_like(labels, 3)
    estimate = None
    with torch.no_grad():
        for _ in range(1 + self_conditioning):
            one, other = (start(noisy, jumps.start, x, self_condition=estimate).sample for x in (labels, null))
            expected = other + 3 * (one - other)
            estimate = estimate_clean(
                objective.scheduler, expected, spread_streams(jumps.start, objective.sizes), noisy
            )
    torch.testing.assert_close(taught, expected)

    predict = partial(objective._predict_jump, objective.average, conditions)
    arguments = (objective.scheduler, predict, noisy, jumps, 3.0, objective.sizes)
    with_teacher, without = shortcut_target(*arguments, taught)[0], shortcut_target(*arguments)[0]
    assert torch.equal(with_teacher[0], taught[0]) and not torch.allclose(without[0], taught[0])
    assert torch.equal(with_teacher[1], without[1])


def test_a_teacher_needs_jumps():
    with pytest.raises(UserError, match=r"shortcut_teacher teaches jumps: set diffusion\.shortcut above 0 too"):
        DiffusionLoss(make_model(), default_scheduler("v_prediction"), DiffusionConfig(shortcut_teacher=True))


def test_the_target_of_a_long_jump_leads_where_both_halves_lead():
    torch.manual_seed(0)
    scheduler, noisy, answers = default_scheduler("v_prediction"), torch.randn(1, 10), torch.randn(2, 1, 10)
    replies, seen = iter(answers), []

    def predict(latents, timestep, target, without_class):
        seen.append((latents, timestep.tolist(), target.tolist(), without_class.item()))
        return next(replies)

    jumps = Jumps(torch.tensor([[999, 999]]), torch.tensor([[-1, -1]]), torch.tensor([False]))
    target, _ = shortcut_target(scheduler, predict, noisy, jumps, 3.0, SIZES)
    scheduler.set_timesteps(2)
    middle = scheduler.step(answers[0], 999, noisy).prev_sample
    end = scheduler.step(answers[1], 499, middle).prev_sample
    scheduler.set_timesteps(1)
    torch.testing.assert_close(scheduler.step(target, 999, noisy).prev_sample, end, rtol=1e-4, atol=1e-5)
    assert [call[1:] for call in seen] == [([[999] * 2], [[499] * 2], False), ([[499] * 2], [[-1] * 2], False)]
    torch.testing.assert_close(seen[1][0], middle)


# --- draws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", JUMP_TYPES)
def test_intervals_are_log_uniform_and_reach_both_ends(prediction_type):
    objective = make(prediction_type)
    *_, uniform = batch(20_000)
    jumps = objective._draw_jumps(uniform)
    assert jumps.target.min() < 1 if prediction_type == "flow_prediction" else jumps.target.min() == -1
    assert 990 < jumps.start.max() < STEPS and (jumps.target < jumps.start).all()
    interval = (jumps.start - jumps.target)[:, 0].double()
    octaves = torch.histc((STEPS / interval).log2(), bins=6, min=0, max=6) / len(interval)
    torch.testing.assert_close(octaves, torch.full((6,), 1 / 6, dtype=torch.double), rtol=0.1, atol=0)
    assert jumps.is_short.double().mean().item() == pytest.approx(1 / 6, abs=0.02)
    assert ((jumps.midpoint - jumps.target) - (jumps.start - jumps.midpoint)).abs().max() <= 1


def test_one_of_two_independent_streams_waits():
    objective = make("v_prediction", independent_timesteps=0.5, shortcut=0.8)
    *_, uniform = batch(4000)
    jumps = objective._draw_jumps(uniform)
    both, one = jumps.moves.all(dim=1), jumps.moves.sum(dim=1) == 1
    assert both.double().mean().item() == pytest.approx(0.4, abs=0.03)
    assert one.double().mean().item() == pytest.approx(0.4, abs=0.03)
    assert (jumps.start[both, 0] == jumps.start[both, 1]).all() and (jumps.target[both].diff(dim=1) == 0).all()
    assert jumps.moves[one].double().mean(dim=0).tolist() == pytest.approx([0.5, 0.5], abs=0.05)
    waiting = jumps.start[one][~jumps.moves[one]].double()
    assert waiting.mean().item() == pytest.approx(500, abs=30)  # as in the ordinary loss


def test_clips_that_do_not_jump_have_the_timesteps_of_the_ordinary_loss():
    settings = {"independent_timesteps": 0.5, "shortcut": 0.5}
    objective, plain = make("v_prediction", **settings), make("v_prediction", **{**settings, "shortcut": 0.0})
    arguments = batch()
    objective(*arguments), plain(*arguments)
    chosen = arguments[-1][:, DRAWS + 1] < 0.5
    assert torch.equal(objective.transformer.calls[-1].t[~chosen], plain.transformer.calls[-1].t[~chosen])
    assert (objective.transformer.calls[-1].r == objective.transformer.calls[-1].t)[~chosen].all()
    assert plain.transformer.calls[-1].r is None


def test_an_interval_of_the_whole_schedule_is_possible():
    scale = make("v_prediction").scale_timesteps
    moves = torch.ones(1, 2, dtype=torch.bool)
    one = torch.tensor([1.0])
    jumps = draw_jumps(default_scheduler("v_prediction"), scale, torch.full((1, 2), 0.5), moves, one, 1 / 32)
    assert (jumps.start.tolist(), jumps.target.tolist()) == ([[999, 999]], [[-1, -1]])


# --- the loss --------------------------------------------------------------------------------------------------------


def test_only_the_last_of_three_passes_has_a_gradient():
    objective = make("v_prediction")
    objective(*batch())
    calls = [*objective.average.calls, *objective.transformer.calls]
    assert [call.grad for call in calls] == [False, False, True]


def make_model(**options) -> VidTwinTransformer3DModel:
    torch.manual_seed(0)
    shapes = {"structure_shape": (2, 2, 2, 2), "dynamics_shape": (2, 4, 4), "num_classes": 3}
    model = VidTwinTransformer3DModel.from_preset("tiny-test", **{"interval_conditioning": True, **shapes, **options})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("prediction_type", JUMP_TYPES)
def test_the_loss_of_a_clip_does_not_depend_on_its_batch(prediction_type):
    model = make_model(self_conditioning=True, image_conditioning=True)
    config = DiffusionConfig(shortcut=0.5, shortcut_guidance=2.0, independent_timesteps=0.5, loss_weighting="min_snr")
    objective = DiffusionLoss(model, default_scheduler(prediction_type), config)
    normal = [torch.randn(6, model.latent_size) for _ in range(2)]
    arguments = [normal[0], torch.arange(6) % 3, normal[1], torch.rand(6, 9), torch.randn(6, 16)]
    loss = objective(*arguments)["loss"]
    parts = [objective(*(x[i : i + 2] for x in arguments))["loss"] for i in (0, 2, 4)]
    torch.testing.assert_close(sum(parts) / 3, loss, rtol=1e-4, atol=1e-5)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_jumps_have_no_self_conditioning():
    model = make_model(self_conditioning=True)
    estimates = []
    model.register_forward_pre_hook(lambda _, a, k: estimates.append(k.get("self_condition")), with_kwargs=True)
    objective = DiffusionLoss(model, default_scheduler("v_prediction"), DiffusionConfig(shortcut=0.5))
    uniform = torch.full((2, 9), 0.1)
    uniform[1, DRAWS + 1] = 0.9  # the second clip does not jump
    objective(torch.randn(2, model.latent_size), torch.zeros(2, dtype=torch.long), None, uniform)
    assert estimates[:2] == [None, None] and estimates[2].ne(0).any(dim=1).tolist() == [False, True]


def test_what_cannot_jump_is_one_sentence():
    scheduler = default_scheduler("sample")
    with pytest.raises(
        UserError, match=r"needs diffusion.prediction_type v_prediction or flow_prediction, not sample"
    ):
        DiffusionLoss(make_model(), scheduler, DiffusionConfig(shortcut=0.5))
    plain, scheduler = make_model(interval_conditioning=False), default_scheduler("v_prediction")
    with pytest.raises(UserError, match=r"set model.overrides.interval_conditioning=true"):
        DiffusionLoss(plain, scheduler, DiffusionConfig(shortcut=0.5))
    with pytest.raises(ValueError, match="A jump needs prediction_type v_prediction or flow_prediction, not epsilon"):
        jump_coefficients(default_scheduler("epsilon"), *torch.tensor([5, 1]))


def test_jumps_train_beside_captions():
    """Guided targets drop the caption with the class: captions of clips that are guided everywhere change the loss."""
    model = make_model(caption_channels=6)
    config = DiffusionConfig(shortcut=1.0, shortcut_guidance=2.0, shortcut_base=1.0)
    objective = DiffusionLoss(model, default_scheduler("v_prediction"), config)
    normal = [torch.randn(6, model.latent_size) for _ in range(2)]
    captions, mask = torch.randn(6, 5, 6), torch.arange(5) < torch.arange(1, 7)[:, None]
    masks = []
    objective.average.register_forward_pre_hook(
        lambda _, a, k: masks.append(k["encoder_attention_mask"]), with_kwargs=True
    )
    uniform = torch.full((6, 9), 0.5)
    loss = objective(normal[0], torch.arange(6) % 3, normal[1], uniform, None, (captions, mask))["loss"]
    loss.backward()
    assert all(p.grad is not None for p in model.caption_embed.parameters())
    assert any(not used.any() for used in masks) and any(used.any() for used in masks)
