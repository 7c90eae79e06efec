"""Class labels: names and ids, and subclasses by name (`jump/dog` and `jump/cat` are subclasses of `jump`)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from autoencoder.tiling import is_whole

from .inputs import as_labels, check_generators


def superclass_name(name: str) -> str | None:
    """Return the part before the first slash, `jump` for `jump/dog`; None without a slash."""
    return name.partition("/")[0] if "/" in name else None


def superclass_names(names: Iterable[str]) -> list[str]:
    """Return the classes that some of these are subclasses of, sorted."""
    return sorted({parent for name in names if (parent := superclass_name(name)) is not None})


def superclass_ids(names: Sequence[str]) -> list[int]:
    """Return for each class the id of its superclass, or its id where `names` has no superclass of it."""
    label_of = {name: label for label, name in enumerate(names)}
    return [label_of.get(superclass_name(name), label) for label, name in enumerate(names)]


def subclass_ids(labels: Mapping[str, int]) -> dict[int, list[int]]:
    """Return the ids of each class's subclasses, by its id; only classes with subclasses."""
    subclasses: dict[int, list[int]] = {}
    for name, label in sorted(labels.items()):
        if (parent := superclass_name(name)) in labels:
            subclasses.setdefault(labels[parent], []).append(label)
    return subclasses


class ClassLabelsMixin:
    """Class labels of a pipeline, from its config's `id2label` and its transformer's `num_classes`."""

    config: Any
    transformer: Any

    @property
    def labels(self) -> dict[str, int]:
        """Class ids by name, without `subclasses`."""
        ids = self._ids_by_name
        return {name: label for name, label in ids.items() if superclass_name(name) not in ids}

    @property
    def subclasses(self) -> dict[str, int]:
        """Ids of subclasses by name, such as `jump/dog` of `jump`."""
        ids = self._ids_by_name
        return {name: label for name, label in ids.items() if superclass_name(name) in ids}

    @property
    def class_ids(self) -> list[int]:
        """Ids of all classes without subclasses; empty for an unconditional model."""
        subclasses = set(self.subclasses.values())
        return [label for label in range(self.transformer.config.num_classes or 0) if label not in subclasses]

    @property
    def _ids_by_name(self) -> dict[str, int]:
        return dict(sorted((name, int(label)) for label, name in self.config.id2label.items()))

    def get_label_ids(self, class_labels: int | str | list[int | str] | torch.Tensor) -> list[int]:
        """Convert class names and ids to ids.

        Raises:
            ValueError: if a name is unknown (the message has the nearest name), an id is out of range or no whole
                number, or the list is empty.
        """
        class_labels = as_labels(class_labels)
        if not class_labels:
            raise ValueError("class_labels is empty: pass at least one class, or None.")
        return [self._label_id(label) for label in class_labels]

    def get_label_names(self, label_ids: Sequence[int]) -> list[str | None]:
        """Convert ids to names of classes and subclasses; None where an id has none."""
        return [self.config.id2label.get(str(label)) for label in label_ids]

    def _label_id(self, label: int | str) -> int:
        num_classes = self.transformer.config.num_classes
        if num_classes is None:
            raise ValueError(f"This model is unconditional and has no class {label!r}: leave class_labels out.")
        if not isinstance(label, str):
            label = label.item() if isinstance(label, torch.Tensor) and label.ndim == 0 else label
            if not is_whole(label):
                raise ValueError(f"A class must be a name or a whole number, not {label!r}.")
            if not 0 <= int(label) < num_classes:
                raise ValueError(f"Class {label} is out of range: this model has classes 0 to {num_classes - 1}.")
            return int(label)
        ids = self._ids_by_name
        if label in ids:
            return ids[label]
        if not ids:
            raise ValueError(f"Unknown class {label!r}: this pipeline has no id2label; use 0 to {num_classes - 1}.")
        names = {name.lower(): name for name in ids}
        nearest = names[difflib.get_close_matches(label.lower(), names, n=1, cutoff=0.0)[0]]
        more = f" and `subclasses` {len(self.subclasses)} more" if self.subclasses else ""
        raise ValueError(
            f"Unknown class {label!r}; did you mean {nearest!r}? `labels` lists all {len(self.labels)}{more}."
        )

    def draw_subclasses(
        self, label_ids: Sequence[int], generator: torch.Generator | list[torch.Generator] | None = None
    ) -> list[int]:
        """Replace each class that has subclasses by one of them, drawn uniformly.

        Args:
            label_ids: one per video.
            generator: one for all videos, or a list with one per video.

        Raises:
            ValueError: if a list of generators has another length.
        """
        check_generators(generator, len(label_ids))
        subclasses = subclass_ids(self._ids_by_name)
        drawn = []
        for i, label in enumerate(label_ids):
            if label in subclasses:
                source = generator[i] if isinstance(generator, list) else generator
                uniform = torch.rand((), generator=source, device=None if source is None else source.device)
                label = subclasses[label][int(uniform * len(subclasses[label]))]
            drawn.append(label)
        return drawn
