"""Scaled dot-product attention on the fastest path for the device, or the path its user chose."""

from __future__ import annotations

import torch
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import nn

from .matmul_speed import is_clearly_faster

# On a CPU with bf16 products the fused bf16 kernel is several times slower than two plain matmuls on sequences this
# short, backward most of all (`benchmarks.speed attention`); past it the score matrix costs more memory than it
# saves time. A CPU without them multiplies bf16 up to a hundred times slower than float32: there, attention is
# computed in float32 and rounded. No CPU kernel of float16 was found to be fast.
MATMUL_MAX_LENGTH = 1024


class ProcessorMixin(AttentionMixin):
    """Diffusers' get and set of a model's attention processors, with the way back to their defaults."""

    def set_default_attn_processor(self) -> None:
        """Give every attention a new processor of its default class."""
        for module in self.modules():
            if isinstance(module, AttentionModuleMixin):
                module.set_processor(module._default_processor_cls())


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    backend: AttentionBackendName | None = None,
) -> torch.Tensor:
    """Multi-head attention softmax(q k^T / sqrt(d)) v, with no mask other than the causal one.

    Args:
        query, key, value: (B, S, heads, d), the layout of Diffusers' attention dispatcher.
        is_causal: position i sees positions <= i only; query and key are equally long then.
        dropout_p: probability of dropping an attention weight.
        backend: of Diffusers' dispatcher, as `set_attention_backend` leaves it in a processor; None: the fastest.

    Returns:
        (B, S, heads, d).
    """
    half_on_cpu = query.device.type == "cpu" and query.dtype in (torch.bfloat16, torch.float16)
    if backend is None and half_on_cpu:
        if not is_clearly_faster(query.dtype):
            return _float32_attention(query, key, value, is_causal, dropout_p)
        if key.shape[1] <= MATMUL_MAX_LENGTH:
            return _matmul_attention(query, key, value, is_causal, dropout_p)
    return dispatch_attention_fn(query, key, value, is_causal=is_causal, dropout_p=dropout_p, backend=backend)


def _float32_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool, dropout_p: float
) -> torch.Tensor:
    with torch.autocast(query.device.type, enabled=False):
        out = dispatch_attention_fn(
            query.float(), key.float(), value.float(), is_causal=is_causal, dropout_p=dropout_p
        )
    return out.to(query.dtype)


def _matmul_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool, dropout_p: float
) -> torch.Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if is_causal:
        length = scores.shape[-1]
        hidden = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    weights = scores.softmax(dim=-1)
    if dropout_p:
        weights = nn.functional.dropout(weights, dropout_p)
    return (weights @ value).transpose(1, 2)
