"""The blocks of the DiT: attention, adaLN modulation per stream, cross-attention to a class and to captions."""

from __future__ import annotations

import torch
from diffusers.hooks._helpers import (
    AttentionProcessorMetadata,
    AttentionProcessorRegistry,
    TransformerBlockMetadata,
    TransformerBlockRegistry,
)
from diffusers.models.attention import AttentionModuleMixin, FeedForward
from diffusers.models.normalization import FP32LayerNorm
from torch import nn

from autoencoder.attention import attention


class VidTwinAttnProcessor:
    """Multi-head attention with optional QK-norm."""

    _attention_backend = None  # where `set_attention_backend` leaves the choice

    def __call__(
        self,
        attn: VidTwinAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if not attn.fused_projections:
            query, key, value = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        elif attn.is_cross_attention:
            query, (key, value) = attn.to_q(hidden_states), attn.to_kv(context).chunk(2, dim=-1)
        else:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in (query, key, value))
        query, key = attn.norm_q(query), attn.norm_k(key)
        out = attention(query, key, value, mask=attention_mask, backend=self._attention_backend)
        return attn.to_out(out.flatten(-2))


class QKNorm(nn.RMSNorm):
    """RMSNorm over a head that keeps the dtype of its input, which autocast would make float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(x.dtype)
        return nn.functional.rms_norm(x, self.normalized_shape, weight, self.eps).to(x.dtype)


class VidTwinAttention(nn.Module, AttentionModuleMixin):
    """Self-attention, or cross-attention on vectors of size `cross_attention_dim`."""

    _default_processor_cls = VidTwinAttnProcessor
    _available_processors = [VidTwinAttnProcessor]

    def __init__(
        self, dim: int, heads: int, dim_head: int, qk_norm: str | None, cross_attention_dim: int | None = None
    ) -> None:
        super().__init__()
        self.heads = heads
        self.use_bias = True
        self.is_cross_attention = cross_attention_dim is not None
        context_dim = cross_attention_dim or dim
        self.to_q = nn.Linear(dim, heads * dim_head)
        self.to_k = nn.Linear(context_dim, heads * dim_head)
        self.to_v = nn.Linear(context_dim, heads * dim_head)
        self.to_out = nn.Linear(heads * dim_head, dim)
        self.norm_q = QKNorm(dim_head, eps=1e-6) if qk_norm else nn.Identity()
        self.norm_k = QKNorm(dim_head, eps=1e-6) if qk_norm else nn.Identity()
        self.set_processor(VidTwinAttnProcessor())

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, S, D), for cross-attention (B, S', D'), optionally with a bool mask (B, 1, S, S') -> (B, S, D)."""
        if attention_mask is None:
            return self.processor(self, hidden_states, encoder_hidden_states)
        return self.processor(self, hidden_states, encoder_hidden_states, attention_mask)


def modulate(
    hidden_states: torch.Tensor,
    lengths: tuple[int, int],
    scale: torch.Tensor,
    shift: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Scale and shift the tokens of each stream by that stream's vectors.

    Args:
        hidden_states: (B, S, D), S = sum(lengths).
        lengths: numbers of structure and of dynamics tokens.
        scale, shift: (B, 2, D), or (B, 1 + R, D) with one for structure and one for each of R rows of dynamics tokens.
        dtype: dtype of the result; None: as PyTorch promotes the arguments.
    """
    streams = []
    for i, tokens in enumerate(hidden_states.split(lengths, dim=1)):
        tokens = tokens * spread_over_tokens(scale, i, lengths[i])
        streams.append(tokens if shift is None else tokens + spread_over_tokens(shift, i, lengths[i]))
    modulated = torch.cat(streams, dim=1)
    return modulated if dtype is None else modulated.to(dtype)


def spread_over_tokens(vectors: torch.Tensor, stream: int, length: int) -> torch.Tensor:
    """Return the vectors of a stream's tokens: (B, 1, D) if they share one, else (B, length, D).

    Args:
        vectors: (B, 2, D), or (B, 1 + R, D) with one for each of R rows of dynamics tokens; structure first.
        stream: 0 for structure, 1 for dynamics.
        length: number of the stream's tokens.
    """
    vectors = vectors[:, 1:] if stream else vectors[:, :1]
    rows = vectors.shape[1]
    return vectors if rows == 1 else vectors.repeat_interleave(length // rows, dim=1)


def widen_float16(modulation: torch.Tensor) -> tuple[torch.Tensor, torch.dtype | None]:
    """Convert a float16 modulation to float32, and return the dtype of the layers' input; others unchanged, and None.

    Gated branches and the residual stream of trained models exceed 65504, the largest value of float16. A float32
    modulation makes both float32.
    """
    return (modulation.float(), modulation.dtype) if modulation.dtype == torch.float16 else (modulation, None)


class VidTwinTransformerBlock(nn.Module):
    """A DiT block with adaLN-Zero (Peebles and Xie 2023) per stream.

    Cross-attention to a class and to caption tokens is optional; both are added to the residual stream, as in PixArt
    (Chen et al., arXiv 2310.00426, Section 2.3).
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        mlp_ratio: float,
        qk_norm: str | None,
        cross_attention_dim: int | None = None,
        has_captions: bool = False,
    ) -> None:
        super().__init__()
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn1 = VidTwinAttention(dim, heads, dim_head, qk_norm)
        self.attn2 = None
        if cross_attention_dim is not None:
            self.norm2 = FP32LayerNorm(dim, eps=1e-6)  # its input is float32 even if its weights are float16
            self.attn2 = VidTwinAttention(dim, heads, dim_head, qk_norm, cross_attention_dim)
        self.attn3 = None
        if has_captions:
            self.norm_caption = FP32LayerNorm(dim, eps=1e-6)
            self.attn3 = VidTwinAttention(dim, heads, dim_head, qk_norm, dim)
        self.norm3 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.ff = FeedForward(dim, mult=mlp_ratio, activation_fn="gelu-approximate")

    def forward(
        self,
        hidden_states: torch.Tensor,
        conditioning: torch.Tensor,
        lengths: tuple[int, int],
        class_embedding: torch.Tensor | None = None,
        modulation: torch.Tensor | None = None,
        captions: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """(B, S, D), conditioning (B, 2, D) or (B, 1 + R, D), class_embedding (B, 1, class_embed_dim) -> (B, S, D).

        Args:
            modulation: the precomputed output of `self.modulation`, (B, 2, 6 D) or (B, 1 + R, 6 D); None: computed
                from `conditioning`.
            captions: caption tokens (B, N, D), and which of them each token attends to, bool (B, 1, S, N).
        """
        x = hidden_states
        modulation = self.modulation(conditioning) if modulation is None else modulation
        modulation, dtype = widen_float16(modulation)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=-1)
        attended = self.attn1(modulate(self.norm1(x), lengths, 1 + scale_a, shift_a, dtype))
        x = x + modulate(attended, lengths, gate_a)
        if self.attn2 is not None:
            normed = self.norm2(x)
            x = x + self.attn2(normed if dtype is None else normed.to(dtype), class_embedding)
        if self.attn3 is not None:
            normed = self.norm_caption(x)
            x = x + self.attn3(normed if dtype is None else normed.to(dtype), *captions)
        return x + modulate(self.ff(modulate(self.norm3(x), lengths, 1 + scale_m, shift_m, dtype)), lengths, gate_m)


# Tells Diffusers' hooks that skip whole blocks (FirstBlockCache, MagCache, layer skip) what a block returns, and those
# that skip attention (guiders) what to return instead.
TransformerBlockRegistry.register(VidTwinTransformerBlock, TransformerBlockMetadata(return_hidden_states_index=0))
AttentionProcessorRegistry.register(
    VidTwinAttnProcessor, AttentionProcessorMetadata(skip_processor_output_fn=lambda _, hidden_states: hidden_states)
)
