"""Atomic file writing."""

import pytest

from vidgen.common.io import atomic_write


def test_a_failed_write_leaves_the_old_file(tmp_path):
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


def test_folders_are_created(tmp_path):
    with atomic_write(tmp_path / "x" / "y" / "a.txt") as unfinished:
        unfinished.write_text("here")
    assert (tmp_path / "x" / "y" / "a.txt").read_text() == "here"
