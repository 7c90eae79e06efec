"""Checks of a pipeline's arguments: values that Python would silently convert are refused."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
import torch

from autoencoder.tiling import is_whole

Generator = torch.Generator | list[torch.Generator] | None


def check_whole_numbers(**values: Any) -> None:
    """Raise a `ValueError` for a value, or a value in a sequence, that is no whole number, such as True or 2.5."""
    for name, value in values.items():
        is_sequence = isinstance(value, tuple | list | range)
        if not all(is_whole(v) for v in (value if is_sequence else [value])):
            expected = "whole numbers" if is_sequence else "a whole number"
            raise ValueError(f"{name} must be {expected}, not {value!r}.")


def check_numbers(**values: Any) -> None:
    """Raise a `ValueError` for a value, or a value in a sequence, that is no number, such as True or "3"."""
    for name, value in values.items():
        for v in value if isinstance(value, tuple | list) else [value]:
            number = v.item() if isinstance(v, torch.Tensor) and v.ndim == 0 else v
            if not isinstance(number, numbers.Real) or isinstance(number, bool | np.bool_):
                raise ValueError(f"{name} must be a number, not {v!r}.")


def check_generators(generator: Generator, batch_size: int) -> None:
    """Raise a `ValueError` for a list of generators whose length is not the number of videos."""
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(
            f"{len(generator)} generators were passed for {batch_size} videos: pass one, or one per video."
        )


def as_labels(class_labels: Any) -> list[Any]:
    """Convert one or several class labels to a list; labels of a tensor or an array to Python numbers."""
    if isinstance(class_labels, torch.Tensor | np.ndarray):
        class_labels = class_labels.tolist()
    return list(class_labels) if isinstance(class_labels, list | tuple) else [class_labels]


def as_generators(generator: Any) -> Generator:
    """Return a generator or a list of generators.

    Raises:
        ValueError: for anything else, such as a seed.
    """
    if isinstance(generator, tuple):
        generator = list(generator)
    for item in generator if isinstance(generator, list) else [generator]:
        if item is not None and not isinstance(item, torch.Generator):
            raise ValueError(
                f"generator must be a torch.Generator or a list of them, not {item!r}; for a seed, pass "
                "torch.Generator().manual_seed(seed)."
            )
    return generator
