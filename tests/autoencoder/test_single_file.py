"""`from_single_file` with the arguments that Diffusers' `FromOriginalModelMixin` has; addresses on the Hub."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from unittest import mock

import accelerate
import pytest
import torch
from diffusers.loaders import FromOriginalModelMixin
from safetensors.torch import load_file, save_file

from autoencoder import AutoencoderKLVidTwin
from autoencoder.single_file import STANDARD_ARGUMENTS, split_hub_address

WEIGHTS = Path(__file__).parents[1] / "data" / "official_golden" / "mini_weights.safetensors"
HEADS = dict(num_attention_heads=4, qformer_heads=4)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return load_file(WEIGHTS)


@pytest.fixture(scope="module")
def model() -> AutoencoderKLVidTwin:
    return AutoencoderKLVidTwin.from_single_file(WEIGHTS, **HEADS)


def equal(a: AutoencoderKLVidTwin, b: AutoencoderKLVidTwin) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_every_argument_of_diffusers_is_known():
    documented = re.findall(r"^            (\w+) \(`", FromOriginalModelMixin.from_single_file.__doc__, re.MULTILINE)
    popped = re.findall(r'kwargs\.pop\("(\w+)"', inspect.getsource(FromOriginalModelMixin.from_single_file))
    assert {"config", "torch_dtype", "disable_mmap"} <= {*documented, *popped}
    wanted = {*documented, *popped} - {"kwargs", "disable_mmap", "pretrained_model_link_or_path_or_dict"}
    assert wanted <= set(STANDARD_ARGUMENTS)


@pytest.mark.parametrize(
    "options",
    [
        {"low_cpu_mem_usage": False},
        {"low_cpu_mem_usage": True},
        {"disable_mmap": True},
        {"device": "cpu", "token": None, "proxies": None, "revision": None, "subfolder": "vae"},
        {"device_map": "cpu", "local_files_only": True, "cache_dir": "nowhere", "force_download": False},
        {"device_map": {"": "cpu"}, "config_revision": None},
        {"original_config": {"num_heads": 4, "qformer_heads": 4}, "num_attention_heads": 4},
    ],
    ids=str,
)
def test_standard_arguments_do_not_change_the_model(model, options):
    loaded = AutoencoderKLVidTwin.from_single_file(str(WEIGHTS), **{**HEADS, **options})
    assert equal(loaded, model)
    assert not loaded.training and all(p.requires_grad and not p.is_meta for p in loaded.parameters())
    assert dict(loaded.config) == dict(model.config)
    clip = torch.zeros(model.clip_shape)[None]
    with torch.no_grad():
        assert torch.equal(loaded(clip).sample, model(clip).sample)


@pytest.mark.parametrize("low_cpu_mem_usage", [None, True, False])
def test_weights_are_initialized_only_without_low_cpu_mem_usage(low_cpu_mem_usage):
    with mock.patch("accelerate.init_empty_weights", wraps=accelerate.init_empty_weights) as empty:
        AutoencoderKLVidTwin.from_single_file(WEIGHTS, low_cpu_mem_usage=low_cpu_mem_usage, **HEADS)
    assert empty.called == (low_cpu_mem_usage is not False)
    with mock.patch("autoencoder.single_file.is_accelerate_available", return_value=False):
        AutoencoderKLVidTwin.from_single_file(WEIGHTS, **HEADS)
        with pytest.raises(ValueError, match="requires accelerate"):
            AutoencoderKLVidTwin.from_single_file(WEIGHTS, low_cpu_mem_usage=True, **HEADS)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_the_dtype_is_an_argument(name):
    half = AutoencoderKLVidTwin.from_single_file(WEIGHTS, **HEADS, **{name: torch.bfloat16})
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert AutoencoderKLVidTwin.from_single_file(WEIGHTS, dtype=None, torch_dtype=None, **HEADS).dtype == torch.float32


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("nested", [0, 1, 2])
def test_a_state_dict_is_not_changed(model, state, nested, low_cpu_mem_usage):
    before, given = {name: value.clone() for name, value in state.items()}, state
    for _ in range(nested):
        given = {"state_dict": given, "epoch": 3}
    loaded = AutoencoderKLVidTwin.from_single_file(given, low_cpu_mem_usage=low_cpu_mem_usage, **HEADS)
    assert equal(loaded, model)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.fill_(7.0)
    assert state.keys() == before.keys() and all(torch.equal(state[name], before[name]) for name in before)


@pytest.mark.parametrize("place", ["folder", "file", "subfolder", "pipeline"])
def test_a_config_gives_the_sizes(model, tmp_path, place):
    folder = tmp_path / "vae" if place in ("subfolder", "pipeline") else tmp_path
    model.save_config(folder)
    if place == "pipeline":
        (tmp_path / "model_index.json").write_text("{}")
    config = folder / "config.json" if place == "file" else tmp_path
    options = {"subfolder": "vae"} if place == "subfolder" else {}
    loaded = AutoencoderKLVidTwin.from_single_file(WEIGHTS, config=config, **options)
    assert equal(loaded, model)
    assert loaded.config.num_attention_heads == 4
    assert (
        AutoencoderKLVidTwin.from_single_file(WEIGHTS, config=config, temporal_causal=False, **options).config[
            "temporal_causal"
        ]
        is False
    )


def test_the_layout_of_diffusers_loads_with_its_config(tmp_path):
    model = AutoencoderKLVidTwin.from_preset("tiny-test", bottleneck="residual")
    model.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    assert equal(AutoencoderKLVidTwin.from_single_file(path, config=tmp_path), model)
    with pytest.raises(ValueError, match=r"layout of a Diffusers model.*pass config="):
        AutoencoderKLVidTwin.from_single_file(path)
    other = AutoencoderKLVidTwin.from_preset("tiny-test", num_layers=1)
    other.save_config(tmp_path)
    with pytest.raises(ValueError, match="does not fit AutoencoderKLVidTwin: missing"):
        AutoencoderKLVidTwin.from_single_file(path, config=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": "x", "original_config": {}}, "not both"),
        ({"config": {"num_layers": 2}}, r"config must be the path .* not dict"),
        ({"original_config": "vidtwin.yaml"}, "original_config must be a dict"),
        ({"torch_dtype": "float16"}, r"torch_dtype must be .* not 'float16'"),
        ({"dtype": torch.int8}, r"torch_dtype must be .* not torch\.int8"),
        ({"device": "gpu"}, r"device must be .* not 'gpu'"),
        ({"device_map": "auto"}, "loads onto one device"),
        ({"device_map": {"encoder": "cpu", "decoder": "cpu"}}, "loads onto one device"),
        ({"quantization_config": "any"}, "does not quantize"),
        ({"num_head": 4}, "an argument 'num_head'.*num_heads"),
        ({"local_file_only": True}, "did you mean local_files_only"),
    ],
    ids=str,
)
def test_invalid_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message) as raised:
        AutoencoderKLVidTwin.from_single_file(WEIGHTS, **options)
    assert "\n" not in str(raised.value)


def test_a_config_of_another_model_and_a_dict_without_tensors(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKLWan"}')
    with pytest.raises(ValueError, match="describes AutoencoderKLWan, not AutoencoderKLVidTwin"):
        AutoencoderKLVidTwin.from_single_file(WEIGHTS, config=tmp_path)
    for given in ({}, {"state_dict": {}}, {"a": 1}):
        with pytest.raises(ValueError, match="The state dict holds no state dict"):
            AutoencoderKLVidTwin.from_single_file(given)
    with pytest.raises(ValueError, match="The state dict is not an official VidTwin checkpoint"):
        AutoencoderKLVidTwin.from_single_file({"a": torch.zeros(1)})


def test_a_missing_file_of_a_local_folder_is_not_searched_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "vae").mkdir(parents=True)
    with (
        mock.patch("autoencoder.hub.snapshot_download", side_effect=AssertionError("was looked for")),
        pytest.raises(FileNotFoundError, match=r"No checkpoint file at runs/vae/last\.ckpt"),
    ):
        AutoencoderKLVidTwin.from_single_file("runs/vae/last.ckpt")


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("user/repo/file.safetensors", ("user/repo", None, "file.safetensors")),
        ("user/repo/a/b.ckpt", ("user/repo", None, "a/b.ckpt")),
        ("https://huggingface.co/user/repo/blob/main/a/b.ckpt", ("user/repo", "main", "a/b.ckpt")),
        ("https://hf.co/user/repo/resolve/refs%2Fpr%2F1/b.ckpt?download=true", ("user/repo", "refs/pr/1", "b.ckpt")),
        ("huggingface.co/user/repo/blob/v1/b.pt", ("user/repo", "v1", "b.pt")),
        ("hf.co/user/repo/b.pt", ("user/repo", None, "b.pt")),
        ("https://example.org/user/repo/blob/main/b.ckpt", None),
        ("user/repo", None),
        ("model.ckpt", None),
        ("repo/model.ckpt", None),
        ("/a/b/c.ckpt", None),
        ("./a/b/c.ckpt", None),
        ("~/a/b/c.ckpt", None),
        ("user/repo/config.json", None),
    ],
)
def test_addresses_on_the_hub(address, parts):
    assert split_hub_address(address) == parts


def test_disable_mmap_reads_the_whole_file(tmp_path, state, model):
    path = tmp_path / "copy.safetensors"
    save_file(state, path)
    loaded = AutoencoderKLVidTwin.from_single_file(path, disable_mmap=True, **HEADS)
    path.write_bytes(b"\0" * path.stat().st_size)
    assert equal(loaded, model)
