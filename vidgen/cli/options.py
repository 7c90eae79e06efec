"""Options that several commands share."""

from __future__ import annotations

import argparse

DTYPES = ("float32", "bfloat16", "float16")
COMPONENTS = ("both", "structure", "dynamics")
VIDEO_IN = "any video that FFmpeg reads"
VIDEO_OUT = "the video to write: .mp4 (H.264), .gif, or a folder of PNG frames (a name without a suffix)"
MODEL = "a VAE or pipeline: a folder, or user/name on the Hub"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Appends the default to the help of an option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def add_command(
    commands: argparse._SubParsersAction, name: str, summary: str, details: str = ""
) -> argparse.ArgumentParser:
    """Add a command; `vidgen --help` shows the summary, `vidgen COMMAND --help` both summary and details."""
    description = f"{summary[0].upper()}{summary[1:]}. {details}"
    return commands.add_parser(name, help=summary, description=description, formatter_class=HelpFormatter)


def add_model_options(parser: argparse.ArgumentParser, model_help: str = MODEL, required: bool = True) -> None:
    """Add --model, --device and --dtype."""
    parser.add_argument("--model", required=required, help=model_help)
    parser.add_argument("--device", help="cuda, cuda:1, mps, cpu ... (default: the accelerator if there is one)")
    dtype_help = "dtype of the computation; auto: bfloat16 where the device is clearly faster in it, else float32"
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help=dtype_help)


def add_video_options(parser: argparse.ArgumentParser) -> None:
    """Add the fields of `vidgen.inference.operations.VideoOptions`."""
    add_model_options(parser)
    parser.add_argument("--fps", type=float, help="read the video at this frame rate (default: the video's)")
    parser.add_argument("--size", type=int, help="resize the short side to this many pixels (default: the video's)")
    parser.add_argument("--tile-overlap", type=int, metavar="PIXELS", help="(default: a quarter of the model's frame)")
    parser.add_argument("--window-overlap", type=int, metavar="FRAMES", help="(default: a quarter of its frames)")


def add_components_option(parser: argparse.ArgumentParser) -> None:
    """Add --components."""
    parser.add_argument("--components", choices=COMPONENTS, default="both", help="latents to decode")
