from __future__ import annotations

import pytest
import torch

from pipelines.embeddings import TwinConditionEmbedding, patchify, sincos_positions, unpatchify


@pytest.mark.parametrize(
    ("shape", "patch_size"),
    [((4, 16, 7, 7), (1, 1, 1)), ((4, 16, 7, 7), (16, 1, 1)), ((3, 4, 6, 2), (2, 3, 2)), ((8, 16, 14), (4, 7))],
)
def test_unpatchify_inverts_patchify(shape, patch_size):
    latent = torch.arange(2 * torch.Size(shape).numel()).reshape(2, *shape)
    tokens = patchify(latent, patch_size)
    assert tokens.shape[2] == torch.Size(patch_size).numel() * shape[0]
    assert torch.equal(unpatchify(tokens, patch_size, shape), latent)


def test_patches_are_row_major_with_the_channel_innermost():
    latent = torch.arange(2 * 4 * 6).reshape(1, 2, 4, 6)
    tokens = patchify(latent, (2, 3))
    assert tokens.shape == (1, 4, 12)
    second = latent[0, :, 0:2, 3:6]  # first row of patches, second column
    assert torch.equal(tokens[0, 1], second.permute(1, 2, 0).flatten())


@pytest.mark.parametrize(("grid", "dim"), [((16, 7, 7), 1152), ((16, 7, 7), 64), ((16, 14), 192), ((3, 2, 2), 48)])
def test_positions_are_distinct(grid, dim):
    position = sincos_positions(grid, dim)
    assert position.shape == (torch.Size(grid).numel(), dim)
    assert position.dtype == torch.float32
    distance = torch.cdist(position, position) + torch.eye(len(position))
    assert distance.min() > 1e-2


def test_positions_give_each_axis_its_own_channels():
    position = sincos_positions((2, 3, 4), 24).reshape(2, 3, 4, 24)
    for axis, channels in enumerate((slice(0, 8), slice(8, 16), slice(16, 24))):
        others = [i for i in range(3) if i != axis]
        moved = position[..., channels].movedim((axis, *others), (0, 1, 2))
        assert torch.equal(moved, moved[:, :1, :1].expand_as(moved))
        assert not torch.equal(moved[0], moved[1])


def test_conditioning_depends_on_both_noise_levels_stream_and_class():
    torch.manual_seed(0)
    embed = TwinConditionEmbedding(16, num_classes=2)

    def condition(structure: float, dynamics: float, label: int) -> torch.Tensor:
        return embed(torch.tensor([[structure, dynamics]]), torch.tensor([label]), torch.float32)[0]

    base = condition(10, 500, 0)
    assert base.shape == (2, 16)
    for other in (condition(11, 500, 0), condition(10, 501, 0), condition(10, 500, 2)):
        assert ((base - other).abs().amax(dim=1) > 1e-6).all()  # both streams notice
    same = condition(10, 10, 0)
    assert not torch.allclose(same[0], same[1])


def test_timestep_frequencies_are_computed_in_float32():
    embed = TwinConditionEmbedding(16).to(torch.bfloat16)
    one, next_one = (embed(torch.tensor([[t, t]]), None, torch.bfloat16) for t in (996, 997))
    assert torch.tensor(996, dtype=torch.bfloat16) == torch.tensor(997, dtype=torch.bfloat16)
    assert not torch.equal(one, next_one)
