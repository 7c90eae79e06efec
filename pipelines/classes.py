"""Classes within classes: by their names, `jump/dog` and `jump/cat` are sub-classes of `jump`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


def superclass_name(name: str) -> str | None:
    """The name of the class right above, or None: `jump` for `jump/dog`."""
    return name.rpartition("/")[0] or None


def superclass_names(names: Iterable[str]) -> list[str]:
    """All classes that lie above some of these, the highest first, by name among equals."""
    above: set[str] = set()
    for name in names:
        while (name := superclass_name(name)) is not None:
            above.add(name)
    return sorted(above, key=lambda name: (name.count("/"), name))


def superclass_ids(names: Sequence[str]) -> list[int]:
    """For each class the id of the one right above it, or its own where `names` has none."""
    label_of = {name: label for label, name in enumerate(names)}
    return [label_of.get(superclass_name(name), label) for label, name in enumerate(names)]


def subclass_ids(labels: Mapping[str, int]) -> dict[int, list[int]]:
    """For each class that has others below it, the ids of those below that have none themselves; of ids by name."""
    above = set(superclass_names(labels))
    below: dict[int, list[int]] = {}
    for name, label in sorted(labels.items()):
        for over in superclass_names([name]) if name not in above else ():
            if over in labels:
                below.setdefault(labels[over], []).append(label)
    return below
