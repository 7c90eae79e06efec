"""Float32 linear layers by oneDNN: where they are used, and that they change results by rounding only."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from autoencoder import AutoencoderKLVidTwin, matmul_speed, onednn
from autoencoder.onednn import MIN_WEIGHTS, Linear
from pipelines import VidTwinTransformer3DModel

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch is built without oneDNN")
WIDTH = 128
assert WIDTH**2 >= MIN_WEIGHTS


@pytest.fixture(autouse=True)
def calls(monkeypatch) -> list[torch.Size]:
    """Shapes of the weights that oneDNN multiplied; it counts as faster on any CPU."""
    shapes = []

    def record(x, weight, bias=None):
        shapes.append(weight.shape)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    monkeypatch.setattr(onednn, "onednn_linear", record)
    monkeypatch.setattr(onednn, "is_onednn_faster", lambda: True)
    return shapes


@pytest.mark.parametrize("shape", [(5, WIDTH), (2, 3, 4, WIDTH), (WIDTH,), (0, WIDTH)])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_pytorchs_layer(shape, bias, calls):
    layer, x = Linear(WIDTH, 2 * WIDTH, bias), torch.randn(shape)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    assert calls == [layer.weight.shape]


def test_strided_input():
    layer, x = Linear(WIDTH, WIDTH), torch.randn(3, WIDTH, 7).transpose(1, 2)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def test_otherwise_it_is_pytorchs_layer(calls):
    layer, x = Linear(WIDTH, WIDTH), torch.randn(4, WIDTH)
    layer(x).sum().backward()  # with gradients
    assert layer.weight.grad is not None
    with torch.no_grad():
        Linear(WIDTH, WIDTH // 2)(x)  # small
        Linear(WIDTH, WIDTH).bfloat16()(x.bfloat16())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        with torch.backends.mkldnn.flags(enabled=False):
            layer(x)
        with FakeTensorMode() as mode:
            assert Linear(WIDTH, WIDTH)(mode.from_tensor(x)).shape == x.shape
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), F.linear(x, layer.weight, layer.bias))
    assert calls == []


def test_models_use_it_with_the_same_results_and_flops(calls, monkeypatch):
    torch.manual_seed(0)
    vae = AutoencoderKLVidTwin.from_preset("tiny-test", hidden_size=WIDTH, num_attention_heads=4).eval()
    transformer = VidTwinTransformer3DModel.from_preset("tiny-test", vae, num_attention_heads=4).eval()
    clip, latents = torch.rand(1, *vae.clip_shape) * 2 - 1, torch.randn(1, vae.latent_size)
    timestep = torch.tensor([500])

    def run() -> list[torch.Tensor]:
        outputs = [vae.encode(clip).latent_dist.mode(), vae.decode(latents).sample]
        return [*outputs, transformer(latents, timestep).sample, *transformer.modulations(timestep)]

    outputs, used, flops = {}, {}, {}
    for faster in (True, False):
        monkeypatch.setattr(onednn, "is_onednn_faster", lambda faster=faster: faster)
        calls.clear()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            outputs[faster] = run()
        used[faster], flops[faster] = len(calls), counter.get_total_flops()
    torch.testing.assert_close(outputs[True], outputs[False], rtol=1e-4, atol=1e-5)
    assert used[True] > 4 and used[False] == 0
    assert flops[True] == flops[False]


@pytest.fixture
def _unmeasured():
    matmul_speed.is_onednn_faster.cache_clear()
    yield
    matmul_speed.is_onednn_faster.cache_clear()


@pytest.mark.usefixtures("_unmeasured")
@pytest.mark.parametrize(("seconds", "faster"), [(1.0, True), (2.0, False), (9.0, False)])
def test_it_is_chosen_by_measurement(seconds, faster, monkeypatch):
    times = {F.linear: 2.0, matmul_speed.onednn_linear: seconds}
    monkeypatch.setattr(matmul_speed, "_time_product", lambda a, b, product: times[product])
    assert matmul_speed.is_onednn_faster() is faster


@pytest.mark.usefixtures("_unmeasured")
def test_it_is_not_chosen_where_it_is_missing(monkeypatch):
    def refuse(a, b, product):
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")

    monkeypatch.setattr(matmul_speed, "_time_product", refuse)
    assert not matmul_speed.is_onednn_faster()
