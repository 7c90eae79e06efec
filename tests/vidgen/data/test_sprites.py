"""Sprites: factors are reproducible and match the pixels, and each class has its motion."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vidgen.data.listing import list_videos
from vidgen.data.sprites import MOTIONS, SHAPES, render_sprite, sample_factors, write_sprites
from vidgen.data.video import probe, read_clip


def draw(motion: str, seed: int = 0, **sizes) -> dict:
    return sample_factors(np.random.default_rng(seed), motion, **sizes)


def find_shape(factors: dict) -> np.ndarray:
    """Where a clip differs from its background: bool (T, H, W)."""
    bare = render_sprite({**factors, "shapes": []})
    return np.abs(render_sprite(factors).astype(int) - bare).max(-1) > 24


@pytest.mark.parametrize("motion", MOTIONS)
def test_factors_are_json_and_determine_the_pixels(motion):
    factors = draw(motion)
    assert factors == draw(motion)
    again = json.loads(json.dumps(factors))
    assert again == factors
    clip = render_sprite(factors)
    assert clip.shape == (16, 64, 64, 3) and clip.dtype == np.uint8
    np.testing.assert_array_equal(clip, render_sprite(again))
    assert not np.array_equal(clip, render_sprite(draw(motion, seed=1)))


def test_files_match_their_factors(sprites):
    assert sorted(p.name for p in sprites.iterdir()) == sorted([*MOTIONS, "shapes.csv"])
    for motion in MOTIONS:
        path = sprites / motion / f"{motion}_0001.mp4"
        info = probe(path)
        assert (info.width, info.height, info.fps, info.num_frames, info.codec) == (64, 64, 8, 16, "h264")
        factors = json.loads(path.with_suffix(".json").read_text())
        assert factors["motion"] == motion
        error = read_clip(path, fps=8, num_frames=16).numpy().astype(float) - render_sprite(factors)
        assert np.sqrt((error**2).mean()) < 12  # H.264 with chroma subsampling


def test_shapes_csv_lists_the_subclasses(sprites):
    files, classes = list_videos(sprites / "shapes.csv")
    assert sorted(file.path for file in files) == sorted(sprites.glob("*/*.mp4"))
    for file in files:
        factors = json.loads(file.path.with_suffix(".json").read_text())
        kinds = [shape["kind"] for shape in factors["shapes"]]
        assert classes[file.label] == f"{factors['motion']}/{'-'.join(kinds)}"
    assert {file.label for file in list_videos(sprites)[0]} == set(range(len(MOTIONS)))


def test_clip_does_not_depend_on_the_number_of_clips(sprites, tmp_path):
    paths = write_sprites(tmp_path, 1, seed=0)
    assert len(paths) == len(MOTIONS)
    for path in paths:
        known = sprites / path.relative_to(tmp_path)
        assert path.read_bytes() == known.read_bytes()
        assert path.with_suffix(".json").read_bytes() == known.with_suffix(".json").read_bytes()
    other = write_sprites(tmp_path, 1, seed=1)[0]
    assert other.read_bytes() != (sprites / other.relative_to(tmp_path)).read_bytes()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("motion", [m for m in MOTIONS if m != "swap"])
def test_centers_are_where_the_shape_is(motion, seed):
    factors = draw(motion, seed)
    where = find_shape(factors)
    grid = np.stack(np.meshgrid(np.arange(64) + 0.5, np.arange(64) + 0.5), -1)
    for mask, center in zip(where, factors["shapes"][0]["centers"], strict=True):
        np.testing.assert_allclose(grid[mask].mean(0), center, atol=1.5)


@pytest.mark.parametrize("motion", MOTIONS)
def test_shapes_are_large_inside_the_frame_and_distinct_in_color(motion):
    for seed in range(12):
        factors = draw(motion, seed, resolution=128)
        assert len(factors["shapes"]) == (2 if motion == "swap" else 1)
        ends = np.array(factors["background"]["colors"])
        for shape in factors["shapes"]:
            assert 0.32 * 128 <= shape["size"] <= 0.46 * 128
            fills = np.array(shape["colors"])
            assert min(np.linalg.norm(f - b) for f in fills for b in (*ends, ends.mean(0))) >= 0.4
            assert np.linalg.norm(fills[0] - fills[1]) >= 0.35
            reach = shape["size"] / 2 * np.array(shape["scales"])[:, None]
            centers = np.array(shape["centers"])
            assert (centers - reach > -0.05 * 128).all() and (centers + reach < 1.05 * 128).all()


def test_scales_are_those_of_the_drawn_shape():
    factors = draw("zoom", resolution=128)
    factors["shapes"][0]["kind"] = "square"
    areas, scales = find_shape(factors).sum((1, 2)), np.array(factors["shapes"][0]["scales"])
    np.testing.assert_allclose(areas / areas[0], (scales / scales[0]) ** 2, rtol=0.08)


def test_all_shapes_are_similarly_large():
    factors = draw("still")
    areas = []
    for kind in SHAPES:
        factors["shapes"][0].update(kind=kind, size=26.0)
        areas.append(find_shape(factors)[0].sum())
    assert max(areas) < 3 * min(areas) and min(areas) > 0.05 * 64 * 64


@pytest.mark.parametrize(("angle", "direction"), [(0, (0, -1)), (90, (1, 0)), (180, (0, 1))])
def test_angles_turn_clockwise(angle, direction):
    factors = draw("still", num_frames=1)
    factors["shapes"][0].update(kind="triangle", centers=[[32, 32]], angles=[angle])
    y, x = np.nonzero(find_shape(factors)[0])
    toward = np.stack([x - 31.5, y - 31.5], -1) @ np.array(direction)
    assert toward.max() > -1.6 * toward.min()  # a corner on this side, an edge on the other


@pytest.mark.parametrize("kind", SHAPES)
def test_spin_is_visible_for_every_shape(kind):
    factors = draw("spin")
    factors["shapes"][0]["kind"] = kind
    clip = render_sprite(factors).astype(float)
    steps = np.abs(np.diff(clip, axis=0)).mean((1, 2, 3))
    assert steps.min() > 1


def test_motions_match_their_names():
    tracks = {m: {k: np.array(v) for k, v in draw(m)["shapes"][0].items() if k[:-1] in ("center", "angle", "scale")}
              for m in MOTIONS}  # fmt: skip
    centers = {m: t["centers"] / 64 for m, t in tracks.items()}
    steps = {m: np.diff(c, axis=0) for m, c in centers.items()}
    for motion in MOTIONS:
        assert (np.ptp(tracks[motion]["angles"]) > 300) == (motion == "spin")
        assert (np.ptp(tracks[motion]["scales"]) > 0.5) == (motion == "zoom")
        moves = motion not in ("spin", "zoom", "still")
        assert (np.ptp(centers[motion], axis=0).max() > 0.05) == moves
    np.testing.assert_allclose(steps["slide"] - steps["slide"][0], 0, atol=1e-3)
    assert np.ptp(centers["bounce"][:, 0]) == 0 < np.ptp(centers["bounce"][:, 1])
    np.testing.assert_allclose(np.linalg.norm(centers["orbit"] - 0.5, axis=1), 0.48 - 0.5 * _size("orbit"), atol=1e-3)
    np.testing.assert_allclose(centers["shake"][4:], centers["shake"][:-4], atol=1e-3)
    one, two = (np.array(s["centers"]) / 64 for s in draw("swap")["shapes"])
    np.testing.assert_allclose(one[-1], two[0], atol=1e-3)
    np.testing.assert_allclose(two[-1], one[0], atol=1e-3)
    assert (np.abs(one - two).max(1) > 0.2).all()


def _size(motion: str) -> float:
    return max(s["size"] for s in draw(motion)["shapes"]) / 64


def test_other_sizes_and_lengths(tmp_path):
    factors = draw("orbit", resolution=96, num_frames=5, fps=12)
    assert render_sprite(factors).shape == (5, 96, 96, 3)
    np.testing.assert_allclose(np.array(factors["shapes"][0]["centers"][0]) / 96, _first_center(), atol=1e-3)
    path = write_sprites(tmp_path, 1, seed=0, resolution=32, num_frames=8, fps=4)[0]
    info = probe(path)
    assert (info.width, info.num_frames, info.fps) == (32, 8, 4)


def _first_center() -> np.ndarray:
    return np.array(draw("orbit")["shapes"][0]["centers"][0]) / 64


def test_unknown_motion_raises():
    with pytest.raises(ValueError, match="unknown motion 'wobble', expected one of slide, "):
        draw("wobble")
