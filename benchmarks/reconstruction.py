"""Table 1: how well clips come back from their latents.

    python -m benchmarks.reconstruction --scale cpu --clips FOLDER
    accelerate launch -m benchmarks.reconstruction --scale paper --vae FOLDER --data MCL-JCV --lpips alex
    python -m benchmarks.reconstruction --data ORIGINALS --reconstructed THEIRS --rate 0.53

Any VAE on any videos (`--vae`, `--data`), by the paper's protocol or in clips of the VAE's own size; or videos that
another method reconstructed, matched by name. Without either, the `full` run of `ablations.py` on what it held out.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from autoencoder import AutoencoderKLVidTwin
from benchmarks.common import paper, vae_runs
from vidgen.common.errors import UserError
from vidgen.common.images import comparison_grid
from vidgen.common.loading import load_vae
from vidgen.common.precision import place_model
from vidgen.data.dataset import ClipDataset
from vidgen.losses.lpips import BACKBONES
from vidgen.metrics.detectors import Detector, named_detectors
from vidgen.metrics.evaluation import ProtocolClips, evaluate_pairs, evaluate_reconstruction
from vidgen.metrics.protocols import get_protocol
from vidgen.metrics.reconstruction import downsample_baseline

from .common.harness import Benchmark, Results, dot_chart, markdown_table

GRID_CLIPS = 4
PAPERS = "mcl-jcv"  # the protocol of the paper's table; other data sets' are of generated clips
MCL_JCV_VIDEOS = 30
CHOSEN = (
    "here clips follow each other from a video's first frame, their frames those shown at each moment of the stated "
    "rate (at 25 a second every sixth of a 30-fps original is left out), short side resized with antialiasing, the "
    "center cut out"
)
DETECTOR = "pooled_pixels"  # takes no file and clips of any size
OWN_FPS = 8.0  # of the recipes
ROWS = {"reconstruction": "reconstruction", "mean_color": "the clip's mean color", "downsample": "the clip shrunk"}

Clips = ClipDataset | ProtocolClips


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vae", nargs="+", default=[], metavar="FOLDER", help="trained VAEs, measured on --data")
    parser.add_argument("--data", type=Path, metavar="FOLDER|CSV", help="videos to reconstruct, or the originals")
    parser.add_argument("--protocol", choices=[PAPERS], help=f"how clips are cut (scale paper: {PAPERS})")
    parser.add_argument("--fps", type=float, help=f"without a protocol: frames per second (default: {OWN_FPS:g})")
    parser.add_argument("--clips-per-video", type=int, help="without a protocol (default: 1)")
    parser.add_argument("--batch-size", type=int, default=8, help="on each process (default: 8)")
    parser.add_argument("--reconstructed", type=Path, metavar="FOLDER|CSV", help="another method's videos of --data")
    parser.add_argument("--rate", type=float, metavar="PERCENT", help="of the other method's latent")
    parser.add_argument("--lpips", choices=BACKBONES, default="squeeze", help="its backbone (default: squeeze)")
    vae_runs.add_lpips_options(parser)
    parser.add_argument(
        "--detector",
        action="append",
        metavar="NAME_OR_PATH",
        help="of the Fréchet distance: its name, the file of the protocol's detector, or NAME=FILE; may be given "
        f"several times (default: {DETECTOR}, with a protocol none)",
    )
    parser.add_argument("--detector-sha256", metavar="HASH", help="of a detector's file that is not the published one")
    parser.add_argument("--clips", type=Path, metavar="FOLDER", help="real videos for scale cpu, as in ablations.py")
    parser.set_defaults(only=None)  # of vae_runs: all are needed


def run(options: argparse.Namespace) -> Results:
    protocol = options.protocol or (PAPERS if options.scale == "paper" and options.vae else None)
    check(options, protocol)
    device = PartialState().device
    lpips = vae_runs.load_lpips(options, options.lpips)
    detectors = [detector.to(device) for detector in detectors_of(options, protocol)]
    eyes = {"networks": [lpips], "detectors": detectors}
    methods: dict[str, Any] = {}
    trainings = 0.0
    if options.reconstructed:
        rate = options.rate / 100 if options.rate else None
        figures = evaluate_pairs(options.data, options.reconstructed, compression_rate=rate, device=device, **eyes)
        methods[options.reconstructed.stem] = {"data": str(options.data), **figures, "compression_rate": rate}
    for folder in options.vae:
        vae = place_model(load_vae(folder), device, options.dtype)
        name = named(folder, methods)
        methods[name] = measured(name, vae, clips_of(options, protocol, vae), str(options.data), eyes, options)
    if not methods:
        for data in vae_runs.data_sets(options):
            folder, seconds = vae_runs.full_run(data, 0, options)
            vae = place_model(load_vae(str(folder / "final")), device, options.dtype)
            clips = vae_runs.held_out_clips(vae, vae_runs.config_of(folder))
            methods[folder.name] = measured(folder.name, vae, clips, data, eyes, options)
            trainings += seconds
    return {"protocol": protocol, "lpips": options.lpips, "methods": methods, "training_seconds": trainings}


def check(options: argparse.Namespace, protocol: str | None) -> None:
    """Raises `UserError` for options that do not go together."""
    if protocol and (options.fps or options.clips_per_video or options.reconstructed):
        raise UserError(
            f"{protocol} says how clips are cut, so --fps, --clips-per-video and --reconstructed do not go with it."
        )
    if options.data is None and (options.vae or options.reconstructed or options.scale == "paper"):
        raise UserError("give the videos to measure on as --data FOLDER (MCL-JCV for the paper's table).")
    if options.data and not (options.vae or options.reconstructed):
        raise UserError("say what is measured on --data: trained VAEs as --vae FOLDER, or --reconstructed FOLDER.")


def detectors_of(options: argparse.Namespace, protocol: str | None) -> list[Detector]:
    """Those asked for; else the one that needs no file, which the paper's table does not ask for."""
    asked = options.detector or ([] if protocol else [DETECTOR])
    return named_detectors(asked, get_protocol(protocol or PAPERS).detector, options.detector_sha256)


def named(folder: str, taken: Collection[str]) -> str:
    """A short name for a VAE: of its folder, or of the run whose `final` it is."""
    path = Path(folder)
    name = path.parent.name if path.name == "final" else path.name
    return folder if name in taken else name


def clips_of(options: argparse.Namespace, protocol: str | None, vae: AutoencoderKLVidTwin) -> Clips:
    """The clips of --data by the protocol, or of the VAE's own size."""
    if protocol:
        return ProtocolClips(options.data, get_protocol(protocol))
    return ClipDataset(
        options.data,
        vae.config.num_frames,
        options.fps or OWN_FPS,
        vae.config.sample_size,
        train=False,
        clips_per_video=options.clips_per_video or 1,
    )


def measured(
    name: str, vae: AutoencoderKLVidTwin, clips: Clips, data: str, eyes: dict[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """The figures of a VAE on clips; a few of them, with their reconstructions, go to a PNG."""
    figures = evaluate_reconstruction(vae, clips, batch_size=options.batch_size, **eyes)
    if PartialState().is_main_process:
        spread = torch.linspace(0, len(clips) - 1, min(GRID_CLIPS, len(clips))).round().long().tolist()
        video = torch.stack([clips[i]["video"] for i in spread]).to(vae.device)
        with torch.no_grad():
            image = vae(video.to(vae.dtype)).sample.float()
        columns = {
            "original": video,
            "reconstruction": image,
            "downsample": downsample_baseline(video, figures["num_values"]),
        }
        comparison_grid(options.results / f"reconstruction_{name.replace('/', '-')}.png", columns)
    return {"data": data, "fps": fps_of(clips), "parameters": vae.num_parameters(), **figures}


def fps_of(clips: Clips) -> float | None:
    return clips.protocol.fps if isinstance(clips, ProtocolClips) else clips.fps


def tables(results: Results | None) -> str:
    header = ["method", "data", "rate, %", "PSNR, dB", "LPIPS", "SSIM", "FVD"]
    rows = [[name, "MCL-JCV, as the paper gives it", *map(str, row)] for name, row in paper.RECONSTRUCTION.items()]
    if results is None:
        return markdown_table(header, rows)
    lpips = f"lpips_{results['lpips']}"
    for name, method in results["methods"].items():
        of = method["figures"]["reconstruction"]["uint8"]
        rate = method["compression_rate"]
        rate = "" if rate is None else f"{100 * rate:.3f}"
        means = [f"{of[key]['mean']:.{digits}f}" for key, digits in (("psnr", 3), (lpips, 4), ("ssim", 4))]
        rows.append([f"{name} (ours)", where(method), rate, *means, rfvd(method)])
    said = (
        f"Ours: PSNR of one mean squared error a clip, LPIPS of the {results['lpips']} backbone, both of pixels as "
        "files hold them; the paper states neither kind, so compare rows of one kind only."
    )
    text = f"{markdown_table(header, rows)}\n\n{said}"
    if results["protocol"]:
        protocol = get_protocol(results["protocol"])
        text += f" {protocol.source} does not state {', '.join(protocol.not_stated)} of {protocol.name}; {CHOSEN}."
        for name, method in results["methods"].items():
            if method["num_videos"] != MCL_JCV_VIDEOS:
                text += f" It has {MCL_JCV_VIDEOS} videos; {name} was measured on {method['num_videos']}."
    return f"{text}\n\n{details(results)}"


def rfvd(method: dict[str, Any]) -> str:
    said = []
    for name, distance in method["rfvd"].items():
        if distance["value"] is not None:
            few = f", of only {distance['vectors']}" if distance["vectors"] <= distance["detector"]["dim"] else ""
            said.append(f"{distance['value']:.4g} ({name}{few})")
    return "; ".join(said)


def where(method: dict[str, Any]) -> str:
    shape = method["clip_shape"]
    shape = f" of {shape[1]} x {shape[2]} x {shape[3]}" if shape else ""
    fps = f", {method['fps']:g} fps" if method.get("fps") else ""
    return f"{method['data']}: {method['num_clips']} clips of {method['num_videos']} videos{shape}{fps}"


def details(results: Results) -> str:
    """Every figure with its 95 % interval over videos (none of one video), of pixels and of the decoder's floats."""
    keys = {"psnr": ("PSNR a clip, dB", 2), "psnr_frame": ("PSNR a frame, dB", 2), "ssim": ("SSIM", 4)}
    keys[f"lpips_{results['lpips']}"] = (f"LPIPS ({results['lpips']})", 4)
    rows = []
    for name, method in results["methods"].items():
        for row, precisions in method["figures"].items():
            for precision, of in precisions.items():
                cells = [interval(of[key], digits) for key, (_, digits) in keys.items()]
                rows.append([name, ROWS[row], precision, *cells])
    return markdown_table(["", "", "values", *(label for label, _ in keys.values())], rows)


def interval(figure: dict[str, float | None], digits: int) -> str:
    mean, *ends = (figure[key] for key in ("mean", "low", "high"))
    said = " ({:.{d}f} to {:.{d}f})".format(*ends, d=digits) if None not in ends else ""
    return f"{mean:.{digits}f}{said}"


def plot(results: Results, path: Path) -> None:
    lpips = f"lpips_{results['lpips']}"
    groups: dict[str, dict[str, list[float]]] = {}
    for title, key in (("PSNR, dB", "psnr"), ("SSIM", "ssim"), (f"LPIPS ({results['lpips']})", lpips)):
        bars = groups[f"ours: {title}"] = {}
        for name, method in results["methods"].items():
            for row, precisions in method["figures"].items():
                bars[f"{name}: {ROWS[row]}"] = [precisions["uint8"][key]["mean"]]
    dot_chart(path, groups, one_unit=False)


BENCHMARK = Benchmark(
    name="reconstruction",
    title="Table 1: reconstruction",
    needs="MCL-JCV, a VAE trained for it and a GPU",
    run=run,
    tables=tables,
    plot=plot,
    add_options=add_options,
)

if __name__ == "__main__":
    BENCHMARK.main()
