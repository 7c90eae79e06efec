"""The words of captions, as bags weighted by their inverse document frequency."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F

WORD = r"\w+"


def split_words(caption: str) -> list[str]:
    """The words of a caption, in lower case."""
    return re.findall(WORD, caption.lower())


def weigh_words(captions: Iterable[str], min_count: int, max_words: int | None = None) -> dict[str, float]:
    """The logarithm of each word's inverse document frequency, in alphabetical order.

    Words in less than `min_count` different captions, or in all, are left out; so are the rarest of more than
    `max_words`.
    """
    distinct = set(captions)
    counts = Counter(word for caption in distinct for word in set(split_words(caption)))
    counts = {word: n for word, n in sorted(counts.items()) if min_count <= n < len(distinct)}
    frequent = sorted(counts, key=counts.get, reverse=True)[:max_words]
    return {word: torch.tensor(len(distinct) / counts[word]).log().item() for word in sorted(frequent)}


def bag_words(captions: Sequence[str], weights: dict[str, float]) -> torch.Tensor:
    """Bags of words (N, V) of unit length, float64; zero for a caption without a word of the vocabulary."""
    position = {word: i for i, word in enumerate(weights)}
    bags = torch.zeros(len(captions), len(weights), dtype=torch.float64)
    for bag, caption in zip(bags, captions, strict=True):
        for word in set(split_words(caption)) & position.keys():
            bag[position[word]] = weights[word]
    return F.normalize(bags, dim=1)
