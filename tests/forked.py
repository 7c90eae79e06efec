"""Functions run in forked processes, which need not import again what the tests have imported."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
from accelerate.state import AcceleratorState


def run_forked(function: Callable[..., Any], *arguments: Any, processes: int = 1) -> None:
    """Call a function in as many new processes, which form a gloo process group if there are several.

    The processes have no state of Accelerate yet; they write to the file descriptors of this one.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    context = multiprocessing.get_context("fork")
    group = [
        context.Process(target=_call, args=(function, arguments, rank, processes, port)) for rank in range(processes)
    ]
    for process in group:
        process.start()
    for process in group:
        process.join(300)
        process.kill()
    assert [process.exitcode for process in group] == [0] * processes


def _call(function: Callable[..., Any], arguments: tuple, rank: int, processes: int, port: str) -> None:
    torch.set_num_threads(1)  # the threads of OpenMP do not survive a fork
    AcceleratorState._reset_state(reset_partial_state=True)
    if processes > 1:
        size = str(processes)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=port, ACCELERATE_USE_CPU="true")
    function(*arguments)
