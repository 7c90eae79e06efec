"""Two CPU processes, launched with the configs of configs/accelerate, equal one process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from runs import FULL, assert_same_tensors, logged, numbers, tensors
from vidgen.common.config import save_config
from vidgen.training.dit_trainer import train_dit
from vidgen.training.vae_trainer import train_vae

ROOT = Path(__file__).parents[3]
STEADY = ["optim.lr_scheduler=constant_with_warmup", "train.checkpointing_steps=2"]
NO_DROPOUT = "model.overrides={bottleneck: residual, qformer_dropout: 0}"  # whose masks are each process's own


def start(*configs, launcher: str = "ddp") -> subprocess.Popen:
    """`accelerate launch` of train_vae.py, or of trainings in turn (`in_turn.py`), with two processes."""
    paths = [Path(f"{config.output_dir}.yaml") for config in configs]
    for config, path in zip(configs, paths, strict=True):
        save_config(config, path)
    here = Path(__file__).parent
    program = [str(here / "in_turn.py")] if len(configs) > 1 else ["train_vae.py", "--config"]
    wrapper = [str(here / "on_cpu.py")] if launcher == "fsdp2" else []
    command = ["launch", "--config_file", f"configs/accelerate/{launcher}.yaml", "--num_processes", "2"]
    command += ["--dynamo_backend", "no", "--main_process_port", "0", *wrapper, *program, *map(str, paths)]
    return subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", *command],
        cwd=ROOT,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
            "PYTHONFAULTHANDLER": "1",
            "PYTHONPATH": str(ROOT),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    try:
        output, _ = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        for hanging in reversed(psutil.Process(process.pid).children(recursive=True)):
            hanging.send_signal(signal.SIGABRT)  # faulthandler then says where it is
        output, _ = process.communicate(timeout=60)
        pytest.fail(f"still running after 300 s:\n{output[-6000:]}")
    assert process.returncode == 0, output[:6000]
    return output


def assert_near(one: Path, two: Path) -> None:
    """The same run to rounding: every logged number and every final weight."""
    ours, theirs = numbers(one), numbers(two)
    assert ours.keys() == theirs.keys()
    for step, values in ours.items():
        assert theirs[step] == pytest.approx(values, rel=1e-3, abs=5e-4), step
    weights, others = tensors(one / "final"), tensors(two / "final")
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.fixture(scope="module")
def one_process(vae_config, tmp_path_factory) -> Path:
    """A VAE run of one process with the batch of two, with the discriminator at work."""
    folder = tmp_path_factory.mktemp("one") / "run"
    settings = ["train.train_batch_size=4", "train.max_train_steps=5", *STEADY, NO_DROPOUT, *FULL]
    train_vae(vae_config(folder, *settings))
    return folder


@pytest.mark.parametrize("launcher", ["ddp", "fsdp2"])
def test_two_processes_equal_one_and_resume_bit_for_bit(vae_config, dit_config, one_process, tmp_path, launcher):
    settings = ["train.train_batch_size=2", "train.max_train_steps=5", *STEADY, NO_DROPOUT, *FULL]
    two, cut = tmp_path / "two", tmp_path / "cut"
    configs = [vae_config(two, *settings), vae_config(cut, "resume=latest", *settings)]
    if launcher == "ddp":  # a DiT as well
        dit = [
            "train.max_train_steps=4",
            "diffusion.independent_timesteps=0.5",
            "diffusion.self_alignment=0.5",
            *STEADY,
        ]
        dit += ["model.overrides={self_conditioning: true}", "data.hold_out=true", "train.validation_steps=2"]
        train_dit(dit_config(tmp_path / "one-dit", "train.train_batch_size=4", *dit))
        configs.append(dit_config(tmp_path / "two-dit", "train.train_batch_size=2", *dit))
    output = finish(start(*configs, launcher=launcher))
    assert output.count("parameters; latent") == 2, "only the main process prints, once per VAE"
    assert_near(one_process, two)
    assert len(logged(two)) == 6  # five steps and a validation, each once
    assert (cut / "checkpoint-2").exists() and not (two / "checkpoint-2").exists()
    assert numbers(two) == numbers(cut)
    assert_same_tensors(two / "final", cut / "final")
    if launcher == "ddp":
        assert_near(tmp_path / "one-dit", tmp_path / "two-dit")


def processes_of(launcher: subprocess.Popen) -> list[psutil.Process]:
    """The two that train, once they do."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        found = [
            child
            for child in psutil.Process(launcher.pid).children()
            if any("train_vae.py" in word for word in child.cmdline())
        ]
        if len(found) == 2:
            return found
        time.sleep(0.2)
    pytest.fail("the launcher started no two processes")


def wait_for(path: Path) -> None:
    until = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < until, f"{path} never came"
        time.sleep(0.1)


def test_a_process_that_dies_ends_the_run_and_a_signal_stops_all(vae_config, tmp_path):
    config = vae_config(tmp_path / "run", "train.max_train_steps=100000", "train.train_batch_size=2", *STEADY)
    launcher = start(config)
    wait_for(tmp_path / "run" / "checkpoint-2")
    processes_of(launcher)[1].kill()
    output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode != 0
    assert "exitcode" in output

    config.resume = "latest"
    launcher = start(config)
    wait_for(tmp_path / "run" / "metrics.jsonl")
    start_step = max(numbers(tmp_path / "run"))
    while max(numbers(tmp_path / "run")) < start_step + 3:
        time.sleep(0.1)
        assert launcher.poll() is None
    launcher.send_signal(signal.SIGTERM)
    output, _ = launcher.communicate(timeout=60)
    assert launcher.returncode != 0
    assert "stopped by SIGTERM after step" in output
