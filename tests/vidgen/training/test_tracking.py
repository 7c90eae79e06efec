"""Throughput of a run, on a simulated clock."""

from __future__ import annotations

import pytest
from accelerate import Accelerator

from vidgen.training import tracking
from vidgen.training.tracking import SpeedMeter


def test_speed_counts_training_and_waiting(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(tracking.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(tracking, "matmul_rate", lambda device, dtype: 100.0)
    meter = SpeedMeter(Accelerator(cpu=True), flops_per_sample=5.0, samples_per_step=8, max_steps=14)
    for last_step in (4, 8):  # the second time as the first: nothing is left over
        for _ in range(4):
            with meter.waiting():
                now[0] += 1.0
            now[0] += 3.0
            meter.step()
        with meter.paused():
            now[0] += 100.0
        values = meter.read(last_step)
        assert values["clips_per_second"] == pytest.approx(2.0)  # 4 steps of 8 clips in 16 s
        assert values["data_wait"] == pytest.approx(0.25)
        assert values["tflops"] == pytest.approx(10e-12)
        assert values["mfu"] == pytest.approx(0.1)
        assert values["hours_left"] == pytest.approx((14 - last_step) * 4 / 3600)
