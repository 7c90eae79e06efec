"""Streaming statistics against NumPy's; the Fréchet distance against independent formulas and closed forms."""

import warnings

import mpmath
import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidgen.metrics.frechet import (
    INFINITY_GROUPS,
    ClassScore,
    FeatureStatistics,
    RankDeficientWarning,
    bootstrap_interval,
    choose_num_groups,
    frechet_distance,
    frechet_infinity,
    group_of,
)


def features(n, d, seed=0, mix=True):
    """Correlated Gaussian features (n, d) with unequal variances and a mean."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    if mix:
        x = x @ torch.randn(d, d, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return x + torch.randn(d, generator=g, dtype=torch.float64)


def distance(x, y):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RankDeficientWarning)
        return frechet_distance(FeatureStatistics.of(x), FeatureStatistics.of(y))


def reference_from_data(x, y):
    """d^2 without any matrix square root: tr sqrt(S1^1/2 S2 S1^1/2) is the nuclear norm of X1 X2^T, centered."""
    x, y = x.numpy(), y.numpy()
    a = (x - x.mean(0)) / np.sqrt(len(x) - 1)
    b = (y - y.mean(0)) / np.sqrt(len(y) - 1)
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * cross


def reference_from_sqrtm(x, y):
    x, y = x.numpy(), y.numpy()
    s1, s2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(s1).real
    cross = np.trace(scipy.linalg.sqrtm(root @ s2 @ root).real)
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * cross


def reference_in_fifty_digits(x, y):
    """d^2 by its textbook formula: the square roots of the eigenvalues of S1 S2, a matrix of no symmetry."""
    with mpmath.workdps(50):

        def moments(z):
            z = mpmath.matrix(z.tolist())
            mean = [mpmath.fsum(z[:, j]) / z.rows for j in range(z.cols)]
            centered = mpmath.matrix([[z[i, j] - mean[j] for j in range(z.cols)] for i in range(z.rows)])
            return mean, centered.T * centered / (z.rows - 1)

        (m1, s1), (m2, s2) = moments(x), moments(y)
        roots = mpmath.eig(s1 * s2, left=False, right=False)
        cross = mpmath.fsum(mpmath.sqrt(root).real for root in roots)
        trace = mpmath.fsum(s1[i, i] + s2[i, i] for i in range(s1.rows))
        return float(mpmath.fsum((a - b) ** 2 for a, b in zip(m1, m2, strict=True)) + trace - 2 * cross)


# --- statistics -----------------------------------------------------------------------------------------------------


def assert_statistics(statistics, x, rtol=1e-10):
    assert statistics.count == len(x)
    np.testing.assert_allclose(statistics.mean.numpy(), x.numpy().mean(0), rtol=rtol, atol=1e-12)
    np.testing.assert_allclose(
        statistics.covariance.numpy(), np.atleast_2d(np.cov(x.numpy(), rowvar=False)), rtol=rtol, atol=1e-10
    )


@given(
    n=st.integers(2, 40),
    d=st.integers(1, 6),
    seed=st.integers(0, 1000),
    cuts=st.lists(st.integers(0, 40), max_size=6),
    permute=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_batching_and_order_gives_the_same_statistics(n, d, seed, cuts, permute):
    x = features(n, d, seed)
    edges = [0, *sorted(min(c, n) for c in cuts), n]
    shuffled = x[torch.randperm(n, generator=torch.Generator().manual_seed(seed))] if permute else x
    statistics = FeatureStatistics(d)
    for first, last in zip(edges, edges[1:], strict=False):  # some batches are empty
        statistics.update(shuffled[first:last])
    assert_statistics(statistics, x)


@given(sizes=st.lists(st.integers(0, 10), min_size=3, max_size=3), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_merging_is_associative_and_commutative(sizes, seed):
    sizes = [size + (i == 0) * 2 for i, size in enumerate(sizes)]
    parts = features(sum(sizes), 4, seed).split(sizes)

    def merged(*groups):
        total = FeatureStatistics(4)
        for group in groups:
            total.merge(group if isinstance(group, FeatureStatistics) else FeatureStatistics.of(group))
        return total

    a, b, c = parts
    everything = torch.cat(parts)
    for total in (merged(merged(a, b), c), merged(a, merged(b, c)), merged(c, a, b)):
        assert_statistics(total, everything)


def test_a_far_mean_costs_no_digits():
    x = features(200, 5, mix=False)
    near, far = FeatureStatistics(5), FeatureStatistics(5)
    for batch in x.split(7):
        near.update(batch)
        far.update(batch + 1e6)
    np.testing.assert_allclose(far.covariance.numpy(), near.covariance.numpy(), rtol=1e-7, atol=1e-8)


def test_merging_leaves_the_other_alone():
    a, b = FeatureStatistics.of(features(10, 3)), FeatureStatistics.of(features(8, 3, 1))
    before = b.mean.clone(), b.scatters.clone(), b.count
    a.merge(b)
    a.update(features(5, 3, 2))
    assert torch.equal(b.mean, before[0]) and torch.equal(b.scatters, before[1]) and b.count == before[2]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_batches_with_non_finite_features_are_refused(value):
    statistics = FeatureStatistics.of(features(10, 3))
    bad = features(6, 3, 1)
    bad[4, 1] = value
    with pytest.raises(ValueError, match=r"1 of 6 feature vectors .* row 4"):
        statistics.update(bad)
    assert_statistics(statistics, features(10, 3))


def test_shapes_and_counts_are_checked():
    with pytest.raises(ValueError, match=r"\(N, 3\)"):
        FeatureStatistics(3).update(torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"\(N, D\)"):
        FeatureStatistics.of(torch.zeros(2, 4, 4))
    with pytest.raises(ValueError, match="4 dimensions into 3"):
        FeatureStatistics(3).merge(FeatureStatistics(4))
    with pytest.raises(ValueError, match="2 feature vectors or more"):
        _ = FeatureStatistics.of(torch.zeros(1, 3)).covariance


# --- distance -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m", "d"), [(50, 80, 8), (300, 200, 40), (20, 20, 1)])
def test_random_sets_match_both_references(n, m, d):
    x, y = features(n, d), 1.3 * features(m, d, 1)
    assert distance(x, y) == pytest.approx(reference_from_data(x, y), rel=1e-9)
    if d > 1:
        assert distance(x, y) == pytest.approx(reference_from_sqrtm(x, y), rel=1e-6)


@pytest.mark.parametrize(("n", "m", "d"), [(30, 20, 6), (4, 20, 7), (4, 3, 7), (30, 20, 2)])
def test_random_and_rank_deficient_sets_match_fifty_digits(n, m, d):
    x, y = features(n, d), 0.8 * features(m, d, 1)
    assert distance(x, y) == pytest.approx(reference_in_fifty_digits(x, y), rel=1e-9)


@pytest.mark.parametrize("change", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("n", [30, 4])
def test_sets_nearly_the_same_match_fifty_digits(change, n):
    """Small noise in every direction: six digits remain, where traces in float64 would lose all."""
    x = features(n, 6)
    y = x + change * features(n, 6, 1, mix=False)
    assert distance(x, y) == pytest.approx(reference_in_fifty_digits(x, y), rel=1e-6, abs=0)


@pytest.mark.parametrize(("n", "m"), [(6, 9), (6, 100), (100, 6), (2, 2)])
def test_sets_smaller_than_their_dimension_match_the_reference(n, m):
    x, y = features(n, 30), features(m, 30, 1)
    assert distance(x, y) == pytest.approx(reference_from_data(x, y), rel=1e-9)


def test_a_decomposition_that_fails_to_converge_is_done_by_another_algorithm(monkeypatch):
    x, y = features(6, 12, 0), features(7, 12, 1)  # most eigenvalues are zero
    expected = distance(x, y)

    def fail(matrix):
        raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    assert distance(x, y) == pytest.approx(expected, rel=1e-10)


def test_features_that_repeat_or_never_change_match_the_reference():
    x, y = features(60, 4), features(50, 4, 1)
    x, y = (torch.cat([z, z[:, :2], torch.full((len(z), 2), 0.7), 2 * z], dim=1) for z in (x, y))
    assert distance(x, y) == pytest.approx(reference_from_data(x, y), rel=1e-9)
    assert distance(torch.ones(10, 3), torch.zeros(10, 3)) == pytest.approx(3)


@pytest.mark.parametrize("change", [1e-1, 1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize(("n", "d", "rank"), [(100, 10, 10), (8, 30, 7), (100, 10, 4)])
def test_nearly_identical_sets_keep_their_digits(change, n, d, rank):
    """x scaled by 1 + c and moved by c: c^2 (tr S + |mean + 1|^2) exactly, far below the rounding of the traces."""
    x = features(n, rank) @ features(d, d, 5)[:rank] if rank < d and rank < n - 1 else features(n, d)
    exact = change**2 * (torch.cov(x.T).trace() + (x.mean(0) + 1).square().sum()).item()
    assert distance(x, x * (1 + change) + change) == pytest.approx(exact, rel=1e-6, abs=0)


@pytest.mark.parametrize(("n", "d"), [(100, 10), (8, 30)])
def test_identical_sets_are_at_distance_zero(n, d):
    x = features(n, d)
    assert 0 <= distance(x, x) < 1e-20 * torch.cov(x.T).trace()
    assert 0 <= distance(x, x.flip(0)) < 1e-20 * torch.cov(x.T).trace()


@given(n=st.integers(2, 30), m=st.integers(2, 30), d=st.integers(1, 12), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_symmetric_nonnegative_and_rotation_invariant(n, m, d, seed):
    x, y = features(n, d, seed), features(m, d, seed + 1)
    value = distance(x, y)
    assert value >= 0
    assert distance(y, x) == pytest.approx(value, rel=1e-7)
    rotation = torch.linalg.qr(features(d, d, seed + 2, mix=False))[0]
    assert distance(x @ rotation, y @ rotation) == pytest.approx(value, rel=1e-7)
    assert distance(3 * x, 3 * y) == pytest.approx(9 * value, rel=1e-7)


def test_ten_thousand_samples_of_four_hundred_dimensions_in_float32():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(10_000, 400, generator=g), 1.1 * torch.randn(10_000, 400, generator=g)
    # 400 * 0.1^2 = 4, and what sampling 10 000 adds: the eigenvalues of independent samples spread.
    assert 4 < distance(x, y) < 20


def test_too_few_samples_are_refused_or_warned_about():
    many, few = FeatureStatistics.of(features(20, 5)), FeatureStatistics.of(features(5, 5, 1))
    with pytest.raises(ValueError, match="2 feature vectors or more, but there are 1"):
        frechet_distance(many, FeatureStatistics.of(features(1, 5)))
    with pytest.raises(ValueError, match="5 and 4 dimensions"):
        frechet_distance(many, FeatureStatistics.of(features(20, 4)))
    assert few.rank_deficient and not many.rank_deficient
    for pair in ((many, few), (few, many)):
        with pytest.warns(RankDeficientWarning, match="more than 5 samples"):
            frechet_distance(*pair)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_distance(many, FeatureStatistics.of(features(6, 5, 1)))


# --- groups ---------------------------------------------------------------------------------------------------------


def grouped(n, d, seed=0, shift=0.0, num_groups=64):
    return FeatureStatistics.of(features(n, d, seed, mix=False) + shift, num_groups=num_groups)


def assert_same_groups(a, b, rtol=1e-10):
    assert torch.equal(a.counts, b.counts)
    torch.testing.assert_close(a.means, b.means, rtol=rtol, atol=1e-12)
    torch.testing.assert_close(a.scatters, b.scatters, rtol=rtol, atol=1e-9)


def test_a_samples_group_is_fixed_and_unrelated_to_its_order():

    assert [group_of(n, 64) for n in range(6)] == [4, 54, 27, 30, 49, 11]
    counts = np.bincount([group_of(n, 64) for n in range(6400)], minlength=64)
    assert counts.min() > 50 and counts.max() < 150
    eighth = {group_of(n, 64) for n in range(0, 8000, 8)}  # the samples of one class of eight, taken in turn
    assert len(eighth) == 64


@given(
    n=st.integers(1, 60),
    rows=st.integers(1, 3),
    seed=st.integers(0, 1000),
    cuts=st.lists(st.integers(0, 60), max_size=4),
    pending=st.integers(1, 20),
)
@settings(max_examples=40, deadline=None)
def test_groups_are_the_same_in_any_batching_and_order(n, rows, seed, cuts, pending):
    x = features(n * rows, 3, seed) + 100
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    whole = FeatureStatistics.of(x, range(n), num_groups=8)
    parts = FeatureStatistics(3, 8)
    parts.PENDING = pending
    edges = [0, *sorted(min(c, n) for c in cuts), n]
    for first, last in zip(edges, edges[1:], strict=False):
        numbers = order[first:last]
        parts.update(x.reshape(n, rows, 3)[numbers].flatten(0, 1), numbers.tolist())
        assert sum(len(waiting) for waiting, _ in parts._pending) < pending
    assert_same_groups(parts, whole)
    for group in range(8):
        samples = [i for i in range(n) if group_of(i, 8) == group]
        rows_of_group = x.reshape(n, rows, 3)[samples].flatten(0, 1)
        alone = whole.merged(torch.eye(8, dtype=torch.int64)[group])
        assert alone.count == len(rows_of_group)
        if len(rows_of_group) > 1:
            assert_statistics(alone, rows_of_group)
    if n * rows > 1:
        assert_statistics(parts.merged(), x)


def test_repeated_groups_equal_a_set_with_repetitions():
    x = features(50, 4) + 10
    statistics = FeatureStatistics.of(x, num_groups=5)
    times = torch.tensor([2, 0, 1, 3, 0])
    repeated = torch.cat(
        [x[[group_of(n, 5) == group for n in range(50)]].repeat(t, 1) for group, t in enumerate(times)]
    )
    assert_statistics(statistics.merged(times), repeated)


def test_halves_are_disjoint_and_complete():
    statistics = grouped(200, 3)
    even, odd = statistics.halves()
    assert even.merged().count + odd.merged().count == 200
    assert not (even.counts * odd.counts).any()
    both = even.merged()
    both.merge(odd.merged())
    torch.testing.assert_close(both.covariance, statistics.merged().covariance)
    before = statistics.means.clone()
    even.update(features(50, 3, 5), range(50))
    assert torch.equal(statistics.means, before)


def test_groups_take_no_more_memory_than_stated():
    for dim in (128, 400, 512, 1024):
        groups = len(FeatureStatistics(dim, choose_num_groups(dim)).counts)
        assert groups == 64 if dim <= 512 else 16 <= groups < 64
        assert 8 * groups * dim**2 <= 2**28


def test_state_dicts_round_trip_and_invalid_ones_are_refused():
    statistics = grouped(40, 3)
    again = FeatureStatistics.from_state_dict(statistics.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(statistics.state_dict().values(), again.state_dict().values(), strict=True)
    )
    state = statistics.state_dict()
    for broken, said in (
        ({"counts": state["counts"]}, "'means', 'scatters'"),
        ({**state, "means": torch.zeros(64, 4)}, r"\(64, 4\)"),
        ({**state, "means": state["means"] * float("nan")}, "NaN"),
        ({**state, "counts": state["counts"] - 9}, "negative"),
    ):
        with pytest.raises(ValueError, match=said):
            FeatureStatistics.from_state_dict(broken)


def test_grouped_features_are_checked():
    statistics = FeatureStatistics(3, 4)
    for bad, numbers, said in (
        (torch.zeros(2, 4), [0, 1], r"\(N, 3\)"),
        (torch.zeros(3, 3), [0, 1], "3 feature vectors cannot be those of 2 samples"),
        (torch.zeros(3, 3), [], "of 0 samples"),
        (torch.tensor([[0, 0, 0], [0, float("inf"), 0]]), [0, 1], "row 1"),
    ):
        with pytest.raises(ValueError, match=said):
            statistics.update(bad, numbers)
    statistics.update(torch.zeros(0, 3), [])
    assert statistics.merged().count == 0 == len(statistics.filled)
    statistics.update(torch.zeros(1, 3), [5])
    assert statistics.filled.tolist() == [group_of(5, 4)]


# --- interval and bias ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dim", "shift"), [(3, 0.3), (10, 0.0)])
def test_the_interval_covers_the_mean_at_its_level(dim, shift):
    """The plain quantiles of resampled distances would never cover it, because of their bias."""
    pairs = [(standard(200, 2 * i, d=dim), standard(200, 2 * i + 1, shift, dim)) for i in range(40)]
    mean = np.mean([frechet_distance(a.merged(), b.merged()) for a, b in pairs])
    held = [low <= mean <= high for low, high in (bootstrap_interval(*p, resamples=30, level=0.9) for p in pairs)]
    assert np.mean(held) >= 0.75
    assert np.mean(held) < 1 or not shift


def standard(n, seed, shift=0.0, d=3):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return FeatureStatistics.of(x + shift, num_groups=64)


def test_an_interval_is_seeded_and_narrows_with_samples():
    few, many = [(standard(n, 1), standard(n, 2, 0.5)) for n in (200, 5000)]
    low, high = bootstrap_interval(*few)
    assert bootstrap_interval(*few) == (low, high) != bootstrap_interval(*few, seed=1)
    value = frechet_distance(*(side.merged() for side in few))
    assert 0 <= low < value < high
    assert np.ptp(bootstrap_interval(*many)) < 0.5 * (high - low)
    assert np.ptp(bootstrap_interval(*few, level=0.5)) < 0.7 * (high - low)


def test_a_paired_interval_draws_the_same_groups_on_both_sides():
    x = features(300, 4)
    clips, rebuilt = (FeatureStatistics.of(y, num_groups=64) for y in (x, 0.9 * x))
    paired, apart = (np.ptp(bootstrap_interval(clips, rebuilt, paired=p)) for p in (True, False))
    assert paired < 0.5 * apart


def test_an_interval_needs_two_groups():
    with pytest.raises(ValueError, match="2 groups of samples or more, but there are 1"):
        bootstrap_interval(grouped(20, 2, num_groups=1), grouped(20, 2, num_groups=1))


def test_the_bias_of_the_sample_count_is_extrapolated_away():
    same = [frechet_infinity(standard(500, 2 * i, d=10), standard(500, 2 * i + 1, d=10)) for i in range(5)]
    plain = [
        frechet_distance(standard(500, 2 * i, d=10).merged(), standard(500, 2 * i + 1, d=10).merged())
        for i in range(5)
    ]
    assert np.mean(plain) > 0.05 and abs(np.mean(same)) < 0.15 * np.mean(plain)
    shifted = [frechet_infinity(standard(2000, 2 * i, d=10), standard(2000, 2 * i + 1, 0.2, 10)) for i in range(9)]
    assert np.mean(shifted) == pytest.approx(10 * 0.2**2, rel=0.15)
    assert frechet_infinity(standard(500, 0), standard(500, 1)) == frechet_infinity(standard(500, 0), standard(500, 1))
    with pytest.raises(ValueError, match="from 39 samples in 10 dimensions means nothing: use 40"):
        frechet_infinity(standard(39, 0, d=10), standard(500, 1, d=10))
    few = FeatureStatistics.of(features(500, 3), num_groups=INFINITY_GROUPS - 1)  # no quarter of them
    with pytest.raises(ValueError, match=f"needs samples in {INFINITY_GROUPS} groups"):
        frechet_infinity(few, standard(500, 1))


# --- class score ----------------------------------------------------------------------------------------------------


def test_the_class_score_is_the_inception_scores_formula():
    p = torch.rand(90, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).pow(4)
    p[0, 0] = 0
    p /= p.sum(dim=1, keepdim=True)
    numbers = list(range(90))
    score = ClassScore(7, splits=3)
    for first in range(0, 90, 20):
        score.update(p[first : first + 20], numbers[first : first + 20])
    expected = []
    for split in range(3):
        own = p[[group_of(n, 3) == split for n in numbers]].numpy()
        expected.append(np.exp(np.mean([scipy.stats.entropy(row, own.mean(0)) for row in own])))
    assert score.compute() == pytest.approx((np.mean(expected), np.std(expected)), rel=1e-9)

    halves = [ClassScore(7, splits=3), ClassScore(7, splits=3)]
    for part, half in enumerate(halves):
        half.update(p[part::2].flip(0), numbers[part::2][::-1])
    halves[0].totals += halves[1].totals
    assert halves[0].compute() == pytest.approx(score.compute(), rel=1e-9)


def test_the_class_score_runs_from_one_to_the_number_of_classes():
    certain, unsure = ClassScore(5, splits=1), ClassScore(5, splits=1)
    certain.update(torch.eye(5).repeat(4, 1), range(20))
    unsure.update(torch.full((20, 5), 0.2), range(20))
    assert certain.compute() == pytest.approx((5, 0)) and unsure.compute() == pytest.approx((1, 0), abs=1e-6)


def test_only_probabilities_are_scored():
    score = ClassScore(3)
    for bad in (torch.zeros(2, 3), torch.tensor([[1.5, -0.5, 0.0]] * 2), torch.full((2, 3), float("nan"))):
        with pytest.raises(ValueError, match="must sum to 1"):
            score.update(bad, [0, 1])
    with pytest.raises(ValueError, match=r"\(2, 3\), not \(3, 3\)"):
        score.update(torch.eye(3), [0, 1])
    with pytest.raises(ValueError, match="no probabilities"):
        score.compute()
