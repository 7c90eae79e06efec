"""`vidgen generate`: sample new videos from a trained pipeline."""

from __future__ import annotations

import argparse

from .options import VIDEO_OUT, add_command, add_model_options


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Declare the command and its options."""
    parser = add_command(
        commands,
        "generate",
        "sample new videos from a trained pipeline",
        "With several videos, -CLASS-0, -CLASS-1, ... is inserted before the suffix of OUTPUT; with prompts "
        "-0, -1, ... in their order.",
    )
    parser.add_argument("output", help=VIDEO_OUT)
    add_model_options(parser, "a pipeline: a folder, or user/name on the Hub")
    parser.add_argument(
        "--class",
        dest="class_labels",
        action="append",
        metavar="NAME",
        help="class, or subclass such as orbit/star, by name or number; may be repeated; not for an unconditional "
        "model (default: every class once, with a prompt none)",
    )
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="what the video shows; may be repeated; for a model with text",
    )
    parser.add_argument(
        "--structure-prompt", action="append", metavar="TEXT", help="its content alone, in place of --prompt"
    )
    parser.add_argument(
        "--dynamics-prompt", action="append", metavar="TEXT", help="its motion alone, in place of --prompt"
    )
    parser.add_argument(
        "--negative-prompt", metavar="TEXT", help="what guidance leads away from; without guidance it has no effect"
    )
    parser.add_argument("--num", type=int, default=1, metavar="N", help="videos per class and prompt")
    parser.add_argument(
        "--steps", type=int, metavar="N", help="denoising steps (default: 50, or 4 for a few-step model)"
    )
    guidance = parser.add_mutually_exclusive_group()
    guidance.add_argument(
        "--guidance",
        type=float,
        metavar="W",
        help="guidance scale (default: 5; a few-step model includes guidance and takes no other than 1)",
    )
    guidance.add_argument(
        "--stream-guidance",
        type=float,
        nargs=2,
        metavar=("STRUCTURE", "DYNAMICS"),
        help="a guidance scale for each latent, in place of --guidance",
    )
    parser.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        default=(0.0, 1.0),
        metavar=("LOW", "HIGH"),
        help="noise levels, from 0 (clean) to 1 (pure noise), at which guidance is applied; steps outside cost half",
    )
    parser.add_argument(
        "--structure-delay",
        type=float,
        default=0.0,
        metavar="FRACTION",
        help="fraction of the steps by which content is denoised later than motion, so that it suits the "
        "motion of the prompt (default: 0)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="factor on the noise to start from; below 1 clips are more typical, and an animated image's background "
        "stays (default: 1)",
    )
    parser.add_argument(
        "--candidates",
        type=int,
        default=1,
        metavar="N",
        help="videos sampled for each one that is written: that whose class the pipeline's classifier finds the most "
        "probable (default: 1)",
    )
    parser.add_argument(
        "--guider",
        metavar="NAME",
        help="class of diffusers.guiders, such as AdaptiveProjectedGuidance, in place of --guidance and its interval",
    )
    parser.add_argument(
        "--guider-options",
        nargs="+",
        metavar="KEY=VALUE",
        help="arguments of the guider, such as guidance_scale=3 start=0.2 stop=0.8 (default: those of its class)",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--fps", type=float, default=8.0, help="frames per second")
    parser.add_argument(
        "--frames",
        type=int,
        metavar="N",
        help="frames per video; long ones are generated window by window (default: the model's clip length)",
    )
    parser.add_argument("--image", metavar="FILE", help="animate this PNG, JPEG, WebP or BMP image")
    parser.add_argument("--loop", action="store_true", help="generate a seamless loop")
    parser.add_argument(
        "--history-noise",
        type=float,
        metavar="LEVEL",
        help="long videos: generate windows from the last frames before them, which the model sees at this noise "
        "level, such as 0.1; for a model trained with diffusion.frame_timesteps",
    )
    parser.add_argument(
        "--history-guidance", type=float, default=1.0, metavar="W", help="guidance scale of these frames (default: 1)"
    )
    parser.add_argument(
        "--match-colors",
        action="store_true",
        help="long videos: give every window the mean and the spread of each color channel of the first window",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Generate the videos."""
    from ..inference.operations import generate

    generate(**vars(options))
