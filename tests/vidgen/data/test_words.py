"""The words of captions, their weights and bags."""

from __future__ import annotations

import math

import pytest
import torch

from vidgen.data.words import bag_words, split_words, weigh_words


def test_words_and_bags():
    assert split_words("Pick-up the CUP, à côté!") == ["pick", "up", "the", "cup", "à", "côté"]
    bags = bag_words(["cup cup lid", "unknown", ""], {"cup": 3.0, "lid": 4.0})
    torch.testing.assert_close(bags, torch.tensor([[0.6, 0.8], [0, 0], [0, 0]], dtype=torch.float64))


def test_weights_of_words_are_inverse_document_frequencies():
    captions = ["a red cup", "a red lid", "a blue cup", "A red red red cloth", "a red cup"]  # four are different
    weights = weigh_words(captions, min_count=2)
    assert list(weights) == ["cup", "red"]  # "a" is in all, the others in one
    assert weights == pytest.approx({"cup": math.log(4 / 2), "red": math.log(4 / 3)})
    assert list(weigh_words(captions, min_count=1, max_words=2)) == ["cup", "red"]
