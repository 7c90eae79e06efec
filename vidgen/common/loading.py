"""Loading of trained models from a folder or a repository on the Hub."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from autoencoder import AutoencoderKLVidTwin
from autoencoder.hub import download
from pipelines import VidTwinPipeline

from .errors import UserError
from .options import expand_home

Model = TypeVar("Model")
SHIPPED_MODEL = Path(__file__).parents[2] / "pretrained" / "sprites"  # a pipeline, in a clone of the repository


def load_vae(name: str) -> AutoencoderKLVidTwin:
    """Load a VAE in evaluation mode and float32, from a VAE or a pipeline.

    Args:
        name: a folder written by train_vae.py, train_dit.py or `vidgen convert`, or "user/name" on the Hub.

    Raises:
        UserError: if it does not exist or cannot be loaded.
    """
    name = expand_home(name)
    folder = Path(name)
    if (folder / "model_index.json").is_file():
        folder = folder / "vae"
    if folder.is_file():
        raise UserError(
            f"{name} is a file; convert an official checkpoint to a folder first: vidgen convert {name} FOLDER"
        )
    if folder.exists() or not _names_a_repository(name):
        if not (folder / "config.json").is_file():
            raise UserError(f"No VAE in {name}; name a folder such as OUTPUT_DIR/final of train_vae.py.")
        vae, keys = _load(_vae_with_keys, name, folder)
    else:
        vae, keys = _load(_vae_of_repository, name, name)
    wrong = {kind: sorted(keys[kind]) for kind in ("missing_keys", "unexpected_keys") if keys[kind]}
    if wrong:
        counts = "; ".join(
            f"{kind.split('_')[0]} {len(names)} keys, the first {names[0]}" for kind, names in wrong.items()
        )
        raise UserError(f"The weights in {name} are not those of a VidTwin with this config: {counts}.")
    return vae.eval().requires_grad_(False)


def load_pipeline(name: str) -> VidTwinPipeline:
    """Load a pipeline in float32.

    Args:
        name: a folder written by train_dit.py, or "user/name" on the Hub.

    Raises:
        UserError: if it does not exist or cannot be loaded.
    """
    name = expand_home(name)
    folder = Path(name)
    if (folder.exists() or not _names_a_repository(name)) and not (folder / "model_index.json").is_file():
        raise UserError(f"No pipeline in {name}; name a folder such as OUTPUT_DIR/final of train_dit.py.")
    return _load(VidTwinPipeline.from_pretrained, name, name)


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers, in the order of their names and in their dtype."""
    return _tensors_hash(model.state_dict())


def encoder_hash(vae: nn.Module) -> str:
    """SHA-256, as `weights_hash`, of the modules that `encode` uses, which alone determine the latents of a clip.

    An autoencoder's class names them in `_encoder_modules`; without it this is the hash of all weights.
    """
    modules = getattr(vae, "_encoder_modules", None)
    if modules is None:
        return weights_hash(vae)
    prefixes = tuple(f"{name}." for name in modules)
    return _tensors_hash({k: v for k, v in vae.state_dict().items() if k.startswith(prefixes)})


def _tensors_hash(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def is_pipeline(name: str) -> bool:
    """Whether a folder or repository for `load_vae` holds a pipeline."""
    name = expand_home(name)
    if Path(name).exists() or not _names_a_repository(name):
        return (Path(name) / "model_index.json").is_file()
    return (download(name, ["model_index.json"]) / "model_index.json").is_file()


def _names_a_repository(name: str) -> bool:
    """Whether it has the form user/name; "runs/typo" beside a folder "runs" is a mistyped path."""
    plain = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")
    return plain and not Path(name).parent.is_dir()


def _vae_with_keys(source: str | Path, **options: str) -> tuple[AutoencoderKLVidTwin, dict[str, list[str]]]:
    # With low memory usage, missing tensors would stay without values.
    return AutoencoderKLVidTwin.from_pretrained(source, output_loading_info=True, low_cpu_mem_usage=False, **options)


def _vae_of_repository(name: str) -> tuple[AutoencoderKLVidTwin, dict[str, list[str]]]:
    folder = download(name, ["config.json", "vae/config.json"])
    if (folder / "config.json").is_file():
        return _vae_with_keys(name)
    if not (folder / "vae" / "config.json").is_file():
        raise OSError("the repository has neither config.json nor vae/config.json, so no VAE.")
    return _vae_with_keys(name, subfolder="vae")


def _load(load: Callable[..., Model], name: str, source: str | Path) -> Model:
    try:
        return load(source)
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"The model in {name} cannot be loaded: {reason}") from error
