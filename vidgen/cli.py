"""The `vidgen` command: what a trained model can do, from a shell.

    vidgen reconstruct clip.mp4 out.mp4 --model runs/vae/final
    vidgen --help

The words of the command line are here, the work is in `vidgen.inference.operations`.
"""

from __future__ import annotations

import argparse
import os
import signal
import warnings
from collections.abc import Sequence
from typing import NoReturn

from .common.errors import UserError, handle_signals, run_program
from .common.options import check_options

DTYPES = ("float32", "bfloat16", "float16")
INTERRUPTS = (signal.SIGINT, signal.SIGTERM)
COMPONENTS = ("both", "structure", "dynamics")
DATASET = "a folder of class folders or of videos, a CSV with the columns path,label, or shards"
VIDEO_OUT = "the video to write: .mp4 (H.264), .gif, or a folder of PNG frames (a name without an ending)"


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="vidgen",
        description="Encode, decode, recombine and generate videos with VidTwin. A model is a folder, or user/name on "
        "the Hub: a VAE, or a whole pipeline.",
        epilog="vidgen COMMAND --help says more of each.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, summary: str, details: str = "") -> argparse.ArgumentParser:
        return commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}. {details}")

    encode = command(
        "encode",
        "video -> latents in a .safetensors file",
        "The file holds the latents of every window and tile with the geometry, the frame rate and the hash of the "
        "model; `vidgen decode` needs nothing else.",
    )
    encode.add_argument("video", help="any video that FFmpeg reads")
    encode.add_argument("latents", help="the .safetensors file to write")
    _reading_options(encode)

    decode = command("decode", "latents of `vidgen encode` -> video", "Rate, length and size are the encoded video's.")
    decode.add_argument("latents", help="a .safetensors file of `vidgen encode`")
    decode.add_argument("video", help=VIDEO_OUT)
    _model_options(decode)
    _components_option(decode)
    decode.add_argument("--fps", type=float, help="of the video (default: what the latents say)")
    decode.add_argument("--any-model", action="store_true", help="also if another model of these shapes made them")

    reconstruct = command(
        "reconstruct",
        "video -> latents -> video",
        "What encode and decode do, in one go: reading, the model and writing work at once, window by window.",
    )
    reconstruct.add_argument("video", help="any video that FFmpeg reads")
    reconstruct.add_argument("output", help=VIDEO_OUT)
    _reading_options(reconstruct)
    _components_option(reconstruct)

    reenact = command(
        "reenact",
        "what A looks like, moving as B does",
        "Structure of A with dynamics of B. B is resized and cropped to A's frames and read at its rate; the result "
        "is as long as the shorter of the two.",
    )
    reenact.add_argument("structure", metavar="A", help="the video whose structure is kept")
    reenact.add_argument("dynamics", metavar="B", help="the video whose dynamics is taken")
    reenact.add_argument("output", help=VIDEO_OUT)
    reenact.add_argument(
        "--strength",
        type=float,
        default=1.0,
        help="how much of B's dynamics: 0 is A's own, 1 is B's, what lies between is a mixture (default: 1)",
    )
    _reading_options(reenact)

    components = command("components", "original | both | structure | dynamics, side by side in one video")
    components.add_argument("video", help="any video that FFmpeg reads")
    components.add_argument("output", help=VIDEO_OUT)
    _reading_options(components)

    generate = command(
        "generate",
        "new videos from a trained pipeline",
        "Several videos go into OUTPUT's name with -0, -1, ... before the ending.",
    )
    generate.add_argument("output", help=VIDEO_OUT)
    _model_options(generate, what="a pipeline folder or repository")
    generate.add_argument(
        "--class",
        dest="class_labels",
        action="append",
        metavar="NAME",
        help="class, or sub-class such as orbit/star, to generate, by name or number; may be given several times; not "
        "for an unconditional model (default: every class once)",
    )
    generate.add_argument("--num", type=int, default=1, metavar="N", help="videos of each class (default: 1)")
    generate.add_argument("--steps", type=int, default=50, metavar="N", help="denoising steps (default: 50)")
    generate.add_argument("--guidance", type=float, default=5.0, metavar="W", help="guidance scale (default: 5)")
    generate.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        default=(0.0, 1.0),
        metavar=("LOW", "HIGH"),
        help="noise levels at which guidance acts, of 0 (clean) to 1 (pure noise); others cost half (default: 0 1)",
    )
    generate.add_argument("--seed", type=int, default=0, help="the same seed gives the same videos (default: 0)")
    generate.add_argument("--fps", type=float, default=8.0, help="frames a second (default: 8)")
    generate.add_argument(
        "--frames",
        type=int,
        metavar="N",
        help="frames of a video, made window by window where they are more than a clip's (default: a clip's)",
    )
    generate.add_argument("--loop", action="store_true", help="end where it begins, to be shown over and over")

    convert = command(
        "convert",
        "official checkpoint -> Diffusers folder",
        "Reads .ckpt and .safetensors without running anything in them. Shapes tell the sizes; what they cannot tell "
        "is asked for below.",
    )
    convert.add_argument("checkpoint", help="an official VidTwin checkpoint, .ckpt or .safetensors")
    convert.add_argument("folder", help="the folder to write")
    convert.add_argument(
        "--attention-heads", type=int, metavar="N", help="attention heads (default: hidden size / 64)"
    )
    convert.add_argument("--qformer-heads", type=int, metavar="N", help="those of the Q-Former (default: 8)")
    convert.add_argument("--dtype", choices=DTYPES, default="float32", help="of the written weights")

    shards = command(
        "shards",
        "a data set -> WebDataset shards",
        "Tar files of videos as they are, with their classes, and an index; data.root=FOLDER trains from them.",
    )
    shards.add_argument("root", metavar="DATASET", help=DATASET)
    shards.add_argument("folder", metavar="FOLDER", help="the folder to write")
    shards.add_argument(
        "--shard-size-mb", type=float, default=512, metavar="MB", help="size at which a shard is full (default: 512)"
    )
    shards.add_argument(
        "--max-count", type=int, default=10_000, metavar="N", help="videos at which a shard is full (default: 10000)"
    )
    shards.add_argument(
        "--ucf101-split", type=int, choices=(1, 2, 3), help="write FOLDER/train and FOLDER/test of UCF-101's split"
    )
    shards.add_argument("--split-files", metavar="FOLDER", help="UCF-101's lists (default: beside or in DATASET)")

    sprites = command(
        "sprites",
        "a small labeled data set, drawn by formula",
        "Class folders of .mp4 files of 64 x 64 pixels, eight motions, each with its factors beside it as .json. The "
        "same seed gives the same clips, and more clips begin with the fewer.",
    )
    sprites.add_argument("folder", metavar="FOLDER", help="the folder to write; made if missing")
    sprites.add_argument(
        "--clips-per-class", type=int, default=80, metavar="N", help="clips of each motion (default: 80)"
    )
    sprites.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: 0)")

    data = command("data", "look through a data set")
    check = data.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "check",
        help="what is unreadable, too short or odd",
        description="Decode every video of a data set and list what is unreadable, too short or odd, with totals and "
        "histograms. A file that crashes or stalls the decoder is listed, too.",
    )
    check.set_defaults(command="data_check")
    check.add_argument("root", metavar="DATASET", help=DATASET)
    check.add_argument(
        "--output",
        default="data-check",
        metavar="FOLDER",
        help="for list and picture (default: %(default)s)",
    )
    check.add_argument("--num-frames", type=int, default=16, help="of a clip; less is too short (default: 16)")
    check.add_argument("--fps", type=float, default=8.0, help="its frames a second (default: 8)")
    check.add_argument("--jobs", type=int, metavar="N", help="processes (default: one for each core)")
    check.add_argument(
        "--timeout", type=float, default=60.0, metavar="SECONDS", help="the longest a file may take (default: 60)"
    )

    app = command(
        "app",
        "a page on which to try a model in a browser",
        "Reconstruct and reenact videos; with a pipeline also generate and animate. It listens on this machine only, "
        "until Ctrl-C, and keeps uploads and results in a folder that is gone then. Needs pip install -e '.[web]'.",
    )
    _model_options(
        app, what="a VAE or pipeline: folder or user/name (default: pretrained/sprites, where it is)", required=False
    )
    app.add_argument(
        "--host", default="127.0.0.1", help="where to listen; 0.0.0.0: also to others (default: %(default)s)"
    )
    app.add_argument("--port", type=int, default=7860, help="(default: %(default)s)")
    app.add_argument("--share", action="store_true", help="also through a public address of Gradio's")
    app.add_argument(
        "--max-upload-mb", type=float, default=50, metavar="MB", help="of a file taken (default: %(default)s)"
    )
    app.add_argument(
        "--max-seconds", type=float, default=60, metavar="SECONDS", help="of a video taken (default: %(default)s)"
    )
    app.add_argument(
        "--max-size",
        type=int,
        default=256,
        metavar="PIXELS",
        help="videos with a longer short side are scaled down to it (default: %(default)s)",
    )

    info = command("info", "a model's config, parameters, compression rate and FLOPs")
    info.add_argument("model", help="a VAE or pipeline: folder or user/name on the Hub")
    return parser


def _model_options(
    parser: argparse.ArgumentParser, what: str = "a VAE or pipeline: folder or user/name", required: bool = True
) -> None:
    parser.add_argument("--model", required=required, help=what)
    parser.add_argument("--device", help="cuda, cuda:1, mps, cpu ... (default: the accelerator there is, or cpu)")
    parser.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="what the model computes in (default: auto, bfloat16 where the device is clearly faster in it, else "
        "float32)",
    )


def _reading_options(parser: argparse.ArgumentParser) -> None:
    """The fields of `commands.Reading`."""
    _model_options(parser)
    parser.add_argument("--fps", type=float, help="read the video at this rate (default: its own)")
    parser.add_argument("--size", type=int, help="resize its short side to this many pixels (default: its own size)")
    parser.add_argument("--tile-overlap", type=int, metavar="PIXELS", help="(default: a quarter of the model's frame)")
    parser.add_argument("--window-overlap", type=int, metavar="FRAMES", help="(default: a quarter of its frames)")


def _components_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--components", choices=COMPONENTS, default="both", help="what to decode from (default: both)")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a wrong input ends with one sentence and exit code 2."""
    parsed = vars(build_parser().parse_args(arguments))

    def run() -> None:
        options = check_options(parsed)
        # Here, after the words are known to be right: `vidgen --help` answers at once.
        with handle_signals(_end_now, INTERRUPTS):  # libraries swallow a KeyboardInterrupt while they are imported
            import torch
            from diffusers.utils import logging

            from .inference import operations as commands

        # It warns of float32 modules where there are none, and of wrong weights, which are an error here.
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        format_warning = warnings.formatwarning
        warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # without the line of code
        try:
            with handle_signals(signal.default_int_handler, INTERRUPTS):  # it unwinds, leaving nothing half-made
                getattr(commands, options.pop("command"))(**options)
        except (ValueError, OSError) as error:
            raise error if isinstance(error, UserError) else UserError(str(error)) from error
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise UserError("Out of memory; a smaller --size, or --dtype bfloat16, takes less.") from error
        except KeyboardInterrupt:
            _end_now()  # a thread may be in the middle of the model's step, where a regular end would abort
        finally:
            warnings.formatwarning = format_warning

    run_program(run)


def _end_now(*_: object) -> NoReturn:
    """End the process where it is; also a signal handler, which may not print."""
    os.write(2, b"interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    main()
