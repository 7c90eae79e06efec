"""Comparison of a checkpoint's settings with those of the run that resumes it.

A checkpoint keeps the config of its run (`config.yaml`) and the run's facts: values that the config does not contain,
such as the number of training clips. A difference either makes resuming impossible, or makes the resumed run differ
from an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from yaml import YAMLError

from autoencoder.presets import rename_old_arguments

from ..common.config import config_values
from ..common.errors import UserError
from .checkpoints import find_checkpoint
from .config import DiTTrainingConfig, OptimConfig, VAETrainingConfig
from .optimizers import CONSTANT_SCHEDULES, warmup_steps

TrainingConfig = VAETrainingConfig | DiTTrainingConfig

CONFIG = "config.yaml"
# Errors of torch, safetensors and Accelerate for damaged files and for tensors that do not match.
UNREADABLE = (RuntimeError, ValueError, OSError, KeyError, EOFError, SafetensorError, UnpicklingError)

# Keys that affect neither the weights nor the order of the samples.
WITHOUT_EFFECT = {
    "output_dir",
    "resume",
    "latent_cache",
    "latents.batch_size",
    "latents.shard_size",
    "text.batch_size",
    "perceptual.weights",
    "perceptual.weights_sha256",
    "diffusion.guidance_scale",
    "diffusion.num_inference_steps",
    "train.gradient_checkpointing",
    "train.logging_steps",
    "train.validation_steps",
    "train.keep_best",
    "train.checkpointing_steps",
    "train.checkpoints_total_limit",
    "train.dataloader_num_workers",
    "train.report_to",
}
WITHOUT_EFFECT_ON_DIT = {"data.validation_root", "data.num_validation_videos"}
PATHS = {
    "vae",
    "text.encoder",
    "model.pretrained",
    "gan.pretrained",
    "data.root",
    "data.split_files",
    "data.validation_root",
}
# Facts that define the task; the weights are useless for another.
TASK_FACTS = {"encoder weights", "vae weights", "parent weights", "classes", "text encoder", "tokenizer"}

# The model behind a path, which may be in another folder.
FACTS_OF_PATHS = {
    "encoder weights": "vae",
    "vae weights": "vae",
    "parent weights": "model.pretrained",
    "text encoder": "text.encoder",
}


@dataclass(frozen=True)
class Change:
    """A config key, or a fact, that differs between a checkpoint and the run that resumes it.

    Attributes:
        blocking: whether it makes resuming impossible.
    """

    key: str
    before: Any
    now: Any
    blocking: bool = False

    def __str__(self) -> str:
        return f"{self.key} changed from {_shorten(self.before)} to {_shorten(self.now)}"


def find_changes(
    checkpoint: Path, config: TrainingConfig, before: dict[str, Any], now: dict[str, Any]
) -> list[Change]:
    """List the differences between a checkpoint and the run that resumes it, in the order of the config.

    Args:
        checkpoint: its folder. Old ones hold no config; that of their run folder is read instead.
        config: of the run that resumes it.
        before, now: the facts of the checkpoint and of the run.
    """
    changes = _config_changes(read_saved_config(checkpoint), config)
    if "encoder weights" in before:  # older checkpoints state the hash of the whole VAE instead
        now = {name: value for name, value in now.items() if name != "vae weights"}
    # The same model in another folder, or a VAE with the same latents, is no change.
    for fact, key in FACTS_OF_PATHS.items():
        if fact in before and before[fact] == now.get(fact):
            changes = [change for change in changes if change.key != key]
    # A change of the batch size explains that of the clips per step; otherwise the number of processes changed.
    if {change.key for change in changes} & {"train.train_batch_size", "train.gradient_accumulation_steps"}:
        now = {name: value for name, value in now.items() if name != "clips per step"}
    changes += [
        Change(name, before[name], value, blocking=name in TASK_FACTS)
        for name, value in now.items()
        if name in before and before[name] != value
    ]
    return changes


def describe_changes(changes: list[Change]) -> str:
    """The changes in one line: `optim.learning_rate changed from 0.001 to 0.0001, seed changed from 0 to 1`."""
    return ", ".join(map(str, changes))


def refuse_blocking_changes(checkpoint: Path, changes: list[Change]) -> None:
    """Raise a `UserError` that names all changes if one of them makes resuming impossible."""
    blocking = [change for change in changes if change.blocking]
    others = [change for change in changes if not change.blocking]
    if blocking:
        raise UserError(
            f"{checkpoint} cannot be resumed, because {describe_changes(blocking)}. Restore the former "
            f"value{'s'[: len(blocking) > 1]}, or start a new run in another output_dir."
            + (f" Other changes: {describe_changes(others)}." if others else "")
        )


@contextmanager
def explain_misfit(checkpoint: Path, changes: list[Change]) -> Iterator[None]:
    """Turn errors of reading a checkpoint into one `UserError` that names the changes in the list by then."""
    try:
        yield
    except UserError:
        raise
    except UNREADABLE as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".:")
        if changes:
            reason = f"{describe_changes(changes)} ({reason})"
        raise UserError(f"The checkpoint {checkpoint} does not fit this run: {reason}.") from error


def read_saved_config(checkpoint: Path) -> dict[str, Any]:
    """The config that a checkpoint was written with, as nested dictionaries; empty if it cannot be read."""
    for path in (checkpoint / CONFIG, checkpoint.parent / CONFIG):
        try:
            saved = OmegaConf.to_container(OmegaConf.load(path))
        except (OSError, OmegaConfBaseException, YAMLError, UnicodeDecodeError):
            continue
        if isinstance(saved, dict):
            return saved
    return {}


def saved_mixed_precision(config: TrainingConfig) -> str | None:
    """The mixed precision of the run whose checkpoint `resume` names; None if there is none."""
    checkpoint = find_checkpoint(config.output_dir, config.resume)
    saved = read_saved_config(checkpoint).get("train", {}) if checkpoint is not None else {}
    precision = saved.get("mixed_precision")
    return None if precision == "auto" else precision


def _config_changes(saved: dict[str, Any], config: TrainingConfig) -> list[Change]:
    before, now = {}, config_values(config)
    for key in now:
        value: Any = saved
        for part in key.split("."):
            value = value.get(part, ...) if isinstance(value, dict) else ...
        if value is not ...:  # keys that are newer than the checkpoint cannot be compared
            before[key] = value
    keys = [
        key
        for key in before
        if _comparable(key, before[key]) != _comparable(key, now[key]) and not _has_no_effect(key, before, now)
    ]
    return [Change(key, before[key], now[key], _is_blocking(key, before[key], now[key])) for key in keys]


def _comparable(key: str, value: Any) -> Any:
    if key == "model.overrides":
        return rename_old_arguments(value)
    return str(Path(value).expanduser().resolve()) if key in PATHS and isinstance(value, str) else value


def _has_no_effect(key: str, before: dict[str, Any], now: dict[str, Any]) -> bool:
    if key in WITHOUT_EFFECT or key.startswith("validation."):
        return True
    if "vae" in now and key in WITHOUT_EFFECT_ON_DIT:  # but the number of videos that are held out of `root`
        return key != "data.num_validation_videos" or not now["data.hold_out"]
    if key == "train.mixed_precision":
        return "auto" in (before[key], now[key])  # runs save the precision that `auto` selected
    if key == "train.max_train_steps":
        return _schedule(before) == _schedule(now)
    # The settings of a loss matter only if both runs have it; otherwise its weight is the change.
    weight = f"{key.split('.')[0]}.weight"
    return weight in ("gan.weight", "perceptual.weight") and key != weight and not (before.get(weight) and now[weight])


def _schedule(values: dict[str, Any]) -> tuple[int, int | None] | None:
    """Warmup and length of the learning rate schedule, None for a length without effect; None if unknown."""
    names, length = ("optim.lr_scheduler", "optim.lr_warmup_steps"), values["train.max_train_steps"]
    if any(name not in values for name in names):
        return None
    scheduler, warmup = (values[name] for name in names)
    optim = OptimConfig(lr_scheduler=scheduler, lr_warmup_steps=warmup)
    return (warmup_steps(optim, length), None if scheduler in CONSTANT_SCHEDULES else length)


def _is_blocking(key: str, before: Any, now: Any) -> bool:
    if key == "gan.weight":  # one of the runs has no discriminator
        return bool(now) != bool(before)
    if key == "train.ema_decay":  # the checkpoint has no average
        return bool(now) and not before
    return key in ("diffusion.prediction_type", "optim.name", "model.pretrained", "train.freeze", "lora.rank")


def _shorten(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
