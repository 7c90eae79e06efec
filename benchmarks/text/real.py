"""Caption ranking of real and generated clips, such as those of robot arms, by a matcher of video and text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pipelines import VidTwinPipeline
from vidgen.common.errors import UserError
from vidgen.common.images import to_uint8
from vidgen.common.io import atomic_write
from vidgen.data.captions import read_captions
from vidgen.data.listing import list_videos
from vidgen.metrics.detectors import Detector
from vidgen.metrics.fvd import Sampling

from ..common.generation import sample_clips
from ..common.harness import digest
from ..real.clips import Clips, read_clips, to_float
from ..real.memorization import copy_features, measure_memorization
from ..real.reconstruction import interval, reconstruct_with
from .matcher import BATCH, CANDIDATES, VideoTextMatcher, clip_features, rank_captions

DRAWS = 20  # sets of candidates


@dataclass(frozen=True)
class CaptionedClips:
    """Clips in memory with the captions of each."""

    clips: Clips
    captions: list[tuple[str, ...]]

    @classmethod
    def read(cls, lists: Sequence[Path], *arguments: Any, **options: Any) -> CaptionedClips:
        """Read clips of lists with a column `caption`, as `read_clips`, without clips that have no caption.

        Raises:
            UserError: the errors of `read_clips`; if no clip has a caption.
        """
        by_path: dict[str, tuple[str, ...]] = {}
        for root in lists:
            files, _ = list_videos(root)
            captions = read_captions(root, files)
            by_path |= {str(file.path): texts for file, texts in zip(files, captions, strict=True)}
        clips = read_clips(lists, *arguments, **options)
        captioned = [i for i, path in enumerate(clips.paths) if any(by_path[path])]
        if not captioned:
            raise UserError(f"{', '.join(map(str, lists))}: no video has a caption, in a column 'caption'.")
        clips = clips.select(captioned)
        return cls(clips, [by_path[path] for path in clips.paths])

    @property
    def first_captions(self) -> list[str]:
        """The first caption of each clip, which is its prompt and the right one to rank."""
        return [texts[0] for texts in self.captions]


def fit_matcher(training: CaptionedClips, detectors: Sequence[Detector], folder: Path) -> VideoTextMatcher:
    """Fit the matcher to all captions of the training clips; features are kept in a file of the folder."""
    pixels = training.clips.pixels
    networks = [(detector.name, detector.sha256) for detector in detectors]
    key = digest([training.clips.paths, list(pixels.shape), networks])
    path = folder / f"features-{key}.safetensors"
    if not path.exists():
        with atomic_write(path) as unfinished:
            save_file({"features": clip_features(pixels, detectors)}, unfinished)
    features = load_file(path)["features"]
    pairs = [(i, text) for i, texts in enumerate(training.captions) for text in texts]
    return VideoTextMatcher.fit(features[[i for i, _ in pairs]], [text for _, text in pairs])


def sample_captions(pipeline: VidTwinPipeline, test: CaptionedClips, sampling: Sampling, path: Path) -> torch.Tensor:
    """A clip of each test clip's caption, uint8 (N, 3, T, H, W), kept in a file."""
    if not path.exists():
        clips = to_uint8(sample_clips(pipeline, len(test.clips), sampling, prompt=test.first_captions)).contiguous()
        with atomic_write(path) as unfinished:
            save_file({"clips": clips}, unfinished)
    return load_file(path)["clips"]


@torch.no_grad()
def reconstruct_clips(pipeline: VidTwinPipeline, test: CaptionedClips) -> torch.Tensor:
    """The autoencoder's reconstructions of the test clips, uint8."""
    reconstruct = reconstruct_with(pipeline.autoencoder)
    return torch.cat([to_uint8(reconstruct(x.float() / 127.5 - 1)) for x in test.clips.pixels.split(BATCH)])


def measure_copies(generated: torch.Tensor, test: CaptionedClips, training: CaptionedClips) -> dict[str, Any]:
    """How much nearer to training clips generated clips (uint8) are than test clips; see `measure_memorization`."""
    sets = (generated, test.clips.pixels, training.clips.pixels)
    return measure_memorization(*(torch.cat([copy_features(to_float(x)) for x in xs.split(BATCH)]) for xs in sets))


def measure_ranking(
    matcher: VideoTextMatcher, sets: dict[str, torch.Tensor], test: CaptionedClips, detectors: Sequence[Detector]
) -> dict[str, Any]:
    """Rank the right caption of clips among ten, for sets of clips that have the captions of `test`.

    The figures of each clip are means over `DRAWS` sets of candidates.

    Returns:
        `clips`, `groups`, `candidates`; `chance` and by set the mean `reciprocal_rank` and the fraction `top_1` of
        clips whose right caption is first, with intervals over groups; `relative`, by set where its reciprocal rank
        is between chance (0) and that of real clips (1).
    """
    captions, groups = test.first_captions, test.clips.groups
    candidates = min(CANDIDATES, len(set(captions)))
    chance = sum(1 / rank for rank in range(1, candidates + 1)) / candidates
    scores = {}
    for name, pixels in sets.items():
        similarity = matcher.similarity(clip_features(pixels, detectors), captions)
        ranks = torch.stack([rank_captions(similarity, captions, seed) for seed in range(DRAWS)])
        scores[name] = {
            "reciprocal_rank": interval((1 / ranks).mean(dim=0).tolist(), groups),
            "top_1": interval((ranks == 1).double().mean(dim=0).tolist(), groups),
        }
    span = scores["real"]["reciprocal_rank"]["mean"] - chance
    relative = {name: (score["reciprocal_rank"]["mean"] - chance) / span for name, score in scores.items()}
    return {
        "clips": len(captions),
        "groups": len(set(groups)),
        "candidates": candidates,
        "chance": {"reciprocal_rank": chance, "top_1": 1 / candidates},
        "sets": scores,
        "relative": relative if span > 0 else {},
    }
