"""Captions of sprites: they name the factors, in many wordings, and hold compositions out."""

from __future__ import annotations

import colorsys
import csv
import json
import re
import shutil

import numpy as np
import pytest

from vidgen.common.errors import UserError
from vidgen.data.captions import read_captions
from vidgen.data.listing import list_videos
from vidgen.data.sprite_captions import (
    BACKGROUND_WORDS,
    BACKGROUNDS,
    BORDER,
    COLOR_WORDS,
    COLORS,
    HELD_OUT,
    HELD_OUT_COLORS,
    HELD_OUT_MOTIONS,
    MOTION_WORDS,
    SEEN,
    SHAPE_WORDS,
    SpriteDescription,
    caption_sprite,
    describe_sprite,
    name_color,
    write_caption,
    write_captions,
)
from vidgen.data.sprites import MOTIONS, SHAPES, sample_factors, subclass

SPRITES = [
    sample_factors(np.random.default_rng([0, label, i]), motion)
    for label, motion in enumerate(MOTIONS)
    for i in range(12)
]
WORDS = {
    "motion": {name: [form for pair in pairs for form in pair] for name, pairs in MOTION_WORDS.items()},
    "shapes": SHAPE_WORDS,
    "colors": {name: COLOR_WORDS.get(name, (name,)) for name in COLORS},
    "background": BACKGROUND_WORDS,
}


def named(caption: str, factor: str) -> set[str]:
    """The names of a factor whose words a caption contains, the longest words first."""
    found = set()
    pairs = [(word, name) for name, words in WORDS[factor].items() for word in words]
    for word, name in sorted(pairs, key=lambda pair: -len(pair[0])):
        caption, count = re.subn(rf"\b{word}\b", "", caption)
        if count:
            found.add(name)
    return found


def in_foreground(caption: str) -> str:
    """A caption without its background, whose words contain names of colors."""
    for words in BACKGROUND_WORDS.values():
        for word in words:
            caption = caption.replace(word, "")
    return caption


def test_vocabulary_covers_all_factors_and_every_shape_is_held_out_once():
    assert list(MOTION_WORDS) == list(MOTIONS) and list(SHAPE_WORDS) == list(SHAPES)
    assert set(COLOR_WORDS) <= set(COLORS) and list(BACKGROUND_WORDS) == list(BACKGROUNDS)
    assert [shape for shape, _ in HELD_OUT_MOTIONS] == [shape for _, shape in HELD_OUT_COLORS] == list(SHAPES)
    assert {motion for _, motion in HELD_OUT_MOTIONS} <= set(MOTIONS)
    assert {color for color, _ in HELD_OUT_COLORS} <= set(COLORS)


@pytest.mark.parametrize("factors", SPRITES[::5])
def test_captions_name_the_factors_and_nothing_else(factors):
    description, captions = describe_sprite(factors, BORDER), caption_sprite(factors, count=2)
    full, appearance, movement = captions[:2], captions[2:4], captions[4:]
    colors = {color for color in description.colors if color}
    background = {description.background} - {None}
    for caption in full + movement:
        assert named(caption, "motion") == {factors["motion"]}
    for caption in full + appearance:
        assert named(in_foreground(caption), "shapes") == set(description.shapes)
        assert named(in_foreground(caption), "colors") == colors
        assert named(caption, "background") == background
    assert all(named(caption, "motion") == set() for caption in appearance)
    assert len(movement) == 2 and all(named(caption, "shapes") == set() for caption in movement)


def test_captions_are_a_function_of_the_factors_with_many_wordings():
    captions = [caption_sprite(factors) for factors in SPRITES]
    assert captions == [caption_sprite(json.loads(json.dumps(factors))) for factors in SPRITES]
    description = SpriteDescription("orbit", ("star",), ("orange",), "dark green")
    rng = np.random.default_rng(0)
    wordings = {write_caption(description, rng) for _ in range(400)}
    assert len(wordings) > 60 and "an orange star circles over dark green" in wordings
    assert all(wording == " ".join(wording.split()) and not wording.endswith(",") for wording in wordings)


def test_two_shapes_are_described_with_their_sides():
    factors = next(f for f in SPRITES if f["motion"] == "swap")
    right, left = (np.array(shape["centers"])[0, 0] for shape in factors["shapes"])
    assert right > left  # the first shape starts on the right
    description = SpriteDescription("swap", ("star", "ring"), ("red", None))
    captions = {write_caption(description.appearance(), np.random.default_rng(i)) for i in range(30)}
    assert {"a red star on the right and a ring on the left", "a ring on the left and a red star on the right"} < {
        *captions
    }


@pytest.mark.parametrize("hues", [COLORS, BACKGROUNDS], ids=["colors", "backgrounds"])
def test_colors_have_the_name_of_the_nearest_hue(hues):
    for name, hue in hues.items():
        for shift in (-8, 0, 8):
            assert name_color(colorsys.hsv_to_rgb((hue + shift) / 360 % 1, 0.9, 0.9), hues, BORDER) == name
    (first, a), (second, b) = list(hues.items())[:2]
    middle = (a + b) / 2
    for shift, name, strict in ((-BORDER - 1, first, first), (-1, first, None), (1, second, None)):
        rgb = colorsys.hsv_to_rgb((middle + shift) / 360, 0.3, 200)
        assert name_color(rgb, hues) == name and name_color(rgb, hues, BORDER) == strict


def test_held_out_compositions():
    assert SpriteDescription("zoom", ("star",), ("red",)).is_held_out
    assert SpriteDescription("still", ("ring",), ("blue",)).is_held_out
    assert SpriteDescription("swap", ("disc", "ring"), ("red", "blue")).is_held_out
    assert not SpriteDescription("zoom", ("ring",), ("red",)).is_held_out
    assert not SpriteDescription("swap", ("ring", "disc"), ("red", "blue")).is_held_out


def test_tables_divide_the_clips(sprites, tmp_path):
    folder = tmp_path / "sprites"
    shutil.copytree(sprites, folder)
    paths = sorted(folder.glob("*/*.mp4"))
    counts = write_captions(folder, paths)
    parts = [list_videos(folder / name) for name in (SEEN, HELD_OUT)]
    assert counts == tuple(len(files) for files, _ in parts) and sum(counts) == len(paths) and min(counts) > 0
    assert sorted(file.path for files, _ in parts for file in files) == paths
    for (files, classes), name in zip(parts, (SEEN, HELD_OUT), strict=True):
        for file, captions in zip(files, read_captions(folder / name, files), strict=True):
            factors = json.loads(file.path.with_suffix(".json").read_text())
            assert captions == tuple(caption_sprite(factors)) and classes[file.label] == subclass(factors)
            assert describe_sprite(factors).is_held_out == (name == HELD_OUT)
    with (folder / SEEN).open(newline="") as file:
        assert next(csv.reader(file)) == ["path", "label", "caption"]

    paths[0].with_suffix(".json").unlink()
    with pytest.raises(UserError, match=r"the factors of .* cannot be read from the \.json"):
        write_captions(folder, paths)
