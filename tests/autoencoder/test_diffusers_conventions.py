"""Diffusers' conventions for a model: saving, offloading, casting, attention backends, compilation."""

from __future__ import annotations

import json

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils.modeling import compute_module_sizes
from conventions import every_kind_of_file, relative_error
from diffusers.models.attention_dispatch import AttentionBackendName

import autoencoder.attention
from autoencoder import AutoencoderKLVidTwin
from autoencoder.blocks import SelfAttention, SelfAttnProcessor, VidTwinBlock
from autoencoder.qformer import QFormerAttention, QFormerAttnProcessor, QFormerLayer

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(params=["plain", "residual"])
def model(request) -> AutoencoderKLVidTwin:
    """A tiny model whose temporal attention, zero at first, does something."""
    torch.manual_seed(0)
    model = AutoencoderKLVidTwin.from_preset("tiny-test", bottleneck=request.param).eval()
    for module in model.modules():
        if isinstance(module, SelfAttention):
            torch.nn.init.normal_(module.proj.weight, std=0.1)
    return model


@pytest.fixture
def clip() -> torch.Tensor:
    return torch.rand(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def expected(model, clip) -> torch.Tensor:
    with torch.no_grad():
        return model(clip).sample


# --- saving and loading --------------------------------------------------------------------------------------------


def test_the_config_is_json_and_builds_the_same_model(model):
    config = json.loads(json.dumps(dict(model.config)))
    again = AutoencoderKLVidTwin.from_config(config)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert model.state_dict().keys() == dict(model.named_parameters()).keys(), "positions are made, not saved"


@every_kind_of_file
@torch.no_grad()
def test_every_kind_of_file_loads_bit_equal(model, clip, expected, tmp_path, how, file):
    model.save_pretrained(tmp_path, **how)
    assert (tmp_path / file).is_file()
    if "max_shard_size" in how:
        assert len(list(tmp_path.glob("*-of-*.safetensors"))) > 1
    variant = how.get("variant")
    assert torch.equal(AutoencoderKLVidTwin.from_pretrained(tmp_path, variant=variant)(clip).sample, expected)
    if variant is not None:
        with pytest.raises(OSError, match="no file named"):
            AutoencoderKLVidTwin.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@torch.no_grad()
def test_loading_in_half_precision_needs_no_float32_islands(model, clip, expected, tmp_path, dtype, low_cpu_mem_usage):
    model.save_pretrained(tmp_path)
    half = AutoencoderKLVidTwin.from_pretrained(tmp_path, torch_dtype=dtype, low_cpu_mem_usage=low_cpu_mem_usage)
    assert half.dtype == dtype
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    assert relative_error(half(clip.to(dtype)).sample, expected) < 0.02


# --- offloading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
@torch.no_grad()
def test_a_device_map_splits_between_blocks_only(model, clip, expected, tmp_path, share):
    model.save_pretrained(tmp_path / "model")
    budget = int(share * compute_module_sizes(model)[""])
    loaded = AutoencoderKLVidTwin.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": budget}, offload_folder=tmp_path / "offload"
    )
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    whole = [name for name, module in loaded.named_modules() if isinstance(module, VidTwinBlock | QFormerLayer)]
    assert not any(key.startswith(f"{name}.") for key in loaded.hf_device_map for name in whole)
    assert torch.equal(loaded(clip).sample, expected)
    assert torch.equal(loaded.decode(loaded.encode(clip).latent_dist.mode()).sample, expected)


@torch.no_grad()
def test_a_device_map_to_one_device(model, clip, expected, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoencoderKLVidTwin.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert torch.equal(loaded(clip).sample, expected)


@torch.no_grad()
def test_sequential_offload(model, clip, expected):
    accelerate.cpu_offload(model, CPU)
    assert model.device.type == "meta"
    assert torch.equal(model.decode(model.encode(clip).latent_dist.mode()).sample, expected)


@torch.no_grad()
def test_encode_and_decode_wake_an_offloaded_model(model, clip):
    woken = []

    class Wake(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            woken.append(module)
            return args, kwargs

    add_hook_to_module(model, Wake())
    latent = model.encode(clip).latent_dist.mode()
    assert woken == [model]
    model.decode(latent)
    assert woken == [model, model]


@pytest.mark.parametrize(
    "how", [{"offload_type": "block_level", "num_blocks_per_group": 1}, {"offload_type": "leaf_level"}]
)
@torch.no_grad()
def test_group_offload_serves_encode_and_decode(model, clip, expected, tmp_path, how):
    """From a disk, since a CPU has nowhere else to offload to: weights that are not fetched are not there."""
    model.enable_group_offload(CPU, offload_to_disk_path=str(tmp_path), **how)
    assert list(tmp_path.glob("*.safetensors"))
    latent = model.encode(clip).latent_dist.mode()
    assert torch.equal(model.decode(latent).sample, expected)


# --- casting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_layerwise_casting_to_eight_bits(model, clip, expected, compute_dtype):
    footprint = model.get_memory_footprint()
    model.to(compute_dtype).enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=compute_dtype)
    assert model.dtype == compute_dtype
    assert model.get_memory_footprint() < 0.4 * footprint
    assert model.decoder.transformer.blocks[0].mlp.net[2].weight.dtype == torch.float8_e4m3fn
    for precise in (model.encoder.patch_embed, model.decoder.proj_out):
        assert precise.weight.dtype == compute_dtype
    assert relative_error(model(clip.to(compute_dtype)).sample, expected) < 0.04


def test_gradient_checkpointing_is_enabled_and_disabled(model):
    assert not model.is_gradient_checkpointing
    model.enable_gradient_checkpointing()
    switches = {
        type(module).__name__ for module in model.modules() if getattr(module, "gradient_checkpointing", False)
    }
    assert switches == {"AutoencoderKLVidTwin", "VidTwinTransformer", "LocationQFormer"}
    model.disable_gradient_checkpointing()
    assert not model.is_gradient_checkpointing


# --- attention -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_backend_can_be_set(model, clip, expected, backends):
    model.set_attention_backend("_native_math")
    out = model(clip).sample
    assert len(backends) == sum(isinstance(m, SelfAttention | QFormerAttention) for m in model.modules())
    assert set(backends) == {AttentionBackendName._NATIVE_MATH}
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    model.reset_attention_backend()
    backends.clear()
    model(clip)
    assert set(backends) == {None}


def test_a_chosen_backend_wins_over_matmuls_in_half_precision(backends, fast_bf16):
    x = torch.randn(1, 4, 2, 8, dtype=torch.bfloat16)
    autoencoder.attention.attention(x, x, x)
    assert backends == []
    autoencoder.attention.attention(x, x, x, backend=AttentionBackendName.NATIVE)
    assert backends == [AttentionBackendName.NATIVE]


@torch.no_grad()
def test_processors_are_set_and_reset(model, clip, expected):
    class Silent(SelfAttnProcessor):
        def __call__(self, attn, hidden_states):
            return torch.zeros_like(hidden_states)

    processors = model.attn_processors
    assert {type(p) for p in processors.values()} == {SelfAttnProcessor, QFormerAttnProcessor}
    model.set_attn_processor({k: Silent() if type(p) is SelfAttnProcessor else p for k, p in processors.items()})
    assert not torch.allclose(model(clip).sample, expected, atol=1e-2)
    model.set_default_attn_processor()
    assert {type(p) for p in model.attn_processors.values()} == {SelfAttnProcessor, QFormerAttnProcessor}
    assert torch.equal(model(clip).sample, expected)
    with pytest.raises(ValueError, match="number of processors"):
        model.set_attn_processor({"one": Silent()})


@torch.no_grad()
def test_projections_are_fused_already(model, clip, expected):
    keys = model.state_dict().keys()
    model.fuse_qkv_projections()
    assert model.state_dict().keys() == keys
    assert torch.equal(model(clip).sample, expected)
    model.unfuse_qkv_projections()


# --- compilation ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_encode_and_decode_compile_once_and_once_more_for_any_batch(clip, graphs):
    """Whole graphs: neither the forward hook nor tiling is in the way of clips of the model's own size."""
    model = AutoencoderKLVidTwin.from_preset("tiny-test", num_layers=1, qformer_layers=1).eval()
    many = torch.cat([clip, clip, clip])
    encode = torch.compile(model.encode, fullgraph=True, backend="eager")
    means = [encode(many[:n]).latent_dist.mode() for n in (2, 3, 5)]
    assert graphs() == 2
    assert all(type(mean) is torch.Tensor for mean in means), "one tile is no tiling"
    decode = torch.compile(model.decode, fullgraph=True, backend="eager")
    outs = [decode(mean).sample for mean in means]
    assert graphs() == 4
    torch.testing.assert_close(outs[2], model(many[:5]).sample, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_compiling_block_by_block_makes_one_graph_of_each_class(model, clip, expected, graphs):
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=1):
        out = model(clip).sample
    assert graphs() == 2  # the first block of a stack, and all others
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
