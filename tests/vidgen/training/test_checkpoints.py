"""Checkpoints are complete or absent after any interruption."""

from __future__ import annotations

import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from vidgen.common.errors import UserError
from vidgen.training.checkpoints import clear_remains, find_checkpoint, list_checkpoints, save_checkpoint


def write(folder: Path) -> None:
    (folder / "part").mkdir()
    (folder / "part" / "state").write_text("whole")


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def save(folder: Path, step: int, limit: int | None = 2, how=write) -> Path:
    return save_checkpoint(Accelerator(cpu=True), folder, step, limit, how)


def test_the_newest_are_kept_and_the_latest_is_found(tmp_path):
    for step in (2, 9, 10):
        save(tmp_path, step)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-9"]
    assert find_checkpoint(tmp_path, "latest").name == "checkpoint-10"
    assert find_checkpoint(tmp_path, str(tmp_path / "checkpoint-9")).name == "checkpoint-9"
    assert find_checkpoint(tmp_path / "absent", None) is find_checkpoint(tmp_path / "absent", "latest") is None
    assert find_checkpoint(tmp_path / "absent", str(tmp_path / "checkpoint-9")).name == "checkpoint-9"


def test_a_run_does_not_mix_its_checkpoints_with_those_of_another(tmp_path):
    for folder in ("here", "there"):
        save(tmp_path / folder, 3)
    for resume in (None, str(tmp_path / "there" / "checkpoint-3")):
        with pytest.raises(UserError, match="here holds checkpoint-3 of an earlier run"):
            find_checkpoint(tmp_path / "here", resume)


def test_checkpoints_after_the_resumed_step_are_deleted(tmp_path):
    for step in (2, 3, 4, 5):
        save(tmp_path, step, limit=4)
    save(tmp_path, 3, limit=2)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    save(tmp_path, 3)
    save(tmp_path, 3, how=lambda folder: (folder / "state").write_text("new"))
    assert names(tmp_path) == ["checkpoint-3"]
    assert (tmp_path / "checkpoint-3" / "state").read_text() == "new"


def test_a_full_disk_loses_nothing_earlier(tmp_path):
    def fill(folder: Path) -> None:
        (folder / "state").write_text("ha")
        raise OSError(28, "No space left on device")

    with pytest.raises(
        UserError, match=r"step 1 cannot be written .*No space left.*Free some space if the disk is full"
    ):
        save(tmp_path, 1, how=fill)
    save(tmp_path, 1, limit=1)
    with pytest.raises(UserError, match=r"step 2 cannot be written .*checkpoint-1 is complete"):
        save(tmp_path, 2, limit=1, how=fill)
    assert names(tmp_path) == ["checkpoint-1"]
    assert (tmp_path / "checkpoint-1" / "part" / "state").read_text() == "whole"


class Killed(BaseException):
    """As a SIGKILL: nothing gets to clean up."""


def killed_at(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the count-th operation on the file system, and all after it, not happen; a deletion happens by half."""
    done = 0

    def guarded(real):
        def operation(*args, **kwargs):
            nonlocal done
            done += 1
            if done == count and real is rmtree:
                (args[0] / "part" / "state").unlink(missing_ok=True)
            if done >= count:
                raise Killed
            return real(*args, **kwargs)

        return operation

    monkeypatch.setattr(Path, "mkdir", guarded(Path.mkdir))
    monkeypatch.setattr(Path, "rename", guarded(Path.rename))
    rmtree = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", guarded(rmtree))
    monkeypatch.setattr(os, "fsync", guarded(os.fsync))


@pytest.mark.parametrize("step", [1, 2])  # in the place of an older one, and of the same
def test_a_kill_between_any_two_operations_leaves_a_complete_checkpoint(tmp_path, monkeypatch, step):
    for count in range(1, 40):
        folder = tmp_path / str(count)
        save(folder, 1, limit=1)
        with monkeypatch.context() as patch:
            killed_at(count, patch)
            try:
                save(folder, step, limit=1)
                finished = True
            except Killed:
                finished = False
        clear_remains(folder)
        left = list_checkpoints(folder)
        assert left, f"nothing is left after operation {count}"
        assert all((path / "part" / "state").read_text() == "whole" for path in left)
        assert names(folder) == [path.name for path in left], "remains were not cleared"
        if finished:
            assert left[-1].name == f"checkpoint-{step}"
            return
    pytest.fail("the checkpoint was never written whole")


def test_a_checkpoint_is_on_the_disk_before_it_is_renamed(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(os, "fsync", lambda handle: events.append(os.readlink(f"/proc/self/fd/{handle}")))
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, to: (events.append(("rename", to.name)), rename(self, to))[1])
    save(tmp_path, 1)
    before = events[: events.index(("rename", "checkpoint-1"))]
    assert any(str(event).endswith("part/state") for event in before)
    assert any(str(event).endswith("part") for event in before)
    assert events[-1] == str(tmp_path)


def test_files_are_synchronized_after_all_processes_have_written(tmp_path, monkeypatch):
    meeting, written, early = threading.Barrier(2, timeout=30), [], []

    class Process:
        wait_for_everyone = staticmethod(meeting.wait)

        def __init__(self, is_main_process: bool) -> None:
            self.is_main_process = is_main_process

        def write(self, folder: Path) -> None:
            if self.is_main_process:
                time.sleep(0.2)  # the other one is done long before
            (folder / str(self.is_main_process)).touch()
            written.append(self)

    monkeypatch.setattr(os, "fsync", lambda handle: early.append(handle) if len(written) < 2 else None)
    processes = [Process(True), Process(False)]
    with ThreadPoolExecutor(2) as pool:
        for saved in [pool.submit(save_checkpoint, each, tmp_path, 1, 2, each.write) for each in processes]:
            assert saved.result() == tmp_path / "checkpoint-1"
    assert not early


def test_others_can_read_the_weights(tmp_path):
    (tmp_path / "ordinary").touch()
    folder = save(tmp_path / "run", 1, how=lambda folder: save_file({"x": torch.zeros(1)}, folder / "w.safetensors"))
    assert (folder / "w.safetensors").stat().st_mode == (tmp_path / "ordinary").stat().st_mode
