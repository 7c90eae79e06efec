"""Training with a timestep per dynamics frame: it resumes exactly, and rolls out with history."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from pipelines import VidTwinPipeline
from pipelines.rollout import rollout
from runs import losses
from vidgen.common.errors import UserError
from vidgen.training.dit_trainer import train_dit

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def test_a_resumed_run_equals_an_uninterrupted_one(dit_config, tmp_path):
    settings = ["diffusion.frame_timesteps=0.8", "diffusion.independent_timesteps=0.5"]
    settings += ["diffusion.prediction_type=v_prediction", "optim.lr_scheduler=constant_with_warmup"]
    whole = train_dit(dit_config(tmp_path / "whole", "train.max_train_steps=4", *settings))
    train_dit(dit_config(tmp_path / "cut", "train.max_train_steps=2", *settings))
    resumed = train_dit(dit_config(tmp_path / "cut", "train.max_train_steps=4", "resume=latest", *settings))
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    a, b = (load_file(folder / WEIGHTS) for folder in (whole, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)

    pipeline = VidTwinPipeline.from_pretrained(whole)
    assert pipeline.transformer.config.frame_timesteps
    pipeline.set_progress_bar_config(disable=True)
    video = rollout(pipeline, 7, "orbit", history_noise=0.1, history_guidance_scale=1.5, num_inference_steps=2)
    assert video.shape == (1, 7, 3, 32, 32)


def test_a_child_knows_the_timesteps_of_its_run_and_of_its_parent(dit_config, tmp_path):
    settings = ["train.max_train_steps=1", "diffusion.prediction_type=v_prediction"]
    plain = train_dit(dit_config(tmp_path / "plain", *settings))
    settings += ["model.preset=null", "model.overrides={}"]
    forced = ["diffusion.frame_timesteps=0.5", f"model.pretrained={plain}"]
    child = train_dit(dit_config(tmp_path / "child", *settings, *forced))
    independent = ["diffusion.independent_timesteps=0.5", f"model.pretrained={child}"]
    grandchild = train_dit(dit_config(tmp_path / "grandchild", *settings, *independent))
    runs = [VidTwinPipeline.from_pretrained(run) for run in (plain, child, grandchild)]
    assert [run.transformer.config.frame_timesteps for run in runs] == [False, True, True]
    assert [run.transformer.config.independent_timesteps for run in runs] == [False, False, True]


def test_patches_over_all_frames_are_refused_before_the_clips_are_encoded(dit_config, tmp_path):
    overrides = ["diffusion.frame_timesteps=0.5", "model.overrides.dynamics_patch_size=[4,1]"]
    with pytest.raises(UserError, match=r"frame_timesteps needs two or more rows of dynamics patches.*has 1"):
        train_dit(dit_config(tmp_path / "run", *overrides))
    assert not (tmp_path / "run" / "latents").exists()
