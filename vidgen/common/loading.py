"""Loading of trained models from a folder or a repository on the Hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from autoencoder import AutoencoderKLVidTwin
from autoencoder.adapters import adapt, find_class
from autoencoder.hub import download
from autoencoder.video_autoencoder import VideoAutoencoder
from pipelines import VidTwinPipeline
from pipelines.text import TextEncoder

from .errors import UserError
from .options import expand_home

Model = TypeVar("Model")
WEIGHTS = ("diffusion_pytorch_model", "model")  # file names of Diffusers and of transformers
TOKENIZER_FILES = ("*.json", "*.txt", "*.model")  # SentencePiece's .model is no pickle
PRETRAINED = Path(__file__).parents[2] / "pretrained"  # in a clone of the repository
SPRITES_MODEL, REAL_MODEL = PRETRAINED / "sprites", PRETRAINED / "real"  # pipelines


def load_vae(
    name: str, num_frames: int | None = None, height: int | None = None, width: int | None = None
) -> VideoAutoencoder:
    """Load a VAE in evaluation mode and float32, from a VAE or a pipeline.

    Args:
        name: a folder written by train_vae.py, train_dit.py or `vidgen convert`, one with a video autoencoder of
            Diffusers or transformers (`autoencoder.adapters`), or "user/name" on the Hub. Pipelines of Diffusers have
            such a folder too.
        num_frames, height, width: the clip size of an autoencoder without a fixed one; VidTwin has one.

    Raises:
        UserError: if it does not exist or cannot be loaded, or the size does not follow the rule of its class.
    """
    name = expand_home(name)
    folder = Path(name)
    if folder.is_file():
        raise UserError(
            f"{name} is a file; convert an official checkpoint to a folder first: vidgen convert {name} FOLDER"
        )
    if not folder.exists() and _names_a_repository(name):
        folder = _load(_download_vae, name, name)
    elif (folder / "model_index.json").is_file():
        folder = folder / "vae"
    if not (folder / "config.json").is_file():
        raise UserError(f"No VAE in {name}; name a folder such as OUTPUT_DIR/final of train_vae.py.")
    class_name = _class_of(folder)
    if class_name != AutoencoderKLVidTwin.__name__:
        size = {"num_frames": num_frames, "height": height, "width": width}
        return _load(lambda path: _load_adapted(path, class_name, size), name, folder).eval().requires_grad_(False)
    vae, keys = _load(_vae_with_keys, name, folder)
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


def load_text_encoder(name: str) -> TextEncoder:
    """Load a text encoder and its tokenizer, in evaluation mode and float32.

    Args:
        name: a folder, or "user/name" on the Hub, of a text encoder of transformers with its tokenizer, such as T5,
            UMT5 or the text model of CLIP; or of a pipeline with `text_encoder` and `tokenizer`.

    Raises:
        UserError: if it does not exist or cannot be loaded, or is no text encoder.
    """
    from transformers import AutoTokenizer  # takes long to import

    name = expand_home(name)
    folder = Path(name)
    if not folder.exists() and _names_a_repository(name):
        folder = _load(_download_text_encoder, name, name)
    model, tokenizer = folder, folder
    if (folder / "text_encoder").is_dir():
        model, tokenizer = folder / "text_encoder", folder / "tokenizer"
    if not (model / "config.json").is_file():
        raise UserError(f"No text encoder in {name}; name the folder of one, or of a pipeline with a text_encoder.")
    encoder = TextEncoder(_load(AutoTokenizer.from_pretrained, name, tokenizer), _load(_load_text_model, name, model))
    if not isinstance(getattr(encoder.model.config, "hidden_size", None), int):
        raise UserError(f"{type(encoder.model).__name__} in {name} is no text encoder: its config has no hidden_size.")
    return encoder


def text_encoder_hash(encoder: TextEncoder) -> str:
    """SHA-256 of the weights of a text encoder and of its tokenizer."""
    return hashlib.sha256(f"{weights_hash(encoder.model)} {tokenizer_hash(encoder.tokenizer)}".encode()).hexdigest()


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's vocabulary and rules, without the padding and truncation of its last call."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else tokenizer.get_vocab()
    rules = {name: value for name, value in rules.items() if name not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers, in the order of their names and in their dtype.

    The hash of an adapted autoencoder is that of the model in the adapter.
    """
    return _tensors_hash(getattr(model, "backbone", model).state_dict())


def encoder_hash(vae: VideoAutoencoder) -> str:
    """SHA-256, as `weights_hash`, of the modules that `encode` uses, which alone determine the latents of a clip."""
    prefixes = tuple(f"{name}." for name in vae.encoder_modules)
    return _tensors_hash({k: v for k, v in vae.backbone.state_dict().items() if k.startswith(prefixes)})


def _tensors_hash(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def public_config(model: Any) -> dict[str, Any]:
    """Return a config of Diffusers or transformers without the path and the versions it was saved with."""
    config = model.config.to_dict() if hasattr(model.config, "to_dict") else model.config
    return {name: value for name, value in config.items() if not name.startswith("_")}


def is_pipeline(name: str) -> bool:
    """Whether a folder or repository for `load_vae` holds a `VidTwinPipeline`, and not one of Diffusers."""
    name = expand_home(name)
    folder = Path(name)
    if not folder.exists() and _names_a_repository(name):
        folder = download(name, ["model_index.json"])
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        return index["_class_name"] == VidTwinPipeline.__name__
    except OSError:
        return False
    except (ValueError, KeyError, TypeError):  # `load_pipeline` says what is wrong
        return True


def _names_a_repository(name: str) -> bool:
    """Whether it has the form user/name; "runs/typo" beside a folder "runs" is a mistyped path."""
    plain = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")
    return plain and not Path(name).parent.is_dir()


def _vae_with_keys(source: str | Path) -> tuple[AutoencoderKLVidTwin, dict[str, list[str]]]:
    # With low memory usage, missing tensors would stay without values.
    return AutoencoderKLVidTwin.from_pretrained(source, output_loading_info=True, low_cpu_mem_usage=False)


def _download_vae(name: str) -> Path:
    """Download the VAE of a repository, at its top level or in `vae`; only JSON and safetensors."""
    folder = download(name, ["config.json", "vae/config.json"])
    prefix = "" if (folder / "config.json").is_file() else "vae/"
    if not (folder / prefix / "config.json").is_file():
        raise OSError("the repository has neither config.json nor vae/config.json, so no VAE.")
    files = [f"{prefix}{stem}*.{ending}" for stem in WEIGHTS for ending in ("safetensors", "safetensors.index.json")]
    return download(name, files, folder.name) / prefix


def _download_text_encoder(name: str) -> Path:
    """Download a text encoder and its tokenizer, alone or in a pipeline; no pickle."""
    folder = download(name, ["config.json", "model_index.json"])
    encoder, tokenizer = ("text_encoder/", "tokenizer/") if (folder / "model_index.json").is_file() else ("", "")
    weights = [f"{encoder}config.json", f"{encoder}model*.safetensors", f"{encoder}model.safetensors.index.json"]
    return download(name, [*weights, *(tokenizer + pattern for pattern in TOKENIZER_FILES)], folder.name)


def _load_text_model(folder: Path) -> Any:
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, CLIPTextModel

    import pipelines.bag_of_words  # noqa: F401, registers its model

    config = AutoConfig.from_pretrained(folder)
    if config.model_type in ("clip", "clip_text_model"):
        model_class = CLIPTextModel
    elif type(config) in AutoModelForTextEncoding._model_mapping:
        model_class = AutoModelForTextEncoding
    elif getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{type(config).__name__} is of an encoder with a decoder, not of a text encoder")
    else:
        model_class = AutoModel
    model, keys = model_class.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
    missing = sorted(name for name in keys["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise ValueError(f"its weights lack {len(missing)} tensors, the first {missing[0]}")
    return model.float().eval().requires_grad_(False)


def _class_of(folder: Path) -> str:
    """The class that the config in a folder names: Diffusers' or transformers' key; VidTwin where there is none."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        architectures = config.get("architectures") or [None]
        return config.get("_class_name") or architectures[0] or AutoencoderKLVidTwin.__name__
    except (ValueError, AttributeError) as error:
        raise UserError(f"{folder / 'config.json'} is not the config of a model.") from error


def _load_adapted(folder: Path, class_name: str, size: dict[str, int | None]) -> VideoAutoencoder:
    model = find_class(class_name).from_pretrained(folder, use_safetensors=True, low_cpu_mem_usage=False)
    return adapt(model, **size)


def _load(load: Callable[..., Model], name: str, source: str | Path) -> Model:
    try:
        return load(source)
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"The model in {name} cannot be loaded: {reason}") from error
