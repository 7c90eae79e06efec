"""The part of `speed.py` about peers: Diffusers' video autoencoders on a clip of the same size, in the same run.

Each has its published configuration, which is its class's default in Diffusers, and random weights: speed and memory
do not depend on their values. Each runs in a process of its own for its peak memory, in bf16, without tiling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import diffusers
import torch

from autoencoder import AutoencoderKLVidTwin
from pipelines import VidTwinTransformer3DModel

from ..resources import Patches
from .timing import Row, device_of, fast_dtype, in_own_process, once, peak_gib, seconds

OURS, FOLDED = "VidTwin", "VidTwin, 65 tokens"


@dataclass(frozen=True)
class Peer:
    """A video autoencoder of Diffusers and what a transformer makes of its latent.

    Args:
        model: class.
        weights: whose configuration the class's defaults are.
        frames: those it takes, nearest to 16.
        patch: of the transformer published with it, or of its likes, over (frame, row, column).
    """

    model: str
    weights: str
    frames: int
    patch: tuple[int, int, int]


PEERS = {
    "LTX": Peer("AutoencoderKLLTXVideo", "Lightricks/LTX-Video 0.9.0", 17, (1, 1, 1)),
    "Wan": Peer("AutoencoderKLWan", "Wan-AI/Wan2.1", 17, (1, 2, 2)),
    "CogVideoX": Peer("AutoencoderKLCogVideoX", "THUDM/CogVideoX-2b", 17, (1, 2, 2)),
    "HunyuanVideo": Peer("AutoencoderKLHunyuanVideo", "hunyuanvideo-community/HunyuanVideo", 17, (1, 2, 2)),
    "Cosmos": Peer("AutoencoderKLCosmos", "nvidia/Cosmos-1.0-Tokenizer-CV8x8x8", 17, (1, 2, 2)),
    "VidTok": Peer("AutoencoderVidTok", "microsoft/VidTok kl_causal_488_4chn", 17, (1, 2, 2)),
}
COMPARED = {"smoke": [], "cpu": list(PEERS), "paper": list(PEERS)}
SIDE = {"smoke": 32, "cpu": 224, "paper": 224}
OUR_VAE = {"smoke": "tiny-test", "cpu": "base", "paper": "base"}
DIT = {"smoke": "tiny-test", "cpu": "paper", "paper": "paper"}
CLASSES = 101


def peers(scale: str) -> list[Row]:
    """Encode + decode of 16 or 17 frames, peak memory, latent, tokens, and a denoising step on them."""
    rows = [in_own_process(_ours, scale, name) for name in (OURS, FOLDED)]
    for name in COMPARED[scale]:
        try:
            rows.append(in_own_process(_peer, scale, name))
        except (MemoryError, RuntimeError) as error:
            rows.append({"autoencoder": name, "failed": str(error).splitlines()[0]})
        print(rows[-1], flush=True)  # minutes each
    for row in rows:
        for figure in ("round trip, s", "latent values", "DiT step, s"):
            if figure in row:
                row[f"{figure.split(',')[0]} / ours"] = row[figure] / rows[0][figure]
    return rows


def _ours(scale: str, name: str) -> Row:
    device = device_of(scale)
    vae = AutoencoderKLVidTwin.from_preset(OUR_VAE[scale]).to(device, fast_dtype(scale)).eval()
    figures = _round_trip(vae, vae.config.num_frames, scale)
    figures["latent"] = grids = vae.structure_shape, vae.dynamics_shape
    if name == FOLDED:  # all queries of a place, all positions of a frame
        patches = (grids[0][1], 1, 1), (1, grids[1][2])
    else:
        patches = (1, 1, 1), (1, 1)
    dit = VidTwinTransformer3DModel.from_preset(
        DIT[scale], vae, structure_patch_size=patches[0], dynamics_patch_size=patches[1], num_classes=CLASSES
    )
    return {"autoencoder": name, **figures, "latent values": vae.latent_size, **_step(dit, scale)}


def _peer(scale: str, name: str) -> Row:
    peer = PEERS[name]
    torch.manual_seed(0)
    vae = getattr(diffusers, peer.model)().to(device_of(scale), fast_dtype(scale)).eval()
    figures = _round_trip(vae, peer.frames, scale)
    shape = figures["latent"]
    grid = [math.ceil(size / patch) for size, patch in zip(shape[1:], peer.patch, strict=True)]
    structure = Patches(shape[0], tuple(grid), peer.patch)
    nothing = Patches(1, (0, 1), (1, 1))
    dit = VidTwinTransformer3DModel.from_preset(
        DIT[scale],
        structure_shape=structure.shape,
        dynamics_shape=nothing.shape,
        structure_patch_size=structure.patch_size,
        dynamics_patch_size=nothing.patch_size,
        num_classes=CLASSES,
    )
    return {"autoencoder": name, **figures, "latent values": math.prod(shape), **_step(dit, scale)}


def _round_trip(vae: torch.nn.Module, frames: int, scale: str) -> Row:
    """Times of encoding and decoding a clip, after a warm-up on the same; peak memory; shape of the latent."""
    device = device_of(scale)
    clip = (torch.rand(1, 3, frames, SIDE[scale], SIDE[scale], device=device) * 2 - 1).to(fast_dtype(scale))
    with torch.no_grad():
        z = vae.encode(clip).latent_dist.mode()  # the warm-up: minutes for some
        encode = once(lambda: vae.encode(clip), device)
        decode = seconds(lambda: vae.decode(z), device, repeats=1)
    figures = {"frames": frames, "encode, s": encode, "decode, s": decode, "round trip, s": encode + decode}
    return figures | {"peak, GiB": peak_gib(device), "latent": tuple(z.shape[1:])}


def _step(dit: VidTwinTransformer3DModel, scale: str) -> Row:
    """Tokens, and seconds of a denoising step of one clip with guidance."""
    device = device_of(scale)
    dit = dit.to(device, fast_dtype(scale)).eval()
    latents = torch.randn(2, dit.latent_size, device=device, dtype=fast_dtype(scale))
    timestep, labels = torch.full((2,), 500.0, device=device), torch.tensor([0, CLASSES], device=device)
    with torch.no_grad():
        step = seconds(lambda: dit(latents, timestep, labels), device, repeats=3)
    return {"tokens": sum(dit.num_tokens), "DiT step, s": step}
