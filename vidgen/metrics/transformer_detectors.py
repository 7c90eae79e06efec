"""Detectors of transformers' pretrained vision models, from a folder or the Hub: V-JEPA 2, VideoMAE and CLIP.

| name | class | features of a clip |
|---|---|---|
| `vjepa2` | `VJEPA2Model` | mean of the encoder's tokens |
| `vjepa2` | `VJEPA2ForVideoClassification` | output of the classifier's attentive pooler |
| `videomae` | `VideoMAEModel` | mean of the encoder's tokens |
| `clip` | `CLIPVisionModelWithProjection` | image embedding, averaged over the frames |

The first two rows are the features of JEDi (arXiv 2410.05203; oooolga/JEDi: videojedi/V_JEPA.py) without and with its
finetuned probe, but of V-JEPA 2, where JEDi uses V-JEPA. All sizes are read from the model's config, and the mean and
the deviation of the colors from its preprocessor config. Frames are squashed to the model's size and not cropped,
because a protocol has cropped them already. Only safetensors are read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from autoencoder.hub import download

from ..common.errors import UserError
from ..common.loading import public_config
from ..common.options import expand_home
from ..common.weights import file_sha256
from .detector import Detector, resize_frames

CONFIG = "config.json"
PREPROCESSOR_CONFIGS = ("video_preprocessor_config.json", "preprocessor_config.json")
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")


class TransformerDetector(Detector):
    """A pretrained model of transformers.

    Args:
        model: in evaluation mode.
        sha256: hash of its file of weights.
        mean, std: of the three colors in [0, 1]; `colors` by default.

    Attributes:
        model_types: those of the configs that it loads.
        example: a published model of the Hub.
        colors: mean and deviation of the colors where the model has no preprocessor config.
        filter: "bilinear" or "bicubic", with antialiasing.
        size: height and width of the model's frames.
    """

    model_types: ClassVar[tuple[str, ...]]
    example: ClassVar[str]
    colors: ClassVar[tuple[Sequence[float], Sequence[float]]]
    filter: ClassVar[str] = "bilinear"
    size: int

    def __init__(
        self,
        model: nn.Module,
        sha256: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        mean, std = mean or self.colors[0], std or self.colors[1]
        self.model = model.eval().requires_grad_(False)
        self.sha256 = sha256
        self.dim, self.size = self.read_sizes(model.config)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1, 1), persistent=False)
        self.preprocessing = (
            f"frames squashed to {self.size} x {self.size}, {self.filter} with antialiasing; in [0, 1], minus "
            f"{list(mean)}, divided by {list(std)}"
        )
        self.settings = {"model": type(model).__name__, "config": public_config(model)}

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike | None, sha256: str | None = None) -> TransformerDetector:
        """Load a model from a folder or from "user/name" on the Hub, in float32 on the CPU.

        Args:
            sha256: hash that its file of weights must have; of several files, that of their names and hashes.

        Raises:
            UserError: if there is no such model, it is of another class, its weights are missing, incomplete or not
                safetensors, or they have another hash.
        """
        if source is None:
            raise UserError(
                f"the detector {cls.name} needs a model: pass --detector {cls.name}=FOLDER, or a name on the Hub, "
                f"such as {cls.name}={cls.example}."
            )
        source = expand_home(source)
        folder = _find_folder(source)
        config = _read_json(folder / CONFIG)
        if config.get("model_type") not in cls.model_types:
            raise UserError(
                f"{source} is a model of type {config.get('model_type')!r}, and the detector {cls.name} needs "
                f"{' or '.join(cls.model_types)}, such as {cls.example}."
            )
        files = sorted(folder.glob("model*.safetensors"))
        if not files:
            raise UserError(f"{source} has no weights in safetensors, the only format that is read.")
        found = _hash_files(files)
        if sha256 is not None and found != sha256.lower():
            raise UserError(f"{source} has the sha256 {found}, not {sha256}, which --detector-sha256 states.")
        preprocessor = next(
            (_read_json(folder / name) for name in PREPROCESSOR_CONFIGS if (folder / name).exists()), {}
        )
        model = cls._load(cls._model_class(config), folder, source)
        return cls(model, found, preprocessor.get("image_mean"), preprocessor.get("image_std"))

    @staticmethod
    def read_sizes(config: Any) -> tuple[int, int]:
        """Return the length of a feature vector, and height and width of the frames, from a model's config."""
        raise NotImplementedError

    @staticmethod
    def _model_class(config: dict[str, Any]) -> type:
        """Return the class of transformers that loads a model with this config."""
        raise NotImplementedError

    @staticmethod
    def _load(model_class: type, folder: Path, source: str) -> nn.Module:
        try:
            model, keys = model_class.from_pretrained(
                folder, use_safetensors=True, output_loading_info=True, dtype=torch.float32
            )
        except Exception as error:  # a broken file raises almost any exception
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UserError(f"the model in {source} cannot be loaded: {reason}") from error
        if missing := sorted(keys["missing_keys"]):
            raise UserError(f"the weights in {source} lack {len(missing)} tensors, the first {missing[0]}.")
        return model

    def _prepare(self, clips: torch.Tensor) -> torch.Tensor:
        """Resize and normalize clips (B, 3, T, H, W) in [-1, 1]."""
        clips = resize_frames(clips, (self.size, self.size), antialias=True, mode=self.filter)
        return (clips.add(1).div(2) - self.mean) / self.std


class VJEPA2(TransformerDetector):
    """V-JEPA 2 (Assran et al. 2025), a video encoder trained to predict masked parts in feature space."""

    name = "vjepa2"
    model_types = ("vjepa2",)
    example = "facebook/vjepa2-vitl-fpc64-256"
    colors = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    def __init__(self, model: nn.Module, *arguments: Any) -> None:
        super().__init__(model, *arguments)
        self.min_frames = model.config.tubelet_size

    @staticmethod
    def read_sizes(config: Any) -> tuple[int, int]:
        return config.hidden_size, config.crop_size

    @staticmethod
    def _model_class(config: dict[str, Any]) -> type:
        from transformers import VJEPA2ForVideoClassification, VJEPA2Model

        has_pooler = VJEPA2ForVideoClassification.__name__ in (config.get("architectures") or ())
        return VJEPA2ForVideoClassification if has_pooler else VJEPA2Model

    def features(self, clips: torch.Tensor) -> torch.Tensor:
        frames, tubelet = clips.shape[2], self.model.config.tubelet_size
        if frames % tubelet:
            raise UserError(f"the detector {self.name} needs a multiple of {tubelet} frames, not {frames}.")
        pooler = getattr(self.model, "pooler", None)
        encoder = self.model.encoder if pooler is None else self.model.vjepa2.encoder
        tokens = encoder(pixel_values_videos=self._prepare(clips).transpose(1, 2)).last_hidden_state
        return tokens.mean(dim=1) if pooler is None else pooler(tokens)


class VideoMAE(TransformerDetector):
    """VideoMAE (Tong et al. 2022), a masked autoencoder of videos. Its clips have a fixed number of frames."""

    name = "videomae"
    model_types = ("videomae",)
    example = "MCG-NJU/videomae-base"
    colors = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    @staticmethod
    def read_sizes(config: Any) -> tuple[int, int]:
        return config.hidden_size, config.image_size

    @staticmethod
    def _model_class(config: dict[str, Any]) -> type:
        from transformers import VideoMAEModel

        return VideoMAEModel

    def features(self, clips: torch.Tensor) -> torch.Tensor:
        frames, expected = clips.shape[2], self.model.config.num_frames
        if frames != expected:
            raise UserError(f"the detector {self.name} needs clips of {expected} frames, not {frames}.")
        return self.model(pixel_values=self._prepare(clips).transpose(1, 2)).last_hidden_state.mean(dim=1)


class CLIP(TransformerDetector):
    """CLIP's image embedding (Radford et al. 2021), averaged over the frames; it hardly depends on motion."""

    name = "clip"
    model_types = ("clip", "clip_vision_model")
    example = "openai/clip-vit-large-patch14"
    colors = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    filter = "bicubic"

    @staticmethod
    def read_sizes(config: Any) -> tuple[int, int]:
        return config.projection_dim, config.image_size

    @staticmethod
    def _model_class(config: dict[str, Any]) -> type:
        from transformers import CLIPVisionModelWithProjection

        return CLIPVisionModelWithProjection

    def features(self, clips: torch.Tensor) -> torch.Tensor:
        frames = self._prepare(clips).transpose(1, 2)
        embeddings = self.model(pixel_values=frames.flatten(0, 1)).image_embeds
        return embeddings.unflatten(0, frames.shape[:2]).mean(dim=1)


def _find_folder(source: str) -> Path:
    """Return a local folder, or that of a repository of the Hub after its download."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise UserError(f"{source} is no folder; name one, or user/name on the Hub.")
    try:
        return download(source, [CONFIG, *PREPROCESSOR_CONFIGS, *WEIGHTS])
    except OSError as error:
        raise UserError(str(error)) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not the config of a model ({type(error).__name__}).") from error
    raise UserError(f"{path} is not the config of a model.")


def _hash_files(files: Sequence[Path]) -> str:
    """Return the SHA-256 of a file; of several files, that of their names and hashes."""
    if len(files) == 1:
        return file_sha256(files[0])
    lines = "".join(f"{file.name} {file_sha256(file)}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()
