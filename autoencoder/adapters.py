"""Video autoencoders of Diffusers and transformers under the protocol of `autoencoder.video_autoencoder`.

Every adapted class has one latent: it is the structure stream, (C, frames, rows, columns), and the dynamics stream is
empty. To add a class, add its `LatentRule` to `RULES`; if it is called in another way than Diffusers' autoencoders,
add a subclass of `AutoencoderAdapter` to `ADAPTERS`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from huggingface_hub import ModelCard
from torch import nn

from .latents import LatentShape, TwinLatents
from .model_card import count_parameters, find_parents, render_card
from .video_autoencoder import Components, VideoAutoencoder

DEFAULT_CLIP = (17, 256, 256)  # (T, H, W), about; autoencoders of convolutions have no size
DETERMINISTIC_LOGVAR = -30.0  # log-variance of encoders without one: the least that the posterior has


@dataclass(frozen=True)
class LatentRule:
    """The sizes of a class's latent.

    Attributes:
        channels: channels of the latent.
        pixels: pixels per position, along one side; clips have a multiple of them.
        frames: frames per latent frame.
        frame_step: clips have a multiple of this number of frames, plus one if `causal`; by default `frames`.
        causal: whether the first frame has a separate latent frame.
    """

    channels: int
    pixels: int
    frames: int
    causal: bool = True
    frame_step: int | None = None

    def latent_shape(self, num_frames: int, height: int, width: int) -> LatentShape:
        """(channels, frames, rows, columns) of the latent of a valid clip."""
        frames = (num_frames - self.causal) // self.frames + self.causal
        return (self.channels, frames, height // self.pixels, width // self.pixels)

    def valid_clip(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """The smallest valid clip (T, H, W) that covers a clip of this size."""
        step = self.frame_step or self.frames
        frames = max(math.ceil((num_frames - self.causal) / step), 1 - self.causal) * step + self.causal
        return (frames, *(max(math.ceil(side / self.pixels), 1) * self.pixels for side in (height, width)))

    def clip_of(self, latent_shape: LatentShape) -> tuple[int, int, int]:
        """Invert `latent_shape`."""
        _, frames, rows, columns = latent_shape
        return ((frames - self.causal) * self.frames + self.causal, rows * self.pixels, columns * self.pixels)

    def __str__(self) -> str:
        frames = f"{self.frame_step or self.frames}k{' + 1' if self.causal else ''}"
        return f"{frames} frames, of multiples of {self.pixels} pixels"


def _ltx(model: Any) -> LatentRule:
    c = model.config
    return LatentRule(c.latent_channels, model.spatial_compression_ratio, model.temporal_compression_ratio)


def _ltx2(model: Any) -> LatentRule:
    c = model.config  # its ratios count every layer as one over space and time
    scaling = c.spatio_temporal_scaling
    scaling = [scaling] * len(c.downsample_type) if isinstance(scaling, bool) else scaling
    kinds = [kind for kind, scales in zip(c.downsample_type, scaling, strict=False) if scales]
    pixels = c.patch_size * 2 ** sum(kind != "temporal" for kind in kinds)
    return LatentRule(c.latent_channels, pixels, c.patch_size_t * 2 ** sum(kind != "spatial" for kind in kinds))


def _wan(model: Any) -> LatentRule:
    c = model.config
    pixels = 2 ** (len(c.dim_mult) - 1) * (c.get("patch_size") or 1)
    return LatentRule(c.z_dim, pixels, 2 ** sum(c.temperal_downsample), frame_step=4)  # it encodes 4 frames at a time


def _cogvideox(model: Any) -> LatentRule:
    c = model.config  # it encodes 8 frames at a time, and decodes other remainders to more frames
    frames = int(c.temporal_compression_ratio)
    return LatentRule(c.latent_channels, 2 ** (len(c.block_out_channels) - 1), frames, frame_step=max(8, frames))


def _by_ratios(model: Any) -> LatentRule:
    ratios = model.spatial_compression_ratio, model.temporal_compression_ratio
    return LatentRule(model.config.latent_channels, *ratios)


def _vidtok(model: Any) -> LatentRule:
    pixels = 2 ** len(model.encoder.spatial_ds)
    frames = model.temporal_compression_ratio
    if model.is_causal:
        return LatentRule(model.config.z_channels, pixels, frames)
    return LatentRule(model.config.z_channels, pixels, frames, False, model.num_sample_frames_batch_size)


def _kvae(model: Any) -> LatentRule:
    c = model.config
    return LatentRule(c.z_channels, 2 ** (len(c.ch_mult) - 1), c.temporal_compress_times)


def _emu3(model: Any) -> LatentRule:
    c = model.config
    return LatentRule(c.embed_dim, model.spatial_scale_factor, c.temporal_downsample_factor, causal=False)


RULES: dict[str, Callable[[Any], LatentRule]] = {
    "AutoencoderKLLTXVideo": _ltx,
    "AutoencoderKLLTX2Video": _ltx2,
    "AutoencoderKLWan": _wan,
    "AutoencoderKLQwenImage": _wan,
    "AutoencoderKLCogVideoX": _cogvideox,
    "AutoencoderKLHunyuanVideo": _by_ratios,
    "AutoencoderKLHunyuanVideo15": _by_ratios,
    "AutoencoderKLCosmos": _by_ratios,
    "AutoencoderKLMagvit": _by_ratios,
    "AutoencoderKLMochi": _by_ratios,
    "AutoencoderVidTok": _vidtok,
    "AutoencoderKLKVAEVideo": _kvae,
    "Emu3VQVAE": _emu3,
}


class AutoencoderAdapter(VideoAutoencoder, ModelMixin):
    """A Diffusers video autoencoder under the protocol.

    Args:
        model: an instance of a class of `RULES`.
        num_frames, height, width: the clip size, which must follow the class's rule; None: about 17 frames of 256 x
            256 pixels.
        latents_mean, latents_std: statistics of the latents; None: those that the model states, if any.

    Raises:
        ValueError: if the size does not follow the rule.
    """

    _supports_gradient_checkpointing = True

    def __init__(
        self,
        model: nn.Module,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.rule = RULES[type(model).__name__](model)
        default = self.rule.valid_clip(*DEFAULT_CLIP)
        self.set_clip_size(num_frames or default[0], height or default[1], width or default[2])
        self._statistics = (
            (latents_mean, latents_std) if latents_mean is not None else _stated_statistics(model, self.rule.channels)
        )

    # --- sizes and names ---------------------------------------------------------------------------------------------

    @property
    def config(self) -> Mapping[str, Any]:
        """The config of the adapted model."""
        return self.model.config

    @property
    def backbone(self) -> nn.Module:
        """The adapted model, which is saved, hashed and registered in pipelines."""
        return self.model

    @property
    def clip_shape(self) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the clips that the model is set to."""
        return (3, *self._clip)

    @property
    def min_size(self) -> int:
        """Smallest height and width of a clip in pixels; smaller ones than a tile are padded."""
        return 1

    @property
    def structure_shape(self) -> LatentShape:
        """(channels, frames, rows, columns) of the latent."""
        return self.rule.latent_shape(*self._clip)

    @property
    def dynamics_shape(self) -> LatentShape:
        """The shape of an empty stream."""
        return (0, self.structure_shape[1], 0)

    @property
    def latents_mean(self) -> list[float] | None:
        """Mean of each channel over a training set: as passed, or as the model states it."""
        return self._statistics[0]

    @property
    def latents_std(self) -> list[float] | None:
        """Standard deviation of each channel over a training set: as passed, or as the model states it."""
        return self._statistics[1]

    @property
    def encoder_modules(self) -> tuple[str, ...]:
        """All children of the model except those that only `decode` uses."""
        children = dict(self.model.named_children())
        return tuple(name for name in children if name not in ("decoder", "post_quant_conv"))

    @property
    def last_layer(self) -> nn.Module:
        """The last convolution or linear layer of the decoder."""
        layers = [m for m in self.model.decoder.modules() if isinstance(m, nn.Conv2d | nn.Conv3d | nn.Linear)]
        return layers[-1]

    @property
    def _no_split_modules(self) -> list[str] | None:
        return getattr(self.model, "_no_split_modules", None)

    def set_latent_statistics(self, mean: list[float], std: list[float]) -> None:
        """Set the statistics, also in the config or the buffers of the model where it has them."""
        self._statistics = (list(mean), list(std))
        scaled = [value * _scaling_factor(self.model) for value in std]
        if "latents_mean" in self.model.config:
            self.model.register_to_config(latents_mean=list(mean), latents_std=scaled)
        elif isinstance(getattr(self.model, "latents_mean", None), torch.Tensor):
            for buffer, values in ((self.model.latents_mean, mean), (self.model.latents_std, scaled)):
                buffer.copy_(torch.tensor(values))

    def set_clip_size(self, num_frames: int, height: int, width: int) -> None:
        """Set `clip_shape`.

        Raises:
            ValueError: if the size does not follow the rule of the class.
        """
        size = (num_frames, height, width)
        for name, length, valid in zip(("frames", "rows", "columns"), size, self.rule.valid_clip(*size), strict=True):
            if length != valid:
                raise ValueError(
                    f"{type(self.model).__name__} encodes {self.rule}, so {length} {name} do not fit; the next valid "
                    f"number is {valid}."
                )
        self._clip = size

    def fit_clip_size(self, num_frames: int, height: int, width: int) -> None:
        """Set the smallest valid clip that covers this size, at most about 17 frames of 256 x 256 pixels."""
        limits = self.rule.valid_clip(*DEFAULT_CLIP)
        valid = self.rule.valid_clip(num_frames, height, width)
        self._clip = tuple(map(min, valid, limits))

    def fit_latent_shape(self, structure_shape: LatentShape) -> None:
        """Set the clip size whose latent has this shape; without effect for a shape of another class."""
        if len(structure_shape) == 4 and structure_shape[0] == self.rule.channels and min(structure_shape) > 0:
            self._clip = self.rule.clip_of(structure_shape)

    # --- encode, decode ----------------------------------------------------------------------------------------------

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        posterior = self.model.encode(x).latent_dist
        if not hasattr(posterior, "logvar"):  # of an encoder without variance
            mean = posterior.mode().flatten(1)
            return torch.cat([mean, torch.full_like(mean, DETERMINISTIC_LOGVAR)], dim=1)
        return torch.cat([posterior.mean.flatten(1), posterior.logvar.flatten(1)], dim=1)

    def _decode(self, z: TwinLatents, components: Components) -> torch.Tensor:
        if components != "both":
            raise ValueError(
                f"{type(self.model).__name__} has one latent, so components must be 'both', not {components!r}."
            )
        return self._decode_latent(z.structure)

    def _decode_latent(self, z: torch.Tensor) -> torch.Tensor:
        return self.model.decode(z).sample

    # --- saving ------------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Save the adapted model in the format of its class."""
        self.model.save_pretrained(save_directory, **kwargs)

    def model_card(self, repo_id: str) -> ModelCard:
        """Render a README.md.

        Args:
            repo_id: "user/name", which the card's example loads.
        """
        return render_card(
            Path(__file__).with_name("adapter_card.md.jinja"),
            repo_id,
            tags=["video-autoencoder"],
            parents=find_parents(model=self.model),
            parameters=count_parameters(self.model),
            class_name=type(self.model).__name__,
            library=type(self.model).__module__.split(".")[0],
            clip_shape=self.clip_shape,
            latent_shape=self.structure_shape,
            compression_rate=self.compression_rate,
        )


class LTXAdapter(AutoencoderAdapter):
    """LTX, whose later decoders take a timestep; 0 is the default of its pipeline."""

    def _decode_latent(self, z: torch.Tensor) -> torch.Tensor:
        if not self.model.config.timestep_conditioning:
            return self.model.decode(z).sample
        return self.model.decode(z, z.new_zeros(len(z))).sample


class VidTokAdapter(AutoencoderAdapter):
    """VidTok, whose `forward` repeats the first frame before it encodes causally; FSQ codes are continuous here."""

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        if self.model.is_causal:
            first = x[:, :, :1].expand(-1, -1, self.rule.frames - 1, -1, -1)
            x = torch.cat([first, x], dim=2)
        if self.model.regularizer == "kl":
            return super()._encode(x)
        mean = self.model.encode(x)[0].flatten(1)
        return torch.cat([mean, torch.full_like(mean, DETERMINISTIC_LOGVAR)], dim=1)

    def _decode_latent(self, z: torch.Tensor) -> torch.Tensor:
        return self.model.decode(z)


class HunyuanVideo15Adapter(AutoencoderAdapter):
    """HunyuanVideo 1.5, whose attention mask fits one clip at a time only."""

    use_slicing = True


class MagvitAdapter(AutoencoderAdapter):
    """EasyAnimate's autoencoder, whose convolutions keep features between the frames that they process in turn."""

    _supports_gradient_checkpointing = False


class Emu3Adapter(AutoencoderAdapter):
    """The tokenizer of EMU-3 without its quantization: latents are the continuous vectors before it."""

    _supports_gradient_checkpointing = False

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        model.quantize.requires_grad_(False)

    @property
    def encoder_modules(self) -> tuple[str, ...]:
        """All children of the model except those that only `decode` uses, and the codebook."""
        return ("encoder", "quant_conv")

    def set_latent_statistics(self, mean: list[float], std: list[float]) -> None:
        """Set the statistics; the config has none."""
        self._statistics = (list(mean), list(std))

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        features = self.model.encoder(x.transpose(1, 2))  # (B, T, C, H, W)
        mean = self.model.quant_conv(features.transpose(1, 2)).flatten(1)
        return torch.cat([mean, torch.full_like(mean, DETERMINISTIC_LOGVAR)], dim=1)

    def _decode_latent(self, z: torch.Tensor) -> torch.Tensor:
        features = self.model.post_quant_conv(z.contiguous())
        video = self.model.decoder(features.transpose(1, 2), z.transpose(1, 2))
        return video.reshape(len(z), *(self.clip_shape[i] for i in (1, 0, 2, 3))).transpose(1, 2)


ADAPTERS: dict[str, type[AutoencoderAdapter]] = {
    "AutoencoderKLLTXVideo": LTXAdapter,
    "AutoencoderKLLTX2Video": LTXAdapter,
    "AutoencoderKLHunyuanVideo15": HunyuanVideo15Adapter,
    "AutoencoderKLMagvit": MagvitAdapter,
    "AutoencoderVidTok": VidTokAdapter,
    "Emu3VQVAE": Emu3Adapter,
}


def adapt(model: nn.Module, **arguments: Any) -> VideoAutoencoder:
    """Return a model under the protocol: itself if it follows it, else its adapter.

    Args:
        model: a `VideoAutoencoder`, or an instance of a class of `RULES`.
        arguments: of `AutoencoderAdapter`.

    Raises:
        ValueError: if there is no adapter for the class.
    """
    if isinstance(model, VideoAutoencoder):
        return model
    name = type(model).__name__
    check_class(name)
    return ADAPTERS.get(name, AutoencoderAdapter)(model, **arguments)


def adapt_to_latents(model: nn.Module, latent_shape: LatentShape) -> VideoAutoencoder:
    """`adapt`, set to the clip size whose latent (C, frames, rows, columns) has this shape.

    Raises:
        ValueError: if there is no adapter for the class.
    """
    adapted = adapt(model)
    adapted.fit_latent_shape(latent_shape)
    return adapted


def check_class(name: str) -> None:
    """Raise a `ValueError` for a class without an adapter."""
    if name not in RULES:
        raise ValueError(f"there is no adapter for {name}; the supported classes are {', '.join(RULES)}.")


def find_class(name: str) -> type[nn.Module]:
    """Return the class of this name of `RULES`, from Diffusers or transformers.

    Raises:
        ValueError: if there is no adapter for it, or the installed version does not have it.
    """
    import diffusers
    import transformers

    check_class(name)
    for library in (diffusers, transformers):
        if (found := getattr(library, name, None)) is not None:
            return found
    raise ValueError(f"the installed versions of diffusers and transformers have no {name}.")


def build_model(name: str, **arguments: Any) -> nn.Module:
    """Create a newly initialized model of a class of `RULES`.

    Args:
        name: of the class.
        arguments: of its constructor; for a class of transformers, of its config.

    Raises:
        ValueError, TypeError: if the class or an argument is unknown.
    """
    model_class = find_class(name)
    if issubclass(model_class, ModelMixin):
        return model_class(**arguments)
    return model_class(model_class.config_class(**arguments)).train()


def empty_copy(model: nn.Module) -> nn.Module:
    """A newly initialized model of the same class and config, and in an adapter of the same clip size."""
    if isinstance(model, AutoencoderAdapter):
        copied = adapt(empty_copy(model.backbone))
        copied.fit_latent_shape(model.structure_shape)
        return copied
    if isinstance(model, ModelMixin):
        return type(model).from_config(model.config)
    return type(model)(model.config)


def _stated_statistics(model: nn.Module, channels: int) -> tuple[list[float] | None, list[float] | None]:
    """Mean and standard deviation of each channel that a model's config or buffers state; None, None without."""
    mean, std = (getattr(model.config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is None and isinstance(getattr(model, "latents_mean", None), torch.Tensor):
        mean, std = model.latents_mean, model.latents_std
        if mean.is_meta or (not mean.any() and (std == 1).all()):  # without values, or LTX before training
            return None, None
    # Cosmos states them for every frame: pool the frames of a channel.
    frames = len(mean) // channels if mean is not None and type(model).__name__ == "AutoencoderKLCosmos" else 1
    if mean is None or std is None or len(mean) != channels * frames:  # a default of another number of channels
        return None, None
    mean, std = (torch.as_tensor(x, dtype=torch.float64, device="cpu").view(channels, frames) for x in (mean, std))
    pooled = (std.square().mean(1) + mean.var(1, correction=0)).sqrt()
    return mean.mean(1).tolist(), (pooled / _scaling_factor(model)).tolist()


def _scaling_factor(model: nn.Module) -> float:
    """The factor by which Diffusers' pipelines multiply normalized latents."""
    return getattr(model.config, "scaling_factor", None) or 1.0
