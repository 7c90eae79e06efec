"""NaN and infinite values: refused with the dtype and an alternative, and avoided in float16."""

from __future__ import annotations

import math

import PIL.Image
import pytest
import torch

from autoencoder import AutoencoderKLVidTwin
from autoencoder.latents import TwinLatents
from pipelines import VidTwinPipeline, default_scheduler
from pipelines.finite import NonFiniteError
from pipelines.rollout import interpolate, rollout

NAN, INF = math.nan, math.inf
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def generate(pipe, *args, **kwargs):
    settings = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
    return pipe(*args, **{**settings, **kwargs}).frames


def make_pipeline(vae, transformer) -> VidTwinPipeline:
    pipeline = VidTwinPipeline(vae, transformer, default_scheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def wide(make_transformer):
    """A transformer, by its class conditioning, whose residual stream leaves the range of float16."""

    def make(**overrides):
        model = make_transformer(**overrides)
        width = model.config.num_attention_heads * model.config.attention_head_dim
        with torch.no_grad():
            for block in model.transformer_blocks:
                block.modulation[1].bias[-width:] = 3000.0  # gates of the feed-forward layers
                block.ff.net[2].weight *= 10
        return model

    return make


@pytest.mark.parametrize("class_conditioning", ["adaln", "cross_attention"])
def test_a_residual_stream_beyond_float16_computes_in_float16(vae, wide, class_conditioning):
    peaks, model = [], wide(class_conditioning=class_conditioning)
    for block in model.transformer_blocks:
        block.register_forward_hook(lambda *hooked: peaks.append(hooked[-1].abs().max().item()))
    full = generate(make_pipeline(vae, model), [0, 2], guidance_scale=3.0, output_type="latent")
    assert max(peaks) > 1e5, "the stream stays within the range"
    half = generate(make_pipeline(vae, model.half()), [0, 2], guidance_scale=3.0, output_type="latent")
    assert (half - full).abs().max() < 0.05 * full.abs().max()


def test_float16_autocast_keeps_the_residual_stream_finite(wide):
    model = wide()
    inputs = (torch.randn(2, model.latent_size), torch.tensor([10, 500]), torch.tensor([0, 1]))
    with torch.no_grad():
        full = model(*inputs).sample
        with torch.autocast("cpu", torch.float16):
            half = model(*inputs).sample
    assert (half - full).abs().max() < 0.05 * full.abs().max()


@pytest.mark.parametrize("output_type", OUTPUT_TYPES)
def test_an_overflow_names_its_dtype_and_a_better_one(vae, make_transformer, output_type):
    model = make_transformer()
    with torch.no_grad():
        model.transformer_blocks[0].ff.net[2].weight *= 1e5
    generate(make_pipeline(vae, model), 0, output_type=output_type)
    generate(make_pipeline(vae, model.bfloat16()), 0, output_type=output_type)
    with pytest.raises(NonFiniteError, match=r"^The transformer produced NaN .* float16.* Use bfloat16 or float32"):
        generate(make_pipeline(vae, model.half()), 0, output_type=output_type)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_an_autoencoder_that_overflows_is_named(transformer, output_type):
    torch.manual_seed(0)
    broken = AutoencoderKLVidTwin.from_preset("tiny-test").eval()
    with torch.no_grad():
        next(broken.decoder.parameters()).fill_(INF)
    pipeline = make_pipeline(broken, transformer)
    with pytest.raises(ValueError, match=r"^The autoencoder produced NaN or infinite values in float32. Check that"):
        generate(pipeline, 0, output_type=output_type)
    assert generate(pipeline, 0, output_type="latent").isfinite().all()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(
    "name",
    [
        "guidance_scale",
        "structure_strength",
        "dynamics_strength",
        "eta",
        "num_inference_steps",
        "num_videos_per_prompt",
    ],
)
def test_a_number_that_is_not_finite_is_refused_by_name(pipe, name, value):
    with pytest.raises(ValueError, match=name):
        generate(pipe, 0, **{name: value})


@pytest.mark.parametrize(
    "option",
    [
        {"guidance_scale": (1.0, NAN)},
        {"guidance_interval": (0.0, INF)},
        {"guidance_interval": (NAN, 1.0)},
        {"timesteps": [900.0, NAN]},
        {"sigmas": [1.0, INF]},
        {"latents": torch.full((1, 176), NAN)},
    ],
    ids=lambda option: "-".join(option),
)
def test_sequences_with_non_finite_numbers_are_refused_by_name(pipe, option):
    if "latents" in option:
        option = {"latents": torch.full((1, pipe.transformer.latent_size), NAN)}
    with pytest.raises(ValueError, match=next(iter(option))):
        generate(pipe, 0, **option)


@pytest.mark.parametrize("stream", ["structure", "dynamics"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_conditioning_that_is_not_finite_is_refused_by_name(pipe, stream, value):
    channels, frames, height, width = pipe.vae.clip_shape
    clip = torch.full((1, frames, channels, height, width), 0.5)
    clip[0, 1, 0, 2, 3] = value
    latents = TwinLatents(*(torch.zeros(1, *getattr(pipe.vae, f"{name}_shape")) for name in ("structure", "dynamics")))
    getattr(latents, stream).flatten()[3] = value
    for given in (clip, clip.permute(0, 1, 3, 4, 2).numpy(), latents, getattr(latents, stream)):
        with pytest.raises(ValueError, match=f"^{stream} contains NaN or infinite values"):
            generate(pipe, 0, **{stream: given})


def test_conditioning_that_the_autoencoder_cannot_encode_is_refused(transformer):
    broken = AutoencoderKLVidTwin.from_preset("tiny-test").eval()
    with torch.no_grad():
        next(broken.encoder.parameters()).fill_(INF)
    with pytest.raises(NonFiniteError, match=r"^The autoencoder produced NaN"):
        generate(make_pipeline(broken, transformer), 0, structure=PIL.Image.new("RGB", (32, 32)))


def test_rollouts_and_interpolations_refuse_what_is_not_finite(pipe):
    frames = pipe.vae.clip_shape[1]
    first = torch.full((1, frames, 3, *pipe.vae.clip_shape[2:]), NAN)
    with pytest.raises(ValueError, match=r"^first contains NaN"):
        rollout(pipe, frames, 0, first=first)
    with pytest.raises(ValueError, match=r"^structure_strength must be finite, not nan"):
        rollout(pipe, frames, 0, structure_strength=NAN)
    still = PIL.Image.new("RGB", (32, 32))
    with pytest.raises(ValueError, match=r"^shares must be finite"):
        interpolate(pipe, still, still, [0.0, NAN])
