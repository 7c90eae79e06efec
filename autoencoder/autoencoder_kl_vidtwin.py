"""VidTwin, a video autoencoder with a structure and a dynamics latent, as a Diffusers model.

Source: "VidTwin: Video VAE with Decoupled Structure and Dynamics" (arXiv 2412.17726), Sections 3.1 to 3.3.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.loaders import FromOriginalModelMixin
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
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
    dynamics_grid,
    structure_grid,
)
from .latents import LatentShape, TwinLatents, TwinPosterior, numel
from .model_card import ModelCardMixin, count_parameters, find_parents, render_card
from .presets import preset_config, rename_old_arguments
from .qformer import QFormer
from .tiling import Blender, ClipGeometry, check_stride, cut

Components = Literal["both", "structure", "dynamics"]


class VidTwinEncoder(nn.Module):
    """Clips (B, C, T, H, W) -> features (B, T, h * w, D)."""

    def __init__(self, in_channels: int, patch_size: int, transformer: VidTwinTransformer, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        # A convolution whose stride equals its kernel size is one matrix product.
        self.patch_embed = nn.Linear(in_channels * patch_size**2, dim)
        self.transformer = transformer

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        p = self.patch_size
        patches = rearrange(sample, "b c t (h p) (w q) -> b t (h w) (c p q)", p=p, q=p)
        return self.transformer(self.patch_embed(patches))


class VidTwinDecoder(nn.Module):
    """Features (B, T, h * w, D) -> clips (B, C, T, H, W)."""

    def __init__(self, out_channels: int, patch_size: int, transformer: VidTwinTransformer, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.transformer = transformer
        self.norm_out = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.proj_out = nn.Linear(dim, out_channels * patch_size**2)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        p, grid = self.patch_size, round(hidden_states.shape[2] ** 0.5)
        shift, scale = self.scale_shift_table
        hidden_states = self.norm_out(self.transformer(hidden_states)) * (1 + scale) + shift
        return rearrange(self.proj_out(hidden_states), "b t (h w) (p q c) -> b c t (h p) (w q)", h=grid, p=p, q=p)

    def patchify(self, sample: torch.Tensor) -> torch.Tensor:
        """The inverse of the last step of `forward`: (B, C, T, H, W) -> (B, T, h * w, p * p * C)."""
        p = self.patch_size
        return rearrange(sample, "b c t (h p) (w q) -> b t (h w) (p q c)", p=p, q=p)


class AutoencoderKLVidTwin(
    ModelCardMixin, ModelMixin, AutoencoderMixin, ProcessorMixin, ConfigMixin, FromOriginalModelMixin
):
    r"""The VidTwin video autoencoder.

    It encodes a clip (B, 3, T, H, W) in [-1, 1] to a Gaussian over two latents, packed as (B, L): *structure*
    (d_S, n_q, h_S, w_S), pooled over time by a Q-Former at every location, and *dynamics* (d_D, T, w_D + h_D), the
    averages of every frame over its height and over its width.

    The grid of a model is fixed. Clips of any other size, down to one frame and one patch, are cut into overlapping
    tiles of the model's size, and the decoded tiles are blended; see `enable_tiling`.

    Args:
        sample_size: height and width of a clip in pixels, a multiple of `patch_size`.
        num_frames: frames T of a clip.
        in_channels: color channels.
        patch_size: side of a patch in pixels.
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
        latents_mean, latents_std: mean and standard deviation of the [structure, dynamics] latents over a training
            set. Trainers and pipelines apply them; `encode` and `decode` never do.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["VidTwinFirstBlock", "VidTwinBlock", "QFormerLayer"]
    _repeated_blocks = ["VidTwinFirstBlock", "VidTwinBlock"]
    _skip_layerwise_casting_patterns = ["patch_embed", "norm", r"decoder\.proj_out$"]
    _encoder_modules = ["encoder", "structure_encoder", "dynamics_encoder"]  # those that `encode` uses
    # Each of these is offloaded separately, since pipelines call `decode` and not `forward`.
    _group_offload_block_modules = [
        "encoder",
        "structure_encoder",
        "dynamics_encoder",
        "structure_decoder",
        "dynamics_decoder",
        "norm_in",
        "decoder",
    ]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 224,
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
    ) -> None:
        super().__init__()
        if sample_size % patch_size:
            raise ValueError(f"sample_size ({sample_size}) must be a multiple of patch_size ({patch_size}).")
        if min(num_attention_heads, qformer_heads, num_layers, num_queries, num_frames, patch_size) < 1:
            raise ValueError("Numbers of heads, layers, queries and frames, and patch_size, must be at least 1.")
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

        # 1. Latent shapes
        config, grid = self.config, structure_grid(self.config)
        self.structure_shape: LatentShape = (structure_channels, num_queries, grid, grid)
        self.dynamics_shape: LatentShape = (dynamics_channels, num_frames, 2 * dynamics_grid(config))
        if single_latent:
            channels = max(round(self.latent_size / (num_frames * grid**2)), 1)
            self.structure_shape = (channels, num_frames, grid, grid)
            self.dynamics_shape = (0, num_frames, 0)
            config = FrozenDict({**config, "structure_channels": channels})

        # 2. Modules
        def build_transformer() -> VidTwinTransformer:
            grid_size = sample_size // patch_size
            return VidTwinTransformer(
                hidden_size, num_layers, num_attention_heads, num_frames, grid_size, mlp_ratio, temporal_causal
            )

        structure_encoder, dynamics_encoder, structure_decoder, dynamics_decoder = (
            SINGLE_LATENT_BOTTLENECKS if single_latent else BOTTLENECKS
        )[bottleneck]
        self.encoder = VidTwinEncoder(in_channels, patch_size, build_transformer(), hidden_size)
        self.structure_encoder = structure_encoder(config)
        self.dynamics_encoder = dynamics_encoder(config)
        self.structure_decoder = structure_decoder(config)
        self.dynamics_decoder = dynamics_decoder(config)
        # A trained plain bottleneck has the decoder's scale; the residual one is normalized to it.
        self.norm_in = nn.LayerNorm(hidden_size) if bottleneck == "residual" else nn.Identity()
        self.decoder = VidTwinDecoder(in_channels, patch_size, build_transformer(), hidden_size)

        self.use_slicing = False
        self.enable_tiling()
        self.gradient_checkpointing = False
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, VidTwinTransformer | QFormer):
                module.reset_parameters()
        # A small gain for the output: at 1 training starts by unlearning a random pattern in every patch.
        for linear, gain in ((self.encoder.patch_embed, 1.0), (self.decoder.proj_out, 0.1)):
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

    # --- sizes -----------------------------------------------------------------------------------------------------

    @property
    def latent_size(self) -> int:
        """Number L of values in a packed latent."""
        return numel(self.structure_shape) + numel(self.dynamics_shape)

    @property
    def clip_shape(self) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the clips that the model is built for."""
        c = self.config
        return (c.in_channels, c.num_frames, c.sample_size, c.sample_size)

    @property
    def compression_rate(self) -> float:
        """Values in the latent over values in the clip; 0.002046 for the paper's default."""
        return self.latent_size / numel(self.clip_shape)

    @property
    def spatial_compression_ratio(self) -> int:
        """Pixels per location of the structure latent, along one side."""
        return self.config.sample_size // self.structure_shape[-1]

    @property
    def temporal_compression_ratio(self) -> int:
        """Frames per frame of the dynamics latent, which does not compress time."""
        return 1

    def unpack(self, packed: torch.Tensor, geometry: ClipGeometry | None = None) -> TwinLatents:
        """Unpack latents (B, L) into `TwinLatents` of this model's shapes; (B, N * L) with a geometry of N tiles."""
        return TwinLatents.unpack(packed, self.structure_shape, self.dynamics_shape, geometry)

    # --- clips of other sizes --------------------------------------------------------------------------------------

    def enable_tiling(
        self,
        tile_sample_min_height: int | bool | None = None,
        tile_sample_min_width: int | None = None,
        tile_sample_min_num_frames: int | None = None,
        tile_sample_stride_height: int | None = None,
        tile_sample_stride_width: int | None = None,
        tile_sample_stride_num_frames: int | None = None,
        *,
        use_tiling: bool = True,
    ) -> None:
        """Accept clips of any size by cutting them into tiles of the model's size; the default.

        The parameters are those of Diffusers' video autoencoders.

        Args:
            tile_sample_min_height, tile_sample_min_width, tile_sample_min_num_frames: the size of a tile, which can
                only be the size of the model.
            tile_sample_stride_height, tile_sample_stride_width: pixels from one tile to the next; the overlap is
                blended. None: unchanged, initially three quarters of `sample_size`.
            tile_sample_stride_num_frames: frames from one window to the next. None: unchanged, initially three
                quarters of `num_frames`.
            use_tiling: False disables tiling, as `disable_tiling` does; also accepted as the first argument, as in
                older autoencoders.

        Raises:
            ValueError: if a stride is not a whole number between 1 and the size of a tile, or the size of a tile is
                not that of the model.
        """
        if isinstance(tile_sample_min_height, bool):
            tile_sample_min_height, use_tiling = None, tile_sample_min_height
        if not isinstance(use_tiling, bool):
            raise ValueError(f"use_tiling must be True or False, not {use_tiling!r}.")
        tile = self.clip_shape[1:]
        strides = list(getattr(self, "_tile_strides", [max(3 * size // 4, 1) for size in tile]))
        for axis, (name, size, requested_size, stride) in enumerate(
            [
                ("num_frames", tile[0], tile_sample_min_num_frames, tile_sample_stride_num_frames),
                ("height", tile[1], tile_sample_min_height, tile_sample_stride_height),
                ("width", tile[2], tile_sample_min_width, tile_sample_stride_width),
            ]
        ):
            if requested_size is not None and (isinstance(requested_size, bool) or requested_size != size):
                raise ValueError(
                    f"tile_sample_min_{name} can only be {size}, the size of the model, not {requested_size!r}. "
                    f"tile_sample_stride_{name} sets how much tiles overlap."
                )
            if stride is not None:
                strides[axis] = check_stride(f"tile_sample_stride_{name}", stride, size)
        self._tile_strides = tuple(strides)
        self.use_tiling = use_tiling

    def geometry(self, num_frames: int, height: int, width: int) -> ClipGeometry | None:
        """Return the tiles that cover a clip of this size; None for the size of the model.

        Raises:
            ValueError: if the clip has no frame, is smaller than a patch, or has another size while tiling is off.
        """
        size, tile = (num_frames, height, width), self.clip_shape[1:]
        if size == tile:
            return None
        if num_frames < 1 or min(height, width) < self.config.patch_size:
            raise ValueError(
                f"A clip must have one frame and {self.config.patch_size} x {self.config.patch_size} pixels or more, "
                f"but (T, H, W) = {size}."
            )
        if not self.use_tiling:
            raise ValueError(f"Without tiling, clips must be (T, H, W) = {tile}, not {size}: call enable_tiling().")
        return ClipGeometry(size, tile, self._tile_strides)

    # --- encode, decode --------------------------------------------------------------------------------------------

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        """Clips (B, C, T, H, W) -> packed means and log-variances (B, 2 L)."""
        grid = self.config.sample_size // self.config.patch_size
        z = rearrange(self.encoder(x), "b t (h w) d -> b d t h w", h=grid)
        structure_mean, structure_logvar = self._checkpoint(self.structure_encoder, z).chunk(2, dim=1)
        dynamics_mean, dynamics_logvar = self._checkpoint(self.dynamics_encoder, z).chunk(2, dim=1)
        mean = TwinLatents(structure_mean, dynamics_mean).pack()
        return torch.cat([mean, TwinLatents(structure_logvar, dynamics_logvar).pack()], dim=1)

    def _decode(self, z: TwinLatents, components: Components) -> torch.Tensor:
        features = []
        if components != "dynamics":
            features.append(self._checkpoint(self.structure_decoder, z.structure))
        if components != "structure":
            features.append(self._checkpoint(self.dynamics_decoder, z.dynamics))
        hidden_states = rearrange(sum(features), "b d t h w -> b t (h w) d")
        return self.decoder(self.norm_in(hidden_states))

    def _checkpoint(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(module, x)
        return module(x)

    @apply_forward_hook
    def encode(self, x: torch.Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[TwinPosterior]:
        """Encode clips to the posterior over their packed latents.

        Args:
            x: clips (B, C, T, H, W) in [-1, 1].
            return_dict: whether to return an `AutoencoderKLOutput` or a tuple.

        Raises:
            ValueError: if the size or the number of channels is not supported.
        """
        if x.ndim != 5 or x.shape[0] == 0 or x.shape[1] != self.config.in_channels:
            raise ValueError(
                f"Clips must be (B, C, T, H, W) = (B, {', '.join(map(str, self.clip_shape))}), or of other T, H and W "
                f"with tiling, but have shape {tuple(x.shape)}."
            )
        geometry = self.geometry(*x.shape[2:])
        if geometry is None:
            mean, logvar = self._encode_sliced(x).chunk(2, dim=1)
            posterior = TwinPosterior(mean, logvar)
        else:
            moments = [self._encode_sliced(tile) for tile in cut(x, geometry)]
            mean, logvar = torch.stack(moments, dim=1).chunk(2, dim=2)
            layout = (self.structure_shape, self.dynamics_shape, geometry)
            posterior = TwinPosterior(mean.flatten(1), logvar.flatten(1), layout)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def _encode_sliced(self, x: torch.Tensor) -> torch.Tensor:
        if self.use_slicing and x.shape[0] > 1:
            return torch.cat([self._encode(part) for part in x.split(1)])
        return self._encode(x)

    @apply_forward_hook
    def decode(
        self, z: torch.Tensor | TwinLatents, components: Components = "both", return_dict: bool = True
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Decode latents to clips (B, C, T, H, W), about [-1, 1], not clamped.

        Args:
            z: packed latents (B, L) or `TwinLatents`; for tiled clips, `TwinLatents` with their geometry.
            components: `"both"`, or `"structure"` or `"dynamics"` to decode only one of the two latents.
            return_dict: whether to return a `DecoderOutput` or a tuple.

        Raises:
            ValueError: if the latents have another size or `components` is unknown.
        """
        if components not in ("both", "structure", "dynamics"):
            raise ValueError(f'components must be "both", "structure" or "dynamics", not {components!r}.')
        # Packing and unpacking checks the shapes of both forms.
        geometry = z.geometry if isinstance(z, TwinLatents) else None
        latents = self.unpack(z.pack() if isinstance(z, TwinLatents) else z, geometry)
        if geometry is None:
            sample = self._decode_sliced(latents, components)
        else:
            if geometry.tile != self.clip_shape[1:]:
                raise ValueError(
                    f"The latents are of tiles (T, H, W) = {geometry.tile}, but this model has tiles "
                    f"{self.clip_shape[1:]}."
                )
            blender = Blender(geometry)
            for tile in latents.tiles():
                blender.add(self._decode_sliced(tile, components))
            sample = blender.clip()
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def _decode_sliced(self, z: TwinLatents, components: Components) -> torch.Tensor:
        if self.use_slicing and z.structure.shape[0] > 1:
            return torch.cat([self._decode(self.unpack(part), components) for part in z.pack().split(1)])
        return self._decode(z, components)

    def forward(
        self,
        sample: torch.Tensor,
        sample_posterior: bool = False,
        components: Components = "both",
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Encode and decode clips (B, C, T, H, W); the latent is the mean, or a sample if `sample_posterior`."""
        posterior = self.encode(sample).latent_dist
        z = posterior.sample(generator=generator) if sample_posterior else posterior.mode()
        return self.decode(z, components=components, return_dict=return_dict)
