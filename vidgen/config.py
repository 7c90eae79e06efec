"""Recipes: typed dataclasses, a YAML file, and dotted overrides on the command line.

    train_vae.py --config configs/vae/base.yaml data.root=FOLDER train.max_train_steps=1000

A key the dataclasses do not have is an error that names the nearest one they do. Names follow Diffusers' training
scripts.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .errors import UserError
from .options import expand_home


class _PathConfig:
    """A config with paths: expands the home folder in every text, since only paths begin with `~`."""

    def __post_init__(self) -> None:
        for f in fields(self):
            if isinstance(value := getattr(self, f.name), str):
                setattr(self, f.name, expand_home(value))


@dataclass
class DataConfig(_PathConfig):
    """Where clips come from and how they are cut."""

    root: str = MISSING  # a folder of class folders or of videos, a CSV with the columns path,label, or shards
    validation_root: str | None = None  # VAE only: clips to validate on; else `num_validation_videos` are held out
    num_validation_videos: int = 8  # VAE only: held out where there is no validation_root; at most a fifth
    ucf101_split: int | None = None  # 1, 2 or 3: train on UCF-101's official train list, validate on its test list
    split_files: str | None = None  # folder of those lists; ucfTrainTestlist in or beside `root` where not given
    resolution: int | None = None  # height and width in pixels; the model's own where not given
    num_frames: int | None = None  # likewise
    fps: float = 8.0  # frames a second of a clip, whatever its file's rate
    decoder: str = "pyav"  # pyav, decord, torchcodec: of videos; files that the others cannot read safely go to PyAV
    flip: bool = False  # VAE only: mirror clips at random; for the DiT see latents.flips
    clips_per_video: int = 1  # clips cut from each video in an epoch


@dataclass
class TrainConfig:
    """The loop."""

    train_batch_size: int = 6  # per process
    max_train_steps: int = 100_000  # optimizer steps; schedules end there
    gradient_accumulation_steps: int = 1  # batches to an optimizer step
    gradient_checkpointing: bool = False  # compute activations twice, keep a fraction of them
    mixed_precision: str = "auto"  # no, fp16, bf16; auto: what is fastest on the device, or what the resumed run had
    max_grad_norm: float = 1.0  # gradients of each player are scaled down to it; 0 leaves them
    ema_decay: float = 0.999  # 0 trains without an average
    logging_steps: int = 10  # a line of metrics every so many steps, the mean over them
    validation_steps: int = 1000  # numbers and pictures every so many steps, and at the end
    checkpointing_steps: int = 1000  # a checkpoint every so many steps, and at the end
    checkpoints_total_limit: int | None = 3  # the newest so many are kept
    dataloader_num_workers: int = 2  # reading processes of each training process
    report_to: str = "tensorboard"  # one of Accelerate's trackers, "all", or "none"; metrics.jsonl is always written


@dataclass
class OptimConfig:
    """The optimizer and its schedule."""

    name: str = "adamw"  # adamw; muon: for the matrices of the model's blocks, with AdamW for all else
    learning_rate: float = 1.6e-4  # at its highest
    adam_beta1: float = 0.9  # decay of the gradients' mean
    adam_beta2: float = 0.99  # decay of their squares' mean
    adam_weight_decay: float = 1e-4  # decoupled, times the learning rate
    adam_epsilon: float = 1e-8  # added to the root of the squares
    lr_scheduler: str = "cosine"  # a name of diffusers.optimization.get_scheduler
    lr_warmup_steps: int = 5000  # optimizer steps from 0 to learning_rate; a tenth of a run that is shorter than that


@dataclass
class ModelConfig:
    """A preset and what replaces its values: constructor arguments of the model."""

    preset: str = "base"  # a size: autoencoder/presets.py, pipelines/presets.py
    latent_setting: int | None = None  # VAE only: 1, 2 or 3 of the paper's Table 8
    overrides: dict[str, Any] = field(default_factory=dict)  # constructor arguments, {heads: residual}


@dataclass
class VAELossConfig:
    """Weights of the VAE's objective (`vidgen.objectives.vae.VAEObjective`)."""

    l1_weight: float = 1.0  # of the mean absolute error per value
    l2_weight: float = 0.0  # of the mean squared error per value
    kl_weight: float = 1e-3  # of the KL divergence in nats per value of the clip


@dataclass
class PerceptualConfig(_PathConfig):
    """LPIPS between frames, on ImageNet features."""

    weight: float = 0.05  # the paper's; 0 trains without
    backbone: str = "vgg"  # vgg (the paper's), alex, squeeze
    weights: str | None = None  # file with the backbone's weights; torch hub's cache where not given
    weights_sha256: str | None = None  # of that file, where it is not torchvision's
    chunk_size: int = 16  # frames compared at a time: fewer take less memory


@dataclass
class GANConfig:
    """A discriminator, trained with the VAE from a step on."""

    weight: float = 0.05  # the paper's; 0 trains without
    loss: str = "hinge"  # hinge (the paper's), non_saturating
    discriminator: str = "2d"  # 2d judges frames, 3d clips
    channels: int = 64  # of its first layer
    num_layers: int = 3  # halvings of the frame (3d: of the clip's length too)
    adaptive: bool = True  # weight times the ratio of the reconstruction's to the GAN's gradient at the last layer
    start_step: int = 20_000  # optimizer steps without it
    warmup_steps: int = 0  # optimizer steps over which its weight then grows to its full value
    lecam_weight: float = 0.0  # LeCAM regularisation of the discriminator; 0 is none
    lr_scale: float = 1.0  # the discriminator's learning rate over the VAE's


@dataclass
class VAETrainingConfig(_PathConfig):
    """Everything `train_vae.py` reads."""

    output_dir: str = "runs/vae"  # the run folder; made if missing
    resume: str | None = None  # "latest", or the path of a checkpoint folder
    seed: int = 0  # of everything random
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    loss: VAELossConfig = field(default_factory=VAELossConfig)
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    gan: GANConfig = field(default_factory=GANConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass
class LatentsConfig:
    """How clips are encoded for the DiT, once (`vidgen.latent_cache`), and read back."""

    sample: bool = False  # draw from the posterior at every visit; else its mean, as in the paper
    crops: int = 1  # of each clip: 1 is the middle; of more, place and start are drawn at random, by seed
    flips: bool = False  # every clip also mirrored
    batch_size: int = 8  # clips encoded at a time
    shard_size: int = 256  # clips to a file; the share of work that is done over after an interruption


@dataclass
class DiffusionConfig:
    """What the DiT learns to predict, and how its samples are drawn while it trains."""

    prediction_type: str = "sample"  # sample (x0, the paper), epsilon, v_prediction, flow_prediction
    noise_schedule: str | None = None  # linear, scaled_linear, squaredcos_cap_v2; where not given, the cosine
    #   squaredcos_cap_v2, and linear for epsilon; flow_prediction has its own
    zero_terminal_snr: bool | None = None  # end in pure noise; where not given, on, but off for epsilon
    loss_weighting: str = "none"  # none (the target's own), min_snr
    min_snr_gamma: float = 5.0  # where min_snr cuts off
    timestep_sampling: str = "uniform"  # uniform, logit_normal (the middle more often)
    logit_mean: float = 0.0  # of logit_normal; above 0 more noise
    logit_std: float = 1.0  # likewise, its spread
    independent_timesteps: float = 0.0  # share of clips whose streams get timesteps of their own; else one for both
    class_dropout: float = 0.2  # share of clips trained without their class, for classifier-free guidance
    subclass_dropout: float = 0.0  # share of clips trained as the class above theirs: jump for jump/dog
    guidance_scale: float = 5.0  # of the samples drawn at validation; without classes there is none
    num_inference_steps: int = 50  # likewise


@dataclass
class DiTTrainingConfig(_PathConfig):
    """Everything `train_dit.py` and `vidgen.encode_latents` read."""

    vae: str = MISSING  # folder of a trained VAE
    output_dir: str = "runs/dit"  # the run folder; made if missing
    resume: str | None = None  # "latest", or the path of a checkpoint folder
    seed: int = 0  # of everything random
    model: ModelConfig = field(default_factory=lambda: ModelConfig(preset="paper"))
    data: DataConfig = field(default_factory=DataConfig)
    latent_cache: str | None = None  # folder of the latent cache; OUTPUT_DIR/latents where not given
    latents: LatentsConfig = field(default_factory=LatentsConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


# What numbers must be at least and at most; every whole number has a least.
MOST = {"train.ema_decay": 1}
LEAST = {
    "seed": 0,
    "data.num_validation_videos": 0,
    "data.resolution": 1,
    "data.num_frames": 1,
    "data.clips_per_video": 1,
    "perceptual.chunk_size": 1,
    "gan.channels": 1,
    "gan.num_layers": 1,
    "gan.start_step": 0,
    "gan.warmup_steps": 0,
    "latents.crops": 1,
    "latents.batch_size": 1,
    "latents.shard_size": 1,
    "diffusion.num_inference_steps": 1,
    "optim.lr_warmup_steps": 0,
    "train.train_batch_size": 1,
    "train.max_train_steps": 0,
    "train.gradient_accumulation_steps": 1,
    "train.max_grad_norm": 0,
    "train.ema_decay": 0,
    "train.logging_steps": 1,
    "train.validation_steps": 1,
    "train.checkpointing_steps": 1,
    "train.checkpoints_total_limit": 1,
    "train.dataloader_num_workers": 0,
}

Config = TypeVar("Config")


def load_config(config_class: type[Config], arguments: Sequence[str]) -> Config:
    """A config from command-line arguments: an optional `--config FILE` and any number of `dotted.key=value`.

    Raises:
        UserError: if the file is missing or malformed, a key is unknown, or a value does not fit its type or is out
            of its range.
    """
    arguments = list(arguments)
    files: list[str] = []
    while "--config" in arguments:
        at = arguments.index("--config")
        if at + 1 >= len(arguments):
            raise UserError("--config wants the path of a YAML recipe after it.")
        files.append(expand_home(arguments[at + 1]))
        del arguments[at : at + 2]
    merged = OmegaConf.structured(config_class)
    for file in files:
        merged = _merge(merged, _read_yaml(file), config_class, where=file)
    for argument in arguments:
        if "=" not in argument or argument.startswith("-"):
            raise UserError(f"{argument!r} is not an override; write key=value, for example data.root=FOLDER.")
        try:
            override = OmegaConf.from_dotlist([argument])
        except Exception as error:
            raise UserError(f"{argument!r} on the command line is not a readable value.") from error
        key, text = argument.split("=", 1)
        if key in _text_keys(config_class) and text not in ("", "null", "None"):
            OmegaConf.update(override, key, text)  # as it was typed: a folder may be called 007, or no
        merged = _merge(merged, override, config_class, where="the command line")
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        raise UserError(f"{missing[0]} is not set; give it as {missing[0]}=... on the command line or in the recipe.")
    _check_values(merged, config_class)
    for key, least in LEAST.items():
        value = OmegaConf.select(merged, key)
        if value is not None and value < least:
            raise UserError(f"{key} must be {least} or more, not {value}.")
    for key, most in MOST.items():
        if OmegaConf.select(merged, key) > most:
            raise UserError(f"{key} must be {most} or less, not {OmegaConf.select(merged, key)}.")
    return OmegaConf.to_object(merged)


def save_config(config: Any, path: str | Path) -> None:
    """The resolved config as YAML that `--config` reads back."""
    Path(path).write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))


def _check_values(config: Any, config_class: type) -> None:
    """Raise a `UserError` for a number that is not finite, anywhere, or an empty text."""
    for key, value in _leaves(OmegaConf.to_container(config)):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key} must be a finite number, not {value}.")
        if value == "" and key in _text_keys(config_class):
            raise UserError(f"{key} is empty; give it a value, or null where it may have none.")


def _read_yaml(file: str) -> Any:
    if not Path(file).is_file():
        raise UserError(f"No recipe at {file}; --config wants a YAML file such as configs/vae/base.yaml.")
    try:
        content = OmegaConf.load(file)
    except Exception as error:
        raise UserError(f"{file} is not valid YAML: {str(error).splitlines()[0]}.") from error
    if not OmegaConf.is_dict(content):
        raise UserError(f"{file} must hold keys and values, as the recipes in configs/ do.")
    return content


def _merge(config: Any, update: Any, config_class: type, where: str) -> Any:
    known = list(config_fields(config_class))
    for key in _leaf_keys(OmegaConf.to_container(update)):
        if key not in known and not any(key.startswith(f"{open_key}.") for open_key in _open_keys(config_class)):
            nearest = _nearest(key, known)
            raise UserError(f"Unknown key {key!r} in {where}; did you mean {nearest!r}?")
    for key in _text_keys(config_class):
        value = OmegaConf.select(update, key)
        if isinstance(value, bool):  # YAML's own words for these: mixed_precision: no
            OmegaConf.update(update, key, "yes" if value else "no")
    try:
        return OmegaConf.merge(config, update)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "a key"
        raise UserError(f"{key} in {where} does not fit: {str(error).splitlines()[0].rstrip('.')}.") from error


def config_fields(config_class: type, prefix: str = "") -> dict[str, Field]:
    """Every field below a config by its dotted key."""
    found: dict[str, Field] = {}
    for f in fields(config_class):
        found[prefix + f.name] = f
        if nested := nested_config(f):
            found |= config_fields(nested, f"{prefix}{f.name}.")
    return found


def _open_keys(config_class: type) -> list[str]:
    """Keys below which anything goes: dictionaries of constructor arguments, which the model itself checks."""
    return [key for key, f in config_fields(config_class).items() if f.default_factory is dict]


def _text_keys(config_class: type) -> list[str]:
    """Keys whose value is text, or text or nothing."""
    return [key for key, f in config_fields(config_class).items() if f.type in ("str", "str | None")]


def nested_config(f: Field) -> type | None:
    default = f.default_factory() if callable(f.default_factory) else None
    return type(default) if is_dataclass(default) else None


def _leaf_keys(container: Any, prefix: str = "") -> list[str]:
    if not isinstance(container, dict) or (prefix and not container):
        return [prefix.rstrip(".")]
    return [leaf for key, value in container.items() for leaf in _leaf_keys(value, f"{prefix}{key}.")]


def _leaves(container: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Every value below a container of dictionaries and lists, by its dotted key."""
    if isinstance(container, dict):
        items = container.items()
    elif isinstance(container, list):
        items = enumerate(container)
    else:
        return [(prefix.rstrip("."), container)]
    return [leaf for key, value in items for leaf in _leaves(value, f"{prefix}{key}.")]


def _nearest(key: str, known: list[str]) -> str:
    """The known key most like this one: as a whole, or by its last word."""

    def likeness(other: str) -> float:
        whole = difflib.SequenceMatcher(None, key, other).ratio()
        last = difflib.SequenceMatcher(None, key.rsplit(".", 1)[-1], other.rsplit(".", 1)[-1]).ratio()
        return max(whole, 0.99 * last)

    return max(known, key=likeness)
