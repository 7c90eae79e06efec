"""Programs in a shell: exit codes, errors of one sentence without a traceback, and light imports."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from forked import run_forked

from vidgen.data.sprites import write_sprites
from vidgen.demo import __main__ as demo
from vidgen.demo import bundled, launch

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    """The state of Accelerate holds one mixed precision for the lifetime of a process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # small work: more threads would only wait for each other
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=cwd, env=environment, check=False
    )


def test_a_mistake_is_one_sentence_and_a_nonzero_exit():
    result = run("train_vae.py", "data.root=x", "train.seeds=1")
    assert result.returncode == 2
    assert "did you mean" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("program", "arguments", "sentence"),
    [
        ("train_vae.py", [], "error: data.root is not set"),
        ("train_vae.py", ["data.root=absent", "output_dir={tmp}"], "error: no dataset at absent"),
        ("train_dit.py", ["vae=absent", "data.root={tmp}/videos", "output_dir={tmp}"], "error: No VAE in absent"),
    ],
)
def test_mistakes_of_each_program(program, arguments, sentence, tmp_path, monkeypatch, capsys):
    write_sprites(tmp_path / "videos", 1, seed=0, resolution=32)
    monkeypatch.setattr(sys, "argv", [program, *(word.format(tmp=tmp_path) for word in arguments)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / program), run_name="__main__")
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err


def test_package_imports_are_light():
    code = "import sys, vidgen, autoencoder, pipelines; print(any(m in sys.modules for m in ('torch', 'diffusers')))"
    assert run("-c", code).stdout.strip() == "False"


def test_the_demo_runs(tmp_path, monkeypatch):
    """With trainings in forked processes instead of launched ones."""

    def run_program(command: list[str]) -> int:
        program, *arguments = command[command.index("--quiet") + 1 :]
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        run_forked(partial(runpy.run_path, run_name="__main__"), program)
        return 0

    monkeypatch.setattr(launch, "run_until_signal", run_program)
    sample = bundled.sample_clips
    for module in (bundled, demo):
        monkeypatch.setattr(
            module, "sample_clips", lambda *args, **options: sample(*args, **{**options, "num_inference_steps": 2})
        )
    monkeypatch.setattr(demo, "VALIDATION_PER_CLASS", 1)
    quick = ["--clips-per-class=2", "--samples-per-class=1"]
    for program in ("vae", "dit"):
        quick += [f"--{program}=train.max_train_steps=2", f"--{program}=train.train_batch_size=4"]
    demo.main([f"--output-dir={tmp_path}", *quick, "--dit=diffusion.num_inference_steps=2"])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["psnr_mean_color"] < summary["psnr_downsample"]
    assert {"psnr", "ssim", "frechet_generated", "frechet_real_vs_real", "seconds"} <= set(summary)
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:video/mp4") == 6
    assert page.count("data:image/png") == 10
    assert (tmp_path / "dit" / "final" / "model_index.json").exists()
