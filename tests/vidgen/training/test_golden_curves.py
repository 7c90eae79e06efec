"""Golden loss curves: short trainings reproduce the stored losses on any CPU.

    VIDGEN_WRITE_GOLDENS=1 pytest tests/vidgen/training/test_golden_curves.py

writes them again, after an intended change of the training.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from runs import FULL, numbers
from vidgen.training.dit_trainer import train_dit
from vidgen.training.vae_trainer import train_vae

CURVES = Path(__file__).parents[2] / "assets" / "losses"
# AVX2 instead of AVX512 instructions change the values by 2e-6; a learning rate or loss weight 3 % larger by 1e-2.
TOLERANCE = 3e-4
VAE = [*FULL, "loss.l2_weight=1", "loss.kl_weight=0.1", "optim.learning_rate=3e-3", "train.max_train_steps=10"]
DIT = ["diffusion.independent_timesteps=0.5", "diffusion.prediction_type=v_prediction"]
DIT += ["optim.learning_rate=3e-3", "train.max_train_steps=10"]


@pytest.fixture
def train(request, tmp_path):
    """Trains a VAE or a DiT, and returns its curve: {step: {name: value}}."""

    def run(kind: str, *changes: str) -> dict[str, dict[str, float]]:
        make, train, settings = {"vae": ("vae_config", train_vae, VAE), "dit": ("dit_config", train_dit, DIT)}[kind]
        train(request.getfixturevalue(make)(tmp_path, *settings, *changes))
        return {
            str(step): {name: value for name, value in values.items() if not name.startswith("validation/")}
            for step, values in numbers(tmp_path).items()
        }

    return run


def largest_deviation(curve: dict[str, dict[str, float]], golden: dict[str, dict[str, float]]) -> float:
    """The largest difference of a logged value, relative to the largest magnitude of its kind on the golden curve."""
    assert curve.keys() == golden.keys() and all(curve[step].keys() == golden[step].keys() for step in golden)
    names = {name for values in golden.values() for name in values if not name.startswith("learning_rate")}
    deviations = []
    for name in names:
        steps = [step for step in golden if name in golden[step]]
        scale = max(abs(golden[step][name]) for step in steps) or 1
        deviations += [abs(curve[step][name] - golden[step][name]) / scale for step in steps]
    return max(deviations)


@pytest.mark.parametrize("kind", ["vae", "dit"])
def test_losses_equal_the_golden_curve(train, kind):
    path, curve = CURVES / f"{kind}.json", train(kind)
    if os.environ.get("VIDGEN_WRITE_GOLDENS"):
        path.write_text(json.dumps(curve, indent=1) + "\n")
    assert largest_deviation(curve, json.loads(path.read_text())) < TOLERANCE


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("vae", "optim.learning_rate=3.09e-3"),
        ("vae", "loss.kl_weight=0.103"),
        ("vae", "gan.weight=0.0515"),
        ("dit", "optim.learning_rate=3.09e-3"),
    ],
)
def test_a_change_of_three_percent_leaves_the_golden_curve(train, kind, change):
    golden = json.loads((CURVES / f"{kind}.json").read_text())
    assert largest_deviation(train(kind, change), golden) > 10 * TOLERANCE
