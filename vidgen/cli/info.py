"""`vidgen info`: the size, cost and config of a model."""

from __future__ import annotations

import argparse
import json

from .options import MODEL, add_command


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Declare the command and its option."""
    parser = add_command(commands, "info", "a model's config, parameters, compression rate and FLOPs")
    parser.add_argument("model", help=MODEL)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Print the facts about a model."""
    from pipelines.schedulers import default_steps

    from ..common.loading import is_pipeline, load_pipeline, load_vae, public_config, weights_hash
    from ..metrics.flops import decode_flops, encode_flops

    pipeline = load_pipeline(options.model) if is_pipeline(options.model) else None
    vae = load_vae(options.model) if pipeline is None or pipeline.vae is None else pipeline.autoencoder
    structure, dynamics = (" x ".join(map(str, shape)) for shape in (vae.structure_shape, vae.dynamics_shape))
    latents = {"structure latent": structure, "dynamics latent": dynamics}
    if not vae.has_dynamics:
        latents = {"latent": structure}
    facts: dict[str, object] = {
        "class": type(vae.backbone).__name__,
        "parameters": vae.num_parameters(),
        "clip": "{} x {} x {} x {}".format(*vae.clip_shape),
        **latents,
        "latent values": vae.latent_size,
        "compression rate": f"{vae.compression_rate:.4%}",
        "encode": f"{encode_flops(vae) / 1e9:,.1f} GFLOPs per clip",
        "decode": f"{decode_flops(vae) / 1e9:,.1f} GFLOPs per clip",
        "sha256": weights_hash(vae),
    }
    if pipeline is not None:
        facts["DiT parameters"] = pipeline.transformer.num_parameters()
        facts["DiT tokens"] = " + ".join(map(str, pipeline.transformer.num_tokens))
        facts["scheduler"] = type(pipeline.scheduler).__name__
        config = pipeline.transformer.config
        no_class = "none" if pipeline.takes_prompts else "unconditional"
        facts["classes"] = ", ".join(pipeline.labels) or config.num_classes or no_class
        if pipeline.subclasses:
            facts["subclasses"] = ", ".join(pipeline.subclasses)
        if pipeline.takes_prompts:
            encoder = pipeline.text_encoder
            facts["prompts"] = "as embeddings only" if encoder is None else f"encoded by {type(encoder).__name__}"
        if config.image_conditioning or (vae.has_dynamics and config.independent_timesteps is not False):
            facts["images"] = "as the first frame" if config.image_conditioning else "as the structure"
        facts["denoising steps"] = default_steps(config)
        if config.interval_conditioning:
            facts["guidance"] = "included (few-step model)"
    for name, value in facts.items():
        print(f"{name:17} {value:,}" if isinstance(value, int) else f"{name:17} {value}")
    print("config           ", json.dumps(public_config(vae)))
