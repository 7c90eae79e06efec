"""Interrupted and killed runs resume, and are bit-identical to uninterrupted ones."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest

from runs import FULL, assert_same_run, assert_same_tensors, logged, losses
from vidgen.common.errors import TrainingInterrupted, UserError
from vidgen.training.checkpoints import checkpoint_step, list_checkpoints
from vidgen.training.dit_trainer import train_dit
from vidgen.training.failures import TrainingDiverged
from vidgen.training.vae_trainer import VAETrainer, train_vae

KILLS = int(os.environ.get("VIDGEN_KILLS", "4"))  # more of them take minutes
STEADY = "optim.lr_scheduler=constant_with_warmup"  # the schedule of a run of another length


@pytest.fixture(autouse=True)
def _signals_are_heard_and_left_as_they_were():
    ours = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in ours.items()}
    yield
    assert ours == {number: signal.signal(number, handler) for number, handler in before.items()}


def test_an_ignored_signal_stays_ignored(vae_config, tmp_path, monkeypatch):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    interrupted_at(2, signal.SIGINT, monkeypatch)
    try:
        train_vae(vae_config(tmp_path, "train.max_train_steps=4"))
    finally:
        assert signal.signal(signal.SIGINT, signal.default_int_handler) is signal.SIG_IGN
    assert max(losses(tmp_path)) == 4


@pytest.mark.parametrize(
    ("ema", "workers", "optimizer", "regularization"), [("0", 0, "adamw", "0"), ("0.9", 2, "muon", "0.5")]
)
def test_a_resumed_vae_run_equals_an_uninterrupted_one(vae_config, tmp_path, ema, workers, optimizer, regularization):
    settings = ["train.checkpointing_steps=3", f"train.ema_decay={ema}", "train.logging_steps=2", STEADY, *FULL]
    settings += [f"optim.name={optimizer}"]
    settings += [f"loss.equivariance={regularization}", f"loss.nested_dropout={regularization}"]
    settings += [f"train.dataloader_num_workers={workers}", "data.flip=true"]
    train_vae(vae_config(tmp_path / "whole", "train.max_train_steps=8", *settings))
    # Cut between two logged steps, in the second epoch, with the discriminator at work.
    train_vae(vae_config(tmp_path / "cut", "train.max_train_steps=6", *settings))
    shutil.rmtree(tmp_path / "cut" / "checkpoint-6")
    shutil.rmtree(tmp_path / "cut" / "final")
    (tmp_path / "cut" / "metrics.jsonl").open("a").write('{"step": 5, "lo')  # as a kill leaves it
    train_vae(vae_config(tmp_path / "cut", "train.max_train_steps=8", "resume=latest", *settings))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_the_old_file_name_of_the_average_resumes(vae_config, tmp_path):
    settings = [STEADY, "train.ema_decay=0.9"]
    train_vae(vae_config(tmp_path / "old", "train.max_train_steps=2", *settings))
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    checkpoint = tmp_path / "old" / "checkpoint-2"
    (checkpoint / "ema.safetensors").rename(checkpoint / "averaged.safetensors")
    for run in ("old", "new"):
        train_vae(vae_config(tmp_path / run, "train.max_train_steps=3", "resume=latest", *settings))
    assert_same_tensors(tmp_path / "old" / "final", tmp_path / "new" / "final")


def test_accumulated_gradients_are_those_of_the_larger_batch(vae_config, tmp_path):
    settings = ["train.max_train_steps=4", "model.overrides={bottleneck: residual, qformer_dropout: 0}"]
    settings += ["loss.equivariance=0.5", "loss.nested_dropout=0.5"]
    train_vae(vae_config(tmp_path / "whole", "train.train_batch_size=4", *settings))
    train_vae(
        vae_config(tmp_path / "parts", "train.train_batch_size=2", "train.gradient_accumulation_steps=2", *settings)
    )
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


def test_a_resumed_run_uses_the_learning_rate_and_accumulation_of_the_new_config(vae_config, tmp_path, monkeypatch):
    settings = [STEADY, "gan.lr_scale=0.5", *FULL]
    train_vae(vae_config(tmp_path, "train.max_train_steps=3", *settings))
    compute, calls = VAETrainer.compute_losses, []
    monkeypatch.setattr(VAETrainer, "compute_losses", lambda self, batch: (calls.append(0), compute(self, batch))[1])
    settings += ["optim.learning_rate=1e-5", "train.gradient_accumulation_steps=2", "resume=latest"]
    train_vae(vae_config(tmp_path, "train.max_train_steps=5", *settings))
    rates = [(entry["learning_rate"], entry["learning_rate/discriminator"]) for entry in logged(tmp_path)[-3:-1]]
    assert rates == [(1e-5, 0.5e-5)] * 2
    assert len(calls) == 4, "a step was made of fewer parts"


def test_a_run_does_not_overwrite_the_checkpoints_of_another(vae_config, tmp_path):
    train_vae(vae_config(tmp_path, "train.max_train_steps=2"))
    before = (tmp_path / "metrics.jsonl").read_text(), (tmp_path / "config.yaml").read_text()
    with pytest.raises(UserError, match="holds checkpoint-2 of an earlier run: continue it with resume=latest"):
        train_vae(vae_config(tmp_path, "train.max_train_steps=1"))
    assert ((tmp_path / "metrics.jsonl").read_text(), (tmp_path / "config.yaml").read_text()) == before


# --- signals --------------------------------------------------------------------------------------------------------


def interrupted_at(step: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send this process a signal in the middle of a step."""
    compute = VAETrainer.compute_losses

    def compute_and_signal(self, batch):
        if self.updates == step - 1:
            os.kill(os.getpid(), number)
        return compute(self, batch)

    monkeypatch.setattr(VAETrainer, "compute_losses", compute_and_signal)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_step_with_a_checkpoint(vae_config, tmp_path, monkeypatch, number):
    settings = ["train.max_train_steps=7", "train.logging_steps=4", *FULL]
    train_vae(vae_config(tmp_path / "whole", *settings))
    with monkeypatch.context() as patch:
        interrupted_at(3, number, patch)
        with pytest.raises(TrainingInterrupted, match=r"after step 4; .*checkpoint-4 is written: continue") as stop:
            train_vae(vae_config(tmp_path / "cut", *settings))
    assert stop.value.code == 128 + number
    assert [path.name for path in list_checkpoints(tmp_path / "cut")] == [
        "checkpoint-4"
    ]  # the step after the one the signal fell into
    assert not (tmp_path / "cut" / "final").exists()
    train_vae(vae_config(tmp_path / "cut", "resume=latest", *settings))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def train_as_a_group(config) -> None:
    os.setsid()
    try:
        train_vae(config)
    except TrainingInterrupted as stop:
        raise SystemExit(stop.code) from stop


def test_a_signal_to_all_processes_leaves_the_workers_to_the_step(vae_config, tmp_path, monkeypatch):
    """As torchrun, Slurm and a terminal send it."""
    compute = VAETrainer.compute_losses

    def compute_and_signal_all(self, batch):
        if self.updates == 2:
            os.killpg(os.getpid(), signal.SIGTERM)
        return compute(self, batch)

    monkeypatch.setattr(VAETrainer, "compute_losses", compute_and_signal_all)
    config = vae_config(tmp_path, "train.max_train_steps=50", "train.dataloader_num_workers=2")
    process = multiprocessing.get_context("fork").Process(target=train_as_a_group, args=(config,))
    process.start()
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-3"]


def test_a_second_signal_ends_the_run_at_once(vae_config, tmp_path, monkeypatch):
    compute = VAETrainer.compute_losses

    def compute_and_insist(self, batch):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return compute(self, batch)

    monkeypatch.setattr(VAETrainer, "compute_losses", compute_and_insist)
    with pytest.raises(KeyboardInterrupt):
        train_vae(vae_config(tmp_path, "train.max_train_steps=3"))
    assert not list_checkpoints(tmp_path)


# --- numbers that are not finite -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("where", "logging_steps"), [("loss", 1), ("gradient", 5)])
def test_a_value_that_is_not_finite_stops_the_run_at_the_last_good_step(
    vae_config, tmp_path, monkeypatch, where, logging_steps
):
    settings = [f"train.logging_steps={logging_steps}", STEADY, *FULL]
    train_vae(vae_config(tmp_path / "good", "train.max_train_steps=3", *settings))
    compute = VAETrainer.compute_losses
    batches = []

    def poisoned(self, batch):
        losses = compute(self, batch)
        batches.append(batch["path"])
        if self.updates == 3:
            if where == "loss":
                losses["loss"] = losses["loss"] * float("nan")
            else:
                losses["loss"].register_hook(lambda gradient: gradient * float("inf"))
        return losses

    with monkeypatch.context() as patch:
        patch.setattr(VAETrainer, "compute_losses", poisoned)
        with pytest.raises(TrainingDiverged, match=r"diverged at step 4 \(.*l1 .*grad_norm nan") as error:
            train_vae(vae_config(tmp_path / "bad", "train.max_train_steps=9", *settings))
    assert all(path in str(error.value) for path in batches[3])
    assert "checkpoint-3 holds the state after the last good step" in str(error.value)
    assert_same_tensors(tmp_path / "good" / "checkpoint-3", tmp_path / "bad" / "checkpoint-3")
    assert not (tmp_path / "bad" / "final").exists()
    train_vae(vae_config(tmp_path / "good", "train.max_train_steps=6", "resume=latest", *settings))
    train_vae(vae_config(tmp_path / "bad", "train.max_train_steps=6", "resume=latest", *settings))
    assert_same_tensors(tmp_path / "good" / "final", tmp_path / "bad" / "final")


def test_divergence_suggests_a_lower_learning_rate(vae_config, tmp_path):
    with pytest.raises(TrainingDiverged, match=r"lower optim.learning_rate"):
        train_vae(vae_config(tmp_path, "train.max_train_steps=50", "optim.learning_rate=1e30"))
    assert list_checkpoints(tmp_path)


# --- kills -----------------------------------------------------------------------------------------------------------


def run_and_kill(train, config, kills: int) -> None:
    """Start a run again and again, killing it at random moments of its start or of its work, then let it end."""
    moments, run = random.Random(0), Path(config.output_dir)
    context = multiprocessing.get_context("fork")  # a new interpreter would spend its life importing
    config.resume = "latest"
    for kill in range(kills):
        process = context.Process(target=train, args=(config,))
        process.start()
        if kill % 2:
            time.sleep(moments.uniform(0, 0.5))
        else:  # somewhere in the steps, or the checkpoints, that follow
            due = kill * config.train.max_train_steps // kills
            while process.is_alive() and max(map(checkpoint_step, list_checkpoints(run)), default=0) <= due:
                time.sleep(0.005)
            time.sleep(moments.uniform(0, 0.1))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run ended before it could be killed"
    process = context.Process(target=train, args=(config,))
    process.start()
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize(("program", "workers"), [("vae", 2), ("dit", 0)])
def test_a_run_killed_at_random_moments_equals_an_uninterrupted_one(request, tmp_path, program, workers):
    make, train = request.getfixturevalue(f"{program}_config"), {"vae": train_vae, "dit": train_dit}[program]
    # Half of the time goes into writing checkpoints, so half of the kills fall into one.
    settings = [f"train.max_train_steps={20 + 6 * KILLS}", "train.checkpointing_steps=1", "train.logging_steps=3"]
    settings += [f"train.dataloader_num_workers={workers}", "train.ema_decay=0.9", *(FULL if program == "vae" else [])]
    train(make(tmp_path / "whole", *settings))
    run_and_kill(train, make(tmp_path / "cut", *settings), KILLS)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    assert not list((tmp_path / "cut").glob(".*checkpoint*"))


def _train_with_little_room(config, size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        train_vae(config)
    except UserError as error:
        Path(config.output_dir, "message").write_text(str(error))


def test_a_full_disk_stops_the_run_and_loses_nothing_earlier(vae_config, tmp_path):
    settings = ["train.checkpointing_steps=2"]
    train_vae(vae_config(tmp_path, "train.max_train_steps=2", *settings))
    config = vae_config(tmp_path, "train.max_train_steps=9", "resume=latest", *settings)
    process = multiprocessing.get_context("fork").Process(target=_train_with_little_room, args=(config, 100_000))
    process.start()
    process.join()
    assert "The checkpoint of step 4 cannot be written" in (tmp_path / "message").read_text()
    assert "checkpoint-2 is complete" in (tmp_path / "message").read_text()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2"]
    train_vae(config)
    assert max(losses(tmp_path)) == 9
