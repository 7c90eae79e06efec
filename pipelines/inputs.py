"""The kinds of values that a pipeline is given: what Python would take silently for something else is refused."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
import torch

from autoencoder.tiling import is_whole


def check_whole_numbers(**values: Any) -> None:
    """Raise a `ValueError` for a value, or a value in a sequence, that is no whole number, such as True or 2.5."""
    for name, value in values.items():
        several = isinstance(value, tuple | list | range)
        if not all(is_whole(v) for v in (value if several else [value])):
            what = "whole numbers" if several else "a whole number"
            raise ValueError(f"{name} must be {what}, not {value!r}.")


def check_numbers(**values: Any) -> None:
    """Raise a `ValueError` for a value, or a value in a sequence, that is no number, such as True or "3"."""
    for name, value in values.items():
        for v in value if isinstance(value, tuple | list) else [value]:
            number = v.item() if isinstance(v, torch.Tensor) and v.ndim == 0 else v
            if not isinstance(number, numbers.Real) or isinstance(number, bool | np.bool_):
                raise ValueError(f"{name} must be a number, not {v!r}.")


def as_labels(class_labels: Any) -> list[Any]:
    """One or several class labels as a list; those of a tensor or an array as Python's numbers."""
    if isinstance(class_labels, torch.Tensor | np.ndarray):
        class_labels = class_labels.tolist()
    return list(class_labels) if isinstance(class_labels, list | tuple) else [class_labels]


def as_generators(generator: Any) -> torch.Generator | list[torch.Generator] | None:
    """A generator, or a list of some.

    Raises:
        ValueError: for anything else, such as a seed.
    """
    if isinstance(generator, tuple):
        generator = list(generator)
    for one in generator if isinstance(generator, list) else [generator]:
        if one is not None and not isinstance(one, torch.Generator):
            raise ValueError(
                f"generator must be a torch.Generator, or a list of them, not {one!r}; a seed is given as "
                "torch.Generator().manual_seed(seed)."
            )
    return generator
