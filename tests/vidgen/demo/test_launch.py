"""Signals reach the child processes, which end with the program."""

import os
import signal
import subprocess
import sys
import time

import pytest

CHILD = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
def leave(number, frame):
    time.sleep(0.3)
    open(sys.argv[1] + "/checkpoint", "w").close()
    sys.exit(0)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, leave)
open(sys.argv[1] + "/" + str(os.getpid()), "w").close()
time.sleep(60)
"""
# Like accelerate launch: a parent that ends at once and does not forward the signal.
LAUNCHER = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[2], sys.argv[1]]).wait()"
PROGRAM = """
import sys
from vidgen.common.errors import run_program
from vidgen.demo.launch import run_until_signal
run_program(lambda: run_until_signal([sys.executable, "-c", *sys.argv[1:]]))
"""


def _hear_signals() -> None:
    """A shell's background jobs, which a test run may be, ignore SIGINT, and those under nohup SIGHUP."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_all_child_processes(tmp_path, number):
    words = [LAUNCHER, str(tmp_path), CHILD]
    command = [sys.executable, "-c", PROGRAM, *words]
    program = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=_hear_signals)
    deadline = time.monotonic() + 60
    while not (names := os.listdir(tmp_path)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    program.send_signal(number)
    _, stderr = program.communicate(timeout=30)
    assert program.returncode == 128 + number
    assert stderr.strip().splitlines()[-1] == f"stopped by {number.name}"
    assert (tmp_path / "checkpoint").exists(), "the training could write its checkpoint"
    with pytest.raises(ProcessLookupError):
        os.kill(int(names[0]), 0)


def test_an_exit_code_is_passed_on():
    from vidgen.demo.launch import run_until_signal

    before = signal.getsignal(signal.SIGTERM)
    assert run_until_signal([sys.executable, "-c", "import sys; sys.exit(3)"]) == 3
    assert signal.getsignal(signal.SIGTERM) is before
