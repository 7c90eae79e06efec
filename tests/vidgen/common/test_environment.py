"""Software and hardware of a run; number of CPU threads."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import vidgen.common.environment as module
from vidgen.common.environment import environment, git_commit

ROOT = Path(__file__).parents[3]


def test_facts_are_text_and_complete(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/train_vae.py", "--config", "two words.yaml"])
    facts = environment()
    assert facts["command"] == "train_vae.py --config 'two words.yaml'"
    assert facts["torch"] == version("torch")
    assert {"git commit", "python", "numpy", "device"} <= facts.keys()
    assert all(isinstance(value, str) and value for value in facts.values())


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_commit_is_this_checkouts_and_never_another_projects(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        result = subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True)
        return result.stdout.decode().strip()

    source = tmp_path / "vidgen" / "common" / "environment.py"
    source.parent.mkdir(parents=True)
    source.write_text("")
    monkeypatch.setattr(module, "__file__", str(source))
    assert git_commit() == "not a git checkout"

    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    assert git_commit() == git("rev-parse", "--short=12", "HEAD")
    source.write_text("changed")
    assert git_commit().endswith("(modified)")

    installed = tmp_path / "venv" / "vidgen" / "common"
    installed.mkdir(parents=True)
    monkeypatch.setattr(module, "__file__", str(installed / "environment.py"))
    assert git_commit() == "not a git checkout"


PRINT_THREADS = """
import torch
from vidgen.common.environment import set_cpu_threads

set_cpu_threads()
print(torch.get_num_threads())
"""


@pytest.mark.parametrize(
    ("user", "options", "processes", "expected"),
    [
        ({}, [], 1, "cores"),
        ({}, [], 2, "share"),
        ({"OMP_NUM_THREADS": "1"}, [], 1, 1),
        ({}, ["--num_cpu_threads_per_process=1"], 1, 1),
    ],
)
def test_a_launched_process_computes_on_its_share_of_the_cores(tmp_path, user, options, processes, expected):
    """The launcher is a stand-in that does to the environment what `accelerate launch` does."""
    launcher = tmp_path / "accelerate"
    launcher.write_text(
        "import os, subprocess, sys\n"
        "os.environ.setdefault('OMP_NUM_THREADS', '1')\n"
        f"os.environ |= {{'ACCELERATE_MIXED_PRECISION': 'no', 'LOCAL_WORLD_SIZE': '{processes}'}}\n"
        f"sys.exit(subprocess.run([sys.executable, '-c', {PRINT_THREADS!r}]).returncode)\n"
    )
    environment = {key: value for key, value in os.environ.items() if key not in module.LAUNCHED_VARIABLES}
    environment.pop("OMP_NUM_THREADS", None)
    command = [sys.executable, str(launcher), "launch", *options]
    result = subprocess.run(command, env=environment | user, capture_output=True, text=True, cwd=ROOT, check=True)
    cores = module.count_cores()
    threads = {"cores": cores, "share": max(1, cores // 2)}.get(expected, expected)
    assert result.stdout.splitlines() == [f"CPU threads: {threads} per process, {cores} cores.", str(threads)]
