"""Pixels as files hold them, and files that appear whole."""

import pytest
import torch

from vidgen.common.io import atomic_write, to_uint8


def test_uint8_rounds_and_clamps():
    clip = torch.tensor([-2.0, -1, -1 + 0.4 / 127.5, -1 + 0.6 / 127.5, 0.999, 1, 7])
    assert to_uint8(clip).tolist() == [0, 0, 0, 1, 255, 255, 255]


def test_every_pixel_survives_the_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(pixels.float() / 127.5 - 1), pixels)


def test_no_pixel_shows_nan():
    with pytest.raises(ValueError, match="NaN or infinite"):
        to_uint8(torch.tensor([0.0, float("nan")]))


def test_a_failed_write_leaves_what_was_there(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(target) as unfinished:
        unfinished.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
    with atomic_write(target) as unfinished:
        assert unfinished.suffix == ".txt" and unfinished.parent == tmp_path
        unfinished.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_folders_are_made(tmp_path):
    with atomic_write(tmp_path / "x" / "y" / "a.txt") as unfinished:
        unfinished.write_text("here")
    assert (tmp_path / "x" / "y" / "a.txt").read_text() == "here"
