"""`vidgen app`: a Gradio demo on localhost."""

from __future__ import annotations

import argparse
import threading
from pathlib import Path

from .options import MODEL, add_command, add_model_options


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Declare the command and its options."""
    parser = add_command(
        commands,
        "app",
        "Gradio demo on localhost",
        "Reconstructs videos and swaps their latents; with a pipeline it also generates and animates. The server runs "
        "until Ctrl-C and deletes its folder of uploads and results when it ends. Needs pip install -e '.[web]'.",
    )
    add_model_options(parser, f"{MODEL} (default: pretrained/sprites of the repository)", required=False)
    parser.add_argument("--host", default="127.0.0.1", help="address to bind; 0.0.0.0 admits other machines")
    parser.add_argument("--port", type=int, default=7860, help="port to bind")
    parser.add_argument("--share", action="store_true", help="also serve at a public address of Gradio's")
    parser.add_argument("--max-upload-mb", type=float, default=50, metavar="MB", help="maximum size of a file")
    parser.add_argument("--max-seconds", type=float, default=60, metavar="SECONDS", help="maximum length of a video")
    parser.add_argument(
        "--max-size", type=int, default=256, metavar="PIXELS", help="short side to which larger videos are downscaled"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Serve the page until interrupted; without --model, that of the bundled model."""
    from ..common.errors import UserError
    from ..common.loading import SPRITES_MODEL, is_pipeline, load_pipeline, load_vae
    from ..common.precision import place_model
    from ..inference.operations import resolve_device

    if not options.max_upload_mb > 0 or not options.max_seconds > 0 or options.max_size < 2:
        raise UserError("--max-upload-mb and --max-seconds must be positive, and --max-size at least 2.")
    name = options.model
    if name is None:
        if not SPRITES_MODEL.is_dir():
            raise UserError(f"This installation has no bundled model ({SPRITES_MODEL}); name one with --model.")
        name = str(SPRITES_MODEL)
    try:
        from ..app.page import serve
        from ..app.uploads import UploadLimits
    except ImportError as error:
        if (error.name or "").split(".")[0] != "gradio":
            raise
        raise UserError("The page needs Gradio: pip install -e '.[web]'.") from error
    load = load_pipeline if is_pipeline(name) else load_vae
    model = place_model(load(name), resolve_device(options.device), options.dtype)
    limits = UploadLimits(options.max_upload_mb, options.max_seconds, short_side=options.max_size)
    title = "/".join(Path(name).parts[-2:])
    with serve(model, title, limits, host=options.host, port=options.port, share=options.share) as address:
        print(f"Serving at {address}; Ctrl-C ends it.", flush=True)
        threading.Event().wait()
