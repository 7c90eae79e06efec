"""The parts of `speed.py` about models: the autoencoder, its training, the DiT, sampling, attention."""

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
from vidgen.metrics.flops import decode_flops, encode_flops, matmul_rate, transformer_flops
from vidgen.metrics.reconstruction import psnr

from .timing import (
    DTYPES,
    REPEATS,
    Row,
    alternating,
    device_of,
    fast_dtype,
    in_own_process,
    once,
    peak_gib,
    precisions,
    seconds,
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
DIT_CASES = {  # precision, clips, all queries of a place and all positions of a frame folded into a token
    "smoke": [("fp32", 1, False), ("bf16", 1, False), ("bf16", 1, True)],
    "cpu": [("fp32", 1, False), ("bf16", 1, False), ("bf16", 8, False), ("bf16", 1, True)],
    "paper": [("fp32", 1, False), ("bf16", 1, False), ("bf16", 8, False), ("bf16", 64, False), ("bf16", 1, True)],
}
SAMPLER = {"smoke": ("tiny-test", 3), "cpu": ("B", 50), "paper": ("paper", 50)}  # DiT, steps
CLASSES = 101
SHARE = "share of the matmul rate"


def round_trip(scale: str) -> list[Row]:
    """Encode and decode, batch 1, `no_grad`, against the measured matmul rate."""
    device, rows = device_of(scale), []
    torch.manual_seed(0)
    model = AutoencoderKLVidTwin.from_preset(VAE[scale]).to(device).eval()
    video = torch.rand(1, *model.clip_shape, device=device) * 2 - 1
    flops = encode_flops(model) + decode_flops(model)
    for name, dtype in precisions(scale).items():
        model, clip = model.to(dtype), video.to(dtype)
        with torch.no_grad():
            z = model.encode(clip).latent_dist.mode()
            parts = {"encode": lambda m=model, x=clip: m.encode(x), "decode": lambda m=model, z=z: m.decode(z)}
            taken = alternating(parts, device, repeats=3)
        rate, whole = matmul_rate(device, dtype), sum(taken.values())
        rows.append(
            {
                "precision": name,
                "encode, s": taken["encode"],
                "decode, s": taken["decode"],
                "round trip, s": whole,
                "TFLOP": flops / 1e12,
                SHARE: flops / whole / rate,
                "of fp32's time": whole / rows[0]["round trip, s"] if rows else 1.0,
            }
        )
    return rows


def rounding(scale: str, pipeline: Path | None = None) -> list[Row]:
    """bf16 against fp32 on the same clip and the same weights, trained ones where `--pipeline` names them."""
    device, rows = device_of(scale), []
    models = {"random weights": AutoencoderKLVidTwin.from_preset(VAE[scale])}
    if pipeline is not None:
        models[str(pipeline)] = AutoencoderKLVidTwin.from_pretrained(pipeline, subfolder="vae")
    for name, model in models.items():
        model = model.to(device).eval()
        video = _sprite(model).to(device)
        with torch.no_grad():
            exact = model(video).sample.clamp(-1, 1)
            rounded = model.to(torch.bfloat16)(video.bfloat16()).sample.float().clamp(-1, 1)
        rows.append({"weights": name, "PSNR of bf16 to fp32, dB": psnr(rounded, exact, quantize=False).item()})
    return rows


def _sprite(model: AutoencoderKLVidTwin) -> torch.Tensor:
    """A clip (1, C, T, H, W) of the model's size that it may have been trained on the like of."""
    _, frames, side, _ = model.clip_shape
    factors = sample_factors(np.random.default_rng(0), "orbit", resolution=side, num_frames=frames)
    video = torch.from_numpy(render_sprite(factors)).permute(3, 0, 1, 2)[None]
    return video.float() / 127.5 - 1


def modes(scale: str) -> list[Row]:
    """`inference_mode` against `no_grad`: encoding with weights in bf16, and under autocast."""
    device, rows = device_of(scale), []
    model = AutoencoderKLVidTwin.from_preset(VAE[scale]).to(device).eval()
    video = torch.rand(1, *model.clip_shape, device=device) * 2 - 1

    def encode(mode: Callable, autocast: bool) -> Callable[[], None]:
        def run() -> None:
            with mode(), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                model.encode(video.to(model.dtype))

        return run

    for weights, dtype, autocast in (("fp32, autocast", torch.float32, True), ("bf16", torch.bfloat16, False)):
        model = model.to(dtype)
        runs = {mode.__name__: encode(mode, autocast) for mode in (torch.no_grad, torch.inference_mode)}
        taken = alternating(runs, device, repeats=3)
        ratio = taken["inference_mode"] / taken["no_grad"]
        rows.append({"weights": weights, "no_grad, s": taken["no_grad"], "inference_mode / no_grad": ratio})
    return rows


def train_step(scale: str) -> list[Row]:
    """Forward and backward at batch 1, and AdamW, each case in a process of its own for its peak memory."""
    rows: list[Row] = []
    for case in (case for case in TRAINED[scale] if case[1] in precisions(scale)):
        rows.append(in_own_process(_train_step, scale, *case))
        first = next(row for row in rows if row["size"] == case[0])
        for figure, name in (("forward + backward, s", "of fp32's time"), ("peak, GiB", "of fp32's peak")):
            rows[-1][name] = rows[-1][figure] / first[figure]
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

    taken = seconds(forward_backward, device, repeats=2 if size in ("base", "large") else 5)
    peak = peak_gib(device)  # before the optimizer has any state
    rate = matmul_rate(device, DTYPES[precision])
    update = seconds(optimizer.step, device, repeats=3)
    forward_backward()  # beside the optimizer's state
    return {
        "size": size,
        "precision": precision,
        "checkpointing": checkpointing,
        "parameters": model.num_parameters(),
        "forward + backward, s": taken,
        "AdamW, s": update,
        SHARE: 3 * (encode_flops(model) + decode_flops(model)) / taken / rate,
        "peak, GiB": peak,
        "with AdamW, GiB": peak_gib(device),
    }


def dit_step(scale: str) -> list[Row]:
    """A denoising step of the paper's DiT, guidance in one batch, `no_grad`, against the measured matmul rate."""
    device, rows = device_of(scale), []
    for name, clips, folded in DIT_CASES[scale]:
        if name not in precisions(scale):
            continue
        model, batch = _denoiser(scale, folded).to(device, DTYPES[name]), 2 * clips
        latents = torch.randn(batch, model.latent_size, device=device, dtype=DTYPES[name])
        timestep = torch.full((batch,), 500.0, device=device)
        labels = torch.arange(batch, device=device) % CLASSES
        with torch.no_grad():
            step = partial(model, latents, timestep, labels)
            runs = {"step": step, "given": partial(step, modulations=model.modulations(timestep, labels))}
            taken = alternating(runs, device, repeats=2 if sum(model.num_tokens) * clips > 1000 else 10)
        flops = batch * transformer_flops(model)
        rows.append(
            {
                "precision": name,
                "clips": clips,
                "tokens of a clip": sum(model.num_tokens),
                "step, s": taken["step"],
                "TFLOP": flops / 1e12,
                SHARE: flops / taken["step"] / matmul_rate(device, DTYPES[name]),
                "a clip of fp32's time": taken["step"] / clips / rows[0]["step, s"] if rows else 1.0,
                "modulations given / made": taken["given"] / taken["step"],
            }
        )
    return rows


def _denoiser(scale: str, folded: bool) -> VidTwinTransformer3DModel:
    """The scale's DiT on the paper's latents, of 1008 tokens, or folded of 65."""
    patches = {"structure_patch_size": (16, 1, 1), "dynamics_patch_size": (1, 14)} if folded else {}
    return VidTwinTransformer3DModel.from_preset(DIT[scale], num_classes=CLASSES, **patches).eval()


def sampling(scale: str) -> list[Row]:
    """DDIM steps with guidance and decoding, by the pipeline against one by one; bf16, or fp32 where bf16 is slow."""
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
        taken = alternating(parts, device, repeats=5)
    pipeline(0, num_inference_steps=1)
    whole = once(lambda: pipeline(0, num_inference_steps=steps, output_type="np"), device)
    ratio = whole / (steps * taken["step, s"] + taken["decode, s"])
    return [{"DiT": preset, "steps": steps, **taken, "pipeline, s": whole, "pipeline / sum of its parts": ratio}]


def compiled(scale: str) -> list[Row]:
    """`torch.compile` as one graph against eager; bf16, or fp32 where bf16 is slow; the first call compiles."""
    device, rows, dtype = device_of(scale), [], fast_dtype(scale)
    vae = AutoencoderKLVidTwin.from_preset(VAE[scale]).to(device, dtype).eval()
    clip, latents = torch.rand(1, *vae.clip_shape).to(device, dtype), torch.randn(1, vae.latent_size).to(device, dtype)
    passes = {"encode": (vae.encode, (clip,)), "decode": (vae.decode, (latents,))}
    timestep, labels = torch.full((2,), 500.0, device=device), torch.tensor([0, CLASSES], device=device)
    for folded in (False, True):
        model = _denoiser(scale, folded).to(device, dtype)
        noise = torch.randn(2, model.latent_size).to(device, dtype)
        passes[f"DiT step of a clip with guidance, {sum(model.num_tokens)} tokens"] = (
            model,
            (noise, timestep, labels),
        )
    for name, (function, inputs) in passes.items():
        torch.compiler.reset()
        graph = torch.compile(function, fullgraph=True, backend="eager" if scale == "smoke" else "inductor")
        runs = {"plain": lambda f=function, x=inputs: f(*x), "compiled": lambda g=graph, x=inputs: g(*x)}
        with torch.no_grad():
            first = wall_seconds(runs["compiled"])
            taken = alternating(runs, device, repeats=3)
        ratio = taken["compiled"] / taken["plain"]
        rows.append({"what": name, "plain, s": taken["plain"], "compiled / plain": ratio, "first call, s": first})
    return rows


def attention(scale: str) -> list[Row]:
    """The fused kernel against two plain matmuls, at the sequence lengths of VidTwin, Q-Former and DiT."""
    device, rows = device_of(scale), []
    for what, batch, length, heads, dim in (
        ("temporal, 224 px", 196, 16, 12, 64),
        ("spatial, 224 px", 16, 196, 12, 64),
        ("Q-Former, 224 px", 196, 16, 8, 8),
        ("DiT, 1008 tokens", 1, 1008, 16, 72),
        ("DiT, 65 tokens", 8, 65, 16, 72),
    ):
        for name, dtype in precisions(scale).items():
            qkv = torch.randn(3, batch, length, heads, dim, device=device, dtype=dtype)
            row: Row = {"what": what, "length": length, "precision": name}
            for backward in (False, True):
                leaves = [x.clone().requires_grad_(backward) for x in qkv]
                runs = {
                    function.__name__: lambda f=function, x=leaves, b=backward: _attend(f, x, b)
                    for function in (_fused, _plain)
                }
                taken = alternating(runs, device, REPEATS[scale])
                passes = "forward + backward" if backward else "forward"
                row[f"{passes}, fused / plain"] = taken["_fused"] / taken["_plain"]
            rows.append(row)
    return rows


def _fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)


def _plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return _matmul_attention(query, key, value, False, 0.0)


def _attend(function: Callable, leaves: list[torch.Tensor], backward: bool) -> None:
    with torch.set_grad_enabled(backward):
        out = function(*leaves)
    if backward:
        out.sum().backward()


def qformer(scale: str) -> list[Row]:
    """transformers' Q-Former against ours at the paper's size, 196 places of 16 frames."""
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    device, rows = device_of(scale), []
    for name, dtype in precisions(scale).items():
        ours = QFormer(16, 64, 768, num_layers=6, num_heads=8, ffn_dim=768, dropout=0.0).to(device, dtype)
        theirs = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=64,
                num_hidden_layers=6,
                num_attention_heads=8,
                intermediate_size=768,
                encoder_hidden_size=768,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        ).to(device, dtype)
        context = torch.randn(196, 16, 768, device=device, dtype=dtype)
        queries = ours.queries.detach().expand(196, -1, -1)

        def run_theirs(model=theirs, q=queries, x=context) -> torch.Tensor:
            return model(query_embeds=q, encoder_hidden_states=x).last_hidden_state

        def run_ours(model=ours, x=context) -> torch.Tensor:
            return model(x)

        with torch.no_grad():
            forward = alternating({"theirs": run_theirs, "ours": run_ours}, device, REPEATS[scale])
        both = {"theirs": lambda f=run_theirs: f().sum().backward(), "ours": lambda f=run_ours: f().sum().backward()}
        backward = alternating(both, device, REPEATS[scale])
        rows.append(
            {
                "precision": name,
                "forward, theirs / ours": forward["theirs"] / forward["ours"],
                "forward + backward, theirs / ours": backward["theirs"] / backward["ours"],
            }
        )
    return rows
