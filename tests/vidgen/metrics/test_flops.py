"""FLOPs against PyTorch's own counter, where that sees every product."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from autoencoder import AutoencoderKLVidTwin
from vidgen.metrics.flops import decode_flops, encode_flops


@pytest.mark.parametrize("options", [{}, {"heads": "residual"}, {"single_latent": True}])
@torch.no_grad()
def test_counts_are_those_of_plain_matmuls(options):
    vae = AutoencoderKLVidTwin.from_preset("tiny-test", **options).eval().bfloat16()  # bf16 on a CPU: plain matmuls
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
