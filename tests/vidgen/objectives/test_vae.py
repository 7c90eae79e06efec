"""The autoencoder's objective against its formulas."""

from __future__ import annotations

import torch

from autoencoder import AutoencoderKLVidTwin
from vidgen.config import VAELossConfig
from vidgen.objectives.vae import VAEObjective


def test_vae_terms_are_means_with_the_documented_units():
    torch.manual_seed(0)
    vae = AutoencoderKLVidTwin.from_preset("tiny-test").eval()
    video = torch.rand(2, *vae.clip_shape) * 2 - 1
    torch.manual_seed(1)
    losses = VAEObjective(vae, VAELossConfig(l1_weight=2.0, l2_weight=3.0, kl_weight=5.0))(video)
    torch.manual_seed(1)
    posterior = vae.encode(video).latent_dist
    out = vae.decode(posterior.sample()).sample
    kl = posterior.kl().mean() / (3 * 4 * 32 * 32)
    torch.testing.assert_close(losses["l1"], (out - video).abs().mean())
    torch.testing.assert_close(losses["l2"], (out - video).square().mean())
    torch.testing.assert_close(losses["kl"], kl)
    torch.testing.assert_close(losses["loss"], 2 * losses["l1"] + 3 * losses["l2"] + 5 * kl)
