"""What the tests of Diffusers' conventions share, of models and of pipelines."""

from __future__ import annotations

import pytest
import torch

# How a model is saved, and a file that must be there then.
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
    """Root mean square of the difference over that of what is expected."""
    return ((actual.float() - expected).square().mean() / expected.square().mean()).sqrt().item()
