"""FLOPs of a training step against arithmetic and the DiT's formula."""

from __future__ import annotations

import pytest
import torch

from benchmarks.resources.flops import training_flops
from benchmarks.resources.pseudo_dit import PseudoDiT
from pipelines import VidTwinTransformer3DModel
from vidgen.metrics.flops import transformer_flops


@pytest.mark.parametrize("projections", [False, True])
def test_a_training_step_of_the_pseudo_dit_by_hand(projections):
    layers, heads, dim, mlp, tokens = 3, 4, 32, 96, 20

    def build():
        model = PseudoDiT(layers, heads, dim, mlp, projections)
        return model, lambda x: model(x).mean(), (torch.randn(1, tokens, dim),)

    # Two products with the feed-forward's weights, scores and weighted values, four projections.
    multiply_adds = 2 * tokens * dim * mlp + 2 * tokens**2 * dim + projections * 4 * tokens * dim**2
    forward = layers * 2 * multiply_adds
    assert training_flops(build) == (forward, 3 * forward)  # each product has two in the backward pass


@pytest.mark.parametrize("class_conditioning", ["adaln", "cross_attention"])
def test_a_training_step_of_the_dit_by_formula(class_conditioning):
    def build():
        dit = VidTwinTransformer3DModel(
            structure_shape=(3, 4, 2, 2),
            dynamics_shape=(6, 4, 4),
            num_layers=2,
            num_attention_heads=4,
            attention_head_dim=16,
            num_classes=5,
            class_conditioning=class_conditioning,
        )
        inputs = torch.zeros(1, dit.latent_size), torch.zeros(1, 2), torch.zeros(1, dtype=torch.long)
        return dit, lambda *inputs: dit(*inputs).sample.mean(), inputs

    dit = build()[0]
    forward = transformer_flops(dit)
    no_gradient = 2 * (3 * 4 * 2 * 2 + 6 * 4 * 4) * 64 + 2 * 2 * 256 * 64  # of the latents, and of both timesteps
    assert training_flops(build) == (forward, 3 * forward - no_gradient)
