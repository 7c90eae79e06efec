"""What the benchmarks share."""

from __future__ import annotations

import pytest

from benchmarks.common import harness


def test_sprites_that_could_not_all_be_written_are_written_again(tmp_path, monkeypatch):
    folder, counts = tmp_path / "sprites", []

    def write(root, count, *, fails=False):
        root.mkdir()
        (root / "a.mp4").touch()
        counts.append(count)
        if fails:
            raise OSError("no space left")

    monkeypatch.setattr(harness, "write_sprites", write)
    with pytest.raises(OSError, match="no space"):
        harness.write_sprites_once(folder, 1, fails=True)
    assert not any(tmp_path.iterdir())
    for _ in range(2):
        assert harness.write_sprites_once(folder, 2) == folder
    assert counts == [1, 2] and [path.name for path in folder.iterdir()] == ["a.mp4"]
