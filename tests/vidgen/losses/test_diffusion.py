"""The denoising loss against its formulas."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from tiny_text import tiny_text_encoder
from torch import nn

from pipelines import VidTwinTransformer3DModel, default_scheduler
from pipelines.schedulers import PREDICTION_TYPES, noise_levels
from pipelines.text import encode_captions, tokenize_captions
from vidgen.common.errors import UserError
from vidgen.data.config import TextConfig
from vidgen.losses.config import DiffusionConfig
from vidgen.losses.diffusion import DRAWS, DiffusionLoss, drop_captions, min_snr_weight

SIZES = (6, 4)


class Oracle(nn.Module):
    """Knows the clean latents, and answers what a scheduler's prediction type asks for, wrong by `error` (L,)."""

    structure_shape, dynamics_shape = (SIZES[0], 1, 1, 1), (SIZES[1], 1, 1)

    def __init__(self, clean: torch.Tensor, scheduler, self_conditioning: bool = False, error=0.0) -> None:
        super().__init__()
        self.clean, self.scheduler, self.error = clean, scheduler, error
        self.config = SimpleNamespace(num_classes=3, self_conditioning=self_conditioning, image_residual=0.0)
        self.images: list[dict[str, torch.Tensor]] = []
        self.labels: list[torch.Tensor] = []
        self.timesteps: list[torch.Tensor] = []
        self.estimates: list[torch.Tensor | None] = []

    def forward(self, noisy, timestep, class_labels, self_condition=None, **image):
        self.images.append(image)
        self.labels.append(class_labels)
        self.timesteps.append(timestep)
        self.estimates.append(self_condition)
        t = timestep[:, None].expand(-1, 2) if timestep.ndim == 1 else timestep
        t = torch.cat([t[:, i : i + 1].expand(-1, size) for i, size in enumerate(SIZES)], dim=1)
        clean = self.clean.expand(len(noisy), -1).double()
        kind = self.scheduler.config.get("prediction_type", "flow_prediction")
        if kind == "flow_prediction":
            return SimpleNamespace(sample=((noisy - clean) / (t / 1000).clamp(min=1e-3)).float() + self.error)
        alpha = self.scheduler.alphas_cumprod[t.long()].sqrt().double()
        sigma = (1 - alpha**2).sqrt()
        noise = (noisy.double() - alpha * clean) / sigma
        answer = {"sample": clean, "epsilon": noise, "v_prediction": alpha * noise - sigma * clean}[kind]
        return SimpleNamespace(sample=answer.float() + self.error)


def make(prediction_type: str, batch: int = 64, **config):
    """An objective around an oracle, the latents it knows (all alike, so that any part of a batch will do), labels."""
    torch.manual_seed(0)
    clean = torch.randn(1, sum(SIZES))
    options = {key: config.pop(key) for key in ("self_conditioning", "error") if key in config}
    scheduler = default_scheduler(prediction_type)
    oracle = Oracle(clean, scheduler, **options)
    objective = DiffusionLoss(oracle, scheduler, DiffusionConfig(**config))
    return objective, clean.repeat(batch, 1), torch.arange(batch) % 3


# --- targets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("independent", [0.0, 0.5])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_right_prediction_has_no_loss(prediction_type, independent):
    objective, clean, labels = make(prediction_type, independent_timesteps=independent)
    assert objective(clean, labels)["loss"] < 1e-3
    assert objective(clean + 1, labels)["loss"] > 0.01


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_errors_of_both_streams_are_logged_unweighted_and_detached(prediction_type):
    error = torch.cat([torch.full((SIZES[0],), 2.0), torch.full((SIZES[1],), 3.0)]).requires_grad_()
    objective, clean, labels = make(prediction_type, error=error, loss_weighting="min_snr")
    losses = objective(clean, labels)
    assert losses["structure"].item() == pytest.approx(4, rel=0.02)
    assert losses["dynamics"].item() == pytest.approx(9, rel=0.02)
    assert losses["loss"].requires_grad
    assert not losses["structure"].requires_grad and not losses["dynamics"].requires_grad


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_without_a_weighting_the_loss_is_the_mean_over_all_values(prediction_type):
    objective, clean, labels = make(prediction_type, error=1.0)
    losses = objective(clean, labels)
    expected = (SIZES[0] * losses["structure"] + SIZES[1] * losses["dynamics"]) / sum(SIZES)
    torch.testing.assert_close(losses["loss"], expected)


# --- weighting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_min_snr_makes_every_target_weigh_as_x0_under_the_capped_snr(prediction_type):
    """Hang et al. (2023): any target's weighted error is min(SNR, gamma) |x0 - x0'|^2."""
    scheduler = default_scheduler(prediction_type)
    timestep = torch.arange(1, 998)
    alpha, sigma = (level.double() for level in noise_levels(scheduler, timestep))
    clean, wrong, noise = torch.randn(3, len(timestep), dtype=torch.double).unbind()
    noisy = alpha * clean + sigma * noise

    def answer(x0):  # what a model with this x0 in mind predicts from the noisy latents
        implied = (noisy - alpha * x0) / sigma
        return {
            "sample": x0,
            "epsilon": implied,
            "v_prediction": alpha * implied - sigma * x0,
            "flow_prediction": implied - x0,
        }[prediction_type]

    weight = min_snr_weight(prediction_type, alpha, sigma, 5.0)
    expected = (alpha / sigma).square().clamp(max=5) * (clean - wrong).square()
    torch.testing.assert_close(weight * (answer(clean) - answer(wrong)).square(), expected, rtol=1e-5, atol=1e-9)


def test_min_snr_weights_at_points_computed_by_hand():
    alpha, sigma = torch.tensor([0.6, 0.8, 0.995]), torch.tensor([0.8, 0.6, 0.1])  # SNR 0.5625, 1.78, 99
    close = lambda kind, values: torch.testing.assert_close(  # noqa: E731
        min_snr_weight(kind, alpha, sigma, 1.0), torch.tensor(values), rtol=1e-4, atol=1e-4
    )
    close("sample", [0.5625, 1.0, 1.0])
    close("epsilon", [1.0, 0.5625, 1 / 99.0025])
    close("v_prediction", [0.36, 0.36, 0.01])
    alpha, sigma = torch.tensor([0.25, 0.5, 0.75]), torch.tensor([0.75, 0.5, 0.25])  # SNR 1/9, 1, 9
    close("flow_prediction", [0.0625, 0.25, 0.0625])


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(("alpha", "sigma"), [(0.0, 1.0), (1.0, 0.0)])
def test_min_snr_is_finite_at_both_ends(prediction_type, alpha, sigma):
    weight = min_snr_weight(prediction_type, torch.tensor([alpha]), torch.tensor([sigma]), 5.0)
    ends = {"sample": (0, 5), "epsilon": (1, 0), "v_prediction": (0, 0), "flow_prediction": (0, 0)}
    assert weight.item() == ends[prediction_type][0 if alpha == 0 else 1]


@pytest.mark.parametrize("independent", [0.0, 1.0])
@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction", "epsilon"])
def test_the_weights_are_those_of_each_streams_timestep(prediction_type, independent):
    """With an error of 1 everywhere the loss is the mean weight."""
    objective, clean, labels = make(
        prediction_type, error=1.0, loss_weighting="min_snr", min_snr_gamma=3.0, independent_timesteps=independent
    )
    loss = objective(clean, labels)["loss"]
    t = objective.transformer.timesteps[-1]
    t = t[:, None].expand(-1, 2) if t.ndim == 1 else t
    signal = objective.scheduler.alphas_cumprod[t]
    snr = signal / (1 - signal)
    weight = snr.clamp(max=3) / {"sample": 1, "epsilon": snr, "v_prediction": snr + 1}[prediction_type]
    expected = (SIZES[0] * weight[:, 0] + SIZES[1] * weight[:, 1]).mean() / sum(SIZES)
    torch.testing.assert_close(loss, expected, rtol=2e-3, atol=1e-4)


# --- timesteps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["v_prediction", "flow_prediction"])
@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_fraction_of_the_clips_has_a_timestep_per_stream(prediction_type, share):
    objective, clean, labels = make(prediction_type, batch=4000, independent_timesteps=share)
    objective(clean, labels)
    structure, dynamics = objective.transformer.timesteps[-1].double().unbind(1)
    apart = structure != dynamics
    assert apart.double().mean().item() == pytest.approx(share, abs=0.03)
    assert abs(torch.corrcoef(torch.stack([structure[apart], dynamics[apart]]))[0, 1].item()) < 0.1
    for drawn in (structure, dynamics):
        assert drawn.mean().item() == pytest.approx(500, abs=20)
        assert drawn.std().item() == pytest.approx(1000 / math.sqrt(12), rel=0.05)


def test_shared_timesteps_are_one_for_both_streams_and_uniform_over_all_steps():
    objective, clean, labels = make("sample", batch=20_000)
    objective(clean, labels)
    timestep = objective.transformer.timesteps[-1]
    assert timestep.shape == (20_000,) and timestep.dtype == torch.int64
    assert timestep.min() == 0 and timestep.max() == 999


@pytest.mark.parametrize("prediction_type", ["v_prediction", "flow_prediction"])
def test_logit_normal_timesteps_follow_their_distribution(prediction_type):
    objective, clean, labels = make(
        prediction_type, batch=4000, timestep_sampling="logit_normal", logit_mean=0.5, logit_std=0.8
    )
    objective(clean, labels)
    drawn = objective.transformer.timesteps[-1]
    assert drawn.is_floating_point() == (prediction_type == "flow_prediction")  # others have whole steps
    drawn = drawn.double()
    assert drawn.min() >= 0 and drawn.max() < 1000
    logit = ((drawn + 0.5 * (prediction_type == "v_prediction")) / 1000).logit()
    assert logit.mean().item() == pytest.approx(0.5, abs=0.05)
    assert logit.std().item() == pytest.approx(0.8, rel=0.05)


def test_flow_matching_shows_the_model_noise_in_proportion_to_its_timestep():
    objective, clean, labels = make("flow_prediction", batch=4000)
    seen = []
    objective.transformer.register_forward_pre_hook(lambda module, arguments: seen.append(arguments))
    objective(torch.zeros_like(clean), labels)
    noisy, timestep = seen[0]
    assert timestep.min() >= 0 and timestep.max() < 1000 and not torch.equal(timestep, timestep.round())
    torch.testing.assert_close((noisy / (timestep / 1000)[:, None]).std(), torch.tensor(1.0), rtol=0.02, atol=0)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_loss_of_a_clip_does_not_depend_on_its_batch(prediction_type):
    """With noise and draws given nothing is random, so processes and accumulation may cut a batch as they like."""
    torch.manual_seed(0)
    shapes = {"structure_shape": (2, 2, 2, 2), "dynamics_shape": (2, 4, 4), "num_classes": 3}
    model = VidTwinTransformer3DModel.from_preset("tiny-test", self_conditioning=True, **shapes)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    config = DiffusionConfig(independent_timesteps=0.5, loss_weighting="min_snr", class_dropout=0.5)
    objective = DiffusionLoss(model, default_scheduler(prediction_type), config)
    batch = [
        torch.randn(6, model.latent_size),
        torch.arange(6) % 3,
        torch.randn(6, model.latent_size),
        torch.rand(6, 8),
    ]
    whole = objective(*batch)
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    parts = [objective(*(x[index] for x in batch)) for index in order.split([1, 3, 2])]
    for name, value in whole.items():
        mean = (
            sum(len(part) * losses[name] for part, losses in zip((range(1), range(3), range(2)), parts, strict=True))
            / 6
        )
        torch.testing.assert_close(mean, value, rtol=1e-4, atol=1e-5)


def test_an_unconditional_transformer_gets_no_class_at_any_dropout():
    objective, clean, labels = make("sample", class_dropout=0.5, self_conditioning=True)
    objective.transformer.config.num_classes = None
    for given in (labels, None):
        assert objective(clean, given)["loss"] < 1e-3
    assert objective.transformer.labels == [None] * 4


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["guidance_scale", "class_dropout", "logit_mean", "logit_std", "min_snr_gamma"])
def test_a_setting_that_is_not_finite_is_refused_by_name(name, value):
    with pytest.raises(UserError, match=f"diffusion.{name} must be a finite number, not {value}"):
        make("sample", **{name: value})


def test_missing_noise_is_drawn_from_the_global_generator():
    objective, clean, labels = make("v_prediction", independent_timesteps=0.5, error=torch.randn(sum(SIZES)))
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(objective(clean + torch.randn_like(clean), labels)["loss"])
    assert losses[0] == losses[1] != losses[2]


def test_the_draws_of_a_clip_are_independent_of_each_other():
    """Which number decides what: no two decisions share one."""
    objective, clean, labels = make("sample", batch=4, self_conditioning=True, independent_timesteps=0.5)
    for column in range(DRAWS):
        uniform = torch.full((4, DRAWS), 0.9)
        uniform[2:, column] = 0.1
        objective(clean, labels, torch.randn_like(clean), uniform, clean[:, : SIZES[0]])
        oracle = objective.transformer
        times, shown = oracle.timesteps[-1], oracle.estimates[-1].ne(0).any(dim=1)
        changed = [
            times[2, 0] != times[0, 0],
            times[2, 1] != times[2, 0],
            oracle.labels[-1][2] == 3,
            bool(shown[2]),
            not oracle.images[-1]["image_mask"][2],
        ]
        assert changed == [column == 0, False, column == 3, column == 4, column == 5]
    uniform = torch.tensor([[0.9, 0.1, 0.1, 0.9, 0.9, 0.9]]).repeat(4, 1)
    objective(clean, labels, torch.randn_like(clean), uniform)
    assert objective.transformer.timesteps[-1].tolist() == [[900, 100]] * 4


# --- classes and self-conditioning ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("dropout", "expected"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
def test_class_dropout_gives_the_null_class(dropout, expected):
    objective, clean, labels = make("sample", batch=1000, class_dropout=dropout)
    objective(clean, labels)
    [seen] = objective.transformer.labels
    dropped = seen == 3
    assert dropped.float().mean().item() == pytest.approx(expected, abs=0.06)
    assert torch.equal(seen[~dropped], labels[~dropped])


def test_subclass_dropout_gives_the_superclass():
    objective, clean, labels = make("sample", batch=1000, class_dropout=0.2)
    config = DiffusionConfig(class_dropout=0.2, subclass_dropout=0.3)
    names = ["jump", "jump/dog", "run/cat"]
    objective = DiffusionLoss(objective.transformer, objective.scheduler, config, names)
    objective(clean, labels)
    [seen] = objective.transformer.labels
    of_dogs = seen[labels == 1]
    for label, share in ((3, 0.2), (0, 0.3), (1, 0.5)):
        assert (of_dogs == label).float().mean().item() == pytest.approx(share, abs=0.08)
    for label in (0, 2):  # nothing lies above
        assert set(seen[labels == label].tolist()) == {label, 3}
    assert "superclass_ids" not in objective.state_dict()


@pytest.mark.parametrize("independent", [0.0, 1.0])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_self_conditioning_shows_half_of_the_clips_their_estimate(prediction_type, independent):
    objective, clean, labels = make(
        prediction_type, batch=400, self_conditioning=True, independent_timesteps=independent
    )
    objective(clean, labels)
    oracle = objective.transformer
    first, second = oracle.estimates
    assert first is None
    shown = second.ne(0).any(dim=1)
    assert shown.float().mean().item() == pytest.approx(0.5, abs=0.1)
    torch.testing.assert_close(second[shown], clean[shown], rtol=2e-2, atol=2e-2)
    assert torch.equal(*oracle.labels) and torch.equal(*oracle.timesteps)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_all_options_together_train_a_real_transformer(prediction_type):
    torch.manual_seed(0)
    shapes = {"structure_shape": (2, 2, 2, 2), "dynamics_shape": (2, 4, 4), "num_classes": 3}
    model = VidTwinTransformer3DModel.from_preset("tiny-test", self_conditioning=True, **shapes)
    config = DiffusionConfig(independent_timesteps=0.5, loss_weighting="min_snr", timestep_sampling="logit_normal")
    objective = DiffusionLoss(model, default_scheduler(prediction_type), config)
    losses = objective(torch.randn(5, model.latent_size), torch.arange(5) % 3)
    losses["loss"].backward()
    assert all(value.isfinite() and value.shape == () for value in losses.values())
    assert model.structure_out.weight.grad.abs().sum() > 0 and model.dynamics_out.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"loss_weighting": "snr"}, "loss_weighting must be one of none, min_snr, not 'snr'"),
        ({"timestep_sampling": "cosine"}, "timestep_sampling must be one of"),
        ({"independent_timesteps": 1.5}, "independent_timesteps must be 1 or less"),
        ({"class_dropout": -0.1}, "class_dropout must be 0 or more"),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma must be above 0"),
        ({"logit_std": 0.0}, "logit_std must be above 0"),
    ],
)
def test_a_wrong_setting_is_one_sentence(config, sentence):
    with pytest.raises(UserError, match=sentence):
        make("sample", **config)


def test_a_fraction_of_the_clips_has_no_image():
    """Also where the estimate for self-conditioning is computed; the labels are dropped independently."""
    objective, latents, labels = make("sample", batch=400, self_conditioning=True, image_dropout=0.3)
    image = torch.randn(len(latents), SIZES[0])
    objective(latents, labels, image=image)
    first, second = objective.transformer.images
    assert first["image_latents"] is second["image_latents"] is image
    assert torch.equal(first["image_mask"], second["image_mask"])
    assert first["image_mask"].float().mean().item() == pytest.approx(0.7, abs=0.08)
    dropped = objective.transformer.labels[0] == 3
    assert 0.02 < (dropped & ~first["image_mask"]).float().mean() < 0.12
    objective(latents, labels)
    assert objective.transformer.images[-1] == {}


def test_a_model_in_stages_learns_the_first_frame_or_the_difference_from_it():
    objective, latents, labels = make("sample", batch=64, image_dropout=0.5)
    objective.transformer.config.image_residual = 0.5
    image = torch.randn(len(latents), SIZES[0])
    structure = latents[:, : SIZES[0]]
    uniform = torch.rand(len(latents), DRAWS)
    losses = objective(latents, labels, None, uniform, image)
    has_image = objective.transformer.images[0]["image_mask"]
    assert torch.equal(has_image, uniform[:, 5] >= 0.5) and 10 < has_image.sum() < 54
    given = objective.transformer.clean  # what the oracle answers: the latents of the clip
    motion = ((structure - image) / 0.5 - given[:, : SIZES[0]]).square().mean(dim=1)
    still = (image - given[:, : SIZES[0]]).square().mean(dim=1)
    torch.testing.assert_close(losses["structure"], torch.where(has_image, motion, still).mean())
    zero = given[:, SIZES[0] :].square().mean()
    torch.testing.assert_close(losses["dynamics"], torch.where(has_image, torch.zeros_like(zero), zero).mean())

    shown = torch.randn_like(image)  # of other clips: the input changes, and no target
    swapped = objective(latents, labels, None, uniform, image, shown_image=shown)
    assert objective.transformer.images[-1]["image_latents"] is shown
    torch.testing.assert_close(swapped["structure"], losses["structure"])

    errors = objective.stream_errors(latents, labels, torch.randn_like(latents), torch.full((64,), 500), image)
    torch.testing.assert_close(errors["structure"], motion)
    torch.testing.assert_close(errors["dynamics"], torch.zeros(64))
    assert objective.transformer.images[-1] == {"image_latents": image}


# --- captions -------------------------------------------------------------------------------------------------------


def test_captions_are_dropped_from_both_streams_or_from_one():
    mask = torch.tensor([True, True, False]).expand(1000, 3)
    uniform = torch.arange(1000) / 1000
    kept = drop_captions(mask, uniform, caption_dropout=0.1, stream_dropout=0.2)
    assert kept.shape == (1000, 2, 3) and not kept[..., 2].any() and torch.equal(kept[..., 0], kept[..., 1])
    structure, dynamics = kept[:, 0, 0], kept[:, 1, 0]
    assert (~structure & ~dynamics).sum() == 100 and (~structure & dynamics).sum() == 200
    assert (structure & ~dynamics).sum() == 200 and (structure & dynamics).sum() == 500
    assert drop_captions(mask, uniform, 0.0, 0.0)[..., :2].all()


@pytest.mark.parametrize("is_trained", [False, True])
def test_each_stream_sees_its_own_caption(is_trained, monkeypatch):
    model = VidTwinTransformer3DModel.from_preset("tiny-test", num_classes=3, caption_channels=16)
    seen = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *args, **kw: seen.append(kw) or forward(*args, **kw))
    text = TextConfig(caption_dropout=0.25, stream_dropout=0.25)
    encoder = tiny_text_encoder(("a", "red", "disc", "orbits"))
    objective = DiffusionLoss(
        model,
        default_scheduler("sample"),
        DiffusionConfig(),
        text=text,
        text_encoder=encoder.model if is_trained else None,
    )
    captions = ["a red disc", "orbits"]
    embeddings, mask, _ = encode_captions(captions, encoder)
    ids = tokenize_captions(captions, encoder.tokenizer).ids
    tokens = (ids if is_trained else embeddings)[None].expand(3, *[-1] * (2 if is_trained else 3))
    latents, labels = torch.randn(3, model.latent_size), torch.zeros(3, dtype=torch.long)
    uniform = torch.full((3, DRAWS + 1), 0.9)
    uniform[1:, DRAWS] = torch.tensor([0.3, 0.1])  # without that of structure, without any
    objective(latents, labels, torch.randn_like(latents), uniform, text=(tokens, mask.expand(3, -1, -1)))
    conditions, length = seen[0], mask.shape[1]
    nothing = torch.zeros(length, dtype=torch.bool)
    structure, dynamics = torch.cat([mask[0], nothing]), torch.cat([nothing, mask[1]])
    expected = (
        torch.stack([structure, dynamics]),
        torch.stack([structure & False, dynamics]),
        torch.zeros(2, 2 * length),
    )
    assert torch.equal(conditions["encoder_attention_mask"], torch.stack([rows.bool() for rows in expected]))
    both = torch.cat([mask[0], mask[1]])
    torch.testing.assert_close(conditions["encoder_hidden_states"][0][both], embeddings.flatten(0, 1)[both])


def test_a_loss_sees_the_captions_that_are_not_dropped(monkeypatch):
    model = VidTwinTransformer3DModel.from_preset("tiny-test", num_classes=3, caption_channels=8)
    seen = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *args, **kw: seen.append(kw) or forward(*args, **kw))
    text = TextConfig(caption_dropout=0.25, stream_dropout=0.25)
    objective = DiffusionLoss(model, default_scheduler("sample"), DiffusionConfig(), text=text)
    latents, labels = torch.randn(4, model.latent_size), torch.zeros(4, dtype=torch.long)
    embeddings, mask = torch.randn(4, 5, 8), torch.ones(4, 5, dtype=torch.bool)
    uniform = torch.full((4, DRAWS + 1), 0.9)
    uniform[:, DRAWS] = torch.tensor([0.1, 0.3, 0.6, 0.8])
    noise = torch.randn_like(latents)
    objective(latents, labels, noise, uniform, text=(embeddings, mask))["loss"].backward()
    assert seen[0]["encoder_attention_mask"].any(dim=2).tolist() == [
        [False, False], [False, True], [True, False], [True, True]
    ]  # fmt: skip
    errors = objective.stream_errors(latents, labels, noise, torch.full((4,), 500), text=(embeddings, mask))
    assert seen[1]["encoder_attention_mask"].all() and set(errors) == {"structure", "dynamics"}
    plain = DiffusionLoss(model, default_scheduler("sample"), DiffusionConfig())
    torch.manual_seed(0)
    a = plain(latents, labels)["loss"]
    torch.manual_seed(0)
    noise = torch.randn_like(latents)
    assert torch.equal(a, plain(latents, labels, noise, torch.rand(4, DRAWS))["loss"]), "as before captions"
