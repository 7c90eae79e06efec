"""Training cost: counted FLOPs and bytes, and the arithmetic of hours and batches."""

from __future__ import annotations

import json

import pytest
import torch

from autoencoder import AutoencoderKLVidTwin
from benchmarks.resources import __main__ as resources
from benchmarks.resources import training_cost
from benchmarks.resources.flops import training_flops
from pipelines import VidTwinTransformer3DModel
from vidgen.losses.config import GANConfig
from vidgen.metrics.flops import transformer_flops
from vidgen.training.config import ModelConfig, VAETrainingConfig


def test_smoke_counts_both_trainings(tmp_path):
    arguments = ["--scale", "smoke", "--work-dir", str(tmp_path), "--results", str(tmp_path)]
    resources.TRAINING_COST.main(arguments)
    record = json.loads((tmp_path / "smoke" / "training_cost.json").read_text())
    assert record["environment"]["command"].startswith("python -m benchmarks.resources training_cost --scale smoke ")
    costs = record["results"]["costs"]
    with torch.device("meta"):
        vae = AutoencoderKLVidTwin.from_preset("base", 1)
    dit = VidTwinTransformer3DModel.from_preset("tiny-test", vae, num_classes=training_cost.CLASSES)
    # The backward pass costs twice the forward pass, except before the first weights.
    assert costs["dit/paper"]["step_flops"] == pytest.approx(3 * transformer_flops(dit), rel=0.02)
    assert costs["dit/paper"]["parameters"] == dit.num_parameters()
    for cost in costs.values():
        plain, checkpointing = cost["memory"]["plain"], cost["memory"]["checkpointing"]
        assert checkpointing["clip"] < 0.75 * plain["clip"]
        # Weights and two moments in fp32 are fixed; gradients replace activations.
        assert 12 * cost["parameters"] < plain["fixed"] < 20 * cost["parameters"]
    assert "| `vae/sprites` | plain |" in (tmp_path / "training_cost.md").read_text()


def test_judges_are_counted_by_hand():
    config = VAETrainingConfig(model=ModelConfig(preset="tiny"), gan=GANConfig(weight=0.0))
    (lpips,) = training_cost.judges(config).values()
    widths = [(3, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 256), (256, 512)]
    widths += [(512, 512)] * 5
    sides = [64, 64, 32, 32, 16, 16, 16, 8, 8, 8, 4, 4, 4]
    forward = sum(2 * 9 * a * b * side**2 for (a, b), side in zip(widths, sides, strict=True))
    # Both clips go forward, and the gradient back to one of them.
    assert training_flops(lpips)[1] == 3 * 16 * forward
    games = training_cost.judges(VAETrainingConfig(model=ModelConfig(preset="tiny"), gan=GANConfig(weight=1.0)))
    generator, discriminator = (training_flops(games[player]) for player in ("generator", "discriminator"))
    assert discriminator[0] == 2 * generator[0] and generator[1] == 2 * generator[0]
    first = 2 * 16 * 3 * 64 * 32**2 * 16  # of one clip, which needs no gradient
    assert discriminator[1] == 3 * discriminator[0] - 2 * first


def test_hours_and_batches():
    memory = {"plain": {"fixed": 16e9, "clip": 8e9}}
    cost = {
        "parameters": 10**9,
        "step_flops": 3.6e12,
        "judges_flops": 0.9e12,
        "steps": 1000,
        "batch": 6,
        "memory": memory,
    }
    gpu = {"name": "G", "flops": 1e14, "memory": 80e9, "utilization": 0.5}
    text = training_cost.training_cost_tables({"gpu": gpu, "costs": {"vae/base": cost}})
    # 24 000 clips of 3.6 TFLOP at 50 TFLOP/s are 1728 seconds; 72 GB hold 7 clips beside 16 GB, 8 beside an eighth.
    assert "| `vae/base` | 1,000 M | 3.60 | 25% | 1,000 x 24 | 0.5 | 0.1 | 0.0 |" in text
    assert "| `vae/base` | plain | 16.00 GB | 8.00 GB | 7 | 8 | 8 |" in text
    assert training_cost.max_batch({"fixed": 90e9, "clip": 8e9}, 1, True, gpu) == 0
