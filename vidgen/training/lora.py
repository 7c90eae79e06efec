"""LoRA: training of a low-rank adapter instead of the DiT (Hu et al., arXiv 2106.09685)."""

from __future__ import annotations

from pathlib import Path

from accelerate.utils import DistributedType

from pipelines import VidTwinTransformer3DModel
from pipelines.lora import lora_card

from ..common.errors import UserError
from .config import DiTTrainingConfig, LoRAConfig
from .trainer import SHARDING


def check_lora(config: DiTTrainingConfig, distributed_type: DistributedType) -> None:
    """Raise a `UserError` for settings, or a launcher, that an adapter excludes."""
    if distributed_type in SHARDING:
        raise UserError("lora.rank is not supported under FSDP and DeepSpeed: use one process or DDP.")
    if config.model.pretrained is None:
        raise UserError("lora.rank trains an adapter of a trained model: set model.pretrained=PIPELINE.")
    if config.train.freeze:
        raise UserError("lora.rank freezes the whole model already; leave train.freeze out.")


def add_lora(transformer: VidTwinTransformer3DModel, config: LoRAConfig) -> None:
    """Add an adapter to a DiT, freeze everything else, and start with the output unchanged.

    Raises:
        UserError: if peft is not installed, or a target is no layer of the model.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise UserError("lora.rank needs the package peft: pip install peft.") from error
    transformer.requires_grad_(False)
    adapter = LoraConfig(
        r=config.rank,
        lora_alpha=config.rank if config.alpha is None else config.alpha,
        target_modules=list(config.target_modules),
        init_lora_weights=True,
    )
    try:
        transformer.add_adapter(adapter)
    except ValueError as error:
        raise UserError(f"lora.target_modules: {error}") from error


def write_lora(transformer: VidTwinTransformer3DModel, folder: Path, name: str) -> None:
    """Write the adapter and its card to a new folder for `pipeline.load_lora_weights`.

    Args:
        transformer: with the adapter.
        name: by which the card loads the adapter.
    """
    transformer.save_lora_adapter(folder)
    lora_card(transformer, name).save(folder / "README.md")
