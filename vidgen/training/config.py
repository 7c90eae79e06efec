"""Configs of the two training programs, and the keys of the model, the optimizer, LoRA and the training loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..common.config import PathConfig, key
from ..common.errors import UserError
from ..data.config import DataConfig, EncodingConfig
from ..losses.config import DiffusionConfig, GANConfig, PerceptualConfig, VAELossConfig


@dataclass
class ModelConfig(PathConfig):
    """The model: a preset or the weights of another model, and constructor arguments that replace their values."""

    preset: str | None = key(
        None,
        "model size: a name of autoencoder/presets.py or pipelines/presets.py; without `pretrained` base for the VAE "
        "and paper for the DiT",
    )
    pretrained: str | None = key(
        None,
        "start from the weights of a model instead of a preset: a folder or Hub repository of a VAE or pipeline, for "
        "the VAE also an official .ckpt or .safetensors file",
    )
    class_name: str = key(
        "AutoencoderKLVidTwin",
        "VAE only: class of the model; one of autoencoder/adapters.py, such as AutoencoderKLWan, is built from "
        "`overrides` alone",
    )
    latent_setting: int | None = key(None, "VAE only: latent size of the paper's Table 8", choices=(1, 2, 3))
    overrides: dict[str, Any] = key(  # noqa: RUF009
        dict,
        "constructor arguments of the model, such as {hidden_size: 64}; with `pretrained` only those that change no "
        "weight's shape",
    )

    linear_path_clips: int = key(
        512, "VAE only: training clips that a model with `linear_path` is fitted to before the first step", minimum=1
    )

    def resolve_preset(self, default: str) -> None:
        """Set the default preset of a program where no weights are given.

        Raises:
            UserError: if `pretrained` is combined with `preset` or `latent_setting`.
        """
        if self.pretrained is None:
            self.preset = default if self.preset is None else self.preset
            return
        for name in ("preset", "latent_setting"):
            if getattr(self, name) is not None:
                raise UserError(
                    f"model.pretrained={self.pretrained} sets the sizes of the model, so model.{name}="
                    f"{getattr(self, name)} is refused; leave one of them out, or set model.{name}=null if it is in "
                    "the config file."
                )


@dataclass
class OptimConfig:
    """The optimizer and its learning rate schedule."""

    name: str = key(
        "adamw",
        "adamw; muon, which trains the matrices of the model's blocks, and AdamW all other parameters; or the path of "
        "an optimizer class, such as torch.optim.RAdam or bitsandbytes.optim.AdamW8bit",
    )
    kwargs: dict[str, Any] = key(  # noqa: RUF009
        dict, "further arguments of an optimizer class given by its path; the keys adam_* do not apply to it"
    )
    learning_rate: float = key(1.6e-4, "peak learning rate", minimum=0)
    adam_beta1: float = key(0.9, "Adam beta1", minimum=0, below=1)
    adam_beta2: float = key(0.99, "Adam beta2", minimum=0, below=1)
    adam_weight_decay: float = key(1e-4, "decoupled weight decay, multiplied by the learning rate", minimum=0)
    adam_epsilon: float = key(1e-8, "Adam epsilon", minimum=0)
    adamw_lr_scale: float = key(
        1.0,
        "muon only: factor on the learning rate of the parameters that AdamW trains, such as embeddings and adaLN "
        "modulations",
        above=0,
    )
    muon_modulations: bool = key(
        False, "muon only: Muon trains the matrices of adaLN modulations in the blocks too, in place of AdamW"
    )
    linear_path_lr_scale: float = key(
        0.01, "VAE only: factor on the learning rate of the projections of a model's `linear_path`", minimum=0
    )
    lr_scheduler: str = key("cosine", "a name of diffusers.optimization.get_scheduler")
    lr_warmup_steps: int = key(
        5000, "optimizer steps of linear warmup; in a shorter training a tenth of its steps", minimum=0
    )


@dataclass
class LoRAConfig:
    """Low-rank adaptation (Hu et al. 2021) of `model.pretrained`: only the adapter is trained and saved."""

    rank: int | None = key(None, "rank of the adapter's matrices; null or 0 trains the model instead", minimum=0)
    alpha: float | None = key(None, "the adapter is scaled by alpha / rank; by default 1", above=0)
    target_modules: list[str] = key(  # noqa: RUF009
        lambda: ["to_q", "to_k", "to_v", "to_out"], "names of the linear layers that get an adapter"
    )


@dataclass
class TrainConfig:
    """The training loop."""

    freeze: list[str] = key(  # noqa: RUF009
        list, "modules of the model that are not trained, by dotted name, such as [encoder, structure_encoder]"
    )

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
    keep_best: str | None = key(
        None, "keep the model with the best value of this validation metric in OUTPUT_DIR/best, such as psnr or loss"
    )
    checkpointing_steps: int = key(1000, "steps between checkpoints; there is also one at the end", minimum=1)
    checkpoints_total_limit: int | None = key(3, "number of newest checkpoints that are kept", minimum=1)
    dataloader_num_workers: int = key(2, "data loading processes per training process", minimum=0)
    report_to: str = key(
        "tensorboard", 'Accelerate\'s trackers, separated by commas, "all", or "none"; metrics.jsonl is always written'
    )


@dataclass
class ValidationConfig:
    """Measurements of a validation."""

    num_clips: int = key(64, "DiT only: held-out clips of the held-out loss, evenly spaced", minimum=1)
    timestep_bins: int = key(
        5, "DiT only: equal parts of the schedule in which the held-out loss is measured", minimum=1, maximum=1000
    )
    detectors: list[str] = key(  # noqa: RUF009
        list,
        "features of the Fréchet distance at every validation, for the VAE of its reconstructions: NAME or NAME=FILE, "
        "such as [i3d_torchscript]; by default none is measured",
    )
    num_samples: int = key(256, "clips on each side of the Fréchet distance, at most one of a video", minimum=4)


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
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.model.resolve_preset("base")


@dataclass
class DiTTrainingConfig(EncodingConfig):
    """All keys of `train_dit.py` and `encode_latents.py`."""

    resume: str | None = key(None, '"latest", or the path of a checkpoint folder')
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.model.resolve_preset("paper")
        if self.model.pretrained is None and self.diffusion.prediction_type is None:
            self.diffusion.prediction_type = "sample"
