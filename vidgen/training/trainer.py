"""The training loop every program here shares: steps, averages, logs, checkpoints; devices are Accelerate's.

A step is committed one step late: whether its gradients were finite is known on the device, the update is skipped
there where they were not, and the host reads the answer only once the next step's work is queued. So nothing waits,
and the weights of the last good step are never lost.
"""

from __future__ import annotations

import functools
import json
import math
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, broadcast_object_list, gather_object, set_seed
from diffusers import ModelMixin
from diffusers.training_utils import EMAModel
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import DataLoader, Dataset

from pipelines.finite import NonFiniteError

from ..common.config import save_config
from ..common.environment import environment, set_cpu_threads
from ..common.errors import TrainingInterrupted, UserError
from ..common.io import atomic_write
from ..common.precision import agree_on_mixed_precision
from ..common.progress import progress
from ..data.dataset import BadVideos
from .checkpoints import checkpoint_step, clear_remains, find_checkpoint, save_checkpoint
from .config import DiTTrainingConfig, VAETrainingConfig
from .optimizers import build_lr_scheduler, build_optimizer, start_state, warmup_warning
from .resume import (
    CONFIG,
    Change,
    describe_changes,
    explain_misfit,
    find_changes,
    read_saved_config,
    refuse_blocking_changes,
)
from .sampler import EpochStream, TrainingSamples, collate_samples, derived_seed
from .signals import StopRequest, outlive_first_signal
from .tracking import JSONLTracker, SpeedMeter, forget_steps_after

TrainingConfig = VAETrainingConfig | DiTTrainingConfig
Losses = dict[str, torch.Tensor]

TRAINER_STATE, AVERAGED_WEIGHTS = "trainer.json", "averaged.safetensors"
SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED)  # no process has a whole matrix


def build_accelerator(config: TrainingConfig) -> Accelerator:
    """The Accelerator of a run: precision, accumulation and trackers from the config; seeds set.

    `train.mixed_precision` of the config is replaced by what `auto` stands for here, so that it is saved with the run.

    Raises:
        UserError: if `train.mixed_precision` or `train.report_to` is unknown, `output_dir` cannot be made, or the
            launcher asks for FSDP 1.
    """
    train, output_dir = config.train, Path(config.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir: the folder {output_dir} cannot be made ({error.strerror}).") from error
    trackers = [] if train.report_to in ("none", "") else [name.strip() for name in train.report_to.split(",")]
    set_cpu_threads()
    train.mixed_precision = agree_on_mixed_precision(
        train.mixed_precision, _precision_of_resumed_run(config)
    ).precision
    try:
        accelerator = Accelerator(
            mixed_precision=train.mixed_precision,
            gradient_accumulation_steps=train.gradient_accumulation_steps,
            log_with=[JSONLTracker(output_dir), *trackers],
            project_dir=output_dir,
            step_scheduler_with_optimizer=False,
            dataloader_config=DataLoaderConfiguration(non_blocking=True),
        )
    except ValueError as error:
        raise UserError(f"train.mixed_precision or train.report_to does not fit: {error}") from error
    known = {"all", *map(str, get_available_trackers())}
    for name in set(trackers) - known:  # which Accelerate passes over in silence
        raise UserError(f"train.report_to: {name} is not installed; pip install {name}, or train.report_to=none.")
    if accelerator.distributed_type == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise UserError("FSDP 1 is not supported; set fsdp_version: 2, as configs/accelerate/fsdp2.yaml does.")
        # Precision is autocast's, as it is without FSDP, whose own policy would round the clips to compare with, too.
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings |= {
            "train_micro_batch_size_per_gpu": train.train_batch_size,
            "gradient_clipping": train.max_grad_norm,
        }
    set_seed(config.seed)
    return accelerator


def _precision_of_resumed_run(config: TrainingConfig) -> str | None:
    """The mixed precision of the run whose checkpoint `resume` names; None where nothing is resumed."""
    checkpoint = find_checkpoint(config.output_dir, config.resume)
    saved = read_saved_config(checkpoint).get("train", {}) if checkpoint is not None else {}
    precision = saved.get("mixed_precision")
    return None if precision == "auto" else precision


class TrainingDiverged(UserError):
    """The loss or the gradient stopped being finite."""


@dataclass
class Position:
    """How far a run is: optimizer steps taken, and samples seen by all processes together."""

    step: int = 0
    samples: int = 0


@dataclass
class Means:
    """Running means of the terms since the last logged step, kept on the device."""

    sums: Losses = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, terms: Losses) -> None:
        for name, value in terms.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def compute(self) -> Losses:
        return {name: value / self.counts[name] for name, value in self.sums.items()}


@dataclass
class Step:
    """A step on its way: what it was computed from, and what will tell whether it was sound."""

    batches: list[Any] = field(default_factory=list)
    losses: list[Losses] = field(default_factory=list)
    norms: Losses = field(default_factory=dict)
    flags: torch.Tensor | None = None  # on the host, once `ready`: (not finite, asked to stop), 0 where not
    ready: torch.cuda.Event | None = None

    def terms(self) -> Losses:
        """The means over the step's micro-batches, and the gradient norms."""
        means = {
            name: torch.stack([losses[name].detach() for losses in self.losses]).mean() for name in self.losses[0]
        }
        return means | self.norms

    def read_flags(self) -> tuple[bool, bool]:
        if self.ready is not None:
            self.ready.synchronize()
        not_finite, stop = self.flags.tolist()
        return not_finite > 0, stop > 0


class Trainer(ABC):
    """Trains `model`, which lives inside `objective`, on samples of `dataset`; leaves the run folder DESIGN asks for.

    Args:
        config: the run's config.
        accelerator: from `build_accelerator`.
        objective: module whose forward gives a dict of scalar terms with the total under `loss`.
        model: the part of it whose parameters are averaged and saved.
        dataset: maps (epoch, index) to a sample, a dict.
        collate_fn: makes a batch, a dict, of a list of samples.
        noise_size: normal numbers that a sample's loss is computed with (`batch["noise"]`).
        groups: parameters by name with their share of the learning rate, each with a gradient norm of its own; the
            first is the model's. By default all that the objective trains.

    Raises:
        UserError: if the data set is empty, or the optimizer is unknown or does not fit the launcher.
    """

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Accelerator,
        objective: nn.Module,
        model: ModelMixin,
        dataset: Dataset,
        collate_fn: Callable[[Sequence[dict[str, Any]]], dict[str, Any]],
        noise_size: int,
        groups: dict[str, tuple[list[nn.Parameter], float]] | None = None,
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.output_dir = Path(config.output_dir)
        self.model = model
        self.dataset = dataset
        self.bad_videos = BadVideos(self.output_dir / "bad_videos.jsonl")
        self._skipped: dict[tuple[str, str], None] = {}  # an ordered set
        self.fallbacks: dict[tuple[str, str], None] = {}  # another: what PyAV read in place of a chosen decoder
        if not len(dataset):
            raise UserError("There is no clip to train on.")
        if config.train.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        self.stream = EpochStream(len(dataset), config.train.train_batch_size, config.seed)
        workers = config.train.dataloader_num_workers
        loader = DataLoader(
            TrainingSamples(dataset, noise_size, config.seed),
            batch_sampler=self.stream,
            num_workers=workers,
            collate_fn=functools.partial(collate_samples, collate_fn),
            pin_memory=accelerator.device.type == "cuda",
            prefetch_factor=4 if workers else None,
            worker_init_fn=outlive_first_signal,
        )
        objective._no_split_modules = model._no_split_modules  # what FSDP wraps
        if groups is None:
            groups = {"model": ([p for p in objective.parameters() if p.requires_grad], 1.0)}
        if config.optim.name != "adamw" and accelerator.distributed_type in SHARDING:
            raise UserError(
                f"optim.name={config.optim.name} needs whole matrices, which FSDP and DeepSpeed split: take adamw."
            )
        optimizer = build_optimizer(groups, config.optim, model, config.train.mixed_precision)
        self.objective, self.optimizer, self.loader = accelerator.prepare(objective, optimizer, loader)
        if accelerator.distributed_type == DistributedType.FSDP:
            start_state(self.optimizer.optimizer)
        self.lr_scheduler = build_lr_scheduler(self.optimizer, config.optim, config.train.max_train_steps)
        self.ema = None
        if config.train.ema_decay > 0:
            self.ema = EMAModel(list(model.parameters()), decay=config.train.ema_decay, foreach=True)
        self.position = Position()
        self.updates = 0  # steps whose update is made: the position's, or one more
        self.means = Means()
        self.stop_request = StopRequest()

    # --- what a particular training fills in -----------------------------------------------------------------------

    @abstractmethod
    def compute_losses(self, batch: dict[str, Any]) -> Losses:
        """The objective's terms on a batch."""

    @abstractmethod
    def validate(self, model: ModelMixin) -> dict[str, float]:
        """Numbers and pictures of the averaged model, which is whole on every process. Called on all of them."""

    @abstractmethod
    def save_final(self, model: ModelMixin, folder: Path) -> None:
        """The averaged model in its final form, written by the main process. Called on all of them."""

    @abstractmethod
    def flops_per_sample(self) -> float:
        """FLOPs of the model's forward pass on one sample."""

    @abstractmethod
    def describe_batch(self, batch: dict[str, Any]) -> list[str]:
        """Which clips a batch held."""

    def facts(self) -> dict[str, Any]:
        """What resuming depends on beside the config: values by name, as JSON keeps them."""
        return {"training clips": len(self.dataset), "clips per step": self._global_batch}

    def idle_groups(self) -> set[str]:
        """Parameter groups that the step under way does not train."""
        return set()

    def after_update(self, terms: Losses, sound: torch.Tensor) -> None:
        """What follows an update of the weights, given the step's terms on this process; nothing by default.

        `sound`, a scalar on the device, is false if the update was skipped: then nothing may change.
        """
        return

    # --- the loop --------------------------------------------------------------------------------------------------

    def fit(self) -> Path:
        """Train to `train.max_train_steps` and return the folder of the final model.

        A run that has taken these steps already is left as it is.

        Raises:
            UserError: if the checkpoint to resume from is missing or does not fit, the folder holds those of another
                run, or one cannot be written.
            TrainingDiverged: if a loss or gradient is not finite; a checkpoint of the step before is written.
            TrainingInterrupted: on SIGTERM or Ctrl-C, after writing a checkpoint.
        """
        final = self.output_dir / "final"
        checkpoint = self._find_checkpoint()
        if checkpoint is not None and checkpoint_step(checkpoint) >= self.config.train.max_train_steps:
            keep = self._is_newer(final, checkpoint)
            self.accelerator.print(
                f"Nothing to train: {checkpoint} has taken {checkpoint_step(checkpoint)} steps, and "
                f"train.max_train_steps is {self.config.train.max_train_steps}; "
                f"{final} is {'left as it is' if keep else 'written from the checkpoint'}."
            )
            if keep:
                return final
        if warning := warmup_warning(self.config.optim, self.config.train.max_train_steps):
            self.accelerator.print(f"warning: {warning}")
        self._resume(checkpoint)
        self._start_run_folder()
        self.objective.train()
        with self.stop_request:
            self._train()
        with self.averaged() as model:
            self.save_final(model, final)
        self._finish_trackers()
        self.accelerator.wait_for_everyone()
        return final

    def _train(self) -> None:
        train, accelerator, position = self.config.train, self.accelerator, self.position
        if position.step >= train.max_train_steps:
            return
        bar = progress(description=self.output_dir.name, total=train.max_train_steps, initial=position.step)
        self.meter = SpeedMeter(accelerator, 3 * self.flops_per_sample(), self._global_batch, train.max_train_steps)
        self.updates, taken = position.step, position.samples  # ahead of `position`, which counts what is committed
        pending, step = None, Step()
        for batch in self._batches():
            with accelerator.accumulate(self.objective):
                torch.manual_seed(derived_seed(self.config.seed, taken, accelerator.process_index))  # for dropout
                with accelerator.autocast():  # Accelerate's own wrapping leaves out FSDP
                    losses = self.compute_losses(batch)
                accelerator.backward(losses["loss"])
                step.losses.append(losses)
                step.batches.append(batch)
                taken += train.train_batch_size * accelerator.num_processes
                if not accelerator.sync_gradients:
                    continue
                step.norms = self._clip_gradients()
                stop = self._commit(pending) if pending is not None else False
                self._apply(step)
            pending, step = step, Step()
            bar.update()
            self.meter.step()
            if stop or self._is_due(position.step + 1):
                stop = self._commit(pending) or stop
                pending = None
                self._follow_up(bar, stop)
            if stop or position.step >= train.max_train_steps:
                break
        bar.close()
        if position.step < train.max_train_steps:
            self._stop()

    def _batches(self) -> Iterator[dict[str, Any]]:
        """Batches without end from where the run stands, timing how long they were waited for."""
        self.stream.start = self.position.samples
        batches = iter(self.loader)
        while True:
            with self.meter.waiting():
                batch = next(batches)
            self.note_skipped(batch)
            yield batch

    def _clip_gradients(self) -> Losses:
        """Bring every group's gradients under the norm allowed; returns the norms before."""
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:  # its engine has done so, over all groups
            norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.train.max_grad_norm)
            return {"grad_norm": torch.as_tensor(norm or 0.0, device=self.accelerator.device)}
        self.accelerator.unscale_gradients()
        limit = self.config.train.max_grad_norm or math.inf
        norms, idle = {}, self.idle_groups()
        for group in self.optimizer.param_groups:
            if group["name"] in idle:
                for parameter in group["params"]:
                    parameter.grad = None  # zero would count as a step for the optimizer
                continue
            norm = nn.utils.clip_grad_norm_(group["params"], limit)
            norms[_of_group("grad_norm", group)] = _whole(norm)
        return norms

    def _apply(self, step: Step) -> None:
        """Update the weights, unless something is not finite: decided on the device, told to the host when ready."""
        accelerator = self.accelerator
        checked = [losses["loss"].detach().float() for losses in step.losses]
        if accelerator.scaler is None:  # which looks for overflows itself, and takes them for its own
            checked += step.norms.values()
        not_finite = (~torch.stack(checked).isfinite().all()).float()
        flags = torch.stack([not_finite, torch.full_like(not_finite, self.stop_request.signal is not None)])
        if accelerator.num_processes > 1:
            flags = accelerator.reduce(flags, reduction="sum")
        if accelerator.scaler is None and accelerator.distributed_type != DistributedType.DEEPSPEED:
            self.optimizer.optimizer.found_inf = flags[0].clamp(max=1)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.after_update(step.terms(), flags[0] == 0)
        self.updates += 1
        step.flags = flags.to("cpu", non_blocking=True)
        if flags.device.type == "cuda":
            step.ready = torch.cuda.Event()
            step.ready.record()

    def _commit(self, step: Step) -> bool:
        """Count a step whose update has been made; returns whether a process was asked to stop."""
        not_finite, stop = step.read_flags()
        if not_finite:
            self._diverged(step)
        self.means.add(step.terms())
        self.position.step += 1
        self.position.samples += self._global_batch
        if self.ema:
            self.ema.step(self.model.parameters())
        self.lr_scheduler.step()
        return stop

    @property
    def _global_batch(self) -> int:
        train = self.config.train
        return train.train_batch_size * train.gradient_accumulation_steps * self.accelerator.num_processes

    def _is_due(self, step: int) -> bool:
        """Whether a step must be committed at once, because something follows it."""
        train = self.config.train
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            return True  # its engine updates the weights within `backward`
        every = (train.logging_steps, train.validation_steps, train.checkpointing_steps)
        return step >= train.max_train_steps or any(step % n == 0 for n in every)

    def _follow_up(self, bar: Any, stop: bool) -> None:
        """Log, validate and save what is due after the step just committed; save before a stop."""
        train, number = self.config.train, self.position.step
        done = number >= train.max_train_steps
        if done or number % train.logging_steps == 0:
            self._log(bar)
        if done or number % train.validation_steps == 0:
            with self.averaged() as model, self.meter.paused():
                values = self.validate(model)
            self.accelerator.log({f"validation/{name}": value for name, value in values.items()}, number)
        if done or stop or number % train.checkpointing_steps == 0:
            with self.meter.paused():
                self._save_checkpoint()

    def _stop(self) -> None:
        number = max(gather_object([self.stop_request.signal or 0]))
        self._finish_trackers()
        step = self.position.step
        raise TrainingInterrupted(
            f"stopped by {signal.Signals(number).name} after step {step}; "
            f"{self.output_dir / f'checkpoint-{step}'} is written: go on with resume=latest",
            number,
        )

    def _diverged(self, step: Step) -> None:
        terms = {name: value.item() for name, value in step.terms().items()}
        own = [
            name
            for batch, losses in zip(step.batches, step.losses, strict=True)
            if not losses["loss"].isfinite()
            for name in self.describe_batch(batch)
        ]
        found = gather_object([(terms, own)])
        clips = list(dict.fromkeys(name for _, names in found for name in names))
        if not clips:  # the gradients alone
            everything = [name for batch in step.batches for name in self.describe_batch(batch)]
            clips = list(dict.fromkeys(gather_object(everything)))
        worst = next((terms for terms, _ in found if not all(map(math.isfinite, terms.values()))), terms)
        path = self._save_checkpoint()
        self._finish_trackers()
        raise TrainingDiverged(
            f"Training diverged at step {self.position.step + 1} "
            f"({', '.join(f'{name} {value:.4g}' for name, value in worst.items())}) on {', '.join(clips)}. "
            f"{path} holds the state after the last good step; a lower optim.learning_rate is the first thing to try."
        )

    # --- the averaged model ----------------------------------------------------------------------------------------

    @contextmanager
    def averaged(self) -> Iterator[ModelMixin]:
        """The model in evaluation mode with its averaged weights, whole on every process, for a `with` block."""
        parameters = list(self.model.parameters())
        shards = any(isinstance(p, DTensor) for p in parameters)
        if shards:
            model = type(self.model).from_config(self.model.config).to(self.accelerator.device)
            weights = self.ema.shadow_params if self.ema else parameters
            with torch.no_grad():
                for mine, shard in zip(model.parameters(), weights, strict=True):
                    mine.copy_(_whole(shard))
        else:
            model = self.model
            if self.ema:
                self.ema.store(parameters)
                self.ema.copy_to(parameters)
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), self.accelerator.autocast():
                yield model
        finally:
            model.train(training)
            if self.ema and not shards:
                self.ema.restore(parameters)

    # --- checkpoints -----------------------------------------------------------------------------------------------

    def _save_checkpoint(self) -> Path:
        self._write_bad_videos()
        limit = self.config.train.checkpoints_total_limit
        return save_checkpoint(self.accelerator, self.output_dir, self.position.step, limit, self._write_state)

    def _write_state(self, folder: Path) -> None:
        self.accelerator.save_state(str(folder))
        state = {
            "step": self.position.step,
            "samples": self.position.samples,
            "sums": gather_object([{name: value.item() for name, value in self.means.sums.items()}]),  # by process
            "counts": self.means.counts,
            "facts": self.facts(),
        }
        averaged = {}
        if self.ema:
            state["averaged_steps"] = self.ema.optimization_step
            names = [name for name, _ in self.model.named_parameters()]
            averaged = {
                name: _whole(value).contiguous() for name, value in zip(names, self.ema.shadow_params, strict=True)
            }
        if self.accelerator.is_main_process:
            (folder / TRAINER_STATE).write_text(json.dumps(state))
            save_config(self.config, folder / CONFIG)
            if averaged:
                save_file(averaged, folder / AVERAGED_WEIGHTS)

    def _find_checkpoint(self) -> Path | None:
        if self.accelerator.is_main_process:
            clear_remains(self.output_dir)
        self.accelerator.wait_for_everyone()
        return find_checkpoint(self.output_dir, self.config.resume)

    def _is_newer(self, final: Path, checkpoint: Path) -> bool:
        """Whether a final model was written after a checkpoint; one that is older is of fewer steps."""
        newer = final.is_dir() and final.stat().st_mtime >= (checkpoint / TRAINER_STATE).stat().st_mtime
        return broadcast_object_list([newer])[0]

    def _resume(self, checkpoint: Path | None) -> None:
        if checkpoint is not None:
            self._load_checkpoint(checkpoint)
        if self.accelerator.is_main_process:
            forget_steps_after(self.output_dir, self.position.step if checkpoint else -1)
        if checkpoint is not None:
            self.accelerator.print(f"Resumed from {checkpoint}.")

    def _load_checkpoint(self, checkpoint: Path) -> None:
        """Read a checkpoint into the run, and say in which settings the two differ.

        Raises:
            UserError: if it cannot be read, or its run is another in a way that leaves nothing to resume.
        """
        changes: list[Change] = []
        with explain_misfit(checkpoint, changes):
            state = json.loads((checkpoint / TRAINER_STATE).read_text())
            changes += find_changes(checkpoint, self.config, state.get("facts", {}), self.facts())
            refuse_blocking_changes(checkpoint, changes)
            self._read_state(checkpoint, state)
        if changes:
            self.accelerator.print(
                f"warning: the resumed run will not equal an uninterrupted one: since {checkpoint.name} was written, "
                f"{describe_changes(changes)}."
            )

    def _read_state(self, checkpoint: Path, state: dict[str, Any]) -> None:
        if state["step"] != checkpoint_step(checkpoint):
            raise ValueError(f"it was written after step {state['step']}.")
        ours = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.accelerator.load_state(str(checkpoint))
        for group, own in zip(self.optimizer.param_groups, ours, strict=True):
            group.update(own)  # rates, decays: this run's config says, not the checkpoint
        self.accelerator.step = 0  # of accumulation: a checkpoint stands between two optimizer steps
        self.position = Position(state["step"], state["samples"])
        optim, last = self.config.optim, self.config.train.max_train_steps
        self.lr_scheduler = build_lr_scheduler(self.optimizer, optim, last, after=state["step"])
        device = self.accelerator.device
        sums = state["sums"][self.accelerator.process_index % len(state["sums"])]
        self.means = Means({name: torch.tensor(value, device=device) for name, value in sums.items()}, state["counts"])
        if self.ema:
            averaged = load_file(checkpoint / AVERAGED_WEIGHTS)
            for (name, _), mine in zip(self.model.named_parameters(), self.ema.shadow_params, strict=True):
                saved = averaged[name].to(device)
                if isinstance(mine, DTensor):
                    saved = distribute_tensor(saved, mine.device_mesh, mine.placements)
                mine.copy_(saved)
            self.ema.optimization_step = state["averaged_steps"]

    # --- what is written beside ------------------------------------------------------------------------------------

    @contextmanager
    def skip_non_finite_pictures(self) -> Iterator[None]:
        """Go on without the pictures of a `with` block, and say so, if a model's output is not finite."""
        try:
            yield
        except NonFiniteError as error:
            self.accelerator.print(f"warning: no pictures at step {self.position.step}: {error}")

    def note_skipped(self, batch: dict[str, Any]) -> None:
        """Keep which videos a batch had to pass over, and why, until they are written to bad_videos.jsonl."""
        self._skipped.update(dict.fromkeys(batch.get("skipped", ())))
        self.fallbacks.update(dict.fromkeys(batch.get("fallbacks", ())))

    def _write_bad_videos(self) -> None:
        skipped = gather_object(list(self._skipped))
        self._skipped.clear()
        if self.accelerator.is_main_process:
            self.bad_videos.add(skipped)

    def _start_run_folder(self) -> None:
        self.accelerator.init_trackers("logs")
        if self.accelerator.is_main_process:
            with atomic_write(self.output_dir / CONFIG) as path:
                save_config(self.config, path)
            with atomic_write(self.output_dir / "environment.yaml") as path:
                OmegaConf.save(environment(), path)

    def _finish_trackers(self) -> None:
        """What `end_training` does but for the process group, which `vidgen.common.errors.run_program` leaves."""
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def over_processes(self, value: torch.Tensor) -> torch.Tensor:
        """The mean over the processes."""
        return self.accelerator.reduce(value, reduction="mean") if self.accelerator.num_processes > 1 else value

    def _log(self, bar: Any) -> None:
        means = self.means.compute()
        # One reduction and one transfer for all terms.
        values = dict(zip(means, self.over_processes(torch.stack(list(means.values()))).tolist(), strict=True))
        self.means = Means()
        self._write_bad_videos()
        for group in self.optimizer.param_groups:
            values[_of_group("learning_rate", group)] = group["lr"]
        values["epoch"] = self.position.samples // len(self.dataset)
        values |= self.meter.read(self.position.step)
        self.accelerator.log(values, step=self.position.step)
        bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)


def _of_group(name: str, group: dict[str, Any]) -> str:
    """The name of a parameter group's number; the model's needs no addition."""
    return name if group["name"] == "model" else f"{name}/{group['name']}"


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that may be spread over processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
