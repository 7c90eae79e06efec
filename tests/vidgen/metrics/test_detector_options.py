"""Detectors of a command line, by name or file."""

import pytest

from vidgen.common.errors import UserError
from vidgen.metrics import detector_options
from vidgen.metrics.detector_options import parse_detectors


def test_detectors_of_a_command_line(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(detector_options, "get_detector", lambda *arguments: asked.append(arguments))

    def of(*given, sha256=None):
        asked.clear()
        parse_detectors(given, "i3d", sha256)
        return asked

    path = str(tmp_path / "run=3" / "i3d_of_mine.pt")
    assert of("squeezenet", f"i3d_imagenet={path}") == [("squeezenet", None, None), ("i3d_imagenet", path, None)]
    assert of(path) == [("i3d", path, None)]  # the = is part of the path
    assert of("folder/weights") == [("i3d", "folder/weights", None)]
    assert of("pooled_pixels", "i3d", sha256="ab") == [("pooled_pixels", None, None), ("i3d", None, "ab")]
    assert of("squeezenet", path, sha256="ab") == [("squeezenet", None, None), ("i3d", path, "ab")]
    with pytest.raises(UserError, match=r"--detector-sha256 is of one file, but 2 of these"):
        of("squeezenet=a.pt", "b.pt", sha256="ab")
    with pytest.raises(UserError, match=r"--detector-sha256 is of one file, but 2 of these"):
        of("squeezenet", "i3d", sha256="ab")
    with pytest.raises(UserError, match=r"--detector-sha256 is of one file, but 0 of these"):
        of("pooled_pixels", sha256="ab")
    with pytest.raises(UserError, match=r"the detector i3d is given 2 times"):
        of("i3d=a.pt", "squeezenet", "b.pt")
