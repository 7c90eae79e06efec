"""The spatio-temporal transformer of VidTwin's encoder and decoder (VidTwin, arXiv 2412.17726, Section 3.1).

Hidden states are (B, T, S, D): T frames of S = h * w patches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin, FeedForward
from torch import nn

from .attention import attention


def sincos_1d(length: int, dim: int) -> torch.Tensor:
    """Return a fixed 1-D position embedding, sines then cosines, base 10000: (length, dim), float64."""
    frequencies = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_2d(height: int, width: int, dim: int) -> torch.Tensor:
    """Return a fixed 2-D position embedding of a row-major grid: (height * width, dim), float64.

    The first half of the channels encodes the column, the second half the row.
    """
    column = sincos_1d(width, dim // 2).repeat(height, 1)
    row = sincos_1d(height, dim // 2).repeat_interleave(width, dim=0)
    return torch.cat([column, row], dim=1)


def modulated_norm(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Compute LN(x) * (1 + scale) + shift over the last axis: (..., D) with scale and shift (D,) -> (..., D)."""
    return F.layer_norm(x, x.shape[-1:], (1 + scale).to(x.dtype), shift.to(x.dtype), eps=1e-6)


class SelfAttnProcessor:
    """Multi-head self-attention with one projection to queries, keys and values."""

    _attention_backend = None  # set by `set_attention_backend`

    def __call__(self, attn: SelfAttention, hidden_states: torch.Tensor) -> torch.Tensor:
        *batch, length, dim = hidden_states.shape
        qkv = attn.qkv(hidden_states).view(-1, length, 3, attn.num_heads, dim // attn.num_heads)
        out = attention(*qkv.unbind(2), is_causal=attn.is_causal, backend=self._attention_backend)
        return attn.proj(out.reshape(*batch, length, dim))


class SelfAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention over the next-to-last axis of (..., S, D)."""

    _default_processor_cls = SelfAttnProcessor
    _available_processors = [SelfAttnProcessor]
    _supports_qkv_fusion = False  # they are one layer already

    def __init__(self, dim: int, num_heads: int, is_causal: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.is_causal = is_causal
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.set_processor(SelfAttnProcessor())

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.processor(self, hidden_states)


class VidTwinBlock(nn.Module):
    """Spatial attention, causal temporal attention and an MLP, modulated by a learned table without a timestep."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, temporal_causal: bool) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)
        self.spatial_attn = SelfAttention(dim, num_heads)
        self.temporal_attn = SelfAttention(dim, num_heads, is_causal=temporal_causal)
        self.mlp = FeedForward(dim, mult=mlp_ratio, activation_fn="gelu-approximate")

    def forward(self, hidden_states: torch.Tensor, temporal_position: torch.Tensor | None = None) -> torch.Tensor:
        """(B, T, S, D) -> (B, T, S, D); `temporal_position` (T, 1, D) is added on the temporal branch only."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.scale_shift_table
        x = hidden_states
        x = x + gate_a * self.spatial_attn(modulated_norm(x, scale_a, shift_a))
        # The temporal branch takes the residual stream without normalization and shares the spatial branch's gate.
        over_time = x if temporal_position is None else x + temporal_position
        # Contiguous, since a linear layer copies weights without gradients for every row of a strided input: a frozen
        # model, or one under autocast in inference_mode, would be three times slower.
        over_time = over_time.transpose(1, 2).contiguous()
        x = x + gate_a * self.temporal_attn(over_time).transpose(1, 2)
        return x + gate_m * self.mlp(modulated_norm(x, scale_m, shift_m))


class VidTwinFirstBlock(VidTwinBlock):
    """The first block of a stack, the only one with a temporal position embedding.

    It is a separate class so that compilation block by block makes one graph per class.
    """

    def forward(self, hidden_states: torch.Tensor, temporal_position: torch.Tensor) -> torch.Tensor:
        """(B, T, S, D) and (T, 1, D) -> (B, T, S, D)."""
        return super().forward(hidden_states, temporal_position)


class VidTwinTransformer(nn.Module):
    """A stack of blocks with position embeddings, for T frames of a fixed grid (h, w) of patches."""

    def __init__(
        self,
        dim: int,
        num_layers: int,
        num_heads: int,
        num_frames: int,
        grid: tuple[int, int],
        mlp_ratio: float = 4.0,
        temporal_causal: bool = True,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [
                (VidTwinBlock if i else VidTwinFirstBlock)(dim, num_heads, mlp_ratio, temporal_causal)
                for i in range(num_layers)
            ]
        )
        self.register_buffer("position", sincos_2d(*grid, dim).float(), persistent=False)
        self.register_buffer("temporal_position", sincos_1d(num_frames, dim).float()[:, None], persistent=False)
        self.gradient_checkpointing = False

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, S, D) -> (B, T, S, D)."""
        # Buffers also change device, since a model on several devices keeps them on one.
        hidden_states = hidden_states + self.position.to(hidden_states)
        extra = (self.temporal_position.to(hidden_states),)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, *extra)
            else:
                hidden_states = block(hidden_states, *extra)
            extra = ()
        return hidden_states

    def reset_parameters(self) -> None:
        """Initialize linear layers Xavier-uniform with zero bias, and temporal attention as a no-op."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            nn.init.zeros_(block.temporal_attn.proj.weight)
