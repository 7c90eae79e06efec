"""The video autoencoders of Diffusers on a clip of the same size, in the same run.

Each has its published configuration, which is its class's default in Diffusers, and random weights, which do not
affect speed and memory. In `peers` each runs in a separate process for its peak memory, in bf16, without tiling.
"""

from __future__ import annotations

import math
from functools import partial

import diffusers
import torch

from autoencoder import AutoencoderKLVidTwin
from pipelines import VidTwinTransformer3DModel

from ..latents.methods import ltx
from .timing import (
    Row,
    alternating,
    device_of,
    fast_dtype,
    in_own_process,
    median_seconds,
    peak_gib,
    precisions,
    time_once,
)

OURS, FOLDED, FAST = "VidTwin", "VidTwin, 65 tokens", "VidTwin fast"
COMPARED_FIGURES = ("round trip, s", "latent values", "DiT step, s")


FRAMES = 17  # the number closest to 16 that all peers support
# Class, and the patch over (frame, row, column) of the diffusion transformer published with it, or of similar ones.
# The classes' defaults are those of Lightricks/LTX-Video 0.9.0, Wan-AI/Wan2.1, THUDM/CogVideoX-2b,
# hunyuanvideo-community/HunyuanVideo, nvidia/Cosmos-1.0-Tokenizer-CV8x8x8 and microsoft/VidTok kl_causal_488_4chn.
PEERS = {
    "LTX": ("AutoencoderKLLTXVideo", (1, 1, 1)),
    "Wan": ("AutoencoderKLWan", (1, 2, 2)),
    "CogVideoX": ("AutoencoderKLCogVideoX", (1, 2, 2)),
    "HunyuanVideo": ("AutoencoderKLHunyuanVideo", (1, 2, 2)),
    "Cosmos": ("AutoencoderKLCosmos", (1, 2, 2)),
    "VidTok": ("AutoencoderVidTok", (1, 2, 2)),
}
COMPARED = {"smoke": [], "cpu": list(PEERS), "paper": list(PEERS)}
SIDE = {"smoke": 32, "cpu": 224, "paper": 224}
OUR_VAE = {"smoke": "tiny-test", "cpu": "base", "paper": "base"}
FAST_VAE = {"smoke": "tiny-test", "cpu": "fast", "paper": "fast"}
LTX = {"smoke": ltx([8, 8, 8], patch_size=2), "cpu": {}, "paper": {}}  # of `fast`
DIT = {"smoke": "tiny-test", "cpu": "paper", "paper": "paper"}
CLASSES = 101


def fast(scale: str) -> list[Row]:
    """Encode + decode by the preset `fast` and by LTX, in turns, in each precision that the device is not slow in."""
    device, rows = device_of(scale), []
    for precision, dtype in precisions(scale).items():
        torch.manual_seed(0)
        runs = {}
        for name, vae, frames in (
            (FAST, AutoencoderKLVidTwin.from_preset(FAST_VAE[scale]), None),
            ("LTX", diffusers.AutoencoderKLLTXVideo(**LTX[scale]), FRAMES),
        ):
            vae = vae.to(device, dtype).eval()
            clip = torch.rand(1, 3, frames or vae.clip_shape[1], SIDE[scale], SIDE[scale], device=device) * 2 - 1
            runs[name] = partial(_round_trip, vae, clip.to(dtype))
        seconds = alternating(runs, device, repeats=3)
        row: Row = {"precision": precision} | {f"{name}, s": seconds[name] for name in runs}
        rows.append(row | {f"{FAST} / LTX": seconds[FAST] / seconds["LTX"]})
    return rows


@torch.no_grad()
def _round_trip(vae: torch.nn.Module, clip: torch.Tensor) -> torch.Tensor:
    return vae.decode(vae.encode(clip).latent_dist.mode()).sample


def peers(scale: str) -> list[Row]:
    """Encode + decode of 16 or 17 frames, peak memory, latent, tokens, and a denoising step on them."""
    rows = [in_own_process(_measure_ours, scale, name) for name in (OURS, FOLDED, FAST)]
    for name in COMPARED[scale]:
        try:
            rows.append(in_own_process(_measure_peer, scale, name))
        except (MemoryError, RuntimeError) as error:
            rows.append({"autoencoder": name, "failed": str(error).splitlines()[0]})
        print(rows[-1], flush=True)  # each takes minutes
    for row in rows:
        for figure in COMPARED_FIGURES:
            if figure in row:
                row[f"{figure.split(',')[0]} / {OURS}"] = row[figure] / rows[0][figure]
    return rows


def _measure_ours(scale: str, name: str) -> Row:
    preset = (FAST_VAE if name == FAST else OUR_VAE)[scale]
    vae = AutoencoderKLVidTwin.from_preset(preset).to(device_of(scale), fast_dtype(scale)).eval()
    figures = _measure_round_trip(vae, vae.clip_shape[1], scale)
    figures["latent"] = shapes = vae.structure_shape, vae.dynamics_shape
    patches = {}
    if name == FOLDED:  # all queries of a place, all positions of a frame
        patches = dict(structure_patch_size=(shapes[0][1], 1, 1), dynamics_patch_size=(1, shapes[1][2]))
    dit = VidTwinTransformer3DModel.from_preset(DIT[scale], vae, num_classes=CLASSES, **patches)
    return {"autoencoder": name, **figures, "latent values": vae.latent_size, **_measure_step(dit, scale)}


def _measure_peer(scale: str, name: str) -> Row:
    model, patch_size = PEERS[name]
    torch.manual_seed(0)
    vae = getattr(diffusers, model)().to(device_of(scale), fast_dtype(scale)).eval()
    figures = _measure_round_trip(vae, FRAMES, scale)
    channels, *sizes = figures["latent"]
    padded = [math.ceil(size / patch) * patch for size, patch in zip(sizes, patch_size, strict=True)]
    dit = VidTwinTransformer3DModel.from_preset(
        DIT[scale],
        structure_shape=(channels, *padded),
        dynamics_shape=(1, 0, 1),  # no tokens
        structure_patch_size=patch_size,
        dynamics_patch_size=(1, 1),
        num_classes=CLASSES,
    )
    values = math.prod(figures["latent"])
    return {"autoencoder": name, **figures, "latent values": values, **_measure_step(dit, scale)}


def _measure_round_trip(vae: torch.nn.Module, frames: int, scale: str) -> Row:
    """Times of encoding and decoding a clip after a warm-up; peak memory; shape of the latent."""
    device = device_of(scale)
    clip = (torch.rand(1, 3, frames, SIDE[scale], SIDE[scale], device=device) * 2 - 1).to(fast_dtype(scale))
    with torch.no_grad():
        z = vae.encode(clip).latent_dist.mode()  # the warm-up, which takes minutes for some
        encode = time_once(lambda: vae.encode(clip), device)
        decode = median_seconds(lambda: vae.decode(z), device, repeats=1)
    figures = {"frames": frames, "encode, s": encode, "decode, s": decode, "round trip, s": encode + decode}
    return figures | {"peak, GiB": peak_gib(device), "latent": tuple(z.shape[1:])}


def _measure_step(dit: VidTwinTransformer3DModel, scale: str) -> Row:
    """The number of tokens, and the time of a denoising step of one clip with guidance."""
    device = device_of(scale)
    dit = dit.to(device, fast_dtype(scale)).eval()
    latents = torch.randn(2, dit.latent_size, device=device, dtype=fast_dtype(scale))
    timestep, labels = torch.full((2,), 500.0, device=device), torch.tensor([0, CLASSES], device=device)
    with torch.no_grad():
        step = median_seconds(lambda: dit(latents, timestep, labels), device, repeats=3)
    return {"tokens": sum(dit.num_tokens), "DiT step, s": step}
