"""Classes within classes: by their names, `jump/dog` and `jump/cat` are sub-classes of `jump`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


def superclass_name(name: str) -> str | None:
    """What stands before the first slash, `jump` for `jump/dog`; None where there is none."""
    return name.partition("/")[0] if "/" in name else None


def superclass_names(names: Iterable[str]) -> list[str]:
    """The classes that some of these are sub-classes of, sorted."""
    return sorted({above for name in names if (above := superclass_name(name)) is not None})


def superclass_ids(names: Sequence[str]) -> list[int]:
    """For each class the id of the one it is a sub-class of, or its own where `names` has none."""
    label_of = {name: label for label, name in enumerate(names)}
    return [label_of.get(superclass_name(name), label) for label, name in enumerate(names)]


def subclass_ids(labels: Mapping[str, int]) -> dict[int, list[int]]:
    """The ids of each class's sub-classes, by its own id, of ids by name; only classes that have some."""
    below: dict[int, list[int]] = {}
    for name, label in sorted(labels.items()):
        if (above := superclass_name(name)) in labels:
            below.setdefault(labels[above], []).append(label)
    return below
