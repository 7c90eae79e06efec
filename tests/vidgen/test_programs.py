"""Programs in a shell: exit codes, errors of one sentence without a traceback, and light imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # small work: more threads would only wait for each other
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=cwd, env=environment, check=False
    )


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (["train_vae.py"], "error: data.root is not set"),
        (["train_vae.py", "data.root=x", "train.seeds=1"], "did you mean"),
        (["train_vae.py", "data.root=absent", "output_dir={tmp}"], "error: no dataset at absent"),
        (["train_dit.py", "vae=absent", "data.root=x", "output_dir={tmp}"], "error: No VAE in absent"),
    ],
)
def test_a_mistake_is_one_sentence_and_a_nonzero_exit(command, sentence, tmp_path):
    result = run(*(word.format(tmp=tmp_path) for word in command))
    assert result.returncode == 2
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr


def test_package_imports_are_light():
    code = "import sys, vidgen, autoencoder, pipelines; print(any(m in sys.modules for m in ('torch', 'diffusers')))"
    assert run("-c", code).stdout.strip() == "False"


def test_lower_layers_do_not_import_upper_ones():
    code = (
        "import sys, autoencoder.autoencoder_kl_vidtwin; "
        "assert not any(m.split('.')[0] in ('pipelines', 'vidgen') for m in sys.modules); "
        "import pipelines.pipeline_vidtwin; "
        "assert not any(m.split('.')[0] in ('vidgen', 'av', 'decord', 'accelerate_tracking') for m in sys.modules)"
    )
    result = run("-c", code)
    assert result.returncode == 0, result.stderr


def test_the_demo_runs(tmp_path):
    quick = [
        "--clips-per-class=2",
        "--samples-per-class=1",
        "--vae=train.max_train_steps=2",
        "--dit=train.max_train_steps=2",
    ]
    quick += ["--dit=train.train_batch_size=4", "--dit=diffusion.num_inference_steps=2"]
    result = run("-m", "vidgen.demo", f"--output-dir={tmp_path}", *quick)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "First picture" in result.stdout
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["psnr_mean_color"] < summary["psnr_downsample"]
    assert {"psnr", "ssim", "frechet_generated", "frechet_real_vs_real", "seconds"} <= set(summary)
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:video/mp4") == 3
    assert page.count("data:image/png") == 7
    assert (tmp_path / "dit" / "final" / "model_index.json").exists()
