"""A tiny text encoder with random weights, of the class that is trained with a DiT."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipelines.text import TextEncoder
from vidgen.data.config import TextConfig
from vidgen.training.text import build_small_model, train_tokenizer

TEXTS = ("a red disc orbits", "a blue star spins over dark green", "two dogs jump", "a ring zooms")


def tiny_text_encoder(texts: Sequence[str] = TEXTS, max_length: int = 24, hidden_size: int = 16) -> TextEncoder:
    torch.manual_seed(0)
    sizes = TextConfig(max_length=max_length, hidden_size=hidden_size, num_layers=1, num_attention_heads=2)
    tokenizer = train_tokenizer(list(texts), 300)
    tokenizer.model_max_length = max_length
    model = build_small_model(sizes, tokenizer)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return TextEncoder(tokenizer, model.eval().requires_grad_(False))
