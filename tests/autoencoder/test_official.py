"""Goldens made with the authors' code, and what the converter refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from autoencoder import AutoencoderKLVidTwin
from autoencoder.convert_official import DEAD_KEYS, convert_key

GOLDEN = Path(__file__).parents[1] / "data" / "official_golden"
NAMES = ("mini", "mini_crop", "mini_faint")
HEADS = dict(num_attention_heads=4, qformer_heads=4)


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return (a - b).abs().max().item()


@pytest.fixture(scope="module", params=NAMES)
def golden(request) -> tuple[AutoencoderKLVidTwin, dict[str, torch.Tensor]]:
    model = AutoencoderKLVidTwin.from_single_file(GOLDEN / f"{request.param}_weights.safetensors", **HEADS)
    return model, load_file(GOLDEN / f"{request.param}_io.safetensors")


def test_latents_match_the_official_code(golden):
    model, io = golden
    with torch.no_grad():
        posterior = model.encode(io["x"]).latent_dist
    for moment in ("mean", "logvar"):
        ours = model.unpack(getattr(posterior, moment))
        dynamics = [io[f"dynamics_over_{axis}_{moment}"] for axis in ("height", "width")]
        assert error(ours.structure, io[f"structure_{moment}"]) < 1e-4
        assert error(ours.dynamics, torch.cat(dynamics, dim=3)) < 1e-4
    torch.testing.assert_close(posterior.kl().sum() / len(io["x"]), io["kl"].squeeze(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("components", ["both", "structure", "dynamics"])
def test_decodes_match_the_official_code(golden, components):
    model, io = golden
    with torch.no_grad():
        z = model.encode(io["x"]).latent_dist.mode()
        assert error(model.decode(z, components=components).sample, io[f"decoded_{components}"]) < 1e-3


def test_official_config_names_are_understood():
    config = json.loads((GOLDEN / "configs.json").read_text())["mini_crop"]["config"]
    path = GOLDEN / "mini_crop_weights.safetensors"
    official, ours = (AutoencoderKLVidTwin.from_single_file(path, **names).config for names in (config, HEADS))
    assert {key: official[key] for key in ours if not key.startswith("_")} == {
        key: ours[key] for key in ours if not key.startswith("_")
    }


def test_released_size_and_layout():
    layout = json.loads((GOLDEN / "released_layout.json").read_text())
    with torch.device("meta"):
        model = AutoencoderKLVidTwin.from_preset("released")
    assert model.num_parameters() == 311_518_770
    expected = {key: list(value.shape) for key, value in model.state_dict().items()}
    converted = {}
    for key, tensor in layout["state_dict"].items():
        if not DEAD_KEYS.match(key):
            assert convert_key(key) not in converted, f"two official keys became {convert_key(key)}"
            shape = tensor["shape"]
            if key == "encoder.x_embedder.proj.weight":
                shape = [shape[0], shape[1] * shape[2] * shape[3] * shape[4]]
            converted[convert_key(key)] = shape
    assert converted == expected


def test_default_heads_are_hidden_size_over_64_and_eight():
    state = load_file(GOLDEN / "mini_weights.safetensors")
    from autoencoder.convert_official import infer_config

    config = infer_config(state, "mini")
    assert config["num_attention_heads"] == 1
    assert config["qformer_heads"] == 8


def test_lightning_checkpoint_with_losses_doubles_and_bf16(tmp_path):
    state = load_file(GOLDEN / "mini_weights.safetensors")
    state = {k: v.bfloat16() if v.dtype == torch.float32 else v for k, v in state.items()}
    state["loss.logvar"] = torch.zeros(1)
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": state, "epoch": 3}, path)
    model = AutoencoderKLVidTwin.from_single_file(path, **HEADS)
    assert model.dtype == torch.float32
    weight = model.state_dict()["encoder.transformer.blocks.1.mlp.net.2.weight"]
    assert torch.equal(weight, state["encoder.blocks.1.mlp.fc2.weight"].float())


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_a_wrong_key_is_named(tmp_path, change):
    state = load_file(GOLDEN / "mini_weights.safetensors")
    if change == "missing":
        del state["bottle_down.bias"]
        named = "missing structure_encoder.conv_out.bias"
    elif change == "unexpected":
        state["encoder.blocks.0.extra.weight"] = torch.zeros(2)
        named = "unexpected encoder.blocks.0.extra.weight"
    else:
        state["motion_head.bias"] = torch.zeros(5)
        named = "dynamics_encoder.conv_out.bias is (5,), expected (8,)"
    path = tmp_path / "wrong.safetensors"
    save_file(state, path)
    with pytest.raises(ValueError, match=re.escape(named)):
        AutoencoderKLVidTwin.from_single_file(path, **HEADS)


class Harmful:
    def __reduce__(self):
        return (Path.touch, (Path("harm-was-done"),))


def test_pickled_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "harmful.ckpt"
    torch.save({"state_dict": {}, "extra": Harmful()}, path)
    with pytest.raises(ValueError, match=r"holds more than tensors.*was not loaded"):
        AutoencoderKLVidTwin.from_single_file(path)
    assert not (tmp_path / "harm-was-done").exists()


@pytest.mark.parametrize("name", ["text.ckpt", "text.safetensors", "empty.ckpt", "empty.safetensors"])
def test_an_unreadable_file_is_named(tmp_path, name):
    path = tmp_path / name
    path.write_text("not a checkpoint" if "text" in name else "")
    with pytest.raises(ValueError, match=re.escape(str(path))):
        AutoencoderKLVidTwin.from_single_file(path)
    with pytest.raises(FileNotFoundError, match="No checkpoint file"):
        AutoencoderKLVidTwin.from_single_file(tmp_path / "absent.ckpt")
