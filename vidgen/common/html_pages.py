"""Self-contained HTML pages: their style, tables of cells, and color swatches. A page loads nothing from elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template

from .io import atomic_write
from .svg_charts import line_color

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
STYLE = """\
body { font: 14px/1.45 system-ui, sans-serif; color: #1f2937; }
body { margin: 2rem auto; max-width: 1400px; padding: 0 1.5rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 1.8rem 0 .5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .3rem .9rem .3rem 0; vertical-align: top; }
th { border-bottom: 2px solid #d1d5db; font-weight: 600; } td { border-bottom: 1px solid #e5e7eb; }
td, th { overflow-wrap: anywhere; min-width: 6rem; max-width: 22rem; }
code { white-space: nowrap; }
.legend { position: sticky; top: 0; background: #fff; padding: .5rem 0; border-bottom: 1px solid #e5e7eb; }
.legend > span { margin-right: 1.4rem; white-space: nowrap; }
small, .same { color: #6b7280; }
.swatch { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px; margin-right: .5rem; }
details { margin: 1.2rem 0; } summary { cursor: pointer; font-size: 1.1rem; font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(400px, 1fr)); }
.charts { gap: .8rem 1.2rem; margin-top: .6rem; }
svg { width: 100%; height: auto; font-family: inherit; }
svg polyline { fill: none; stroke-width: 1.5; stroke-linejoin: round; }
svg polyline:hover { stroke-width: 3; }
svg .grid { stroke: #e5e7eb; } svg .tick { font-size: 10px; fill: #6b7280; }
svg .title { font-size: 12px; font-weight: 600; }"""


HEAD = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<!-- The browser refuses everything that is not in this file. -->
<meta http-equiv="Content-Security-Policy" content="$policy">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
$style
</style>
</head>
""")


def write_page(path: str | os.PathLike, title: str, template: Path, texts: Mapping[str, str], style: str = "") -> Path:
    """Write a page, completely or not at all.

    Args:
        path: the page.
        title: HTML, also of the heading: `$title` in the template.
        template: a file with the body of the page.
        texts: HTML for the other names in the template.
        style: CSS after that of all pages.
    """
    head = HEAD.substitute(policy=POLICY, title=title, style=STYLE + style)
    body = Template(template.read_text(encoding="utf-8")).substitute(texts, title=title)
    with atomic_write(path) as unfinished:
        unfinished.write_text(f"{head}{body}</html>\n", encoding="utf-8")
    return Path(path)


def swatch(style: int) -> str:
    """A square in the color of a chart's lines of this style."""
    return f'<span class="swatch" style="background:{line_color(style)}"></span>'


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
