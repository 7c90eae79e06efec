"""Detectors: features of pooled pixels, shapes and precision, and files of weights."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from vidgen.common.errors import UserError
from vidgen.common.weights import file_sha256
from vidgen.losses.lpips import BACKBONES, LPIPS
from vidgen.metrics import detectors
from vidgen.metrics.detectors import DETECTORS, Detector, PooledPixels, get_detector, resize_frames
from vidgen.metrics.frechet import FeatureStatistics, frechet_distance

COLOR, FIRST, LAST, DETAIL = slice(0, 48), slice(48, 64), slice(64, 80), slice(80, 96)
MOTION_1, MOTION_4 = slice(96, 112), slice(112, 128)


@pytest.fixture
def detector():
    return get_detector("pooled_pixels")


def moving_squares(n, seed=0, size=16, frames=8):
    """Clips (n, 3, frames, size, size): a square of random color crosses a flat background from left to right."""
    g = torch.Generator().manual_seed(seed)
    clips = torch.rand(n, 3, 1, 1, 1, generator=g).sub(1).expand(n, 3, frames, size, size).clone()
    colors = torch.rand(n, 3, generator=g)
    rows = torch.randint(0, size - 4, (n,), generator=g).tolist()
    for i, row in enumerate(rows):
        for t in range(frames):
            clips[i, :, t, row : row + 4, t : t + 4] = colors[i, :, None, None]
    return clips


def test_shape_dtype_and_determinism(detector):
    clips = moving_squares(3)
    values = detector(clips)
    assert values.shape == (3, detector.dim) == (3, 128)
    assert values.dtype == torch.float32
    assert torch.equal(values, get_detector("pooled_pixels")(clips))
    torch.testing.assert_close(detector(clips[1:2]), values[1:2])
    torch.testing.assert_close(detector(clips.double()), values)


@pytest.mark.parametrize("shape", [(3, 2, 4, 4), (3, 5, 9, 13), (3, 16, 30, 20)])
def test_other_sizes_give_the_same_length(detector, shape):
    assert detector(torch.zeros(1, *shape)).shape == (1, 128)


def test_a_flat_clip_has_only_its_color(detector):
    color = torch.tensor([0.5, -0.25, 0.75])
    values = detector(color.view(1, 3, 1, 1, 1).expand(1, 3, 6, 8, 8))[0]
    torch.testing.assert_close(values[COLOR], color.repeat_interleave(16))
    luma = 0.299 * 0.5 - 0.587 * 0.25 + 0.114 * 0.75
    torch.testing.assert_close(values[FIRST], torch.full((16,), luma))
    torch.testing.assert_close(values[LAST], torch.full((16,), luma))
    torch.testing.assert_close(values[DETAIL.start :], torch.zeros(48), atol=1e-6, rtol=0)


def test_cells_are_at_the_documented_places(detector):
    clip = torch.zeros(1, 3, 3, 8, 8)
    clip[:, 1, :, 2:4, 6:8] = 1  # green, second row, last column
    expected = torch.zeros(48)
    expected[16 + 4 + 3] = 1
    torch.testing.assert_close(detector(clip)[0, COLOR], expected)


def test_detail_is_the_difference_between_pixels_in_both_directions(detector):
    stripes = (torch.arange(16) % 2).float().expand(1, 3, 4, 16, 16)
    across, down = detector(stripes)[0, DETAIL], detector(stripes.transpose(3, 4))[0, DETAIL]
    torch.testing.assert_close(across, across.new_ones(16), atol=0.15, rtol=0)  # the last column has no neighbor
    torch.testing.assert_close(down.view(4, 4), across.view(4, 4).T)


def test_motion_is_the_difference_between_frames_at_a_lag(detector):
    blink = torch.tensor([0.0, 1, 0, 1, 0, 1, 0, 1]).view(1, 1, 8, 1, 1).expand(1, 3, 8, 8, 8)
    values = detector(blink)[0]
    torch.testing.assert_close(values[MOTION_1], torch.ones(16))
    torch.testing.assert_close(values[MOTION_4], torch.zeros(16))
    torch.testing.assert_close(detector(0.5 * blink)[0, MOTION_1], torch.full((16,), 0.5))


def test_reversal_only_swaps_the_thirds(detector):
    clips = moving_squares(4)
    forward, backward = detector(clips), detector(clips.flip(2))
    assert (forward - backward).abs().max() > 0.1
    torch.testing.assert_close(backward[:, FIRST], forward[:, LAST])
    torch.testing.assert_close(backward[:, LAST], forward[:, FIRST])
    for part in (COLOR, DETAIL, MOTION_1, MOTION_4):
        torch.testing.assert_close(backward[:, part], forward[:, part])


def test_artifacts_are_farther_away_than_other_real_clips(detector):
    real, other = moving_squares(200), moving_squares(200, seed=1)
    blurred = torch.nn.functional.avg_pool3d(other, (1, 5, 5), stride=1, padding=(0, 2, 2))
    faults = {
        "noise": other + 0.3 * torch.randn(other.shape, generator=torch.Generator().manual_seed(0)),
        "blur": blurred,
        "frozen": other[:, :, :1].expand_as(other),
        "reversed": other.flip(2),
        "other colors": -other,
    }

    def statistics(clips):
        return FeatureStatistics.of(detector(clips))

    noise_level = frechet_distance(statistics(real), statistics(other))
    for name, clips in faults.items():
        assert frechet_distance(statistics(real), statistics(clips)) > 1.5 * noise_level, name


@pytest.mark.parametrize("shape", [(3, 4, 8, 8), (1, 1, 4, 8, 8), (1, 3, 1, 8, 8), (1, 3, 4, 3, 8)])
def test_clips_it_cannot_measure_are_refused(detector, shape):
    with pytest.raises(ValueError, match="pooled_pixels needs clips"):
        detector(torch.zeros(shape))


def test_names():
    assert isinstance(get_detector("pooled_pixels"), PooledPixels)
    with pytest.raises(ValueError, match="did you mean 'pooled_pixels'"):
        get_detector("pooled_pixel")
    with pytest.raises(ValueError, match=r"the detectors are clip, i3d, .*pooled_pixels"):
        get_detector("xyz")


# --- all detectors --------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty torch hub cache."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints"


class Doubling(Detector):
    """Records its inputs."""

    name, dim, min_frames, min_size = "doubling", 2, 3, 4

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((5, 5), 2.0))

    def features(self, clips):
        conv = getattr(torch.backends.cudnn, "conv", None)
        self.given, self.full = clips, not torch.backends.cudnn.allow_tf32 if conv is None else conv.fp32_precision
        return (torch.ones(len(clips), 5) @ self.weight)[:, :2]


@pytest.mark.parametrize("allowed", [True, False])
def test_features_are_float32_under_autocast_and_tf32(allowed, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    detector = Doubling()
    with torch.autocast("cpu", torch.bfloat16):
        features = detector(torch.zeros(1, 3, 3, 4, 4, dtype=torch.float16))
    assert features.dtype == detector.given.dtype == torch.float32
    assert not features.requires_grad
    assert detector.full in (True, "ieee")
    assert torch.backends.cudnn.allow_tf32 is allowed  # afterwards


@pytest.mark.parametrize("shape", [(1, 3, 2, 4, 4), (1, 3, 3, 4, 3)])
def test_short_and_small_clips_are_user_errors(shape):
    with pytest.raises(UserError, match="doubling needs clips of 3 frames and 4 x 4 pixels or more"):
        Doubling()(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"\(B, 3, T, H, W\)"):
        Doubling()(torch.zeros(1, 1, 3, 4, 4))


def test_the_table():
    pretrained = {"i3d", "i3d_imagenet", "i3d_torchscript", "squeezenet", "vjepa2", "videomae", "clip"}
    assert set(DETECTORS) == {*pretrained, "pooled_pixels"}
    for name, detector in DETECTORS.items():
        assert detector.name == name and f"| `{name}` |" in detectors.__doc__
        assert detector.per_frame == (name == "squeezenet")
        if detector.weights:
            assert detector.weights.url.startswith("https://") and detector.weights.name in detector.weights.url
            assert all(len(sha256) == 64 and int(sha256, 16) for sha256 in detector.weights.sha256)
    assert DETECTORS["i3d_torchscript"].weights.size == 51_235_320  # as several projects print it
    assert DETECTORS["i3d_torchscript"].weights.sha256[0].startswith("bec6519f")
    assert DETECTORS["i3d_imagenet"].weights.sha256[0].startswith("2609088c")
    assert DETECTORS["i3d"].weights.sha256 == ()  # the publisher states none
    assert DETECTORS["i3d"].weights.mirrored[0].startswith("55095f04")
    mirrored = [sha256 for detector in DETECTORS.values() if detector.weights for sha256 in detector.weights.mirrored]
    assert all(len(sha256) == 64 and int(sha256, 16) for sha256 in mirrored)


def test_a_detector_describes_itself_for_json():
    assert json.loads(json.dumps(get_detector("pooled_pixels").describe())) == {
        "name": "pooled_pixels",
        "dim": 128,
        "row": "clip",
        "parameters": 0,
        "preprocessing": "none",
        "sha256": None,
        "published": None,
    }


@pytest.mark.parametrize("name", ["i3d", "i3d_imagenet", "i3d_torchscript", "squeezenet"])
def test_missing_weights_are_explained(name, hub):
    known = DETECTORS[name].weights
    with pytest.raises(UserError) as error:
        get_detector(name)
    stated = known.sha256[0] if known.sha256 else "not published"
    for said in (f"the detector {name} needs", str(hub / known.name), known.url, stated, "--detector FILE"):
        assert said in str(error.value)
    with pytest.raises(UserError, match=r"elsewhere\.pt is no file"):
        get_detector(name, hub / "elsewhere.pt")


@pytest.mark.parametrize("name", ["i3d_imagenet", "i3d_torchscript", "squeezenet"])
def test_another_file_needs_its_hash_and_is_not_opened_before(name, tmp_path, monkeypatch):
    def opened(*_):
        raise AssertionError("opened before its hash was known")

    monkeypatch.setattr(DETECTORS[name], "load", opened)
    file = tmp_path / "file.pt"
    file.write_bytes(b"something else")
    found = file_sha256(file)
    with pytest.raises(UserError, match=rf"{found}, so it is not .*'s file.*--detector-sha256 {found}"):
        get_detector(name, file)
    with pytest.raises(UserError, match=rf"{found}, not {'0' * 64}, which --detector-sha256 asks for"):
        get_detector(name, file, "0" * 64)


def test_only_the_published_file_is_described_as_published(tmp_path, monkeypatch):
    file = tmp_path / "file.pt"
    file.write_bytes(b"anything")
    found = file_sha256(file)
    for name in ("i3d", "i3d_imagenet"):
        monkeypatch.setattr(DETECTORS[name], "load", lambda *_: None)
    detector = get_detector("i3d", file)  # whose hash nobody states
    assert not detector.published and detector.describe()["published"] is None
    detector = get_detector("i3d_imagenet", file, found)
    assert not detector.published and detector.describe() == {
        "name": "i3d_imagenet",
        "dim": 400,
        "row": "clip",
        "parameters": 0,
        "preprocessing": "frames squashed to 224 x 224, bilinear without antialiasing",
        "sha256": found,
        "published": None,
    }
    for name, field in (("i3d", "mirrored"), ("i3d_imagenet", "sha256")):
        known = dataclasses.replace(DETECTORS[name].weights, **{field: (found,)})
        with monkeypatch.context() as patch:
            patch.setattr(DETECTORS[name], "weights", known)
            described = get_detector(name, file).describe()
            assert described["published"] == {"file": known.name, "url": known.url}


def test_a_file_of_another_detector_is_named(tmp_path, monkeypatch):
    file = tmp_path / "i3d_pretrained_400.pt"  # whatever it is called
    file.write_bytes(b"pytorch-i3d's")
    found = file_sha256(file)
    for name in DETECTORS:
        monkeypatch.setattr(DETECTORS[name], "load", lambda *_: None)
    known = dataclasses.replace(DETECTORS["i3d_imagenet"].weights, sha256=(found,))
    monkeypatch.setattr(DETECTORS["i3d_imagenet"], "weights", known)
    said = r"i3d_pretrained_400\.pt is the file of the detector i3d_imagenet, not of i3d"
    with pytest.raises(UserError, match=said):
        get_detector("i3d", file)
    with pytest.raises(UserError, match=said):
        get_detector("i3d_torchscript", file, found)
    assert get_detector("i3d_imagenet", file).published


def test_pooled_pixels_take_no_file(tmp_path):
    with pytest.raises(UserError, match="has no weights"):
        get_detector("pooled_pixels", tmp_path)


# --- I3D ------------------------------------------------------------------------------------------------------------


def test_squash_is_bilinear_without_antialiasing_and_keeps_frames_in_order():
    clips = torch.rand(2, 3, 5, 6, 8)
    squashed = resize_frames(clips, (4, 4))
    assert squashed.shape == (2, 3, 5, 4, 4)
    expected = torch.nn.functional.interpolate(clips[1, :, 3:4], size=(4, 4), mode="bilinear", align_corners=False)
    torch.testing.assert_close(squashed[1, :, 3:4], expected)
    assert resize_frames(clips[..., :6], (6, 6)).data_ptr() == clips.data_ptr()  # nothing to do


def test_i3d_squashes_frames_to_224_and_gives_probabilities():
    detector = DETECTORS["i3d"]()
    detector.network = lambda clips: clips.mean(dim=(2, 3, 4)).repeat(1, 134)[:, :400]
    clips = torch.rand(2, 3, 9, 20, 30)
    torch.testing.assert_close(detector(clips), detector.network(resize_frames(clips, (224, 224))))
    assert detector.network(resize_frames(clips, (224, 224))).shape == (2, 400)
    probabilities = detector.probabilities(torch.tensor([[0.0, 0.0, math.log(2)]]))
    torch.testing.assert_close(probabilities, torch.tensor([[0.25, 0.25, 0.5]]))
    with pytest.raises(UserError, match="i3d needs clips of 9 frames"):
        detector(clips[:, :, :8])


class Program(torch.nn.Module):
    """A minimal program with the interface of StyleGAN-V's file."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, dim)

    def forward(self, x: torch.Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False):
        x = x.to(torch.float32)
        if resize:
            n, c, t, h, w = x.shape
            x = x.transpose(1, 2).reshape(n * t, c, h, w)
            x = torch.nn.functional.interpolate(x, size=[224, 224], mode="bilinear", align_corners=False)
            x = x.reshape(n, t, c, 224, 224).transpose(1, 2)
        if rescale:
            x = 2 * x / 255 - 1
        x = self.linear(x.square().mean(dim=[2, 3, 4]))
        if not return_features:
            x = x.softmax(1)
        return x


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_torchscript_is_called_as_stylegan_v_does(tmp_path):
    torch.manual_seed(0)
    program, file = Program(400), tmp_path / "program.pt"
    torch.jit.save(torch.jit.script(program), file)
    detector = get_detector("i3d_torchscript", file, file_sha256(file))
    assert detector.sha256 == file_sha256(file)
    pixels = torch.randint(0, 256, (2, 3, 10, 12, 16), dtype=torch.uint8)
    clips = pixels.float() / 127.5 - 1
    with torch.no_grad():
        expected = program(pixels, rescale=True, resize=True, return_features=True)  # as in frechet_video_distance.py
    with torch.autocast("cpu", torch.bfloat16):
        features = detector(clips)
    torch.testing.assert_close(features, expected)
    assert features.dtype == torch.float32
    with pytest.raises(UserError, match="needs clips of 10 frames"):
        detector(torch.zeros(1, 3, 9, 12, 16))

    torch.jit.save(torch.jit.script(Program(7)), file)
    with pytest.raises(UserError, match=r"returned \(2, 7\) and not features \(2, 400\)"):
        get_detector("i3d_torchscript", file, file_sha256(file))(clips)
    with pytest.raises(UserError, match="cannot be read as tensors"):
        get_detector("i3d", file)  # a program where a state dict is wanted
    torch.save({"a": torch.zeros(1)}, file)
    with pytest.raises(UserError, match="is not a program in TorchScript"):
        get_detector("i3d_torchscript", file, file_sha256(file))


# --- SqueezeNet -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def squeezenet(tmp_path_factory) -> Detector:
    """With random weights that are large enough to distinguish frames."""
    torch.manual_seed(0)
    network, file = BACKBONES["squeeze"].build(), tmp_path_factory.mktemp("weights") / "squeezenet.pth"
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    torch.save(network.state_dict(), file)
    return get_detector("squeezenet", file, file_sha256(file))


def test_squeezenet_gives_a_row_for_each_frame_in_order(squeezenet):
    clips = torch.rand(2, 3, 3, 24, 32) * 2 - 1
    rows = squeezenet(clips)
    assert rows.shape == (6, 512) and torch.pdist(rows).min() > 0.1
    for number, (clip, frame) in enumerate((clip, frame) for clip in range(2) for frame in range(3)):
        torch.testing.assert_close(squeezenet(clips[clip : clip + 1, :, frame : frame + 1])[0], rows[number])
    assert not any(parameter.requires_grad for parameter in squeezenet.parameters())
    with pytest.raises(UserError, match="17 x 17 pixels or more"):
        squeezenet(clips[..., :16])


def test_squeezenet_is_lpips_backbone(squeezenet):
    lpips = LPIPS("squeeze")
    lpips.features.load_state_dict(squeezenet.network.state_dict())
    frames = torch.rand(2, 3, 40, 40) * 2 - 1
    with torch.no_grad():
        expected = lpips._extract(frames)[-1].mean(dim=(2, 3))  # after the last layer
    torch.testing.assert_close(squeezenet(frames[:, :, None]), expected)


def test_squeezenet_finds_torchvisions_file(shared_data):
    detector = get_detector("squeezenet", shared_data / "weights" / "squeezenet1_1_features.pth")
    assert detector.sha256 in DETECTORS["squeezenet"].weights.sha256
    rows = detector(torch.rand(1, 3, 2, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    assert rows.shape == (2, 512) and rows.min() >= 0 and 0.1 < rows.mean() < 10
