"""Training loop shared by the VAE and the DiT: steps, EMA, logs, validation, checkpoints.

The host never waits for the device within a step. Whether losses and gradients are finite is decided on the device,
which skips the update where they are not; the host reads the answer after it has queued the next step. So a step is
committed (counted, averaged, logged) one step late, and the weights of the last good step are never lost.
"""

from __future__ import annotations

import functools
import json
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from diffusers import ModelMixin
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ..common.config import save_config
from ..common.environment import environment
from ..common.errors import TrainingInterrupted, UserError
from ..common.io import atomic_dir, atomic_write
from ..common.progress import progress
from ..losses import Losses
from .best_model import BEST, PREFIX, RECORD, BestModel, check_keep_best
from .checkpoints import checkpoint_step, clear_remains, find_checkpoint, save_checkpoint
from .config import DiTTrainingConfig, VAETrainingConfig
from .ema import (
    EMA_WEIGHTS,
    averaged_parameters,
    build_ema,
    ema_scope,
    gather_ema_weights,
    load_ema_weights,
)
from .failures import TrainingDiverged, VideoFailures, describe_divergence
from .gradients import clip_gradients, group_key
from .optimizers import (
    build_lr_scheduler,
    build_optimizer,
    configured_settings,
    initialize_state,
    skips_on_device,
    warmup_warning,
)
from .pretrained import TRAINER_STATE, Parent
from .random_state import keep_random_state
from .resume import CONFIG, Change, describe_changes, explain_misfit, find_changes, refuse_blocking_changes
from .sampler import InfiniteBatchSampler, SeededDataset, collate_samples, derive_seed
from .signals import StopRequest, outlive_first_signal
from .state import MetricAverager, PendingStep, TrainState
from .tracking import SpeedMeter, drop_metrics_after, log_media

Batch = dict[str, Any]
ParameterGroups = dict[str, tuple[list[nn.Parameter], float]]

SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED)  # no process has a complete matrix


class Trainer(ABC):
    """Trains `model`, a part of `objective`, on samples of `dataset`.

    Args:
        config: of the run.
        accelerator: from `build_accelerator`.
        objective: module whose forward returns a dictionary of scalars with the total loss under `loss`.
        model: the module whose parameters are averaged and saved.
        averaged: a `ModuleDict` of `model` and of others that are averaged and saved with it; None: only `model`.
        dataset: maps (epoch, index) to a sample, a dictionary.
        collate_fn: makes a batch, a dictionary, from a list of samples.
        noise_size: number of normal random numbers per sample (`batch["noise"]`).
        groups: trainable parameters by name, with their factor on the learning rate; gradients are clipped per group.
            The first is the model's. By default all trainable parameters of the objective.
        parent: the model that the run starts from, which its checkpoints record.
        frozen: modules that stay in evaluation mode.
        further_uniforms: uniform random numbers per sample, in `batch["uniform"]` after the `UNIFORMS` of every run.

    Raises:
        UserError: if the dataset is empty, the optimizer is unknown or does not support the launcher, or
            `train.keep_best` is no metric of the run.
    """

    def __init__(
        self,
        config: VAETrainingConfig | DiTTrainingConfig,
        accelerator: Accelerator,
        objective: nn.Module,
        model: ModelMixin,
        dataset: Dataset,
        collate_fn: Callable[[Sequence[dict[str, Any]]], Batch],
        noise_size: int,
        groups: ParameterGroups | None = None,
        parent: Parent | None = None,
        frozen: Sequence[nn.Module] = (),
        averaged: nn.ModuleDict | None = None,
        further_uniforms: int = 0,
    ) -> None:
        if not len(dataset):
            raise UserError("There is no clip to train on.")
        if config.optim.name != "adamw" and accelerator.distributed_type in SHARDING:
            raise UserError(
                f"optim.name={config.optim.name} needs complete tensors, which FSDP and DeepSpeed split: use adamw."
            )
        train = config.train
        check_keep_best(train.keep_best, self.validation_metrics(config))
        self.config = config
        self.accelerator = accelerator
        self.output_dir = Path(config.output_dir)
        self.model = model
        self.averaged = model if averaged is None else averaged
        self.parent = parent.record() if parent else None
        self.frozen = frozen
        self.dataset = dataset
        self.global_batch = train.train_batch_size * train.gradient_accumulation_steps * accelerator.num_processes
        self.state = TrainState()
        self.updates = 0  # optimizer steps made: those of the state, and one that is not committed yet
        self.samples_drawn = 0  # samples of all processes, of the step in progress included
        self.pending: PendingStep | None = None
        self.metrics = MetricAverager()
        self.best = BestModel(train.keep_best)
        self.video_failures = VideoFailures(self.output_dir)
        self.stop_request = StopRequest()

        # Data.
        self.sampler = InfiniteBatchSampler(len(dataset), train.train_batch_size, config.seed)
        loader = DataLoader(
            SeededDataset(dataset, noise_size, config.seed, further_uniforms),
            batch_sampler=self.sampler,
            num_workers=train.dataloader_num_workers,
            collate_fn=functools.partial(collate_samples, collate_fn),
            pin_memory=accelerator.device.type == "cuda",
            prefetch_factor=4 if train.dataloader_num_workers else None,
            worker_init_fn=outlive_first_signal,
        )

        # Model and optimizer.
        if train.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        objective._no_split_modules = model._no_split_modules  # the blocks that FSDP wraps
        if groups is None:
            groups = {"model": ([p for p in objective.parameters() if p.requires_grad], 1.0)}
        optimizer = build_optimizer(groups, config.optim, model, train.mixed_precision)
        self.objective, self.optimizer, self.loader = accelerator.prepare(objective, optimizer, loader)
        if accelerator.distributed_type == DistributedType.FSDP:
            initialize_state(self.optimizer.optimizer)
        self.lr_scheduler = build_lr_scheduler(self.optimizer, config.optim, train.max_train_steps)
        self.ema = build_ema(self.averaged, train.ema_decay)

    # --- Interface of a training -------------------------------------------------------------------------------------

    @abstractmethod
    def compute_losses(self, batch: Batch) -> Losses:
        """The objective's scalars on a batch."""

    @abstractmethod
    def validation_metrics(self, config: VAETrainingConfig | DiTTrainingConfig) -> list[str]:
        """Names of the values of `validate` that rank models. Called before `Trainer.__init__`."""

    @abstractmethod
    def validate(self, model: nn.Module) -> dict[str, float]:
        """Compute metrics, equal on every process, and draw images of the averaged model. Called on every process."""

    @abstractmethod
    def write_model(self, model: nn.Module, folder: Path, destination: Path) -> None:
        """Write the averaged model in its final form to a new folder, which becomes `destination`.

        Called on the main process.
        """

    def finish_model(self, model: nn.Module) -> None:
        """Complete the averaged model before it is written. Called on every process; does nothing by default."""
        return

    @abstractmethod
    def report_final(self, folder: Path) -> None:
        """Print where the final model is. Called on every process."""

    @abstractmethod
    def flops_per_sample(self) -> float:
        """FLOPs of the model's forward pass on one sample."""

    @abstractmethod
    def describe_batch(self, batch: Batch) -> list[str]:
        """Names of the clips in a batch."""

    def facts(self) -> dict[str, Any]:
        """Values that resuming depends on besides the config, by name, as JSON stores them."""
        facts = {"training clips": len(self.dataset), "clips per step": self.global_batch}
        return facts | ({"parent weights": self.parent["sha256"]} if self.parent else {})

    def frozen_groups(self) -> set[str]:
        """Names of parameter groups that the step in progress does not train."""
        return set()

    def on_optimizer_step(self, terms: Losses, is_finite: torch.Tensor) -> None:
        """Called after each optimizer step, with its terms on this process; does nothing by default.

        `is_finite`, a scalar on the device, is false if the update was skipped; then no state may change.
        """
        return

    # --- Training loop -----------------------------------------------------------------------------------------------

    def fit(self) -> Path:
        """Train to `train.max_train_steps`, and return the folder of the final model.

        A run that has taken all its steps already is left unchanged.

        Raises:
            UserError: if the checkpoint to resume from is missing or does not match, the folder holds checkpoints of
                another run, or a checkpoint cannot be written.
            TrainingDiverged: if a loss or gradient is not finite; a checkpoint of the step before is written.
            TrainingInterrupted: on SIGTERM or SIGINT, after writing a checkpoint.
        """
        final = self.output_dir / "final"
        checkpoint = self._find_checkpoint()
        if checkpoint is not None and self._is_finished(checkpoint, final):
            return final
        if warning := warmup_warning(self.config.optim, self.config.train.max_train_steps):
            self.accelerator.print(f"warning: {warning}")
        self._resume(checkpoint)
        self._start_run_folder()
        self.objective.train()
        for module in self.frozen:
            module.eval()
        with self.stop_request.listen():
            self._train()
        with self.ema_scope() as model:
            self._write_model(model, final)
        self.report_final(final)
        self._finish_trackers()
        self.accelerator.wait_for_everyone()
        return final

    def _train(self) -> None:
        max_steps = self.config.train.max_train_steps
        if self.state.step >= max_steps:
            return
        bar = progress(description=self.output_dir.name, total=max_steps, initial=self.state.step)
        self.meter = SpeedMeter(self.accelerator, 3 * self.flops_per_sample(), self.global_batch, max_steps)
        stop = False
        with closing(self._load_batches()) as batches:  # ends the data loading processes
            while self.state.step < max_steps and not stop:
                stop = self.train_step(batches)
                bar.update()
                self.meter.step()
                if stop or self._must_commit(self.updates):
                    stop = self._commit() or stop
                    self._log_validate_save(bar, stop)
        bar.close()
        if self.state.step < max_steps:
            self._raise_interrupted()

    def train_step(self, batches: Iterator[Batch]) -> bool:
        """Take one optimizer step and commit the previous one; returns whether a signal asks the run to stop."""
        accelerator, step = self.accelerator, PendingStep()

        # 1. Accumulate the gradients of the micro-batches.
        for batch in batches:
            with accelerator.accumulate(self.objective):
                # The seed of dropout depends on the samples, not on where the run was resumed.
                torch.manual_seed(derive_seed(self.config.seed, self.samples_drawn, accelerator.process_index))
                with accelerator.autocast():  # Accelerate's wrapper of the module does not cover FSDP
                    losses = self.compute_losses(batch)
                accelerator.backward(losses["loss"])
            step.batches.append(batch)
            step.losses.append(losses)
            self.samples_drawn += self.config.train.train_batch_size * accelerator.num_processes
            if accelerator.sync_gradients:
                break

        # 2. Clip the gradients of each parameter group.
        max_norm = self.config.train.max_grad_norm
        step.norms = clip_gradients(accelerator, self.optimizer, self.model, max_norm, self.frozen_groups())

        # 3. Commit the previous step: its flags have reached the host while the gradients were computed.
        stop = self._commit()

        # 4. Update the weights, which the optimizer skips on the device if a value is not finite. An optimizer that
        #    cannot do so makes the host wait.
        flags = self._check_finite(step)
        if skips_on_device(self.config.optim) or not flags[0].item():
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.on_optimizer_step(step.terms(), flags[0] == 0)
        self.updates += 1

        # 5. Send the flags to the host, without waiting for them.
        step.send_flags(flags)
        self.pending = step
        return stop

    def _load_batches(self) -> Generator[Batch, None, None]:
        """Endless batches from the run's position, with the time spent waiting for them measured."""
        self.sampler.start = self.samples_drawn
        batches = iter(self.loader)
        while True:
            with self.meter.waiting():
                batch = next(batches)
            self.video_failures.collect(batch)
            yield batch

    def _check_finite(self, step: PendingStep) -> torch.Tensor:
        """Flags (2,) on the device: the numbers of processes with a value that is not finite, and with a stop request.

        Tells the optimizer to skip the update if the first is not 0.
        """
        accelerator = self.accelerator
        values = [losses["loss"].detach().float() for losses in step.losses]
        if accelerator.scaler is None:  # a gradient scaler handles overflowing gradients itself
            values += step.norms.values()
        not_finite = (~torch.stack(values).isfinite().all()).float()
        flags = torch.stack([not_finite, torch.full_like(not_finite, self.stop_request.signal is not None)])
        if accelerator.num_processes > 1:
            flags = accelerator.reduce(flags, reduction="sum")
        by_library = accelerator.scaler is not None or accelerator.distributed_type == DistributedType.DEEPSPEED
        if skips_on_device(self.config.optim) and not by_library:
            self.optimizer.optimizer.found_inf = flags[0].clamp(max=1)
        return flags

    def _commit(self) -> bool:
        """Count the pending step, if there is one; returns whether a process was asked to stop."""
        step, self.pending = self.pending, None
        if step is None:
            return False
        not_finite, stop = step.read_flags()
        if not_finite:
            self._raise_diverged(step)
        self.metrics.add(step.terms())
        self.state.step += 1
        self.state.samples += self.global_batch
        if self.ema:
            self.ema.step(averaged_parameters(self.averaged).values())
        self.lr_scheduler.step()
        return stop

    def _must_commit(self, step: int) -> bool:
        """Whether a step must be committed at once, because logging, validation or a checkpoint follows."""
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            return True  # its engine updates the weights within `backward`
        train = self.config.train
        intervals = (train.logging_steps, train.validation_steps, train.checkpointing_steps)
        return step >= train.max_train_steps or any(step % interval == 0 for interval in intervals)

    def _log_validate_save(self, bar: Any, stop: bool) -> None:
        """Log, validate and save as due after the step just committed; also save before a stop."""
        train, step = self.config.train, self.state.step
        done = step >= train.max_train_steps
        if done or step % train.logging_steps == 0:
            self._log(bar)
        if done or step % train.validation_steps == 0:
            with self.meter.paused(), keep_random_state(self.accelerator.device):
                self._validate()
        if done or stop or step % train.checkpointing_steps == 0:
            with self.meter.paused():
                self._save_checkpoint()

    def _validate(self) -> None:
        """Validate and log; with `train.keep_best`, write the model if it is the best so far."""
        step = self.state.step
        with self.ema_scope() as model:
            values = self.validate(model)
            self.accelerator.log({f"{PREFIX}{name}": value for name, value in values.items()}, step)
            if self.best.update(values, step):
                self._write_model(model, self.output_dir / BEST, self.best.record)

    def log_media(self, files: Mapping[str, Path]) -> None:
        """Log images and short videos of a validation, by name, to the trackers. Called on the main process."""
        log_media(
            self.accelerator.trackers, {f"{PREFIX}{name}": file for name, file in files.items()}, self.state.step
        )

    def _log(self, bar: Any) -> None:
        means = self.metrics.compute()
        # One reduction over the processes and one transfer to the host for all terms.
        values = dict(zip(means, self.mean_over_processes(torch.stack(list(means.values()))).tolist(), strict=True))
        self.metrics = MetricAverager()
        self.video_failures.write(self.accelerator.is_main_process)
        for group in self.optimizer.param_groups:
            values[group_key("learning_rate", group)] = group["lr"]
        values["epoch"] = self.state.samples // len(self.dataset)
        values |= self.meter.read(self.state.step)
        self.accelerator.log(values, step=self.state.step)
        bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)

    def mean_over_processes(self, value: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(value, reduction="mean") if self.accelerator.num_processes > 1 else value

    @contextmanager
    def ema_scope(self) -> Iterator[nn.Module]:
        """Yield the model, or all that is averaged, in evaluation mode with its averaged weights; no gradients.

        It is complete on every process.
        """
        with (
            ema_scope(self.averaged, self.ema, self.accelerator.device) as model,
            torch.no_grad(),
            self.accelerator.autocast(),
        ):
            yield model

    def _write_model(self, model: nn.Module, folder: Path, record: dict[str, Any] | None = None) -> None:
        """Write the averaged model atomically, with the validation that it was chosen by. Called on every process."""
        self.finish_model(model)
        if self.accelerator.is_main_process:
            with atomic_dir(folder) as unfinished:
                self.write_model(model, unfinished, folder)
                if record is not None:
                    (unfinished / RECORD).write_text(json.dumps(record))

    # --- Early ends --------------------------------------------------------------------------------------------------

    def _raise_interrupted(self) -> None:
        number = max(gather_object([self.stop_request.signal or 0]))
        self._finish_trackers()
        step = self.state.step
        raise TrainingInterrupted(
            f"stopped by {signal.Signals(number).name} after step {step}; "
            f"{self.output_dir / f'checkpoint-{step}'} is written: continue with resume=latest",
            number,
        )

    def _raise_diverged(self, step: PendingStep) -> None:
        description = describe_divergence(step, self.describe_batch)
        checkpoint = self._save_checkpoint()
        self._finish_trackers()
        raise TrainingDiverged(
            f"Training diverged at step {self.state.step + 1} {description}. {checkpoint} holds the state after the "
            "last good step; try a lower optim.learning_rate first."
        )

    # --- Checkpoints -------------------------------------------------------------------------------------------------

    def _save_checkpoint(self) -> Path:
        self.video_failures.write(self.accelerator.is_main_process)
        limit = self.config.train.checkpoints_total_limit
        return save_checkpoint(self.accelerator, self.output_dir, self.state.step, limit, self._write_state)

    def _write_state(self, folder: Path) -> None:
        self.accelerator.save_state(str(folder))
        state = vars(self.state) | self.metrics.state_dict() | {"facts": self.facts(), "parent": self.parent}
        ema_weights = None
        if self.best.record:
            state["best"] = self.best.record
        if self.ema:
            state["averaged_steps"] = self.ema.optimization_step
            ema_weights = gather_ema_weights(self.averaged, self.ema)
        if self.accelerator.is_main_process:
            (folder / TRAINER_STATE).write_text(json.dumps(state))
            save_config(self.config, folder / CONFIG)
            if ema_weights:
                save_file(ema_weights, folder / EMA_WEIGHTS)

    def _find_checkpoint(self) -> Path | None:
        if self.accelerator.is_main_process:
            clear_remains(self.output_dir)
        self.accelerator.wait_for_everyone()
        return find_checkpoint(self.output_dir, self.config.resume)

    def _is_finished(self, checkpoint: Path, final: Path) -> bool:
        """Whether there is nothing left to do: the steps are taken, and the final model is newer than the checkpoint.

        An older one has fewer steps: the run was killed before it wrote the final model of all steps.
        """
        step, max_steps = checkpoint_step(checkpoint), self.config.train.max_train_steps
        if step < max_steps:
            return False
        is_newer = final.is_dir() and final.stat().st_mtime >= (checkpoint / TRAINER_STATE).stat().st_mtime
        [is_newer] = broadcast_object_list([is_newer])
        self.accelerator.print(
            f"Nothing to train: {checkpoint} has taken {step} steps, and train.max_train_steps is {max_steps}; "
            f"{final} is {'left as it is' if is_newer else 'written from the checkpoint'}."
        )
        return is_newer

    def _resume(self, checkpoint: Path | None) -> None:
        """Load a checkpoint, and warn of settings that differ from it.

        Raises:
            UserError: if it cannot be read, or its run differs in a way that makes resuming impossible.
        """
        changes: list[Change] = []
        if checkpoint is not None:
            with explain_misfit(checkpoint, changes):
                saved = json.loads((checkpoint / TRAINER_STATE).read_text())
                changes += find_changes(checkpoint, self.config, saved.get("facts", {}), self.facts())
                refuse_blocking_changes(checkpoint, changes)
                self._read_state(checkpoint, saved)
        if changes:
            self.accelerator.print(
                f"warning: the resumed run will not equal an uninterrupted one: since {checkpoint.name} was written, "
                f"{describe_changes(changes)}."
            )
        if self.accelerator.is_main_process:
            drop_metrics_after(self.output_dir, self.state.step if checkpoint else -1)
        if checkpoint is not None:
            self.accelerator.print(f"Resumed from {checkpoint}.")

    def _read_state(self, checkpoint: Path, saved: dict[str, Any]) -> None:
        if saved["step"] != checkpoint_step(checkpoint):
            raise ValueError(f"it was written after step {saved['step']}.")
        # Learning rates and decays come from this run's config, not from the checkpoint.
        settings = [configured_settings(group, self.config.optim) for group in self.optimizer.param_groups]
        self.accelerator.load_state(str(checkpoint))
        for group, values in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(values)
        self.accelerator.step = 0  # of accumulation: checkpoints are written between optimizer steps
        self.state = TrainState(saved["step"], saved["samples"])
        self.updates, self.samples_drawn = self.state.step, self.state.samples
        optim, max_steps = self.config.optim, self.config.train.max_train_steps
        self.lr_scheduler = build_lr_scheduler(self.optimizer, optim, max_steps, after=self.state.step)
        self.metrics.load_state_dict(saved, self.accelerator.process_index, self.accelerator.device)
        self.best.load(saved.get("best"))
        if self.ema:
            load_ema_weights(self.averaged, self.ema, checkpoint)
            self.ema.optimization_step = saved["averaged_steps"]

    # --- Run folder --------------------------------------------------------------------------------------------------

    def _start_run_folder(self) -> None:
        self.accelerator.init_trackers("logs")
        if self.accelerator.is_main_process:
            with atomic_write(self.output_dir / CONFIG) as path:
                save_config(self.config, path)
            with atomic_write(self.output_dir / "environment.yaml") as path:
                OmegaConf.save(environment(), path)

    def _finish_trackers(self) -> None:
        """Close the trackers; `Accelerator.end_training` would also leave the process group, as `run_program` does."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
