"""Protocols: what they state, and that nothing else tells them apart."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from vidgen.common.errors import UserError
from vidgen.data.transforms import crop, resize_to_cover
from vidgen.metrics import protocols
from vidgen.metrics.detectors import DETECTORS
from vidgen.metrics.protocols import PROTOCOLS, Protocol, detector_input, get_protocol, protocol_clips

NAMES = list(PROTOCOLS)
# What says which clips are read and generated; the rest says what is done to them.
CHOICE = {"name", "source", "generated", "real", "labels", "split", "windows", "fps", "stride", "trials", "not_stated"}


def random_clips(frames: int = 16, height: int = 60, width: int = 81, seed: int = 0) -> torch.Tensor:
    """Clips (1, 3, frames, height, width) of whole pixel values."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (1, 3, frames, height, width), generator=generator).float() / 127.5 - 1


def small(protocol: Protocol, **changes: object) -> Protocol:
    """The protocol at a size and length that are quickly computed."""
    return dataclasses.replace(protocol, **({"size": 32, "frames": 2} | changes))


def seen_by_detector(clips: torch.Tensor, protocol: Protocol) -> torch.Tensor:
    return detector_input(protocol_clips(clips, protocol), protocol)


# --- the table ------------------------------------------------------------------------------------------------------


def test_settings_of_the_published_protocols():
    def stated(name: str) -> tuple:
        p = PROTOCOLS[name]
        return p.generated, p.size, p.frames, p.stride, p.fps, p.split

    assert stated("stylegan-v") == (2048, 256, 16, 3, None, "train+test")
    assert stated("larp") == (10_000, 128, 16, 1, None, "train")
    assert stated("tats") == (2048, 128, 16, 1, None, "train")
    assert stated("vidtwin") == (2048, 224, 16, 1, 8, "train")
    assert stated("vidtwin-10k") == (10_000, 224, 16, 1, 8, "train")
    assert stated("mcl-jcv") == (None, 224, 16, 1, 25, "all")
    assert stated("stylegan-v-128f") == (2048, 256, 128, 1, None, "train+test")
    assert {"generated", "split", "detector"} <= set(PROTOCOLS["vidtwin"].not_stated)
    assert PROTOCOLS["larp"].not_stated == PROTOCOLS["tats"].not_stated == ()


@pytest.mark.parametrize("name", NAMES)
def test_each_protocol_is_complete_and_documented(name):
    protocol = get_protocol(name)
    assert protocol.name == name and f"`{name}`" in protocols.__doc__
    assert protocol.detector in DETECTORS
    assert protocol.frames >= DETECTORS[protocol.detector].min_frames
    assert set(protocol.not_stated) <= {field.name for field in dataclasses.fields(Protocol)}
    described = json.loads(json.dumps(protocol.describe()))
    assert described == dataclasses.asdict(protocol) | {"not_stated": list(protocol.not_stated)}
    with pytest.raises(dataclasses.FrozenInstanceError):
        protocol.frames = 1


def test_unknown_names_are_user_errors():
    with pytest.raises(UserError, match="did you mean 'stylegan-v'"):
        get_protocol("styleganv")
    with pytest.raises(UserError, match="the protocols are larp, tats"):
        get_protocol("xyz")


# --- which clips of a video -----------------------------------------------------------------------------------------


def test_starts():
    larp, tats, stylegan_v = (PROTOCOLS[name] for name in ("larp", "tats", "stylegan-v"))
    assert list(larp.starts(50)) == [0, 16, 32]  # one run after the other; 2 frames are left over
    assert list(tats.starts(18)) == [0, 1, 2]
    assert stylegan_v.span == 46
    assert list(stylegan_v.starts(48)) == [0, 1, 2]  # the last clip ends with the last frame
    assert list(stylegan_v.starts(47)) == []  # StyleGAN-V leaves out videos with fewer than frames * stride frames
    assert list(tats.starts(15)) == []
    assert list(larp.starts(15)) == []  # it takes whole runs of 16 frames alone
    assert list(dataclasses.replace(larp, short="repeat").starts(15)) == [0]
    assert list(larp.starts(0)) == []


def test_short_clips_are_repeated_or_refused():
    clips = random_clips(frames=5)
    repeat = dataclasses.replace(PROTOCOLS["larp"], short="repeat")
    repeated = protocol_clips(clips, repeat)
    assert repeated.shape == (1, 3, 16, 128, 128)
    assert torch.equal(repeated[:, :, 5:], repeated[:, :, 4:5].expand(-1, -1, 11, -1, -1))
    assert not torch.equal(repeated[:, :, 3], repeated[:, :, 4])
    for name in ("tats", "stylegan-v", "larp"):
        with pytest.raises(UserError, match=f"{name} needs clips of 16 frames, not 5"):
            protocol_clips(clips, PROTOCOLS[name])
    with pytest.raises(UserError, match="larp needs clips of 16 frames, not 17"):
        protocol_clips(random_clips(frames=17), repeat)


# --- frames ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(24, 33), (60, 81), (81, 60), (32, 32)])
def test_sizes_and_ranges(name, size):
    protocol = small(PROTOCOLS[name])
    clips = random_clips(2, *size).double()
    cut = protocol_clips(clips, protocol)
    assert cut.shape == (1, 3, 2, 32, 32) and cut.dtype == torch.float32
    assert -1 <= cut.min() < -0.5 and 0.5 < cut.max() <= 1
    given = detector_input(cut, protocol)
    side = 32 if protocol.detector_resize == "detector" else 224
    assert given.shape == (1, 3, 2, side, side) and given.dtype == torch.float32
    assert given.abs().max() <= protocol.detector_range + 1e-6


def test_larp_is_bilinear_with_antialiasing_as_torchvision():
    clips = random_clips(2, 60, 80)  # 32 x 42.67: torchvision rounds down, to 42
    frames = F.interpolate(
        clips[0].transpose(0, 1), (32, 42), mode="bilinear", align_corners=False, antialias=True
    ).transpose(0, 1)
    torch.testing.assert_close(protocol_clips(clips, small(PROTOCOLS["larp"]))[0], frames[..., 5:37])


def test_tats_is_bilinear_without_antialiasing_and_truncates():
    clips = random_clips(2, 60, 80)
    pixels = (clips[0].transpose(0, 1) + 1) * 127.5
    frames = F.interpolate(pixels, (32, 43), mode="bilinear", align_corners=False)[..., 5:37].transpose(0, 1)
    ours = (protocol_clips(clips, small(PROTOCOLS["tats"]))[0] + 1) * 127.5
    torch.testing.assert_close(ours, ours.round(), atol=1e-3, rtol=0)
    lost = frames - ours
    assert lost.min() > -2e-3 and lost.max() < 1 and 0.4 < lost.mean() < 0.6


def test_stylegan_v_resizes_as_pillow():
    clips = random_clips(1, 60, 80)
    pixels = ((clips[0, :, 0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels).resize((42, 32), Image.Resampling.LANCZOS).crop((5, 0, 37, 32))
    ours = protocol_clips(clips, small(PROTOCOLS["stylegan-v"], frames=1))[0, :, 0]
    np.testing.assert_allclose((ours.permute(1, 2, 0).numpy() + 1) * 127.5, np.asarray(picture), atol=1e-3)


def test_portrait_frames_are_cropped_like_landscape_frames():
    protocol = small(PROTOCOLS["larp"])
    clips = random_clips(2, 60, 80)
    standing = protocol_clips(clips.transpose(3, 4), protocol)
    torch.testing.assert_close(standing.transpose(3, 4), protocol_clips(clips, protocol), atol=1e-5, rtol=0)


def test_the_papers_protocol_crops_like_training():
    clips = random_clips(2, 60, 90)
    trained_on = crop(resize_to_cover(clips[0], (32, 32)), (32, 32), 0.5, 0.5)
    torch.testing.assert_close(
        protocol_clips(clips, small(PROTOCOLS["vidtwin"], pixels="float"))[0], trained_on, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("pixels", ["round", "truncate", "float"])
def test_whole_pixel_values_stay(pixels):
    values = torch.arange(256).float()
    clips = (values / 127.5 - 1).view(1, 1, 1, 16, 16).expand(1, 3, 2, 16, 16)
    kept = protocol_clips(clips, small(PROTOCOLS["tats"], size=16, pixels=pixels))
    torch.testing.assert_close((kept[0, 0, 0].flatten() + 1) * 127.5, values, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("pixels", "expected"), [("round", 101), ("truncate", 100), ("float", 100.7)])
def test_values_between_pixels(pixels, expected):
    clips = torch.full((1, 3, 2, 16, 16), 100.7 / 127.5 - 1)
    kept = protocol_clips(clips, small(PROTOCOLS["tats"], size=16, pixels=pixels))
    torch.testing.assert_close(kept, torch.full_like(kept, expected / 127.5 - 1), atol=1e-5, rtol=0)
    assert protocol_clips(clips * 50, small(PROTOCOLS["tats"], size=16, pixels=pixels)).abs().max() <= 1


def test_a_square_frame_reaches_the_detector_as_stated():
    clips = random_clips(2, 32, 32)
    frames = clips[0].transpose(0, 1)
    large = F.interpolate(frames, (224, 224), mode="bilinear", align_corners=False).transpose(0, 1)
    torch.testing.assert_close(detector_input(clips, PROTOCOLS["tats"])[0], large)
    torch.testing.assert_close(detector_input(clips, PROTOCOLS["videogpt"])[0], large / 2)
    torch.testing.assert_close(detector_input(clips, PROTOCOLS["larp"]), clips)


def test_oblong_frames_are_squashed_or_cropped_for_the_detector():
    clips = random_clips(2, 32, 64)
    squashed = detector_input(clips, PROTOCOLS["tats"])
    cropped = detector_input(clips, PROTOCOLS["videogpt"])
    inner = detector_input(clips[..., 16:48], PROTOCOLS["tats"])[..., 4:-4]  # at its edges it has other neighbors
    torch.testing.assert_close(2 * cropped[..., 4:-4], inner)
    assert (squashed - 2 * cropped).abs().max() > 0.5


@pytest.mark.parametrize("shape", [(3, 2, 8, 8), (1, 1, 2, 8, 8), (1, 3, 0, 8, 8)])
def test_invalid_clips_are_refused(shape):
    with pytest.raises(ValueError, match=r"\(B, 3, T, H, W\)"):
        protocol_clips(torch.zeros(shape), PROTOCOLS["larp"])
    if len(shape) < 5 or shape[1] != 3:
        with pytest.raises(ValueError, match=r"\(B, 3, T, H, W\)"):
            detector_input(torch.zeros(shape), PROTOCOLS["larp"])


@pytest.mark.parametrize("pixels", ["round", "truncate", "float"])
def test_clips_that_are_not_finite_are_refused(pixels):
    clips = random_clips(2)
    clips[0, 1, 1, 3, 4] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        protocol_clips(clips, small(PROTOCOLS["tats"], pixels=pixels))


# --- two protocols differ by what they state, and by nothing else ---------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_protocols_differ_only_by_their_settings(name):
    protocol, clips = small(PROTOCOLS[name]), random_clips(2)
    for other in NAMES:
        other = small(PROTOCOLS[other])
        stated = {field.name for field in dataclasses.fields(Protocol)} - CHOICE
        differing = {key for key in stated if getattr(protocol, key) != getattr(other, key)}
        differing -= {"detector", "short"}  # which turn nothing of a clip that is long enough
        agreed = dataclasses.replace(protocol, **{key: getattr(other, key) for key in differing})
        assert torch.equal(seen_by_detector(clips, agreed), seen_by_detector(clips, other)), other.name
        same = torch.equal(seen_by_detector(clips, protocol), seen_by_detector(clips, other))
        assert same == (not differing), (other.name, differing)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("frames", 1),
        ("size", 30),
        ("crop", "squash"),
        ("filter", "bilinear"),
        ("filter", "lanczos"),
        ("long_side", "up"),
        ("pixels", "truncate"),
        ("pixels", "float"),
        ("detector_resize", "squash"),
        ("detector_range", 0.5),
    ],
)
def test_each_setting_of_frames_matters(field, value):
    protocol, clips = small(PROTOCOLS["vidtwin"]), random_clips(2)
    changed = dataclasses.replace(protocol, **{field: value})
    before, after = (seen_by_detector(clips[:, :, : p.frames], p) for p in (protocol, changed))
    assert before.shape != after.shape or not torch.equal(before, after)


@pytest.mark.parametrize("field", sorted(CHOICE))
def test_settings_of_the_choice_of_clips_change_no_frame(field):
    value = {"stride": 2, "not_stated": ("real",), "generated": 7, "real": 7, "trials": 7, "fps": 7.0}.get(
        field, "else"
    )
    protocol, clips = small(PROTOCOLS["tats"]), random_clips(2)
    changed = dataclasses.replace(protocol, **{field: value})
    assert torch.equal(seen_by_detector(clips, protocol), seen_by_detector(clips, changed))
