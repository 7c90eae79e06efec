"""Set-up of Accelerate: precision, gradient accumulation, trackers and the launcher's parallelism."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, set_seed

from ..common.environment import set_cpu_threads
from ..common.errors import UserError
from ..common.precision import agree_on_mixed_precision
from .config import DiTTrainingConfig, VAETrainingConfig
from .resume import saved_mixed_precision
from .tracking import JSONLTracker


def build_accelerator(config: VAETrainingConfig | DiTTrainingConfig) -> Accelerator:
    """Create the Accelerator of a run, and seed the random number generators.

    `train.mixed_precision=auto` is replaced in `config` by the precision chosen, which is then saved with the run.

    Raises:
        UserError: if `train.mixed_precision` or `train.report_to` is unknown, `output_dir` cannot be created, or the
            launcher selects FSDP 1.
    """
    train, output_dir = config.train, Path(config.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir: the folder {output_dir} cannot be created ({error.strerror}).") from error
    set_cpu_threads()
    train.mixed_precision = agree_on_mixed_precision(train.mixed_precision, saved_mixed_precision(config)).precision

    # Accelerate ignores trackers that are not installed; here they are an error.
    trackers = [] if train.report_to in ("none", "") else [name.strip() for name in train.report_to.split(",")]
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
    for name in set(trackers) - {"all", *map(str, get_available_trackers())}:
        raise UserError(f"train.report_to: {name} is not installed; pip install {name}, or train.report_to=none.")

    # FSDP and DeepSpeed follow the config, not their own defaults.
    if accelerator.distributed_type == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise UserError("FSDP 1 is not supported; set fsdp_version: 2, as configs/accelerate/fsdp2.yaml does.")
        # Autocast sets the precision, as without FSDP; FSDP's policy would also round the target clips.
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        accelerator.state.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": train.train_batch_size,
            "gradient_clipping": train.max_grad_norm,
        }
    set_seed(config.seed)
    return accelerator
