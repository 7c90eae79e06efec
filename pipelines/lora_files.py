"""Where LoRA weights are read from: safetensors files here or on the Hub, or state dicts."""

from __future__ import annotations

import difflib
import functools
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.loaders import CogVideoXLoraLoaderMixin
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.utils import is_peft_available
from huggingface_hub import model_info
from safetensors import SafetensorError

from autoencoder.hub import Repository, hub_errors

StateDict = dict[str, torch.Tensor]

FETCH_OPTIONS = (
    "cache_dir",
    "force_download",
    "proxies",
    "local_files_only",
    "token",
    "revision",
    "subfolder",
    "weight_name",
    "use_safetensors",
)


def require_peft() -> None:
    """Raise an `ImportError` if peft is not installed."""
    if not is_peft_available():
        raise ImportError("LoRA needs the package peft: pip install peft.")


def needs_peft(method: Callable) -> Callable:
    """The method, with `require_peft` first."""

    @functools.wraps(method)
    def checked(*args: Any, **kwargs: Any) -> Any:
        require_peft()
        return method(*args, **kwargs)

    return checked


def refuse_pickle(safe_serialization: bool = True, **_: Any) -> None:
    """Raise a `ValueError` if a LoRA is not to be saved as safetensors."""
    if not safe_serialization:
        raise ValueError("A LoRA is saved as safetensors only: leave out safe_serialization=False.")


def read_lora(
    source: str | os.PathLike | Mapping[str, torch.Tensor], **options: Any
) -> tuple[StateDict, dict[str, Any]]:
    """The weights of a LoRA, and the arguments of its `LoraConfig`, empty where they were not saved.

    Args:
        source: a .safetensors file, a folder or a Hub repository with one, or the weights themselves.
        options: `FETCH_OPTIONS`.

    Raises:
        ValueError: if it is no safetensors file, or an option is unknown.
        OSError: if there is no such file.
    """
    unknown = sorted(set(options) - set(FETCH_OPTIONS))
    if unknown:
        near = difflib.get_close_matches(unknown[0], [*FETCH_OPTIONS, "adapter_name"], n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ValueError(f"Loading a LoRA takes no argument {unknown[0]!r}{hint}")
    if isinstance(source, Mapping):
        return dict(source), {}
    source = os.fspath(source)
    weight_name = options.get("weight_name")
    name = weight_name or (source if os.path.isfile(source) else "")
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
    except IndexError as error:  # there are such files, but none is taken for a LoRA
        raise ValueError(f"No file at {source} is taken for a LoRA: pass weight_name= with its name.") from error
    return state, metadata or {}


def download_lora(repo_id: str, options: dict[str, Any]) -> str:
    """The path in the cache of a LoRA on the Hub, downloaded where needed.

    Args:
        repo_id: "user/name".
        options: `FETCH_OPTIONS`. Without `weight_name` it is `pytorch_lora_weights.safetensors`, or, where there is no
            such file, the repository's only .safetensors file.

    Raises:
        ValueError: if there is no such file, or several.
        OSError: if the repository does not exist or cannot be reached.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise FileNotFoundError(f"No LoRA at {repo_id}: it is neither a file, a folder nor a repository user/name.")
    hub = {k: v for k, v in options.items() if k not in ("revision", "subfolder", "weight_name") and v is not None}
    repository = Repository(repo_id, options.get("revision"), hub)
    folder = f"{options['subfolder'].strip('/')}/" if options.get("subfolder") else ""
    wanted = folder + (options.get("weight_name") or LORA_WEIGHT_NAME_SAFE)
    path = repository.find(wanted)
    if path is None and options.get("weight_name") is None:
        with hub_errors(repo_id, options.get("revision"), "the list of files"):
            info = model_info(repo_id, revision=options.get("revision"), token=options.get("token"))
        names = [file.rfilename for file in info.siblings]
        found = [n for n in names if n.endswith(".safetensors") and n.rpartition("/")[0] == folder.rstrip("/")]
        if len(found) > 1:
            raise ValueError(f"{repository} has {', '.join(sorted(found))}: pass weight_name= with the LoRA's name.")
        path = repository.find(found[0]) if found else None
    if path is None:
        raise FileNotFoundError(f"{repository} has no {wanted}, the weights of a LoRA.")
    return str(path)
