"""Tiny models with lively weights: a fresh DiT predicts zero, which would hide most mistakes."""

from __future__ import annotations

import pytest
import torch

from autoencoder import AutoencoderKLVidTwin
from pipelines import VidTwinPipeline, VidTwinTransformer3DModel, default_scheduler

CLASSES = {0: "Biking", 1: "Diving", 2: "Yo Yo"}
KINDS = {0: "jump", 1: "run", 2: "jump/dog", 3: "jump/cat", 4: "run/dog"}


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def vae() -> AutoencoderKLVidTwin:
    torch.manual_seed(0)
    return AutoencoderKLVidTwin.from_preset("tiny-test", latents_mean=[0.1, -0.2], latents_std=[2.0, 0.5]).eval()


@pytest.fixture(scope="session")
def make_transformer(vae):
    """Build a tiny transformer for the tiny autoencoder, every parameter random."""

    def make(**overrides) -> VidTwinTransformer3DModel:
        model = VidTwinTransformer3DModel.from_preset("tiny-test", **{"vae": vae, "num_classes": 3, **overrides})
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.15, generator=generator)
        return model.eval()

    return make


@pytest.fixture(scope="session")
def transformer(make_transformer) -> VidTwinTransformer3DModel:
    return make_transformer()


@pytest.fixture
def pipe(vae, transformer) -> VidTwinPipeline:
    pipeline = VidTwinPipeline(vae, transformer, default_scheduler(), id2label=CLASSES)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipe_of_kinds(vae, make_transformer) -> VidTwinPipeline:
    """Two classes with three sub-classes."""
    pipeline = VidTwinPipeline(vae, make_transformer(num_classes=5), default_scheduler(), id2label=KINDS)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
