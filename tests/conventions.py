"""Shared by the tests of Diffusers' conventions, for models and pipelines."""

from __future__ import annotations

import pytest
import torch

# Arguments of save_pretrained, and a file that it must write.
every_kind_of_file = pytest.mark.parametrize(
    ("how", "file"),
    [
        ({"variant": "fp16"}, "diffusion_pytorch_model.fp16.safetensors"),
        ({"safe_serialization": False}, "diffusion_pytorch_model.bin"),
        ({"max_shard_size": "150KB"}, "diffusion_pytorch_model.safetensors.index.json"),
        ({"max_shard_size": "150KB", "variant": "fp16"}, "diffusion_pytorch_model.safetensors.index.fp16.json"),
    ],
    ids=["variant", "bin", "shards", "variant-shards"],
)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the root mean square of the difference relative to that of the expected values."""
    return ((actual.float() - expected).square().mean() / expected.square().mean()).sqrt().item()
