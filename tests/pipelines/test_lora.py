"""LoRA on the transformer and the pipeline: names are checked, and adapters are fused and unfused."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines import VidTwinPipeline, VidTwinTransformer3DModel, default_scheduler

peft = pytest.importorskip("peft", reason="LoRA needs peft, which is not a dependency")
WEIGHTS = "pytorch_lora_weights.safetensors"


def config(targets, rank=4, alpha=8, **kwargs):
    """A LoRA that does something, at a scale other than 1."""
    kwargs = {"init_lora_weights": False, **kwargs}
    return peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, **kwargs)


@pytest.fixture(scope="module")
def base(make_transformer) -> VidTwinTransformer3DModel:
    return make_transformer()


@pytest.fixture
def model(base) -> VidTwinTransformer3DModel:
    return copy.deepcopy(base)


@pytest.fixture
def pipe(vae, model) -> VidTwinPipeline:
    pipeline = VidTwinPipeline(vae, model, default_scheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    """A folder with a LoRA in two layouts, and the latents that a pipeline makes with it."""
    folder = tmp_path_factory.mktemp("lora")
    torch.manual_seed(0)
    model = copy.deepcopy(base)
    model.add_adapter(config(["to_q", "to_out.0"]))
    model.save_lora_adapter(folder / "model")
    arguments = peft.LoraConfig.to_dict(model.peft_config["default"])
    arguments = {k: list(v) if isinstance(v, set) else v for k, v in arguments.items()}
    layers = peft.get_peft_model_state_dict(model)
    VidTwinPipeline.save_lora_weights(folder / "pipeline", layers, transformer_lora_adapter_metadata=arguments)
    return folder, predict(model)


@torch.no_grad()
def predict(model_or_pipeline) -> torch.Tensor:
    model = getattr(model_or_pipeline, "transformer", model_or_pipeline)
    noisy = torch.randn(2, model.latent_size, generator=torch.Generator().manual_seed(2))
    return model(noisy, torch.tensor([7.0, 900.0]), torch.tensor([0, 3])).sample


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def adapted(model) -> set[str]:
    """Kinds of layers that have an adapter."""
    return {name.split(".")[-3] for name, _ in model.named_modules() if name.endswith(".lora_A.default")}


# --- targets -------------------------------------------------------------------------------------------------------


def test_to_out_0_means_to_out(model):
    plain = predict(model)
    model.add_adapter(config(["to_out.0", "to_q"], rank_pattern={"to_q": 2}))
    assert adapted(model) == {"to_out", "to_q"}
    assert not close(predict(model), plain)


@pytest.mark.parametrize(
    ("targets", "more", "message"),
    [
        (["to_q", "to_queue"], {}, "'to_queue' matches no layer .*nearest are to_q"),
        (["attn1"], {}, "'attn1' matches no layer .*that can have an adapter"),
        (["norm_q"], {}, "'norm_q' matches no layer"),
        (["nothing_like_it"], {}, "it has .*to_k, to_out, to_q, to_v"),
        ("to_q", {}, "regular expression for whole names.*nearest are to_q.*A list"),
        (".*(to_q", {}, "no regular expression"),
        ([], {}, "target_modules is empty"),
        (None, {}, "target_modules is empty"),
        (["to_qkv"], {}, "exists after fuse_qkv_projections"),
        (["to_q"], {"rank_pattern": {"to_v": 2}}, "rank_pattern has 'to_v'"),
        (["to_q"], {"alpha_pattern": {"attn1.too_q": 2}}, "alpha_pattern has 'attn1.too_q'"),
        (["to_q"], {"modules_to_save": ["proj_out"]}, "modules_to_save has 'proj_out'"),
    ],
)
def test_an_unknown_target_is_named_and_changes_nothing(model, targets, more, message):
    plain = predict(model)
    with pytest.raises(ValueError, match=message):
        model.add_adapter(config(targets, **more))
    assert torch.equal(predict(model), plain)
    model.add_adapter(config(["to_q"]))  # the model is as if nothing had been tried
    assert adapted(model) == {"to_q"}


def test_another_adapter_can_be_added_after_an_error(model):
    with pytest.raises(ValueError, match=r"not found in the base model|No modules"):
        model.add_adapter(config(["to_q"], layers_to_transform=[77]))
    model.add_adapter(config(["to_q"]))


def test_whole_name_expressions_and_all_linear_layers_match(model, base):
    model.add_adapter(config(r".*attn1\.to_(k|v)"))
    assert adapted(model) == {"to_k", "to_v"}
    every = copy.deepcopy(base)
    every.add_adapter(config("all-linear"))
    assert {"to_q", "to_out", "structure_out"} < adapted(every)


# --- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["model", "pipeline", "file", "dict", "other names", "older names"])
def test_a_saved_lora_loads_into_the_pipeline_and_unloads(pipe, saved, layout):
    folder, expected = saved
    plain = predict(pipe)
    source = folder / "pipeline"
    state = load_file(source / WEIGHTS)
    if layout == "model":
        source = folder / "model"
    elif layout == "file":
        source = source / WEIGHTS
    elif layout != "dict" and layout != "pipeline":
        if layout == "other names":
            state = {k.replace("to_out.", "to_out.0."): v for k, v in state.items()}
        else:
            state = {k.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): v for k, v in state.items()}
    if layout in ("dict", "other names", "older names"):  # without metadata alpha is the rank: half the scale
        source = {k: 2 * v if k.endswith(("lora_B.weight", "up.weight")) else v for k, v in state.items()}
    pipe.load_lora_weights(source, adapter_name="mine")
    assert pipe.get_list_adapters() == {"transformer": ["mine"]} and pipe.get_active_adapters() == ["mine"]
    torch.testing.assert_close(predict(pipe), expected, rtol=1e-4, atol=1e-4)
    pipe.unload_lora_weights()
    assert torch.equal(predict(pipe), plain)
    assert pipe.get_list_adapters() == {}


def test_metadata_with_other_names_is_translated(model, saved, tmp_path):
    """Another model of Diffusers calls the layer `to_out.0`, in the file's weights and in its config alike."""
    state = load_file(saved[0] / "pipeline" / WEIGHTS)
    arguments = {"r": 4, "lora_alpha": 8, "target_modules": ["to_q", "to_out.0"]}
    VidTwinPipeline.save_lora_weights(
        tmp_path,
        {k.removeprefix("transformer.").replace("to_out.", "to_out.0."): v for k, v in state.items()},
        transformer_lora_adapter_metadata=arguments,
    )
    model.load_lora_adapter(tmp_path)
    torch.testing.assert_close(predict(model), saved[1])
    assert set(model.peft_config["default_0"].target_modules) == {"to_q", "to_out"}


@pytest.mark.parametrize(
    ("targets", "more"),
    [
        (["class_embed", "modulation.1", "net.2"], {}),
        ("all-linear", {}),
        (["to_q"], {"use_dora": True}),
        (["to_q"], {"lora_bias": True}),
        (["to_q"], {"bias": "all"}),
        (["to_q"], {"modules_to_save": ["structure_out"]}),
        (["to_q", "to_k"], {"rank_pattern": {"to_q": 2}}),
    ],
    ids=str,
)
def test_every_kind_of_lora_is_saved_and_loaded(base, targets, more, tmp_path):
    torch.manual_seed(0)
    model, other = copy.deepcopy(base), copy.deepcopy(base)
    model.add_adapter(config(targets, **more))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora" not in name:
                parameter.add_(0.1)
    model.save_lora_adapter(tmp_path)
    other.load_lora_adapter(tmp_path)
    torch.testing.assert_close(predict(other), predict(model))
    assert not close(predict(model), predict(base))


def test_loras_that_do_not_fit_are_named_and_change_nothing(pipe, saved, tmp_path):
    plain, state = predict(pipe), load_file(saved[0] / "pipeline" / WEIGHTS)
    first = next(iter(state))
    wrong = {
        "lacks; the nearest are .*attn1.to_": {k.replace("attn1", "attn"): v for k, v in state.items()},
        "of another model": {k: torch.zeros(4, 5) for k in state},
        "only one of its two matrices": {first: state[first]},
        "another component: text_encoder": {**state, "text_encoder.q.lora_A.weight": torch.zeros(1)},
        "no weights": {},
        "contain `'lora'`": {"transformer.x.weight": torch.zeros(1)},
    }
    for message, weights in wrong.items():
        with pytest.raises(ValueError, match=message):
            pipe.load_lora_weights(weights)
    save_file({"transformer.x.lora_A.weight": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="lacks"):
        pipe.load_lora_weights(tmp_path)
    assert torch.equal(predict(pipe), plain)
    assert pipe.get_list_adapters() == {}


def test_only_safetensors_are_read_and_written(pipe, saved, tmp_path):
    state = load_file(saved[0] / "pipeline" / WEIGHTS)
    torch.save(state, tmp_path / "lora.bin")
    (tmp_path / "broken.safetensors").write_text("nothing")
    for source, options in (
        (tmp_path / "lora.bin", {}),
        (tmp_path, {"weight_name": "lora.bin"}),
        (saved[0] / "pipeline", {"use_safetensors": False}),
    ):
        with pytest.raises(ValueError, match="from safetensors only"):
            pipe.load_lora_weights(source, **options)
    with pytest.raises(ValueError, match=r"not a readable \.safetensors"):
        pipe.load_lora_weights(tmp_path / "broken.safetensors")
    with pytest.raises(FileNotFoundError, match="neither a file, a folder nor"):
        pipe.load_lora_weights(tmp_path / "absent")
    with pytest.raises(ValueError, match="did you mean adapter_name"):
        pipe.load_lora_weights(state, adapter_names="mine")
    with pytest.raises(ValueError, match="as safetensors only"):
        pipe.save_lora_weights(tmp_path / "out", state, safe_serialization=False)
    pipe.load_lora_weights(state, adapter_name="mine")
    with pytest.raises(ValueError, match="as safetensors only"):
        pipe.transformer.save_lora_adapter(tmp_path / "out", "mine", safe_serialization=False)
    with pytest.raises(ValueError, match="is a file"):
        pipe.save_lora_weights(tmp_path / "lora.bin", state)
    with pytest.raises(ValueError, match="transformer_lora_layers"):
        pipe.save_lora_weights(tmp_path / "out")
    pipe.save_lora_weights(tmp_path / "out", state, is_main_process=False)
    assert not (tmp_path / "out").exists()


def test_a_model_with_an_adapter_is_not_saved_as_a_model(pipe, saved, tmp_path):
    pipe.load_lora_weights(saved[0] / "pipeline")
    with pytest.raises(ValueError, match="save_pretrained cannot save the adapter"):
        pipe.save_pretrained(tmp_path / "pipe")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.save_pretrained(tmp_path / "pipe")
    assert close(predict(VidTwinPipeline.from_pretrained(tmp_path / "pipe")), saved[1])


# --- several adapters, fusing ---------------------------------------------------------------------------------------


def test_adapters_by_name(pipe, saved):
    plain, expected = predict(pipe), saved[1]
    for name in ("a", "b"):
        pipe.load_lora_weights(saved[0] / "pipeline", adapter_name=name)
    pipe.set_adapters(["a", "b"], [0.25, 0.75])
    assert close(predict(pipe), expected)
    pipe.set_adapters("a", 0.0)
    assert close(predict(pipe), plain)
    pipe.set_adapters("a")
    pipe.disable_lora()
    assert torch.equal(predict(pipe), plain)
    pipe.enable_lora()
    assert close(predict(pipe), expected)
    for call in (pipe.set_adapters, pipe.delete_adapters, pipe.transformer.set_adapters):
        with pytest.raises(ValueError, match="c"):
            call("c")
    with pytest.raises(ValueError, match="no adapter 'c'; loaded are a, b"):
        pipe.fuse_lora(adapter_names=["c"])
    pipe.delete_adapters("a")
    assert pipe.get_list_adapters() == {"transformer": ["b"]}
    pipe.delete_adapters("b")
    assert torch.equal(predict(pipe), plain)
    pipe.load_lora_weights(saved[0] / "pipeline", adapter_name="a")
    assert torch.equal(predict(pipe), expected)


@pytest.mark.parametrize("owner", ["pipeline", "transformer"])
def test_a_lora_fused_at_any_scale_is_unfused(pipe, saved, owner):
    plain, expected = predict(pipe), saved[1]
    owner = pipe if owner == "pipeline" else pipe.transformer
    pipe.load_lora_weights(saved[0] / "pipeline", adapter_name="a")
    pipe.set_adapters("a", 0.5)
    half = predict(pipe)
    pipe.set_adapters("a")
    owner.fuse_lora(lora_scale=0.5)
    assert close(predict(pipe), half) and not close(half, expected)
    owner.fuse_lora(lora_scale=0.3)  # is there already
    for change in (pipe.set_adapters, pipe.delete_adapters):
        with pytest.raises(ValueError, match="unfuse_lora first"):
            change("a")
    owner.unfuse_lora()
    assert close(predict(pipe), expected)
    pipe.set_adapters("a", 0.0)
    assert close(predict(pipe), plain)
    for scale in (float("nan"), True):
        with pytest.raises(ValueError, match="lora_scale must be a finite number"):
            owner.fuse_lora(lora_scale=scale)


def test_a_fused_lora_stays_after_unloading(pipe, saved):
    pipe.load_lora_weights(saved[0] / "pipeline")
    pipe.fuse_lora()
    assert pipe.num_fused_loras == 1
    pipe.unload_lora_weights()
    pipe.transformer.fuse_qkv_projections()
    assert close(predict(pipe), saved[1])


# --- fused projections -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["add", "load"])
@pytest.mark.parametrize("conditioning", ["adaln", "cross_attention"])
def test_a_lora_after_fusing_projections_has_an_effect(make_transformer, how, conditioning, tmp_path):
    plain = make_transformer(class_conditioning=conditioning)
    fused, separate = copy.deepcopy(plain), copy.deepcopy(plain)
    torch.manual_seed(3)
    separate.add_adapter(config(["to_q", "to_k"]))
    expected = predict(separate)
    fused.fuse_qkv_projections()
    if how == "add":
        torch.manual_seed(3)
        fused.add_adapter(config(["to_q", "to_k"]))
    else:
        separate.save_lora_adapter(tmp_path)
        fused.load_lora_adapter(tmp_path)
    assert torch.equal(predict(fused), expected)
    assert not close(expected, predict(plain))


def test_a_lora_that_is_on_other_layers_leaves_projections_fused(model):
    model.fuse_qkv_projections()
    plain = predict(model)
    model.add_adapter(config(["to_out", "to_qkv"]))
    assert model.transformer_blocks[0].attn1.fused_projections
    assert not close(predict(model), plain)
    with pytest.raises(ValueError, match=r"would remove .*to_qkv with its adapter"):
        model.unfuse_qkv_projections()
    model.unload_lora()
    model.unfuse_qkv_projections()


def test_fusing_projections_that_have_a_lora_is_refused(model):
    model.add_adapter(config(["to_v"]))
    expected = predict(model)
    with pytest.raises(ValueError, match=r"would bypass the adapter on transformer_blocks.0.attn1.to_v"):
        model.fuse_qkv_projections()
    assert torch.equal(predict(model), expected)


# --- without peft ----------------------------------------------------------------------------------------------------


def test_without_peft_errors_are_one_sentence(pipe, saved, monkeypatch):
    monkeypatch.setattr("pipelines.lora.is_peft_available", lambda: False)
    monkeypatch.setattr("pipelines.lora_names.is_peft_available", lambda: False)
    monkeypatch.setattr("diffusers.loaders.lora_base.USE_PEFT_BACKEND", False)
    model = pipe.transformer
    for call in (
        lambda: pipe.load_lora_weights(saved[0] / "pipeline"),
        lambda: pipe.fuse_lora(),
        lambda: pipe.unfuse_lora(),
        lambda: pipe.unload_lora_weights(),
        lambda: pipe.set_adapters("a"),
        lambda: pipe.delete_adapters("a"),
        lambda: pipe.enable_lora(),
        lambda: pipe.disable_lora(),
        lambda: pipe.get_list_adapters(),
        lambda: pipe.get_active_adapters(),
        lambda: pipe.set_lora_device(["a"], "cpu"),
        lambda: model.add_adapter(None),
        lambda: model.load_lora_adapter(saved[0] / "model"),
        lambda: model.save_lora_adapter(saved[0] / "model"),
        lambda: model.set_adapters("a"),
    ):
        with pytest.raises(ImportError, match=r"^LoRA needs the package peft: pip install peft\.$"):
            call()
    model.fuse_qkv_projections()  # needs none
    model.unfuse_qkv_projections()
