"""Block PCA: orthonormal components, exact at full rank, better with more of them, the same for any batching."""

from __future__ import annotations

import pytest
import torch

from vidgen.common.errors import UserError
from vidgen.metrics import block_pca
from vidgen.metrics.block_pca import BlockPCA
from vidgen.metrics.reconstruction import psnr

BLOCK = (2, 2, 4)  # of 48 values
SIZE = 48


@pytest.fixture
def clips() -> torch.Tensor:
    """Smooth clips with some noise: (6, 3, 4, 8, 8)."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(6, 3, 2, 2, 2, generator=generator) * 1.6 - 0.8
    smooth = torch.nn.functional.interpolate(coarse, size=(4, 8, 8), mode="trilinear")
    return smooth + 0.05 * torch.randn(smooth.shape, generator=generator)


def test_components_are_orthonormal_and_sorted_by_variance(clips):
    pca = BlockPCA.fit([clips], BLOCK, SIZE)
    assert torch.allclose(pca.basis.T @ pca.basis, torch.eye(SIZE), atol=1e-5)
    rows = block_pca._cut(clips, BLOCK) - pca.mean
    variances = (rows @ pca.basis).square().mean(dim=0)
    assert (variances.diff() <= 1e-6).all() and variances[0] > 10 * variances[-1]


def test_full_rank_is_exact_and_each_component_helps(clips):
    pca = BlockPCA.fit([clips], BLOCK, SIZE)
    assert torch.allclose(pca.reconstruct(clips, SIZE), clips, atol=1e-5)
    values = [psnr(pca.reconstruct(clips, k), clips, quantize=False).mean() for k in (1, 2, 4, 8, 16, 32)]
    assert all(low < high for low, high in zip(values, values[1:], strict=False))


def test_few_components_equal_those_of_the_full_decomposition(clips):
    few = BlockPCA.fit([clips], BLOCK, 3)  # by Lanczos iterations
    full = BlockPCA.fit([clips], BLOCK, SIZE)
    assert torch.allclose(few.reconstruct(clips, 3), full.reconstruct(clips, 3), atol=1e-5)


def test_the_fit_does_not_depend_on_batches(clips, monkeypatch):
    whole = BlockPCA.fit([clips], BLOCK, 5)
    monkeypatch.setattr(block_pca, "BLOCKS_AT_ONCE", 7)
    parts = BlockPCA.fit(clips.split(2), BLOCK, 5)
    assert torch.allclose(whole.mean, parts.mean, atol=1e-6)
    assert torch.allclose(whole.reconstruct(clips, 5), parts.reconstruct(clips, 5), atol=1e-5)


def test_it_is_the_best_linear_code_of_its_size(clips):
    pca = BlockPCA.fit([clips], BLOCK, 4)
    random = torch.linalg.qr(torch.randn(SIZE, 4, generator=torch.Generator().manual_seed(1))).Q
    other = BlockPCA(BLOCK, pca.mean, random)
    errors = [(p.reconstruct(clips, 4) - clips).square().mean() for p in (pca, other)]
    assert errors[0] < errors[1] / 4


def test_saved_and_loaded(clips, tmp_path):
    pca = BlockPCA.fit([clips], BLOCK, 4)
    pca.save(tmp_path / "pca.safetensors")
    loaded = BlockPCA.load(tmp_path / "pca.safetensors")
    assert loaded.block == BLOCK
    assert torch.equal(loaded.reconstruct(clips, 4), pca.reconstruct(clips, 4))
    assert pca.count_values(clips.shape[1:], 4) == 4 * 2 * 4 * 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda clips: BlockPCA.fit([], BLOCK, 4), "one clip or more"),
        (lambda clips: BlockPCA.fit([clips], BLOCK, SIZE + 1), "1 to 48 components, not 49"),
        (lambda clips: BlockPCA.fit([clips], (3, 2, 4), 4), r"\(4, 8, 8\) cannot be cut into blocks of \(3, 2, 4\)"),
        (lambda clips: BlockPCA.fit([clips], BLOCK, 4).reconstruct(clips, 5), "1 to 4 components, not 5"),
    ],
)
def test_wrong_sizes_are_one_sentence(clips, make, message):
    with pytest.raises(UserError, match=message):
        make(clips)
