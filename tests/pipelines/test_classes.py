"""Classes within classes, by their names."""

from __future__ import annotations

from pipelines.classes import subclass_ids, superclass_ids, superclass_name, superclass_names


def test_names_say_what_lies_above():
    assert superclass_name("jump/dog") == "jump"
    assert superclass_name("jump/dog/brown") == "jump/dog"
    assert superclass_name("jump") is None
    assert superclass_names(["jump/dog/brown", "jump/cat", "run", "hop/cat"]) == ["hop", "jump", "jump/dog"]


def test_ids_go_up_one_class_and_stop_at_the_top():
    assert superclass_ids(["jump", "jump/dog", "run", "jump/dog/brown", "hop/cat"]) == [0, 0, 2, 1, 4]


def test_ids_go_down_to_those_that_have_none_below():
    labels = {"jump": 0, "run": 1, "jump/dog": 2, "jump/dog/brown": 3, "jump/cat": 4, "hop/cat": 5}
    assert {label: sorted(below) for label, below in subclass_ids(labels).items()} == {0: [3, 4], 2: [3]}
