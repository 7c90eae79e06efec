"""The measured rate of half-precision matrix products."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses import FakeTensorMode

import autoencoder.matmul_speed as module
from autoencoder.matmul_speed import is_clearly_faster, matmul_speedup


@pytest.fixture(autouse=True)
def _clear_cache():
    module._measure_speedup.cache_clear()
    yield
    module._measure_speedup.cache_clear()


def test_the_speedup_of_float32_is_one():
    assert matmul_speedup(torch.float32) == 1.0


@pytest.mark.parametrize(("half_seconds", "faster"), [(0.001, True), (0.003, False), (0.5, False)])
def test_clearly_faster_is_a_ratio_of_times(half_seconds, faster, monkeypatch):
    seconds = {torch.float32: 0.002, torch.bfloat16: half_seconds}
    monkeypatch.setattr(module, "_time_product", lambda a, b: seconds[a.dtype])
    assert matmul_speedup(torch.bfloat16) == pytest.approx(0.002 / half_seconds)
    assert is_clearly_faster(torch.bfloat16) is faster


def test_it_is_measured_once_without_the_callers_modes(monkeypatch):
    products = []

    def record(a, b):
        products.append((type(a), a.dtype, torch.is_autocast_enabled("cpu")))
        return 1.0

    monkeypatch.setattr(module, "_time_product", record)
    with FakeTensorMode(), torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        matmul_speedup(torch.bfloat16)
        first = len(products)
        matmul_speedup(torch.bfloat16)
    assert 0 < first == len(products)
    assert {kind for kind, _, _ in products} == {torch.Tensor}
    assert not any(autocast for _, _, autocast in products)


def test_the_number_of_threads_is_restored():
    before = torch.get_num_threads()
    matmul_speedup(torch.bfloat16)
    in_a_new_thread = ThreadPoolExecutor(1).submit(torch.get_num_threads).result()
    assert torch.get_num_threads() == in_a_new_thread == before


def test_an_unsupported_dtype_is_not_faster(monkeypatch):
    def refuse(a, b):
        raise RuntimeError('"addmm" not implemented')

    monkeypatch.setattr(module, "_time_product", refuse)
    assert matmul_speedup(torch.bfloat16) == 0.0
    assert not is_clearly_faster(torch.bfloat16)


def test_a_slow_product_is_not_repeated(monkeypatch):
    times = iter([0.0, 1.0, 2.0, 3.0])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(times))
    count = []
    monkeypatch.setattr(module, "_time_product", lambda a, b: count.append(a.dtype) or 1.0)
    matmul_speedup(torch.bfloat16)
    assert len(count) == 2


def test_the_result_is_a_constant_in_compiled_functions(monkeypatch):
    monkeypatch.setattr(module, "_time_product", lambda a, b: 1.0 if a.dtype == torch.float32 else 0.25)
    compiled = torch.compile(lambda x: x * matmul_speedup(torch.bfloat16), fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 4.0))


def test_measuring_draws_no_random_numbers():
    module.is_onednn_faster.cache_clear()
    before = torch.get_rng_state()
    matmul_speedup(torch.bfloat16)
    module.is_onednn_faster()
    assert torch.equal(torch.get_rng_state(), before)
