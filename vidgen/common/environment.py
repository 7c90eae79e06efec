"""Software, hardware and command of a run, saved with its results; number of CPU threads."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

PACKAGES = ("vidgen", "torch", "diffusers", "transformers", "accelerate", "torchmetrics", "numpy", "scipy", "av")
LAUNCHERS = ("accelerate", "torchrun", "torch.distributed")  # words in the command lines of launchers
LAUNCHED_VARIABLES = {"LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"}  # each launcher sets one of them


def environment() -> dict[str, str]:
    """Command, git commit, versions of Python and of the installed `PACKAGES`, and the device, each as text."""
    facts = {"command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]), "git commit": git_commit()}
    facts["python"] = platform.python_version()
    for package in PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    facts["device"] = device()
    return facts


def git_commit() -> str:
    """The commit of the checkout that contains this package, with "(modified)" if files differ from it."""
    package = Path(__file__).resolve().parents[1]
    try:
        if Path(_git(package, "rev-parse", "--show-toplevel")) != package.parent:
            return "not a git checkout"  # installed somewhere inside another project's repository
        commit = _git(package, "rev-parse", "--short=12", "HEAD")
        return f"{commit} (modified)" if _git(package, "status", "--porcelain") else commit
    except (OSError, subprocess.SubprocessError):
        return "not a git checkout"


def device() -> str:
    """The name of the accelerator, or that of the processor with the number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if torch.backends.mps.is_available():
        return f"{platform.processor() or platform.machine()} (MPS)"
    return f"{_cpu_name()}, {torch.get_num_threads()} threads"


def get_process_state() -> PartialState:
    """Return Accelerate's state of this process, on the device that an `Accelerator` will take."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def set_cpu_threads() -> None:
    """Set the number of CPU threads to this process's share of the cores, unless the user chose a number.

    `accelerate launch` and `torchrun` set OMP_NUM_THREADS to 1 if the user did not. A single process takes all cores
    that it may run on; several processes on one machine share them. The main process prints the number. Does nothing
    on an accelerator.
    """
    state = get_process_state()
    if state.device.type != "cpu":
        return
    if _launcher_chose_threads():
        torch.set_num_threads(max(1, count_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if state.is_main_process:
        print(f"CPU threads: {torch.get_num_threads()} per process, {count_cores()} cores.", flush=True)


def count_cores() -> int:
    """The number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _launcher_chose_threads() -> bool:
    """Whether OMP_NUM_THREADS is a launcher's default, set neither by an option nor before the launcher started."""
    if os.environ.get("OMP_NUM_THREADS") != "1" or not LAUNCHED_VARIABLES & os.environ.keys():
        return False
    try:
        for parent in psutil.Process().parents():
            words = parent.cmdline()
            if any(name in word for name in LAUNCHERS for word in words):
                options = {word.split("=")[0].strip("-").replace("-", "_") for word in words}
                return "num_cpu_threads_per_process" not in options and "OMP_NUM_THREADS" not in parent.environ()
    except psutil.Error:
        pass  # a process of another user
    return False


def _git(folder: Path, *arguments: str) -> str:
    result = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
    )
    return result.stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
