"""One self-contained HTML page of latent diagnostics: a table of all models, and findings and charts of each."""

from __future__ import annotations

import base64
import html
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..common.html_pages import swatch, table, write_page
from ..common.images import clip_strip
from ..common.svg_charts import Line, line_chart
from .latent_findings import list_findings

TEMPLATE = Path(__file__).with_name("latents_page.html")
EXTRA_STYLE = """
.model { border-top: 2px solid #d1d5db; margin-top: 2.5rem; } h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
.charts.small { grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); }
.model summary { font-size: 1rem; font-weight: 400; }
p, li { max-width: 62rem; } img { max-width: 100%; image-rendering: pixelated; }"""
LATENT, PIXELS, REFERENCE = 0, 1, 6  # styles of lines: blue, orange, black
MAX_SHOWN = 3  # interpolations on the page


def write_latents_page(
    path: str | os.PathLike, records: Mapping[str, dict[str, Any]], interpolations: torch.Tensor | None = None
) -> Path:
    """Write the page, completely or not at all; it loads nothing from elsewhere.

    Args:
        path: the page.
        records: of `vidgen.metrics.latent_diagnostics`, by the name of the model; at least one.
        interpolations: of the first model, (P, K + 1, 3, T, H, W) in [-1, 1].
    """
    sections = []
    for name, record in records.items():
        shown = interpolations if not sections else None
        sections.append(_model_section(name, record, shown))
    texts = {
        "summary": table(["", *map(html.escape, records)], summarize_records(list(records.values()))),
        "models": "".join(sections),
    }
    return write_page(path, f"Latents of {html.escape(', '.join(records))}", TEMPLATE, texts, EXTRA_STYLE)


def summarize_records(records: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Rows of a table: a measure, and its value for each record, "" where a latent does not have it."""
    rows: dict[str, list[str]] = {}
    for summarize in (_summarize_sizes, _summarize_streams, _summarize_grids, _summarize_interpolation):
        for number, record in enumerate(records):
            for label, text in summarize(record).items():
                rows.setdefault(label, [""] * len(records))[number] = text
    return [[label, *texts] for label, texts in rows.items()]


def _summarize_sizes(record: dict[str, Any]) -> dict[str, str]:
    return {
        "class": record["class"],
        "clips (C x T x H x W)": f"{record['num_clips']} of {_product(record['clip_shape'])}",
        "latent values per clip": f"{record['latent_size']:,} ({record['compression_rate']:.2%})",
    }


def _summarize_streams(record: dict[str, Any]) -> dict[str, str]:
    rows = {}
    for name, stream in record["streams"].items():
        live = len(stream["channels"]) - len(stream["dead_channels"])
        deviations = [channel["std"] for channel in stream["channels"]]
        rows[f"{name}: shape"] = _product(stream["shape"])
        rows[f"{name}: live channels"] = f"{live} of {len(stream['channels'])}"
        rows[f"{name}: channel deviations"] = f"{min(deviations):.3g} to {max(deviations):.3g}"
        rows[f"{name}: excess kurtosis"] = f"{stream['kurtosis']:.2f}"
        if stream["nats_per_value"] is None:
            rows[f"{name}: rate, nats per value"] = "no variance"
            continue
        rows[f"{name}: rate, nats per value"] = f"{stream['nats_per_value']:.2f}"
        rows[f"{name}: rate, nats per clip"] = f"{stream['nats_per_clip']:,.0f}"
        rows[f"{name}: KL to N(0, 1), nats per value"] = f"{stream['kl_per_value']:.2f}"
    return rows


def _summarize_grids(record: dict[str, Any]) -> dict[str, str]:
    rows = {}
    for name, grid in record["grids"].items():
        for axis, spectrum in grid["spectrum"].items():
            text = f"{spectrum['high']:.1%} (pixels: {spectrum['pixel_high']:.1%})"
            rows[f"{name}, {axis}: high frequencies"] = text
        for axis, shift in grid["shift"].items():
            if shift["moved"] is not None:
                text = f"{shift['moved']:.3f} (unmoved: {shift['unmoved']:.3f})"
                rows[f"{name}, {axis}: shift by one position"] = text
            pixels = f" (pixels: {shift['one_pixels']:.4f})" if shift["one_pixels"] else ""
            unit = "frame" if axis == "time" else "pixel"
            rows[f"{name}, {axis}: shift by one {unit}"] = f"{shift['one']:.4f}{pixels}"
        if grid["scale"] is not None:
            rows[f"{name}: enlarged quarter"] = f"{grid['scale']:.3f}"
    return rows


def _summarize_interpolation(record: dict[str, Any]) -> dict[str, str]:
    interpolation = record["interpolation"]
    labels = {
        "pixel_length": "path length, pixels",
        "largest_step": "largest step of the path",
        "perceptual_length": f"path length, LPIPS ({interpolation['backbone']})",
        "crossfade_perceptual_length": f"path length of a cross-fade, LPIPS ({interpolation['backbone']})",
    }
    return {label: _format_interval(interpolation[key]) for key, label in labels.items() if key in interpolation}


# --- the section of a model ------------------------------------------------------------------------------------------


def _model_section(name: str, record: dict[str, Any], interpolations: torch.Tensor | None) -> str:
    findings = list_findings(record)
    listed = "".join(f"<li>{html.escape(finding)}</li>" for finding in findings)
    parts = [
        f'<div class="model"><h2>{html.escape(name)}</h2>',
        f"<ul>{listed}</ul>" if findings else "<p>No measure is unusual.</p>",
        f'<p class="legend"><span>{swatch(LATENT)}latent</span><span>{swatch(PIXELS)}clips averaged over the pixels '
        f"of each position</span><span>{swatch(REFERENCE)}reference: a Gaussian, or white noise</span></p>",
    ]
    for stream_name, stream in record["streams"].items():
        parts.append(f"<h3>{html.escape(stream_name)}: channels and values</h3>")
        parts.append(f'<div class="charts small">{"".join(_stream_charts(stream))}</div>')
        parts.append(f"<details><summary>Table of the channels</summary>{_channels_table(stream)}</details>")
    for grid_name, grid in record["grids"].items():
        if grid["spectrum"]:
            parts.append(f"<h3>{html.escape(grid_name)}: power spectrum</h3>")
            charts = (_spectrum_chart(axis, spectrum) for axis, spectrum in grid["spectrum"].items())
            parts.append(f'<div class="charts">{"".join(charts)}</div>')
    if interpolations is not None and len(interpolations):
        parts.append(
            "<h3>Interpolation: the middle frame of decoded clips, from one clip (left) to another (right)</h3>"
        )
        parts += [_draw_interpolation(clips) for clips in interpolations[:MAX_SHOWN]]
    if record["skipped"]:
        entries = (f"<li>{html.escape(path)}: {html.escape(reason)}</li>" for path, reason in record["skipped"])
        parts.append(f"<h3>Videos that were left out</h3><ul>{''.join(entries)}</ul>")
    return "".join(parts) + "</div>"


def _stream_charts(stream: dict[str, Any]) -> list[str]:
    channels = stream["channels"]
    charts = []
    for key, title in (
        ("std", "standard deviation"),
        ("kurtosis", "excess kurtosis"),
        ("nats", "nats per value"),
    ):
        values = sorted((channel[key] for channel in channels if channel[key] is not None), reverse=True)
        if values:
            points = dict(enumerate(values, start=1))
            charts.append(line_chart(f"{title}, channels sorted", [Line("latent", points, LATENT)]))
    histogram = stream["histogram"]
    pairs = zip(histogram["deviations"], histogram["density"], strict=True)
    density = {x: y for x, y in pairs if y > 0}
    if density:
        gaussian = {x: math.exp(-x * x / 2) / math.sqrt(2 * math.pi) for x in histogram["deviations"] if abs(x) < 4}
        lines = [Line("latent", density, LATENT), Line("Gaussian", gaussian, REFERENCE)]
        charts.append(line_chart("density of the values, in deviations", lines))
    return charts


def _spectrum_chart(axis: str, spectrum: dict[str, Any]) -> str:
    frequency = spectrum["frequency"]
    lines = []
    for name, key, style in (("latent", "power", LATENT), ("averaged pixels", "pixel_power", PIXELS)):
        points = {x: y for x, y in zip(frequency, spectrum[key], strict=True) if y > 0}
        lines.append(Line(name, points, style))
    lines.append(Line("white noise", dict.fromkeys(frequency, 1.0), REFERENCE))
    return line_chart(f"power over {axis}, by cycles per position", lines)


def _channels_table(stream: dict[str, Any]) -> str:
    rows = []
    for c, channel in enumerate(stream["channels"]):
        nats = "" if channel["nats"] is None else f"{channel['nats']:.3f}"
        moments = [f"{channel[key]:.4g}" for key in ("mean", "std", "kurtosis")]
        rows.append([str(c), *moments, nats, "dead" if channel["dead"] else ""])
    return table(["channel", "mean", "standard deviation", "excess kurtosis", "nats per value", ""], rows)


def _draw_interpolation(clips: torch.Tensor) -> str:
    """An image of the middle frames of decoded clips (K + 1, 3, T, H, W)."""
    middle = clips[:, :, clips.shape[2] // 2].transpose(0, 1)
    buffer = io.BytesIO()
    clip_strip(middle, middle.shape[1]).save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<p><img alt="decoded interpolation" src="data:image/png;base64,{data}"></p>'


def _product(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))


def _format_interval(value: dict[str, float | None]) -> str:
    interval = "" if value["low"] is None else f" ({value['low']:.2f} to {value['high']:.2f})"
    return f"{value['mean']:.2f}{interval}"
