"""The speed of models: the autoencoder, its training, the DiT, sampling, `torch.compile`, attention, the Q-Former."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from autoencoder import AutoencoderKLVidTwin
from autoencoder.attention import _matmul_attention
from autoencoder.qformer import QFormer
from pipelines import VidTwinPipeline, VidTwinTransformer3DModel
from pipelines.schedulers import default_scheduler
from vidgen.data.sprites import render_sprite, sample_factors
from vidgen.data.transforms import crop, frames_to_clip
from vidgen.metrics.flops import decode_flops, encode_flops, matmul_rate, transformer_flops
from vidgen.metrics.reconstruction import psnr

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
    wall_seconds,
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
REPEATS = {"smoke": 1, "cpu": 5, "paper": 20}  # of operations that take milliseconds
SEQUENCES = {  # batch, length, heads and head dimension of attentions
    "temporal, 224 px": (196, 16, 12, 64),
    "spatial, 224 px": (16, 196, 12, 64),
    "Q-Former, 224 px": (196, 16, 8, 8),
    "DiT, 1008 tokens": (1, 1008, 16, 72),
    "DiT, 65 tokens": (8, 65, 16, 72),
}


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


def rounding(scale: str, pipeline: Path | None = None) -> list[Row]:
    """bf16 vs. fp32 on the same clip with the same weights, random and those of `--pipeline`."""
    device, rows = device_of(scale), []
    models = {"random weights": AutoencoderKLVidTwin.from_preset(VAE[scale])}
    if pipeline is not None:
        models[str(pipeline)] = AutoencoderKLVidTwin.from_pretrained(pipeline, subfolder="vae")
    for name, model in models.items():
        model = model.to(device).eval()
        _, frames, height, width = model.clip_shape
        factors = sample_factors(np.random.default_rng(0), "orbit", resolution=max(height, width), num_frames=frames)
        sprite = frames_to_clip(torch.from_numpy(render_sprite(factors)))
        video = crop(sprite, (height, width), 0.5, 0.5)[None].to(device)
        with torch.no_grad():
            exact = model(video).sample.clamp(-1, 1)
            rounded = model.to(torch.bfloat16)(video.bfloat16()).sample.float().clamp(-1, 1)
        rows.append({"weights": name, "PSNR of bf16 to fp32, dB": psnr(rounded, exact, quantize=False).item()})
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


def compiled(scale: str) -> list[Row]:
    """`torch.compile` as one graph, relative to eager, in the fast precision; the first call compiles."""
    device, rows, dtype = device_of(scale), [], fast_dtype(scale)
    vae = AutoencoderKLVidTwin.from_preset(VAE[scale]).to(device, dtype).eval()
    clip, latents = torch.rand(1, *vae.clip_shape).to(device, dtype), torch.randn(1, vae.latent_size).to(device, dtype)
    cases = {"encode": (vae.encode, (clip,)), "decode": (vae.decode, (latents,))}
    timestep, labels = torch.full((2,), 500.0, device=device), torch.tensor([0, CLASSES], device=device)
    for folded in (False, True):
        model = _build_dit(scale, folded).to(device, dtype)
        noise = torch.randn(2, model.latent_size).to(device, dtype)
        name = f"DiT step of a clip with guidance, {sum(model.num_tokens)} tokens"
        cases[name] = (model, (noise, timestep, labels))
    for name, (function, inputs) in cases.items():
        torch.compiler.reset()
        graph = torch.compile(function, fullgraph=True, backend="eager" if scale == "smoke" else "inductor")
        runs = {"plain": lambda f=function, x=inputs: f(*x), "compiled": lambda g=graph, x=inputs: g(*x)}
        with torch.no_grad():
            first = wall_seconds(runs["compiled"])
            seconds = alternating(runs, device, repeats=3)
        ratio = seconds["compiled"] / seconds["plain"]
        rows.append({"case": name, "plain, s": seconds["plain"], "compiled / plain": ratio, "first call, s": first})
    return rows


def attention(scale: str) -> list[Row]:
    """The fused kernel relative to two plain matrix products, at the sequence lengths of VidTwin, Q-Former and DiT."""
    device, rows = device_of(scale), []
    for case, (batch, length, heads, dim) in SEQUENCES.items():
        for name, dtype in precisions(scale).items():
            qkv = torch.randn(3, batch, length, heads, dim, device=device, dtype=dtype)
            kernels = {"fused": _fused_attention, "plain": lambda q, k, v: _matmul_attention(q, k, v, False, 0.0)}
            rows.append({"case": case, "length": length, "precision": name, **_compare(kernels, qkv, scale)})
    return rows


def _fused_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)


def qformer(scale: str) -> list[Row]:
    """The Q-Former of transformers relative to ours, at the paper's size: 196 places of 16 frames."""
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    device, rows = device_of(scale), []
    sizes = dict(hidden_size=64, num_hidden_layers=6, num_attention_heads=8, intermediate_size=768)
    dropout = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config = Blip2QFormerConfig(**sizes, encoder_hidden_size=768, **dropout)
    for name, dtype in precisions(scale).items():
        ours = QFormer(16, 64, 768, num_layers=6, num_heads=8, ffn_dim=768, dropout=0.0).to(device, dtype)
        reference = Blip2QFormerModel(config).to(device, dtype)
        queries = ours.queries.detach().expand(196, -1, -1)
        models = {
            "transformers": lambda x, m=reference, q=queries: m(query_embeds=q, encoder_hidden_states=x)[0],
            "vidgen": ours,
        }
        context = torch.randn(1, 196, 16, 768, device=device, dtype=dtype)
        rows.append({"precision": name, **_compare(models, context, scale)})
    return rows


def _compare(functions: dict[str, Callable], inputs: torch.Tensor, scale: str) -> Row:
    """Time of the first of two functions of some inputs relative to the second, without and with the backward pass."""
    row: Row = {}
    for backward in (False, True):
        leaves = [x.clone().requires_grad_(backward) for x in inputs]

        def run(function: Callable, leaves=leaves, backward=backward) -> None:
            with torch.set_grad_enabled(backward):
                output = function(*leaves)
            if backward:
                output.sum().backward()

        runs = {name: partial(run, function) for name, function in functions.items()}
        first, second = alternating(runs, device_of(scale), REPEATS[scale]).values()
        row[f"{'forward + backward' if backward else 'forward'}, {' / '.join(functions)}"] = first / second
    return row
