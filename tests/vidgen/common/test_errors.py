"""Exit of a program."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from vidgen.common.errors import TrainingInterrupted, UserError, run_program


def stopped() -> None:
    raise TrainingInterrupted("stopped", 15)


@pytest.mark.parametrize(("main", "code"), [(lambda: None, None), (stopped, 143)])
def test_a_finished_program_leaves_its_process_group(main, code, tmp_path):
    """Left to its destructor, Gloo's group now and then waits for ever for its own threads."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        run_program(main)
        assert code is None
    except SystemExit as end:
        assert end.code == code
    assert not dist.is_initialized()


def test_an_error_on_one_process_does_not_wait_for_the_others(tmp_path, capsys):
    """The others may be in the middle of an exchange, so the group is not taken down."""

    def main() -> None:
        raise UserError("wrong")

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    with pytest.raises(SystemExit):
        run_program(main)
    assert dist.is_initialized() and capsys.readouterr().err == "error: wrong\n"
    dist.destroy_process_group()


def test_processes_that_accelerate_does_not_connect_are_refused(monkeypatch, capsys):
    """Each would train alone and overwrite the files of the others."""
    done = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    run_program(lambda: done.append("no launcher"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("accelerate.PartialState", lambda cpu: SimpleNamespace(num_processes=2))
    run_program(lambda: done.append("connected"))
    monkeypatch.setattr("accelerate.PartialState", lambda cpu: SimpleNamespace(num_processes=1))
    with pytest.raises(SystemExit, match="2"):
        run_program(lambda: done.append("alone"))
    assert done == ["no launcher", "connected"]
    assert "started 2 processes, but without an accelerator each would run alone" in capsys.readouterr().err


def test_names_that_are_not_utf8_can_be_printed(monkeypatch):
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, "utf-8"))
    run_program(lambda: print("caf\udce9.mp4", flush=True))
    assert buffer.getvalue().rstrip() == rb"caf\udce9.mp4"
