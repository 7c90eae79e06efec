"""The source of a cache: everything that its content depends on, by name."""

from __future__ import annotations

from collections.abc import Mapping

Source = dict[str, str | int | float | bool]


def describe_difference(cached: Mapping[str, object], source: Mapping[str, object]) -> str | None:
    """The first entry of a source that differs from that of a cache: "name (before, now)"; None if all are equal."""
    for key, value in source.items():
        if cached.get(key) != value:
            before, now = (str(x)[:12] for x in (cached.get(key), value))
            return f"{key} ({before}, now {now})"
    return None
