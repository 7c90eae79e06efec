"""What training the paper's models costs: GPU hours and memory on 1, 8 and 64 GPUs, from counts.

    python -m benchmarks.training_cost --scale cpu

Nothing is trained. The objectives of the recipes in configs/ go through PyTorch's counters on tensors without values:
FLOPs of a training step with LPIPS, both sides of the GAN and the gradients between them, and the bytes alive at its
peak under bf16 autocast, without and with gradient checkpointing. Hours are those FLOPs over a GPU's stated rate and a
stated share of it; `speed.py --scale paper` measures the share.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from autoencoder import AutoencoderKLVidTwin
from vidgen.common.config import load_config
from vidgen.losses.adversarial import DiscriminatorLoss, PatchDiscriminator
from vidgen.losses.diffusion import DiffusionLoss
from vidgen.losses.lpips import LPIPS
from vidgen.losses.vae import VAELoss
from vidgen.metrics.flops import training_flops
from vidgen.training.config import DiTTrainingConfig, VAETrainingConfig
from vidgen.training.dit_trainer import build_scheduler, build_transformer

from .common.harness import REPOSITORY, Benchmark, Results, markdown_table
from .speed.memory import Build, training_memory


@dataclass(frozen=True)
class GPU:
    """A GPU as its maker states it: dense bf16 FLOP/s, and bytes; and the share of the former that is assumed."""

    name: str
    flops: float
    memory: float
    utilization: float


H100 = GPU("H100 SXM, 80 GB", 989e12, 80e9, 0.4)
COUNTS = (1, 8, 64)
PROCESSES = {"vae": 4, "dit": 8}  # batches of a step: the paper's four GPUs; eight for DiT's usual 256 clips
BATCHES = (16, 32)  # whose peaks tell what a clip takes; that of a clip alone may be the optimizer's
SPARE = 0.9  # of a GPU's memory: the rest is workspaces and fragments
CLASSES = 101
RECIPES = {  # recipe: settings
    "smoke": {"vae/sprites": ["model.preset=tiny-test"], "dit/paper": ["model.preset=tiny-test"]},
    "cpu": {
        **{f"vae/{size}": [f"model.preset={size}"] for size in ("small", "base", "large")},
        "dit/paper": [],
        "dit/ucf101": [],
    },
}
RECIPES["paper"] = RECIPES["cpu"]


def run(options: argparse.Namespace) -> Results:
    costs = {}
    for recipe, settings in RECIPES[options.scale].items():
        print(recipe, file=sys.stderr, flush=True)
        kind = recipe.split("/")[0]
        config_class, builder = {
            "vae": (VAETrainingConfig, build_vae_objective),
            "dit": (DiTTrainingConfig, build_dit_objective),
        }[kind]
        path = REPOSITORY / "configs" / f"{recipe}.yaml"
        path = path if path.exists() else path.with_name("paper.yaml")
        needed = ["data.root=none", "output_dir=none"] + (["vae=none"] if kind == "dit" else [])
        config = load_config(config_class, ["--config", str(path), *needed, *settings])
        costs[recipe] = cost(config, builder)
    return {"gpu": vars(H100), "costs": costs}


def cost(config: Any, builder: Callable[[Any, int, bool], Build]) -> dict[str, Any]:
    """Parameters, FLOPs a clip, steps and batch of a recipe; bytes that stay and bytes a clip, at a step's peak."""
    with torch.device("meta"):
        objective = builder(config, 1, False)()[0]
        parameters = sum(p.numel() for p in objective.parameters())
    # PyTorch's counter follows no gradient taken inside of a loss: what the VAE is judged by is counted by itself.
    parts = {name: training_flops(build)[1] for name, build in judges(config).items()}
    parts["model"] = training_flops(builder(config, 1, False))[1]
    memory = {}
    for checkpointing in (False, True):
        few, many = (training_memory(builder(config, batch, checkpointing)).peak for batch in BATCHES)
        clip = (many - few) / (BATCHES[1] - BATCHES[0])
        memory["checkpointing" if checkpointing else "plain"] = {"fixed": few - BATCHES[0] * clip, "clip": clip}
    return {
        "parameters": parameters,
        "step_flops": sum(parts.values()),
        "judges_flops": sum(parts.values()) - parts["model"],
        "steps": config.train.max_train_steps,
        "batch": config.train.train_batch_size,
        "memory": memory,
    }


def build_vae_objective(config: VAETrainingConfig, batch: int, checkpointing: bool) -> Build:
    """A VAE's training step, past the start of its GAN, under bf16 autocast; no dropout, for which a CPU fuses not."""
    overrides = {"qformer_dropout": 0.0, **config.model.overrides}

    def build():
        vae = AutoencoderKLVidTwin.from_preset(config.model.preset, config.model.latent_setting, **overrides).train()
        if checkpointing:
            vae.enable_gradient_checkpointing()
        video = torch.zeros(batch, *vae.clip_shape)
        if vae.device.type == "meta":
            return vae, lambda video: (vae(video).sample - video).abs().mean(), (video,)
        vae.set_attention_backend("native")  # a CPU would take another for bf16
        lpips = discriminator = scale = None
        if config.perceptual.weight:
            lpips = LPIPS(config.perceptual.backbone)
            for name, buffer in lpips.named_buffers():  # those read from a file have no place here yet
                setattr(lpips, name, torch.empty(buffer.shape))
        if config.gan.weight:
            discriminator = DiscriminatorLoss(PatchDiscriminator(config.gan), config.gan)
            scale = torch.ones(())
        objective = VAELoss(vae, config.loss, config.perceptual, config.gan, lpips, discriminator)
        return objective, _autocast(lambda video: objective(video, gan_scale=scale)["loss"]), (video,)

    return build


def judges(config: VAETrainingConfig | DiTTrainingConfig) -> dict[str, Build]:
    """What an autoencoder's reconstruction of a clip goes through: LPIPS, and the GAN for either player."""
    if isinstance(config, DiTTrainingConfig):
        return {}
    with torch.device("meta"):
        vae = AutoencoderKLVidTwin.from_preset(config.model.preset, config.model.latent_setting)

    def lpips():
        network = LPIPS(config.perceptual.backbone).to("meta")
        images = torch.zeros(2, vae.clip_shape[1], 3, *vae.clip_shape[2:])
        return network, lambda made, real: network(made.requires_grad_(), real).mean(), tuple(images)

    def game(player: str):
        def build():
            discriminator = DiscriminatorLoss(PatchDiscriminator(config.gan), config.gan)
            discriminator.requires_grad_(player == "discriminator")
            clips = tuple(torch.zeros(2 if player == "discriminator" else 1, 1, *vae.clip_shape))
            return (
                discriminator,
                lambda fake, *real: discriminator(fake.requires_grad_(not real), *real)["loss"],
                clips,
            )

        return build

    found = {"lpips": lpips} if config.perceptual.weight else {}
    return found | ({player: game(player) for player in ("generator", "discriminator")} if config.gan.weight else {})


def build_dit_objective(config: DiTTrainingConfig, batch: int, checkpointing: bool) -> Build:
    """A DiT's training step on cached latents of the base VAE, under bf16 autocast."""

    def build():
        with torch.device("meta"):
            vae = AutoencoderKLVidTwin.from_preset("base", 1)
        transformer = build_transformer(config, vae, CLASSES).train()
        transformer.set_attention_backend("native")  # a CPU would take another for bf16
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        with torch.device("cpu"):
            scheduler = build_scheduler(config.diffusion)
        objective = DiffusionLoss(transformer, scheduler, config.diffusion)
        latents, labels = torch.zeros(batch, transformer.latent_size), torch.zeros(batch, dtype=torch.long)
        return objective, _autocast(lambda *inputs: objective(*inputs)["loss"]), (latents, labels)

    return build


def _autocast(loss: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def run(*inputs: torch.Tensor) -> torch.Tensor:
        device = inputs[0].device.type
        with nullcontext() if device == "meta" else torch.autocast(device, torch.bfloat16):  # none there to cast for
            return loss(*inputs)

    return run


def clips_a_gpu(memory: dict[str, float], gpus: int, shared: bool, gpu: dict[str, float]) -> int:
    """The largest batch that fits: with `shared`, what stays is divided among the GPUs (FSDP), else each has all."""
    fixed = memory["fixed"] / (gpus if shared else 1)
    return max(math.floor((SPARE * gpu["memory"] - fixed) / memory["clip"]), 0)


def tables(results: Results | None) -> str:
    if results is None:
        return ""
    gpu, costs = results["gpu"], results["costs"]
    said = [
        f"On {gpu['name']} GPUs at {gpu['utilization']:.0%} of {gpu['flops'] / 1e12:.0f} TFLOP/s (dense bf16, as its "
        "maker states it). Training is as long as the recipe says; the paper does not state its own. Hours on several "
        "GPUs are of the same clips, divided evenly."
    ]
    rows = []
    for recipe, cost in costs.items():
        batch = cost["batch"] * PROCESSES[recipe.split("/")[0]]
        clips = cost["steps"] * batch
        hours = clips * cost["step_flops"] / (gpu["flops"] * gpu["utilization"]) / 3600
        share = cost["judges_flops"] / cost["step_flops"]
        row = [f"`{recipe}`", f"{cost['parameters'] / 1e6:,.0f} M", f"{cost['step_flops'] / 1e12:.2f}", f"{share:.0%}"]
        row += [f"{cost['steps']:,} x {batch}", f"{hours:,.1f}"]
        rows.append([*row, *(f"{hours / n:,.1f}" for n in COUNTS[1:])])
    header = [
        "recipe",
        "parameters",
        "TFLOP of a clip's step",
        "LPIPS and GAN",
        "steps x clips",
        "GPU hours",
    ]
    said.append(markdown_table([*header, *(f"hours on {n}" for n in COUNTS[1:])], rows))
    said.append(
        f"Memory of a step under bf16 autocast with fp32 weights, and the clips that fit into {SPARE:.0%} of a GPU. "
        "DDP keeps weights, gradients and Adam's moments on every GPU, FSDP divides them."
    )
    rows = []
    for recipe, cost in costs.items():
        for name, memory in cost["memory"].items():
            row = [f"`{recipe}`", name, *(f"{memory[key] / 1e9:.2f} GB" for key in ("fixed", "clip"))]
            row.append(clips_a_gpu(memory, 1, False, gpu))
            rows.append([*row, *(clips_a_gpu(memory, n, True, gpu) for n in COUNTS[1:])])
    header = ["recipe", "activations", "stays", "for each clip", "clips on 1 GPU, or DDP"]
    said.append(markdown_table([*header, *(f"FSDP on {n}" for n in COUNTS[1:])], rows))
    return "\n\n".join(said)


BENCHMARK = Benchmark(
    name="training_cost",
    title="What training costs",
    needs="nothing that `--scale cpu` does not count",
    run=run,
    tables=tables,
)

if __name__ == "__main__":
    BENCHMARK.main()
