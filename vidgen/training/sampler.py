"""Which samples a step sees, and the random numbers that belong to each.

Everything random about a sample is a function of (seed, number), where its number counts the samples of a run, epoch
after epoch. So a run does not depend on how many processes or workers share it, on how a batch is cut for gradient
accumulation, or on where it was stopped and resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

UNIFORMS = 8  # numbers in [0, 1) for whatever an objective draws besides noise


class EpochStream(Sampler[list[int]]):
    """Batches of sample numbers, epoch after epoch without end: every index once an epoch, in an order of its own.

    A sample's number is epoch * length + index. Batches run on over the ends of epochs, so no sample is left out.

    Args:
        length: samples in an epoch.
        batch_size: of a process; Accelerate deals the batches out to the processes in turn.
        seed: of the orders.
    """

    drop_last = True  # what Accelerate asks: every batch is full

    def __init__(self, length: int, batch_size: int, seed: int) -> None:
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.start = 0  # samples already seen, of all processes

    def __iter__(self) -> Iterator[list[int]]:
        batch: list[int] = []
        epoch, at = divmod(self.start, self.length)
        while True:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.length)
            for index in order[at:].tolist():
                batch.append(epoch * self.length + index)
                if len(batch) == self.batch_size:
                    yield batch
                    batch = []
            epoch, at = epoch + 1, 0


class TrainingSamples(Dataset):
    """A data set's samples by number, each with its own random numbers.

    Args:
        dataset: maps (epoch, index) to a dict.
        noise_size: normal numbers a sample gets.
        seed: of these numbers.

    A sample is the data set's with `noise` (noise_size,), standard normal, and `uniform` (UNIFORMS,) in [0, 1).
    """

    def __init__(self, dataset: Dataset, noise_size: int, seed: int) -> None:
        self.dataset, self.noise_size, self.seed = dataset, noise_size, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(derived_seed(self.seed, number))
        uniform = torch.rand(UNIFORMS, generator=generator)
        noise = torch.randn(self.noise_size, generator=generator)
        return {**self.dataset[divmod(number, len(self.dataset))], "noise": noise, "uniform": uniform}


def collate_samples(
    collate: Callable[[Sequence[dict[str, Any]]], dict[str, Any]], samples: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """A batch as the data set's own `collate` makes it, with `noise` (B, noise_size) and `uniform` (B, UNIFORMS)."""
    drawn = {key: torch.stack([sample[key] for sample in samples]) for key in ("noise", "uniform")}
    return {**collate(samples), **drawn}


def derived_seed(*parts: int) -> int:
    """One seed from several numbers; another for every other tuple of them."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)
