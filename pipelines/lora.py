"""LoRA adapters with Diffusers' loaders, which ignore unknown names; here every name is checked first.

`LoraAdapterMixin` is for the transformer, `LoraPipelineMixin` for the pipeline. All methods require peft.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import CogVideoXLoraLoaderMixin, PeftAdapterMixin
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import is_peft_available
from huggingface_hub import ModelCard
from torch import nn

from autoencoder.model_card import PARENT, render_card

from .lora_files import FETCH_OPTIONS, StateDict, read_lora
from .lora_names import adapted_layers, remove_prefix, resolve_config, resolve_metadata, resolve_state, split_key

logger = logging.getLogger(__name__)


def requires_peft(method: Callable) -> Callable:
    """Make a method raise an `ImportError` if peft is not installed."""

    @functools.wraps(method)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if not is_peft_available():
            raise ImportError("LoRA needs the package peft: pip install peft.")
        return method(*args, **kwargs)

    return checked


def refuse_pickle(safe_serialization: bool = True) -> None:
    if not safe_serialization:
        raise ValueError("A LoRA is saved as safetensors only: leave out safe_serialization=False.")


def lora_card(model: ModelMixin, repo_id: str, adapter_name: str = "default") -> ModelCard:
    """Render the README.md of an adapter, which names the pipeline that it was trained for.

    Args:
        model: the transformer with the adapter and, in its config, its parent.
        repo_id: "user/name" or a folder, which the card's example loads.
        adapter_name: of the adapter.
    """
    config = model.peft_config[adapter_name]
    return render_card(
        Path(__file__).with_name("lora_card.md.jinja"),
        repo_id,
        tags=["vidtwin", "video-generation", "lora"],
        parent=model.config[PARENT],
        rank=config.r,
        alpha=f"{config.lora_alpha:g}",
        targets=sorted(config.target_modules),
        parameters=f"{model.num_parameters(only_trainable=True):,}",
    )


class LoraAdapterMixin(PeftAdapterMixin):
    """Diffusers' adapters of a model; every name must match a layer, and every adapter has an effect.

    Layers that `fuse_qkv_projections` bypasses are separated again if an adapter is added to them.
    """

    @requires_peft
    def add_adapter(self, adapter_config: Any, adapter_name: str = "default") -> None:
        """Add a new adapter for training.

        Args:
            adapter_config: a `peft.LoraConfig` or another config of peft. `to_out.0`, the name in other Diffusers
                models, means `to_out`.
            adapter_name: its name.

        Raises:
            ValueError: if a target matches no layer (the message has similar names), or the name is in use.
        """
        if hasattr(adapter_config, "target_modules"):
            adapter_config, layers = resolve_config(self, adapter_config)
            self._separate_projections(layers)
        try:
            super().add_adapter(adapter_config, adapter_name)
        except Exception:
            self._hf_peft_config_loaded = hasattr(self, "peft_config")  # otherwise no other adapter could be added
            raise

    @requires_peft
    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | Mapping[str, torch.Tensor],
        prefix: str | None = "transformer",
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """Load a LoRA from a file, a folder, a Hub repository or a state dict; only safetensors are read.

        Args:
            pretrained_model_name_or_path_or_dict: as written by `save_lora_adapter` or a pipeline's
                `save_lora_weights`.
            prefix: of the names of this model's layers; names without it are accepted as well.
            hotswap: replace the weights of the adapter `adapter_name`.
            kwargs: further arguments of Diffusers' method, such as `adapter_name`, `weight_name` and `token`.

        Raises:
            ValueError: if a layer does not exist or has another shape, or the file is no safetensors file with a LoRA.
            OSError: if the file does not exist.
        """
        options = {name: kwargs.pop(name) for name in FETCH_OPTIONS if name in kwargs}
        state, metadata = read_lora(pretrained_model_name_or_path_or_dict, **options)
        if kwargs.get("metadata") is not None:
            metadata = kwargs["metadata"]
        state, metadata = remove_prefix(state, prefix), remove_prefix(metadata, prefix)
        state, metadata = resolve_state(self, state, metadata), resolve_metadata(self, metadata)
        self._separate_projections({split_key(key)[0] for key in state})
        if prefix is not None:
            state, metadata = ({f"{prefix}.{k}": v for k, v in x.items()} for x in (state, metadata))
        super().load_lora_adapter(state, prefix=prefix, hotswap=hotswap, **{**kwargs, "metadata": metadata or None})

    @requires_peft
    def save_lora_adapter(
        self, save_directory: str | os.PathLike, adapter_name: str = "default", *args: Any, **kwargs: Any
    ) -> None:
        """Save an adapter with Diffusers' method, as safetensors only."""
        refuse_pickle(*args[1:2], **{k: v for k, v in kwargs.items() if k == "safe_serialization"})
        super().save_lora_adapter(save_directory, adapter_name, *args, **kwargs)

    @functools.wraps(ModelMixin.save_pretrained, assigned=())  # pipelines read its signature
    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save the model with Diffusers' method; a `ValueError` if it has adapters, whose layers have other names."""
        for name in adapted_layers(self):
            raise ValueError(
                f"save_pretrained cannot save the adapter on {name}: save it with save_lora_adapter and remove it "
                "with unload_lora, or merge it into the weights with fuse_lora and unload_lora."
            )
        super().save_pretrained(save_directory, *args, **kwargs)

    @requires_peft
    def set_adapters(self, adapter_names: list[str] | str, weights: Any = None) -> None:
        """Activate adapters with Diffusers' method; a `ValueError` for an unknown name or after `fuse_lora`."""
        self._check_adapters(adapter_names, "set_adapters")
        super().set_adapters(adapter_names, weights)

    @requires_peft
    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """Remove adapters with Diffusers' method; a `ValueError` for an unknown name or after `fuse_lora`."""
        self._check_adapters(adapter_names, "delete_adapters")
        super().delete_adapters(adapter_names)

    @requires_peft
    def fuse_lora(
        self, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: list[str] | None = None
    ) -> None:
        """Merge adapters into the weights, so that they cost nothing when sampling.

        Unlike in Diffusers, `lora_scale` applies only to this fusion, and also to adapters that are not active.

        Args:
            lora_scale: of the adapters, in addition to the weights of `set_adapters`.
            safe_fusing: raise an error, and change nothing, if the result is not finite.
            adapter_names: of the adapters; None: the active adapters.

        Raises:
            ValueError: for an unknown name, or a scale that is not finite.
        """
        if isinstance(lora_scale, bool) or not math.isfinite(lora_scale):
            raise ValueError(f"lora_scale must be a finite number, not {lora_scale!r}.")
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self._check_adapters(names or [])
        for layer in adapted_layers(self).values():
            for name in layer.active_adapters if names is None else names:
                if name in layer.scaling and name not in layer.merged_adapters:
                    self._original_scalings.append((layer, name, layer.scaling[name]))
                    layer.scaling[name] *= lora_scale
        super().fuse_lora(1.0, safe_fusing, names)

    @requires_peft
    def unfuse_lora(self) -> None:
        """Subtract merged adapters from the weights, up to rounding."""
        super().unfuse_lora()
        self._restore_scalings()

    @requires_peft
    def unload_lora(self) -> None:
        """Remove all adapters; adapters merged by `fuse_lora` stay in the weights."""
        super().unload_lora()
        self._original_scalings.clear()

    def fuse_qkv_projections(self) -> None:
        """Fuse projections with Diffusers' method; a `ValueError` if they have an adapter."""
        for name in [name for name in adapted_layers(self) if name in self._projections()]:
            raise ValueError(
                f"fuse_qkv_projections would bypass the adapter on {name}: merge it into the weights with fuse_lora "
                "and unload_lora, or remove it with unload_lora."
            )
        super().fuse_qkv_projections()

    def unfuse_qkv_projections(self) -> None:
        """Separate projections with Diffusers' method; a `ValueError` if the fused ones have an adapter."""
        for name in adapted_layers(self):
            if name.endswith((".to_qkv", ".to_kv")):
                raise ValueError(
                    f"unfuse_qkv_projections would remove {name} with its adapter: remove that first with unload_lora."
                )
        super().unfuse_qkv_projections()

    @property
    def _original_scalings(self) -> list[tuple[Any, str, float]]:
        """(layer, adapter, scaling) of fused adapters, from before `fuse_lora`."""
        return self.__dict__.setdefault("_scalings_before_fusion", [])

    def _restore_scalings(self) -> None:
        for layer, name, scaling in self._original_scalings:
            layer.scaling[name] = scaling
        self._original_scalings.clear()

    def _check_adapters(self, names: list[str] | str, method: str | None = None) -> None:
        """Check that adapters exist and, for a method that changes them, that none is merged into the weights."""
        known = list(getattr(self, "peft_config", {}))
        for name in [names] if isinstance(names, str) else names:
            if name not in known:
                loaded = f"loaded are {', '.join(known)}" if known else "none is loaded"
                raise ValueError(f"There is no adapter {name!r}; {loaded}.")
        for layer in adapted_layers(self).values():
            if method is not None and layer.merged_adapters:
                raise ValueError(
                    f"{method} cannot change the adapter {layer.merged_adapters[0]!r}, which is merged into the "
                    "weights: call unfuse_lora first."
                )

    def _projections(self, only_bypassed: bool = False) -> set[str]:
        """Return the names of layers that fusing bypasses, or only of those that are bypassed now."""
        return {
            f"{name}.{part}"
            for name, attention in self.named_modules()
            if isinstance(attention, AttentionModuleMixin) and (attention.fused_projections or not only_bypassed)
            for part in (("to_k", "to_v") if attention.is_cross_attention else ("to_q", "to_k", "to_v"))
        }

    def _separate_projections(self, layers: set[str]) -> None:
        if layers & self._projections(only_bypassed=True):
            logger.warning("fuse_qkv_projections is undone, since the adapter is on projections that it bypasses.")
            self.unfuse_qkv_projections()


class LoraPipelineMixin(CogVideoXLoraLoaderMixin):
    """Diffusers' LoRA methods of a pipeline, with safetensors only.

    `load_lora_weights(source, adapter_name, hotswap, **options)` loads a file, a folder, a Hub repository or a state
    dict into the transformer; its options are those of `read_lora` and `low_cpu_mem_usage`.
    """

    @classmethod
    def lora_state_dict(
        cls, pretrained_model_name_or_path_or_dict: str | os.PathLike | Mapping[str, torch.Tensor], **kwargs: Any
    ) -> StateDict | tuple[StateDict, dict[str, Any] | None]:
        """Read the weights of a LoRA; with `return_lora_metadata` also the saved arguments of its `LoraConfig`.

        Raises:
            ValueError: if it is no safetensors file or an argument is unknown.
            OSError: if the file does not exist.
        """
        with_metadata = kwargs.pop("return_lora_metadata", False)
        state, metadata = read_lora(pretrained_model_name_or_path_or_dict, **kwargs)
        return (state, metadata) if with_metadata else state

    @requires_peft
    def unfuse_lora(self, components: Sequence[str] = ("transformer",), **kwargs: Any) -> None:
        """Subtract the merged LoRA from the transformer's weights, up to rounding."""
        super().unfuse_lora(list(components), **kwargs)
        self.transformer._restore_scalings()

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike,
        transformer_lora_layers: Mapping[str, nn.Module | torch.Tensor] | None = None,
        is_main_process: bool = True,
        **kwargs: Any,
    ) -> None:
        """Save the layers of a LoRA for `load_lora_weights`.

        Args:
            save_directory: the folder.
            transformer_lora_layers: such as `peft.get_peft_model_state_dict(transformer)`.
            is_main_process: False writes nothing.
            kwargs: further arguments of Diffusers' method, such as `weight_name` and
                `transformer_lora_adapter_metadata`, without which loading sets `lora_alpha` to the rank.

        Raises:
            ValueError: if there are no layers, the folder is a file, or a pickle file is requested.
        """
        refuse_pickle(kwargs.get("safe_serialization", True))
        if os.path.isfile(save_directory):
            raise ValueError(f"{save_directory} is a file; save_lora_weights requires a folder.")
        if is_main_process:
            super().save_lora_weights(save_directory, transformer_lora_layers, **kwargs)


for _name in (
    "load_lora_weights",
    "unload_lora_weights",
    "fuse_lora",
    "set_adapters",
    "delete_adapters",
    "enable_lora",
    "disable_lora",
    "get_active_adapters",
    "get_list_adapters",
    "set_lora_device",
):
    setattr(LoraPipelineMixin, _name, requires_peft(getattr(CogVideoXLoraLoaderMixin, _name)))
