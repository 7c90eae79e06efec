"""The transformer of Figure 5, and the number of tokens of a latent."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.resources.pseudo_dit import PseudoDiT, token_grid


def test_parameters_of_the_paper():
    feed_forward, norm = 512 * 2048 + 2048 + 2048 * 512 + 512, 2 * 512
    assert sum(p.numel() for p in PseudoDiT().parameters()) == 6 * (feed_forward + 2 * norm) == 12_610_560
    projections = 4 * (512 * 512 + 512)
    with_projections = sum(p.numel() for p in PseudoDiT(projections=True).parameters())
    assert with_projections == 12_610_560 + 6 * projections == 18_914_304


@torch.no_grad()
def test_identity_projections_change_nothing():
    tokens = torch.randn(2, 5, 12)
    plain, projected = PseudoDiT(1, 3, 12, 16), PseudoDiT(1, 3, 12, 16, projections=True)
    projected.load_state_dict(plain.state_dict(), strict=False)
    block = projected.blocks[0]
    block.to_qkv.weight.copy_(torch.eye(12).repeat(3, 1))
    block.to_out.weight.copy_(torch.eye(12))
    block.to_qkv.bias.zero_()
    block.to_out.bias.zero_()
    torch.testing.assert_close(projected(tokens), plain(tokens))


@torch.no_grad()
def test_a_block_is_attention_and_then_a_feed_forward_layer():
    model, tokens = PseudoDiT(1, 3, 12, 16), torch.randn(1, 5, 12)
    normed = F.layer_norm(tokens, (12,)).view(5, 3, 4)
    weights = torch.einsum("ihd,jhd->hij", normed, normed).div(4**0.5).softmax(-1)
    x = tokens + torch.einsum("hij,jhd->ihd", weights, normed).reshape(1, 5, 12)
    w1, b1, w2, b2 = model.blocks[0].mlp.parameters()
    expected = x + F.gelu(F.layer_norm(x, (12,)) @ w1.T + b1) @ w2.T + b2
    torch.testing.assert_close(model(tokens), expected)


def test_tokens_by_hand():
    assert token_grid((5, 28, 28), (2, 2, 2)) == (3, 14, 14)  # five frames in pairs, and a partial pair
    assert token_grid((5, 28, 28), (2, 2, 2), crop=True) == (2, 14, 14)
    assert token_grid((1, 224, 224), (2, 16, 16)) == (1, 14, 14)  # a size of 1 stays 1
    assert token_grid((1, 224, 224), (2, 16, 16), crop=True) == (1, 14, 14)
    assert token_grid((16, 14), (1, 14)) == (16, 1)


@given(st.integers(1, 40), st.integers(1, 40))
def test_padding_and_cropping_agree_for_whole_patches(size, patch):
    (padded,), (cropped,) = token_grid((size,), (patch,)), token_grid((size,), (patch,), crop=True)
    covered = min(size, patch)
    assert cropped * covered <= size <= padded * covered
    assert padded - cropped == bool(size % covered)
