"""Table 1: reconstruction quality.

    python -m benchmarks.reconstruction --scale cpu --clips FOLDER
    accelerate launch -m benchmarks.reconstruction --scale paper --vae FOLDER --data MCL-JCV --lpips alex
    python -m benchmarks.reconstruction --data ORIGINALS --reconstructed THEIRS --rate 0.53

Measures any VAE on any videos (`--vae`, `--data`), in clips of the paper's protocol or of the VAE's size; or videos
that another method reconstructed, matched by name. By default it measures the `full` run of `benchmarks.ablations` on
its held-out clips.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from autoencoder.video_autoencoder import VideoAutoencoder
from vidgen.common.errors import UserError
from vidgen.common.images import comparison_grid
from vidgen.common.loading import load_vae
from vidgen.common.precision import place_model
from vidgen.data.dataset import ClipDataset
from vidgen.losses.lpips import BACKBONES
from vidgen.metrics.detector_options import parse_detectors
from vidgen.metrics.detectors import Detector
from vidgen.metrics.evaluation import ProtocolClips, evaluate_pairs, evaluate_reconstruction
from vidgen.metrics.protocols import get_protocol
from vidgen.metrics.reconstruction import downsample_baseline

from .common import paper, vae_runs
from .common.generation import add_detector_options
from .common.harness import Benchmark, Results
from .common.tables import interval_cell, markdown_table

GRID_CLIPS = 4
PAPER_PROTOCOL = "mcl-jcv"  # the only protocol of reconstructions
MCL_JCV_VIDEOS = 30
OUR_CHOICES = (
    "here clips are consecutive from the first frame of a video, sampled at the stated rate (25 fps from 30 fps drops "
    "every sixth frame), with the short side resized with antialiasing and a center crop"
)
DEFAULT_DETECTOR = "pooled_pixels"  # requires no weights and takes clips of any size
DEFAULT_FPS = 8.0  # as in the configs
ROWS = {
    "reconstruction": "reconstruction",
    "mean_color": "baseline: per-clip mean color",
    "downsample": "baseline: rate-matched downsampling",
}

Clips = ClipDataset | ProtocolClips


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vae", nargs="+", default=[], metavar="FOLDER", help="VAEs, measured on --data")
    parser.add_argument("--num-frames", type=int, help="frames of the clips of a VAE without a fixed size")
    parser.add_argument("--resolution", type=int, help="side in pixels of the clips of a VAE without a fixed size")
    parser.add_argument("--data", type=Path, metavar="FOLDER|CSV", help="videos to reconstruct, or the originals")
    parser.add_argument("--protocol", choices=[PAPER_PROTOCOL], help=f"clips (scale paper: {PAPER_PROTOCOL})")
    parser.add_argument("--fps", type=float, help=f"without a protocol: frames per second (default: {DEFAULT_FPS:g})")
    parser.add_argument("--clips-per-video", type=int, help="without a protocol (default: 1)")
    parser.add_argument("--batch-size", type=int, default=8, help="on each process (default: 8)")
    parser.add_argument("--reconstructed", type=Path, metavar="FOLDER|CSV", help="another method's videos of --data")
    parser.add_argument("--rate", type=float, metavar="PERCENT", help="latent values of the other method, of a clip's")
    parser.add_argument("--lpips", choices=BACKBONES, default="squeeze", help="LPIPS backbone (default: squeeze)")
    vae_runs.add_lpips_options(parser)
    add_detector_options(parser, default=f"{DEFAULT_DETECTOR}; none with a protocol")
    parser.add_argument("--clips", type=Path, metavar="FOLDER", help="scale cpu: real videos, as for the ablations")
    parser.set_defaults(only=None)  # an option of `vae_runs`


def run(options: argparse.Namespace) -> Results:
    protocol = options.protocol or (PAPER_PROTOCOL if options.scale == "paper" and options.vae else None)
    check_combination(options, protocol)
    device = PartialState().device
    lpips = vae_runs.load_lpips(options, options.lpips)
    networks = {"networks": [lpips], "detectors": [d.to(device) for d in detectors_of(options, protocol)]}
    methods: dict[str, Any] = {}
    seconds = 0.0

    if options.reconstructed:
        rate = options.rate / 100 if options.rate else None
        figures = evaluate_pairs(options.data, options.reconstructed, compression_rate=rate, device=device, **networks)
        methods[options.reconstructed.stem] = {"data": str(options.data), **figures, "compression_rate": rate}
    for folder in options.vae:
        vae = load_vae(folder, options.num_frames, options.resolution, options.resolution)
        if protocol:
            size = get_protocol(protocol)
            vae.fit_clip_size(size.frames, size.size, size.size)
        place_model(vae, device, options.dtype)
        name = short_name(folder, methods)
        methods[name] = measure(name, vae, clips_of(options, protocol, vae), str(options.data), networks, options)
    if not methods:
        for data in vae_runs.data_sets(options):
            folder, training_seconds = vae_runs.train_full(data, 0, options)
            vae = place_model(load_vae(str(folder / "final")), device, options.dtype)
            clips = vae_runs.held_out_clips(vae, vae_runs.config_of(folder))
            methods[folder.name] = measure(folder.name, vae, clips, data, networks, options)
            seconds += training_seconds
    return {"protocol": protocol, "lpips": options.lpips, "methods": methods, "training_seconds": seconds}


def check_combination(options: argparse.Namespace, protocol: str | None) -> None:
    """Raise `UserError` for options that exclude each other."""
    if protocol and (options.fps or options.clips_per_video or options.reconstructed):
        raise UserError(
            f"{protocol} determines the clips: --fps, --clips-per-video and --reconstructed cannot be used with it."
        )
    if options.data is None and (options.vae or options.reconstructed or options.scale == "paper"):
        raise UserError("give the videos to measure on as --data FOLDER (MCL-JCV for the paper's table).")
    if options.data and not (options.vae or options.reconstructed):
        raise UserError("name what to measure on --data: trained VAEs as --vae FOLDER, or --reconstructed FOLDER.")


def detectors_of(options: argparse.Namespace, protocol: str | None) -> list[Detector]:
    """The options' detectors; by default one without weights, and none with the paper's protocol."""
    names = options.detector or ([] if protocol else [DEFAULT_DETECTOR])
    return parse_detectors(names, get_protocol(protocol or PAPER_PROTOCOL).detector, options.detector_sha256)


def short_name(folder: str, taken: Collection[str]) -> str:
    """A short name for a VAE: its folder's, or that of the run whose `final` it is."""
    path = Path(folder)
    name = path.parent.name if path.name == "final" else path.name
    return folder if name in taken else name


def clips_of(options: argparse.Namespace, protocol: str | None, vae: VideoAutoencoder) -> Clips:
    """The clips of --data, by the protocol or of the VAE's size."""
    if protocol:
        return ProtocolClips(options.data, get_protocol(protocol))
    return ClipDataset(
        options.data,
        vae.clip_shape[1],
        options.fps or DEFAULT_FPS,
        vae.clip_shape[2:],
        train=False,
        clips_per_video=options.clips_per_video or 1,
    )


def measure(
    name: str,
    vae: VideoAutoencoder,
    clips: Clips,
    data: str,
    networks: dict[str, Any],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """The figures of a VAE on clips; a PNG shows a few of them with their reconstructions."""
    figures = evaluate_reconstruction(vae, clips, batch_size=options.batch_size, **networks)
    if PartialState().is_main_process:
        indices = torch.linspace(0, len(clips) - 1, min(GRID_CLIPS, len(clips))).round().long().tolist()
        video = torch.stack([clips[i]["video"] for i in indices]).to(vae.device)
        with torch.no_grad():
            reconstruction = vae(video.to(vae.dtype)).sample.float()
        columns = {
            "original": video,
            "reconstruction": reconstruction,
            "downsampled": downsample_baseline(video, figures["num_values"]),
        }
        comparison_grid(options.results / f"reconstruction-{name.replace('/', '-')}.png", columns)
    fps = clips.protocol.fps if isinstance(clips, ProtocolClips) else clips.fps
    return {"data": data, "fps": fps, "parameters": vae.num_parameters(), **figures}


def tables(results: Results) -> str:
    header = ["method", "data", "rate, %", "PSNR, dB", "LPIPS", "SSIM", "FVD"]
    rows = [[name, "MCL-JCV, from the paper", *map(str, row)] for name, row in paper.RECONSTRUCTION.items()]
    lpips = f"lpips_{results['lpips']}"
    for name, method in results["methods"].items():
        figures = method["figures"]["reconstruction"]["uint8"]
        rate = method["compression_rate"]
        rate = "" if rate is None else f"{100 * rate:.3f}"
        means = [f"{figures[key]['mean']:.{digits}f}" for key, digits in (("psnr", 3), (lpips, 4), ("ssim", 4))]
        rows.append([f"{name} (ours)", describe_data(method), rate, *means, rfvd_cell(method)])
    text = (
        f"{markdown_table(header, rows)}\n\nOurs: PSNR from one mean squared error per clip, and LPIPS of the "
        f"{results['lpips']} backbone, both on 8-bit pixels. The paper does not state its kind of PSNR or LPIPS."
    )
    if results["protocol"]:
        protocol = get_protocol(results["protocol"])
        text += (
            f" {protocol.source} does not state {', '.join(protocol.not_stated)} of {protocol.name}; {OUR_CHOICES}."
        )
        for name, method in results["methods"].items():
            if method["num_videos"] != MCL_JCV_VIDEOS:
                text += f" It has {MCL_JCV_VIDEOS} videos; {name} was measured on {method['num_videos']}."
    return f"{text}\n\n95 % intervals over videos:\n\n{interval_table(results)}"


def rfvd_cell(method: dict[str, Any]) -> str:
    texts = []
    for name, distance in method["rfvd"].items():
        if distance["value"] is not None:
            few = f", of only {distance['vectors']}" if distance["vectors"] <= distance["detector"]["dim"] else ""
            texts.append(f"{distance['value']:.4g} ({name}{few})")
    return "; ".join(texts)


def describe_data(method: dict[str, Any]) -> str:
    shape = method["clip_shape"]
    shape = f" of {shape[1]} x {shape[2]} x {shape[3]}" if shape else ""
    fps = f", {method['fps']:g} fps" if method.get("fps") else ""
    return f"{method['data']}: {method['num_clips']} clips of {method['num_videos']} videos{shape}{fps}"


def interval_table(results: Results) -> str:
    """Every figure with its interval (none for a single video), of 8-bit pixels and of the decoder's floats."""
    keys = {"psnr": ("PSNR per clip, dB", 2), "psnr_frame": ("PSNR per frame, dB", 2), "ssim": ("SSIM", 4)}
    keys[f"lpips_{results['lpips']}"] = (f"LPIPS ({results['lpips']})", 4)
    rows = []
    for name, method in results["methods"].items():
        for row, precisions in method["figures"].items():
            for precision, figures in precisions.items():
                cells = [interval_cell(figures[key], digits) for key, (_, digits) in keys.items()]
                rows.append([name, ROWS[row], precision, *cells])
    return markdown_table(["VAE", "clips", "pixels", *(label for label, _ in keys.values())], rows)


BENCHMARK = Benchmark("reconstruction", "Table 1: reconstruction", run, tables, add_options=add_options)

if __name__ == "__main__":
    BENCHMARK.main()
