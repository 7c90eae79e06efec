"""Commands that pass videos through the autoencoder: encode, decode, reconstruct, reenact and components."""

from __future__ import annotations

import argparse

from .options import VIDEO_IN, VIDEO_OUT, add_command, add_components_option, add_model_options, add_video_options


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Declare the commands and their options."""
    encode = add_command(
        commands,
        "encode",
        "video -> latents in a .safetensors file",
        "The file holds the latents of every window and tile with the geometry, the frame rate and the hash of the "
        "model; `vidgen decode` needs nothing else.",
    )
    encode.add_argument("video", help=VIDEO_IN)
    encode.add_argument("latents", help="the .safetensors file to write")

    decode = add_command(
        commands,
        "decode",
        "latents of `vidgen encode` -> video",
        "Frame rate, length and size are those of the encoded video.",
    )
    decode.add_argument("latents", help="a .safetensors file of `vidgen encode`")
    decode.add_argument("video", help=VIDEO_OUT)
    add_model_options(decode)
    add_components_option(decode)
    decode.add_argument("--fps", type=float, help="frame rate of the video (default: that of the latents)")
    decode.add_argument("--any-model", action="store_true", help="accept latents of another model of these shapes")

    reconstruct = add_command(
        commands,
        "reconstruct",
        "video -> latents -> video",
        "Encodes and decodes in one pass: reading, the model and writing run concurrently, window by window.",
    )
    add_components_option(reconstruct)

    reenact = add_command(
        commands,
        "reenact",
        "swap latents: the structure of A with the dynamics of B",
        "The result looks like A and moves like B. B is resized and cropped to A's frames and read at A's frame rate; "
        "the result is as long as the shorter video.",
    )
    reenact.add_argument("structure", metavar="A", help="the video whose structure is kept")
    reenact.add_argument("dynamics", metavar="B", help="the video whose dynamics are used")
    reenact.add_argument("output", help=VIDEO_OUT)
    reenact.add_argument(
        "--strength", type=float, default=1.0, help="interpolation from A's dynamics (0) to B's dynamics (1)"
    )

    components = add_command(
        commands, "components", "original | both | structure | dynamics, side by side in one video"
    )
    for parser in (reconstruct, components):
        parser.add_argument("video", help=VIDEO_IN)
        parser.add_argument("output", help=VIDEO_OUT)
    for parser in (encode, reconstruct, reenact, components):
        add_video_options(parser)
    for parser in (encode, decode, reconstruct, reenact, components):
        parser.set_defaults(run=run, operation=parser.prog.split()[-1])


def run(options: argparse.Namespace) -> None:
    """Call the function of the command's name in `vidgen.inference.operations`."""
    from ..inference import operations

    keywords = vars(options)
    getattr(operations, keywords.pop("operation"))(**keywords)
