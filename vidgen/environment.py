"""What a run or a number was made with: saved beside it, so that it can be made again."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("vidgen", "torch", "diffusers", "transformers", "accelerate", "torchmetrics", "numpy", "scipy", "av")


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
    """The commit of the checkout that this package is run from, with "(modified)" if files differ from it."""
    package = Path(__file__).resolve().parent
    try:
        if Path(_git(package, "rev-parse", "--show-toplevel")) != package.parent:
            return "not a git checkout"  # installed somewhere inside another project's repository
        commit = _git(package, "rev-parse", "--short=12", "HEAD")
        return f"{commit} (modified)" if _git(package, "status", "--porcelain") else commit
    except (OSError, subprocess.SubprocessError):
        return "not a git checkout"


def device() -> str:
    """The accelerator's name, or the processor's and the number of threads PyTorch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if torch.backends.mps.is_available():
        return f"{platform.processor() or platform.machine()} (MPS)"
    return f"{_cpu_name()}, {torch.get_num_threads()} threads"


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
