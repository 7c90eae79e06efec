"""Model cards (README.md on the Hub), rendered from a template and a dictionary of facts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import EntryNotFoundError
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import nn

PARENT = "_parent"  # the config entry of a fine-tuned model: the name and the weights' SHA-256 of its parent


class ModelCardMixin:
    """Uploads the card of `model_card(repo_id)`, unless the repository already has a card with text.

    It must come before Diffusers' classes, whose `push_to_hub` and `save_pretrained(push_to_hub=True)` upload an
    empty card.
    """

    def model_card(self, repo_id: str) -> ModelCard:
        raise NotImplementedError

    def _upload_folder(self, working_dir: str, repo_id: str, token: str | None = None, **kwargs: Any) -> str:
        if not kwargs.get("subfolder"):
            card = keep_published(self.model_card(repo_id), repo_id, token)
            card.save(Path(working_dir) / "README.md")
        return super()._upload_folder(working_dir, repo_id, token=token, **kwargs)


def keep_published(card: ModelCard, repo_id: str, token: str | None) -> ModelCard:
    """Return the repository's card if it has text; otherwise `card`, with the repository's header (its license)."""
    try:
        published = ModelCard.load(repo_id, token=token)
    except EntryNotFoundError:
        return card
    if published.text.strip():
        return published
    for key, value in published.data.to_dict().items():
        setattr(card.data, key, value)
    return card


def find_parents(**parts: Any) -> list[dict[str, str]]:
    """Return the parent of each fine-tuned model: its `name` and `sha256`, and the `part` that it is here.

    Args:
        parts: models by their names in a pipeline, which may be None; `model` for a single model.
    """
    return [
        {"part": part, **getattr(model.config, PARENT)}
        for part, model in parts.items()
        if model is not None and getattr(model.config, PARENT, None)
    ]


def render_card(
    template: Path, repo_id: str, tags: list[str], parents: list[dict[str, str]] | None = None, **facts: Any
) -> ModelCard:
    """Render a template, which extends `model_card.md.jinja`.

    Args:
        template: path of the template.
        repo_id: "user/name", which the card's example loads.
        tags: by which the Hub finds the model.
        parents: of fine-tuned parts, from `find_parents`.
        facts: variables of the template.
    """
    folders = [template.parent, Path(__file__).parent]
    environment = Environment(
        loader=FileSystemLoader(folders), undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    environment.filters["product"] = math.prod
    text = environment.get_template(template.name).render(repo_id=repo_id, parents=parents or [], **facts)
    # The Hub has no task for autoencoders, nor for unconditional or class-conditional video generation.
    header = ModelCardData(library_name="diffusers", license="unknown", pipeline_tag="other", tags=tags)
    return ModelCard(f"---\n{header.to_yaml()}\n---\n\n{text}")


def count_parameters(model: nn.Module) -> str:
    """Return the number of parameters: `126.4 M`, or `107,724` below a million."""
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"{count / 1e6:,.1f} M" if count >= 1e6 else f"{count:,}"
