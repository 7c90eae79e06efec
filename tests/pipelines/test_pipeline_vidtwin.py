from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers.callbacks import PipelineCallback

from autoencoder import AutoencoderKLVidTwin
from pipelines import VidTwinPipeline, default_scheduler
from pipelines.schedulers import other_solver

ROOT = Path(__file__).parents[2]
STEPS = 3


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample(pipe, *args, **kwargs):
    """Generated latents, or what `output_type` says."""
    settings = {"num_inference_steps": STEPS, "output_type": "latent", "generator": seeded(), **kwargs}
    return pipe(*args, **settings).frames


@pytest.fixture
def batch_sizes(pipe):
    """The sizes of the batches the transformer is given."""
    sizes = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    yield sizes
    hook.remove()


@pytest.fixture
def modulated(pipe, monkeypatch):
    """Numbers of rows of precomputed modulations, in turn."""
    rows, modulations = [], pipe.transformer.modulations

    def counted(timestep, class_labels=None, target_timestep=None):
        rows.append(len(timestep))
        return modulations(timestep, class_labels, target_timestep)

    monkeypatch.setattr(pipe.transformer, "modulations", counted)
    return rows


# --- outputs -------------------------------------------------------------------------------------------------------


def test_output_types_agree(pipe):
    channels, frames, height, width = pipe.vae.clip_shape
    latent = sample(pipe, ["Biking", 2])
    assert latent.shape == (2, pipe.vae.latent_size)

    clip = pipe.vae.decode(latent).sample
    expected = (clip / 2 + 0.5).clamp(0, 1).permute(0, 2, 1, 3, 4).detach()
    tensor = sample(pipe, ["Biking", 2], output_type="pt")
    assert tensor.shape == (2, frames, channels, height, width)
    torch.testing.assert_close(tensor, expected)

    array = sample(pipe, ["Biking", 2], output_type="np")
    assert array.shape == (2, frames, height, width, channels)
    np.testing.assert_allclose(array, expected.permute(0, 1, 3, 4, 2).numpy())

    images = sample(pipe, ["Biking", 2], output_type="pil")
    assert [len(video) for video in images] == [frames, frames]
    assert isinstance(images[0][0], PIL.Image.Image)
    assert images[0][0].size == (width, height)
    assert np.abs(np.asarray(images[1][3]) / 255 - array[1, 3]).max() <= 0.5 / 255 + 1e-6


def test_latents_are_denormalized(pipe, vae):
    raw = AutoencoderKLVidTwin.from_config(vae.config, latents_mean=None, latents_std=None).eval()
    plain = VidTwinPipeline(raw, pipe.transformer, pipe.scheduler)
    plain.set_progress_bar_config(disable=True)
    normal, latent = vae.unpack(sample(plain, 0)), vae.unpack(sample(pipe, 0))
    torch.testing.assert_close(latent.structure, normal.structure * 2.0 + 0.1)
    torch.testing.assert_close(latent.dynamics, normal.dynamics * 0.5 - 0.2)


def test_return_dict(pipe):
    output = pipe(0, num_inference_steps=1, output_type="latent", return_dict=False, generator=seeded())
    assert isinstance(output, tuple)
    assert output[0].shape == (1, pipe.vae.latent_size)


def test_default_output_is_images(pipe):
    assert isinstance(pipe(0, num_inference_steps=1).frames[0][0], PIL.Image.Image)


# --- seeds and batches ---------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_video(pipe):
    assert torch.equal(sample(pipe, [0, 1]), sample(pipe, [0, 1]))
    assert not torch.equal(sample(pipe, [0, 1]), sample(pipe, [0, 1], generator=seeded(1)))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_list_of_generators_gives_what_each_gives_alone(pipe, eta):
    together = sample(pipe, [0, 2], generator=[seeded(5), seeded(6)], eta=eta)
    alone = [sample(pipe, label, generator=seeded(seed), eta=eta) for label, seed in ((0, 5), (2, 6))]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_num_videos_per_prompt_keeps_a_class_together(pipe):
    noise = torch.randn(4, pipe.vae.latent_size, generator=seeded())
    grouped = sample(pipe, ["Biking", "Diving"], num_videos_per_prompt=2, latents=noise)
    listed = sample(pipe, [0, 0, 1, 1], latents=noise)
    torch.testing.assert_close(grouped, listed)
    assert not torch.allclose(grouped[0], grouped[1])


def test_latents_are_the_initial_noise(pipe):
    noise = torch.randn(1, pipe.vae.latent_size, generator=seeded(7))
    torch.testing.assert_close(sample(pipe, 0, latents=noise), sample(pipe, 0, generator=seeded(7)))


# --- classes and guidance ------------------------------------------------------------------------------------------


def test_classes_by_name_and_by_id(pipe):
    assert pipe.labels == {"Biking": 0, "Diving": 1, "Yo Yo": 2}
    assert pipe.get_label_ids(["Yo Yo", 1, "Biking"]) == [2, 1, 0]
    assert pipe.get_label_ids("Diving") == [1]
    assert torch.equal(sample(pipe, "Diving"), sample(pipe, [1]))
    assert not torch.allclose(sample(pipe, "Diving"), sample(pipe, "Biking"))


def test_subclasses_by_name(pipe_of_kinds):
    assert pipe_of_kinds.labels == {"jump": 0, "run": 1} and pipe_of_kinds.class_ids == [0, 1]
    assert pipe_of_kinds.subclasses == {"jump/cat": 3, "jump/dog": 2, "run/dog": 4}
    assert pipe_of_kinds.get_label_ids(["jump/dog", "run", 3]) == [2, 1, 3]
    with pytest.raises(ValueError, match=r"did you mean 'jump/dog'\? `labels` lists all 2 and `subclasses` 3 more"):
        pipe_of_kinds.get_label_ids("jumps/dog")


def test_each_video_of_a_class_is_of_a_random_subclass(pipe_of_kinds):
    """The generator draws one per video; a subclass is unchanged."""
    noise = torch.randn(12, pipe_of_kinds.vae.latent_size, generator=seeded())
    drawn = pipe_of_kinds.draw_subclasses([0] * 12, seeded(3))
    assert set(drawn) == {2, 3} and drawn == pipe_of_kinds.draw_subclasses([0] * 12, seeded(3))
    made = sample(pipe_of_kinds, "jump", num_videos_per_prompt=12, latents=noise, generator=seeded(3))
    assert torch.equal(made, sample(pipe_of_kinds, drawn, latents=noise))
    assert not torch.equal(made, sample(pipe_of_kinds, "jump", num_videos_per_prompt=12, latents=noise))
    assert pipe_of_kinds.draw_subclasses([2, 1, 4], [seeded(i) for i in range(3)]) == [2, 4, 4]
    with pytest.raises(ValueError, match="1 generators were passed for 3 videos"):
        sample(pipe_of_kinds, [0, 0, 0], generator=[seeded(0)])
    together = sample(pipe_of_kinds, [0, 0, 0], generator=[seeded(i) for i in range(3)])
    alone = torch.cat([sample(pipe_of_kinds, "jump", generator=seeded(i)) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_conditioned_videos_keep_the_class(pipe_of_kinds, monkeypatch):
    """The conditioning determines the subclass."""
    seen = []
    forward = pipe_of_kinds.transformer.forward
    monkeypatch.setattr(
        pipe_of_kinds.transformer,
        "forward",
        lambda latents, timestep, labels, *rest, **more: (
            seen.extend(labels.tolist()) or forward(latents, timestep, labels, *rest, **more)
        ),
    )
    clip = torch.rand(1, *pipe_of_kinds.vae.clip_shape).transpose(1, 2)
    sample(pipe_of_kinds, "jump", structure=clip)
    assert set(seen) == {0, 5}  # and no class, for guidance
    seen.clear()
    sample(pipe_of_kinds, "run")
    assert set(seen) == {4, 5}


def test_guidance_doubles_the_batch_and_changes_the_video(pipe, batch_sizes):
    guided = sample(pipe, [0, 1], guidance_scale=4.0)
    assert batch_sizes == [4] * STEPS
    batch_sizes.clear()
    plain = sample(pipe, [0, 1], guidance_scale=1.0)
    assert batch_sizes == [2] * STEPS
    assert not torch.allclose(guided, plain)


SOLVED_BY = {
    "ddim": lambda: default_scheduler(),
    "flow": lambda: default_scheduler("flow_prediction"),
    "dpm++": lambda: other_solver(default_scheduler(), diffusers.DPMSolverMultistepScheduler),
}


@pytest.mark.parametrize("solver", SOLVED_BY)
def test_guidance_acts_in_an_interval_of_noise_levels(pipe, batch_sizes, solver):
    pipe.scheduler = SOLVED_BY[solver]()

    def latents(**settings):
        batch_sizes.clear()
        return sample(pipe, [0, 1], guidance_scale=4.0, num_inference_steps=4, **settings)

    always = latents()
    assert torch.equal(latents(guidance_interval=(0.0, 1.0)), always) and batch_sizes == [4, 4, 4, 4]
    never = latents(guidance_interval=(0.6, 0.6))
    assert batch_sizes == [2, 2, 2, 2]
    assert torch.equal(sample(pipe, [0, 1], guidance_scale=1.0, num_inference_steps=4), never)
    middle = latents(guidance_interval=(0.3, 0.8))
    assert batch_sizes == [2, 4, 4, 2]
    assert not torch.allclose(middle, always) and not torch.allclose(middle, never)
    torch.testing.assert_close(latents(guidance_interval=(0.9, 1.0)), latents(guidance_interval=(0.8, 1.0)))
    assert batch_sizes == [4, 2, 2, 2]


def test_a_step_outside_the_interval_is_conditional(pipe):
    given = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _, args: given.append(args[2].tolist()))
    sample(pipe, [0, 1], guidance_scale=4.0, num_inference_steps=2, guidance_interval=(0.0, 0.5))
    hook.remove()
    assert given == [[0, 1], [0, 1, 3, 3]]


@pytest.mark.parametrize("interval", [(0.5, 0.4), (-0.1, 1.0), (0.0, 1.1), (0.5,), (float("nan"), 1.0)])
def test_invalid_guidance_intervals_are_refused(pipe, interval):
    with pytest.raises(ValueError, match="guidance_interval must be"):
        sample(pipe, 0, guidance_interval=interval)


def test_temperature_is_a_factor_on_the_noise(pipe):
    noise = torch.randn(2, pipe.transformer.latent_size)
    expected = sample(pipe, [0, 1], latents=0.4 * noise)
    assert torch.equal(sample(pipe, [0, 1], latents=noise, temperature=0.4), expected)
    assert torch.equal(sample(pipe, [0, 1], latents=noise), sample(pipe, [0, 1], latents=noise, temperature=1.0))
    a, b = (sample(pipe, 0, temperature=0.0, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    assert torch.equal(a, b)


@pytest.mark.parametrize("temperature", [-0.1, float("nan"), float("inf"), "hot", None])
def test_invalid_temperatures_are_refused(pipe, temperature):
    with pytest.raises(ValueError, match="temperature must be"):
        sample(pipe, 0, temperature=temperature)


def test_no_class_is_one_unguided_video(pipe, batch_sizes):
    free = sample(pipe)
    assert batch_sizes == [1] * STEPS
    assert not torch.allclose(free, sample(pipe, 0, guidance_scale=1.0))


def test_an_unconditional_model(vae, make_transformer):
    pipe = VidTwinPipeline(vae, make_transformer(num_classes=None), default_scheduler())
    pipe.set_progress_bar_config(disable=True)
    assert sample(pipe, num_videos_per_prompt=2).shape == (2, vae.latent_size)
    with pytest.raises(ValueError, match="unconditional"):
        sample(pipe, 0)


def test_self_conditioning_shows_the_previous_estimate(vae, make_transformer):
    pipe = VidTwinPipeline(vae, make_transformer(self_conditioning=True), default_scheduler())
    pipe.set_progress_bar_config(disable=True)
    estimates, predictions = [], []
    pipe.transformer.register_forward_pre_hook(lambda _, args: estimates.append(args[3]))
    pipe.transformer.register_forward_hook(lambda _, args, output: predictions.append(output[0]))
    sample(pipe, 0, guidance_scale=1.0)
    assert estimates[0] is None
    for previous, estimate in zip(predictions, estimates[1:], strict=False):
        torch.testing.assert_close(estimate, previous)  # x0 prediction: the estimate is the prediction


def test_a_bfloat16_transformer_gets_bfloat16_inputs(vae, make_transformer):
    half = make_transformer().to(torch.bfloat16)
    pipe = VidTwinPipeline(vae, half, default_scheduler())
    pipe.set_progress_bar_config(disable=True)
    seen = []
    half.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    assert sample(pipe, 0).dtype == torch.float32
    assert set(seen) == {torch.bfloat16}


# --- schedulers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DPMSolverMultistepScheduler,
        diffusers.UniPCMultistepScheduler,
        diffusers.EulerDiscreteScheduler,
        diffusers.DDPMScheduler,
    ],
)
def test_other_schedulers_from_the_same_config(pipe, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    assert sample(pipe, 0, output_type="pt").isfinite().all()


def test_flow_matching(pipe):
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    seen = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _, args: seen.append(args[1][0].item()))
    sample(pipe, 0, sigmas=[1.0, 0.5])
    hook.remove()
    assert seen == [1000.0, 500.0]
    assert pipe.num_timesteps == 2


# --- callbacks -----------------------------------------------------------------------------------------------------


def test_callbacks_see_and_change_latents(pipe):
    seen = []

    def callback(pipeline, step, timestep, tensors):
        seen.append((step, int(timestep), tensors["latents"].shape, pipeline.num_timesteps))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == STEPS - 1 else {}

    latent = pipe.vae.unpack(sample(pipe, 0, callback_on_step_end=callback))
    shape = torch.Size((1, pipe.vae.latent_size))
    assert seen == [(i, int(t), shape, STEPS) for i, t in enumerate(pipe.scheduler.timesteps)]
    assert torch.allclose(latent.structure, torch.tensor(0.1))  # zero, denormalized
    assert torch.allclose(latent.dynamics, torch.tensor(-0.2))


def test_a_callback_can_interrupt(pipe, batch_sizes):
    def callback(pipeline, step, timestep, tensors):
        pipeline._interrupt = step == 1
        return tensors

    sample(pipe, 0, callback_on_step_end=callback, num_inference_steps=6)
    assert len(batch_sizes) == 2
    sample(pipe, 0, num_inference_steps=6)
    assert len(batch_sizes) == 2 + 6  # the next call starts afresh


def test_a_diffusers_callback_can_end_guidance(pipe, batch_sizes):
    class EndGuidance(PipelineCallback):
        tensor_inputs = ["latents"]

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            pipeline._guidance_scale = 0.0
            return callback_kwargs

    sample(pipe, 0, callback_on_step_end=EndGuidance())
    assert batch_sizes == [2, 1, 1]


# --- saving --------------------------------------------------------------------------------------------------------


def test_a_saved_pipeline_is_bit_equal_in_a_fresh_process(pipe, tmp_path):
    """Loaded by a script that imports only `pipelines`."""
    pipe.save_pretrained(tmp_path / "pipeline")
    index = json.loads((tmp_path / "pipeline" / "model_index.json").read_text())
    assert index["_class_name"] == "VidTwinPipeline"
    assert index["vae"] == ["autoencoder.autoencoder_kl_vidtwin", "AutoencoderKLVidTwin"]
    assert index["transformer"] == ["pipelines.transformer_vidtwin", "VidTwinTransformer3DModel"]
    assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert index["id2label"] == {"0": "Biking", "1": "Diving", "2": "Yo Yo"}

    script = tmp_path / "generate.py"
    script.write_text(
        "import pipelines\n"
        "pipe = pipelines.VidTwinPipeline.from_pretrained('pipeline')\n"
        "import torch\n"
        "torch.set_num_threads(1)\n"
        "generator = torch.Generator().manual_seed(0)\n"
        f"frames = pipe('Diving', num_inference_steps={STEPS}, generator=generator, output_type='pt').frames\n"
        "import sys\n"
        "torch.save({'frames': frames, 'labels': pipe.labels, 'modules': list(sys.modules)}, 'out.pt')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, check=True, capture_output=True)
    saved = torch.load(tmp_path / "out.pt", weights_only=True)
    assert torch.equal(saved["frames"], sample(pipe, "Diving", output_type="pt"))
    assert saved["labels"] == pipe.labels
    unneeded = {"vidgen", "av", "matplotlib", "omegaconf", "pandas", "rich", "torchmetrics", "torchvision"}
    assert not unneeded & set(saved["modules"]), "imported for nothing"


def test_from_pipe_keeps_labels(pipe):
    assert VidTwinPipeline.from_pipe(pipe).labels == pipe.labels


def test_components_make_a_second_pipeline(pipe):
    again = VidTwinPipeline(**pipe.components, **pipe.parameters)
    assert again.labels == pipe.labels


def test_importing_the_pipeline_registers_its_text_encoder():
    code = (
        "from pipelines import VidTwinPipeline\n"
        "from transformers import AutoConfig\n"
        "AutoConfig.for_model('bag_of_words')\n"
    )
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)


def test_the_package_imports_lazily():
    code = "import sys, pipelines; sys.exit(any(m in sys.modules for m in ('torch', 'diffusers')))"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)


# --- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": "Bikin"}, "did you mean 'Biking'"),
        ({"class_labels": ["Biking", "yo yo"]}, "did you mean 'Yo Yo'"),
        ({"class_labels": 3}, "classes 0 to 2"),
        ({"class_labels": [-1]}, "classes 0 to 2"),
        ({"class_labels": []}, "at least one class"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"eta": 1.5}, "between 0 and 1"),
        ({"output_type": "gif"}, "pil, np, pt, latent"),
        ({"latents": torch.zeros(1, 5)}, r"\(1, 176\)"),
        ({"generator": [seeded(), seeded()]}, "2 generators were passed for 1 videos"),
        ({"generator": [seeded(), seeded()], "latents": torch.zeros(1, 176)}, "2 generators"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "prompt_embeds"),
    ],
)
def test_mistakes_are_named(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(**{"class_labels": 0, **arguments})


def test_a_pipeline_without_id2label_has_no_names(vae, transformer):
    with pytest.raises(ValueError, match="no id2label; use 0 to 2"):
        VidTwinPipeline(vae, transformer, default_scheduler()).get_label_ids("Biking")


def test_incompatible_components_are_refused(vae, transformer, make_transformer):
    with pytest.raises(ValueError, match=r"dynamics latents \(8, 4, 8\)"):
        VidTwinPipeline(vae, make_transformer(dynamics_shape=(8, 4, 8)), default_scheduler())
    with pytest.raises(ValueError, match="'Walking' as 3"):
        VidTwinPipeline(vae, transformer, default_scheduler(), id2label={3: "Walking"})


# --- work that is done once for all steps --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        {"class_labels": 0, "guidance_scale": 3.0},
        {"class_labels": [0, 2], "guidance_scale": 3.0, "guidance_interval": (0.3, 0.7)},
        {"class_labels": 1, "guidance_scale": 1.0},
        {"num_videos_per_prompt": 2},
    ],
    ids=["guided", "interval", "unguided", "no class"],
)
def test_precomputed_modulations_change_nothing(pipe, modulated, monkeypatch, how):
    kept = sample(pipe, **how)
    videos = 2 if kept.shape[0] == 2 else 1
    assert modulated == [STEPS * 2 * videos]
    monkeypatch.setattr(VidTwinPipeline, "prepare_modulations", lambda *_: None)
    torch.testing.assert_close(sample(pipe, **how), kept, atol=1e-5, rtol=1e-5)


def test_guidance_enabled_by_a_callback_has_modulations(pipe, modulated, batch_sizes):
    def begin(pipeline, step, timestep, tensors):
        pipeline._guidance_scale = 4.0
        return tensors

    sample(pipe, 0, guidance_scale=1.0, callback_on_step_end=begin)
    assert batch_sizes == [1, 2, 2] and modulated == [STEPS * 2]


def test_modulations_are_precomputed_only_if_smaller_than_the_weights(pipe, modulated):
    width = pipe.transformer.config.num_attention_heads * pipe.transformer.config.attention_head_dim
    sample(pipe, 0, num_inference_steps=width // 4)
    assert modulated == [width // 2]
    sample(pipe, 0, num_inference_steps=width // 4 + 1)
    assert modulated == [width // 2]
