"""Tiny models with random weights: a new DiT predicts zero, which would hide most mistakes."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from unittest import mock

import pytest
import torch
from hub_server import TOKEN, HubServer

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
    """Two classes with three subclasses."""
    pipeline = VidTwinPipeline(vae, make_transformer(num_classes=5), default_scheduler(), id2label=KINDS)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def unchecked(monkeypatch):
    """Skip the pipeline's checks for finite values, so that it runs on the device "meta"."""
    for name in ("check_finite_tensor", "check_finite_output"):
        monkeypatch.setattr(f"pipelines.pipeline_vidtwin.{name}", lambda *_: None)


# --- a fake Hub and its clients ------------------------------------------------------------------------------------
# huggingface_hub reads its settings when it is imported, so each client is a separate process.


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def clients(hub, tmp_path_factory):
    """Run a function in a separate process, online or offline."""
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path_factory.mktemp("hf_home")),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    pools = {}
    for name, offline in (("online", "0"), ("offline", "1")):
        pools[name] = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        with mock.patch.dict(os.environ, {**settings, "HF_HUB_OFFLINE": offline}):
            pools[name].submit(torch.set_num_threads, 1)  # starts the process with this environment
    yield {
        name: lambda f, *args, _pool=pool, **kw: _pool.submit(f, *args, **kw).result() for name, pool in pools.items()
    }
    for wait in (False, True):  # both at once
        for pool in pools.values():
            pool.shutdown(wait=wait)


@pytest.fixture
def online(clients, hub):
    hub.requests.clear()
    yield clients["online"]
    hub.status = None


@pytest.fixture
def offline(clients):
    return clients["offline"]


@pytest.fixture
def cache(tmp_path) -> str:
    return str(tmp_path / "cache")
