"""speed.py at its smoke scale: that every part measures what it says, not how fast."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import diffusers
import pytest
import torch

from benchmarks.speed import __main__ as speed
from benchmarks.speed import peers as speed_peers
from benchmarks.speed import timing
from vidgen.common.errors import UserError


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_smoke_measures_every_part(tmp_path):
    speed.BENCHMARK.main(["--scale", "smoke", "--work-dir", str(tmp_path / "work"), "--results", str(tmp_path)])
    results = json.loads((tmp_path / "speed.json").read_text())["results"]
    parts = results["parts"]
    assert list(parts) == list(speed.PARTS) and all(parts.values())
    assert all(value > 0 for value in results["ceilings"].values())
    assert {row["length"] for row in parts["attention"]} == {16, 65, 196, 1008}
    assert parts["rounding"][0]["PSNR of bf16 to fp32, dB"] > 40
    assert [row["tokens"] for row in parts["peers"]] == [28, 8]
    assert [row["sizes"] for row in parts["growth"]][3] == [49 + 224, 16 * 49 + 224]
    assert parts["video"][1]["frames"] == 10 * parts["video"][0]["frames"] == 40
    page = (tmp_path / "speed.md").read_text()
    assert "| bf16 round trip, share of the matmul rate |" in page and "| sampling and decoding over the sum" in page
    assert all(f"### `{name}`" in page for name in speed.PARTS)
    assert (tmp_path / "speed.png").stat().st_size > 1000


def test_a_part_alone_is_no_record(tmp_path):
    results = tmp_path / "results"
    arguments = ["rounding", "--scale", "smoke", "--work-dir", str(tmp_path), "--results", str(results)]
    speed.BENCHMARK.main(arguments)
    assert not results.exists() and list(json.loads((tmp_path / "speed.json").read_text())["results"]["parts"])


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match="unknown part 'round'; there are round_trip"):
        speed.BENCHMARK._main(["round", "--work-dir", str(tmp_path)])
    if not torch.accelerator.is_available():
        with pytest.raises(UserError, match="measures a GPU and there is none"):
            speed.BENCHMARK._main(["--scale", "paper", "--work-dir", str(tmp_path)])


def test_bounds_are_checked_against_the_run():
    peers = [
        {"autoencoder": name, "round trip, s": s, "latent values": v, "DiT step, s": d}
        for name, s, v, d in (
            ("VidTwin", 2, 100, 8),
            ("VidTwin, 65 tokens", 2, 100, 1),
            ("A", 1, 300, 3),
            ("B", 9, 90, 2),
        )
    ]
    step = {"size": "base", "precision": "bf16", "checkpointing": True, speed.SHARE: 0.46}
    results = {"parts": {"peers": [*peers, {"autoencoder": "C", "failed": "memory"}], "train_step": [step]}}
    checks = {what: (value, speed.holds(value, bound)) for what, value, bound in speed.held(results)}
    assert checks == {
        "base, bf16 training step, checkpointing: share of the matmul rate": (0.46, True),
        "round trip: A over ours": (0.5, False),
        "latent values: B over ours": (0.9, False),
        "DiT step: B over our 65 tokens": (2.0, True),
    }
    assert speed.holds(1.1, "at most 1.10") and not speed.holds(1.11, "at most 1.10")


def test_an_exponent_is_that_of_the_power_law():
    sizes = [1, 2, 4, 8]
    assert timing.exponent(sizes, [3 * size**1.5 for size in sizes]) == pytest.approx(1.5)
    assert timing.exponent(sizes, [7.0] * 4) == pytest.approx(0)


@pytest.mark.parametrize(("name", "tokens"), {"LTX": 147, "Wan": 980, "CogVideoX": 980}.items())
def test_peers_have_the_tokens_of_their_published_transformers(name, tokens):
    peer = speed_peers.PEERS[name]
    with torch.device("meta"), torch.no_grad():
        vae = getattr(diffusers, peer.model)().eval()
        shape = vae.encode(torch.empty(1, 3, peer.frames, 224, 224)).latent_dist.mode().shape[1:]
    assert math.prod(math.ceil(n / p) for n, p in zip(shape[1:], peer.patch, strict=True)) == tokens


def test_the_peak_of_a_process_is_its_own():
    held = torch.ones(2**28)  # 1 GiB here, which a new process would otherwise be said to have had
    assert timing.peak_gib("cpu") > 1
    assert timing.in_own_process(timing.peak_gib, "cpu") < 1
    del held
