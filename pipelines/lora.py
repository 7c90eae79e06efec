"""LoRA adapters by Diffusers' own loaders, which ignore what matches nothing: here every name is checked first.

`LoraAdapterMixin` is of the transformer, `LoraPipelineMixin` of the pipeline. Both need the package peft.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.loaders import CogVideoXLoraLoaderMixin, PeftAdapterMixin
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from .lora_files import FETCH_OPTIONS, StateDict, needs_peft, read_lora, refuse_pickle, require_peft
from .lora_names import adapted_layers, resolve_config, resolve_metadata, resolve_state, split_key, without_prefix

logger = logging.getLogger(__name__)


class LoraAdapterMixin(PeftAdapterMixin):
    """Diffusers' adapters for a model with attention, where every layer that is named must exist and take effect."""

    def add_adapter(self, adapter_config: Any, adapter_name: str = "default") -> None:
        """Add a new adapter, to be trained.

        Layers that `fuse_qkv_projections` bypasses are used again if the adapter has some of them.

        Args:
            adapter_config: a `peft.LoraConfig` or another config of peft. `to_out.0`, the name in other models of
                Diffusers, means `to_out`.
            adapter_name: its name.

        Raises:
            ValueError: naming a target that matches no layer, and the layers next to it; if the name is in use.
            ImportError: without peft.
        """
        require_peft()
        if hasattr(adapter_config, "target_modules"):
            adapter_config, layers = resolve_config(self, adapter_config)
            self._use_projections(layers)
        try:
            super().add_adapter(adapter_config, adapter_name)
        except Exception:
            self._hf_peft_config_loaded = hasattr(self, "peft_config")  # else no other adapter could be added
            raise

    def load_lora_adapter(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | Mapping[str, torch.Tensor],
        prefix: str | None = "transformer",
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """Load a LoRA from a file, a folder, a Hub repository or a state dict; only safetensors are read.

        Layers that `fuse_qkv_projections` bypasses are used again if the LoRA has some of them.

        Args:
            pretrained_model_name_or_path_or_dict: what `save_lora_adapter` or a pipeline's `save_lora_weights` wrote.
            prefix: before the names of this model's layers; names without it are taken as well.
            hotswap: replace the weights of the adapter `adapter_name`.
            kwargs: further arguments of Diffusers' method, such as `adapter_name`, `weight_name` and `token`.

        Raises:
            ValueError: naming a layer that this model lacks or that has another shape; if the file is no safetensors
                file or holds no LoRA.
            OSError: if there is no such file.
            ImportError: without peft.
        """
        require_peft()
        options = {name: kwargs.pop(name) for name in FETCH_OPTIONS if name in kwargs}
        state, metadata = read_lora(pretrained_model_name_or_path_or_dict, **options)
        given = kwargs.pop("metadata", None)
        metadata = metadata if given is None else given
        state, metadata = without_prefix(state, prefix), without_prefix(metadata, prefix)
        state, metadata = resolve_state(self, state, metadata), resolve_metadata(self, metadata)
        self._use_projections({split_key(key)[0] for key in state})
        if prefix is not None:
            state, metadata = ({f"{prefix}.{k}": v for k, v in x.items()} for x in (state, metadata))
        super().load_lora_adapter(state, prefix=prefix, hotswap=hotswap, metadata=metadata or None, **kwargs)

    def save_lora_adapter(
        self, save_directory: str | os.PathLike, adapter_name: str = "default", *args: Any, **kwargs: Any
    ) -> None:
        """Diffusers' method, of safetensors only.

        Raises:
            ValueError: if there is no such adapter, or a pickle file is requested.
            ImportError: without peft.
        """
        require_peft()
        refuse_pickle(*args[1:2], **kwargs)
        super().save_lora_adapter(save_directory, adapter_name, *args, **kwargs)

    @functools.wraps(ModelMixin.save_pretrained, assigned=())  # pipelines ask for its signature
    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Diffusers' method; a model with adapters, whose layers have other names, is refused.

        Raises:
            ValueError: if an adapter is loaded.
        """
        for name in adapted_layers(self):
            raise ValueError(
                f"save_pretrained cannot save the adapter on {name}: save it by save_lora_adapter and remove it by "
                "unload_lora, or make it part of the weights by fuse_lora and unload_lora."
            )
        super().save_pretrained(save_directory, *args, **kwargs)

    def set_adapters(self, adapter_names: list[str] | str, weights: Any = None) -> None:
        """Diffusers' method; adapters that are part of the weights are refused.

        Raises:
            ValueError: for a name that no adapter has, or after `fuse_lora`.
            ImportError: without peft.
        """
        require_peft()
        self._check_adapters(_as_list(adapter_names))
        self._refuse_fused("set_adapters")
        super().set_adapters(adapter_names, weights)

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """Remove adapters by their names.

        Raises:
            ValueError: for a name that no adapter has, or after `fuse_lora`; nothing is removed then.
            ImportError: without peft.
        """
        require_peft()
        self._check_adapters(_as_list(adapter_names))
        self._refuse_fused("delete_adapters")
        super().delete_adapters(adapter_names)

    def fuse_lora(
        self, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: list[str] | None = None
    ) -> None:
        """Make adapters part of the weights, which costs nothing when sampling.

        Unlike in Diffusers `lora_scale` is of this fusion alone, and also of adapters that are not active.

        Args:
            lora_scale: of the adapters, beside the weights of `set_adapters`.
            safe_fusing: raise an error, and change nothing, where the result would not be finite.
            adapter_names: of the adapters; None: those that are active.

        Raises:
            ValueError: for a name that no adapter has, or a scale that is not finite.
            ImportError: without peft.
        """
        require_peft()
        if isinstance(lora_scale, bool) or not math.isfinite(lora_scale):
            raise ValueError(f"lora_scale must be a finite number, not {lora_scale!r}.")
        names = None if adapter_names is None else _as_list(adapter_names)
        self._check_adapters(names or [])
        for layer in adapted_layers(self).values():
            for name in layer.active_adapters if names is None else names:
                if name in layer.scaling and name not in layer.merged_adapters:
                    self._scalings_before.append((layer, name, layer.scaling[name]))
                    layer.scaling[name] *= lora_scale
        super().fuse_lora(1.0, safe_fusing, names)

    def unfuse_lora(self) -> None:
        """Take adapters out of the weights again, up to rounding.

        Raises:
            ImportError: without peft.
        """
        require_peft()
        super().unfuse_lora()
        self._restore_scalings()

    def unload_lora(self) -> None:
        """Remove all adapters; what `fuse_lora` made part of the weights stays there.

        Raises:
            ImportError: without peft.
        """
        require_peft()
        super().unload_lora()
        self._scalings_before.clear()

    def fuse_qkv_projections(self) -> None:
        """Diffusers' method; an adapter on the layers that it bypasses is refused.

        Raises:
            ValueError: if an adapter is on `to_q`, `to_k` or `to_v`.
        """
        self._refuse_adapters(
            self._projections(),
            "fuse_qkv_projections would bypass the adapter on {}: make it part of the weights by fuse_lora and "
            "unload_lora, or remove it by unload_lora.",
        )
        super().fuse_qkv_projections()

    def unfuse_qkv_projections(self) -> None:
        """Diffusers' method; an adapter on the layers that it removes is refused.

        Raises:
            ValueError: if an adapter is on `to_qkv` or `to_kv`.
        """
        fused = {f"{name}.{part}" for name, _ in self._attentions() for part in ("to_qkv", "to_kv")}
        self._refuse_adapters(
            fused, "unfuse_qkv_projections would remove {} with its adapter: remove that before by unload_lora."
        )
        super().unfuse_qkv_projections()

    # --- adapters ---------------------------------------------------------------------------------------------------

    @property
    def _scalings_before(self) -> list[tuple[Any, str, float]]:
        """The (layer, adapter, scaling) of adapters that are fused, before that."""
        return self.__dict__.setdefault("_fused_scalings", [])

    def _restore_scalings(self) -> None:
        for layer, name, scaling in self._scalings_before:
            layer.scaling[name] = scaling
        self._scalings_before.clear()

    def _check_adapters(self, names: list[str]) -> None:
        known = list(getattr(self, "peft_config", {}))
        for name in names:
            if name not in known:
                loaded = f"loaded are {', '.join(known)}" if known else "none is loaded"
                raise ValueError(f"There is no adapter {name!r}; {loaded}.")

    def _refuse_fused(self, method: str) -> None:
        for layer in adapted_layers(self).values():
            if layer.merged_adapters:
                raise ValueError(
                    f"{method} cannot change the adapter {layer.merged_adapters[0]!r}, which is part of the weights: "
                    "call unfuse_lora first."
                )

    # --- fused projections ------------------------------------------------------------------------------------------

    def _attentions(self) -> list[tuple[str, AttentionModuleMixin]]:
        return [(name, module) for name, module in self.named_modules() if isinstance(module, AttentionModuleMixin)]

    def _projections(self, *, bypassed: bool = False) -> set[str]:
        """Names of the layers that fusing bypasses; with `bypassed` only of those that are so now."""
        return {
            f"{name}.{part}"
            for name, attention in self._attentions()
            if attention.fused_projections or not bypassed
            for part in (("to_k", "to_v") if attention.is_cross_attention else ("to_q", "to_k", "to_v"))
        }

    def _use_projections(self, names: set[str]) -> None:
        """Undo `fuse_qkv_projections` if it bypasses one of these layers, on which an adapter would do nothing."""
        if names & self._projections(bypassed=True):
            logger.warning("fuse_qkv_projections is undone: the adapter is on projections that it bypasses.")
            self.unfuse_qkv_projections()

    def _refuse_adapters(self, names: set[str], message: str) -> None:
        for name in adapted_layers(self):
            if name in names:
                raise ValueError(message.format(name))


class LoraPipelineMixin(CogVideoXLoraLoaderMixin):
    """Diffusers' LoRA methods of a pipeline whose transformer takes adapters, of safetensors only."""

    unload_lora_weights = needs_peft(CogVideoXLoraLoaderMixin.unload_lora_weights)
    fuse_lora = needs_peft(CogVideoXLoraLoaderMixin.fuse_lora)
    set_adapters = needs_peft(CogVideoXLoraLoaderMixin.set_adapters)
    delete_adapters = needs_peft(CogVideoXLoraLoaderMixin.delete_adapters)
    enable_lora = needs_peft(CogVideoXLoraLoaderMixin.enable_lora)
    disable_lora = needs_peft(CogVideoXLoraLoaderMixin.disable_lora)
    get_active_adapters = needs_peft(CogVideoXLoraLoaderMixin.get_active_adapters)
    get_list_adapters = needs_peft(CogVideoXLoraLoaderMixin.get_list_adapters)
    set_lora_device = needs_peft(CogVideoXLoraLoaderMixin.set_lora_device)

    @classmethod
    def lora_state_dict(
        cls, pretrained_model_name_or_path_or_dict: str | os.PathLike | Mapping[str, torch.Tensor], **kwargs: Any
    ) -> StateDict | tuple[StateDict, dict[str, Any] | None]:
        """The weights of a LoRA; with `return_lora_metadata` also the arguments of its `LoraConfig`, where saved.

        Raises:
            ValueError: if it is no safetensors file or an argument is unknown.
            OSError: if there is no such file.
        """
        with_metadata = kwargs.pop("return_lora_metadata", False)
        state, metadata = read_lora(pretrained_model_name_or_path_or_dict, **kwargs)
        return (state, metadata) if with_metadata else state

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | Mapping[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs: Any,
    ) -> None:
        """Load a LoRA into the transformer; see its `load_lora_adapter`.

        Args:
            pretrained_model_name_or_path_or_dict: a file, a folder, a Hub repository or a state dict.
            adapter_name: its name, for `set_adapters`; None: the next `default_N`.
            hotswap: replace the weights of an adapter that is loaded.
            kwargs: `weight_name`, `subfolder`, `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`,
                `proxies` and `low_cpu_mem_usage`.

        Raises:
            ValueError: if it is no safetensors file, or does not fit the transformer; nothing is loaded then.
            OSError: if there is no such file.
            ImportError: without peft.
        """
        require_peft()
        super().load_lora_weights(pretrained_model_name_or_path_or_dict, adapter_name, hotswap, **kwargs)

    def unfuse_lora(self, components: Sequence[str] = ("transformer",), **kwargs: Any) -> None:
        """Take the LoRA out of the transformer's weights again, up to rounding.

        Raises:
            ImportError: without peft.
        """
        require_peft()
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
        """Write the layers of a LoRA, as `load_lora_weights` reads it.

        Args:
            save_directory: the folder.
            transformer_lora_layers: such as `peft.get_peft_model_state_dict(transformer)` returns.
            is_main_process: False writes nothing.
            kwargs: further arguments of Diffusers' method, such as `weight_name` and
                `transformer_lora_adapter_metadata`, without which `lora_alpha` is taken to be the rank.

        Raises:
            ValueError: if there are no layers, the folder is a file, or a pickle file is requested.
        """
        refuse_pickle(kwargs.get("safe_serialization", True))
        if os.path.isfile(save_directory):
            raise ValueError(f"{save_directory} is a file; save_lora_weights takes a folder.")
        if not transformer_lora_layers:
            raise ValueError("save_lora_weights needs transformer_lora_layers, the weights to save.")
        if is_main_process:
            super().save_lora_weights(save_directory, transformer_lora_layers, **kwargs)


def _as_list(names: str | list[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)
