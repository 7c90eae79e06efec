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
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to bind; 0.0.0.0 admits other machines (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, default=7860, help="port to bind (default: %(default)s)")
    parser.add_argument("--share", action="store_true", help="also serve at a public address of Gradio's")
    parser.add_argument(
        "--max-upload-mb", type=float, default=50, metavar="MB", help="maximum file size (default: %(default)s)"
    )
    parser.add_argument(
        "--max-seconds", type=float, default=60, metavar="SECONDS", help="maximum video length (default: %(default)s)"
    )
    parser.add_argument(
        "--max-size",
        type=int,
        default=256,
        metavar="PIXELS",
        help="videos with a longer short side are downscaled to it (default: %(default)s)",
    )
    parser.set_defaults(run=_run)


def _run(
    model: str | None,
    device: str | None,
    dtype: str,
    host: str,
    port: int,
    share: bool,
    max_upload_mb: float,
    max_seconds: float,
    max_size: int,
) -> None:
    from ..common.errors import UserError
    from ..common.loading import SHIPPED_MODEL, is_pipeline, load_pipeline, load_vae
    from ..common.precision import place_model
    from ..inference.operations import resolve_device

    if not max_upload_mb > 0 or not max_seconds > 0 or max_size < 2:
        raise UserError("--max-upload-mb and --max-seconds must be positive, and --max-size at least 2.")
    if model is None:
        if not SHIPPED_MODEL.is_dir():
            raise UserError(f"This installation has no bundled model ({SHIPPED_MODEL}); name one with --model.")
        model = str(SHIPPED_MODEL)
    try:
        from ..app.page import serve
        from ..app.uploads import UploadLimits
    except ImportError as error:
        if (error.name or "").split(".")[0] != "gradio":
            raise
        raise UserError("The page needs Gradio: pip install -e '.[web]'.") from error
    load = load_pipeline if is_pipeline(model) else load_vae
    loaded = place_model(load(model), resolve_device(device), dtype)
    limits = UploadLimits(megabytes=max_upload_mb, seconds=max_seconds, short_side=max_size)
    name = "/".join(Path(model).parts[-2:])
    with serve(loaded, name, limits, host=host, port=port, share=share) as address:
        print(f"Serving at {address}; Ctrl-C ends it.", flush=True)
        threading.Event().wait()
