"""Superclasses and subclasses by name."""

from __future__ import annotations

from pipelines.classes import subclass_ids, superclass_ids, superclass_name, superclass_names


def test_superclasses_by_name():
    assert superclass_name("jump/dog") == superclass_name("jump/dog/brown") == "jump"
    assert superclass_name("jump") is None
    assert superclass_names(["jump/dog/brown", "jump/cat", "run", "hop/cat"]) == ["hop", "jump"]


def test_superclass_ids():
    assert superclass_ids(["jump", "jump/dog", "run", "jump/dog/brown", "hop/cat"]) == [0, 0, 2, 0, 4]


def test_subclass_ids():
    labels = {"jump": 0, "run": 1, "jump/dog": 2, "jump/dog/brown": 3, "jump/cat": 4, "hop/cat": 5}
    assert {label: sorted(below) for label, below in subclass_ids(labels).items()} == {0: [2, 3, 4]}
