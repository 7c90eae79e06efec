"""Pixel probes and factor attribution: original clips, ideal swaps, and examples by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.sprites.disentanglement import render
from benchmarks.sprites.latent_swap import (
    CLASSES,
    PixelProbes,
    factor_attribution,
    pair_motions,
    pixel_measurements,
    sprite_targets,
    swap_factors,
    unrelated_pairs,
)
from vidgen.data.sprites import MOTIONS, render_sprite, sample_factors

SINGLE = [motion for motion in MOTIONS if motion != "swap"]


def draw(per_motion: int, seed: int, motions: list[str] = SINGLE) -> list[dict]:
    return [
        sample_factors(np.random.default_rng([seed, MOTIONS.index(motion), i]), motion, resolution=32, num_frames=16)
        for motion in motions
        for i in range(per_motion)
    ]


@pytest.fixture(scope="module")
def probes() -> PixelProbes:
    factors = draw(30, seed=0)
    return PixelProbes(pixel_measurements(render(factors)), sprite_targets(factors))


@pytest.fixture(scope="module")
def tested() -> list[dict]:
    return draw(8, seed=1)


def permuted(values: dict[str, torch.Tensor], order: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: x[order] for name, x in values.items()}


# --- targets ------------------------------------------------------------------------------------------


def test_targets_are_those_of_the_first_shape():
    factors = draw(3, seed=0, motions=list(MOTIONS))
    targets = sprite_targets(factors)
    for i, clip in enumerate(factors):
        shape = clip["shapes"][0]
        assert MOTIONS[targets["motion"][i]] == clip["motion"]
        assert CLASSES["shape"][targets["shape"][i]] == shape["kind"]
        assert CLASSES["texture"][targets["texture"][i]] == shape["texture"]["kind"]
        np.testing.assert_allclose(targets["position"][i], shape["centers"])
        np.testing.assert_allclose(targets["colors"][i] / 255, shape["colors"])
        np.testing.assert_allclose(targets["background"][i] / 255, clip["background"]["colors"])
    swaps = targets["position"][targets["motion"] == MOTIONS.index("swap")]
    assert (swaps[:, 0, 0] > 16).all()


def test_position_is_the_sum_of_place_slow_and_fast_motion():
    targets = sprite_targets(draw(4, seed=0, motions=["slide", "orbit", "shake", "still"]))
    parts = targets["place"] + targets["slow_motion"] + targets["fast_motion"]
    torch.testing.assert_close(parts, targets["position"])
    slow, fast = (
        targets[name].square().sum(dim=(1, 2)).view(4, 4).mean(dim=1) for name in ("slow_motion", "fast_motion")
    )
    assert (slow[:2] > 50 * fast[:2]).all()  # once through the frame, once around
    assert fast[2] > 20 * slow[2]  # a cycle every four frames
    assert slow[3] < 1e-9 and fast[3] < 1e-9


def test_an_ideal_swap_looks_like_a_and_moves_like_b():
    a, b = draw(1, seed=2, motions=["still", "spin"])
    crossed = swap_factors(a, b)
    targets, as_a, as_b = (sprite_targets([clip]) for clip in (crossed, a, b))
    for name in ("shape", "texture", "colors", "background"):
        assert torch.equal(targets[name], as_a[name])
    for name in ("motion", "position"):
        assert torch.equal(targets[name], as_b[name])
    turned = np.diff(crossed["shapes"][0]["angles"])
    np.testing.assert_allclose(turned, np.diff(b["shapes"][0]["angles"]))
    assert crossed["shapes"][0]["angles"][0] == a["shapes"][0]["angles"][0]
    assert (render_sprite(swap_factors(a, a)) == render_sprite(a)).all()


@pytest.mark.parametrize("classes, each", [(7, 64), (7, 4), (2, 3), (7, 1)])
def test_pairs_have_different_motions_and_use_every_clip_once(classes, each):
    motions = torch.arange(classes).repeat_interleave(each)
    partner = pair_motions(motions)
    assert sorted(partner.tolist()) == list(range(classes * each))
    assert (motions != motions[partner]).all()
    met = {(int(a), int(b)) for a, b in zip(motions, motions[partner], strict=True)}
    assert len(met) == classes * min(each, classes - 1)


def test_pairs_need_equally_many_sorted_clips():
    for motions in ([0, 0, 1], [0, 1, 0, 1], [0, 0]):
        with pytest.raises(ValueError, match="sorted by motion"):
            pair_motions(torch.tensor(motions))


@pytest.mark.parametrize("count", [3, 4, 14, 56])
def test_unrelated_pairs(count):
    own = torch.arange(count)
    for partner in (own.roll(1), own.roll(2)):
        found = unrelated_pairs(partner)
        assert sorted(found.tolist()) == own.tolist()
        assert not ((found == own) | (found == partner)).any()
        assert torch.equal(found, unrelated_pairs(partner))
    for without in ([1, 0], [2, 1, 0], [1, 2, 1]):
        with pytest.raises(ValueError, match="3 clips or more, each the partner of one other clip"):
            unrelated_pairs(torch.tensor(without))


# --- measurements of pixels ------------------------------------------------------------------------------------------


def test_measured_positions_are_accurate(tested):
    measured = pixel_measurements(render(tested))["position"].view(len(tested), -1, 2)
    errors = (measured - sprite_targets(tested)["position"]).norm(dim=2)
    assert errors.mean() < 0.15
    assert errors.max() < 2.5  # where a shape leaves the frame by a corner


def test_a_clip_without_a_shape_can_be_measured():
    for value in (-1.0, 1.0):
        for x in pixel_measurements(torch.full((1, 3, 8, 32, 32), value)).values():
            assert torch.isfinite(x).all()
    nowhere = pixel_measurements(torch.full((1, 3, 8, 32, 48), -1.0))["position"].view(8, 2)
    torch.testing.assert_close(nowhere, torch.tensor([[24.0, 16.0]], dtype=torch.float64).expand(8, 2))


def test_pixel_probes_on_original_clips(probes, tested):
    targets = sprite_targets(tested)
    scores = probes.score(probes.predict(render(tested)), targets)
    assert scores["motion"].low > 0.9 and scores["motion"].chance == pytest.approx(1 / 7)
    assert scores["shape"].low > 0.75
    assert scores["texture"].low > 0.7
    for name in ("colors", "position", "place", "slow_motion", "fast_motion"):
        assert scores[name].high < 0.25 * scores[name].chance
    mean_colors = sprite_targets(draw(30, seed=0))["colors"].mean(dim=0)
    chance = (mean_colors - targets["colors"]).norm(dim=2).mean().item()
    assert scores["colors"].chance == pytest.approx(chance)
    wrong = {"motion": torch.full_like(targets["motion"], MOTIONS.index("swap"))}
    assert probes.score(wrong, targets)["motion"].chance == pytest.approx(1 / 7)  # of the clips


# --- attribution -------------------------------------------------------------------------------------------------


def test_attribution_of_ideal_swaps(probes, tested):
    targets = sprite_targets(tested)
    partner = pair_motions(targets["motion"])
    lent, drawn = permuted(targets, partner), probes.predict(render(tested))
    unrelated = permuted(drawn, torch.randperm(len(tested), generator=torch.Generator().manual_seed(0)))
    crossed = probes.predict(render([swap_factors(tested[a], tested[b]) for a, b in enumerate(partner.tolist())]))
    ours = factor_attribution(crossed, targets, lent, unrelated)
    for name in ("shape", "texture", "colors"):
        assert ours[name]["a"].value > 0.75 and ours[name]["a"].value > ours[name]["a"].chance + 0.2
    for name in ("motion", "position", "place", "slow_motion", "fast_motion"):
        assert ours[name]["b"].value > 0.9 and ours[name]["b"].chance < 0.6
    assert ours["colors"]["interpolation"].value == pytest.approx(0, abs=0.05)
    assert ours["position"]["interpolation"].value == pytest.approx(1, abs=0.02)
    alone = factor_attribution(drawn, targets, lent, unrelated)
    assert all(scores["a"].value > 0.75 for scores in alone.values())
    assert alone["position"]["interpolation"].value == pytest.approx(0, abs=0.02)


def test_attribution_by_hand():
    a = {"shape": torch.tensor([0, 0, 1, 2]), "place": torch.zeros(4, 1, 2)}
    b = {"shape": torch.tensor([1, 1, 0, 2]), "place": torch.tensor([[[8.0, 0]], [[8.0, 0]], [[8.0, 0]], [[0.5, 0]]])}
    shown = {
        "shape": torch.tensor([0, 1, 5, 2]),
        "place": torch.tensor([[[1.0, 0]], [[9.0, 3]], [[4.0, 4]], [[0.0, 0]]]),
    }
    found = factor_attribution(shown, a, b, unrelated=b)
    for name, pairs in (("shape", 3), ("place", 3)):  # the last two do not differ
        assert found[name]["pairs"] == pairs
        assert [found[name][key].value for key in ("a", "b", "neither")] == pytest.approx([1 / 3] * 3)
        assert [found[name][key].chance for key in ("a", "b", "neither")] == [0, 1, 0]
    assert found["place"]["interpolation"].value == pytest.approx((1 + 9 + 4) / 24)
    assert found["place"]["interpolation"].chance == pytest.approx(1)
    assert "interpolation" not in found["shape"]


def test_a_factor_that_no_pair_differs_in_is_left_out():
    same = {"shape": torch.tensor([1, 2])}
    assert factor_attribution(same, same, same, same) == {}
