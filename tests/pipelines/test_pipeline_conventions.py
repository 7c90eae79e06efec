"""Diffusers' conventions for a denoiser and a pipeline: saving, offloading, casting, caches, LoRA."""

from __future__ import annotations

import copy
import inspect

import accelerate
import diffusers
import pytest
import torch
from accelerate.hooks import CpuOffload
from accelerate.utils.modeling import compute_module_sizes
from conventions import every_kind_of_file, relative_error
from diffusers.models.attention_dispatch import AttentionBackendName
from tiny_text import tiny_text_encoder

from autoencoder import AutoencoderKLVidTwin
from pipelines import VidTwinPipeline, VidTwinTransformer3DModel, default_scheduler
from pipelines.blocks import VidTwinAttention, VidTwinAttnProcessor
from pipelines.latents import denormalize_latents

CPU = torch.device("cpu")
BATCH = 2
STEPS = 4


@pytest.fixture(params=["adaln", "cross_attention"])
def model(request, make_transformer) -> VidTwinTransformer3DModel:
    return make_transformer(class_conditioning=request.param)


@pytest.fixture
def inputs(model) -> dict[str, torch.Tensor]:
    noisy = torch.randn(BATCH, model.latent_size, generator=torch.Generator().manual_seed(2))
    return {"hidden_states": noisy, "timestep": torch.tensor([7.0, 900.0]), "class_labels": torch.tensor([0, 3])}


@pytest.fixture
def expected(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).sample


@pytest.fixture
def pipe(vae, make_transformer) -> VidTwinPipeline:
    """A pipeline with copies of the models, which a test can change."""
    pipeline = VidTwinPipeline(
        copy.deepcopy(vae), make_transformer(), default_scheduler(), id2label={0: "Biking", 1: "Diving", 2: "Yo Yo"}
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipe_with_text(pipe, make_transformer) -> VidTwinPipeline:
    """The pipeline with a text encoder."""
    encoder = tiny_text_encoder()
    parts = {"text_encoder": encoder.model, "tokenizer": encoder.tokenizer}
    pipeline = VidTwinPipeline(pipe.vae, make_transformer(caption_channels=16), pipe.scheduler, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipe, **kwargs):
    """Generated clips (2, T, 3, H, W), or what `output_type` says."""
    generator = torch.Generator().manual_seed(0)
    settings = {"class_labels": [0, 2], "num_inference_steps": STEPS, "output_type": "pt", "generator": generator}
    return pipe(**{**settings, **kwargs}).frames


# --- the denoiser: saving, offloading, casting ---------------------------------------------------------------------


@every_kind_of_file
@torch.no_grad()
def test_every_kind_of_file_loads_bit_equal(model, inputs, expected, tmp_path, how, file):
    model.save_pretrained(tmp_path, **how)
    assert (tmp_path / file).is_file()
    assert len(list(tmp_path.glob("*-of-*.safetensors"))) > 1 or "max_shard_size" not in how
    loaded = VidTwinTransformer3DModel.from_pretrained(tmp_path, variant=how.get("variant"))
    assert loaded.state_dict().keys() == dict(model.named_parameters()).keys(), "positions are made, not saved"
    assert torch.equal(loaded(**inputs).sample, expected)


@pytest.mark.parametrize("share", [0.5, 0.8])
@torch.no_grad()
def test_a_device_map_splits_between_blocks_only(model, inputs, expected, tmp_path, share):
    model.save_pretrained(tmp_path / "model")
    budget = int(share * compute_module_sizes(model)[""])
    loaded = VidTwinTransformer3DModel.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": budget}, offload_folder=tmp_path / "offload"
    )
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    assert not any(key.startswith("transformer_blocks.0.") for key in loaded.hf_device_map)
    assert torch.equal(loaded(**inputs).sample, expected)


@torch.no_grad()
def test_sequential_offload(model, inputs, expected):
    accelerate.cpu_offload(model, CPU)
    assert model.device.type == "meta"
    assert torch.equal(model(**inputs).sample, expected)


@pytest.mark.parametrize(
    "how", [{"offload_type": "block_level", "num_blocks_per_group": 1}, {"offload_type": "leaf_level"}]
)
@torch.no_grad()
def test_group_offload(model, inputs, expected, tmp_path, how):
    """From a disk, since a CPU has nowhere else to offload to: weights that are not fetched are not there."""
    model.enable_group_offload(CPU, offload_to_disk_path=str(tmp_path), **how)
    assert list(tmp_path.glob("*.safetensors"))
    assert torch.equal(model(**inputs).sample, expected)


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_layerwise_casting_to_eight_bits(model, inputs, expected, compute_dtype):
    model.to(compute_dtype).enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=compute_dtype)
    assert model.dtype == compute_dtype
    assert model.transformer_blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn
    for precise in (model.structure_embed.proj, model.structure_out, model.dynamics_out):
        assert precise.weight.dtype == compute_dtype
    out = model(**{**inputs, "hidden_states": inputs["hidden_states"].to(compute_dtype)}).sample
    assert relative_error(out, expected) < 0.1


# --- the denoiser: attention, compilation --------------------------------------------------------------------------


@torch.no_grad()
def test_the_backend_can_be_set(model, inputs, expected, backends):
    model.set_attention_backend("_native_math")
    out = model(**inputs).sample
    assert backends == [AttentionBackendName._NATIVE_MATH] * len(model.attn_processors)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    model.reset_attention_backend()
    backends.clear()
    model(**inputs)
    assert set(backends) == {None}


@torch.no_grad()
def test_processors_are_set_and_reset(model, inputs, expected):
    class Silent(VidTwinAttnProcessor):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None):
            return torch.zeros_like(hidden_states)

    assert len(model.attn_processors) == sum(isinstance(m, VidTwinAttention) for m in model.modules())
    model.set_attn_processor(dict.fromkeys(model.attn_processors, Silent()))
    assert not torch.allclose(model(**inputs).sample, expected, atol=1e-2)
    model.set_default_attn_processor()
    assert torch.equal(model(**inputs).sample, expected)
    with pytest.raises(ValueError, match="number of processors"):
        model.set_attn_processor({"one": Silent()})


@torch.no_grad()
def test_projections_are_fused_and_unfused(model, inputs, expected):
    keys = model.state_dict().keys()
    model.fuse_qkv_projections()
    torch.testing.assert_close(model(**inputs).sample, expected, rtol=1e-5, atol=1e-5)
    model.unfuse_qkv_projections()
    assert model.state_dict().keys() == keys
    assert torch.equal(model(**inputs).sample, expected)


@pytest.mark.parametrize("model", ["adaln"], indirect=True)
@torch.no_grad()
def test_compiles_once_and_once_more_for_any_batch(model, inputs, graphs):
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for copies in (1, 2, 3):
        many = {k: torch.cat([v] * copies) for k, v in inputs.items()}
        out = compiled(**many, return_dict=False)[0]
    assert graphs() == 2
    torch.testing.assert_close(out, model(**many).sample, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_compiling_block_by_block_makes_one_graph(model, inputs, expected, graphs):
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=1):
        out = model(**inputs).sample
    assert graphs() == 1
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_exports(model, inputs, expected):
    exported = torch.export.export(model, args=(), kwargs=inputs).module()
    torch.testing.assert_close(exported(**inputs).sample, expected, rtol=1e-5, atol=1e-5)


# --- the denoiser: LoRA --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_lora_adapters_are_added_saved_and_loaded(model, inputs, expected, tmp_path):
    peft = pytest.importorskip("peft", reason="LoRA needs peft, which is not a dependency")
    targets = ["to_q", "to_k", "to_v", "to_out"]
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False))
    adapted = model(**inputs).sample
    assert not torch.allclose(adapted, expected, atol=1e-2)
    model.save_lora_adapter(tmp_path)
    model.unload_lora()
    assert torch.equal(model(**inputs).sample, expected)
    model.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    assert torch.equal(model(**inputs).sample, adapted)
    model.set_adapters(["default_0"], [0.0])
    torch.testing.assert_close(model(**inputs).sample, expected)
    model.set_adapters(["default_0"], [1.0])
    model.fuse_lora()
    torch.testing.assert_close(model(**inputs).sample, adapted, rtol=1e-4, atol=1e-4)


# --- caches --------------------------------------------------------------------------------------------------------

# By name: the config, the module that it skips, and how often the last block calls it in 8 steps.
CACHES = {
    "first_block": (diffusers.FirstBlockCacheConfig(threshold=100.0), "ff", 1),
    "taylorseer": (diffusers.TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=1), "attn1", 3),
    "pyramid": (
        diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 1001)
        ),
        "attn1",
        4,
    ),
    "faster": (
        diffusers.FasterCacheConfig(
            spatial_attention_timestep_skip_range=(-1, 901),
            attention_weight_callback=lambda _: 0.5,
            tensor_format="BCHW",
        ),
        "attn1",
        4,
    ),
}
if hasattr(diffusers, "MagCacheConfig"):
    CACHES["mag"] = (
        diffusers.MagCacheConfig(
            num_inference_steps=8, retention_ratio=0.0, threshold=100.0, max_skip_steps=9, mag_ratios=[1.0] * 8
        ),
        "ff",
        1,
    )


@pytest.mark.parametrize("name", CACHES)
def test_caches_skip_work_and_are_removed(pipe, name):
    config, part, expected_calls = copy.copy(CACHES[name][0]), *CACHES[name][1:]
    if hasattr(config, "current_timestep_callback"):
        config.current_timestep_callback = lambda: pipe.current_timestep
    calls = []
    spared = pipe.transformer.transformer_blocks[-1].get_submodule(part)
    spared = spared.to_q if part == "attn1" else spared
    spared.register_forward_hook(lambda *_: calls.append(1))

    plain = generate(pipe, num_inference_steps=8)
    assert len(calls) == 8
    pipe.transformer.enable_cache(config)
    with pytest.raises(ValueError, match="already been enabled"):
        pipe.transformer.enable_cache(config)
    calls.clear()
    cached = generate(pipe, num_inference_steps=8)
    assert len(calls) == expected_calls
    assert cached.isfinite().all()
    assert not torch.equal(cached, plain)
    assert torch.equal(generate(pipe, num_inference_steps=8), cached), "a call should start with empty caches"
    pipe.transformer.disable_cache()
    assert not pipe.transformer.is_cache_enabled
    assert torch.equal(generate(pipe, num_inference_steps=8), plain)


RESTARTS = ("first_block", "taylorseer", "pyramid")


def enable(pipe, config):
    config = copy.copy(config)
    if hasattr(config, "current_timestep_callback"):
        config.current_timestep_callback = lambda: pipe.current_timestep
    pipe.transformer.enable_cache(config)


@pytest.mark.parametrize("name", RESTARTS)
def test_caches_restart_where_guidance_begins_and_ends(pipe, name):
    """With one class, cached activations of its single row would broadcast without an error."""
    computed = []
    part = pipe.transformer.transformer_blocks[-1].get_submodule(CACHES[name][1])
    spared = part.to_q if CACHES[name][1] == "attn1" else part
    spared.register_forward_hook(lambda _, args, out: computed.append((pipe.num_seen, len(out))))
    pipe.num_seen = 0
    settings = {"class_labels": 0, "num_inference_steps": 10, "guidance_scale": 3.0, "output_type": "latent"}

    def count(pipeline, step, timestep, tensors):
        pipeline.num_seen = step + 1
        return tensors

    def cached(**more):
        computed.clear()
        pipe.num_seen = 0
        return generate(pipe, **settings, callback_on_step_end=count, **more)

    enable(pipe, CACHES[name][0])
    out = cached(guidance_interval=(0.3, 0.7))
    assert out.shape == (1, pipe.transformer.latent_size) and out.isfinite().all()
    rows = dict(computed)
    assert [rows[step] for step in (0, 3, 7)] == [1, 2, 1], "the first step of each part is computed"
    assert len(computed) < 10, "and others are not"
    assert torch.equal(cached(guidance_interval=(0.3, 0.7)), out)

    # At the end of the interval the step equals the step without a cache.
    inputs = []
    hook = pipe.transformer.register_forward_hook(
        lambda _, args, out: inputs.append((args, out[0])) if pipe.num_seen == 7 else None
    )
    cached(guidance_interval=(0.3, 0.7))
    hook.remove()
    pipe.transformer.disable_cache()
    [(args, prediction)] = inputs
    with torch.no_grad():
        torch.testing.assert_close(prediction, pipe.transformer(*args).sample)


def test_a_call_after_an_error_starts_with_empty_caches(pipe):
    enable(pipe, CACHES["first_block"][0])
    whole = generate(pipe, num_inference_steps=4)

    def fail(*_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        generate(pipe, class_labels=[1, 1], callback_on_step_end=fail)
    assert torch.equal(generate(pipe, num_inference_steps=4), whole)


REFUSED = {name: CACHES[name][0] for name in CACHES if name not in RESTARTS} | {
    "taylorseer_ends": diffusers.TaylorSeerCacheConfig(cache_interval=3, disable_cache_after_step=10)
}


@pytest.mark.parametrize("name", REFUSED)
def test_caches_that_cannot_restart_refuse_an_interval(pipe, name):
    enable(pipe, REFUSED[name])
    steps = []
    hook = pipe.transformer.register_forward_pre_hook(lambda *_: steps.append(1))
    with pytest.raises(ValueError, match=f"{type(REFUSED[name]).__name__}.* cannot restart"):
        generate(pipe, guidance_interval=(0.2, 0.8))
    hook.remove()
    assert not steps, "the error is raised before the first step"
    for interval in ((0.0, 1.0), (0.0, 0.0)):
        assert generate(pipe, guidance_interval=interval).isfinite().all()
    assert generate(pipe, guidance_interval=(0.2, 0.8), guidance_scale=1.0).isfinite().all()

    def end_guidance(pipeline, step, timestep, tensors):
        pipeline._guidance_scale = 0.0
        return tensors

    with pytest.raises(ValueError, match="cannot restart"):
        generate(pipe, callback_on_step_end=end_guidance)


def test_an_unsupported_cache_is_refused(transformer):
    with pytest.raises(ValueError, match="lite mode"):
        transformer.enable_cache(diffusers.TaylorSeerCacheConfig(use_lite_mode=True))
    assert not transformer.is_cache_enabled


# --- the pipeline --------------------------------------------------------------------------------------------------


def test_the_call_has_the_arguments_of_video_pipelines():
    parameters = inspect.signature(VidTwinPipeline.__call__).parameters
    common = ("num_inference_steps", "guidance_scale", "generator", "latents", "output_type", "return_dict")
    callbacks = ("callback_on_step_end", "callback_on_step_end_tensor_inputs", "num_videos_per_prompt")
    assert all(parameters[name].default is not inspect.Parameter.empty for name in common + callbacks)


@pytest.mark.parametrize(
    "how", [{"variant": "fp16"}, {"safe_serialization": False}, {"max_shard_size": "150KB"}], ids=str
)
def test_saved_pipelines_load_bit_equal(pipe, tmp_path, how):
    pipe.save_pretrained(tmp_path, **how)
    loaded = VidTwinPipeline.from_pretrained(tmp_path, variant=how.get("variant"))
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(generate(loaded), generate(pipe))


def test_a_missing_variant_is_an_error(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="variant=fp16"):
        VidTwinPipeline.from_pretrained(tmp_path, variant="fp16")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_by_cast_and_by_loading(pipe, tmp_path, dtype):
    expected = generate(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = VidTwinPipeline.from_pretrained(tmp_path, torch_dtype=dtype)
    loaded.set_progress_bar_config(disable=True)
    pipe.to(dtype)
    for half in (pipe, loaded):
        assert (half.vae.dtype, half.transformer.dtype) == (dtype, dtype)
        frames = generate(half)
        assert frames.dtype == dtype
        assert relative_error(frames, expected) < 0.02


def test_half_precision_from_eight_bits(pipe):
    expected = generate(pipe)
    pipe.to(torch.bfloat16)
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    assert relative_error(generate(pipe), expected) < 0.05


def test_from_pipe_shares_parts_and_keeps_labels(pipe):
    again = VidTwinPipeline.from_pipe(pipe)
    again.set_progress_bar_config(disable=True)
    assert again.labels == pipe.labels
    assert again.components == pipe.components
    assert torch.equal(generate(again), generate(pipe))
    mute = VidTwinPipeline.from_pipe(pipe, vae=None)
    assert mute.vae is None
    assert pipe.vae is not None


def test_without_a_vae_latents_come_out_normalized(pipe, tmp_path):
    expected = generate(pipe, output_type="latent")
    pipe.save_pretrained(tmp_path / "whole")
    alone = VidTwinPipeline.from_pretrained(tmp_path / "whole", vae=None)
    alone.set_progress_bar_config(disable=True)
    latents = generate(alone, output_type="latent")
    assert torch.equal(denormalize_latents(latents, pipe.vae), expected)
    assert set(alone.components) == set(pipe.components)
    with pytest.raises(ValueError, match="output_type must be \"latent\", not 'pt'"):
        generate(alone)
    alone.save_pretrained(tmp_path / "alone")
    assert VidTwinPipeline.from_pretrained(tmp_path / "alone", vae=None).vae is None


def test_guidance_is_readable_and_requires_classes(pipe):
    def more(pipeline, step, timestep, tensors):
        pipeline._guidance_scale += 1.0
        return tensors

    for labels, acts in ((0, True), (None, False)):
        generate(pipe, class_labels=labels, guidance_scale=2.0, callback_on_step_end=more)
        assert pipe.guidance_scale == 2.0 + pipe.num_timesteps
        assert pipe.do_classifier_free_guidance is acts


def test_model_offload_wakes_and_frees_both_models(pipe):
    expected = generate(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        assert torch.equal(generate(pipe), expected)
        assert isinstance(pipe.transformer._hf_hook, CpuOffload)
        assert isinstance(pipe.vae._hf_hook, CpuOffload)
        # A hook frees the model that was used before.
        assert pipe.vae._hf_hook.prev_module_hook.model is pipe.transformer


def test_sequential_offload_of_the_whole_pipeline(pipe):
    expected = generate(pipe)
    for model in (pipe.vae, pipe.transformer):  # `enable_sequential_cpu_offload` less its device, "cpu:0"
        accelerate.cpu_offload(model, CPU)
    assert torch.equal(generate(pipe), expected)


def test_sequential_offload_with_a_prompt(pipe_with_text):
    prompts = {"prompt": ["a red disc orbits", "two dogs jump"], "negative_prompt": "a ring"}
    expected, free = generate(pipe_with_text, **prompts), generate(pipe_with_text)
    for model in (pipe_with_text.vae, pipe_with_text.transformer, pipe_with_text.text_encoder):
        accelerate.cpu_offload(model, CPU)
    assert pipe_with_text.text_encoder.device.type == "meta"
    assert torch.equal(generate(pipe_with_text, **prompts), expected)
    assert not torch.allclose(expected, free, atol=1e-3)


def test_group_offload_of_the_whole_pipeline(pipe, tmp_path):
    expected = generate(pipe)
    pipe.enable_group_offload(CPU, offload_type="leaf_level", offload_to_disk_path=str(tmp_path))
    assert torch.equal(generate(pipe), expected)


def test_a_device_map_of_one_device(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = VidTwinPipeline.from_pretrained(tmp_path, device_map="cpu")
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(generate(loaded), generate(pipe))


def test_slicing_the_vae_changes_nothing(pipe):
    expected = generate(pipe)
    pipe.vae.enable_slicing()
    torch.testing.assert_close(generate(pipe), expected, rtol=1e-4, atol=1e-5)


def test_a_callback_that_zeroes_latents_zeroes_the_result_of_a_vae_without_statistics(pipe):
    config = {**pipe.vae.config, "latents_mean": None, "latents_std": None}
    pipe.vae = AutoencoderKLVidTwin.from_config(config).eval()

    def zero_at_the_end(pipeline, step, timestep, tensors):
        return {"latents": tensors["latents"] * (step < pipeline.num_timesteps - 1)}

    assert not generate(pipe, output_type="latent", callback_on_step_end=zero_at_the_end).any()
