"""Floating-point operations: FLOPs of a model on one clip, from its sizes, and the FLOP rate of a device."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from autoencoder import AutoencoderKLVidTwin
from autoencoder.adapters import empty_copy
from autoencoder.grids import feature_frames, feature_grid
from autoencoder.matmul_speed import is_onednn_faster, onednn_linear
from autoencoder.video_autoencoder import VideoAutoencoder
from pipelines import VidTwinTransformer3DModel


def encode_flops(vae: VideoAutoencoder) -> float:
    """Return the FLOPs of encoding one clip of the model's size; a multiply-add counts as two."""
    if not isinstance(vae, AutoencoderKLVidTwin):
        return _count_adapted(vae, "encode")
    return _blocks_flops(vae) + _count_latent_modules(vae)[0]


def decode_flops(vae: VideoAutoencoder) -> float:
    """Return the FLOPs of decoding one clip of the model's size; a multiply-add counts as two."""
    if not isinstance(vae, AutoencoderKLVidTwin):
        return _count_adapted(vae, "decode")
    return _blocks_flops(vae) + _count_latent_modules(vae)[1]


def transformer_flops(
    transformer: VidTwinTransformer3DModel, num_caption_tokens: int = 0, num_timesteps: int = 2
) -> float:
    """Return the FLOPs of the DiT's forward pass on one sample, conditioning included; a multiply-add counts as two.

    Computed by formula, as for the VAE's blocks. A DiT with captions attends to `num_caption_tokens` and its null
    token. `num_timesteps` are those of structure and dynamics, or of structure and each row of dynamics frames.
    """
    c = transformer.config
    tokens, dim = sum(transformer.num_tokens), c.num_attention_heads * c.attention_head_dim
    cross = c.num_classes is not None and c.class_conditioning == "cross_attention"
    per_token = 2 * (4 + 2 * c.mlp_ratio) * dim**2 + 4 * tokens * dim  # linear layers; attention
    per_sample = num_timesteps * 2 * 6 * dim**2  # modulations
    if cross:  # to one vector: queries and outputs of all tokens, and that vector's key and value
        per_token += 2 * 2 * dim**2 + 4 * dim
        per_sample += 2 * 2 * c.class_embed_dim * dim
    captions = 0
    if c.caption_channels is not None:
        keys = num_caption_tokens + 1
        per_token += 2 * 2 * dim**2 + 4 * keys * dim
        per_sample += 2 * 2 * keys * dim**2
        captions = 2 * num_caption_tokens * (c.caption_channels + dim) * dim
        if c.caption_pooling:
            captions += 2 * 2 * (num_caption_tokens + dim) * c.caption_channels + 2 * 2 * dim**2
    values = math.prod(transformer.structure_shape) + math.prod(transformer.dynamics_shape)
    embedding = 2 * (2 + c.self_conditioning) * values * dim
    if c.image_conditioning:
        embedding += 2 * math.prod(transformer.structure_shape) * dim
    ends = num_timesteps * (2 * (256 * dim + 2 * dim**2) + 2 * 2 * dim**2)  # timesteps; last modulation
    return c.num_layers * (tokens * per_token + per_sample) + embedding + captions + ends


def muon_flops(matrices: Iterable[torch.Tensor]) -> float:
    """Return the FLOPs in which Muon orthogonalizes the updates of matrices at each step, whatever the batch.

    Five steps of Newton-Schulz (Jordan et al. 2024), each with three products on the shorter side.
    """
    sides = [sorted(matrix.shape) for matrix in matrices]
    return sum(5 * (4 * short**2 * long + 2 * short**3) for short, long in sides)


def matmul_rate(device: torch.device | str, dtype: torch.dtype, size: int | None = None, repeats: int = 5) -> float:
    """Measure the FLOP/s of a device on one large product of square matrices, an upper bound for a model.

    Args:
        size: rows of the matrices; by default 1024 on a CPU and 8192 elsewhere.
        repeats: number of products, of which the fastest counts.
    """
    size = size or (1024 if torch.device(device).type == "cpu" else 8192)
    generator = torch.Generator(device).manual_seed(0)  # the global one belongs to the training
    a, b = (torch.randn(size, size, device=device, dtype=dtype, generator=generator) for _ in range(2))
    best = math.inf
    is_onednn = a.device.type == "cpu" and dtype == torch.float32 and is_onednn_faster()
    product = onednn_linear if is_onednn else F.linear  # as in the models
    for _ in range(repeats + 1):  # the first one warms up
        start = clock(a.device)
        product(a, b)
        best = min(best, clock(a.device) - start)
    return 2 * size**3 / best


def clock(device: torch.device | str) -> float:
    """Wait until a device has finished its work, and return the time in seconds from an arbitrary start.

    With a single CPU thread this is the CPU time of the process, which other programs on a busy machine hardly affect.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()
    torch.accelerator.synchronize(device)
    return time.perf_counter()


def _blocks_flops(vae: AutoencoderKLVidTwin) -> float:
    """Return the FLOPs of the blocks and of the linear layer between pixels and tokens; the same on both sides.

    Computed by formula: PyTorch's counter misses the CPU's fused attention.
    """
    c = vae.config
    dim, frames, space = c.hidden_size, feature_frames(c), math.prod(feature_grid(c))
    tokens, patch = frames * space, c.temporal_patch_size * c.patch_size**2
    linears = 2 * (2 * 4 * dim**2 + 2 * c.mlp_ratio * dim**2)
    attention = 2 * 2 * dim * (space + frames)
    return tokens * (c.num_layers * (linears + attention) + 2 * dim * c.in_channels * patch)


def _count_latent_modules(vae: AutoencoderKLVidTwin) -> tuple[float, float]:
    """Count the FLOPs of encoding and of decoding between features and latents, and of the linear path."""
    c = vae.config
    with torch.device("meta"):
        meta = AutoencoderKLVidTwin.from_config(c).eval()
        features = torch.empty(1, c.hidden_size, feature_frames(c), *feature_grid(c))
        structure, dynamics = torch.empty(1, *vae.structure_shape), torch.empty(1, *vae.dynamics_shape)
        clip = torch.empty(1, *vae.clip_shape)
        moments = [torch.cat([latent, latent], dim=1) for latent in (structure, dynamics)]
    encoders = [(meta.structure_encoder, (features,)), (meta.dynamics_encoder, (features,))]
    decoders = [(meta.structure_decoder, (structure,)), (meta.dynamics_decoder, (dynamics,))]
    if meta.linear_encoder is not None:
        encoders.append((meta.linear_encoder, (clip, *moments)))
        decoders.append((meta.linear_decoder, (structure, dynamics)))
    flops = []
    for calls in (encoders, decoders):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            for module, inputs in calls:
                module(*inputs)
        flops.append(float(counter.get_total_flops()))
    return flops[0], flops[1]


@torch.no_grad()
def _count_adapted(vae: VideoAutoencoder, method: Literal["encode", "decode"]) -> float:
    """Count the FLOPs of encoding or decoding one clip with an adapted autoencoder, on meta tensors."""
    with torch.device("meta"):
        copied = empty_copy(vae).eval().to("meta")  # some constructors choose the CPU
        x = torch.empty(1, *vae.clip_shape) if method == "encode" else torch.empty(1, vae.latent_size)
    with FlopCounterMode(display=False) as counter:
        getattr(copied, method)(x)
    return float(counter.get_total_flops())
