"""The training loop reads nothing from the device between logging steps, except the flags of the previous step."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from runs import FULL
from vidgen.training.state import PendingStep
from vidgen.training.vae_trainer import VAETrainer, train_vae


class HostReads(TorchDispatchMode):
    """Counts `Tensor.item`, `bool(tensor)` and the like, each of which waits for a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_no_step_waits_for_the_device(vae_config, tmp_path, monkeypatch):
    """With EMA, GAN and LeCAM. The flags of a step are read when the losses of the next are computed."""
    events, reads = [], HostReads()

    def record(name, function):
        return lambda *args: (events.append((name, reads.count)), function(*args))[1]

    monkeypatch.setattr(VAETrainer, "compute_losses", record("losses", VAETrainer.compute_losses))
    monkeypatch.setattr(PendingStep, "read_flags", record("flags", PendingStep.read_flags))
    settings = ["train.logging_steps=100", "train.ema_decay=0.9", "train.max_train_steps=6", *FULL]
    with reads:
        train_vae(vae_config(tmp_path, *settings))
    assert [name for name, _ in events] == ["losses", *5 * ["losses", "flags"], "flags"]
    assert len({count for _, count in events}) == 1
