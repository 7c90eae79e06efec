"""One self-contained HTML page about a run: it opens from disk, can be mailed, and loads nothing.

report = Report("Sprites", "A tiny VidTwin and a tiny DiT")
report.figures({"PSNR": "24.1 dB", "clips": 64})
report.section("Reconstruction", "Held-out clips.").image("grid.png", "original | both | structure | dynamics")
report.save("report.html")
"""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from ..common.environment import environment
from ..common.io import atomic_write

IMAGES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".gif": "image/gif", ".webp": "image/webp"}
VIDEOS = {".mp4": "video/mp4", ".webm": "video/webm"}

STYLE = """
:root { color-scheme: light dark; --ink: #1b2430; --soft: #5a6676; --paper: #ffffff; --card: #f4f6f9; --line: #dfe5ec;
  --accent: #2458d3; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9f0; --soft: #9aa6b6; --paper: #14181e; --card: #1d232b;
  --line: #303945; --accent: #7fa6ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.55;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
header, main, footer { max-width: 1120px; margin: 0 auto; padding: 0 28px; }
header { padding-top: 44px; }
h1 { margin: 0; font-size: 2rem; line-height: 1.2; letter-spacing: -0.015em; }
.subtitle { margin: 6px 0 0; max-width: none; color: var(--soft); font-size: 1.1rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 28px 0 0; }
.figures div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.figures dt { color: var(--soft); font-size: 0.82rem; }
.figures dd { margin: 2px 0 0; font-size: 1.2rem; font-weight: 650; font-variant-numeric: tabular-nums; }
nav { margin: 24px 0 0; display: flex; flex-wrap: wrap; gap: 4px 20px; font-size: 0.92rem; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
h2 { margin: 48px 0 10px; padding-top: 18px; border-top: 1px solid var(--line); font-size: 1.35rem; }
p { margin: 10px 0; max-width: 76ch; white-space: pre-line; overflow-wrap: anywhere; }
figure { margin: 18px 0 26px; }
figure img, figure video { display: block; max-width: 100%; height: auto; border: 1px solid var(--line);
  border-radius: 8px; background: #ffffff; }
figcaption { margin: 8px 0 0; color: var(--soft); font-size: 0.9rem; max-width: 90ch; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.95rem; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 22px 7px 0; text-align: left; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; border-bottom-width: 2px; white-space: nowrap; }
th.number, td.number { text-align: right; }
footer { margin-top: 56px; padding-top: 18px; padding-bottom: 48px; color: var(--soft); font-size: 0.85rem; }
footer dl { display: grid; grid-template-columns: max-content 1fr; gap: 3px 18px; margin: 0; padding-top: 18px;
  border-top: 1px solid var(--line); }
footer dd { margin: 0; overflow-wrap: anywhere; }
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
"""


class Report:
    """A page built top to bottom: each method adds one thing and returns the report.

    Every text is escaped. Pictures and clips are read when they are added and embedded.

    Args:
        title: heading and window title.
        subtitle: one line below it.
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title = title
        self.subtitle = subtitle
        self._figures: dict[str, Any] = {}
        self._sections: list[str] = []
        self._body: list[str] = []

    def figures(self, figures: Mapping[str, Any]) -> Report:
        """Add key figures, {name: value}, to the tiles at the top: numbers, or text that brings its unit."""
        self._figures.update(figures)
        return self

    def section(self, title: str, text: str = "") -> Report:
        """Start a section, with an optional introduction; see `text`."""
        self._sections.append(title)
        self._body.append(f'<h2 id="section-{len(self._sections)}">{_text(title)}</h2>')
        return self.text(text)

    def text(self, text: str) -> Report:
        """Add paragraphs, separated by blank lines."""
        self._body += [f"<p>{_text(paragraph.strip())}</p>" for paragraph in text.split("\n\n") if paragraph.strip()]
        return self

    def table(
        self, rows: Sequence[Mapping[str, Any] | Sequence[Any]], columns: Sequence[str], caption: str = ""
    ) -> Report:
        """Add a table. A row has one value per column, or is a mapping by column name where some may be missing.

        Floats are shown with four digits. Raises `ValueError` for a row of another length or with an unknown column.
        """
        lines = []
        for number, row in enumerate(rows, start=1):
            if isinstance(row, Mapping):
                unknown = [str(key) for key in row if key not in columns]
                if unknown:
                    raise ValueError(f"row {number} of the table has no column for {', '.join(unknown)}.")
                row = [row.get(column) for column in columns]
            if len(row) != len(columns):
                raise ValueError(f"row {number} of the table has {len(row)} values for {len(columns)} columns.")
            lines.append(list(row))
        numeric = [any(_is_number(line[c]) for line in lines) for c in range(len(columns))]

        def cells(tag: str, values: Sequence[Any]) -> str:
            marks = [' class="number"' if is_number else "" for is_number in numeric]
            return "".join(f"<{tag}{m}>{_text(v)}</{tag}>" for v, m in zip(values, marks, strict=True))

        head = f"<thead><tr>{cells('th', columns)}</tr></thead>"
        body = "".join(f"<tr>{cells('td', line)}</tr>" for line in lines)
        return self._figure(f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>', caption)

    def image(self, path: str | os.PathLike, caption: str = "") -> Report:
        """Embed a PNG, JPEG, WebP or GIF. Raises `FileNotFoundError`, or `ValueError` for another ending."""
        return self._figure(f'<img src="{_embedded(path, IMAGES)}" alt="{_text(caption)}">', caption)

    def video(self, path: str | os.PathLike, caption: str = "") -> Report:
        """Embed an MP4 or WebM, playing silently in a loop, or a GIF; raises as `image`."""
        if Path(path).suffix.lower() == ".gif":
            return self.image(path, caption)
        source = _embedded(path, VIDEOS)
        return self._figure(f'<video src="{source}" autoplay loop muted playsinline></video>', caption)

    def save(self, path: str | os.PathLike, facts: Mapping[str, Any] | None = None) -> Path:
        """Write the page, whole or not at all, with `facts` in its footer: `environment()` by default."""
        page = self._page(environment() if facts is None else facts)
        with atomic_write(path) as unfinished:
            unfinished.write_text(page, encoding="utf-8")
        return Path(path)

    def _figure(self, content: str, caption: str) -> Report:
        below = f"<figcaption>{_text(caption)}</figcaption>" if caption else ""
        self._body.append(f"<figure>{content}{below}</figure>")
        return self

    def _page(self, facts: Mapping[str, Any]) -> str:
        tiles = "".join(f"<div><dt>{_text(k)}</dt><dd>{_text(v)}</dd></div>" for k, v in self._figures.items())
        links = "".join(f'<a href="#section-{i}">{_text(title)}</a>' for i, title in enumerate(self._sections, 1))
        facts = {**facts, "made": datetime.now().astimezone().isoformat(" ", "seconds")}
        foot = "".join(f"<dt>{_text(k)}</dt><dd><code>{_text(v)}</code></dd>" for k, v in facts.items())
        newline = "\n"
        # The policy makes the browser itself refuse anything that is not in this file.
        return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'">
<title>{_text(self.title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>{_text(self.title)}</h1>
{f'<p class="subtitle">{_text(self.subtitle)}</p>' if self.subtitle else ""}
{f'<dl class="figures">{tiles}</dl>' if tiles else ""}
{f"<nav>{links}</nav>" if len(self._sections) > 1 else ""}
</header>
<main>
{newline.join(self._body)}
</main>
<footer><dl>{foot}</dl></footer>
</body>
</html>
"""


def _embedded(path: str | os.PathLike, kinds: Mapping[str, str]) -> str:
    """The file as a data: address."""
    path = Path(path)
    kind = kinds.get(path.suffix.lower())
    if kind is None:
        raise ValueError(f"{path} cannot be shown here: its name must end in {', '.join(kinds)}.")
    if not path.is_file():
        raise FileNotFoundError(f"no file to show at {path}.")
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: Any) -> str:
    """A value as escaped text: floats with four digits, integers in groups of three, nothing as a dash."""
    if value is None:
        value = "—"
    elif isinstance(value, bool):
        value = "yes" if value else "no"
    elif isinstance(value, int):
        value = f"{value:,}"
    elif isinstance(value, float):
        value = f"{value:#.4g}".rstrip(".")
    return html.escape(str(value))
