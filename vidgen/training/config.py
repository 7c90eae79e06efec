"""Configs of the two training programs, and the keys of the model, the optimizer and the training loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..common.config import PathConfig, key
from ..data.config import DataConfig, EncodingConfig
from ..losses.config import DiffusionConfig, GANConfig, PerceptualConfig, VAELossConfig


@dataclass
class ModelConfig:
    """The model: a preset, and constructor arguments that replace its values."""

    preset: str = key("base", "model size: a name of autoencoder/presets.py or pipelines/presets.py")
    class_name: str = key(
        "AutoencoderKLVidTwin",
        "VAE only: class of the model; one of autoencoder/adapters.py, such as AutoencoderKLWan, is built from "
        "`overrides` alone",
    )
    latent_setting: int | None = key(None, "VAE only: latent size of the paper's Table 8", choices=(1, 2, 3))
    overrides: dict[str, Any] = key(  # noqa: RUF009
        dict, "constructor arguments of the model, such as {hidden_size: 64}"
    )


@dataclass
class OptimConfig:
    """The optimizer and its learning rate schedule."""

    name: str = key(
        "adamw",
        "muon trains the matrices of the model's blocks, and AdamW all other parameters",
        choices=("adamw", "muon"),
    )
    learning_rate: float = key(1.6e-4, "peak learning rate", minimum=0)
    adam_beta1: float = key(0.9, "Adam beta1", minimum=0, below=1)
    adam_beta2: float = key(0.99, "Adam beta2", minimum=0, below=1)
    adam_weight_decay: float = key(1e-4, "decoupled weight decay, multiplied by the learning rate", minimum=0)
    adam_epsilon: float = key(1e-8, "Adam epsilon", minimum=0)
    lr_scheduler: str = key("cosine", "a name of diffusers.optimization.get_scheduler")
    lr_warmup_steps: int = key(
        5000, "optimizer steps of linear warmup; in a shorter training a tenth of its steps", minimum=0
    )


@dataclass
class TrainConfig:
    """The training loop."""

    train_batch_size: int = key(6, "clips per process and batch", minimum=1)
    max_train_steps: int = key(100_000, "optimizer steps, the length of the learning rate schedule", minimum=0)
    gradient_accumulation_steps: int = key(1, "batches per optimizer step", minimum=1)
    gradient_checkpointing: bool = key(False, "recompute activations in the backward pass to save memory")
    mixed_precision: str = key(
        "auto",
        "auto: the fastest on the device, or that of the resumed run",
        choices=("auto", "no", "fp16", "bf16"),
    )
    max_grad_norm: float = key(1.0, "maximum gradient norm of each parameter group; 0 disables clipping", minimum=0)
    ema_decay: float = key(
        0.999, "decay of the exponential moving average of weights; 0 disables it", minimum=0, maximum=1
    )
    logging_steps: int = key(10, "steps between log entries, which hold means since the last entry", minimum=1)
    validation_steps: int = key(1000, "steps between validations; there is also one at the end", minimum=1)
    checkpointing_steps: int = key(1000, "steps between checkpoints; there is also one at the end", minimum=1)
    checkpoints_total_limit: int | None = key(3, "number of newest checkpoints that are kept", minimum=1)
    dataloader_num_workers: int = key(2, "data loading processes per training process", minimum=0)
    report_to: str = key(
        "tensorboard", 'Accelerate\'s trackers, separated by commas, "all", or "none"; metrics.jsonl is always written'
    )


@dataclass
class VAETrainingConfig(PathConfig):
    """All keys of `train_vae.py`."""

    output_dir: str = key("runs/vae", "the run folder; created if missing")
    resume: str | None = key(None, '"latest", or the path of a checkpoint folder')
    seed: int = key(0, "random seed", minimum=0)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: VAELossConfig = field(default_factory=VAELossConfig)
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    gan: GANConfig = field(default_factory=GANConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass
class DiTTrainingConfig(EncodingConfig):
    """All keys of `train_dit.py` and `encode_latents.py`."""

    resume: str | None = key(None, '"latest", or the path of a checkpoint folder')
    model: ModelConfig = field(default_factory=lambda: ModelConfig(preset="paper"))
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
