"""Atomic file writing."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vidgen.common.io import atomic_dir, atomic_write


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


def test_a_folder_whose_replacement_is_interrupted_stays(tmp_path, monkeypatch):
    """Between the two renames."""
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "old").touch()
    rename = Path.rename

    def interrupt(path: Path, target: Path) -> Path:
        if target == folder and not (path / "old").exists():
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupt)
    with pytest.raises(KeyboardInterrupt), atomic_dir(folder) as unfinished:
        unfinished.mkdir()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "old"]


def test_others_can_read_safetensors_as_any_other_file(tmp_path):
    (tmp_path / "ordinary").touch()
    with atomic_write(tmp_path / "a.safetensors") as unfinished:
        save_file({"x": torch.zeros(1)}, unfinished)
    with atomic_dir(tmp_path / "b") as unfinished:
        (unfinished / "part").mkdir(parents=True)
        save_file({"x": torch.zeros(1)}, unfinished / "part" / "model.safetensors")
    for path in (tmp_path / "a.safetensors", tmp_path / "b" / "part" / "model.safetensors"):
        assert path.stat().st_mode == (tmp_path / "ordinary").stat().st_mode
