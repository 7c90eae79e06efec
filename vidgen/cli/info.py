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
        facts["classes"] = ", ".join(pipeline.labels) or pipeline.transformer.config.num_classes or "unconditional"
        if pipeline.subclasses:
            facts["subclasses"] = ", ".join(pipeline.subclasses)
    for name, value in facts.items():
        print(f"{name:17} {value:,}" if isinstance(value, int) else f"{name:17} {value}")
    print("config           ", json.dumps(public_config(vae)))
