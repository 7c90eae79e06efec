"""The card (README.md) that a model is published with on the Hub."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError

if TYPE_CHECKING:
    from torch import nn

    from .autoencoder_kl_vidtwin import AutoencoderKLVidTwin

PAPER = "[VidTwin](https://arxiv.org/abs/2412.17726)"
NEEDS = "With the packages `autoencoder` and `pipelines` of vidgen installed; no code is loaded from this repository."
LICENCE = """## License

Not stated yet: whoever publishes these weights says here, and as `license:` in the header, how they may be used."""


class ModelCardMixin:
    """Publishes with the card of `model_card(repo_id)`; a card on the Hub that has a text already is kept.

    Stands before Diffusers' classes, whose `push_to_hub` and `save_pretrained(push_to_hub=True)` write a card that
    says nothing.
    """

    def model_card(self, repo_id: str) -> ModelCard:
        """What `push_to_hub` writes as README.md, unless the repository has one with a text.

        Args:
            repo_id: "user/name", which the card's script loads.
        """
        raise NotImplementedError

    def _upload_folder(self, working_dir: str, repo_id: str, token: str | None = None, **kwargs: Any) -> str:
        if not kwargs.get("subfolder"):
            card = merge(self.model_card(repo_id), published_card(repo_id, token))
            card.save(Path(working_dir) / "README.md")
        return super()._upload_folder(working_dir, repo_id, token=token, **kwargs)


def published_card(repo_id: str, token: str | None) -> ModelCard | None:
    try:
        return ModelCard.load(repo_id, token=token)
    except EntryNotFoundError:
        return None


def merge(card: ModelCard, published: ModelCard | None) -> ModelCard:
    """The published card if it has a text; else ours, with what its header says (the Hub's form leaves a license)."""
    if published is None:
        return card
    if published.text.strip():
        return published
    for key, value in published.data.to_dict().items():
        setattr(card.data, key, value)
    return card


def make_card(text: list[str], tags: list[str]) -> ModelCard:
    """A card of paragraphs, with the header that the Hub sorts models by."""
    # The Hub has no task for an autoencoder, nor for videos made by class or from nothing but noise.
    header = ModelCardData(library_name="diffusers", license="unknown", pipeline_tag="other", tags=tags)
    body = "\n\n".join(paragraph for paragraph in text if paragraph)
    return ModelCard(f"---\n{header.to_yaml()}\n---\n\n{body}\n")


def autoencoder_card(vae: AutoencoderKLVidTwin, repo_id: str) -> ModelCard:
    """What the autoencoder does, how to run it and its latents."""
    channels, frames, height, width = vae.clip_shape
    return make_card(
        [
            f"# {repo_id.split('/')[-1]}",
            f"A video autoencoder: {PAPER} with {count_parameters(vae)} parameters turns clips of {frames} frames, "
            f"{height} x {width} pixels, into a *structure* latent (what is there and how it slowly moves) and a "
            "*dynamics* latent (per-frame detail and fast motion), and back. Clips of other sizes go through tiles.",
            "## Usage",
            NEEDS,
            f"""```python
import torch
from autoencoder import AutoencoderKLVidTwin

vae = AutoencoderKLVidTwin.from_pretrained("{repo_id}")
clip = torch.rand(1, {channels}, {frames}, {height}, {width}) * 2 - 1  # (B, C, T, H, W) in [-1, 1]
latents = vae.unpack(vae.encode(clip).latent_dist.mode())  # TwinLatents(structure, dynamics)
clip = vae.decode(latents).sample
```""",
            latent_table(vae.structure_shape, vae.dynamics_shape),
            f"Together {vae.latent_size} values, {100 * vae.compression_rate:.3g} % of a clip's.",
            LICENCE,
        ],
        tags=["vidtwin", "video-autoencoder"],
    )


def latent_table(structure_shape: tuple[int, ...], dynamics_shape: tuple[int, ...]) -> str:
    return f"""## Latents

| latent | axes | shape | values |
|---|---|---|---|
| structure | channel, query, row, column | {" x ".join(map(str, structure_shape))} | {math.prod(structure_shape)} |
| dynamics | channel, frame, position | {" x ".join(map(str, dynamics_shape))} | {math.prod(dynamics_shape)} |"""


def count_parameters(model: nn.Module) -> str:
    """`126.4 M`, or `107,724` below a million."""
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"{count / 1e6:,.1f} M" if count >= 1e6 else f"{count:,}"
