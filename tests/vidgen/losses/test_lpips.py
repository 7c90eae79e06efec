"""LPIPS against the documented values and the network of torchmetrics; weight files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from vidgen.common.errors import UserError
from vidgen.common.weights import file_sha256
from vidgen.losses import lpips as perceptual
from vidgen.losses.lpips import BACKBONES, LPIPS

BACKBONE_NAMES = list(BACKBONES)


@pytest.fixture(scope="module")
def squeeze(shared_data) -> LPIPS:
    return LPIPS.from_pretrained("squeeze", str(shared_data / "weights" / "squeezenet1_1_features.pth"))


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# --- values --------------------------------------------------------------------------------------------------------


def test_squeeze_agrees_with_the_values_torchmetrics_documents(squeeze):
    torch.manual_seed(42)
    a, b = torch.rand(10, 3, 100, 100) * 2 - 1, torch.rand(10, 3, 100, 100) * 2 - 1
    assert squeeze(a, b).mean().item() == pytest.approx(0.1005, abs=6e-5)  # of its function
    generator = torch.Generator().manual_seed(42)
    a, b = (torch.rand(2, 3, 100, 100, generator=generator) * 2 - 1 for _ in range(2))
    assert squeeze(a, b).tolist() == pytest.approx([0.1024, 0.0938], abs=6e-5)  # of its class and function


def test_squeeze_agrees_with_the_value_of_torchmetrics_class_whose_network_draws_first(squeeze):
    torch.manual_seed(42)
    draw_initial_weights_of_torchmetrics()
    a, b = torch.rand(10, 3, 100, 100) * 2 - 1, torch.rand(10, 3, 100, 100) * 2 - 1
    assert squeeze(a, b).mean().item() == pytest.approx(0.1024, abs=6e-5)


def draw_initial_weights_of_torchmetrics() -> None:
    """Draws the same number of random numbers as torchvision's SqueezeNet 1.1 and the seven heads take."""
    layers = [*LPIPS("squeeze").features.modules(), nn.Conv2d(512, 1000, 1)]
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight) if layer is layers[-1] else nn.init.kaiming_uniform_(layer.weight)
    for channels in BACKBONES["squeeze"].taps.values():
        nn.Conv2d(channels, 1, 1, bias=False)


@pytest.mark.parametrize("backbone", BACKBONE_NAMES)
def test_agrees_with_torchmetrics_own_network_on_the_same_features(backbone, monkeypatch):
    from torchmetrics.functional.image import lpips as torchmetrics_lpips

    torch.manual_seed(0)
    ours = LPIPS(backbone)
    monkeypatch.setattr(torchmetrics_lpips, "_get_tv_model_features", lambda *_: ours.features)
    theirs = torchmetrics_lpips._NoTrainLpips(net=backbone)
    a, b = images(2, 3, 64, 48), images(2, 3, 64, 48, seed=1)
    expected = theirs(a, b).flatten()
    assert expected.min() > 1e-3
    torch.testing.assert_close(ours(a, b), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("backbone", "parameters", "convolutions"),
    [
        ("vgg", 14_714_688, [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]),
        ("alex", 2_469_696, [0, 3, 6, 8, 10]),
        ("squeeze", 722_496, [0, 3, 4, 6, 7, 9, 10, 11, 12]),
    ],
)
def test_backbones_are_torchvisions(backbone, parameters, convolutions):
    features = LPIPS(backbone).features
    assert sum(p.numel() for p in features.parameters()) == parameters
    assert sorted({int(key.split(".")[0]) for key in features.state_dict()}) == convolutions


def test_taps_follow_the_named_layers():
    """relu1_2, 2_2, 3_3, 4_3, 5_3; relu1 to 5; the first convolution, the Fires before pools, and the last four."""
    for backbone, known in BACKBONES.items():
        features = LPIPS(backbone).features
        for tap in known.taps:
            assert isinstance(features[tap], nn.ReLU | perceptual.Fire)
        before_pools = {i - 1 for i, layer in enumerate(features) if isinstance(layer, nn.MaxPool2d)}
        assert before_pools <= set(known.taps) and max(known.taps) == len(features) - 1


# --- behavior -----------------------------------------------------------------------------------------------------


def test_is_a_distance_per_image(squeeze):
    a, b = images(3, 3, 32, 32), images(3, 3, 32, 32, seed=1)
    assert squeeze(a, a).tolist() == [0, 0, 0]
    torch.testing.assert_close(squeeze(a, b), squeeze(b, a))
    torch.testing.assert_close(squeeze(a, b), torch.cat([squeeze(a[i : i + 1], b[i : i + 1]) for i in range(3)]))
    assert (squeeze(a, 0.5 * a) < squeeze(a, b)).all()


@pytest.mark.parametrize("backbone", BACKBONE_NAMES)
def test_gradients_flow_to_the_images_alone(backbone):
    lpips = LPIPS(backbone)
    a, b = images(2, 3, 40, 40).requires_grad_(), images(2, 3, 40, 40, seed=1)
    lpips(a, b).sum().backward()
    assert a.grad.isfinite().all() and (a.grad != 0).any(dim=1).float().mean() > 0.9
    assert not list(filter(lambda p: p.requires_grad or p.grad is not None, lpips.parameters()))
    black = torch.zeros(1, 3, 40, 40, requires_grad=True)
    lpips(black, torch.zeros(1, 3, 40, 40)).sum().backward()
    assert black.grad.isfinite().all()


def test_under_autocast_distances_stay_float32(squeeze):
    a = images(2, 3, 64, 64)
    b = a + 0.5 * images(2, 3, 64, 64, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = squeeze(a, b)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, squeeze(a, b), rtol=0.02, atol=0)
    assert (half != squeeze(a, b)).all()  # the backbone did run in bfloat16


def test_features_are_compared_in_float32_and_may_be_zero():
    assert perceptual._normalize(torch.ones(1, 2, 3, 3, dtype=torch.bfloat16)).dtype == torch.float32
    nothing = torch.zeros(1, 2, 3, 3, requires_grad=True)
    unit = perceptual._normalize(nothing)
    unit.sum().backward()
    assert (unit == 0).all() and nothing.grad.isfinite().all()


@pytest.mark.parametrize("backbone", BACKBONE_NAMES)
def test_the_minimum_size_is_the_minimum(backbone, monkeypatch):
    lpips, least = LPIPS(backbone), BACKBONES[backbone].min_size
    assert lpips(images(1, 3, least, least), -images(1, 3, least, least)).isfinite().all()
    with pytest.raises(UserError, match=f"{least} x {least} pixels or more, not {least} x {least - 1}"):
        lpips(images(1, 3, least, least - 1), images(1, 3, least, least - 1))
    monkeypatch.setattr(LPIPS, "check_size", lambda *_: None)
    with pytest.raises(RuntimeError):
        lpips(images(1, 3, least, least - 1), images(1, 3, least, least - 1))


def test_wrong_shapes_are_named():
    lpips = LPIPS("squeeze")
    for a, b in [((2, 3, 32, 32), (1, 3, 32, 32)), ((2, 1, 32, 32), (2, 1, 32, 32)), ((1, 3, 2, 32, 32),) * 2]:
        with pytest.raises(ValueError, match=r"RGB images \(N, 3, H, W\) of one shape"):
            lpips(images(*a), images(*b))


# --- weights -------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty torch hub cache."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints"


def known_as(monkeypatch, backbone: str, file: Path) -> None:
    """Take this file for torchvision's."""
    fields = {
        **vars(BACKBONES[backbone]),
        "weights": replace(BACKBONES[backbone].weights, sha256=(file_sha256(file),)),
    }
    monkeypatch.setitem(BACKBONES, backbone, perceptual.Backbone(**fields))


@pytest.mark.parametrize("backbone", BACKBONE_NAMES)
def test_weights_come_from_torch_hubs_cache(backbone, hub, monkeypatch):
    source = LPIPS(backbone)
    file = hub / BACKBONES[backbone].weights.name
    state = {f"features.{key}": value for key, value in source.features.state_dict().items()}
    # As torchvision's: the classifier beside the features, in PyTorch's older format.
    torch.save({**state, "classifier.6.bias": torch.zeros(3)}, file, _use_new_zipfile_serialization=False)
    known_as(monkeypatch, backbone, file)
    random_state = torch.get_rng_state()
    loaded = LPIPS.from_pretrained(backbone)
    assert torch.equal(torch.get_rng_state(), random_state)
    a, b = images(1, 3, 40, 40), images(1, 3, 40, 40, seed=1)
    torch.testing.assert_close(loaded(a, b), source(a, b), rtol=0, atol=0)
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("backbone", BACKBONE_NAMES)
def test_missing_weights_are_explained(backbone, hub):
    known = BACKBONES[backbone].weights
    with pytest.raises(UserError) as error:
        LPIPS.from_pretrained(backbone)
    for text in (
        str(hub / known.name),
        f"https://download.pytorch.org/models/{known.name}",
        known.sha256[0],
        "perceptual.weights=FILE",
        "perceptual.weight=0",
    ):
        assert text in str(error.value)
    assert known.sha256[0][:8] in known.name  # torchvision names its files by their hash
    with pytest.raises(UserError, match=r"elsewhere\.pth is no file"):
        LPIPS.from_pretrained(backbone, str(hub / "elsewhere.pth"))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_saved_again_need_their_hash(suffix, tmp_path):
    source, file = LPIPS("squeeze"), tmp_path / f"mine{suffix}"
    state = source.features.state_dict()
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    found = file_sha256(file)
    with pytest.raises(UserError) as error:
        LPIPS.from_pretrained("squeeze", str(file))
    assert f"weights_sha256={found}" in str(error.value)
    assert BACKBONES["squeeze"].weights.sha256[0] in str(error.value)
    with pytest.raises(UserError, match=f"{found}, not {'0' * 64}"):
        LPIPS.from_pretrained("squeeze", str(file), "0" * 64)
    loaded = LPIPS.from_pretrained("squeeze", str(file), found.upper())
    for key, tensor in loaded.features.state_dict().items():
        assert torch.equal(tensor, state[key])


def test_a_damaged_file_is_refused(shared_data, tmp_path):
    damaged = bytearray((shared_data / "weights" / "squeezenet1_1_features.pth").read_bytes())
    damaged[100_000] ^= 1
    (tmp_path / "damaged.pth").write_bytes(damaged)
    with pytest.raises(UserError, match="not torchvision's file"):
        LPIPS.from_pretrained("squeeze", str(tmp_path / "damaged.pth"))


def test_files_that_do_not_fit_are_named(tmp_path):
    file = tmp_path / "file.pth"

    def load() -> None:
        LPIPS.from_pretrained("squeeze", str(file), file_sha256(file))

    state = LPIPS("squeeze").features.state_dict()
    torch.save({key: value for key, value in state.items() if key != "12.squeeze.bias"}, file)
    with pytest.raises(UserError, match=r"12\.squeeze\.bias is missing, not \(64,\)"):
        load()
    torch.save({**state, "12.squeeze.bias": torch.zeros(3)}, file)
    with pytest.raises(UserError, match=r"12\.squeeze\.bias is \(3,\), not \(64,\)"):
        load()
    torch.save({"state_dict": state}, file)
    with pytest.raises(UserError, match="other things than tensors"):
        load()
    torch.save([1, 2], file)
    with pytest.raises(UserError, match="cannot be read"):
        load()
    file.write_text("not weights at all")
    with pytest.raises(UserError, match="cannot be read"):
        load()
    file.write_bytes(b"")
    with pytest.raises(UserError, match="cannot be read"):
        load()


def test_nothing_is_unpickled(tmp_path):
    file = tmp_path / "evil.pth"
    torch.save({"0.weight": Path("anything")}, file)
    with pytest.raises(UserError, match="cannot be read"):
        LPIPS.from_pretrained("squeeze", str(file), file_sha256(file))


def test_unknown_backbones_are_named():
    with pytest.raises(UserError, match="vgg, alex, squeeze, not 'resnet'"):
        LPIPS.from_pretrained("resnet")
