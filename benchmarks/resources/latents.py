"""The latents of all methods of Figure 5, and their numbers of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch

from autoencoder import AutoencoderKLVidTwin

from ..common import paper
from ..common.tables import markdown_table
from .pseudo_dit import token_grid

REFERENCE, FOLDED, OTHER_READING = "VidTwin", "VidTwin, 65 tokens", "MAGVIT-v2, 5 channels"
RELEASED = "VidTwin, released"
BASELINES = list(paper.LATENTS)
PATCHINGS = {
    "2": "2 in every dimension",
    "2, cropped": "2 in every dimension, no partial patches",
    "(1, 2, 2)": "1 in time, 2 in space",
    "1": "1",
    "own": "each method's own",
}
CROPPED = "2, cropped"
# Patches of each stream. For the transformers of iVideoGPT, MAGVIT-v2, EMU-3 and VidTwin every position is a token.
OWN_PATCHES = {
    "CMD": [(1, 16, 16), (1, 1)],  # an 8-fold image autoencoder, then a transformer with patch size 2
    "CV-VAE": [(1, 2, 2)],  # as usual for diffusion transformers on latents of this shape
    FOLDED: [(16, 1, 1), (1, 14)],  # all queries of a place, all positions of a frame
}


class Stream(NamedTuple):
    """A part of a latent: its channels, and its sizes with time (or queries) first."""

    channels: int
    sizes: tuple[int, ...]


@cache
def latents() -> dict[str, tuple[int, list[Stream]]]:
    """The side of the clip in pixels and the streams of every method; ours from the model's shapes."""
    methods = {name: (side, [Stream(*s) for s in streams]) for name, (side, streams) in paper.LATENTS.items()}
    methods[OTHER_READING] = (224, [Stream(5, (4, 28, 28))])
    for name, preset, setting in ((REFERENCE, "base", 1), (RELEASED, "released", None)):
        with torch.device("meta"):
            vae = AutoencoderKLVidTwin.from_preset(preset, setting)
        shapes = (vae.structure_shape, vae.dynamics_shape)
        methods[name] = (vae.clip_shape[-1], [Stream(shape[0], tuple(shape[1:])) for shape in shapes])
    return {**methods, FOLDED: methods[REFERENCE]}


def rate(side: int, streams: Sequence[Stream]) -> float:
    """Latent values divided by the values of a clip of 16 frames."""
    return count_values(streams) / (3 * 16 * side**2)


def count_values(streams: Sequence[Stream]) -> int:
    return sum(s.channels * math.prod(s.sizes) for s in streams)


def count_tokens(method: str, patching: str) -> list[int]:
    """The tokens of a method's streams. A size of 1 stays 1; partial patches are padded, except in `CROPPED`."""
    own = OWN_PATCHES.get(method) if patching == "own" or method == FOLDED else None
    first, rest = {"2": (2, 2), CROPPED: (2, 2), "(1, 2, 2)": (1, 2)}.get(patching, (1, 1))
    tokens = []
    for i, (_, sizes) in enumerate(latents()[method][1]):
        patch = own[i] if own else (first, *[rest] * (len(sizes) - 1))
        tokens.append(math.prod(token_grid(sizes, patch, crop=patching == CROPPED)))
    return tokens


def latent_table() -> str:
    rows = []
    for method, (side, streams) in latents().items():
        text = " + ".join(f"{s.channels} x {' x '.join(map(str, s.sizes))}" for s in streams)
        paper_rate = paper.RECONSTRUCTION.get(method, (None,))[0]
        rows.append([method, text, side, f"{count_values(streams):,}", f"{100 * rate(side, streams):.3f}", paper_rate])
    header = ["method", "channels x time x space", "clip, px", "values", "rate, %", "paper's rate, %"]
    return (
        f"{markdown_table(header, rows)}\n\n"
        "The tokens of two streams form one sequence. Partial patches are padded with zeros, and a size of 1 stays 1; "
        '"no partial patches" crops instead. The paper does not state which of the first two sizes of MAGVIT-v2\'s '
        f"(5, 4, 28, 28) is time: it is read as 5 frames, and in the row {OTHER_READING!r} as 4. Each method's own "
        "patch size is 1, except for CV-VAE (1, 2, 2) and CMD (16 x 16 pixels of its content frame). The 65 tokens of "
        "VidTwin merge all queries of a place and all positions of a frame, at every patch size."
    )
