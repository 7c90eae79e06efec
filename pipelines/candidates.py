"""The best of several candidates: the video whose class a classifier finds most probable."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .motion_classifier import MotionClassifier


def check_candidates(classifier: MotionClassifier | None, labels: Sequence[str | None], output_type: str) -> None:
    """Raise a `ValueError` unless a classifier can choose among videos of these classes.

    Args:
        labels: names of the classes; None for no class.
        output_type: of the pipeline.
    """
    if classifier is None:
        raise ValueError("num_candidates above 1 requires a pipeline with a classifier, which chooses among them.")
    if output_type == "latent":
        raise ValueError('num_candidates above 1 requires decoded videos, not output_type="latent".')
    known = list(classifier.config.classes)
    for label in labels:
        if label not in known:
            found = "videos without class" if label is None else f"class {label!r}"
            raise ValueError(f"num_candidates must be 1 for {found}: the classifier knows {', '.join(known)}.")


@torch.no_grad()
def choose_candidates(
    candidates: Sequence[torch.Tensor], labels: Sequence[str], classifier: MotionClassifier
) -> torch.Tensor:
    """For each video the candidate whose class is the most probable; of equal ones the first.

    Args:
        candidates: clips (B, 3, T, H, W) in [-1, 1] each, on the device where the classifier runs.
        labels: names of the B classes.

    Returns:
        Clips (B, 3, T, H, W).
    """
    classes = list(classifier.config.classes)
    wanted = torch.tensor([classes.index(label) for label in labels], device=candidates[0].device)
    scores = []
    for clips in candidates:
        logits = classifier(clips.to(classifier.dtype)).float()
        scores.append(logits.log_softmax(dim=1).gather(1, wanted[:, None]).squeeze(1))
    best = torch.stack(scores).argmax(dim=0)
    return torch.stack(list(candidates))[best, torch.arange(len(wanted), device=best.device)]
