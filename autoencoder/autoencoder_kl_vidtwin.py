"""VidTwin, a video autoencoder with a structure and a dynamics latent, as a Diffusers model.

Source: "VidTwin: Video VAE with Decoupled Structure and Dynamics" (arXiv 2412.17726), Sections 3.1 to 3.3.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.loaders import FromOriginalModelMixin
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from huggingface_hub import ModelCard
from torch import nn

from .attention import ProcessorMixin
from .blocks import VidTwinTransformer
from .bottleneck import (
    BOTTLENECKS,
    DYNAMICS_POOLS,
    SINGLE_LATENT_BOTTLENECKS,
    STRUCTURE_FOLDS,
    STRUCTURE_POOLS,
)
from .grids import Grid, dynamics_grid, feature_frames, feature_grid, frame_size, structure_grid
from .latents import LatentShape, TwinLatents
from .linear_path import LinearDecoder, LinearEncoder, fit_linear_path
from .model_card import ModelCardMixin, count_parameters, find_parents, render_card
from .onednn import use_onednn
from .presets import preset_config, rename_old_arguments
from .qformer import QFormer
from .video_autoencoder import Components, VideoAutoencoder

Patch = tuple[int, int, int]  # (frames, rows, columns)


class VidTwinEncoder(nn.Module):
    """Clips (B, C, T, H, W) -> features (B, t, h * w, D), one vector for each patch of (frames, rows, columns)."""

    def __init__(self, in_channels: int, patch: Patch, transformer: VidTwinTransformer, dim: int) -> None:
        super().__init__()
        self.patch = patch
        # A convolution whose stride equals its kernel size is one matrix product.
        self.patch_embed = nn.Linear(in_channels * math.prod(patch), dim)
        self.transformer = transformer

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        k, p, q = self.patch
        patches = rearrange(sample, "b c (t k) (h p) (w q) -> b t (h w) (c k p q)", k=k, p=p, q=q)
        return self.transformer(self.patch_embed(patches))


class VidTwinDecoder(nn.Module):
    """Features (B, t, h * w, D) -> clips (B, C, T, H, W)."""

    def __init__(self, out_channels: int, patch: Patch, grid: Grid, transformer: VidTwinTransformer, dim: int) -> None:
        super().__init__()
        self.patch, self.grid = patch, grid
        self.transformer = transformer
        self.norm_out = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.proj_out = nn.Linear(dim, out_channels * math.prod(patch))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        k, p, q = self.patch
        shift, scale = self.scale_shift_table
        hidden_states = self.norm_out(self.transformer(hidden_states)) * (1 + scale) + shift
        patches = self.proj_out(hidden_states)
        return rearrange(
            patches, "b t (h w) (k p q c) -> b c (t k) (h p) (w q)", h=self.grid[0], w=self.grid[1], k=k, p=p, q=q
        )

    def patchify(self, sample: torch.Tensor) -> torch.Tensor:
        """The inverse of the last step of `forward`: (B, C, T, H, W) -> (B, t, h * w, values of a patch)."""
        k, p, q = self.patch
        return rearrange(sample, "b c (t k) (h p) (w q) -> b t (h w) (k p q c)", k=k, p=p, q=q)


class AutoencoderKLVidTwin(
    ModelCardMixin, VideoAutoencoder, ModelMixin, ProcessorMixin, ConfigMixin, FromOriginalModelMixin
):
    r"""The VidTwin video autoencoder.

    It encodes a clip (B, 3, T, H, W) in [-1, 1] to a Gaussian over two latents, packed as (B, L): *structure*
    (d_S, n_q, h_S, w_S), pooled over time by a Q-Former at every location, and *dynamics* (d_D, T, w_D + h_D), the
    averages of every frame over its height and over its width.

    The grid of a model is fixed. Clips of any other size, down to one frame and one patch, are cut into overlapping
    tiles of the model's size, and the decoded tiles are blended; see `enable_tiling`.

    Args:
        sample_size: height and width of a clip in pixels, as one number or (height, width); multiples of
            `patch_size`.
        num_frames: frames T of a clip, a multiple of `temporal_patch_size`.
        in_channels: color channels.
        patch_size: side of a patch in pixels.
        temporal_patch_size: frames of a patch. With k frames, transformers and latents have T / k positions in time.
        hidden_size: width D of the transformers, a multiple of 4 and of `num_attention_heads`.
        num_layers: blocks of the encoder and of the decoder.
        num_attention_heads: attention heads of the blocks.
        mlp_ratio: width of the blocks' MLP over D.
        temporal_causal: whether a frame attends only to itself and earlier frames.
        num_queries: queries n_q of the Q-Former.
        query_dim: width of a query.
        qformer_layers, qformer_heads, qformer_ffn_dim, qformer_dropout: sizes of the Q-Former.
        structure_channels: channels d_S of the structure latent.
        structure_width: channels of the structure convolutions before the first downsampling.
        structure_downsamples: number k of downsamplings by 2 of the structure grid.
        dynamics_channels: channels d_D of the dynamics latent.
        dynamics_downsamples: number k' of downsamplings by 2 of the dynamics grid.
        structure_pool, structure_fold, dynamics_pool, single_latent: the paper's ablations (Table 3; by name in
            `autoencoder.presets.ABLATIONS`). `structure_pool` over time is a `"qformer"`, or a `"conv"` and an MLP.
            `structure_fold` puts locations into the Q-Former's `"batch"` or `"hidden"` dimension. `dynamics_pool`
            over space is the `"average"` or a `"qformer"`. With `single_latent` the structure latent is
            (d, T, h_S, w_S), with about the number of values of both latents, and the dynamics latent is empty.
        bottleneck: `"plain"` (the paper's, required by the released weights) or `"residual"` (with shortcuts: trains
            much faster from scratch). Configs saved by older versions call it `heads="official"` or `"residual"`.
        linear_path: number of slow temporal frequencies of a linear encoder and decoder around the network
            (`autoencoder.linear_path`), of 16 frames for example 4; 0: none. Training programs fit it to clips first.
        linear_path_experts: number of linear encoders and decoders per location of the structure latent
            (`autoencoder.linear_experts`).
        latents_mean, latents_std: mean and standard deviation of the [structure, dynamics] latents over a training
            set. Trainers and pipelines apply them; `encode` and `decode` never do.
    """

    normalizes_channels = False
    _supports_gradient_checkpointing = True
    _no_split_modules = ["VidTwinFirstBlock", "VidTwinBlock", "QFormerLayer"]
    _repeated_blocks = ["VidTwinFirstBlock", "VidTwinBlock"]
    _skip_layerwise_casting_patterns = ["patch_embed", "norm", r"decoder\.proj_out$", "linear_(en|de)coder"]
    # Each of these is offloaded separately, since pipelines call `decode` and not `forward`.
    _group_offload_block_modules = [
        "encoder",
        "structure_encoder",
        "dynamics_encoder",
        "structure_decoder",
        "dynamics_decoder",
        "norm_in",
        "decoder",
        "linear_encoder",
        "linear_decoder",
    ]

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int] = 224,
        num_frames: int = 16,
        in_channels: int = 3,
        patch_size: int = 16,
        hidden_size: int = 768,
        num_layers: int = 16,
        num_attention_heads: int = 12,
        mlp_ratio: float = 4.0,
        temporal_causal: bool = True,
        num_queries: int = 16,
        query_dim: int = 64,
        qformer_layers: int = 6,
        qformer_heads: int = 8,
        qformer_ffn_dim: int = 768,
        qformer_dropout: float = 0.1,
        structure_channels: int = 4,
        structure_width: int = 128,
        structure_downsamples: int = 1,
        dynamics_channels: int = 8,
        dynamics_downsamples: int = 1,
        structure_pool: str = "qformer",
        structure_fold: str = "batch",
        dynamics_pool: str = "average",
        single_latent: bool = False,
        bottleneck: str = "plain",
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        temporal_patch_size: int = 1,
        linear_path: int = 0,
        linear_path_experts: int = 1,
    ) -> None:
        super().__init__()
        counts = (num_attention_heads, qformer_heads, num_layers, num_queries, num_frames)
        if min(*counts, patch_size, temporal_patch_size) < 1:
            raise ValueError("Numbers of heads, layers, queries and frames, and sizes of patches, must be at least 1.")
        if any(side % patch_size for side in frame_size(sample_size)):
            raise ValueError(f"sample_size ({sample_size}) must be a multiple of patch_size ({patch_size}).")
        if num_frames % temporal_patch_size:
            raise ValueError(
                f"num_frames ({num_frames}) must be a multiple of temporal_patch_size ({temporal_patch_size})."
            )
        if hidden_size % 4 or hidden_size % num_attention_heads:
            raise ValueError(
                f"hidden_size ({hidden_size}) must be a multiple of 4 and of num_attention_heads "
                f"({num_attention_heads})."
            )
        if query_dim % qformer_heads:
            raise ValueError(f"query_dim ({query_dim}) must be a multiple of qformer_heads ({qformer_heads}).")
        for name, value, known in (
            ("bottleneck", bottleneck, BOTTLENECKS),
            ("structure_pool", structure_pool, STRUCTURE_POOLS),
            ("structure_fold", structure_fold, STRUCTURE_FOLDS),
            ("dynamics_pool", dynamics_pool, DYNAMICS_POOLS),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}.")
        if structure_pool != "qformer" and structure_fold != "batch":
            raise ValueError('structure_fold="hidden" requires structure_pool="qformer".')
        if linear_path and single_latent:
            raise ValueError("linear_path requires both latents: it does not support single_latent.")

        # 1. Latent shapes
        config, grid, frames = self.config, structure_grid(self.config), feature_frames(self.config)
        self.structure_shape: LatentShape = (structure_channels, num_queries, *grid)
        self.dynamics_shape: LatentShape = (dynamics_channels, frames, sum(dynamics_grid(config)))
        if single_latent:
            channels = max(round(self.latent_size / (frames * math.prod(grid))), 1)
            self.structure_shape = (channels, frames, *grid)
            self.dynamics_shape = (0, frames, 0)
            config = FrozenDict({**config, "structure_channels": channels})

        # 2. Modules
        def build_transformer() -> VidTwinTransformer:
            return VidTwinTransformer(
                hidden_size, num_layers, num_attention_heads, frames, feature_grid(config), mlp_ratio, temporal_causal
            )

        structure_encoder, dynamics_encoder, structure_decoder, dynamics_decoder = (
            SINGLE_LATENT_BOTTLENECKS if single_latent else BOTTLENECKS
        )[bottleneck]
        patch = (temporal_patch_size, patch_size, patch_size)
        self.encoder = VidTwinEncoder(in_channels, patch, build_transformer(), hidden_size)
        self.structure_encoder = structure_encoder(config)
        self.dynamics_encoder = dynamics_encoder(config)
        self.structure_decoder = structure_decoder(config)
        self.dynamics_decoder = dynamics_decoder(config)
        # A trained plain bottleneck has the decoder's scale; the residual one is normalized to it.
        self.norm_in = nn.LayerNorm(hidden_size) if bottleneck == "residual" else nn.Identity()
        self.decoder = VidTwinDecoder(in_channels, patch, feature_grid(config), build_transformer(), hidden_size)

        self.gradient_checkpointing = False
        self._reset_parameters()
        self.linear_encoder = LinearEncoder(config) if linear_path else None
        self.linear_decoder = LinearDecoder(config) if linear_path else None
        use_onednn(self)

    def _reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, VidTwinTransformer | QFormer):
                module.reset_parameters()
        # A small gain for the output: at 1 training starts by unlearning a random pattern in every patch.
        output_gain = 0.01 if self.config.linear_path else 0.1
        for linear, gain in ((self.encoder.patch_embed, 1.0), (self.decoder.proj_out, output_gain)):
            nn.init.xavier_uniform_(linear.weight, gain)
            nn.init.zeros_(linear.bias)

    @classmethod
    def from_preset(cls, name: str, latent_setting: int | None = None, **overrides: Any) -> AutoencoderKLVidTwin:
        """Build a newly initialized model of a named size.

        Args:
            name: `small`, `base`, `large` (the paper's Table 4), `released`, or one of the tiny sizes in
                `autoencoder.presets`.
            latent_setting: 1, 2 or 3 of the paper's Table 8; None: the latent of the preset.
            overrides: constructor arguments that replace those of the preset.

        Raises:
            ValueError: if a name is unknown or the sizes do not fit together.
        """
        return cls(**{**preset_config(name, latent_setting), **rename_old_arguments(overrides)})

    @classmethod
    def extract_init_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """Diffusers' method, for configs of older versions too."""
        return super().extract_init_dict(rename_old_arguments(config_dict), **rename_old_arguments(kwargs))

    @classmethod
    def from_single_file(
        cls, pretrained_model_link_or_path_or_dict: str | os.PathLike | Mapping[str, Any], **kwargs: Any
    ) -> AutoencoderKLVidTwin:
        """Load an official VidTwin checkpoint, in evaluation mode. Only tensors are loaded from it.

        Args:
            pretrained_model_link_or_path_or_dict: a `.safetensors` or `.ckpt` file, its address on the Hub
                ("user/repository/file.safetensors", or its URL), or a state dict, which is not changed.
            config: a Diffusers config that gives the sizes: the path of the file or its folder, or a Hub repository;
                of a pipeline, the config of its `vae`. By default sizes are inferred from tensor shapes. With a
                config, the file may also have the layout of this class's state dict.
            subfolder: of `config`; without one, of the Hub repository that holds the file.
            original_config: a dict of official hyperparameters, used like `kwargs` below.
            torch_dtype, dtype: dtype of the weights; None: float32.
            device: device to load onto; None: the CPU. `device_map` may name one device as well.
            low_cpu_mem_usage: skip the initialization of weights; requires accelerate. The default is True where
                accelerate is installed.
            disable_mmap: read a `.safetensors` file into memory instead of mapping it.
            force_download, proxies, token, cache_dir, local_files_only, revision, config_revision: options of
                downloads from the Hub, as in `from_pretrained`; `config_revision` is the revision of `config`.
            kwargs: hyperparameters that cannot be inferred from shapes, by our names or the official ones:
                `num_attention_heads` (default: hidden size / 64), `qformer_heads` (default: 8), `qformer_dropout`,
                `temporal_causal`.

        Raises:
            ValueError: if the file cannot be read safely, its keys do not match the model, or an argument is invalid.
            OSError: if the file does not exist, or the Hub cannot be reached.
        """
        from .single_file import load_single_file

        return load_single_file(cls, pretrained_model_link_or_path_or_dict, **kwargs)

    def fit_linear_path(self, clips: Iterable[torch.Tensor]) -> None:
        """Fit the linear path to batches of clips (B, C, T, H, W) in [-1, 1], in closed form.

        Raises:
            ValueError: if the model has no linear path, or there are no clips.
        """
        if self.linear_encoder is None:
            raise ValueError("This model has no linear path: create it with linear_path=4, for example.")
        fit_linear_path(self.linear_encoder, self.linear_decoder, clips)

    def model_card(self, repo_id: str) -> ModelCard:
        """Render the README.md that `push_to_hub` uploads.

        Args:
            repo_id: "user/name", which the card's example loads.
        """
        return render_card(
            Path(__file__).with_name("autoencoder_card.md.jinja"),
            repo_id,
            tags=["vidtwin", "video-autoencoder"],
            parents=find_parents(model=self),
            parameters=count_parameters(self),
            clip_shape=self.clip_shape,
            structure_shape=self.structure_shape,
            dynamics_shape=self.dynamics_shape,
            compression_rate=self.compression_rate,
        )

    # --- the protocol of video autoencoders ------------------------------------------------------------------------

    @property
    def clip_shape(self) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the clips that the model is built for."""
        c = self.config
        return (c.in_channels, c.num_frames, *frame_size(c.sample_size))

    @property
    def min_size(self) -> int:
        """Smallest height and width of a clip in pixels: one patch."""
        return self.config.patch_size

    @property
    def encoder_modules(self) -> tuple[str, ...]:
        """Names of the modules that `encode` uses."""
        network = ("encoder", "structure_encoder", "dynamics_encoder")
        return network if self.linear_encoder is None else (*network, "linear_encoder")

    @property
    def latents_mean(self) -> list[float] | None:
        """Mean of the latents over a training set, from the config."""
        return self.config.latents_mean

    @property
    def latents_std(self) -> list[float] | None:
        """Standard deviation of the latents over a training set, from the config."""
        return self.config.latents_std

    def set_latent_statistics(self, mean: list[float], std: list[float]) -> None:
        """Set `latents_mean` and `latents_std` in the config."""
        self.register_to_config(latents_mean=mean, latents_std=std)

    def fit_clip_size(self, num_frames: int, height: int, width: int) -> None:
        """Do nothing: the size of a model is fixed."""

    def fit_latent_shape(self, structure_shape: LatentShape) -> None:
        """Do nothing: the size of a model is fixed."""

    @property
    def last_layer(self) -> nn.Linear:
        """The last layer of the decoder."""
        return self.decoder.proj_out

    @property
    def spatial_compression_ratio(self) -> int:
        """Pixels per location of the structure latent, along one side."""
        return self.clip_shape[-1] // self.structure_shape[-1]

    @property
    def temporal_compression_ratio(self) -> int:
        """Frames per position in time of the dynamics latent."""
        return self.config.temporal_patch_size

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        """Clips (B, C, T, H, W) -> packed means and log-variances (B, 2 L)."""
        rows, _ = feature_grid(self.config)
        z = rearrange(self.encoder(x), "b t (h w) d -> b d t h w", h=rows)
        structure = self._checkpoint(self.structure_encoder, z)
        dynamics = self._checkpoint(self.dynamics_encoder, z)
        if self.linear_encoder is not None:
            structure, dynamics = self.linear_encoder(x, structure, dynamics)
        structure_mean, structure_logvar = structure.chunk(2, dim=1)
        dynamics_mean, dynamics_logvar = dynamics.chunk(2, dim=1)
        mean = TwinLatents(structure_mean, dynamics_mean).pack()
        return torch.cat([mean, TwinLatents(structure_logvar, dynamics_logvar).pack()], dim=1)

    def _decode(self, z: TwinLatents, components: Components) -> torch.Tensor:
        features = []
        if components != "dynamics":
            features.append(self._checkpoint(self.structure_decoder, z.structure))
        if components != "structure":
            features.append(self._checkpoint(self.dynamics_decoder, z.dynamics))
        hidden_states = rearrange(sum(features), "b d t h w -> b t (h w) d")
        sample = self.decoder(self.norm_in(hidden_states))
        if self.linear_decoder is not None:
            used = {"structure": (z.structure, None), "dynamics": (None, z.dynamics)}
            sample = sample + self.linear_decoder(*used.get(components, (z.structure, z.dynamics)))
        return sample

    def _checkpoint(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(module, x)
        return module(x)
