"""The diffusion transformer (DiT) over VidTwin's two latents (VidTwin, arXiv 2412.17726)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.hooks import FasterCacheConfig, TaylorSeerCacheConfig
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_utils import ModelMixin
from huggingface_hub import ModelCard
from torch import nn

from autoencoder.attention import ProcessorMixin
from autoencoder.latents import TwinLatents
from autoencoder.model_card import ModelCardMixin, count_parameters, find_parents, render_card
from autoencoder.onednn import use_onednn

from .blocks import VidTwinTransformerBlock, modulate, widen_float16
from .embeddings import (
    CaptionEmbedding,
    IntervalEmbedding,
    PooledCaptionEmbedding,
    StreamEmbedding,
    TwinConditionEmbedding,
    patchify,
    spread_over_rows,
    unpatchify,
)
from .lora import LoraAdapterMixin
from .pipeline_output import VidTwinTransformerOutput
from .presets import preset_config

if TYPE_CHECKING:
    from autoencoder.video_autoencoder import VideoAutoencoder


class VidTwinTransformer3DModel(ModelCardMixin, LoraAdapterMixin, ModelMixin, ConfigMixin, ProcessorMixin, CacheMixin):
    """A diffusion transformer over packed VidTwin latents, with a noise level for each of the two streams.

    Structure is a video (d_S, n_q, h_S, w_S) and dynamics a one-frame video (d_D, T, w_D + h_D); the tokens of both
    form one sequence (VidTwin, arXiv 2412.17726). The scheduler defines the meaning of the output (x0, noise, v,
    flow).

    Args:
        structure_shape: (d_S, n_q, h_S, w_S) of the autoencoder.
        dynamics_shape: (d_D, T, w_D + h_D) of the autoencoder.
        structure_patch_size: over (query, row, column).
        dynamics_patch_size: over (frame, position).
        num_layers: number of blocks.
        num_attention_heads, attention_head_dim: their product is the hidden size D.
        mlp_ratio: width of the feed-forward layer over D.
        num_classes: None for an unconditional model; the id `num_classes` means "no class".
        class_conditioning: "adaln" adds a class vector to that of the timestep (DiT); in "cross_attention" every block
            attends to a class vector of `class_embed_dim` numbers (the paper).
        class_embed_dim: size of that vector.
        class_embed_std: deviation of the class vectors of a new model. From few videos a larger one lets the model
            depend on the class sooner; the vectors of timesteps have about 0.7.
        qk_norm: "rms_norm" per head, or None.
        self_conditioning: whether the previous estimate of the clean latents is an input (Chen et al., arXiv
            2208.04202).
        image_conditioning: whether the structure latent of an image, such as the first frame, can be an input.
        image_residual: above 0, the model generates a video in two stages, as in Emu Video (Girdhar et al., arXiv
            2311.10709): without an image the structure latent of the first frame, and given it the difference of the
            video's structure latent from that of the image, divided by this number, its usual deviation.
        caption_channels: size of a text encoder's token embeddings, to which every block attends; None: no captions.
        caption_pooling: whether the mean of a caption's token embeddings is added to the vector of the timestep too
            (Podell et al., arXiv 2307.01952, Section 2.1).
        interval_conditioning: whether the timestep that a denoising step leads to can be an input, as in a flow map
            (Boffi et al., arXiv 2406.07507), which samples in few steps.
        independent_timesteps: whether training gave the two streams timesteps that differ, as generating one stream
            from the other needs; None: unknown. It changes no weight.
        frame_timesteps: whether training gave the rows of dynamics frames timesteps that differ, as roll-outs with
            history need. It changes no weight.

    Raises:
        ValueError: if a patch does not divide its latent, or an option is unknown.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["VidTwinTransformerBlock"]
    _repeated_blocks = ["VidTwinTransformerBlock"]
    _skip_layerwise_casting_patterns = ["embed", "norm", "^structure_out$", "^dynamics_out$"]

    @register_to_config
    def __init__(
        self,
        structure_shape: tuple[int, int, int, int] = (4, 16, 7, 7),
        dynamics_shape: tuple[int, int, int] = (8, 16, 14),
        structure_patch_size: tuple[int, int, int] = (1, 1, 1),
        dynamics_patch_size: tuple[int, int] = (1, 1),
        num_layers: int = 18,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        mlp_ratio: float = 4.0,
        num_classes: int | None = None,
        class_conditioning: str = "adaln",
        class_embed_dim: int = 256,
        class_embed_std: float = 0.02,
        qk_norm: str | None = "rms_norm",
        self_conditioning: bool = False,
        image_conditioning: bool = False,
        image_residual: float = 0.0,
        caption_channels: int | None = None,
        caption_pooling: bool = False,
        interval_conditioning: bool = False,
        independent_timesteps: bool | None = None,
        frame_timesteps: bool = False,
    ) -> None:
        super().__init__()
        structure_grid = compute_grid("structure", structure_shape, structure_patch_size, "(query, row, column)")
        dynamics_grid = compute_grid("dynamics", dynamics_shape, dynamics_patch_size, "(frame, position)")
        if class_conditioning not in ("adaln", "cross_attention"):
            raise ValueError(f'class_conditioning must be "adaln" or "cross_attention", not {class_conditioning!r}.')
        if qk_norm not in ("rms_norm", None):
            raise ValueError(f'qk_norm must be "rms_norm" or None, not {qk_norm!r}.')
        if image_residual < 0:
            raise ValueError(f"image_residual must be 0 or more, not {image_residual}.")
        if image_residual and not image_conditioning:
            raise ValueError("image_residual requires image_conditioning: the second stage is given the image.")
        if caption_pooling and caption_channels is None:
            raise ValueError("caption_pooling requires caption_channels, the size of the token embeddings.")

        self.structure_shape, self.dynamics_shape = tuple(structure_shape), tuple(dynamics_shape)
        self.latent_size = math.prod(structure_shape) + math.prod(dynamics_shape)
        self.num_tokens = (math.prod(structure_grid), math.prod(dynamics_grid))
        self.num_frame_rows = dynamics_grid[0]  # rows of dynamics patches, each of which can have a timestep
        dim = num_attention_heads * attention_head_dim
        cross_attention = num_classes is not None and class_conditioning == "cross_attention"

        # 1. Tokens
        self.structure_embed = StreamEmbedding(
            self.structure_shape, tuple(structure_patch_size), dim, self_conditioning
        )
        self.dynamics_embed = StreamEmbedding(self.dynamics_shape, tuple(dynamics_patch_size), dim, self_conditioning)

        # 2. Conditions
        patch_dim = math.prod(structure_patch_size) * structure_shape[0]
        self.image_embed = nn.Linear(patch_dim, dim) if image_conditioning else None
        self.condition_embed = TwinConditionEmbedding(dim, None if cross_attention else num_classes)
        self.interval_embed = IntervalEmbedding(dim) if interval_conditioning else None
        self.class_embed = nn.Embedding(num_classes + 1, class_embed_dim) if cross_attention else None
        self.caption_embed = None if caption_channels is None else CaptionEmbedding(caption_channels, dim)
        self.caption_pool = PooledCaptionEmbedding(caption_channels, dim) if caption_pooling else None

        # 3. Blocks
        self.transformer_blocks = nn.ModuleList(
            VidTwinTransformerBlock(
                dim,
                num_attention_heads,
                attention_head_dim,
                mlp_ratio,
                qk_norm,
                class_embed_dim if cross_attention else None,
                has_captions=caption_channels is not None,
            )
            for _ in range(num_layers)
        )

        # 4. Output
        self.norm_out = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.modulation_out = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.structure_out = nn.Linear(dim, math.prod(structure_patch_size) * structure_shape[0])
        self.dynamics_out = nn.Linear(dim, math.prod(dynamics_patch_size) * dynamics_shape[0])

        self.gradient_checkpointing = False
        self.reset_parameters()
        use_onednn(self)

    @classmethod
    def from_preset(
        cls, name: str, vae: VideoAutoencoder | None = None, **overrides: Any
    ) -> VidTwinTransformer3DModel:
        """Build a newly initialized model of a named size (`pipelines/presets.py`).

        Args:
            name: "tiny-test", "tiny", "S", "B", "L", "XL" or "paper".
            vae: the autoencoder that gives the latent shapes.
            overrides: constructor arguments that replace those of the preset.

        Raises:
            ValueError: if the name is unknown or the sizes do not fit together.
        """
        shapes = {}
        if vae is not None:
            shapes = {"structure_shape": tuple(vae.structure_shape), "dynamics_shape": tuple(vae.dynamics_shape)}
        return cls(**{**preset_config(name), **shapes, **overrides})

    def model_card(self, repo_id: str) -> ModelCard:
        """Render the README.md that `push_to_hub` uploads.

        Args:
            repo_id: "user/name", which the card's example loads.
        """
        tags = ["vidtwin", "video-generation", *self.conditioning_tags()]
        facts = {**self.card_facts(), "labels": {}, "subclasses": {}, "compression_rate": None}
        template = Path(__file__).with_name("transformer_card.md.jinja")
        return render_card(template, repo_id, tags, find_parents(model=self), **facts)

    def conditioning_tags(self) -> list[str]:
        """Return the tags of a model card for what the transformer is conditioned on."""
        tags = ["class-conditional"] if self.config.num_classes is not None else []
        tags += ["text-to-video"] if self.config.caption_channels is not None else []
        return tags or ["unconditional"]

    def card_facts(self) -> dict[str, Any]:
        """Return the facts that a model card states of the transformer."""
        return {
            "num_layers": self.config.num_layers,
            "num_tokens": self.num_tokens,
            "num_classes": self.config.num_classes,
            "caption_channels": self.config.caption_channels,
            "parameters": count_parameters(self),
            "structure_shape": self.structure_shape,
            "dynamics_shape": self.dynamics_shape,
        }

    def reset_parameters(self) -> None:
        """Initialize as in DiT: every block starts as the identity, and the output is zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.class_embed_std)
        time_embedder = self.condition_embed.time_embedder
        for weight in (time_embedder.linear_1.weight, time_embedder.linear_2.weight):
            nn.init.normal_(weight, std=0.02)
        for embed in (self.structure_embed, self.dynamics_embed):
            nn.init.normal_(embed.proj.bias, std=0.02)
        zeros = [self.modulation_out[1], self.structure_out, self.dynamics_out]
        if self.image_embed is not None:
            zeros.append(self.image_embed)
        if self.interval_embed is not None:
            zeros.append(self.interval_embed.proj[-1])
        if self.caption_pool is not None:
            zeros.append(self.caption_pool.proj[-1])
        for block in self.transformer_blocks:
            zeros.append(block.modulation[1])
            zeros += [attention.to_out for attention in (block.attn2, block.attn3) if attention is not None]
        for layer in zeros:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def enable_cache(self, config: Any) -> None:
        """Reuse activations between denoising steps with one of Diffusers' caches.

        FasterCache also approximates the unconditional half of a batch from the frequencies of images. Packed latents
        are not images, so only its reuse of attention is enabled.

        Args:
            config: any config that `CacheMixin` supports.

        Raises:
            ValueError: if a cache is enabled already, or the config has TaylorSeer's lite mode.
        """
        if isinstance(config, FasterCacheConfig):
            config = dataclasses.replace(config, is_guidance_distilled=True)
        elif isinstance(config, TaylorSeerCacheConfig):
            if config.use_lite_mode:
                raise ValueError("TaylorSeer's lite mode requires one output layer; this model has one per stream.")
            if config.cache_identifiers is None:  # Diffusers' default would match nothing here
                config = dataclasses.replace(config, cache_identifiers=[r"transformer_blocks\.\d+\.attn\d"])
        super().enable_cache(config)

    def check_cache_can_restart(self) -> None:
        """Raise a `ValueError` if the enabled cache cannot restart in the middle of a call.

        Caches hold activations of one batch size, so they restart empty where guidance begins or ends. MagCache and
        the last steps of TaylorSeer depend on the number of the step in a call, and FasterCache can only start outside
        the timesteps in which it skips.
        """
        config = self._cache_config
        name = type(config).__name__
        numbered = getattr(config, "disable_cache_after_step", None) is not None
        if numbered or name in ("MagCacheConfig", "FasterCacheConfig"):
            cache = f"{name} with disable_cache_after_step" if numbered else name
            raise ValueError(
                f"{cache} cannot restart where guidance begins or ends: guide all steps or none, or use another cache."
            )

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        self_condition: torch.Tensor | None = None,
        return_dict: bool = True,
        modulations: Sequence[torch.Tensor] | None = None,
        image_latents: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        target_timestep: torch.Tensor | None = None,
        hidden_layers: Sequence[int] = (),
    ) -> VidTwinTransformerOutput | tuple[torch.Tensor, ...]:
        """Predict from noisy latents.

        Args:
            hidden_states: packed noisy latents (B, L), normalized per stream.
            timestep: (B,), or (B, 2) with one for structure and one for dynamics, or (B, 1 + R) with one for structure
                and one for each of the `num_frame_rows` R of dynamics frames (Diffusion Forcing, arXiv 2407.01392); a
                row has the frames of a patch. Whole numbers or floats.
            class_labels: (B,) long; the id `num_classes` means "no class". None only for an unconditional model.
            self_condition: the previous estimate of the clean latents (B, L); None: zeros.
            return_dict: whether to return a `VidTwinTransformerOutput` or a tuple.
            modulations: the precomputed `self.modulations(timestep, class_labels, target_timestep)`; None: computed
                here.
            image_latents: packed structure latents of an image (B, L_S), normalized; None: without an image.
            image_mask: (B,) bool, which clips have an image; None: all, if there are `image_latents`.
            encoder_hidden_states: token embeddings of the captions (B, N, caption_channels); None: no captions.
            encoder_attention_mask: bool, tokens of the caption (B, N), or (B, 2, N) with those that structure and
                those that dynamics attends to; a clip or stream without any has no caption. None: all tokens.
            target_timestep: the timestep that the denoising step leads to, in the shapes of `timestep`, for a model
                with interval conditioning; None: `timestep` itself, for which the prediction is that of any other
                model.
            hidden_layers: numbers of blocks, from 1, whose output tokens are returned too.

        Returns:
            A `VidTwinTransformerOutput` whose `sample` is packed (B, L) and whose `hidden_states` are (B, S, D) for
            each of `hidden_layers`, in the order of the blocks; or a tuple with what it holds.

        Raises:
            ValueError: if a shape is wrong, labels, an estimate, an image or a target timestep are passed or missing
                against the config, or there is no such block.
        """
        batch = hidden_states.shape[0]
        self._check_timesteps(batch, timestep, target_timestep)
        if any(not 1 <= layer <= len(self.transformer_blocks) for layer in hidden_layers):
            raise ValueError(f"hidden_layers must be 1 to {len(self.transformer_blocks)}, not {tuple(hidden_layers)}.")
        self._check_labels(class_labels)
        latents = [TwinLatents.unpack(hidden_states, self.structure_shape, self.dynamics_shape)]
        if self.config.self_conditioning:
            estimate = torch.zeros_like(hidden_states) if self_condition is None else self_condition
            latents.append(TwinLatents.unpack(estimate, self.structure_shape, self.dynamics_shape))
        elif self_condition is not None:
            raise ValueError("This model has no self_conditioning: leave self_condition out.")

        # 1. Tokens and conditions
        structure = self.structure_embed(*(latent.structure for latent in latents))
        if image_latents is not None:
            structure = structure + self._embed_image(image_latents, image_mask)
        dynamics = self.dynamics_embed(*(latent.dynamics for latent in latents))
        x = torch.cat([structure, dynamics], dim=1)
        class_embedding = None if self.class_embed is None else self.class_embed(class_labels)[:, None]
        captions = self._embed_captions(batch, encoder_hidden_states, encoder_attention_mask)
        conditioning = None
        if modulations is None:
            conditioning = self._condition(timestep, class_labels, target_timestep, hidden_states.dtype)
            if self.caption_pool is not None and encoder_hidden_states is not None:
                pooled = self.caption_pool(encoder_hidden_states, encoder_attention_mask)
                conditioning = conditioning + spread_over_rows(pooled, conditioning.shape[1])
        *block_modulations, output_modulation = modulations or [None] * (len(self.transformer_blocks) + 1)

        # 2. Blocks
        hidden = []
        for layer, (block, modulation) in enumerate(zip(self.transformer_blocks, block_modulations, strict=True), 1):
            conditions = (conditioning, self.num_tokens, class_embedding, modulation, captions)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, *conditions)
            else:
                x = block(x, *conditions)
            if layer in hidden_layers:
                hidden.append(x)

        # 3. Output
        modulation = self.modulation_out(conditioning) if output_modulation is None else output_modulation
        modulation, dtype = widen_float16(modulation)
        shift, scale = modulation.chunk(2, dim=-1)
        x = modulate(self.norm_out(x), self.num_tokens, 1 + scale, shift, dtype)
        structure, dynamics = x.split(self.num_tokens, dim=1)
        sample = TwinLatents(
            unpatchify(self.structure_out(structure), self.structure_embed.patch_size, self.structure_shape),
            unpatchify(self.dynamics_out(dynamics), self.dynamics_embed.patch_size, self.dynamics_shape),
        ).pack()
        output = VidTwinTransformerOutput(sample=sample, hidden_states=tuple(hidden) or None)
        return output if return_dict else output.to_tuple()

    def modulations(
        self,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        target_timestep: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """Compute the modulations of every block and of the output, an argument of `forward`.

        They depend only on timesteps and classes, which a sampler knows in advance for all steps, and use a third of
        the weights: computed for all steps at once, these weights are read once.

        Args:
            timestep, class_labels, target_timestep: as in `forward`.

        Returns:
            (B, 2, 6 D) for each block, and (B, 2, 2 D) for the output; with a timestep per row 1 + R instead of 2.

        Raises:
            ValueError: with `caption_pooling`, where they depend on captions too.
        """
        if self.caption_pool is not None:
            raise ValueError("The modulations of a model with caption_pooling depend on captions: leave them out.")
        self._check_labels(class_labels)
        conditioning = self._condition(timestep, class_labels, target_timestep, self.dtype)
        layers = [*(block.modulation for block in self.transformer_blocks), self.modulation_out]
        return [layer(conditioning) for layer in layers]

    def _condition(
        self,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None,
        target_timestep: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        if timestep.ndim == 1:
            timestep = timestep[:, None].expand(-1, 2)
        conditioning = self.condition_embed(timestep, class_labels, dtype)
        if self.interval_embed is not None:
            target_timestep = timestep if target_timestep is None else target_timestep
            if target_timestep.ndim == 1:
                target_timestep = target_timestep[:, None].expand(-1, timestep.shape[1])
            conditioning = conditioning + self.interval_embed(timestep - target_timestep, dtype)
        elif target_timestep is not None:
            raise ValueError("This model has no interval_conditioning: leave target_timestep out.")
        return conditioning

    def _embed_image(self, image_latents: torch.Tensor, image_mask: torch.Tensor | None) -> torch.Tensor:
        """Packed structure latents (B, L_S) of images, for some of the clips -> (B, structure tokens, D)."""
        if self.image_embed is None:
            raise ValueError("This model has no image_conditioning: leave image_latents out.")
        if image_latents.shape[1:] != (math.prod(self.structure_shape),):
            expected = f"(B, {math.prod(self.structure_shape)})"
            raise ValueError(f"image_latents must be {expected}, but have shape {tuple(image_latents.shape)}.")
        latents = image_latents.unflatten(1, self.structure_shape)
        tokens = self.image_embed(patchify(latents, self.structure_embed.patch_size))
        return tokens if image_mask is None else tokens * image_mask[:, None, None]

    def _embed_captions(
        self, batch: int, embeddings: torch.Tensor | None, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        if self.caption_embed is None:
            if embeddings is not None:
                raise ValueError("This model takes no captions: leave encoder_hidden_states out.")
            return None
        if embeddings is not None:
            channels = self.config.caption_channels
            if embeddings.ndim != 3 or embeddings.shape[::2] != (batch, channels):
                expected = f"({batch}, N, {channels})"
                raise ValueError(f"encoder_hidden_states must be {expected}, not {tuple(embeddings.shape)}.")
            length = embeddings.shape[1]
            if mask is not None and mask.shape not in ((batch, length), (batch, 2, length)):
                expected = f"({batch}, {length}) or ({batch}, 2, {length})"
                raise ValueError(f"encoder_attention_mask must be {expected}, not {tuple(mask.shape)}.")
        return self.caption_embed(batch, self.num_tokens, embeddings, mask)

    def _check_timesteps(self, batch: int, timestep: torch.Tensor, target_timestep: torch.Tensor | None) -> None:
        shapes = [(batch,), (batch, 2)]
        if self.num_frame_rows > 1:
            shapes.append((batch, 1 + self.num_frame_rows))
        for name, value in {"timestep": timestep, "target_timestep": target_timestep}.items():
            if value is not None and value.shape not in shapes:
                expected = " or ".join(map(str, shapes))
                raise ValueError(f"{name} must be {expected}, but has shape {tuple(value.shape)}.")
        expected = (batch, 2) if timestep.ndim == 1 else tuple(timestep.shape)
        if target_timestep is not None and target_timestep.shape not in ((batch,), expected):
            raise ValueError(
                f"target_timestep must be ({batch},) or {expected} for this timestep, but has shape "
                f"{tuple(target_timestep.shape)}."
            )

    def _check_labels(self, class_labels: torch.Tensor | None) -> None:
        if (class_labels is None) != (self.config.num_classes is None):
            raise ValueError(
                "This model is unconditional: leave class_labels out."
                if self.config.num_classes is None
                else f"This model requires class_labels (B,), {self.config.num_classes} for no class."
            )


def compute_grid(stream: str, shape: tuple[int, ...], patch_size: tuple[int, ...], axes: str) -> tuple[int, ...]:
    sizes = tuple(shape[1:])
    if len(sizes) != len(patch_size) or any(size % patch for size, patch in zip(sizes, patch_size, strict=True)):
        raise ValueError(
            f"{stream}_patch_size {tuple(patch_size)} must divide the {stream} latent's {axes} sizes {sizes}."
        )
    return tuple(size // patch for size, patch in zip(sizes, patch_size, strict=True))
