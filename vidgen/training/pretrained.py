"""Start of a training from the weights of another model, its parent (`model.pretrained`, `gan.pretrained`).

Sizes come from the parent's config. A run records its parent, without the weights, in every checkpoint: a resumed run
has its weights from there and does not need the parent's files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin, SchedulerMixin
from safetensors import SafetensorError, safe_open
from torch import nn

from autoencoder import AutoencoderKLVidTwin
from autoencoder.adapters import build_model, find_class
from autoencoder.model_card import PARENT
from autoencoder.presets import rename_old_arguments
from autoencoder.single_file import SUFFIXES
from autoencoder.video_autoencoder import VideoAutoencoder
from pipelines import VidTwinTransformer3DModel
from pipelines.latents import STREAMS
from pipelines.presets import preset_config
from pipelines.text import TextEncoder

from ..common.errors import UserError
from ..common.loading import (
    encoder_hash,
    load_pipeline,
    load_vae,
    public_config,
    text_encoder_hash,
    weights_hash,
)
from ..losses.adversarial import DiscriminatorLoss
from .checkpoints import find_checkpoint, list_checkpoints
from .config import DiTTrainingConfig, ModelConfig, VAETrainingConfig

Constructor = Callable[[Mapping[str, Any]], nn.Module]

TRAINER_STATE = "trainer.json"
DATA_KEYS = {"sample_size": "data.resolution", "num_frames": "data.num_frames"}  # of constructor arguments
HEADS = ("num_attention_heads", "qformer_heads")  # the sizes that the shapes of an official checkpoint do not tell
# Weights that overrides may add: they start at zero, or are behind such ones, so the model is unchanged.
ADDED_AT_ZERO = re.compile(
    r"image_embed\.|interval_embed\.|caption_embed\.|caption_pool\.|transformer_blocks\.\d+\.(attn3|norm_caption)\."
)
CLASS_TABLES = ("class_embed.weight", "condition_embed.class_embed.weight")


@dataclass(frozen=True)
class Parent:
    """The model that a run starts from.

    Attributes:
        name: its folder, file or Hub repository.
        sha256: `weights_hash` of the model.
        config: its constructor arguments.
        classes: of a pipeline, the names of its classes by id.
        scheduler: of a pipeline, the config of its scheduler, with the class under `_class_name`.
        encoder: of a pipeline, `encoder_hash` of its autoencoder.
        text_encoder: of a pipeline, `text_encoder_hash` of its text encoder, where it has one.
        statistics: of a pipeline, mean and standard deviation of its latents, where it or its autoencoder states them.
        class_name: of a VAE, the name of its class.
        weights: by name; empty in a resumed run.
    """

    name: str
    sha256: str
    config: dict[str, Any]
    classes: list[str] = field(default_factory=list)
    scheduler: dict[str, Any] = field(default_factory=dict)
    encoder: str | None = None
    text_encoder: str | None = None
    statistics: tuple[list[float], list[float]] | None = None
    class_name: str = AutoencoderKLVidTwin.__name__
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)

    def record(self) -> dict[str, Any]:
        """All but the weights, as JSON stores it."""
        return asdict(replace(self, weights={}))

    def mark(self, model: nn.Module) -> None:
        """Name the parent in the config of a model, from which its card is rendered; in those of Diffusers only."""
        if isinstance(model, ModelMixin):
            model.register_to_config(**{PARENT: {"name": self.name, "sha256": self.sha256}})


# --- The parent of a run ---------------------------------------------------------------------------------------------


def find_parent(config: VAETrainingConfig | DiTTrainingConfig) -> Parent | None:
    """The parent of a run: that of the checkpoint to resume from, otherwise read from `model.pretrained`.

    Raises:
        UserError: if it cannot be loaded.
    """
    if config.model.pretrained is None:
        return None
    recorded = _recorded_parent(config)
    if recorded is not None and recorded.name == config.model.pretrained:
        return recorded
    return read_pipeline(config.model) if isinstance(config, DiTTrainingConfig) else read_vae(config.model)


def read_vae(config: ModelConfig) -> Parent:
    """Read a VAE from a folder, a pipeline, the Hub or an official checkpoint.

    Raises:
        UserError: if it cannot be loaded.
    """
    name = config.pretrained
    if name.endswith(SUFFIXES):
        heads = {key: value for key, value in config.overrides.items() if key in HEADS}
        try:
            vae = AutoencoderKLVidTwin.from_single_file(name, **heads)
        except (ValueError, TypeError, OSError) as error:
            raise UserError(f"model.pretrained={name} cannot be loaded: {error}") from error
    else:
        vae = load_vae(name)
    name_of_class = type(vae.backbone).__name__
    if config.class_name not in (AutoencoderKLVidTwin.__name__, name_of_class):
        raise UserError(f"model.class_name is {config.class_name}, but model.pretrained={name} is a {name_of_class}.")
    weights = vae.backbone.state_dict()
    return Parent(name, weights_hash(vae), public_config(vae), class_name=name_of_class, weights=weights)


def read_pipeline(config: ModelConfig) -> Parent:
    """Read the DiT of a pipeline, with its classes and scheduler.

    Raises:
        UserError: if it cannot be loaded.
    """
    pipeline = load_pipeline(config.pretrained)
    transformer, names = pipeline.transformer, {int(k): v for k, v in pipeline.config.id2label.items()}
    has_statistics = pipeline.vae is not None or pipeline.config.latents_mean is not None
    mean, std = pipeline.latent_statistics if has_statistics else (None, None)
    text_encoder = TextEncoder(pipeline.tokenizer, pipeline.text_encoder)
    return Parent(
        config.pretrained,
        weights_hash(transformer),
        public_config(transformer),
        classes=[names.get(label, str(label)) for label in range(transformer.config.num_classes or 0)],
        scheduler=json.loads(pipeline.scheduler.to_json_string()),
        encoder=None if pipeline.vae is None else encoder_hash(pipeline.autoencoder),
        text_encoder=None if text_encoder.model is None else text_encoder_hash(text_encoder),
        statistics=None if mean is None else (list(mean), list(std)),
        weights=transformer.state_dict(),
    )


def parent_scheduler(parent: Parent, **overrides: Any) -> SchedulerMixin:
    """The scheduler of a pipeline, with some arguments replaced."""
    scheduler_class = getattr(diffusers, parent.scheduler["_class_name"])
    return scheduler_class.from_config(parent.scheduler, **overrides)


def _recorded_parent(config: VAETrainingConfig | DiTTrainingConfig) -> Parent | None:
    checkpoint = find_checkpoint(config.output_dir, config.resume)
    if checkpoint is None:
        return None
    try:
        recorded = json.loads((checkpoint / TRAINER_STATE).read_text()).get("parent")
    except (OSError, ValueError):
        return None  # reported when the checkpoint is loaded
    if recorded is None:
        return None
    if recorded.get("statistics"):  # JSON has no tuples
        recorded["statistics"] = tuple(recorded["statistics"])
    return Parent(**recorded)


# --- Models with a parent's weights ----------------------------------------------------------------------------------


def build_vae_from(parent: Parent, overrides: Mapping[str, Any]) -> nn.Module:
    """Create the VAE of a run, of its parent's class, with its parent's weights.

    Args:
        parent: of the run.
        overrides: constructor arguments that replace those of the parent.

    Raises:
        UserError: if an override is unknown or changes the shape of a weight.
    """
    if parent.class_name == AutoencoderKLVidTwin.__name__:
        overrides = rename_old_arguments(overrides)
    vae = _build(parent.class_name, parent, parent.config, overrides)
    if parent.weights:
        vae.load_state_dict(parent.weights)
    parent.mark(vae)
    return vae


def transformer_arguments(config: ModelConfig, parent: Parent | None) -> dict[str, Any]:
    """Constructor arguments of a run's DiT, besides those that follow from its VAE and data.

    Raises:
        UserError: if the preset is unknown.
    """
    try:
        arguments = preset_config(config.preset) if parent is None else parent.config
    except ValueError as error:
        raise UserError(f"The DiT of this config cannot be built: {error}") from error
    return {**arguments, **config.overrides}


def build_transformer_from(
    parent: Parent, overrides: Mapping[str, Any], classes: Sequence[str]
) -> VidTwinTransformer3DModel:
    """Create the DiT of a run with its parent's weights.

    Classes that the parent knows by name keep their rows of the class table, and so does "no class"; all others have
    newly initialized rows.

    Args:
        parent: of the run.
        overrides: constructor arguments that replace those of the parent.
        classes: names of the run's classes by id.

    Raises:
        UserError: if an override is unknown or changes the shape of a weight.
    """
    config = {**parent.config, "num_classes": len(classes) or None}
    transformer = _build(VidTwinTransformer3DModel.__name__, parent, config, overrides)
    if parent.weights:
        weights = dict(parent.weights)
        own = transformer.state_dict()
        weights = {name: weight for name, weight in own.items() if ADDED_AT_ZERO.match(name)} | weights
        for name in CLASS_TABLES:
            if name in own and name in weights:
                weights[name] = _inherit_rows(own[name], classes, weights[name], parent.classes)
        # Without classes the parent has neither a class table nor layers that attend to it: they stay initialized.
        transformer.load_state_dict(weights, strict=parent.config["num_classes"] is not None or not classes)
    parent.mark(transformer)
    return transformer


def check_latent_shapes(parent: Parent, overrides: Mapping[str, Any], vae: VideoAutoencoder) -> None:
    """Raise a `UserError` if a DiT was trained on latents of other shapes than those of a VAE."""
    sizes = {**parent.config, **overrides}
    for stream in STREAMS:
        expected, shape = tuple(sizes[f"{stream}_shape"]), tuple(getattr(vae, f"{stream}_shape"))
        if expected != shape:
            raise UserError(
                f"model.pretrained={parent.name} was trained on {stream} latents {expected}, but those of vae= are "
                f"{shape}: choose the VAE it was trained with, or one that was fine-tuned from it."
            )


def _inherit_rows(
    table: torch.Tensor, classes: Sequence[str], parent_table: torch.Tensor, parent_classes: Sequence[str]
) -> torch.Tensor:
    """The class table (N + 1, D) with the parent's rows of the classes that it knows, and of "no class"."""
    rows = {name: row for row, name in enumerate(parent_classes)}
    inherited = table.clone()
    for row, name in enumerate(classes):
        if name in rows:
            inherited[row] = parent_table[rows[name]]
    inherited[-1] = parent_table[-1]
    return inherited


def _build(class_name: str, parent: Parent, config: Mapping[str, Any], overrides: Mapping[str, Any]) -> nn.Module:
    """Create a model from a config and overrides that change no weight's shape.

    Raises:
        UserError: for any other override.
    """
    create, known = _constructor(class_name)
    for name in overrides:
        if name not in known or name == "num_classes":
            reason = "sets the classes of the data" if name in known else "is no argument of the model"
            raise UserError(f"model.overrides.{name} {reason}; leave it out.")

    def changed_weight(names: Iterable[str]) -> str | None:
        """Name of a weight that some of the overrides add, remove or reshape."""
        shapes = _weight_shapes(create, {**config, **{name: overrides[name] for name in names}})
        changed = (name for name in {**own, **shapes} if shapes.get(name) != own.get(name))
        return next((name for name in changed if name in own or not ADDED_AT_ZERO.match(name)), None)

    own = _weight_shapes(create, config) if overrides else {}
    try:
        if overrides and (weight := changed_weight(overrides)):
            for name in overrides:
                if single := _try(changed_weight, [name]):
                    raise UserError(_refusal(parent, [name], single, overrides))
            raise UserError(_refusal(parent, list(overrides), weight, overrides))
        return create({**config, **overrides})
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"model.pretrained={parent.name} cannot be built with these overrides: {error}") from error


def _constructor(class_name: str) -> tuple[Constructor, set[str]]:
    """The function that builds a model from its arguments, and their names."""
    ours = {kind.__name__: kind for kind in (AutoencoderKLVidTwin, VidTwinTransformer3DModel)}
    model_class = ours.get(class_name) or find_class(class_name)
    if issubclass(model_class, ModelMixin):
        return model_class.from_config, model_class._get_init_keys(model_class)
    return lambda config: build_model(class_name, **config), set(model_class.config_class().to_dict())


def _weight_shapes(create: Constructor, config: Mapping[str, Any]) -> dict[str, torch.Size]:
    with init_empty_weights():
        model = create(config)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _try(function: Callable[[Any], Any], argument: Any) -> Any:
    """The result; None if it is an error."""
    try:
        return function(argument)
    except (ValueError, TypeError):
        return None


def _refusal(parent: Parent, names: Sequence[str], weight: str, overrides: Mapping[str, Any]) -> str:
    options = " and ".join(f"{DATA_KEYS.get(n, f'model.overrides.{n}')}={overrides[n]}" for n in names)
    return (
        f"{options} would change the shape of the weight {weight} of model.pretrained={parent.name}; leave it out, or "
        "train a new model from a preset."
    )


# --- The discriminator -----------------------------------------------------------------------------------------------


def load_discriminator(discriminator: DiscriminatorLoss, name: str) -> None:
    """Load the discriminator of another run, with the running means of LeCAM where it has them.

    Args:
        discriminator: to load into.
        name: a run folder, whose last checkpoint is read, a checkpoint folder, or a .safetensors file with the names
            of such a checkpoint or of `PatchDiscriminator`.

    Raises:
        UserError: if there is none, or it has another architecture.
    """
    path = Path(name)
    if path.is_dir() and (checkpoints := list_checkpoints(path)):
        path = checkpoints[-1]
    files = sorted(path.glob("model*.safetensors")) if path.is_dir() else [path]
    try:
        saved = {key: tensor for file in files for key, tensor in _read_discriminator(file).items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"gan.pretrained={name} cannot be read as safetensors ({error}).") from error
    if not saved:
        raise UserError(
            f"gan.pretrained={name} has no discriminator; name the folder of a run with gan.weight above 0, one of "
            "its checkpoints, or a .safetensors file. The final model has none."
        )
    expected = discriminator.state_dict()
    saved = {key: tensor for key, tensor in expected.items() if key.startswith("lecam_")} | saved
    wrong = [key for key in {**expected, **saved} if _shape(expected.get(key)) != _shape(saved.get(key))]
    if wrong:
        raise UserError(
            f"gan.pretrained={name} is a discriminator of another architecture: {len(wrong)} tensors differ, the "
            f"first is {wrong[0]}; set gan.discriminator, gan.channels and gan.num_layers as in its run."
        )
    discriminator.load_state_dict(saved)


def _read_discriminator(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file that belong to a discriminator, by their names in `DiscriminatorLoss`."""
    with safe_open(file, "pt") as tensors:
        names = list(tensors.keys())
        if all(name.startswith("layers.") for name in names):
            return {f"discriminator.{name}": tensors.get_tensor(name) for name in names}
        prefix = "discriminator."
        return {n.removeprefix(prefix): tensors.get_tensor(n) for n in names if n.startswith(prefix)}


def _shape(tensor: torch.Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape
