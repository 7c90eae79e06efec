"""The optimizer and the schedule that a recipe asks for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vidgen.config import OptimConfig
from vidgen.errors import UserError
from vidgen.training.optimizers import build_lr_scheduler, build_optimizer


def groups() -> dict[str, tuple[list[nn.Parameter], float]]:
    return {name: ([nn.Parameter(torch.ones(3))], factor) for name, factor in (("model", 1.0), ("other", 0.5))}


def test_every_key_of_the_recipe_reaches_its_group():
    config = OptimConfig(learning_rate=0.1, adam_beta1=0.8, adam_beta2=0.95, adam_weight_decay=0.3, adam_epsilon=1e-6)
    optimizer = build_optimizer(groups(), config)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.05]
    for group in optimizer.param_groups:
        assert (group["betas"], group["weight_decay"], group["eps"]) == ((0.8, 0.95), 0.3, 1e-6)


@pytest.mark.parametrize("name", ["cosine", "constant_with_warmup", "linear", "polynomial"])
def test_a_schedule_taken_up_again_goes_on_as_it_was(name):
    config = OptimConfig(learning_rate=0.1, lr_scheduler=name, lr_warmup_steps=3)

    def rates(after: int) -> list[float]:
        optimizer = build_optimizer(groups(), config)
        scheduler = build_lr_scheduler(optimizer, config, 9)
        if after:
            scheduler = build_lr_scheduler(optimizer, config, 9, after)
        seen = []
        for _ in range(after, 9):
            seen.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            scheduler.step()
        return seen

    whole = rates(0)
    assert whole[0] == [0, 0] and whole[3] == [0.1, 0.05]
    assert all(rates(after) == whole[after:] for after in (1, 4))


def test_what_does_not_fit_is_one_sentence():
    with pytest.raises(UserError, match="Invalid beta parameter"):
        build_optimizer(groups(), OptimConfig(adam_beta1=2))
    for name in ("square", "piecewise_constant"):
        with pytest.raises(UserError, match=r"optim\.lr_scheduler"):
            build_lr_scheduler(build_optimizer(groups(), OptimConfig()), OptimConfig(lr_scheduler=name), 9)
