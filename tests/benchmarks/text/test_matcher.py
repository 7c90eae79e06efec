"""The video-text matcher finds captions from features of clips, and only from these."""

from __future__ import annotations

import pytest
import torch

from benchmarks.text.matcher import VideoTextMatcher, clip_features, rank_captions
from vidgen.common.errors import UserError
from vidgen.metrics.detectors import get_detector

VERBS, OBJECTS, ROOMS = ("open", "close", "move", "lift"), ("cup", "drawer", "lid", "cloth"), ("kitchen", "office")


def captions_and_features(count: int, seed: int) -> tuple[list[str], torch.Tensor]:
    """Captions of verb, object and room, and features that depend on these linearly, with noise."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(len(words), (count,), generator=generator) for words in (VERBS, OBJECTS, ROOMS)]
    captions = [f"{VERBS[v]} the {OBJECTS[o]} in the {ROOMS[r]}" for v, o, r in zip(*drawn, strict=True)]
    weights = torch.randn(10, 24, generator=torch.Generator().manual_seed(0))
    one_hot = [torch.nn.functional.one_hot(x, len(w)) for x, w in zip(drawn, (VERBS, OBJECTS, ROOMS), strict=True)]
    features = torch.cat(one_hot, dim=1).float() @ weights
    return captions, features + 0.3 * torch.randn(count, 24, generator=generator)


def test_a_matcher_ranks_unseen_clips_and_has_chance_without_their_features():
    captions, features = captions_and_features(400, 1)
    matcher = VideoTextMatcher.fit(features, captions)
    others, unseen = captions_and_features(100, 2)
    ranks = rank_captions(matcher.similarity(unseen, others), others)
    assert (1 / ranks).mean() > 0.85
    shuffled = rank_captions(matcher.similarity(unseen.roll(7, dims=0), others), others)
    assert (1 / shuffled).mean() < 0.45  # chance is 0.29; some neighbors share words


def test_ranks_count_rivals_with_other_captions_and_half_of_ties():
    captions = [f"caption {i}" for i in range(12)]
    similarity = torch.zeros(12, 12)
    assert rank_captions(similarity, captions).unique().tolist() == [5.5]
    similarity += torch.eye(12)
    assert rank_captions(similarity, captions).tolist() == [1] * 12
    assert rank_captions(-similarity, captions).tolist() == [10] * 12
    assert rank_captions(-similarity[:4, :4], ["a", "a", "b", "c"]).tolist() == [3] * 4  # of 3 different captions


def test_captions_without_a_common_word_are_refused():
    with pytest.raises(UserError, match="no word in common"):
        VideoTextMatcher.fit(torch.randn(3, 4), ["a b", "c d", "e f"])


def test_features_of_frames_are_summarized():
    class MeanColor(torch.nn.Module):
        def forward(self, clips):
            return clips.mean(dim=(3, 4)).transpose(1, 2).flatten(0, 1)

    pixels = torch.randint(256, (9, 3, 8, 16, 16), dtype=torch.uint8)
    features = clip_features(pixels, [MeanColor(), get_detector("pooled_pixels")])
    assert features.shape == (9, 3 * 3 + 128)
    frames = (pixels.float() / 127.5 - 1).mean(dim=(3, 4))
    torch.testing.assert_close(features[:, :3], frames.mean(dim=2))
    torch.testing.assert_close(features[:, 6:9], frames[:, :, -2:].mean(dim=2) - frames[:, :, :2].mean(dim=2))
