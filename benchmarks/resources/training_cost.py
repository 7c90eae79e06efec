"""What training the paper's models costs: GPU hours and memory on 1, 8 and 64 GPUs, from counts.

The training losses of the configs in configs/ run through PyTorch's counters on tensors without data: FLOPs of a
training step with LPIPS and the GAN losses, and the peak bytes under bf16 autocast, with and without gradient
checkpointing. Hours assume a GPU's published rate and a fixed utilization of it; `benchmarks.speed --scale paper`
measures the utilization.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from autoencoder import AutoencoderKLVidTwin
from vidgen.common.config import load_config
from vidgen.losses.adversarial import DiscriminatorLoss, PatchDiscriminator
from vidgen.losses.diffusion import DiffusionLoss
from vidgen.losses.lpips import LPIPS
from vidgen.losses.vae import VAELoss
from vidgen.training.config import DiTTrainingConfig, VAETrainingConfig
from vidgen.training.dit_trainer import build_scheduler, build_transformer

from ..common.harness import REPOSITORY, Results
from ..common.tables import markdown_table
from .flops import training_flops
from .memory import Build, training_memory

# Published dense bf16 FLOP/s and bytes of a GPU, and the assumed utilization of the former.
H100 = {"name": "H100 SXM, 80 GB", "flops": 989e12, "memory": 80e9, "utilization": 0.4}
COUNTS = (1, 8, 64)
PROCESSES = {"vae": 4, "dit": 8}  # batches per step: the paper's four GPUs; eight for DiT's usual 256 clips
BATCHES = (16, 32)  # their peaks give the bytes per clip; the peak of a single clip may be the optimizer's
USABLE = 0.9  # of a GPU's memory; the rest is workspaces and fragmentation
CLASSES = 101
CONFIGS = {  # name, with a file in configs and a preset
    "smoke": {"vae/sprites": ("vae/sprites", "tiny-test"), "dit/paper": ("dit/paper", "tiny-test")},
    "cpu": {
        **{f"vae/{preset}": ("vae/paper", preset) for preset in ("small", "base", "large")},
        **{name: (name, None) for name in ("dit/paper", "dit/ucf101")},
    },
}
CONFIGS["paper"] = CONFIGS["cpu"]


def run_training_cost(options: argparse.Namespace) -> Results:
    costs = {}
    for name, (file, preset) in CONFIGS[options.scale].items():
        print(name, file=sys.stderr, flush=True)
        required = ["data.root=none", "output_dir=none", *([f"model.preset={preset}"] if preset else [])]
        path = str(REPOSITORY / "configs" / f"{file}.yaml")
        if name.startswith("vae/"):
            config = load_config(VAETrainingConfig, ["--config", path, *required])
            costs[name] = count_cost(config, build_vae_loss, judges(config))
        else:
            config = load_config(DiTTrainingConfig, ["--config", path, *required, "vae=none"])
            costs[name] = count_cost(config, build_dit_loss, {})
    return {"gpu": H100, "costs": costs}


def count_cost(config: Any, builder: Callable[[Any, int, bool], Build], judges: dict[str, Build]) -> dict[str, Any]:
    """Parameters, FLOPs per clip, steps and batch of a config; fixed bytes and bytes per clip at a step's peak."""
    with torch.device("meta"):
        loss = builder(config, 1, False)()[0]
        parameters = sum(p.numel() for p in loss.parameters())
    # PyTorch's counter does not follow gradients taken inside the loss, so LPIPS and the GAN are counted separately.
    judges_flops = sum(training_flops(build)[1] for build in judges.values())
    memory = {}
    for checkpointing in (False, True):
        few, many = (training_memory(builder(config, batch, checkpointing)).peak for batch in BATCHES)
        clip = (many - few) / (BATCHES[1] - BATCHES[0])
        memory["checkpointing" if checkpointing else "plain"] = {"fixed": few - BATCHES[0] * clip, "clip": clip}
    return {
        "parameters": parameters,
        "step_flops": judges_flops + training_flops(builder(config, 1, False))[1],
        "judges_flops": judges_flops,
        "steps": config.train.max_train_steps,
        "batch": config.train.train_batch_size,
        "memory": memory,
    }


def build_vae_loss(config: VAETrainingConfig, batch: int, checkpointing: bool) -> Build:
    """A VAE's training step with the GAN enabled, under bf16 autocast; without dropout, which a CPU cannot fuse."""
    overrides = {"qformer_dropout": 0.0, **config.model.overrides}

    def build():
        vae = AutoencoderKLVidTwin.from_preset(config.model.preset, config.model.latent_setting, **overrides).train()
        if checkpointing:
            vae.enable_gradient_checkpointing()
        video = torch.zeros(batch, *vae.clip_shape)
        if vae.device.type == "meta":
            return vae, lambda video: (vae(video).sample - video).abs().mean(), (video,)
        vae.set_attention_backend("native")  # on a CPU the default for bf16 is another
        lpips = discriminator = scale = None
        if config.perceptual.weight:
            lpips = LPIPS(config.perceptual.backbone)
            for name, buffer in lpips.named_buffers():  # those read from a file are not allocated yet
                setattr(lpips, name, torch.empty(buffer.shape))
        if config.gan.weight:
            discriminator = DiscriminatorLoss(PatchDiscriminator(config.gan), config.gan)
            scale = torch.ones(())
        loss = VAELoss(vae, config.loss, config.perceptual, config.gan, lpips, discriminator)
        return loss, _autocast(lambda video: loss(video, gan_scale=scale)["loss"]), (video,)

    return build


def judges(config: VAETrainingConfig) -> dict[str, Build]:
    """The networks that a reconstruction passes through: LPIPS, and the discriminator in the step of either player."""
    with torch.device("meta"):
        vae = AutoencoderKLVidTwin.from_preset(config.model.preset, config.model.latent_setting)

    def lpips():
        network = LPIPS(config.perceptual.backbone).to("meta")
        images = torch.zeros(2, vae.clip_shape[1], 3, *vae.clip_shape[2:])
        return network, lambda fake, real: network(fake.requires_grad_(), real).mean(), tuple(images)

    def discriminator(player: str):
        def build():
            loss = DiscriminatorLoss(PatchDiscriminator(config.gan), config.gan)
            loss.requires_grad_(player == "discriminator")
            clips = tuple(torch.zeros(2 if player == "discriminator" else 1, 1, *vae.clip_shape))
            return loss, lambda fake, *real: loss(fake.requires_grad_(not real), *real)["loss"], clips

        return build

    networks = {"lpips": lpips} if config.perceptual.weight else {}
    if config.gan.weight:
        networks |= {player: discriminator(player) for player in ("generator", "discriminator")}
    return networks


def build_dit_loss(config: DiTTrainingConfig, batch: int, checkpointing: bool) -> Build:
    """A DiT's training step on cached latents of the base VAE, under bf16 autocast."""

    def build():
        with torch.device("meta"):
            vae = AutoencoderKLVidTwin.from_preset("base", 1)
        transformer = build_transformer(config, vae, CLASSES).train()
        transformer.set_attention_backend("native")  # on a CPU the default for bf16 is another
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        with torch.device("cpu"):
            scheduler = build_scheduler(config.diffusion)
        loss = DiffusionLoss(transformer, scheduler, config.diffusion)
        latents, labels = torch.zeros(batch, transformer.latent_size), torch.zeros(batch, dtype=torch.long)
        return loss, _autocast(lambda *inputs: loss(*inputs)["loss"]), (latents, labels)

    return build


def _autocast(loss: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def run(*inputs: torch.Tensor) -> torch.Tensor:
        device = inputs[0].device.type
        with nullcontext() if device == "meta" else torch.autocast(device, torch.bfloat16):
            return loss(*inputs)

    return run


def max_batch(memory: dict[str, float], gpus: int, sharded: bool, gpu: dict[str, float]) -> int:
    """The largest batch that fits on a GPU; `sharded` divides the fixed bytes among the GPUs (FSDP)."""
    fixed = memory["fixed"] / (gpus if sharded else 1)
    return max(math.floor((USABLE * gpu["memory"] - fixed) / memory["clip"]), 0)


def training_cost_tables(results: Results) -> str:
    gpu, costs = results["gpu"], results["costs"]
    compute, memory_rows = [], []
    for name, cost in costs.items():
        batch = cost["batch"] * PROCESSES[name.split("/")[0]]
        hours = cost["steps"] * batch * cost["step_flops"] / (gpu["flops"] * gpu["utilization"]) / 3600
        judges_share = cost["judges_flops"] / cost["step_flops"]
        row = [f"`{name}`", f"{cost['parameters'] / 1e6:,.0f} M", f"{cost['step_flops'] / 1e12:.2f}"]
        row += [f"{judges_share:.0%}", f"{cost['steps']:,} x {batch}", f"{hours:,.1f}"]
        compute.append([*row, *(f"{hours / n:,.1f}" for n in COUNTS[1:])])
        for kind, memory in cost["memory"].items():
            row = [f"`{name}`", kind, *(f"{memory[key] / 1e9:.2f} GB" for key in ("fixed", "clip"))]
            row.append(max_batch(memory, 1, False, gpu))
            memory_rows.append([*row, *(max_batch(memory, n, True, gpu) for n in COUNTS[1:])])
    header = ["config", "parameters", "TFLOP per clip and step", "LPIPS and GAN", "steps x clips", "GPU hours"]
    memory_header = ["config", "activations", "fixed", "per clip", "clips per GPU, 1 GPU or DDP"]
    return "\n\n".join(
        [
            f"On {gpu['name']} GPUs at {gpu['utilization']:.0%} of the published {gpu['flops'] / 1e12:.0f} TFLOP/s "
            "(dense bf16). The number of steps is the config's; the paper does not state one. Several GPUs divide "
            "the same clips evenly.",
            markdown_table([*header, *(f"hours on {n}" for n in COUNTS[1:])], compute),
            "Memory of a step under bf16 autocast with fp32 weights, and the largest batch per GPU that fits into "
            f"{USABLE:.0%} of its memory. DDP keeps weights, gradients and Adam's moments on every GPU, FSDP shards "
            "them.",
            markdown_table([*memory_header, *(f"FSDP on {n}" for n in COUNTS[1:])], memory_rows),
        ]
    )
