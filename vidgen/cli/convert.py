"""`vidgen convert`: an official checkpoint as a Diffusers folder."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from .options import DTYPES, add_command

SAVED_MODEL = re.compile(r"config\.json|README\.md|diffusion_pytorch_model.*\.(safetensors|json)")


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Declare the command and its options."""
    parser = add_command(
        commands,
        "convert",
        "official checkpoint -> Diffusers folder",
        "Reads .ckpt and .safetensors without running any code in them. Model sizes are inferred from tensor shapes; "
        "the options below set the rest.",
    )
    parser.add_argument("checkpoint", help="an official VidTwin checkpoint, .ckpt or .safetensors")
    parser.add_argument("folder", help="the folder to write")
    parser.add_argument("--attention-heads", type=int, metavar="N", help="(default: hidden size / 64)")
    parser.add_argument("--qformer-heads", type=int, metavar="N", help="attention heads of the Q-Former (default: 8)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the written weights")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Convert the checkpoint."""
    import torch

    from autoencoder import AutoencoderKLVidTwin

    from ..common.errors import UserError
    from ..common.io import atomic_dir, refuse_to_replace

    if not Path(options.checkpoint).is_file():
        raise UserError(f"{options.checkpoint}: no such file; convert reads an official .ckpt or .safetensors file.")
    refuse_to_replace(Path(options.folder), SAVED_MODEL)
    overrides = {"num_attention_heads": options.attention_heads, "qformer_heads": options.qformer_heads}
    overrides = {name: value for name, value in overrides.items() if value is not None}
    dtype = getattr(torch, options.dtype)
    vae = AutoencoderKLVidTwin.from_single_file(options.checkpoint, dtype=dtype, **overrides)
    with atomic_dir(options.folder) as unfinished:
        vae.save_pretrained(unfinished)
    print(f"{options.folder}: {vae.num_parameters():,} parameters, compression rate {vae.compression_rate:.3%}")
