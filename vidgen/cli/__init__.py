"""The `vidgen` command: what a trained model can do, from a shell.

    vidgen reconstruct clip.mp4 out.mp4 --model runs/vae/final
    vidgen --help

Each module declares the options of its commands and runs them. Heavy imports are inside the functions that run a
command, so that `vidgen --help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import signal
import warnings
from collections.abc import Sequence
from typing import NoReturn

from ..common.errors import UserError, handle_signals, run_program
from ..common.options import check_options
from . import app, autoencoder, convert, data, evaluate, fvd, generate, info, latents, runs

INTERRUPTS = (signal.SIGINT, signal.SIGTERM)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="vidgen",
        description="Encode, decode, recombine and generate videos with VidTwin. A model is a folder, or user/name on "
        "the Hub: a VAE, or a whole pipeline.",
        epilog="vidgen COMMAND --help describes a command and its options.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (autoencoder, generate, convert, data, fvd, evaluate, latents, runs, app, info):
        module.add_commands(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake ends with one sentence and exit code 2."""
    parsed = vars(build_parser().parse_args(arguments))
    run_command = parsed.pop("run")

    def run() -> None:
        options = argparse.Namespace(**check_options(parsed))
        # Import first what every command uses: libraries swallow a KeyboardInterrupt while they are being imported.
        with handle_signals(_end_now, INTERRUPTS):
            import torch
            from diffusers.utils import logging

            from ..inference import operations  # noqa: F401

        # Diffusers warns of float32 modules where there are none, and of wrong weights, which are an error here.
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        format_warning = warnings.formatwarning
        warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # without the line of code
        try:
            # A KeyboardInterrupt unwinds the stack, so no half-written file is left.
            with handle_signals(signal.default_int_handler, INTERRUPTS):
                run_command(options)
        except (ValueError, OSError) as error:
            raise error if isinstance(error, UserError) else UserError(str(error)) from error
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise UserError("Out of memory; a smaller --size, or --dtype bfloat16, takes less.") from error
        except KeyboardInterrupt:
            _end_now()  # a regular exit would abort while a thread runs the model
        finally:
            warnings.formatwarning = format_warning

    run_program(run)


def _end_now(*_: object) -> NoReturn:
    """End the process at once. Also serves as a signal handler, which may not print."""
    os.write(2, b"interrupted\n")
    os._exit(130)
