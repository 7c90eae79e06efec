"""Probes find what is there, find nothing in noise, and say how sure that is."""

from __future__ import annotations

import pytest
import torch

from benchmarks.sprites.probes import SHRINKAGES, Ridge, mean, probe_classes, probe_points, ratio, share
from vidgen.metrics import stats


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def primal(features: torch.Tensor, targets: torch.Tensor, penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Ridge weights (D, K) and an unpenalized intercept (K,), by the normal equations."""
    ones = torch.cat([features, torch.ones(len(features), 1, dtype=torch.float64)], dim=1)
    penalties = torch.full((ones.shape[1],), penalty, dtype=torch.float64)
    penalties[-1] = 0
    solved = torch.linalg.solve(ones.T @ ones + torch.diag(penalties), ones.T @ targets)
    return solved[:-1], solved[-1]


@pytest.mark.parametrize("clips, values", [(30, 5), (20, 20), (12, 40)])
@pytest.mark.parametrize("noise", [0.1, 3.0])
def test_shrinkage_is_what_refitting_without_each_clip_likes_best(clips, values, noise):
    features = normal(clips, values) + 2
    targets = features @ normal(values, 3, seed=1) + noise * normal(clips, 3, seed=2) + 5
    fitted = Ridge(features).fit(targets)
    unit = (features - features.mean(dim=0)).square().sum(dim=1).mean().item()
    errors = []
    for shrinkage in SHRINKAGES.tolist():
        squared = 0.0
        for i in range(clips):
            others = torch.arange(clips) != i
            weights, intercept = primal(features[others], targets[others], shrinkage * unit)
            squared += (features[i] @ weights + intercept - targets[i]).square().sum().item()
        errors.append(squared)
    assert fitted.shrinkage == SHRINKAGES[errors.index(min(errors))]
    weights, intercept = primal(features, targets, fitted.shrinkage * unit)
    torch.testing.assert_close(fitted.weights, weights, rtol=1e-6, atol=1e-8)
    others = normal(4, values, seed=3)
    torch.testing.assert_close(fitted(others), others @ weights + intercept, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("values", [20, 1500])
def test_a_planted_factor_is_found(values):
    features = normal(500, values)
    direction = torch.zeros(values, dtype=torch.float64)
    direction[:4] = 3  # in a part of the latent that stands out
    hidden = normal(500, 1, seed=1)
    features = features + hidden * direction
    points = torch.cat([7 + 2 * hidden, -hidden], dim=1)[:, None]
    classes = torch.bucketize(hidden[:, 0], torch.tensor([0.0], dtype=torch.float64))
    ridge = Ridge(features[:300])
    scores = probe_points(ridge, points[:300], features[300:], points[300:])
    assert scores["r2"].high > scores["r2"].value > scores["r2"].low > 0.75
    assert scores["distance"].high < 0.5 * scores["distance"].chance
    accuracy = probe_classes(ridge, classes[:300], features[300:], classes[300:])
    assert accuracy.low > 0.8 > accuracy.chance


@pytest.mark.parametrize("values", [20, 1500])
def test_nothing_is_found_in_noise_however_many_values_there_are(values):
    features, points = normal(400, values), normal(400, 3, 2, seed=1)
    ridge = Ridge(features[:200])
    scores = probe_points(ridge, points[:200], features[200:], points[200:])
    assert scores["r2"].low > -0.1 and scores["r2"].high < 0.05
    assert scores["distance"].low < scores["distance"].chance < scores["distance"].high
    classes = torch.arange(400) % 4
    accuracy = probe_classes(ridge, classes[:200], features[200:], classes[200:])
    assert accuracy.low < accuracy.chance == 0.25 < accuracy.high


def test_units_common_to_all_features_and_their_origin_do_not_matter():
    features, points = normal(60, 10), normal(60, 1, 2, seed=1)
    points[:, 0, 0] += features[:, 3]
    expected = Ridge(features).fit(points.flatten(1))(features)
    for changed in (features * 1e-4, features * 1e3, features + 1e3):
        torch.testing.assert_close(Ridge(changed).fit(points.flatten(1))(changed), expected, rtol=1e-6, atol=1e-6)


def test_a_feature_asleep_is_not_woken():
    hidden = normal(300, 1)
    features = torch.cat([normal(300, 50, seed=1), 1e-5 * hidden], dim=1)
    scores = probe_points(Ridge(features[:200]), hidden[:200, None], features[200:], hidden[200:, None])
    assert scores["r2"].value < 0.1


def test_features_that_never_change_give_the_mean():
    points = normal(30, 1, 2)
    scores = probe_points(Ridge(torch.ones(20, 5)), points[:20], torch.ones(10, 5), points[20:])
    assert scores["r2"].value == pytest.approx(scores["r2"].chance)
    assert scores["distance"].value == pytest.approx(scores["distance"].chance)


def test_scores_of_points_by_hand():
    features = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    points = torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0], [9.0, 12.0]])[:, None]  # 5 a step, exactly linear
    scores = probe_points(Ridge(features), points, torch.tensor([[0.0], [1.0]]), points[:2] + torch.tensor([0.0, 1.0]))
    assert scores["distance"].value == pytest.approx(1, abs=1e-3)
    assert scores["distance"].chance == pytest.approx(((4.5**2 + 5**2) ** 0.5 + (1.5**2 + 1) ** 0.5) / 2)
    # Around the mean (1.5, 3) of the two: 2 * (1.5^2 + 2^2) = 12.5; unexplained: 1 + 1; by the mean 45.25 + 3.25.
    assert scores["r2"].value == pytest.approx(1 - 2 / 12.5, abs=1e-3)
    assert scores["r2"].chance == pytest.approx(1 - 48.5 / 12.5)


def test_chance_is_the_commonest_class_of_the_training_clips():
    classes, others = torch.tensor([0, 2, 2, 1, 2]), torch.tensor([0, 0, 0, 2, 3])
    score = probe_classes(Ridge(normal(5, 2)), classes, normal(5, 2, seed=1), others)
    assert score.chance == pytest.approx(1 / 5)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    covered = 0
    for seed in range(100):
        hits = torch.rand(80, generator=torch.Generator().manual_seed(seed)) < 0.7
        score = share(hits)
        assert score.low <= score.value <= score.high and score.chance is None
        covered += score.low <= 0.7 <= score.high
    assert 88 <= covered <= 99


def test_a_clip_is_resampled_whole():
    weights = 1 + normal(50).abs()
    score = ratio(2 * weights, weights)
    assert score.low == pytest.approx(2) and score.high == pytest.approx(2)
    wide, narrow = mean(normal(50)), mean(normal(5000))
    assert wide.high - wide.low == pytest.approx(2 * 1.96 / 50**0.5, rel=0.25)
    assert narrow.high - narrow.low == pytest.approx(2 * 1.96 / 5000**0.5, rel=0.25)


def test_resamples_without_anything_to_divide_by_do_not_count():
    score = ratio(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([2.0, 0.0, 0.0]))
    assert (score.value, score.low, score.high) == (0.5, 0.5, 0.5)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="3 clips or more"):
        Ridge(normal(2, 4))
    with pytest.raises(ValueError, match="NaN or infinite"):
        Ridge(torch.full((4, 2), torch.nan))
    with pytest.raises(ValueError, match=r"targets must be \(5, K\)"):
        Ridge(normal(5, 2)).fit(normal(4, 1))
    with pytest.raises(ValueError, match="1 clip or more"):
        share(torch.zeros(0, dtype=torch.bool))


def test_many_clips_are_drawn_in_parts_and_alike(monkeypatch):
    values = torch.randn(30, generator=torch.Generator().manual_seed(0))
    whole = mean(values)
    monkeypatch.setattr(stats, "CLIPS_AT_ONCE", 100)
    assert mean(values) == whole
    monkeypatch.setattr(stats, "CLIPS_AT_ONCE", 10)  # fewer than clips
    assert mean(values) == whole
