"""int8 products of the linear layers, by torchao, and compilation: of the autoencoder and of the DiT."""

from __future__ import annotations

import copy
import importlib.util
import itertools
from functools import partial

import torch
from torch import nn

from autoencoder import AutoencoderKLVidTwin
from pipelines import VidTwinPipeline, VidTwinTransformer3DModel
from vidgen.common.loading import SPRITES_MODEL
from vidgen.metrics.reconstruction import psnr

from ..sprites.classifier import DrawnSprites
from .timing import DTYPES, Row, alternating, device_of, precisions

VAE = {"smoke": "tiny-test", "cpu": "base", "paper": "base"}
DIT = {"smoke": "tiny-test", "cpu": "B", "paper": "paper"}
COMPILER = {"smoke": {"backend": "eager"}, "cpu": {}, "paper": {}}
SPRITES, STEPS = {"smoke": 2, "cpu": 64, "paper": 64}, {"smoke": 1, "cpu": 25, "paper": 25}
SEED = 3000  # of sprites that no model was trained on
INT8 = "int8"


def quantization(scale: str) -> list[Row]:
    """Time in fp32, bf16 and int8 (weights per channel, activations per token), each plain and compiled.

    Without torchao there is no int8. Speed is that of random weights of published sizes. Quality is that of
    pretrained/sprites: PSNR of reconstructed sprites, and of samples to those in fp32 from the same noise.
    """
    device = device_of(scale)
    torch.manual_seed(0)
    vae = AutoencoderKLVidTwin.from_preset(VAE[scale]).to(device).eval()
    transformer = VidTwinTransformer3DModel.from_preset(DIT[scale]).to(device).eval()
    pipeline = VidTwinPipeline.from_pretrained(SPRITES_MODEL).to(device)
    clip = torch.rand(1, *vae.clip_shape, device=device) * 2 - 1
    latents = torch.randn(2, transformer.latent_size, device=device)
    timestep = torch.full((2,), 500.0, device=device)
    inputs = {"VAE": (vae, (clip,)), "DiT": (transformer, (latents, timestep))}
    quality = _measure_quality(pipeline, scale)

    rows = []
    for part, (model, arguments) in inputs.items():
        runs = {
            (precision, is_compiled): _prepare(model, precision, is_compiled, arguments, scale)
            for precision, is_compiled in itertools.product(_names(scale), (False, True))
        }
        with torch.no_grad():
            seconds = alternating(runs, device, repeats=3)
        for precision, is_compiled in runs:
            row = {"model": part, "precision": precision, "compiled": is_compiled}
            row["time, s"] = seconds[precision, is_compiled]
            row["time relative to fp32"] = row["time, s"] / seconds["fp32", False]
            rows.append(row | ({} if is_compiled else quality[part, precision]))
    return rows


def _names(scale: str) -> list[str]:
    return [*precisions(scale), *([INT8] if importlib.util.find_spec("torchao") else [])]


def _convert(model: nn.Module, precision: str) -> nn.Module:
    """A copy in a precision."""
    model = copy.deepcopy(model)
    if precision != INT8:
        return model.to(DTYPES[precision])
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def _prepare(model: nn.Module, precision: str, is_compiled: bool, arguments: tuple, scale: str) -> partial:
    """A call of a copy of a model in a precision."""
    model = _convert(model, precision)
    if is_compiled:
        model.compile(**COMPILER[scale])
    first, *others = arguments
    return partial(model, first.to(DTYPES.get(precision, torch.float32)), *others)


@torch.no_grad()
def _measure_quality(pipeline: VidTwinPipeline, scale: str) -> dict[tuple[str, str], Row]:
    """Quality of both models of a pipeline in every precision."""
    pipeline.set_progress_bar_config(disable=True)
    vae, transformer, quality = pipeline.vae, pipeline.transformer, {}
    clips = DrawnSprites(SPRITES[scale], SEED).clips().to(vae.device)
    labels = [index % len(pipeline.labels) for index in range(len(clips))]
    expected = None
    for precision in _names(scale):
        converted = _convert(vae, precision)
        dtype = DTYPES.get(precision, torch.float32)
        reconstructed = torch.cat([converted(batch.to(dtype)).sample.float() for batch in clips.split(8)])
        quality["VAE", precision] = {"reconstruction PSNR, dB": psnr(reconstructed, clips).mean().item()}

        pipeline.transformer = _convert(transformer, precision)
        samples = pipeline(
            labels,
            guidance_scale=3.0,
            num_inference_steps=STEPS[scale],
            generator=torch.Generator().manual_seed(SEED),
            output_type="pt",
        ).frames
        expected = samples if expected is None else expected
        to_fp32 = psnr(2 * samples.float() - 1, 2 * expected.float() - 1).mean().item()
        quality["DiT", precision] = {"samples to fp32, PSNR, dB": None if precision == "fp32" else to_fp32}
    return quality
