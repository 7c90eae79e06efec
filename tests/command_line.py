"""The `vidgen` command as the tests of commands call it."""

from __future__ import annotations

import pytest

from vidgen.cli import main


def fail(capsys, *words: object) -> str:
    """Run a wrong command, and return the one sentence with which it ends."""
    with pytest.raises(SystemExit) as end:
        main([*map(str, words)])
    assert end.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    return error
