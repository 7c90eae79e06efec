"""The transformer's parts against formulas written another way."""

from __future__ import annotations

import math

import pytest
import torch

import autoencoder.attention
from autoencoder.attention import _matmul_attention, attention
from autoencoder.blocks import VidTwinTransformer, modulated_norm, sincos_1d, sincos_2d
from autoencoder.qformer import QFormer


def test_position_formula_value_by_value():
    height, width, dim = 3, 5, 16
    table = sincos_2d(height, width, dim)
    assert table.shape == (height * width, dim)
    assert table.dtype == torch.float64
    for row in range(height):
        for column in range(width):
            for half, position in ((0, column), (1, row)):
                for i in range(dim // 4):
                    angle = position / 10000 ** (i / (dim // 4))
                    at = half * dim // 2 + i
                    assert table[row * width + column, at].item() == pytest.approx(math.sin(angle), abs=1e-12)
                    assert table[row * width + column, at + dim // 4].item() == pytest.approx(
                        math.cos(angle), abs=1e-12
                    )


def test_position_formula_against_official_buffers(golden_buffers):
    for name, table in golden_buffers.items():
        length, dim = table.shape[1:]
        if "temporal" in name:
            ours = sincos_1d(length, dim)
        else:
            ours = sincos_2d(math.isqrt(length), math.isqrt(length), dim)
        torch.testing.assert_close(table[0], ours, rtol=0, atol=1e-12)


@pytest.fixture
def golden_buffers() -> dict[str, torch.Tensor]:
    from pathlib import Path

    from safetensors.torch import load_file

    folder = Path(__file__).parents[1] / "data" / "official_golden"
    state = load_file(folder / "mini_crop_weights.safetensors")
    return {key: value for key, value in state.items() if "pos_embed" in key}


@pytest.mark.parametrize("is_causal", [False, True])
def test_both_attention_paths_agree(is_causal):
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 7, 4, 8, requires_grad=True)
    fused = attention(query, key, value, is_causal=is_causal)
    torch.testing.assert_close(_matmul_attention(query, key, value, None, is_causal, 0.0), fused, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("is_fast", [False, True])
def test_bf16_attention_on_a_cpu_is_close_to_float32(is_fast, monkeypatch):
    monkeypatch.setattr(autoencoder.attention, "is_clearly_faster", lambda dtype: is_fast)
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 32, 4, 8)
    exact = attention(query, key, value, is_causal=True)
    half = attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), is_causal=True)
    assert half.dtype == torch.bfloat16
    assert (half.float() - exact).square().mean() < 1e-4 * exact.square().mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cpu_that_is_slow_in_half_precision_attends_in_float32(dtype, backends, monkeypatch):
    """Also under autocast, which would cast the inputs back."""
    monkeypatch.setattr(autoencoder.attention, "is_clearly_faster", lambda dtype: False)
    dtypes = []
    dispatch = autoencoder.attention.dispatch_attention_fn

    def record(query, *args, **kwargs):
        out = dispatch(query, *args, **kwargs)
        dtypes.extend([query.dtype, out.dtype])
        return out

    monkeypatch.setattr(autoencoder.attention, "dispatch_attention_fn", record)
    x = torch.randn(1, 4, 2, 8).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention(x, x, x).dtype == dtype
    assert dtypes == [torch.float32, torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16])
def test_modulated_norm_by_its_formula_in_its_inputs_dtype(dtype, table_dtype):
    """Autocast and layerwise casting give the features and the table different dtypes."""
    torch.manual_seed(0)
    x = (2e-3 * torch.randn(3, 5, 32)).to(dtype)  # of a variance beside which epsilon counts
    scale, shift = torch.randn(2, 32).to(table_dtype)
    wide = x.double()
    variance, mean = torch.var_mean(wide, dim=-1, correction=0, keepdim=True)
    expected = (wide - mean) / (variance + 1e-6).sqrt() * (1 + scale.double()) + shift.double()
    out = modulated_norm(x, scale, shift)
    assert out.dtype == dtype
    exact = dtype == table_dtype == torch.float32
    torch.testing.assert_close(
        out.double(), expected, **(dict(rtol=1e-5, atol=1e-5) if exact else dict(rtol=0.03, atol=0.05))
    )


def test_temporal_attention_is_causal():
    torch.manual_seed(0)
    transformer = VidTwinTransformer(dim=16, num_layers=2, num_heads=2, num_frames=6, grid=(2, 2)).eval()
    x = torch.randn(1, 6, 4, 16)
    changed = x.clone()
    changed[:, 4:] += 1
    with torch.no_grad():
        a, b = transformer(x), transformer(changed)
    assert torch.equal(a[:, :4], b[:, :4])
    assert not torch.allclose(a[:, 4:], b[:, 4:])


def test_temporal_attention_starts_as_a_no_op():
    torch.manual_seed(0)
    transformer = VidTwinTransformer(dim=16, num_layers=2, num_heads=2, num_frames=4, grid=(2, 2))
    transformer.reset_parameters()
    x = torch.randn(1, 4, 4, 16)
    together = transformer(x)
    alone = torch.cat([transformer(frame.expand(-1, 4, -1, -1))[:, :1] for frame in x.split(1, dim=1)], dim=1)
    torch.testing.assert_close(together, alone)


def test_qformer_agrees_with_transformers():
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    torch.manual_seed(0)
    reference = Blip2QFormerModel(
        Blip2QFormerConfig(
            hidden_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=32, encoder_hidden_size=24
        )
    ).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = QFormer(num_queries=3, dim=16, context_dim=24, num_layers=3, num_heads=4, ffn_dim=32).eval()
    from autoencoder.convert_official import convert_key

    prefix = "structure_encoder.temporal_pool."
    state = {
        convert_key(f"temporal_qformer.qformer.{key}").removeprefix(prefix): value
        for key, value in reference.state_dict().items()
    }
    ours.load_state_dict(state | {"queries": torch.randn(3, 16)})
    context = torch.randn(5, 7, 24)
    with torch.no_grad():
        expected = reference(
            query_embeds=ours.queries.expand(5, -1, -1), encoder_hidden_states=context
        ).last_hidden_state
        torch.testing.assert_close(ours(context), expected, rtol=1e-4, atol=1e-5)


def test_qformer_dropout_only_when_training():
    torch.manual_seed(0)
    qformer = QFormer(num_queries=3, dim=16, context_dim=24, num_layers=2, num_heads=4, ffn_dim=32, dropout=0.5)
    context = torch.randn(2, 7, 24)
    assert not torch.equal(qformer.train()(context), qformer(context))
    assert torch.equal(qformer.eval()(context), qformer(context))
