"""What a run says about where it ran."""

import shutil
import subprocess
import sys
from importlib.metadata import version

import pytest

import vidgen.environment as module
from vidgen.environment import environment, git_commit


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

    (tmp_path / "vidgen").mkdir()
    (tmp_path / "vidgen" / "environment.py").write_text("")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "vidgen" / "environment.py"))
    assert git_commit() == "not a git checkout"

    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    assert git_commit() == git("rev-parse", "--short=12", "HEAD")
    (tmp_path / "vidgen" / "environment.py").write_text("changed")
    assert git_commit().endswith("(modified)")

    installed = tmp_path / "venv" / "vidgen"
    installed.mkdir(parents=True)
    monkeypatch.setattr(module, "__file__", str(installed / "environment.py"))
    assert git_commit() == "not a git checkout"
