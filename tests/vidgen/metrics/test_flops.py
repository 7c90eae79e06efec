"""FLOPs against PyTorch's own counter, where that sees every product."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from autoencoder import AutoencoderKLVidTwin
from pipelines import VidTwinTransformer3DModel
from vidgen.metrics.flops import (
    clock,
    decode_flops,
    encode_flops,
    matmul_rate,
    muon_flops,
    transformer_flops,
)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bottleneck": "residual"},
        {"single_latent": True},
        {"sample_size": (24, 40), "temporal_patch_size": 2},
        {"linear_path": 3},
    ],
)
@torch.no_grad()
def test_counts_are_those_of_plain_matmuls(options, fast_bf16):
    vae = (
        AutoencoderKLVidTwin.from_preset("tiny-test", **options).eval().bfloat16()
    )  # in which attention is plain matmuls
    clip = torch.zeros(1, *vae.clip_shape, dtype=torch.bfloat16)
    z = vae.encode(clip).latent_dist.mode()
    for run, expected in ((lambda: vae.encode(clip), encode_flops(vae)), (lambda: vae.decode(z), decode_flops(vae))):
        with FlopCounterMode(display=False) as counter:
            run()
        assert expected == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_the_released_size_takes_two_teraflops_a_round_trip():
    with torch.device("meta"):
        vae = AutoencoderKLVidTwin.from_preset("released")
    assert encode_flops(vae) + decode_flops(vae) == pytest.approx(1.98e12, rel=0.01)


@pytest.mark.parametrize("self_conditioning", [False, True])
@pytest.mark.parametrize("num_classes, class_conditioning", [(None, "adaln"), (5, "adaln"), (5, "cross_attention")])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        # Few tokens, wide patches: what all tokens share and the layers at both ends count for most.
        {"structure_patch_size": (4, 2, 2), "dynamics_patch_size": (4, 4)},
        {"num_layers": 1, "mlp_ratio": 2.0, "class_embed_dim": 96},
        {"image_conditioning": True},
        {"caption_channels": 24},
        {"caption_channels": 24, "caption_pooling": True},
    ],
)
@torch.no_grad()
def test_the_dits_count_is_that_of_plain_matmuls(sizes, num_classes, class_conditioning, self_conditioning, fast_bf16):
    options = {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 16, **sizes}
    dit = VidTwinTransformer3DModel(
        structure_shape=(3, 4, 2, 2),
        dynamics_shape=(6, 4, 4),
        num_classes=num_classes,
        class_conditioning=class_conditioning,
        self_conditioning=self_conditioning,
        **options,
    )
    dit = dit.eval().bfloat16()  # attention is plain matmuls
    latents = torch.zeros(1, dit.latent_size, dtype=torch.bfloat16)
    labels = None if num_classes is None else torch.zeros(1, dtype=torch.long)
    image = latents[:, : 3 * 4 * 2 * 2] if dit.image_embed is not None else None
    with FlopCounterMode(display=False) as counter:
        captions = None if dit.caption_embed is None else torch.zeros(1, 7, 24, dtype=torch.bfloat16)
        dit(latents, torch.zeros(1), labels, image_latents=image, encoder_hidden_states=captions)
    assert transformer_flops(dit, num_caption_tokens=7) == pytest.approx(counter.get_total_flops(), rel=1e-9)
    timesteps = torch.zeros(1, 1 + dit.num_frame_rows)
    with FlopCounterMode(display=False) as counter:
        dit(latents, timesteps, labels, image_latents=image, encoder_hidden_states=captions)
    flops = transformer_flops(dit, num_caption_tokens=7, num_timesteps=timesteps.shape[1])
    assert flops == pytest.approx(counter.get_total_flops(), rel=1e-9)


def test_the_matmul_rate_is_of_two_operations_a_multiply_add(monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr("vidgen.metrics.flops.clock", lambda device: next(ticks))  # every product takes a second
    before = torch.get_rng_state()
    assert matmul_rate("cpu", torch.float32, size=8) == 2 * 8**3
    assert torch.equal(torch.get_rng_state(), before)


def test_one_thread_is_timed_by_cpu_time(monkeypatch):
    monkeypatch.setattr("time.process_time", lambda: 1.0)
    monkeypatch.setattr("time.perf_counter", lambda: 2.0)
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    assert clock("cpu") == 1.0
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    assert clock("cpu") == 2.0


def test_muons_count_is_that_of_its_products():
    matrices = [nn.Parameter(torch.randn(shape)) for shape in ((4, 8), (24, 6), (5, 5))]
    for matrix in matrices:
        matrix.grad = torch.randn(matrix.shape)
    with FlopCounterMode(display=False) as counter:
        torch.optim.Muon(matrices).step()
    assert muon_flops(matrices) == counter.get_total_flops() > 0
