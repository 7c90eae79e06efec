"""Checks of command-line options: home folders, and numbers that are not finite."""

from __future__ import annotations

from pathlib import Path

import pytest

from vidgen import cli
from vidgen.common.errors import UserError
from vidgen.common.options import check_options, expand_home


def test_home_folders_are_expanded_in_every_kind_of_option(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    given = {"a": "~/x", "b": Path("~/y"), "c": ["u/~/z", "i3d=~/i3d.pt"], "d": ("~",), "e": 1, "f": None, "g": "a~/b"}
    assert check_options(given) == {
        "a": "/home/me/x",
        "b": Path("/home/me/y"),
        "c": ["u/~/z", "i3d=/home/me/i3d.pt"],
        "d": ("/home/me",),
        "e": 1,
        "f": None,
        "g": "a~/b",
    }
    assert expand_home("~no-such-user/x") == "~no-such-user/x" and expand_home(Path("a")) == "a"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), (0.0, float("-inf"))])
def test_numbers_must_be_finite(value):
    with pytest.raises(UserError, match=r"^--guidance-interval must be a finite number, not -?(nan|inf)\.$"):
        check_options({"guidance_interval": value})


def test_the_command_expands_and_checks(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    for words, message in (
        (["info", "~/none"], f"{tmp_path}/none"),
        (["generate", "a.mp4", "--model=~/none"], f"No pipeline in {tmp_path}/none"),
        (["data", "check", "~/none"], f"no dataset at {tmp_path}/none"),
        (["data", "check", "x", "--timeout", "nan"], "--timeout must be a finite number"),
        (
            ["generate", "a.mp4", "--model", "x", "--guidance-interval", "0", "inf"],
            "--guidance-interval must be a finite",
        ),
    ):
        with pytest.raises(SystemExit) as caught:
            cli.main(words)
        error = capsys.readouterr().err
        assert caught.value.code == 2 and message in error and error.count("\n") == 1
