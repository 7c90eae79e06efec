"""The training loop every program here shares: steps, averages, logs, checkpoints; devices are Accelerate's."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel
from omegaconf import OmegaConf
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ..config import DiTTrainingConfig, VAETrainingConfig, save_config
from ..environment import environment
from ..errors import UserError
from ..progress import progress
from .checkpoints import find_checkpoint, save_checkpoint
from .optimizers import build_lr_scheduler, build_optimizer
from .tracking import JSONLTracker, forget_steps_after

TrainingConfig = VAETrainingConfig | DiTTrainingConfig


def build_accelerator(config: TrainingConfig) -> Accelerator:
    """The Accelerator of a run: precision, accumulation and trackers from the config; seeds set.

    Raises:
        UserError: if `train.mixed_precision` or `train.report_to` is unknown.
    """
    train, output_dir = config.train, Path(config.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    trackers = [] if train.report_to in ("none", "") else [name.strip() for name in train.report_to.split(",")]
    try:
        accelerator = Accelerator(
            mixed_precision=train.mixed_precision,
            gradient_accumulation_steps=train.gradient_accumulation_steps,
            log_with=[JSONLTracker(output_dir), *trackers],
            project_dir=output_dir,
            step_scheduler_with_optimizer=False,
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=config.seed),
        )
    except ValueError as error:
        raise UserError(f"train.mixed_precision or train.report_to does not fit: {error}") from error
    set_seed(config.seed)
    return accelerator


class TrainingDiverged(UserError):
    """The loss or the gradient stopped being finite."""


class Position:
    """Where in the data a run is: counted in optimizer steps, epochs, and batches taken of the current epoch."""

    def __init__(self) -> None:
        self.step = self.epoch = self.batches = 0

    def state_dict(self) -> dict[str, int]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, int]) -> None:
        vars(self).update(state)


class Trainer(ABC):
    """Trains `model`, which lives inside `objective`, on batches of `dataset`; leaves the run folder DESIGN asks for.

    Args:
        config: the run's config.
        accelerator: from `build_accelerator`.
        objective: module whose forward gives a dict of scalar terms with the total under `loss`.
        model: the part of it whose parameters are averaged and saved.
        dataset: maps an index to a sample; `set_epoch(epoch)` is called where there is one.
        collate_fn: as in `DataLoader`.

    Raises:
        UserError: if the data set does not fill one batch.
    """

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        objective: nn.Module,
        model: ModelMixin,
        dataset: Dataset,
        collate_fn: Any = None,
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.output_dir = Path(config.output_dir)
        self.model = model
        self.dataset = dataset
        batch = config.train.train_batch_size * accelerator.num_processes
        if len(dataset) < batch:
            raise UserError(
                f"{len(dataset)} training clips do not fill one batch of {batch}; set train.train_batch_size to "
                f"{len(dataset) // accelerator.num_processes or 1} or less, or give more clips."
            )
        if config.train.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        loader = DataLoader(
            dataset,
            batch_size=config.train.train_batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=config.train.dataloader_num_workers,
            collate_fn=collate_fn,
            pin_memory=accelerator.device.type == "cuda",
            # Its own: starting to read would else draw from the generator of the model's noise, on resuming once more.
            generator=torch.Generator().manual_seed(config.seed),
        )
        optimizer = build_optimizer(objective, config.optim)
        self.objective, self.optimizer, self.loader = accelerator.prepare(objective, optimizer, loader)
        self.lr_scheduler = build_lr_scheduler(self.optimizer, config.optim, config.train.max_train_steps)
        self.ema = None
        if config.train.ema_decay > 0:
            self.ema = EMAModel(list(model.parameters()), decay=config.train.ema_decay, foreach=True)
            self.ema.to(accelerator.device)
        self.position = Position()
        accelerator.register_for_checkpointing(self.position, self.lr_scheduler, *([self.ema] if self.ema else []))

    # --- what a particular training fills in -----------------------------------------------------------------------

    @abstractmethod
    def compute_losses(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The objective's terms on a batch."""

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """Numbers and pictures of the averaged model; on the main process only."""

    @abstractmethod
    def save_final(self, folder: Path) -> None:
        """The averaged model in its final form; on the main process only."""

    def describe_batch(self, batch: dict[str, Any]) -> str:
        """Which clips a batch held, for the message of a diverged run."""
        return "unnamed clips"

    def note_batch(self, batch: dict[str, Any]) -> None:
        """Keep what a batch reports besides its tensors; nothing by default."""
        return

    # --- the loop --------------------------------------------------------------------------------------------------

    def fit(self) -> Path:
        """Train to `train.max_train_steps` and return the folder of the final model.

        Raises:
            UserError: if the checkpoint to resume from is missing or does not fit.
            TrainingDiverged: if the loss is not finite at a logging step.
        """
        train, accelerator, position = self.config.train, self.accelerator, self.position
        self._start_run_folder()
        self._resume()
        self.objective.train()
        bar = progress(description=self.output_dir.name, total=train.max_train_steps, initial=position.step)
        sums: dict[str, torch.Tensor] = {}
        summed, since = 0, time.perf_counter()
        for batch in self._batches() if position.step < train.max_train_steps else ():
            self.note_batch(batch)
            with accelerator.accumulate(self.objective):
                losses = self.compute_losses(batch)
                accelerator.backward(losses["loss"])
                if accelerator.sync_gradients:
                    losses["grad_norm"] = accelerator.clip_grad_norm_(self.objective.parameters(), train.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            self.lr_scheduler.step()
            if self.ema:
                self.ema.step(self.model.parameters())
            position.step += 1
            bar.update()
            sums = {name: sums.get(name, 0.0) + value.detach().float() for name, value in losses.items()}
            summed += 1
            step, done = position.step, position.step >= train.max_train_steps
            if done or step % train.logging_steps == 0:
                clips = summed * train.train_batch_size * train.gradient_accumulation_steps * accelerator.num_processes
                means = {name: value / summed for name, value in sums.items()}
                self._log(means, clips / (time.perf_counter() - since), batch, bar)
                sums, summed, since = {}, 0, time.perf_counter()
            if done or step % train.validation_steps == 0:
                self._validate()
                since = time.perf_counter()
            if done or step % train.checkpointing_steps == 0:
                save_checkpoint(accelerator, self.output_dir, step, train.checkpoints_total_limit)
                since = time.perf_counter()
            if done:
                break
        bar.close()
        final = self.output_dir / "final"
        if accelerator.is_main_process:
            with self.averaged():
                self.save_final(final)
        accelerator.wait_for_everyone()
        accelerator.end_training()
        return final

    @contextmanager
    def averaged(self) -> Iterator[ModelMixin]:
        """The model in evaluation mode with its averaged weights, for the length of a `with` block."""
        training = self.model.training
        if self.ema:
            self.ema.store(self.model.parameters())
            self.ema.copy_to(self.model.parameters())
        self.model.eval()
        try:
            with torch.no_grad(), self.accelerator.autocast():
                yield self.model
        finally:
            self.model.train(training)
            if self.ema:
                self.ema.restore(self.model.parameters())

    def _batches(self) -> Iterator[dict[str, Any]]:
        """Batches without end, from the position the run stands at."""
        while True:
            # Accelerate tells the sampler of the epoch, but a dataset only in a single process.
            self.loader.set_epoch(self.position.epoch)
            if hasattr(self.dataset, "set_epoch"):
                self.dataset.set_epoch(self.position.epoch)
            loader = self.loader
            if self.position.batches:
                loader = self.accelerator.skip_first_batches(loader, self.position.batches)
            for batch in loader:
                self.position.batches += 1
                yield batch
            self.position.epoch += 1
            self.position.batches = 0

    def _start_run_folder(self) -> None:
        self.accelerator.init_trackers("logs")
        if self.accelerator.is_main_process:
            save_config(self.config, self.output_dir / "config.yaml")
            OmegaConf.save(environment(), self.output_dir / "environment.yaml")

    def _resume(self) -> None:
        checkpoint = find_checkpoint(self.output_dir, self.config.train.resume_from_checkpoint)
        if checkpoint is None:
            forget_steps_after(self.output_dir, -1)
            return
        try:
            self.accelerator.load_state(str(checkpoint))
        except (RuntimeError, ValueError, OSError, KeyError, EOFError, SafetensorError, UnpicklingError) as error:
            raise UserError(
                f"The checkpoint {checkpoint} does not fit this run: {str(error).splitlines()[0]}"
            ) from error
        if self.ema:
            self.ema.to(self.accelerator.device)
        if self.accelerator.is_main_process:
            forget_steps_after(self.output_dir, self.position.step)
        self.accelerator.print(f"Resumed from {checkpoint}.")

    def _log(self, means: dict[str, torch.Tensor], clips_per_second: float, batch: dict[str, Any], bar: Any) -> None:
        step = self.position.step
        # One reduction and one transfer for all terms, the only host sync there is.
        reduced = self.accelerator.reduce(torch.stack(list(means.values())), reduction="mean").tolist()
        values = dict(zip(means, reduced, strict=True))
        if not all(map(math.isfinite, reduced)):
            terms = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            raise TrainingDiverged(
                f"Training diverged at or before step {step} ({terms}); the last batch held "
                f"{self.describe_batch(batch)}."
            )
        values["learning_rate"] = self.lr_scheduler.get_last_lr()[0]
        values["epoch"] = self.position.epoch
        values["clips_per_second"] = clips_per_second
        self.accelerator.log(values, step=step)
        bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)

    def _validate(self) -> None:
        if self.accelerator.is_main_process:
            with self.averaged():
                values = self.validate()
            self.accelerator.log({f"validation/{name}": value for name, value in values.items()}, self.position.step)
        self.accelerator.wait_for_everyone()
