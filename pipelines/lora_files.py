"""Reads the weights of a LoRA: safetensors files, local or on the Hub, or state dicts."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import CogVideoXLoraLoaderMixin
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from safetensors import SafetensorError

from autoencoder.hub import download

StateDict = dict[str, torch.Tensor]

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token")
FETCH_OPTIONS = (*HUB_OPTIONS, "proxies", "revision", "subfolder", "weight_name", "use_safetensors")


def read_lora(
    source: str | os.PathLike | Mapping[str, torch.Tensor], **options: Any
) -> tuple[StateDict, dict[str, Any]]:
    """Read the weights of a LoRA and the saved arguments of its `LoraConfig`, {} if they were not saved.

    Args:
        source: a .safetensors file, a folder or a Hub repository with one, or the weights themselves.
        options: `FETCH_OPTIONS`.

    Raises:
        ValueError: if it is no safetensors file, or an option is unknown.
        OSError: if the file does not exist.
    """
    for name in sorted(set(options) - set(FETCH_OPTIONS)):
        near = difflib.get_close_matches(name, [*FETCH_OPTIONS, "adapter_name"], n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ValueError(f"Loading a LoRA has no argument {name!r}{hint}")
    if isinstance(source, Mapping):
        return dict(source), {}
    source = os.fspath(source)
    name = options.get("weight_name") or (source if os.path.isfile(source) else "")
    if options.pop("use_safetensors", None) is False or (name and not name.endswith(".safetensors")):
        raise ValueError(f"A LoRA is read from safetensors only{f', not from {name}' if name else ''}.")
    if not os.path.exists(source):
        source, options = download_lora(source, options), {}
    try:
        state, metadata = CogVideoXLoraLoaderMixin.lora_state_dict(
            source, use_safetensors=True, return_lora_metadata=True, **options
        )
    except SafetensorError as error:
        raise ValueError(f"The LoRA at {source} is not a readable .safetensors file: {error}.") from error
    except IndexError as error:  # none of the folder's files has the name of a LoRA
        raise ValueError(f"No file in {source} is recognized as a LoRA: pass weight_name=.") from error
    return state, metadata or {}


def download_lora(repo_id: str, options: dict[str, Any]) -> Path:
    """Download a LoRA: `weight_name`, or the default file name, or the only .safetensors file of the folder.

    Raises:
        ValueError: if there are several files.
        OSError: if there is no file, or the repository cannot be reached.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise FileNotFoundError(f"No LoRA at {repo_id}: it is neither a file, a folder nor a repository user/name.")
    hub_options = {name: options[name] for name in HUB_OPTIONS if options.get(name) is not None}
    subfolder = (options.get("subfolder") or "").strip("/")
    names = [options["weight_name"]] if options.get("weight_name") else [LORA_WEIGHT_NAME_SAFE, "*.safetensors"]
    for name in names:
        patterns = [f"{subfolder}/{name}" if subfolder else name]
        folder = download(repo_id, patterns, options.get("revision"), **hub_options) / subfolder
        files = sorted(folder.glob(name))
        if len(files) > 1:
            raise ValueError(f"{repo_id} has {', '.join(file.name for file in files)}: pass weight_name=.")
        if files:
            return files[0]
    raise FileNotFoundError(f"{repo_id} has no {names[0]}, the weights of a LoRA.")
