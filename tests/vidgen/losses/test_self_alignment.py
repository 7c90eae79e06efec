"""Self-alignment: its formula, which weights it trains, and that it costs no forward pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipelines import VidTwinTransformer3DModel, default_scheduler
from vidgen.common.errors import UserError
from vidgen.losses.config import DiffusionConfig
from vidgen.losses.diffusion import DRAWS, SHORTCUT_DRAWS, DiffusionLoss
from vidgen.losses.self_alignment import choose_layers, self_alignment_loss

BATCH, NUM_LAYERS = 3, 4
SHAPES = dict(structure_shape=(4, 2, 2, 2), dynamics_shape=(3, 4, 4))


def build(self_alignment: float = 0.0, layers=(), model=None, **config) -> DiffusionLoss:
    """The objective around a tiny DiT whose parameters are all random; the same one every time."""
    arguments = {**SHAPES, "num_layers": NUM_LAYERS, **(model or {})}
    transformer = VidTwinTransformer3DModel.from_preset("tiny-test", **arguments)
    generator = torch.Generator().manual_seed(1)
    for parameter in transformer.parameters():
        nn.init.normal_(parameter, std=0.15, generator=generator)
    config = DiffusionConfig(self_alignment=self_alignment, self_alignment_layers=list(layers), **config)
    return DiffusionLoss(transformer, default_scheduler("v_prediction"), config)


def run(objective: DiffusionLoss) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, BATCH, objective.transformer.latent_size, generator=generator)
    uniform = torch.rand(BATCH, DRAWS + 1 + SHORTCUT_DRAWS, generator=generator)
    return objective(latents, None, noise, uniform)


def gradients(objective: DiffusionLoss) -> dict[str, torch.Tensor]:
    objective.zero_grad()
    run(objective)["loss"].backward()
    return {name: p.grad.clone() for name, p in objective.transformer.named_parameters() if p.grad is not None}


def test_the_loss_is_one_minus_the_cosine_of_each_token():
    tokens = torch.randn(2, 5, 8)
    scales = torch.rand(2, 5, 1) + 0.5
    torch.testing.assert_close(self_alignment_loss(tokens, scales * tokens), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(self_alignment_loss(tokens, -scales * tokens), torch.tensor(2.0))
    half = torch.cat([tokens[:, :, :4], -tokens[:, :, 4:]], dim=2)
    cosine = (tokens * half).sum(-1) / tokens.square().sum(-1)
    torch.testing.assert_close(self_alignment_loss(tokens, half), 1 - cosine.mean())
    assert self_alignment_loss(tokens.bfloat16(), half.bfloat16()).dtype == torch.float32


def test_the_later_tokens_get_no_gradient():
    earlier, later = torch.randn(2, 1, 3, 4).requires_grad_().unbind()
    for tokens in (earlier, later):
        tokens.retain_grad()
    self_alignment_loss(earlier, later).backward()
    assert earlier.grad.any() and later.grad is None


def test_the_term_is_added_with_its_weight_to_an_unchanged_loss():
    plain, aligned = run(build()), run(build(0.3, (1, 3)))
    assert "self_alignment" not in plain and not aligned["self_alignment"].requires_grad
    assert all(torch.equal(aligned[name], plain[name]) for name in ("structure", "dynamics"))
    torch.testing.assert_close(aligned["loss"], plain["loss"] + 0.3 * aligned["self_alignment"])
    assert aligned["self_alignment"] > 0.01


def test_only_the_earlier_block_and_those_before_it_are_aligned():
    """The stop-gradient holds: no weight behind the earlier block moves towards it."""
    plain, aligned = gradients(build()), gradients(build(1.0, (2, 4)))
    changed = {name for name in plain if not torch.equal(plain[name], aligned[name])}
    behind = ("transformer_blocks.2", "transformer_blocks.3", "modulation_out", "structure_out", "dynamics_out")
    assert not [name for name in changed if name.startswith(behind)]
    assert {f"transformer_blocks.{i}" for i in (0, 1)} <= {".".join(name.split(".")[:2]) for name in changed}


def test_aligned_tokens_approach_the_later_ones():
    objective = build(1.0, (1, 3))
    optimizer = torch.optim.Adam(objective.parameters(), lr=1e-2)
    values = []
    for _ in range(15):
        losses = run(objective)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        values.append(losses["self_alignment"].item())
    assert values[-1] < 0.6 * values[0]


def test_gradient_checkpointing_and_autocast_change_nothing():
    objective = build(1.0)
    expected, losses = gradients(objective), run(objective)
    objective.transformer.enable_gradient_checkpointing()
    objective.train()
    for name, gradient in gradients(objective).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = run(objective)["self_alignment"]
    torch.testing.assert_close(half, losses["self_alignment"], rtol=0.02, atol=0)
    assert half.dtype == torch.float32


@pytest.mark.parametrize(
    ("model", "config"),
    [
        ({}, {}),
        ({"self_conditioning": True}, {}),
        ({"interval_conditioning": True, "self_conditioning": True}, {"shortcut": 0.5}),
    ],
)
def test_a_training_step_costs_the_same_flops(model, config):
    flops = []
    for weight in (0.0, 0.5):
        with FlopCounterMode(display=False) as counter:
            losses = run(build(weight, model=model, **config))
            losses["loss"].backward()
        flops.append(counter.get_total_flops())
        assert losses["loss"].isfinite()
    assert flops[0] == flops[1] > 0


def test_the_held_out_loss_has_no_alignment():
    objectives = build(), build(1.0)
    latents, noise = torch.randn(2, BATCH, objectives[0].transformer.latent_size)
    timestep = torch.tensor([100, 500, 900])
    plain, aligned = (objective.stream_errors(latents, None, noise, timestep) for objective in objectives)
    assert all(torch.equal(plain[name], aligned[name]) for name in plain)


@pytest.mark.parametrize(
    ("num_layers", "expected"), [(28, (8, 16)), (18, (5, 10)), (5, (1, 3)), (4, (1, 2)), (2, (1, 2))]
)
def test_default_layers_are_at_the_papers_fractions_of_the_depth(num_layers, expected):
    assert choose_layers([], num_layers) == expected


@pytest.mark.parametrize(
    ("layers", "num_layers"), [([2, 2], 4), ([3, 1], 4), ([0, 2], 4), ([2, 5], 4), ([2], 4), ([], 1)]
)
def test_layers_that_do_not_fit_are_refused(layers, num_layers):
    with pytest.raises(UserError, match=f"between 1 and {num_layers}"):
        choose_layers(layers, num_layers)
