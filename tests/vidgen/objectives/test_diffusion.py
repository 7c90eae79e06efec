"""The denoising objective against its formulas."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pipelines import default_scheduler
from vidgen.config import DiffusionConfig
from vidgen.objectives.diffusion import DiffusionObjective


class Oracle(nn.Module):
    """Knows the clean latents, and answers what a scheduler's prediction type asks for."""

    def __init__(self, clean: torch.Tensor, scheduler, self_conditioning: bool = False) -> None:
        super().__init__()
        self.clean, self.scheduler = clean, scheduler
        self.config = SimpleNamespace(num_classes=3, self_conditioning=self_conditioning)
        self.seen: list[torch.Tensor] = []
        self.estimates: list[torch.Tensor | None] = []

    def forward(self, noisy, timestep, class_labels, self_condition=None):
        self.seen.append(class_labels)
        self.estimates.append(self_condition)
        clean = self.clean[: len(noisy)]
        alpha = self.scheduler.alphas_cumprod[timestep].sqrt()[:, None].double()
        sigma = (1 - alpha**2).sqrt()
        noise = (noisy.double() - alpha * clean) / sigma
        kind = self.scheduler.config.prediction_type
        answer = {"sample": clean, "epsilon": noise, "v_prediction": alpha * noise - sigma * clean}[kind]
        return SimpleNamespace(sample=answer.float())


@pytest.mark.parametrize("prediction_type", ["sample", "epsilon", "v_prediction"])
def test_the_right_answer_has_no_loss(prediction_type):
    torch.manual_seed(0)
    clean, labels = torch.randn(64, 10), torch.arange(64) % 3
    scheduler = default_scheduler(prediction_type=prediction_type)
    objective = DiffusionObjective(Oracle(clean, scheduler), scheduler, DiffusionConfig())
    assert objective(clean, labels)["loss"] < 1e-3
    assert objective(clean + 1, labels)["loss"] > 0.01


@pytest.mark.parametrize(("dropout", "expected"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
def test_class_dropout_gives_the_null_class(dropout, expected):
    torch.manual_seed(0)
    clean, labels = torch.randn(1000, 2), torch.arange(1000) % 3
    scheduler = default_scheduler()
    oracle = Oracle(clean, scheduler)
    DiffusionObjective(oracle, scheduler, DiffusionConfig(class_dropout=dropout))(clean, labels)
    dropped = oracle.seen[0] == 3
    assert dropped.float().mean().item() == pytest.approx(expected, abs=0.06)
    assert torch.equal(oracle.seen[0][~dropped], labels[~dropped])


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_self_conditioning_shows_half_of_the_batch_its_estimate(prediction_type):
    torch.manual_seed(0)
    clean, labels = torch.randn(5, 10), torch.arange(5) % 3
    scheduler = default_scheduler(prediction_type=prediction_type)
    oracle = Oracle(clean, scheduler, self_conditioning=True)
    DiffusionObjective(oracle, scheduler, DiffusionConfig())(clean, labels)
    first, second = oracle.estimates
    assert first is None
    torch.testing.assert_close(second[:3], clean[:3], rtol=1e-3, atol=1e-3)
    assert (second[3:] == 0).all()
    assert len(oracle.seen[0]) == 3 and torch.equal(oracle.seen[0], oracle.seen[1][:3])
