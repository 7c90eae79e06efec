"""The cards (README.md) that a pipeline and a DiT are published with on the Hub."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard

from autoencoder.model_card import LICENCE, NEEDS, PAPER, count_parameters, latent_table, make_card

if TYPE_CHECKING:
    from .pipeline_vidtwin import VidTwinPipeline
    from .transformer_vidtwin import VidTwinTransformer3DModel


def pipeline_card(pipeline: VidTwinPipeline, repo_id: str) -> ModelCard:
    """What the pipeline makes, how to run it, its parts, latents and classes."""
    vae, transformer, scheduler = pipeline.vae, pipeline.transformer, pipeline.scheduler
    num_classes = transformer.config.num_classes
    kind = "Unconditional" if num_classes is None else "Class-conditional"
    label = "" if num_classes is None else f"class_labels={json.dumps(next(iter(pipeline.labels), 0))}"
    script = f"""from pipelines import VidTwinPipeline

pipeline = VidTwinPipeline.from_pretrained("{repo_id}")
frames = pipeline({label}).frames[0]  # a list of PIL images
frames[0].save("video.gif", save_all=True, append_images=frames[1:], duration=125, loop=0)"""
    if vae is None:
        script = f"""from pipelines import VidTwinPipeline

pipeline = VidTwinPipeline.from_pretrained("{repo_id}", vae=None)
latents = pipeline({label}{label and ", "}output_type="latent").frames  # packed (B, L), normalized"""
    what = "latents" if vae is None else "videos of {1} frames, {2} x {3} pixels".format(*vae.clip_shape)
    parts = [
        "## Parts",
        "",
        "| part | class | parameters |",
        "|---|---|---|",
        f"| `transformer` | `{type(transformer).__name__}`, {layers_and_tokens(transformer)} "
        f"| {count_parameters(transformer)} |",
        f"| `scheduler` | `{type(scheduler).__name__}`, prediction type "
        f"`{scheduler.config.get('prediction_type', 'flow')}` | |",
    ]
    if vae is not None:
        parts.append(f"| `vae` | `{type(vae).__name__}` | {count_parameters(vae)} |")
    return make_card(
        [
            f"# {repo_id.split('/')[-1]}",
            f"{kind} generation of {what}, over the two latents of {PAPER}: a diffusion transformer makes *structure* "
            "(what is there and how it slowly moves) and *dynamics* (per-frame detail and fast motion) from noise, "
            f"and the autoencoder{' it was trained with' if vae is None else ''} decodes them.",
            "## Usage",
            NEEDS,
            f"```python\n{script}\n```",
            "\n".join(parts),
            "Each loads alone too: "
            f'`{type(transformer).__name__}.from_pretrained("{repo_id}", subfolder="transformer")`.',
            latent_table(transformer.structure_shape, transformer.dynamics_shape),
            ""
            if vae is None
            else f"Together {vae.latent_size} values, {100 * vae.compression_rate:.3g} % of a clip's.",
            class_list(num_classes, pipeline.labels, pipeline.subclasses),
            LICENCE,
        ],
        tags=["vidtwin", "video-generation", "unconditional" if num_classes is None else "class-conditional"],
    )


def transformer_card(transformer: VidTwinTransformer3DModel, repo_id: str) -> ModelCard:
    """What the DiT predicts, how to run it and the latents it was made for."""
    num_classes = transformer.config.num_classes
    label = "" if num_classes is None else ", class_labels=torch.tensor([0])"
    return make_card(
        [
            f"# {repo_id.split('/')[-1]}",
            f"A diffusion transformer over the two latents of {PAPER}, *structure* (what is there and how it slowly "
            f"moves) and *dynamics* (per-frame detail and fast motion): {layers_and_tokens(transformer)}, "
            f"{count_parameters(transformer)} parameters. `VidTwinPipeline` makes videos with it and with the VidTwin "
            "autoencoder whose latents it was trained on.",
            "## Usage",
            NEEDS,
            f"""```python
import torch
from pipelines import VidTwinTransformer3DModel

transformer = VidTwinTransformer3DModel.from_pretrained("{repo_id}")
noise = torch.randn(1, transformer.latent_size)  # packed latents (B, L)
prediction = transformer(noise, torch.tensor([999]){label}).sample
```""",
            latent_table(transformer.structure_shape, transformer.dynamics_shape),
            class_list(num_classes, {}, {}),
            LICENCE,
        ],
        tags=["vidtwin", "video-generation", "unconditional" if num_classes is None else "class-conditional"],
    )


def layers_and_tokens(transformer: VidTwinTransformer3DModel) -> str:
    structure, dynamics = transformer.num_tokens
    return f"{transformer.config.num_layers} layers, {structure} + {dynamics} tokens"


def class_list(num_classes: int | None, labels: dict[str, int], subclasses: dict[str, int]) -> str:
    if num_classes is None:
        return ""
    names = ["by id alone"]
    if labels:
        names = [f"{label} {name}" for name, label in sorted(labels.items(), key=lambda item: item[1])]
    text = f"## Classes\n\n{num_classes - len(subclasses)} classes, {'by id: ' if labels else ''}{', '.join(names)}."
    if subclasses:
        text += f"\n\nAnd {len(subclasses)} sub-classes, by name: {', '.join(sorted(subclasses))}."
    return text
