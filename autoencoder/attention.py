"""Scaled dot-product attention with the fastest implementation for the device, or the backend that the user set."""

from __future__ import annotations

import torch
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import nn

from .matmul_speed import is_clearly_faster

# On a CPU with bf16 instructions the fused bf16 kernel is several times slower than two matrix products for sequences
# up to this length, above all in the backward pass (docs/performance.md); for longer ones the score
# matrix costs too much memory. A CPU without these instructions multiplies bf16 up to a hundred times slower than
# float32: there, attention is computed in float32 and rounded. No float16 kernel for CPUs was found to be fast.
MATMUL_MAX_LENGTH = 1024


class ProcessorMixin(AttentionMixin):
    """Get and set a model's attention processors as in Diffusers, and reset them to their defaults."""

    def set_default_attn_processor(self) -> None:
        """Set every attention processor to a new one of its default class."""
        for module in self.modules():
            if isinstance(module, AttentionModuleMixin):
                module.set_processor(module._default_processor_cls())


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    backend: AttentionBackendName | None = None,
) -> torch.Tensor:
    """Compute multi-head attention softmax(q k^T / sqrt(d)) v, optionally with a mask.

    Args:
        query, key, value: (B, S, heads, d), the layout of Diffusers' attention dispatcher.
        mask: bool (B, 1, S, S'), the keys that each query attends to, at least one; excludes `is_causal`.
        is_causal: position i attends to positions <= i; requires query and key of equal length.
        dropout_p: probability of dropping an attention weight.
        backend: of Diffusers' dispatcher, set in a processor by `set_attention_backend`; None: the fastest. With a
            mask it is PyTorch's, since other backends refuse masks, or merge those of all queries.

    Returns:
        (B, S, heads, d).
    """
    half_on_cpu = query.device.type == "cpu" and query.dtype in (torch.bfloat16, torch.float16)
    if (backend is None or mask is not None) and half_on_cpu:
        if not is_clearly_faster(query.dtype):
            return _float32_attention(query, key, value, mask, is_causal, dropout_p)
        if key.shape[1] <= MATMUL_MAX_LENGTH:
            return _matmul_attention(query, key, value, mask, is_causal, dropout_p)
    backend = backend if mask is None else AttentionBackendName.NATIVE
    return dispatch_attention_fn(
        query, key, value, attn_mask=mask, is_causal=is_causal, dropout_p=dropout_p, backend=backend
    )


def _float32_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    dropout_p: float,
) -> torch.Tensor:
    with torch.autocast(query.device.type, enabled=False):
        out = dispatch_attention_fn(
            query.float(),
            key.float(),
            value.float(),
            attn_mask=mask,
            is_causal=is_causal,
            dropout_p=dropout_p,
            backend=None if mask is None else AttentionBackendName.NATIVE,
        )
    return out.to(query.dtype)


def _matmul_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    dropout_p: float,
) -> torch.Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if is_causal:
        length = scores.shape[-1]
        mask = torch.ones(length, length, dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(dim=-1)
    if dropout_p:
        weights = nn.functional.dropout(weights, dropout_p)
    return (weights @ value).transpose(1, 2)
