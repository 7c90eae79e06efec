"""The Q-Former: learned queries that attend to a set of vectors.

It computes BLIP-2's Q-Former without the text branch (transformers' `Blip2QFormerModel`; equal up to rounding). This
implementation is faster in bf16 (0.77 of the time, docs/performance.md), since it uses `autoencoder.attention`, and as
a plain module it supports compilation, sharding and dtype casts.
"""

from __future__ import annotations

import torch
from diffusers.models.attention import AttentionModuleMixin
from torch import nn

from .attention import attention

LAYER_NORM_EPS = 1e-12
CROSS_ATTENTION_EVERY = 2


class QFormerAttnProcessor:
    """Multi-head attention with separate projections to queries, keys and values."""

    _attention_backend = None  # set by `set_attention_backend`

    def __call__(self, attn: QFormerAttention, hidden_states: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        query = attn.to_q(hidden_states).unflatten(-1, (attn.num_heads, -1))
        key = attn.to_k(context).unflatten(-1, (attn.num_heads, -1))
        value = attn.to_v(context).unflatten(-1, (attn.num_heads, -1))
        dropout_p = attn.dropout.p if attn.training else 0.0
        out = attention(query, key, value, dropout_p=dropout_p, backend=self._attention_backend)
        return attn.to_out(out.flatten(2))


class QFormerAttention(nn.Module, AttentionModuleMixin):
    """Multi-head attention of queries of width `dim` over keys of width `context_dim`, then residual and LayerNorm."""

    _default_processor_cls = QFormerAttnProcessor
    _available_processors = [QFormerAttnProcessor]
    _supports_qkv_fusion = False  # not worthwhile for a few queries

    def __init__(self, dim: int, context_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(context_dim, dim)
        self.to_v = nn.Linear(context_dim, dim)
        self.to_out = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.set_processor(QFormerAttnProcessor())

    def forward(self, hidden_states: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        attended = self.processor(self, hidden_states, hidden_states if context is None else context)
        return self.norm(hidden_states + self.dropout(attended))


class QFormerLayer(nn.Module):
    """Self-attention, optional cross-attention and an exact-GELU MLP, each followed by LayerNorm."""

    def __init__(
        self, dim: int, context_dim: int, num_heads: int, ffn_dim: int, dropout: float, cross_attention: bool
    ) -> None:
        super().__init__()
        self.self_attn = QFormerAttention(dim, dim, num_heads, dropout)
        self.cross_attn = QFormerAttention(dim, context_dim, num_heads, dropout) if cross_attention else None
        self.mlp_in = nn.Linear(dim, ffn_dim)
        self.mlp_out = nn.Linear(ffn_dim, dim)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)

    def forward(self, hidden_states: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        hidden_states = self.self_attn(hidden_states)
        if self.cross_attn is not None:
            hidden_states = self.cross_attn(hidden_states, context)
        update = self.mlp_out(nn.functional.gelu(self.mlp_in(hidden_states)))
        return self.norm(hidden_states + self.dropout(update))


class QFormer(nn.Module):
    """`num_queries` learned queries with cross-attention to a context in every second layer, from the first on."""

    def __init__(
        self,
        num_queries: int,
        dim: int,
        context_dim: int,
        num_layers: int,
        num_heads: int,
        ffn_dim: int,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(num_queries, dim) * 0.02)
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            [
                QFormerLayer(dim, context_dim, num_heads, ffn_dim, dropout, index % CROSS_ATTENTION_EVERY == 0)
                for index in range(num_layers)
            ]
        )
        self.gradient_checkpointing = False

    def forward(self, context: torch.Tensor) -> torch.Tensor:
        """(N, length, context_dim) -> (N, num_queries, dim)."""
        context = context.contiguous()  # see `VidTwinBlock`
        queries = self.dropout(self.norm(self.queries).expand(context.shape[0], -1, -1))
        for layer in self.layers:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                queries = self._gradient_checkpointing_func(layer, queries, context)
            else:
                queries = layer(queries, context)
        return queries

    def reset_parameters(self) -> None:
        """Initialize as in BERT: weights N(0, 0.02), zero biases."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
