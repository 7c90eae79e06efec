"""Guiders of Diffusers in place of the pipeline's guidance: predictions that they request, and what is refused."""

from __future__ import annotations

import json

import diffusers
import pytest
import torch
from diffusers import LayerSkipConfig, guiders
from tiny_text import tiny_text_encoder

from pipelines import VidTwinPipeline, default_scheduler
from pipelines.guiders import create_guider, list_guiders
from pipelines.rollout import rollout

STEPS = 4
NOISE = torch.randn(2, 176, generator=torch.Generator().manual_seed(0))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample(pipe, *args, guider=None, **options) -> torch.Tensor:
    """Generated latents, with a guider or with other options."""
    pipe.guider = guider
    settings = {"num_inference_steps": STEPS, "output_type": "latent", "generator": seeded(), **options}
    return pipe(*args, **settings).frames


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.fixture
def labels(pipe):
    """The class labels of each call of the transformer; 3 is no class."""
    seen = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _, args: seen.append(args[2].tolist()))
    yield seen
    hook.remove()


@pytest.fixture
def blocks(pipe):
    """The number of calls of each block, where a skipped block is not called."""
    calls = [0] * len(pipe.transformer.transformer_blocks)
    hooks = []
    for i, block in enumerate(pipe.transformer.transformer_blocks):
        hooks.append(block.norm1.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1)))
    yield calls
    for hook in hooks:
        hook.remove()


# --- equal to the pipeline's guidance ----------------------------------------------------------------------------


def test_classifier_free_guidance_equals_guidance_scale(pipe, labels):
    plain = sample(pipe, [0, 1], guidance_scale=3.0)
    assert labels == [[0, 1, 3, 3]] * STEPS
    labels.clear()
    guided = sample(pipe, [0, 1], guider=guiders.ClassifierFreeGuidance(guidance_scale=3.0))
    assert labels == [[0, 1], [3, 3]] * STEPS
    assert close(guided, plain) and not close(plain, sample(pipe, [0, 1], guidance_scale=1.0))
    assert torch.equal(sample(pipe, [0, 1], guidance_scale=3.0), plain)


def test_it_equals_guidance_scale_without_precomputed_modulations(pipe, monkeypatch):
    plain = sample(pipe, [0, 1], guidance_scale=3.0)
    monkeypatch.setattr(VidTwinPipeline, "prepare_modulations", lambda *_: None)
    assert close(sample(pipe, [0, 1], guider=guiders.ClassifierFreeGuidance(guidance_scale=3.0)), plain)


@pytest.mark.parametrize("num_classes", [None, 3])
def test_it_equals_guidance_scale_with_prompts(vae, make_transformer, num_classes):
    encoder = tiny_text_encoder()
    model = make_transformer(caption_channels=16, num_classes=num_classes)
    pipe = VidTwinPipeline(vae, model, default_scheduler(), text_encoder=encoder.model, tokenizer=encoder.tokenizer)
    pipe.set_progress_bar_config(disable=True)
    guider = guiders.ClassifierFreeGuidance(guidance_scale=3.0)
    for options in (
        {"prompt": ["a red disc", "a very large blue star spins"]},
        {"prompt": "a disc", "negative_prompt": "a very large blue star spins", "num_videos_per_prompt": 2},
        {"structure_prompt": "a red disc", "dynamics_prompt": "orbits"},
    ):
        plain = sample(pipe, guidance_scale=3.0, **options)
        assert close(sample(pipe, guider=guider, **options), plain)
        assert not close(sample(pipe, guidance_scale=1.0, **options), plain)


@pytest.mark.parametrize(
    "overrides",
    [{"self_conditioning": True}, {"image_conditioning": True}, {"interval_conditioning": True}, {}],
    ids=["self", "image", "interval", "stream"],
)
def test_it_equals_guidance_scale_with_every_condition(vae, make_transformer, overrides):
    few = "interval_conditioning" in overrides
    scheduler = default_scheduler("flow_prediction") if few else default_scheduler()
    pipe = VidTwinPipeline(vae, make_transformer(**overrides), scheduler)
    pipe.set_progress_bar_config(disable=True)
    clip = torch.rand(1, 1, 3, 32, 32, generator=seeded(1))
    options = {"image": clip} if "image_conditioning" in overrides else {}
    options = options if overrides else {"structure": clip, "structure_strength": 0.5}
    plain = sample(pipe, [0, 1], guidance_scale=3.0, **options)
    guider = guiders.ClassifierFreeGuidance(guidance_scale=3.0)
    assert close(sample(pipe, [0, 1], guider=guider, **options), plain)
    assert not close(sample(pipe, [0, 1], guidance_scale=1.0, **options), plain)


def test_rollouts_take_the_guider_of_the_pipeline(pipe):
    options = {"num_inference_steps": 2, "class_labels": 0}
    plain = rollout(pipe, 6, guidance_scale=3.0, generator=seeded(), **options)
    pipe.guider = guiders.ClassifierFreeGuidance(guidance_scale=3.0)
    torch.testing.assert_close(rollout(pipe, 6, generator=seeded(), **options), plain, atol=1e-4, rtol=1e-4)


# --- predictions per step ------------------------------------------------------------------------------------------


def test_steps_outside_the_interval_have_one_prediction(pipe, labels):
    guider = guiders.ClassifierFreeGuidance(guidance_scale=3.0, start=0.25, stop=0.75)
    middle = sample(pipe, 0, guider=guider)
    assert labels == [[0], *[[0], [3]] * 2, [0]]
    assert not close(middle, sample(pipe, 0, guidance_scale=3.0))
    labels.clear()
    guider.disable()
    assert close(sample(pipe, 0, guider=guider), sample(pipe, 0, guidance_scale=1.0))
    assert labels == [[0]] * 2 * STEPS


VARIANTS = {
    "AdaptiveProjectedGuidance": {"eta": 0.0},
    "AdaptiveProjectedMixGuidance": {"adaptive_projected_guidance_start_step": 1},
    "ClassifierFreeZeroStarGuidance": {},
    "MagnitudeAwareGuidance": {},
    "TangentialClassifierFreeGuidance": {},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_classifier_free_guidance(pipe, labels, name):
    guider = create_guider(name, {"guidance_scale": 3.0, **VARIANTS[name]})
    guided = sample(pipe, [0, 1], guider=guider)
    assert labels == [[0, 1], [3, 3]] * STEPS
    assert guided.isfinite().all() and not close(guided, sample(pipe, [0, 1], guidance_scale=3.0))
    assert close(guided[:1], sample(pipe, 0, guider=guider, latents=NOISE[:1])), "videos do not depend on each other"
    assert close(guided, sample(pipe, [0, 1], guider=guider, latents=NOISE))


def test_momentum_starts_anew_in_every_call(pipe):
    guider = guiders.AdaptiveProjectedGuidance(guidance_scale=3.0, adaptive_projected_guidance_momentum=-0.5)
    assert torch.equal(sample(pipe, 0, guider=guider), sample(pipe, 0, guider=guider))


def test_projected_guidance_without_projection_is_classifier_free_guidance(pipe):
    guider = guiders.AdaptiveProjectedGuidance(
        guidance_scale=3.0, eta=1.0, adaptive_projected_guidance_rescale=0.0, adaptive_projected_guidance_momentum=None
    )
    assert close(sample(pipe, 0, guider=guider), sample(pipe, 0, guidance_scale=3.0))


# --- guiders that weaken the transformer ---------------------------------------------------------------------------


def test_autoguidance_skips_layers_of_the_unconditional_prediction(pipe, labels, blocks):
    guider = guiders.AutoGuidance(guidance_scale=3.0, auto_guidance_layers=[0], dropout=1.0)
    guided = sample(pipe, 0, guider=guider)
    assert labels == [[0], [3]] * STEPS
    assert blocks == [STEPS, *[2 * STEPS] * (len(blocks) - 1)]
    assert not close(guided, sample(pipe, 0, guidance_scale=3.0))


def test_autoguidance_guides_an_unconditional_model(vae, make_transformer):
    pipe = VidTwinPipeline(vae, make_transformer(num_classes=None), default_scheduler())
    pipe.set_progress_bar_config(disable=True)
    plain = sample(pipe)
    assert close(sample(pipe, guider=guiders.ClassifierFreeGuidance(3.0)), plain)
    config = LayerSkipConfig(indices=[0, 1])
    assert not close(sample(pipe, guider=guiders.AutoGuidance(3.0, auto_guidance_config=config)), plain)


def test_skip_layer_guidance_adds_a_prediction(pipe, labels, blocks):
    options = {"skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 0.75}
    guider = guiders.SkipLayerGuidance(guidance_scale=3.0, skip_layer_guidance_layers=[1], **options)
    guided = sample(pipe, 0, guider=guider)
    assert labels == [[0], [3], *[[0], [3], [0]] * 2, [0], [3]], "steps after start and before stop"
    assert blocks[0] - blocks[1] == 2
    assert not close(guided, sample(pipe, 0, guidance_scale=3.0))


def test_skip_layer_guidance_alone_has_two_predictions(pipe, labels, blocks):
    options = {"skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 0.75}
    guider = guiders.SkipLayerGuidance(guidance_scale=1.0, skip_layer_guidance_layers=1, **options)
    guided = sample(pipe, 0, guider=guider)
    assert labels == [[0], *[[0], [0]] * 2, [0]]
    assert blocks[0] - blocks[1] == 2
    assert not close(guided, sample(pipe, 0, guidance_scale=1.0))


@pytest.mark.parametrize("layers", [0, [0, 1]], ids=str)
def test_perturbed_attention_guidance(pipe, layers):
    options = {"perturbed_guidance_start": 0.0, "perturbed_guidance_stop": 1.0, "perturbed_guidance_layers": layers}
    guider = guiders.PerturbedAttentionGuidance(guidance_scale=3.0, **options)
    assert not close(sample(pipe, 0, guider=guider), sample(pipe, 0, guidance_scale=3.0))


def test_attention_alone_can_be_skipped(pipe, blocks):
    config = LayerSkipConfig(indices=[0], skip_ff=False)
    guided = sample(pipe, 0, guider=guiders.AutoGuidance(3.0, auto_guidance_config=config))
    assert blocks == [2 * STEPS] * len(blocks) and not close(guided, sample(pipe, 0, guidance_scale=3.0))


def test_the_transformer_is_unchanged_after_a_call_and_after_an_error(pipe, monkeypatch):
    plain = sample(pipe, 0, guidance_scale=1.0)
    guider = guiders.AutoGuidance(guidance_scale=3.0, auto_guidance_layers=[0], dropout=1.0)
    sample(pipe, 0, guider=guider)
    assert torch.equal(sample(pipe, 0, guidance_scale=1.0), plain)

    def fail(_, args):
        if args[2].tolist() == [3]:
            raise RuntimeError("out of memory")

    hook = pipe.transformer.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        sample(pipe, 0, guider=guider)
    hook.remove()
    assert torch.equal(sample(pipe, 0, guidance_scale=1.0), plain)


# --- saving --------------------------------------------------------------------------------------------------------


def test_a_guider_is_a_component_that_is_saved(pipe, tmp_path):
    guider = guiders.AutoGuidance(guidance_scale=3.0, auto_guidance_layers=[0], dropout=1.0)
    guided = VidTwinPipeline(**pipe.components | {"guider": guider}, **pipe.parameters)
    guided.set_progress_bar_config(disable=True)
    guided.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["guider"] == ["diffusers", "AutoGuidance"]
    loaded = VidTwinPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    expected = sample(pipe, 0, guider=guider)
    assert torch.equal(sample(loaded, 0, guider=loaded.guider), expected)
    assert torch.equal(sample(VidTwinPipeline.from_pipe(guided), 0, guider=guider), expected)
    plain = VidTwinPipeline.from_pretrained(tmp_path, guider=None)
    assert plain.guider is None


def test_a_pipeline_without_a_guider_loads_with_and_without_its_entry(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index.pop("guider") == [None, None]  # earlier versions wrote none
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert VidTwinPipeline.from_pretrained(tmp_path).guider is None


# --- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 3.0},
        {"guidance_interval": (0.2, 0.8)},
        {"history_noise": 0.1, "history_guidance_scale": 2.0},
    ],
    ids=str,
)
def test_guidance_and_a_guider_exclude_each_other(pipe, options):
    with pytest.raises(ValueError, match=f"{list(options)[-1]} and a guider exclude each other"):
        sample(pipe, 0, guider=guiders.ClassifierFreeGuidance(), **options)


def test_guiders_that_do_not_fit_are_refused(pipe, vae, transformer):
    with pytest.raises(ValueError, match=r"guider must be an instance of a class of diffusers\.guiders, not 3\.0"):
        VidTwinPipeline(vae, transformer, default_scheduler(), guider=3.0)
    with pytest.raises(ValueError, match="SmoothedEnergyGuidance blurs a square grid of tokens"):
        sample(pipe, 0, guider=guiders.SmoothedEnergyGuidance(seg_guidance_layers=[0]))
    for layers in ([7], [], ["a"]):
        config = LayerSkipConfig(indices=layers)
        with pytest.raises(ValueError, match="layers of AutoGuidance must be in 0 to 1"):
            sample(pipe, 0, guider=guiders.AutoGuidance(auto_guidance_config=config))


def test_perturbed_attention_in_half_precision_requires_the_attention_of_pytorch(vae, make_transformer):
    pipe = VidTwinPipeline(vae, make_transformer().to(torch.bfloat16), default_scheduler())
    pipe.set_progress_bar_config(disable=True)
    options = {"perturbed_guidance_start": 0.0, "perturbed_guidance_stop": 1.0, "perturbed_guidance_layers": [0]}
    perturbed = guiders.PerturbedAttentionGuidance(guidance_scale=3.0, **options)
    with pytest.raises(ValueError, match=r"does not call in torch\.bfloat16 on cpu: call its set_attention_backend"):
        sample(pipe, 0, guider=perturbed)
    pipe.transformer.set_attention_backend("native")
    difference = sample(pipe, 0, guider=perturbed) - sample(pipe, 0, guidance_scale=3.0)
    assert difference.abs().mean() > 0.1


def test_a_guider_and_a_cache_exclude_each_other(pipe):
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    try:
        with pytest.raises(ValueError, match="call disable_cache"):
            sample(pipe, 0, guider=guiders.ClassifierFreeGuidance())
    finally:
        pipe.transformer.disable_cache()


def test_guiders_by_name():
    assert {"AdaptiveProjectedGuidance", "AutoGuidance", "ClassifierFreeGuidance"} <= set(list_guiders())
    assert not {"BaseGuidance", "LTX2Guidance", "SmoothedEnergyGuidance"} & set(list_guiders())
    guider = create_guider("ClassifierFreeGuidance", {"guidance_scale": 2, "stop": 0.5})
    assert (guider.guidance_scale, guider.config.stop) == (2, 0.5)
    for name, options, message in (
        ("CFG", {}, "must be one of AdaptiveProjectedGuidance, .* not CFG"),
        ("LTX2Guidance", {}, "only the transformer of LTX-2 has"),
        ("ClassifierFreeGuidance", {"scale": 2}, "has no option scale, only guidance_scale, "),
        ("ClassifierFreeGuidance", {"guidance_scale": "much"}, "guidance_scale of .* must be a number, not 'much'"),
        ("ClassifierFreeGuidance", {"stop": 2.0}, "between 0.0 and 1.0"),
        ("AutoGuidance", {}, "auto_guidance_layers"),
    ):
        with pytest.raises(ValueError, match=message):
            create_guider(name, options)
