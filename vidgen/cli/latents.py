"""`vidgen latents`: how hard the latent of an autoencoder is to diffuse."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..common.errors import UserError
from .options import DTYPES, MODEL, add_command

DATA = "a folder of videos or of class folders, a CSV with the columns path,label, or shards"


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Declare the command and its options."""
    parser = add_command(
        commands,
        "latents",
        "diagnose the latent of an autoencoder before a DiT is trained on it",
        "Measures on real clips the channels, rate, spectra, response to shifts and scales, and interpolations of the "
        "latent, and writes a JSON file and a page with plots and what to look for.",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("data", metavar="DATA", help=DATA)
    parser.add_argument("--num-clips", type=int, default=64, metavar="N", help="clips, one of each video")
    parser.add_argument("--fps", type=float, default=8.0, help="frame rate of the clips")
    parser.add_argument("--num-frames", type=int, help="frames per clip, for a model without a fixed size")
    parser.add_argument(
        "--size", type=int, nargs="+", metavar="PIXELS", help="height and width, or one side, for such a model"
    )
    parser.add_argument("--batch-size", type=int, default=4, help="clips that are encoded at a time")
    parser.add_argument("--num-workers", type=int, default=0, help="processes that read videos")
    parser.add_argument("--lpips", choices=("alex", "squeeze", "vgg"), help="backbone for perceptual path lengths")
    parser.add_argument("--lpips-weights", metavar="FILE", help="weights of the backbone (default: torch hub's cache)")
    parser.add_argument("--lpips-sha256", metavar="HASH", help="hash of its file, if not the published one")
    parser.add_argument(
        "--compare", nargs="+", default=[], metavar="FILE.json", help="show earlier --output files beside MODEL"
    )
    parser.add_argument("--output", default="latents.json", metavar="FILE.json", help="the figures to write")
    parser.add_argument("--page", default="latents.html", metavar="FILE.html", help="the page to write")
    parser.add_argument("--device", help="cuda, cuda:1, mps, cpu ... (default: the accelerator if there is one)")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="float32", help="dtype of the computation")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure, print the table and the findings, and write the JSON file and the page."""
    from rich.console import Console
    from rich.table import Table

    from ..common.environment import environment
    from ..common.io import atomic_write
    from ..common.loading import load_vae, weights_hash
    from ..common.precision import place_model
    from ..inference.operations import resolve_device
    from ..losses.lpips import LPIPS
    from ..metrics.latent_diagnostics import diagnose_latents
    from ..metrics.latent_findings import list_findings
    from ..metrics.latents_page import summarize_records, write_latents_page

    # Load the model and the records to compare.
    if options.size is not None and len(options.size) > 2:
        raise UserError(f"--size takes one side, or height and width, not {len(options.size)} numbers.")
    earlier = [_read_record(path) for path in options.compare]
    height, width = (options.size * 2)[:2] if options.size else (None, None)
    versions, device = environment(), resolve_device(options.device)
    vae = load_vae(options.model, options.num_frames, height, width)
    requested = (options.num_frames, height, width)
    if any(size not in (None, fixed) for size, fixed in zip(requested, vae.clip_shape[1:], strict=True)):
        sizes = " x ".join(map(str, vae.clip_shape[1:]))
        raise UserError(f"{options.model} has the fixed clip size {sizes}; leave --num-frames and --size out.")
    sha256 = weights_hash(vae)
    vae = place_model(vae, device, options.dtype)
    lpips = None
    if options.lpips or options.lpips_weights:
        settings = (options.lpips or "squeeze", options.lpips_weights, options.lpips_sha256)
        lpips = LPIPS.from_pretrained(*settings, options=("--lpips-weights", "--lpips-sha256")).to(device)

    # Measure, and write the files.
    result = diagnose_latents(
        vae,
        options.data,
        num_clips=options.num_clips,
        fps=options.fps,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        lpips=lpips,
        report=lambda text: print(text, file=sys.stderr),
    )
    findings = list_findings(result.record)
    record = {"model": options.model, "sha256": sha256, "data": options.data, **result.record}
    record |= {"dtype": str(vae.dtype).removeprefix("torch."), "findings": findings}
    record |= {"versions": versions, "command": versions["command"]}
    with atomic_write(options.output) as unfinished:
        unfinished.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    records = _name_records([record, *earlier])
    page = write_latents_page(options.page, records, result.interpolations)

    # Print the table and the findings.
    table = Table(title=f"latents on {options.data}", title_justify="left")
    for column in ("", *records):
        table.add_column(column, overflow="fold")
    for row in summarize_records(list(records.values())):
        table.add_row(*row)
    Console(highlight=False).print(table)
    for finding in findings:
        print(f"note: {finding}")
    for path, reason in record["skipped"]:
        print(f"left out {path}: {reason}")
    print(options.output)
    print(page)


def _read_record(path: str) -> dict[str, Any]:
    """Read a file that --output wrote. Raises `UserError` for another file."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        if {"model", "streams", "grids", "interpolation"} <= record.keys():
            return record
    except OSError as error:
        raise UserError(f"--compare {path}: {error.strerror}.") from error
    except (ValueError, AttributeError):
        pass
    raise UserError(f"--compare {path} is not a file that vidgen latents --output wrote.")


def _name_records(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The records by the end of the path of their model, numbered where several are equal."""
    names = ["/".join(Path(record["model"]).parts[-2:]) for record in records]
    return {
        name if names.count(name) == 1 else f"{name} ({number})": record
        for number, (name, record) in enumerate(zip(names, records, strict=True), start=1)
    }
