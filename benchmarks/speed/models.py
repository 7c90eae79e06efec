"""The speed of models: the autoencoder, its training, the DiT, and sampling."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from autoencoder import AutoencoderKLVidTwin
from pipelines import VidTwinPipeline, VidTwinTransformer3DModel
from pipelines.schedulers import default_scheduler
from vidgen.metrics.flops import decode_flops, encode_flops, matmul_rate, transformer_flops

from .timing import (
    DTYPES,
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

VAE = {"smoke": "tiny-test", "cpu": "released", "paper": "released"}
TRAINED = {  # preset, precision, gradient checkpointing
    "smoke": [("tiny-test", "fp32", False), ("tiny-test", "bf16", True)],
    "cpu": [
        *(("tiny", "fp32", False), ("tiny", "bf16", False)),
        *(("base", "fp32", False), ("base", "bf16", False), ("base", "bf16", True)),
    ],
    "paper": [("base", "fp32", False), ("base", "bf16", False), ("base", "bf16", True), ("large", "bf16", True)],
}
DIT = {"smoke": "tiny-test", "cpu": "paper", "paper": "paper"}
DIT_CASES = {  # precision, clips, and whether all queries of a place and all positions of a frame form one token
    "smoke": [("fp32", 1, False), ("bf16", 1, False), ("bf16", 1, True)],
    "cpu": [("fp32", 1, False), ("bf16", 1, False), ("bf16", 8, False), ("bf16", 1, True)],
    "paper": [("fp32", 1, False), ("bf16", 1, False), ("bf16", 8, False), ("bf16", 64, False), ("bf16", 1, True)],
}
SAMPLER = {"smoke": ("tiny-test", 3), "cpu": ("B", 50), "paper": ("paper", 50)}  # DiT, steps
CLASSES = 101
FRACTION = "fraction of matmul rate"


def round_trip(scale: str) -> list[Row]:
    """Encode and decode at batch size 1 under `no_grad`, relative to the measured matmul rate."""
    device, rows = device_of(scale), []
    torch.manual_seed(0)
    model = AutoencoderKLVidTwin.from_preset(VAE[scale]).to(device).eval()
    video = torch.rand(1, *model.clip_shape, device=device) * 2 - 1
    flops = encode_flops(model) + decode_flops(model)
    for name, dtype in precisions(scale).items():
        model, clip = model.to(dtype), video.to(dtype)
        with torch.no_grad():
            z = model.encode(clip).latent_dist.mode()
            parts = {"encode, s": lambda m=model, x=clip: m.encode(x), "decode, s": lambda m=model, z=z: m.decode(z)}
            seconds = alternating(parts, device, repeats=3)
        total = sum(seconds.values())
        row = {"precision": name, **seconds, "round trip, s": total, "TFLOP": flops / 1e12}
        row[FRACTION] = flops / total / matmul_rate(device, dtype)
        row["time relative to fp32"] = total / rows[0]["round trip, s"] if rows else 1.0
        rows.append(row)
    return rows


def train_step(scale: str) -> list[Row]:
    """Forward and backward at batch size 1, and AdamW; a new process for each case, for its peak memory."""
    rows: list[Row] = []
    for case in (case for case in TRAINED[scale] if case[1] in precisions(scale)):
        row = in_own_process(_train_step, scale, *case)
        first = next((r for r in rows if r["size"] == case[0]), row)
        row["time relative to fp32"] = row["forward + backward, s"] / first["forward + backward, s"]
        row["peak relative to fp32"] = row["peak, GiB"] / first["peak, GiB"]
        rows.append(row)
    return rows


def _train_step(scale: str, size: str, precision: str, checkpointing: bool) -> Row:
    device = device_of(scale)
    model = AutoencoderKLVidTwin.from_preset(size).to(device).train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    clip = torch.rand(1, *model.clip_shape, device=device) * 2 - 1

    def forward_backward() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32"):
            posterior = model.encode(clip).latent_dist
            out = model.decode(posterior.sample()).sample
        loss = F.l1_loss(out.float(), clip) + 1e-3 * posterior.kl().float().mean() / clip.numel()
        loss.backward()

    seconds = median_seconds(forward_backward, device, repeats=2 if size in ("base", "large") else 5)
    peak = peak_gib(device)  # before the optimizer has states
    rate = matmul_rate(device, DTYPES[precision])
    update = median_seconds(optimizer.step, device, repeats=3)
    forward_backward()  # with the optimizer's states
    return {
        "size": size,
        "precision": precision,
        "checkpointing": checkpointing,
        "parameters": model.num_parameters(),
        "forward + backward, s": seconds,
        "AdamW, s": update,
        FRACTION: 3 * (encode_flops(model) + decode_flops(model)) / seconds / rate,
        "peak, GiB": peak,
        "with AdamW, GiB": peak_gib(device),
    }


def dit_step(scale: str) -> list[Row]:
    """A guided denoising step of the paper's DiT under `no_grad`, relative to the measured matmul rate."""
    device, rows = device_of(scale), []
    for name, clips, folded in DIT_CASES[scale]:
        if name not in precisions(scale):
            continue
        model, batch = _build_dit(scale, folded).to(device, DTYPES[name]), 2 * clips
        latents = torch.randn(batch, model.latent_size, device=device, dtype=DTYPES[name])
        timestep = torch.full((batch,), 500.0, device=device)
        labels = torch.arange(batch, device=device) % CLASSES
        with torch.no_grad():
            step = partial(model, latents, timestep, labels)
            runs = {"step": step, "precomputed": partial(step, modulations=model.modulations(timestep, labels))}
            seconds = alternating(runs, device, repeats=2 if sum(model.num_tokens) * clips > 1000 else 10)
        flops = batch * transformer_flops(model)
        rows.append(
            {
                "precision": name,
                "clips": clips,
                "tokens of a clip": sum(model.num_tokens),
                "step, s": seconds["step"],
                "TFLOP": flops / 1e12,
                FRACTION: flops / seconds["step"] / matmul_rate(device, DTYPES[name]),
                "time relative to fp32": seconds["step"] / clips / rows[0]["step, s"] if rows else 1.0,
                "precomputed modulations, relative time": seconds["precomputed"] / seconds["step"],
            }
        )
    return rows


def _build_dit(scale: str, folded: bool) -> VidTwinTransformer3DModel:
    """The scale's DiT on the paper's latents, with 1008 tokens, or 65 if folded."""
    patches = {"structure_patch_size": (16, 1, 1), "dynamics_patch_size": (1, 14)} if folded else {}
    return VidTwinTransformer3DModel.from_preset(DIT[scale], num_classes=CLASSES, **patches).eval()


def sampling(scale: str) -> list[Row]:
    """Guided DDIM sampling and decoding by the pipeline, relative to the sum of its steps, in the fast precision."""
    device, dtype = device_of(scale), fast_dtype(scale)
    preset, steps = SAMPLER[scale]
    vae = AutoencoderKLVidTwin.from_preset(VAE[scale]).to(device, dtype).eval()
    transformer = VidTwinTransformer3DModel.from_preset(preset, vae, num_classes=CLASSES)
    transformer = transformer.to(device, dtype).eval()
    pipeline = VidTwinPipeline(vae, transformer, default_scheduler())
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.randn(2, transformer.latent_size, device=device, dtype=dtype)
    timestep, labels = torch.full((2,), 500.0, device=device), torch.tensor([0, CLASSES], device=device)
    with torch.no_grad():
        parts = {
            "step, s": lambda: transformer(latents, timestep, labels),
            "decode, s": lambda: vae.decode(latents[:1]),
        }
        seconds = alternating(parts, device, repeats=5)
    pipeline(0, num_inference_steps=1)
    total = time_once(lambda: pipeline(0, num_inference_steps=steps, output_type="np"), device)
    ratio = total / (steps * seconds["step, s"] + seconds["decode, s"])
    return [{"DiT": preset, "steps": steps, **seconds, "pipeline, s": total, "pipeline / sum of parts": ratio}]
