"""Self-alignment of the DiT: tokens of an earlier block become similar to those of a later one, without a teacher.

LayerSync (Haghighi et al., arXiv 2510.12581, Section 3): later blocks of a diffusion transformer hold the better
representation of the clip, except for the last ones, which prepare the output. The earlier block learns from them by
the cosine similarity of every token, with a stop-gradient at the later block. Both are hidden states of the same
forward pass, so nothing is computed but the similarity, and there are no further parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..common.errors import UserError

# The paper aligns block 8 with block 16 of the 28 of SiT-XL/2.
EARLIER, LATER = 8 / 28, 16 / 28


def choose_layers(layers: Sequence[int], num_layers: int) -> tuple[int, int]:
    """The numbers of the earlier and the later block, from 1; by default at the paper's fractions of the depth.

    Args:
        layers: two numbers, or none for the default.
        num_layers: blocks of the DiT.

    Raises:
        UserError: if they are not two numbers of blocks in ascending order, or the DiT has a single block.
    """
    if not layers and num_layers > 1:
        earlier = max(round(EARLIER * num_layers), 1)
        return earlier, max(round(LATER * num_layers), earlier + 1)
    if len(layers) != 2 or not 1 <= layers[0] < layers[1] <= num_layers:
        raise UserError(
            "diffusion.self_alignment_layers must be the numbers of an earlier and a later block, such as [2, 4], "
            f"between 1 and {num_layers}, the number of blocks of the DiT, not {list(layers)}."
        )
    return layers[0], layers[1]


def self_alignment_loss(earlier: torch.Tensor, later: torch.Tensor) -> torch.Tensor:
    """1 - cosine similarity of tokens (B, S, D), averaged over all tokens; a scalar in [0, 2].

    The later tokens get no gradient.
    """
    return 1 - F.cosine_similarity(earlier.float(), later.detach().float(), dim=-1).mean()
