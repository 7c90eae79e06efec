"""The scripts and the notebook in examples/ run as they are, with fewer steps."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import av
import pytest
from forked import run_forked

from vidgen.data.sprites import write_sprites

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys) -> Callable[..., str]:
    """Runs an example in a folder with the pretrained model; returns what it printed."""
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    monkeypatch.chdir(tmp_path)

    def run_script(script: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return capsys.readouterr().out

    return run_script


def count_frames(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


@pytest.mark.parametrize(
    ("script", "files"),
    [
        ("quickstart.py", {"orbit-star.gif": 16, "bounce.gif": 16}),
        ("image_to_video.py", dict.fromkeys(("source.gif", "animated.gif", "transferred.gif", "varied.gif"), 16)),
        ("long_video.py", {"long.mp4": 24, "loop.mp4": 28}),
    ],
)
def test_scripts_write_their_videos(script, files, run, tmp_path):
    frames = ["--frames=24"] if script == "long_video.py" else []
    run(script, "--steps=2", "--output-dir=out", *frames)
    assert {path.name: count_frames(path) for path in (tmp_path / "out").iterdir()} == files


@pytest.mark.parametrize("model", ["pretrained/sprites", "pretrained/sprites/vae"])
def test_latent_swap_shows_four_clips_side_by_side(run, tmp_path, model):
    clips = write_sprites(tmp_path / "clips", 1, seed=0)
    run("latent_swap.py", str(clips[0]), str(clips[-1]), f"--model={model}", "--output=swap.mp4")
    with av.open(str(tmp_path / "swap.mp4")) as container:
        assert (container.streams.video[0].width, container.streams.video[0].height) == (256, 64)


def test_prompts_shows_a_video_per_dynamics_prompt(run, tmp_path):
    printed = run("prompts.py", "a red star", "orbits", "spins", "--steps=2", "--output=out/prompts.gif")
    assert Path(printed.strip()) == Path("out/prompts.gif") and count_frames(tmp_path / "out" / "prompts.gif") == 16
    with av.open(str(tmp_path / "out" / "prompts.gif")) as container:
        assert container.streams.video[0].width > 2 * 96


def test_fewer_steps_compares_three_samplers(run):
    assert len(run("fewer_steps.py", "--steps=4").splitlines()) == 3


def test_tiny_training_writes_a_sample(tmp_path, monkeypatch):
    """In a new process: Accelerate keeps one mixed precision per process."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--steps=2", "--clips-per-class=2", "--output-dir=tiny"]
    monkeypatch.setattr(sys, "argv", ["train_tiny.py", *arguments])
    run_forked(partial(runpy.run_path, run_name="__main__"), str(EXAMPLES / "train_tiny.py"))
    assert count_frames(tmp_path / "tiny" / "orbit.gif") == 16


def test_the_notebook_runs(tmp_path, monkeypatch):
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    monkeypatch.chdir(tmp_path)
    cells = json.loads((EXAMPLES / "tour.ipynb").read_text())["cells"]
    assert all(not cell.get("outputs") for cell in cells), "clear the outputs before committing the notebook"
    names: dict = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]).replace("STEPS = 25", "STEPS = 2"), "tour.ipynb", "exec"), names)
    assert names["swapped"].isfinite().all()


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_the_slurm_script_launches_the_training(tmp_path):
    """With stand-ins for SLURM's commands, the script starts the training that its header states."""
    for name, body in {"srun": '"$@"', "scontrol": "echo localhost", "accelerate": 'echo "accelerate $*"'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "a,b"}
    command = ["bash", str(EXAMPLES / "slurm.sh"), "data.root=/data", "output_dir=runs/vae"]
    env = {**os.environ, **slurm, "SLURM_RESTART_COUNT": "1", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    launched = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.split()
    for part in ("--num_machines 2", "--num_processes 16", "--machine_rank 1", "resume=latest data.root=/data"):
        assert part in " ".join(launched)
    assert Path(ROOT, launched[launched.index("--config_file") + 1]).is_file()
