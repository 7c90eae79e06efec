"""The report of the demo: one self-contained HTML page, filled in from the template report.html."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from string import Template
from typing import Any

from ..common.environment import environment
from ..common.io import atomic_write

TEMPLATE = Path(__file__).with_name("report.html")
MEDIA_TYPES = {".png": "image/png", ".mp4": "video/mp4"}


def write_report(path: str | os.PathLike, values: Mapping[str, Any], media: Iterable[Path]) -> Path:
    """Write the page, completely or not at all.

    Args:
        path: the page.
        values: values of the template's placeholders, which are escaped.
        media: files to embed; NAME.png is the value of the placeholder `NAME_png`.

    Raises:
        KeyError: if a placeholder has no value.
        FileNotFoundError: if a file is missing.
    """
    texts = {name: _format(value) for name, value in values.items()}
    for file in media:
        data = base64.b64encode(file.read_bytes()).decode("ascii")
        texts[file.name.replace(".", "_")] = f"data:{MEDIA_TYPES[file.suffix]};base64,{data}"
    facts = {**environment(), "created": datetime.now().astimezone().isoformat(" ", "seconds")}
    rows = (f"<dt>{_format(name)}</dt><dd><code>{_format(fact)}</code></dd>" for name, fact in facts.items())
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(texts, facts="".join(rows))
    with atomic_write(path) as unfinished:
        unfinished.write_text(page, encoding="utf-8")
    return Path(path)


def _format(value: Any) -> str:
    """Return a value as escaped text: floats with four digits, integers with thousands separators."""
    if isinstance(value, int):
        value = f"{value:,}"
    elif isinstance(value, float):
        value = f"{value:#.4g}".rstrip(".")
    return html.escape(str(value))
