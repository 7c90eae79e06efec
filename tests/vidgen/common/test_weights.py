"""Published files of weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from vidgen.common.errors import UserError
from vidgen.common.weights import WeightsFile, check_weights, file_sha256

OPTIONS = {"needed": "the test needs it", "path_option": "--file ", "sha256_option": "--sha256 "}


def test_the_hash_is_of_all_bytes(tmp_path):
    content = b"abc" * 1_000_000  # more than one chunk
    (tmp_path / "file").write_bytes(content)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_the_cache_is_torch_hubs(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert WeightsFile("a.pt", "us", "https://a", 7, ()).cached == tmp_path / "checkpoints" / "a.pt"


def test_a_file_is_described_by_url_size_and_hash():
    assert str(WeightsFile("a.pt", "us", "https://a", 7, ("ab", "cd"))) == "https://a (7 bytes, sha256 ab)"
    assert "sha256 not published" in str(WeightsFile("a.pt", "us", "https://a", None, ()))
    mirrored = WeightsFile("a.pt", "us", "https://a", None, (), mirrored=("ab",))
    assert str(mirrored) == "https://a (sha256 not published: a mirror's copy has ab)"


def test_which_hashes_are_known():
    file = WeightsFile("a.pt", "us", "https://a", None, ("ab", "cd"), mirrored=("ef",))
    assert [file.knows(sha256) for sha256 in ("ab", "cd", "ef", "00", None)] == [True, True, True, False, False]


def test_which_hashes_are_accepted(tmp_path):
    file: Path = tmp_path / "file"
    file.write_bytes(b"weights")
    found = file_sha256(file)

    def check(known: tuple[str, ...], sha256: str | None = None) -> str:
        return check_weights(file, WeightsFile("a.pt", "us", "https://a", 7, known), sha256, **OPTIONS)

    mirrored = WeightsFile("a.pt", "us", "https://a", 7, (), mirrored=("0" * 64,))
    assert check_weights(file, mirrored, **OPTIONS) == found  # a mirror's hash proves nothing
    assert check(()) == check((found,)) == check(("0" * 64, found)) == check(("0" * 64,), found.upper()) == found
    with pytest.raises(UserError, match=f"{found}, so it is not us's file: save https://a .*--sha256 {found}"):
        check(("0" * 64,))
    for known in ((), (found,)):  # what the user says counts, whatever is known
        with pytest.raises(UserError, match=f"{found}, not {'1' * 64}, which --sha256 asks for"):
            check(known, "1" * 64)
    file.unlink()
    with pytest.raises(UserError, match=r"the test needs it, and .*file is no file: save .* with --file FILE\."):
        check(())
