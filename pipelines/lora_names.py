"""Names of layers in configs and files of LoRA, checked against the layers of a model that can have adapters."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from diffusers.utils import convert_unet_state_dict_to_peft, is_peft_available
from torch import nn

StateDict = dict[str, torch.Tensor]


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers with adapters by name: `BaseTunerLayer`s of peft."""
    if not is_peft_available():
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return linear layers and embeddings by name; for a layer with an adapter, the base layer."""
    layers = {name: layer.get_base_layer() for name, layer in adapted_layers(model).items()}
    inner = tuple(f"{name}." for name in layers)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding) and not name.startswith(inner):
            layers.setdefault(name, module)
    return layers


# --- configs --------------------------------------------------------------------------------------------------------


def resolve_config(model: nn.Module, config: Any) -> tuple[Any, set[str]]:
    """Return a copy of an adapter's config with the model's names, and the layers that it matches.

    Raises:
        ValueError: if a target or a pattern matches nothing.
    """
    config, layers, model_name = copy.copy(config), adaptable_layers(model), type(model).__name__
    targets, matched = config.target_modules, set()
    if isinstance(targets, str):
        matched = set(layers) if targets.lower() == "all-linear" else match_expression(targets, layers)
        if not matched:
            raise ValueError(
                f"target_modules={targets!r}, a regular expression for whole names, matches no layer of {model_name}"
                f"{nearest_names(targets, layers)}. A list, such as ['to_q'], matches the ends of names."
            )
    elif targets:
        config.target_modules = type(targets)(resolve_name(target, layers) for target in targets)
        for target in config.target_modules:
            names = match_suffix(target, layers)
            if not names:
                raise ValueError(
                    f"The target {target!r} matches no layer of {model_name} that can have an adapter"
                    f"{nearest_names(target, layers)}."
                )
            matched |= names
    elif not getattr(config, "target_parameters", None):
        raise ValueError(f"target_modules is empty: choose from {', '.join(layer_kinds(layers))}.")
    for name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, name, None) or {}:
            if not match_expression(rf"(.*\.)?({key})", matched):
                raise ValueError(f"{name} has {key!r}, which matches none of the targets{nearest_names(key, layers)}.")
    modules = dict(model.named_modules())
    for name in getattr(config, "modules_to_save", None) or []:
        if not match_suffix(name, modules):
            raise ValueError(f"modules_to_save has {name!r}, which {model_name} lacks{nearest_names(name, layers)}.")
    return config, matched


def resolve_metadata(model: nn.Module, metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the saved arguments of a `LoraConfig` with the model's names."""
    layers, targets = adaptable_layers(model), metadata.get("target_modules")
    if not isinstance(targets, Sequence) or isinstance(targets, str):
        return metadata
    return {**metadata, "target_modules": [resolve_name(target, layers) for target in targets]}


# --- weights --------------------------------------------------------------------------------------------------------


def remove_prefix(values: Mapping[str, Any], prefix: str | None) -> dict[str, Any]:
    """Remove a prefix from names; names that all lack it are unchanged.

    Raises:
        ValueError: if only some names have it.
    """
    if prefix is None or not any(name.startswith(f"{prefix}.") for name in values):
        return dict(values)
    others = [name for name in values if not name.startswith(f"{prefix}.")]
    if others:
        raise ValueError(f"The LoRA also has weights of another component: {others[0]}. Nothing was loaded.")
    return {name.removeprefix(f"{prefix}."): value for name, value in values.items()}


def resolve_state(model: nn.Module, state: StateDict, metadata: Mapping[str, Any]) -> StateDict:
    """Return the weights of a LoRA with the model's names.

    Args:
        model: with or without other adapters.
        state: matrices of layers; also whole parameters of the model, if `metadata` has `bias` or `modules_to_save`.
        metadata: the saved arguments of its `LoraConfig`, or {}.

    Raises:
        ValueError: if there are no weights, or they do not fit the model.
    """
    if not state:
        raise ValueError("The LoRA has no weights.")
    if not any("lora_A" in key or ".lokr_" in key for key in state):
        state = convert_unet_state_dict_to_peft(state)  # old names: to_q.lora.down
    layers, resolved, unknown = adaptable_layers(model), {}, {}
    trains_parameters = metadata.get("modules_to_save") or metadata.get("bias", "none") != "none"
    parameters = {base_name(name) for name, _ in model.named_parameters()} if trains_parameters else set()
    for key, value in state.items():
        if base_name(key) in parameters:
            resolved[key] = value
            continue
        name, part = split_key(key)
        name = resolve_name(name, layers)
        if part is None or name not in layers:
            unknown[name] = None
        resolved[f"{name}{part}"] = value
    if unknown:
        first, more = next(iter(unknown)), f" and {len(unknown) - 1} more layers" if len(unknown) > 1 else ""
        raise ValueError(
            f"The LoRA has weights for {first}{more}, which {type(model).__name__} lacks"
            f"{nearest_names(first, layers)}. Nothing was loaded."
        )
    check_shapes(resolved, layers)
    return resolved


def check_shapes(state: StateDict, layers: Mapping[str, nn.Module]) -> None:
    """Raise a `ValueError` if a layer has only one of a LoRA's two matrices, or their sizes do not fit it."""
    for name in dict.fromkeys(split_key(key)[0] for key in state):
        layer = layers.get(name)
        down, up = (state.get(f"{name}.lora_{part}.weight") for part in "AB")
        if not isinstance(layer, nn.Linear) or (down is None and up is None):
            continue
        if down is None or up is None:
            raise ValueError(f"The LoRA has only one of its two matrices for {name}. Nothing was loaded.")
        rank = len(down) if down.ndim else 0
        if down.shape != (rank, layer.in_features) or up.shape != (layer.out_features, rank):
            raise ValueError(
                f"The LoRA is of another model: its matrices for {name} are {tuple(down.shape)} and "
                f"{tuple(up.shape)}, but that layer has {layer.in_features} inputs and {layer.out_features} outputs. "
                "Nothing was loaded."
            )


# --- names ----------------------------------------------------------------------------------------------------------


def resolve_name(name: str, layers: Mapping[str, nn.Module]) -> str:
    """Translate the name of a layer in other Diffusers models: `to_out.0` is `to_out` here."""
    short = name.removesuffix(".0")
    return short if short != name and not match_suffix(name, layers) and match_suffix(short, layers) else name


def match_suffix(name: str, modules: Mapping[str, nn.Module]) -> set[str]:
    """Return the modules whose names end with a name, at a dot."""
    return {module for module in modules if module == name or module.endswith(f".{name}")}


def match_expression(expression: str, modules: Iterable[str]) -> set[str]:
    """Return the names that fully match a regular expression; raise a `ValueError` if that is invalid."""
    try:
        return {module for module in modules if re.fullmatch(expression, module)}
    except re.error as error:
        raise ValueError(f"{expression!r} is no regular expression: {error}.") from error


def base_name(name: str) -> str:
    """Return the name of a parameter without the wrappers of peft."""
    return re.sub(r"\.(base_layer|original_module)(?=\.)", "", name)


def split_key(key: str) -> tuple[str, str | None]:
    """Split the name of a weight into layer and rest, or None: `to_q.lora_A.weight` -> `to_q`, `.lora_A.weight`."""
    match = re.search(r"\.(lora_|lokr_)", key)
    return (key, None) if match is None else (key[: match.start()], key[match.start() :])


def layer_kinds(layers: Iterable[str]) -> list[str]:
    """Return the distinct ends of layer names: `to_q`, `net.2`."""
    parts = (name.split(".") for name in layers)
    return sorted({".".join(p[-2:] if p[-1].isdigit() else p[-1:]) for p in parts})


def nearest_names(name: str, layers: Mapping[str, nn.Module]) -> str:
    """Return the end of a sentence with the names nearest to an unknown one, or all kinds of layers."""
    kinds = layer_kinds(layers)
    if re.search(r"to_q?kv$", name):
        return "; it exists after fuse_qkv_projections"
    candidates = [*layers, *kinds] if "." in name else kinds
    near = difflib.get_close_matches(name, candidates, n=3)
    near = near or difflib.get_close_matches(name.split(".")[-1], kinds, n=3)
    return f"; the nearest are {', '.join(near)}" if near else f"; it has {', '.join(kinds)}"
