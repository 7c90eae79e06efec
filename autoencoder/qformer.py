"""The Q-Former: a few learned queries that read a set of vectors through cross-attention.

The arithmetic of BLIP-2's Q-Former without its text branch (transformers' `Blip2QFormerModel`), which this module
agrees with to rounding. It is written out because ours is faster in bf16 (`benchmarks.speed qformer`, figures in
docs/performance.md): its attention takes the path of `autoencoder.attention`, and nothing of a `PreTrainedModel`
stands in the way of compilation, sharding or dtype casts.
"""

from __future__ import annotations

import torch
from diffusers.models.attention import AttentionModuleMixin
from torch import nn

from .attention import attention

LAYER_NORM_EPS = 1e-12
CROSS_ATTENTION_EVERY = 2


class QFormerAttnProcessor:
    """Multi-head attention with a projection each to queries, keys and values."""

    _attention_backend = None  # where `set_attention_backend` leaves the choice

    def __call__(self, attn: QFormerAttention, hidden_states: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        query = attn.to_q(hidden_states).unflatten(-1, (attn.num_heads, -1))
        key = attn.to_k(context).unflatten(-1, (attn.num_heads, -1))
        value = attn.to_v(context).unflatten(-1, (attn.num_heads, -1))
        dropout_p = attn.dropout.p if attn.training else 0.0
        out = attention(query, key, value, dropout_p=dropout_p, backend=self._attention_backend)
        return attn.to_out(out.flatten(2))


class QFormerAttention(nn.Module, AttentionModuleMixin):
    """Multi-head attention of `dim`-wide queries over `context_dim`-wide keys, then residual and LayerNorm."""

    _default_processor_cls = QFormerAttnProcessor
    _available_processors = [QFormerAttnProcessor]
    _supports_qkv_fusion = False  # a few queries: nothing to gain

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
    """Self-attention, cross-attention where there is one, and an exact-GELU MLP; each post-normalized."""

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
    """`num_queries` learned queries, cross-attending to a context in every second layer, starting with the first."""

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
        """BERT's initialization: N(0, 0.02) weights and zero biases."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
