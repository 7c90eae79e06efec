"""Order of the samples, and their random numbers."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidgen.training.sampler import UNIFORMS, InfiniteBatchSampler, SeededDataset, collate_samples, derive_seed


def taken(stream: InfiniteBatchSampler, batches: int, start: int = 0) -> list[int]:
    stream.start = start
    return [number for batch in islice(stream, batches) for number in batch]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 3))
def test_every_index_comes_once_an_epoch(length, batch_size, seed):
    numbers = taken(InfiniteBatchSampler(length, batch_size, seed), 3 * length)
    for epoch in range(3):
        seen = numbers[epoch * length : (epoch + 1) * length]
        assert sorted(seen) == list(range(epoch * length, (epoch + 1) * length))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 30), st.integers(1, 6), st.integers(0, 200))
def test_it_continues_from_any_sample_in_any_batch_size(length, batch_size, start):
    whole = taken(InfiniteBatchSampler(length, 1, 0), start + 40)
    resumed = taken(InfiniteBatchSampler(length, batch_size, 0), 40 // batch_size, start)
    assert resumed == whole[start : start + len(resumed)]


def test_orders_differ_by_epoch_and_seed():
    first = taken(InfiniteBatchSampler(20, 20, 0), 2)
    assert [n - 20 for n in first[20:]] != first[:20]
    assert taken(InfiniteBatchSampler(20, 20, 1), 1) != first[:20]


class Numbers:
    def __len__(self) -> int:
        return 5

    def __getitem__(self, at: tuple[int, int]) -> dict:
        return {"at": at}


def test_random_numbers_belong_to_the_sample():
    samples = SeededDataset(Numbers(), noise_size=1000, seed=0)
    assert samples[13]["at"] == (2, 3)
    batch = collate_samples(
        lambda items: {"at": [item["at"] for item in items]}, [samples[3], samples[13], samples[3]]
    )
    assert batch["noise"].shape == (3, 1000)
    assert batch["uniform"].shape == (3, UNIFORMS)
    assert batch["noise"].mean().abs() < 0.1
    assert 0.9 < batch["noise"].std() < 1.1
    assert torch.equal(batch["noise"][0], batch["noise"][2])
    assert not torch.equal(batch["noise"][0], batch["noise"][1])
    assert not torch.equal(SeededDataset(Numbers(), 1000, seed=1)[3]["noise"], batch["noise"][0])


def test_drawing_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    SeededDataset(Numbers(), 10, seed=0)[0]
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("parts", [(1, 2), (2, 1), (1,), (1, 2, 0)])
def test_different_parts_give_different_seeds(parts):
    assert derive_seed(*parts) == derive_seed(*parts) != derive_seed(12)
    assert 0 <= derive_seed(*parts) < 2**63


def test_further_random_numbers_leave_the_others_alone():
    few, many = (SeededDataset(Numbers(), 20, seed=0, further_uniforms=n)[3] for n in (0, 7))
    assert many["uniform"].shape == (UNIFORMS + 7,)
    assert torch.equal(many["uniform"][:UNIFORMS], few["uniform"])
    assert torch.equal(many["noise"], few["noise"])
