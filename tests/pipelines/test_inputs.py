"""Arguments of the pipeline in several types, and types that are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipelines.rollout import rollout

NAN = float("nan")


def generate(pipe, **kwargs):
    generator = torch.Generator().manual_seed(0)
    settings = {"class_labels": [0, 2], "num_inference_steps": 2, "output_type": "latent", "generator": generator}
    return pipe(**{**settings, **kwargs}).frames


@pytest.mark.parametrize(
    "labels",
    [(0, "Yo Yo"), torch.tensor([0, 2]), np.array([0, 2]), [np.int64(0), torch.tensor(2)], ["Biking", 2]],
    ids=str,
)
def test_labels_in_any_form(pipe, labels):
    assert torch.equal(generate(pipe, class_labels=labels), generate(pipe))


def test_one_label_as_a_tensor_is_one_video(pipe):
    assert torch.equal(generate(pipe, class_labels=torch.tensor(1)), generate(pipe, class_labels=1))


@pytest.mark.parametrize("label", [True, 1.0, 1.7, NAN, b"Biking", [0], None, torch.tensor([0, 1])], ids=str)
def test_a_label_is_a_name_or_a_whole_number(pipe, label):
    with pytest.raises(ValueError, match="must be a name or a whole number"):
        pipe.get_label_ids([label])


def test_generators_can_be_a_tuple_but_not_a_seed(pipe):
    made = [
        generate(pipe, generator=kind(torch.Generator().manual_seed(i) for i in range(2))) for kind in (list, tuple)
    ]
    assert torch.equal(*made)
    for seed in (0, [0, 1]):
        with pytest.raises(ValueError, match=r"generator must be a torch\.Generator.*manual_seed"):
            generate(pipe, generator=seed)


@pytest.mark.parametrize("name", ["num_inference_steps", "num_videos_per_prompt"])
@pytest.mark.parametrize("value", [True, 2.0, 2.5, NAN, "2", None])
def test_counts_are_whole_numbers(pipe, name, value):
    with pytest.raises(ValueError, match=f"{name} must be a whole number, not"):
        generate(pipe, **{name: value})


@pytest.mark.parametrize("name", ["guidance_scale", "eta", "structure_strength", "dynamics_strength"])
@pytest.mark.parametrize("value", [True, "3", None, [False, 1.0]])
def test_scales_are_numbers(pipe, name, value):
    if name == "guidance_scale" and value is None:
        return  # the default
    with pytest.raises(ValueError, match=f"{name} must be a number, not"):
        generate(pipe, **{name: value})


@pytest.mark.parametrize("value", [3, np.float32(3), torch.tensor(3.0), [3.0, 3.0]], ids=str)
def test_scales_can_be_numbers_of_any_type(pipe, value):
    torch.testing.assert_close(generate(pipe, guidance_scale=value), generate(pipe, guidance_scale=3.0))


def test_intervals_and_frames(pipe):
    for interval, message in ((0.5, r"must be \(lower, upper\)"), ((True, 1), "must be a number")):
        with pytest.raises(ValueError, match=f"guidance_interval {message}"):
            generate(pipe, guidance_interval=interval)
    for frames in ([0.5], [True], (0, NAN)):
        with pytest.raises(ValueError, match="kept_frames must be whole numbers"):
            generate(pipe, kept_frames=frames)


@pytest.mark.parametrize("options", [{"num_frames": 8.0}, {"num_frames": True}, {"overlap": True}, {"overlap": NAN}])
def test_roll_outs_have_whole_numbers_of_frames(pipe, options):
    [name] = options
    with pytest.raises(ValueError, match=f"{name} must be a whole number"):
        rollout(pipe, **{"num_frames": 8, "class_labels": 0, **options})


def test_a_callback_returns_a_dict(pipe):
    with pytest.raises(ValueError, match="callback_on_step_end must return a dict of tensors, not NoneType"):
        generate(pipe, callback_on_step_end=lambda *_: None)
    assert torch.equal(generate(pipe, callback_on_step_end=lambda *_: {}), generate(pipe))


def test_options_of_the_models(pipe):
    try:
        pipe.enable_vae_slicing()
        assert pipe.vae.use_slicing
        pipe.disable_vae_slicing()
        assert not pipe.vae.use_slicing
        pipe.disable_vae_tiling()
        assert not pipe.vae.use_tiling
        pipe.enable_vae_tiling(tile_sample_stride_height=8)
        assert pipe.vae.use_tiling and pipe.vae.geometry(4, 32, 64).stride[1] == 8
        pipe.enable_vae_tiling(False)
        assert not pipe.vae.use_tiling
        pipe.fuse_qkv_projections()
        assert pipe.transformer.transformer_blocks[0].attn1.fused_projections
        pipe.unfuse_qkv_projections()
        assert not pipe.transformer.transformer_blocks[0].attn1.fused_projections
    finally:  # the models are shared by the tests
        pipe.vae.enable_tiling(tile_sample_stride_height=24)
    pipe.vae = None
    for name in ("enable_vae_slicing", "disable_vae_slicing", "enable_vae_tiling", "disable_vae_tiling"):
        with pytest.raises(ValueError, match=f"{name} requires a vae"):
            getattr(pipe, name)()
