"""`AutoencoderKLVidTwin.from_single_file` with the arguments of Diffusers' `FromOriginalModelMixin`."""

from __future__ import annotations

import difflib
import glob
import inspect
import os
import re
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import torch
from diffusers.utils import is_accelerate_available
from huggingface_hub import constants

from .convert_official import (
    OFFICIAL_NAMES,
    check_keys,
    convert_state_dict,
    extract_state_dict,
    has_diffusers_keys,
    infer_config,
    read_state_dict,
    translate_overrides,
)
from .hub import download

if is_accelerate_available():
    import accelerate

Checkpoint = str | os.PathLike | Mapping[str, Any]

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
HUB_HOSTS = ("huggingface.co", "hf.co")


def load_single_file(
    model_class: type,
    checkpoint: Checkpoint,
    *,
    config: str | os.PathLike | None = None,
    original_config: Mapping[str, Any] | None = None,
    subfolder: str | None = None,
    torch_dtype: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    device: str | int | torch.device | None = None,
    device_map: str | dict[str, Any] | None = None,
    low_cpu_mem_usage: bool | None = None,
    disable_mmap: bool = False,
    force_download: bool = False,
    proxies: dict[str, str] | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool | None = None,
    revision: str | None = None,
    config_revision: str | None = None,
    quantization_config: Any = None,
    **overrides: Any,
) -> Any:
    """Load an `AutoencoderKLVidTwin` in evaluation mode; see `AutoencoderKLVidTwin.from_single_file`."""
    if config is not None and original_config is not None:
        raise ValueError("from_single_file takes `config` or `original_config`, not both.")
    if quantization_config is not None:
        raise ValueError(
            "from_single_file does not quantize: call save_pretrained, then "
            "from_pretrained(folder, quantization_config=...)."
        )
    if original_config is not None and not isinstance(original_config, Mapping):
        raise ValueError(
            "original_config must be a dict of the model's official hyperparameters, such as {'num_heads': 12}, not "
            f"{original_config!r}; it is optional, since sizes are inferred from the weights."
        )
    dtype = check_dtype(dtype if dtype is not None else torch_dtype)
    device = check_device(device if device is not None else device_of_map(device_map))
    if low_cpu_mem_usage is None:
        low_cpu_mem_usage = is_accelerate_available()
    if low_cpu_mem_usage and not is_accelerate_available():
        raise ValueError("low_cpu_mem_usage=True requires accelerate: pip install accelerate.")
    hub_options = {
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": bool(local_files_only),
        "force_download": force_download,
    }

    # 1. Read the weights.
    if isinstance(checkpoint, Mapping):
        source = "The state dict"
        state = extract_state_dict(checkpoint, source)
    else:
        source = locate_checkpoint(checkpoint, revision, subfolder if config is None else None, hub_options)
        state = read_state_dict(source, disable_mmap)

    # 2. Collect the hyperparameters.
    overrides = check_overrides(model_class, {**(original_config or {}), **overrides})
    if config is not None:
        sizes = load_model_config(model_class, config, subfolder, config_revision, hub_options)
    elif has_diffusers_keys(state):
        raise ValueError(
            f"{source} has the layout of a Diffusers model, whose sizes are in its config.json: pass config= with the "
            "folder of that file, or load the folder with from_pretrained."
        )
    else:
        sizes = infer_config(state, source)
    sizes = {**sizes, **overrides}

    # 3. Build the model and load the weights.
    with accelerate.init_empty_weights() if low_cpu_mem_usage else nullcontext():
        model = model_class.from_config(sizes)
    converted = convert_state_dict(state)
    check_keys(converted, {key: value.shape for key, value in model.state_dict().items()}, source)
    if low_cpu_mem_usage and isinstance(checkpoint, Mapping):  # its tensors would become the parameters
        converted = {key: value.clone() for key, value in converted.items()}
    model.load_state_dict(converted, assign=low_cpu_mem_usage)
    for target in (device, dtype):
        if target is not None:
            model = model.to(target)
    return model.eval()


# --- arguments ------------------------------------------------------------------------------------------------------


def check_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    """Raise a `ValueError` for anything other than a floating-point `torch.dtype` or None."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"torch_dtype must be a floating-point dtype such as torch.float16, not {dtype!r}.")
    return dtype


def check_device(device: str | int | torch.device | None) -> torch.device | None:
    """Return the device; raise a `ValueError` if it is no device."""
    try:
        return None if device is None else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be a device such as 'cpu' or 'cuda', not {device!r}.") from error


def device_of_map(device_map: str | dict[str, Any] | None) -> Any:
    """Return the single device of a device map, or None; raise a `ValueError` for a map of several devices."""
    if isinstance(device_map, Mapping) and list(device_map) == [""]:
        device_map = device_map[""]
    if isinstance(device_map, Mapping) or device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        raise ValueError(
            f"from_single_file loads onto one device, not device_map={device_map!r}: call save_pretrained, then "
            "from_pretrained(folder, device_map=...)."
        )
    return device_map


def check_overrides(model_class: type, overrides: dict[str, Any]) -> dict[str, Any]:
    """Translate hyperparameters to our names.

    Raises:
        ValueError: if the model has no such hyperparameter; the message names similar ones.
    """
    translated = translate_overrides(overrides)
    known = [name for name in inspect.signature(model_class.__init__).parameters if name != "self"]
    for name in translated:
        if name not in known:
            near = difflib.get_close_matches(name, [*known, *STANDARD_ARGUMENTS, *OFFICIAL_NAMES], n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else "."
            raise ValueError(f"Neither from_single_file nor {model_class.__name__} has an argument {name!r}{hint}")
    return translated


STANDARD_ARGUMENTS = [
    name
    for name, parameter in inspect.signature(load_single_file).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
]


def load_model_config(
    model_class: type,
    config: str | os.PathLike,
    subfolder: str | None,
    revision: str | None,
    hub_options: dict[str, Any],
) -> dict[str, Any]:
    """Load the Diffusers config of a file, a folder or a Hub repository; of a pipeline, the config of its `vae`.

    Raises:
        ValueError: if `config` is no path or repository, or describes another model.
        OSError: if the config does not exist.
    """
    if not isinstance(config, str | os.PathLike):
        raise ValueError(
            "config must be the path of a config.json, of a folder with one, or a repository on the Hub, not "
            f"{type(config).__name__}."
        )
    path = Path(config)
    if not path.exists():
        path = download(
            os.fspath(config), ["model_index.json", "config.json", "*/config.json"], revision, **hub_options
        )
    if subfolder is None and (path / "model_index.json").is_file():
        subfolder = "vae"
    sizes = model_class.load_config(path, subfolder=subfolder)
    class_name = sizes.get("_class_name", model_class.__name__)
    if class_name != model_class.__name__:
        raise ValueError(f"The config at {config} describes {class_name}, not {model_class.__name__}.")
    return sizes


# --- the checkpoint file --------------------------------------------------------------------------------------------


def locate_checkpoint(
    address: str | os.PathLike, revision: str | None, subfolder: str | None, hub_options: dict[str, Any]
) -> Path:
    """Return the path of a local file, or of a file of a Hub repository in the cache.

    Args:
        address: a path, "user/repository/path/to/file.safetensors", or a URL with `blob` or `resolve`.
        revision: of the repository; None: the revision of the URL, else "main".
        subfolder: of the repository, before the path of the file.
        hub_options: options of `download`.

    Raises:
        FileNotFoundError: if `address` is neither a file nor a Hub address, or the repository has no such file.
        OSError: if the repository or the revision does not exist, or the Hub cannot be reached.
    """
    address = os.fspath(address)
    if os.path.isfile(address):
        return Path(address)
    parts = split_hub_address(address)
    if parts is None:
        raise FileNotFoundError(
            f"No checkpoint file at {address}. A file on the Hub is given as user/repository/file.safetensors, or by "
            "its URL."
        )
    repo_id, url_revision, filename = parts
    filename = f"{subfolder.strip('/')}/{filename}" if subfolder else filename
    try:
        path = download(repo_id, [glob.escape(filename)], revision or url_revision, **hub_options) / filename
    except OSError as error:
        if "://" in address:
            raise
        raise type(error)(f"No checkpoint file at {address}, and none on the Hub: {error}") from error
    if not path.is_file():
        raise FileNotFoundError(f"{repo_id} has no file {filename}.")
    return path


def split_hub_address(address: str) -> tuple[str, str | None, str] | None:
    """Split an address on the Hub into repository, revision or None, and path of the file; None for anything else."""
    hosts = (*HUB_HOSTS, urlsplit(constants.ENDPOINT).netloc)
    if "://" in address:
        url = urlsplit(address)
        if url.scheme not in ("http", "https") or url.netloc not in hosts:
            return None
        path = url.path.strip("/")
    else:
        host, _, path = address.partition("/")
        if host not in hosts:
            path = address
            if os.path.isdir(os.path.dirname(address)):  # a missing file in a local folder
                return None
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)/(?:(?:blob|resolve)/([^/]+)/)?(.+)", path)
    if match is None or match[1].startswith(".") or not match[3].endswith(SUFFIXES):
        return None
    repo_id, revision, filename = match.groups()
    return repo_id, revision and unquote(revision), unquote(filename)
