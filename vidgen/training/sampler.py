"""Order of the training samples, and the random numbers of each.

All randomness of a sample is a function of (seed, number), where the number counts the samples of a run over all
epochs. So a run does not depend on the number of processes or workers, on how a batch is split for gradient
accumulation, or on where it was interrupted and resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

UNIFORMS = 9  # uniform numbers of each sample, for all that a loss draws besides noise
FIRST_UNIFORMS = 8  # of them are drawn before the noise; later additions follow it, so that earlier runs are equal


class InfiniteBatchSampler(Sampler[list[int]]):
    """Endless batches of sample numbers: every epoch has each index once, in a different order.

    The number of a sample is epoch * length + index. Batches continue across epochs, so no sample is left out.

    Args:
        length: samples per epoch.
        batch_size: per process; Accelerate gives the batches to the processes in turn.
        seed: of the orders.
    """

    drop_last = True  # tells Accelerate that every batch is full

    def __init__(self, length: int, batch_size: int, seed: int) -> None:
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.start = 0  # samples that all processes have seen already

    def __iter__(self) -> Iterator[list[int]]:
        batch: list[int] = []
        epoch, first = divmod(self.start, self.length)
        while True:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.length)
            for index in order[first:].tolist():
                batch.append(epoch * self.length + index)
                if len(batch) == self.batch_size:
                    yield batch
                    batch = []
            epoch, first = epoch + 1, 0


class SeededDataset(Dataset):
    """The samples of a dataset by number, each with random numbers that depend on (seed, number) only.

    Adds `noise` (noise_size,), standard normal, and `uniform` (UNIFORMS + further_uniforms,) in [0, 1) to a sample.

    Args:
        dataset: maps (epoch, index) to a dictionary.
        noise_size: normal numbers per sample.
        seed: of the random numbers.
        further_uniforms: uniform numbers per sample that only some losses draw; they do not change the others.
    """

    def __init__(self, dataset: Dataset, noise_size: int, seed: int, further_uniforms: int = 0) -> None:
        self.dataset, self.noise_size, self.seed = dataset, noise_size, seed
        self.further_uniforms = further_uniforms

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, number))
        uniform = torch.rand(FIRST_UNIFORMS, generator=generator)
        noise = torch.randn(self.noise_size, generator=generator)
        later = [torch.rand(size, generator=generator) for size in (UNIFORMS - FIRST_UNIFORMS, self.further_uniforms)]
        uniform = torch.cat([uniform, *later])
        return {**self.dataset[divmod(number, len(self.dataset))], "noise": noise, "uniform": uniform}


def collate_samples(
    collate: Callable[[Sequence[dict[str, Any]]], dict[str, Any]], samples: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Collate with the dataset's `collate`, and add `noise` (B, noise_size) and `uniform` (B, U)."""
    randomness = {key: torch.stack([sample[key] for sample in samples]) for key in ("noise", "uniform")}
    return {**collate(samples), **randomness}


def derive_seed(*parts: int) -> int:
    """A seed in [0, 2^63) from several numbers, different for every tuple of them."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)
