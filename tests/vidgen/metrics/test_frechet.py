"""Streaming statistics against NumPy's; the Fréchet distance against independent formulas and closed forms."""

import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidgen.metrics import FeatureStatistics, RankDeficientWarning, frechet_distance, real_vs_real


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
    """d^2 without any matrix square root: tr sqrt(S1^1/2 S2 S1^1/2) is the nuclear norm of X1 X2^T, centred."""
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


# --- statistics ----------------------------------------------------------------------------------------------------


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
    before = b.mean.clone(), b.scatter.clone(), b.count
    a.merge(b)
    a.update(features(5, 3, 2))
    assert torch.equal(b.mean, before[0]) and torch.equal(b.scatter, before[1]) and b.count == before[2]


def test_saved_statistics_come_back_bit_equal(tmp_path):
    statistics = FeatureStatistics.of(features(10, 3))
    path = tmp_path / "deep" / "real.safetensors"
    statistics.save(path)
    loaded = FeatureStatistics.load(path)
    assert loaded.count == 10
    assert torch.equal(loaded.mean, statistics.mean) and torch.equal(loaded.scatter, statistics.scatter)
    assert [p.name for p in path.parent.iterdir()] == ["real.safetensors"]
    loaded.update(features(4, 3, 1))
    assert loaded.count == 14


def test_a_file_that_is_something_else_is_named(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        FeatureStatistics.load(tmp_path / "none.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match=r"broken\.safetensors is not a file of feature statistics"):
        FeatureStatistics.load(tmp_path / "broken.safetensors")
    save_file({"mean": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="'count', 'scatter'"):
        FeatureStatistics.load(tmp_path / "other.safetensors")
    save_file(
        {"count": torch.tensor(5), "mean": torch.zeros(3), "scatter": torch.zeros(2, 2)}, tmp_path / "s.safetensors"
    )
    with pytest.raises(ValueError, match=r"\(3,\) and \(2, 2\)"):
        FeatureStatistics.load(tmp_path / "s.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused_whole(value):
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


# --- distance ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m", "d"), [(50, 80, 8), (300, 200, 40), (20, 20, 1)])
def test_random_sets_match_both_references(n, m, d):
    x, y = features(n, d), 1.3 * features(m, d, 1)
    assert distance(x, y) == pytest.approx(reference_from_data(x, y), rel=1e-9)
    if d > 1:
        assert distance(x, y) == pytest.approx(reference_from_sqrtm(x, y), rel=1e-6)


@pytest.mark.parametrize(("n", "m"), [(6, 9), (6, 100), (100, 6), (2, 2)])
def test_sets_smaller_than_their_dimension_match_the_reference(n, m):
    x, y = features(n, 30), features(m, 30, 1)
    assert distance(x, y) == pytest.approx(reference_from_data(x, y), rel=1e-9)


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
    assert distance(x, x * (1 + change) + change) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize(("n", "d"), [(100, 10), (8, 30)])
def test_identical_sets_are_at_distance_zero(n, d):
    x = features(n, d)
    assert 0 <= distance(x, x) < 1e-20 * torch.cov(x.T).trace()
    assert 0 <= distance(x, x.flip(0)) < 1e-20 * torch.cov(x.T).trace()


@given(n=st.integers(2, 30), m=st.integers(2, 30), d=st.integers(1, 12), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_symmetric_never_negative_and_blind_to_rotation(n, m, d, seed):
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


def test_real_vs_real_is_a_seeded_noise_level():
    x = features(400, 5)
    noise = real_vs_real(x)
    assert real_vs_real(x) == noise != real_vs_real(x, seed=1)
    assert 0 < noise < 0.2 * distance(x, x + 1)
    assert real_vs_real(features(4000, 5)) < noise
    with pytest.raises(ValueError, match="N >= 4"):
        real_vs_real(x[:3])


def test_real_vs_real_uses_disjoint_halves():
    """Sorted data in a fixed split would differ wildly; copies in both halves would not differ at all."""
    x = torch.linspace(-1, 1, 1000, dtype=torch.float64)[:, None]
    assert 0 < real_vs_real(x) < 0.02
