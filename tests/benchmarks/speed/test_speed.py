"""Speed at smoke scale: every part runs and has its figures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import diffusers
import pytest
import torch

from benchmarks.common.harness import run_benchmark
from benchmarks.speed import __main__ as speed
from benchmarks.speed import peers as speed_peers
from benchmarks.speed import quantization, timing
from vidgen.common.errors import UserError


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_smoke_measures_every_part(tmp_path):
    speed.BENCHMARK.main(["--scale", "smoke", "--work-dir", str(tmp_path / "work"), "--results", str(tmp_path)])
    results = json.loads((tmp_path / "smoke" / "speed.json").read_text())["results"]
    parts = results["parts"]
    assert list(parts) == list(speed.PARTS) and all(parts.values())
    assert all(value > 0 for value in results["ceilings"].values())
    assert [row["tokens"] for row in parts["peers"]] == [28, 8, 28]
    page = (tmp_path / "speed.md").read_text()
    assert all(f"### `{name}`" in page for name in speed.PARTS)


def test_a_single_part_writes_no_record(tmp_path):
    results = tmp_path / "results"
    arguments = ["round_trip", "--scale", "smoke", "--work-dir", str(tmp_path), "--results", str(results)]
    speed.BENCHMARK.main(arguments)
    assert not results.exists() and list(
        json.loads((tmp_path / "smoke" / "speed.json").read_text())["results"]["parts"]
    )


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match="unknown part 'round'; choose from round_trip"):
        run_benchmark(speed.BENCHMARK, arguments=["round", "--work-dir", str(tmp_path)])
    if not torch.accelerator.is_available():
        with pytest.raises(UserError, match="requires a GPU, which is not available"):
            run_benchmark(speed.BENCHMARK, arguments=["--scale", "paper", "--work-dir", str(tmp_path)])


@pytest.mark.parametrize(("name", "tokens"), {"LTX": 147, "Wan": 980, "CogVideoX": 980}.items())
def test_tokens_of_peers_by_hand(name, tokens):
    model, patch_size = speed_peers.PEERS[name]
    with torch.device("meta"), torch.no_grad():
        vae = getattr(diffusers, model)().eval()
        shape = vae.encode(torch.empty(1, 3, speed_peers.FRAMES, 224, 224)).latent_dist.mode().shape[1:]
    assert math.prod(math.ceil(n / p) for n, p in zip(shape[1:], patch_size, strict=True)) == tokens


def test_peak_memory_of_a_new_process():
    held = torch.ones(2**28)  # 1 GiB in this process, which getrusage would also report for a new one
    assert timing.peak_gib("cpu") > 1
    assert timing.in_own_process(timing.peak_gib, "cpu") < 1
    del held


def test_quantization_compares_precisions_with_the_same_noise():
    rows = quantization.quantization("smoke")
    plain = {(row["model"], row["precision"]): row for row in rows if not row["compiled"]}
    assert len(rows) == 2 * len(plain)
    fp32, bf16 = (plain["VAE", precision]["reconstruction PSNR, dB"] for precision in ("fp32", "bf16"))
    assert fp32 > 20 and bf16 == pytest.approx(fp32, abs=0.5)
    assert plain["DiT", "fp32"]["samples to fp32, PSNR, dB"] is None  # equal
    assert plain["DiT", "bf16"]["samples to fp32, PSNR, dB"] > 25


def test_int8_keeps_the_quality():
    pytest.importorskip("torchao", reason="torchao is optional")
    rows = quantization.quantization("smoke")
    plain = {(row["model"], row["precision"]): row for row in rows if not row["compiled"]}
    fp32, int8 = (plain["VAE", precision]["reconstruction PSNR, dB"] for precision in ("fp32", quantization.INT8))
    assert int8 == pytest.approx(fp32, abs=0.5)
