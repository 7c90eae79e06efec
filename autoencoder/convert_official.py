"""Conversion of official VidTwin checkpoints: hyperparameters from tensor shapes, keys one to one."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file

from .presets import rename_old_arguments

StateDict = dict[str, torch.Tensor]

# Patterns of official keys, and our keys. Each official key matches exactly one line.
KEY_MAP: tuple[tuple[str, str], ...] = (
    (r"(encoder|decoder)\.blocks\.(\d+)\.scale_shift_table", r"\1.transformer.blocks.\2.scale_shift_table"),
    (r"(encoder|decoder)\.blocks\.(\d+)\.attn\.(qkv|proj)\.", r"\1.transformer.blocks.\2.spatial_attn.\3."),
    (r"(encoder|decoder)\.blocks\.(\d+)\.attn_temp\.(qkv|proj)\.", r"\1.transformer.blocks.\2.temporal_attn.\3."),
    (r"(encoder|decoder)\.blocks\.(\d+)\.mlp\.fc1\.", r"\1.transformer.blocks.\2.mlp.net.0.proj."),
    (r"(encoder|decoder)\.blocks\.(\d+)\.mlp\.fc2\.", r"\1.transformer.blocks.\2.mlp.net.2."),
    (r"encoder\.x_embedder\.proj\.", "encoder.patch_embed."),
    (r"decoder\.final_layer\.scale_shift_table", "decoder.scale_shift_table"),
    (r"decoder\.final_layer\.linear\.", "decoder.proj_out."),
    (r"temporal_qformer\.query_embeds", "structure_encoder.temporal_pool.queries"),
    (r"temporal_qformer\.qformer\.layernorm\.", "structure_encoder.temporal_pool.norm."),
    (r"temporal_qformer\.qformer\.encoder\.layer\.(\d+)\.", r"structure_encoder.temporal_pool.layers.\1."),
    (r"conv_in\.", "structure_encoder.conv_in."),
    (r"content_downsample_blocks\.(\d+)\.", lambda m: f"structure_encoder.down.{int(m[1]) // 2}."),
    (r"bottle_down\.", "structure_encoder.conv_out."),
    (r"bottle_up\.0\.", "structure_decoder.conv_in."),
    (r"content_upsample_blocks\.(\d+)\.", lambda m: f"structure_decoder.up.{int(m[1]) // 3}."),
    (r"conv_out\.", "structure_decoder.conv_out."),
    (r"cont_emb\.0\.", "structure_decoder.to_hidden."),
    (r"cont_emb\.2\.", "structure_decoder.to_frames."),
    (r"downsample_motion_module\.(\d+)\.", lambda m: f"dynamics_encoder.down.{int(m[1]) // 2}."),
    (r"motion_head\.", "dynamics_encoder.conv_out."),
    (r"motion_emb\.0\.", "dynamics_decoder.channels_in."),
    (r"motion_emb\.2\.", "dynamics_decoder.channels_out."),
    (r"up_motion\.0\.", "dynamics_decoder.positions_in."),
    (r"up_motion\.2\.", "dynamics_decoder.positions_out."),
)
QFORMER_LAYER_MAP = {
    "attention.attention.query.": "self_attn.to_q.",
    "attention.attention.key.": "self_attn.to_k.",
    "attention.attention.value.": "self_attn.to_v.",
    "attention.output.dense.": "self_attn.to_out.",
    "attention.output.LayerNorm.": "self_attn.norm.",
    "intermediate_query.dense.": "mlp_in.",
    "output_query.dense.": "mlp_out.",
    "output_query.LayerNorm.": "norm.",
}
QFORMER_LAYER_MAP |= {
    f"cross{old}": new.replace("self", "cross") for old, new in QFORMER_LAYER_MAP.items() if "self" in new
}

# Keys that the official forward pass never uses, buffers that we compute, and leftovers of training.
DEAD_KEYS = re.compile(
    r"encoder\.final_layer\.|decoder\.x_embedder\.|(encoder|decoder)\.pos_embed(_temporal)?$|loss\.|"
    r"temporal_qformer\.qformer\.embeddings\.position_ids$"
)

# Official names of hyperparameters, which callers may use, and our names.
OFFICIAL_NAMES = {
    "depth": "num_layers",
    "num_heads": "num_attention_heads",
    "num_query_tokens": "num_queries",
    "query_hidden_size": "query_dim",
    "qformer_intermediate": "qformer_ffn_dim",
    "expect_ch": "structure_channels",
    "init_ch": "structure_width",
    "cont_num_blocks": "structure_downsamples",
    "d_dim": "dynamics_channels",
    "motion_num_blocks": "dynamics_downsamples",
    "temporal_casual": "temporal_causal",
}
HEAD_DIM = 64
QFORMER_HEADS = 8


def read_state_dict(path: str | Path, disable_mmap: bool = False) -> StateDict:
    """Read the tensors of a `.safetensors` file or a (Lightning) checkpoint, without unpickling any code.

    Args:
        path: path of the file.
        disable_mmap: read a `.safetensors` file into memory instead of mapping it.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read, holds pickled code or holds no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No checkpoint file at {path}.")
    try:
        if path.suffix != ".safetensors":
            content = torch.load(path, map_location="cpu", weights_only=True)
        elif disable_mmap:
            content = load(path.read_bytes())
        else:
            content = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable .safetensors file: {error}.") from error
    except pickle.UnpicklingError as error:
        match = re.search(r"(?:GLOBAL|Unsupported class|unsupported|global) ([\w.]+\.[\w.]+)", str(error))
        name = f" ({match[1]})" if match else ""
        raise ValueError(
            f"{path} holds more than tensors{name} and was not loaded, since only tensors are unpickled: save its "
            "state dict as .safetensors."
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a readable PyTorch checkpoint: {first_line(error)}.") from error
    return extract_state_dict(content, path)


def extract_state_dict(content: Any, source: str | Path) -> StateDict:
    """Return the tensors of a checkpoint by name, from below any number of `state_dict` keys.

    Raises:
        ValueError: if there are none.
    """
    while isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    state = {k: v for k, v in content.items() if isinstance(v, torch.Tensor)} if isinstance(content, Mapping) else {}
    if not state:
        raise ValueError(f"{source} holds no state dict: expected tensors by name, or such a dict under 'state_dict'.")
    return state


def has_diffusers_keys(state: StateDict) -> bool:
    """Return whether a state dict has the keys of `AutoencoderKLVidTwin`, not official ones."""
    return any(key.startswith("encoder.transformer.") for key in state)


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__


def infer_config(state: StateDict, path: str | Path) -> dict[str, Any]:
    """Infer hyperparameters from the tensor shapes of an official state dict.

    Raises:
        ValueError: if a tensor that determines one is missing.
    """

    def shape(key: str) -> torch.Size:
        if key not in state:
            raise ValueError(f"{path} is not an official VidTwin checkpoint: it has no {key!r}.")
        return state[key].shape

    def count(pattern: str) -> int:
        return len({m[1] for key in state if (m := re.match(pattern, key))})

    hidden_size, in_channels, _, patch_size, _ = shape("encoder.x_embedder.proj.weight")
    num_frames, num_queries, _ = shape("cont_emb.2.weight")
    query_dim = shape("temporal_qformer.query_embeds")[-1]
    grid_size = shape("up_motion.0.weight")[0]
    return {
        "sample_size": grid_size * patch_size,
        "num_frames": num_frames,
        "in_channels": in_channels,
        "patch_size": patch_size,
        "hidden_size": hidden_size,
        "num_layers": count(r"encoder\.blocks\.(\d+)\."),
        "num_attention_heads": max(1, hidden_size // HEAD_DIM),
        "mlp_ratio": shape("encoder.blocks.0.mlp.fc1.weight")[0] / hidden_size,
        "num_queries": num_queries,
        "query_dim": query_dim,
        "qformer_layers": count(r"temporal_qformer\.qformer\.encoder\.layer\.(\d+)\."),
        "qformer_heads": min(QFORMER_HEADS, query_dim),
        "qformer_ffn_dim": shape("temporal_qformer.qformer.encoder.layer.0.intermediate_query.dense.weight")[0],
        "structure_channels": shape("bottle_up.0.weight")[1],
        "structure_width": shape("conv_in.weight")[0],
        "structure_downsamples": count(r"content_downsample_blocks\.(\d+)\.weight"),
        "dynamics_channels": shape("motion_emb.0.weight")[1],
        "dynamics_downsamples": count(r"downsample_motion_module\.(\d+)\.weight"),
        "bottleneck": "plain",
    }


def translate_overrides(overrides: dict[str, Any]) -> dict[str, Any]:
    """Translate official names of hyperparameters, and their sizes in lists, to ours."""
    config: dict[str, Any] = {}
    for name, value in rename_old_arguments(overrides).items():
        if name == "input_size":
            config["num_frames"], config["sample_size"] = value[0], value[-1]
        elif name == "patch_size" and not isinstance(value, int):
            config["patch_size"] = value[-1]
        elif name not in ("sample", "downsample_motion"):  # which do not change the model
            config[OFFICIAL_NAMES.get(name, name)] = value
    return config


def convert_state_dict(state: StateDict) -> StateDict:
    """Convert official keys and layouts to ours, in float32, without `DEAD_KEYS`; unknown keys keep their names."""
    if has_diffusers_keys(state):
        return {key: value.float() for key, value in state.items()}
    converted = {}
    for key, value in state.items():
        if DEAD_KEYS.match(key):
            continue
        value = value.float()
        if key == "encoder.x_embedder.proj.weight":
            value = value.flatten(1)  # the kernel of a convolution as a matrix
        elif key == "temporal_qformer.query_embeds":
            value = value.reshape(value.shape[-2:])
        converted[convert_key(key)] = value
    return converted


def convert_key(key: str) -> str:
    """Translate an official key to ours; an unknown key is returned unchanged."""
    for pattern, ours in KEY_MAP:
        if match := re.match(pattern, key):
            prefix = ours(match) if callable(ours) else match.expand(ours)
            rest = key[match.end() :]
            if "temporal_qformer.qformer.encoder" in key:
                for old, new in QFORMER_LAYER_MAP.items():
                    if rest.startswith(old):
                        return prefix + new + rest[len(old) :]
                return key
            return prefix + rest
    return key


def check_keys(converted: StateDict, expected: dict[str, torch.Size], path: str | Path) -> None:
    """Raise a `ValueError` that lists keys which are missing, unexpected or of another shape."""
    problems = [f"missing {key}" for key in expected if key not in converted]
    problems += [f"unexpected {key}" for key in converted if key not in expected]
    problems += [
        f"{key} is {tuple(converted[key].shape)}, expected {tuple(shape)}"
        for key, shape in expected.items()
        if key in converted and converted[key].shape != shape
    ]
    if problems:
        listed = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"{path} does not fit AutoencoderKLVidTwin: {listed}.")
