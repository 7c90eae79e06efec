"""A small video-text matcher, which ranks the right caption of a clip among ten.

Canonical correlation analysis projects features of clips and bags of words of captions to one space, where similarity
is a cosine. It is fitted in closed form, in seconds, to a few hundred captioned clips. Its ranking of real held-out
clips bounds that of generated ones and is reported with it.

    matcher = VideoTextMatcher.fit(clip_features(clips, detectors), captions)
    ranks = rank_captions(matcher.similarity(clip_features(others, detectors), captions), captions)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vidgen.common.correlation import correlate
from vidgen.common.errors import UserError
from vidgen.common.progress import progress
from vidgen.data.words import bag_words, weigh_words
from vidgen.metrics.detectors import Detector

CANDIDATES = 10
DIM = 32  # canonical directions
RIDGE = 10.0  # relative to the mean variance of a feature, or of a word
MIN_COUNT = 3  # captions with a word of the vocabulary
BATCH = 8


@dataclass(frozen=True)
class VideoTextMatcher:
    """Linear projections of standardized features and of centered bags of words.

    Attributes:
        word_weights: inverse document frequency of each word of the vocabulary.
        feature_mean, feature_std: (D,) over the training clips.
        bag_mean: (V,) over the training clips.
        video_projection: (D, K).
        text_projection: (V, K).
    """

    word_weights: dict[str, float]
    feature_mean: torch.Tensor
    feature_std: torch.Tensor
    bag_mean: torch.Tensor
    video_projection: torch.Tensor
    text_projection: torch.Tensor

    @classmethod
    def fit(cls, features: torch.Tensor, captions: Sequence[str]) -> VideoTextMatcher:
        """Fit a matcher to features (N, D) of clips, and their N captions.

        Raises:
            UserError: if no word is in `MIN_COUNT` different captions.
        """
        weights = weigh_words(captions, MIN_COUNT)
        if not weights:
            raise UserError(f"the captions have no word in common: a matcher requires words of {MIN_COUNT} captions.")

        # Standardize features, and center bags of words.
        features = features.double()
        mean, std = features.mean(dim=0), features.std(dim=0).clamp(min=1e-3)
        x, y = (features - mean) / std, bag_words(captions, weights)
        bag_mean = y.mean(dim=0)
        projections = correlate(x, y - bag_mean, DIM, RIDGE)
        return cls(weights, mean, std, bag_mean, *projections)

    def similarity(self, features: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
        """Cosines (N, M) of features (N, D) of clips with M captions."""
        videos = (features.double() - self.feature_mean) / self.feature_std @ self.video_projection
        texts = (bag_words(captions, self.word_weights) - self.bag_mean) @ self.text_projection
        return F.normalize(videos, dim=1) @ F.normalize(texts, dim=1).T


@torch.no_grad()
def clip_features(pixels: torch.Tensor, detectors: Sequence[Detector]) -> torch.Tensor:
    """Features (N, D) of clips, uint8 (N, 3, T, H, W).

    Features of frames are summarized by their mean, standard deviation and change from the first to the last quarter.
    """
    rows = []
    for batch in progress(pixels.split(BATCH), "features"):
        columns = []
        for detector in detectors:
            features = detector(batch.float() / 127.5 - 1).float().cpu()
            if len(features) != len(batch):
                frames = features.unflatten(0, (len(batch), -1))
                quarter = max(1, frames.shape[1] // 4)
                change = frames[:, -quarter:].mean(dim=1) - frames[:, :quarter].mean(dim=1)
                features = torch.cat([frames.mean(dim=1), frames.std(dim=1), change], dim=1)
            columns.append(features)
        rows.append(torch.cat(columns, dim=1))
    return torch.cat(rows)


def rank_captions(similarity: torch.Tensor, captions: Sequence[str], seed: int = 0) -> torch.Tensor:
    """The rank of each clip's caption among `CANDIDATES` different ones, (N,), from 1; half ranks are ties.

    The same clips have the same candidates in each call. If there are fewer different captions, all are candidates.

    Args:
        similarity: (N, N) of N clips with the N captions.
        captions: caption i is that of clip i.
        seed: of the other candidates.
    """
    generator, ranks = torch.Generator().manual_seed(seed), []
    for i, row in enumerate(similarity):
        others: dict[str, int] = {}
        for j in torch.randperm(len(captions), generator=generator).tolist():
            if captions[j] != captions[i]:
                others.setdefault(captions[j], j)
        rivals = row[list(others.values())[: CANDIDATES - 1]]
        ranks.append(1 + (rivals > row[i]).sum().item() + (rivals == row[i]).sum().item() / 2)
    return torch.tensor(ranks, dtype=torch.float64)
