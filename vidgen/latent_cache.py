"""Clips encoded once: the posterior of every training clip, kept on disk for any number of DiT runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset, TensorDataset

from autoencoder import AutoencoderKLVidTwin, TwinPosterior

from .data.dataset import BadVideos, ClipDataset, collate_clips
from .errors import UserError
from .files import written_aside
from .progress import progress

TENSORS, INDEX = "latents.safetensors", "index.json"


@torch.no_grad()
def encode_clips(
    vae: AutoencoderKLVidTwin,
    clips: ClipDataset,
    device: torch.device | str,
    batch_size: int = 8,
    num_workers: int = 0,
) -> Iterator[tuple[TwinPosterior, dict[str, Any]]]:
    """Each batch of a data set's clips, in order, with the posterior (over (b, L), float32, on the CPU)."""
    loader = DataLoader(clips, batch_size=batch_size, num_workers=num_workers, collate_fn=collate_clips)
    for batch in progress(loader, "encoding"):
        posterior = vae.encode(batch["video"].to(device, vae.dtype)).latent_dist
        yield TwinPosterior(posterior.mean.float().cpu(), posterior.logvar.float().cpu()), batch


def stream_statistics(means: torch.Tensor, vae: AutoencoderKLVidTwin) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of packed latents (N, L), of [structure, dynamics]; 0 and 1 for an empty one."""
    latents = vae.unpack(means)
    streams = [latents.structure.double(), latents.dynamics.double()]
    mean = [x.mean().item() if x.numel() else 0.0 for x in streams]
    return mean, [x.std(correction=0).item() if x.numel() else 1.0 for x in streams]


@dataclass
class LatentCache:
    """The latents of a data set under one VAE.

    Attributes:
        mean, logvar: (N, L), float32, as encoded (not normalised).
        labels: (N,) class ids, -1 where there is none.
        classes: class names by id.
        source: what the latents were made from; a cache is only used with the same.
    """

    mean: torch.Tensor
    logvar: torch.Tensor
    labels: torch.Tensor
    classes: list[str]
    source: dict[str, str | int | float]

    @classmethod
    def build(
        cls,
        vae: AutoencoderKLVidTwin,
        clips: ClipDataset,
        source: dict[str, str | int | float],
        device: torch.device | str,
        bad_videos: BadVideos,
    ) -> LatentCache:
        """Encode every clip of a data set, each once; `bad_videos` is told of those that could not be read."""
        means, logvars, labels = [], [], []
        for posterior, batch in encode_clips(vae, clips, device):
            bad_videos.add(batch["skipped"])
            # The clip that stands in for an unreadable one has a turn of its own.
            own = [
                clips.files[index].path == Path(path)
                for index, path in zip(batch["index"], batch["path"], strict=True)
            ]
            means.append(posterior.mean[own])
            logvars.append(posterior.logvar[own])
            labels.append(batch["label"][own])
        return cls(torch.cat(means), torch.cat(logvars), torch.cat(labels), list(clips.classes), source)

    def save(self, folder: str | Path) -> None:
        """Write the tensors, then the index that makes them count: a cache is complete or absent."""
        folder = Path(folder)
        with written_aside(folder / TENSORS) as path:
            save_file({"mean": self.mean, "logvar": self.logvar, "labels": self.labels}, path)
        with written_aside(folder / INDEX) as path:
            path.write_text(json.dumps({"classes": self.classes, "source": self.source}, indent=2))

    @classmethod
    def load(cls, folder: str | Path, source: dict[str, str | int | float]) -> LatentCache | None:
        """The cache in a folder, or None if there is none.

        Raises:
            UserError: if it was made from something else than `source`, or cannot be read.
        """
        folder = Path(folder)
        if not (folder / INDEX).exists():
            return None
        try:
            index = json.loads((folder / INDEX).read_text())
            tensors = load_file(folder / TENSORS)
        except Exception as error:
            raise UserError(f"The latent cache in {folder} cannot be read ({error}); delete the folder.") from error
        differing = sorted(key for key in source if index["source"].get(key) != source[key])
        if differing:
            raise UserError(
                f"The latent cache in {folder} was made with another {differing[0]} "
                f"({index['source'].get(differing[0])}, now {source[differing[0]]}); delete it, or name another "
                "folder as latent_cache."
            )
        return cls(**tensors, classes=index["classes"], source=index["source"])

    def dataset(self) -> Dataset:
        """(mean (L,), label ()) for each clip."""
        return TensorDataset(self.mean, self.labels)
