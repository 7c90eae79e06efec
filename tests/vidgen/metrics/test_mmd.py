"""The MMD against an independent formula in float64, and its interval."""

import numpy as np
import pytest
import torch

from vidgen.metrics.frechet import FeatureStatistics
from vidgen.metrics.mmd import mmd, mmd_interval


def statistics(features, numbers=None, groups=64):
    return FeatureStatistics.of(torch.from_numpy(features), numbers, groups)


def reference(x, y, clips_x=None, clips_y=None):
    """The unbiased estimator with all kernel matrices; pairs of vectors of one clip do not count."""

    def kernel(a, b):
        return (a @ b.T / a.shape[1]) ** 2

    def mean(a, clips):
        clips = np.arange(len(a)) if clips is None else np.asarray(clips)
        other = clips[:, None] != clips[None]
        return kernel(a, a)[other].mean()

    return mean(x, clips_x) + mean(y, clips_y) - 2 * kernel(x, y).mean()


def test_mmd_agrees_with_all_pairs():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 7)) + 1, 1.2 * rng.normal(size=(41, 7))
    for groups in (1, 64):
        assert mmd(statistics(x, groups=groups), statistics(y, groups=groups)) == pytest.approx(
            reference(x, y), rel=1e-10
        )
    rows_x, rows_y = x[:48], y[:40]  # four vectors of each sample
    clips_x, clips_y = np.arange(48) // 4, np.arange(40) // 4
    a, b = statistics(rows_x, range(12)), statistics(rows_y, range(10))
    assert mmd(a, b) == pytest.approx(reference(rows_x, rows_y, clips_x, clips_y), rel=1e-10)


def test_merged_and_saved_statistics_give_the_same():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(30, 5)), rng.normal(size=(30, 5)) + 1
    whole, part = statistics(x), statistics(x[:10], range(10))
    part.merge(statistics(x[10:], range(10, 30)))
    loaded = FeatureStatistics.from_state_dict(part.state_dict())
    assert mmd(loaded, statistics(y)) == pytest.approx(mmd(whole, statistics(y)), rel=1e-10)
    old = {name: value for name, value in part.state_dict().items() if name != "same_sample"}
    with pytest.raises(ValueError, match="compute them again"):
        mmd(FeatureStatistics.from_state_dict(old), whole)


def test_the_interval_holds_zero_for_equal_distributions_and_excludes_it_for_others():
    rng = np.random.default_rng(2)
    holds = []
    for shift in (0.0, 1.0):
        for _ in range(20):
            a, b = statistics(rng.normal(size=(200, 7))), statistics(rng.normal(size=(200, 7)) + shift)
            low, high = mmd_interval(a, b, resamples=200)
            assert low < mmd(a, b) < high
            holds.append(low <= 0 <= high)
    assert sum(holds[:20]) >= 18 and not any(holds[20:])


def test_too_few_samples_are_refused():
    one, two = statistics(np.ones((1, 3))), statistics(np.ones((2, 3)))
    with pytest.raises(ValueError, match="2 samples or more"):
        mmd(one, two)
    with pytest.raises(ValueError, match="3 and 2 dimensions"):
        mmd(two, statistics(np.ones((2, 2))))
    with pytest.raises(ValueError, match="2 groups"):
        mmd_interval(statistics(np.ones((4, 3)), groups=1), two)
