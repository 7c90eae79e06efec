"""PSNR, SSIM and LPIPS against closed forms; what the two reference reconstructions promise."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.image import structural_similarity_index_measure

from vidgen.common.errors import UserError
from vidgen.losses.lpips import LPIPS
from vidgen.metrics.reconstruction import (
    MAX_PSNR,
    ReconstructionMetrics,
    _downsample,
    clip_metrics,
    downsample_baseline,
    downsample_grids,
    lpips,
    mean_color_baseline,
    psnr,
    ssim,
)

ONE_LEVEL = 2 / 255  # one uint8 step on the [-1, 1] scale


def random_clip(*shape, seed=0):
    """Uniform in [-0.8, 0.8]: no offset below is clamped."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 1.6 - 0.8


@pytest.mark.parametrize("levels", [1, 5, 20])
@pytest.mark.parametrize("per", ["clip", "frame"])
def test_psnr_of_a_constant_offset(levels, per):
    clip = random_clip(2, 3, 4, 8, 8)
    expected = 20 * math.log10(255 / levels)
    torch.testing.assert_close(
        psnr(clip + levels * ONE_LEVEL, clip, per=per), torch.full((2,), expected).double(), atol=1e-5, rtol=0
    )


def test_psnr_rounds_to_pixels_by_default():
    clip = (torch.randint(0, 256, (1, 3, 2, 8, 8), generator=torch.Generator().manual_seed(0)) / 127.5 - 1) * 0.9
    clip = ((clip + 1) * 127.5).round() / 127.5 - 1  # on the pixel levels
    nudged = clip + 0.3 * ONE_LEVEL
    assert psnr(nudged, clip).item() == MAX_PSNR
    assert psnr(nudged, clip, quantize=False).item() == pytest.approx(20 * math.log10(255 / 0.3), abs=1e-3)


def test_psnr_clamps_values_outside_the_range():
    white = torch.ones(1, 3, 2, 8, 8)
    assert psnr(white * 3, white).item() == psnr(white * 3, white, quantize=False).item() == MAX_PSNR


def test_psnr_per_frame_is_the_mean_of_frames_and_per_clip_pools_the_error():
    clip = random_clip(1, 3, 2, 8, 8)
    off = clip.clone()
    off[:, :, 0] += 10 * ONE_LEVEL
    off[:, :, 1] += 2 * ONE_LEVEL
    decibels = [20 * math.log10(255 / 10), 20 * math.log10(255 / 2)]
    assert psnr(off, clip, per="frame").item() == pytest.approx(sum(decibels) / 2, abs=1e-4)
    assert psnr(off, clip, per="clip").item() == pytest.approx(10 * math.log10(255**2 / 52), abs=1e-4)


def test_ssim_is_one_for_identical_clips_and_falls_with_noise():
    clip = random_clip(2, 3, 3, 16, 16)
    torch.testing.assert_close(ssim(clip, clip), torch.ones(2).double(), atol=1e-9, rtol=0)
    weak, strong = (ssim(clip + s * random_clip(2, 3, 3, 16, 16, seed=1), clip) for s in (0.1, 0.5))
    assert (strong < weak).all() and (weak < 1).all()


@pytest.mark.parametrize("size", [(6, 6), (13, 8), (20, 33)])
def test_ssim_is_that_of_torchmetrics_in_float64(size, monkeypatch):
    monkeypatch.setattr("vidgen.metrics.reconstruction.SSIM_CHUNK", 3 * size[0] * size[1] * 2)  # more than one chunk
    clip = random_clip(2, 3, 3, *size)
    off = clip + 0.2 * random_clip(2, 3, 3, *size, seed=1)
    pixels = [((x.double() + 1) * 127.5).transpose(1, 2) for x in (off, clip)]
    expected = [structural_similarity_index_measure(a, b, data_range=255.0) for a, b in zip(*pixels, strict=True)]
    torch.testing.assert_close(ssim(off, clip, quantize=False), torch.stack(expected), atol=1e-10, rtol=0)


@pytest.mark.parametrize("level", [0, 96, 254, 255])
@pytest.mark.parametrize("quantize", [True, False])
def test_ssim_of_a_flat_clip_with_itself_is_one(level, quantize):
    """Variances are small differences of large squares there: float32 gives 0.99 for some levels."""
    color = torch.tensor([level, (level + 100) % 256, 255 - level])
    clip = (color / 127.5 - 1).view(1, 3, 1, 1, 1).expand(1, 3, 2, 32, 32)
    assert ssim(clip, clip, quantize=quantize).item() == pytest.approx(1, abs=1e-9)


def test_ssim_of_a_faint_difference_is_that_of_exact_arithmetic():
    """A checkerboard of one level on a bright clip: variance 0.25 beside a mean square of 254^2."""
    checkers = (torch.arange(32)[:, None] + torch.arange(32)) % 2
    clip = ((254 + checkers) / 127.5 - 1).expand(1, 3, 2, 32, 32)
    flat = torch.full_like(clip, 255 / 127.5 - 1)
    mean, variance, c1, c2 = 254.5, 0.25, (0.01 * 255) ** 2, (0.03 * 255) ** 2  # a window holds equal shares
    expected = (2 * mean * 255 + c1) / (mean**2 + 255**2 + c1) * c2 / (variance + c2)
    assert ssim(clip, flat).item() == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("quantize", [True, False])
def test_psnr_of_nearly_identical_clips_keeps_its_digits(quantize):
    """One of 98 304 values is off by one level: an error far below the clip's own power."""
    clip = torch.full((1, 3, 8, 64, 64), 254 / 127.5 - 1)
    off = clip.clone()
    off[0, 0, 0, 0, 0] = 1.0
    expected = min(MAX_PSNR, 20 * math.log10(255) + 10 * math.log10(clip.numel()))
    assert psnr(off, clip, quantize=quantize).item() == pytest.approx(expected, abs=1e-3)


def test_ssim_of_flat_clips_is_the_luminance_term():
    black, dark = torch.full((1, 3, 2, 12, 12), -1.0), torch.full((1, 3, 2, 12, 12), -1 + 10 * ONE_LEVEL)
    c1 = (0.01 * 255) ** 2
    assert ssim(black, dark).item() == pytest.approx(c1 / (10**2 + c1), abs=1e-5)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_values_per_clip_do_not_depend_on_the_batch(metric):
    a, b = random_clip(3, 3, 2, 8, 8), random_clip(3, 3, 2, 8, 8, seed=1)
    single = torch.cat([metric(a[i : i + 1], b[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(metric(a, b), single)


def test_accumulated_metrics_are_means_over_clips_however_batched():
    a, b = random_clip(5, 3, 2, 8, 8), random_clip(5, 3, 2, 8, 8, seed=1)
    metrics, other = ReconstructionMetrics(), ReconstructionMetrics()
    metrics.update(a[:3], b[:3])
    other.update(a[3:], b[3:])
    metrics.totals += other.totals  # as accelerator.reduce does
    result = metrics.compute()
    assert result["num_clips"] == 5
    assert result["psnr"] == pytest.approx(psnr(a, b).mean().item())
    assert result["ssim"] == pytest.approx(ssim(a, b).mean().item())


def test_bad_input_is_named():
    clip = random_clip(1, 3, 2, 8, 8)
    with pytest.raises(ValueError, match="one shape"):
        psnr(clip[:, :, :1], clip)
    with pytest.raises(UserError, match="NaN"):
        psnr(clip * float("nan"), clip)
    with pytest.raises(UserError, match="NaN"):
        psnr(clip * float("inf"), clip, quantize=False)
    with pytest.raises(ValueError, match="'clip' or 'frame'"):
        psnr(clip, clip, per="video")
    with pytest.raises(UserError, match="6 x 6"):
        ssim(clip[..., :5], clip[..., :5])
    with pytest.raises(ValueError, match="no clips"):
        ReconstructionMetrics().compute()


def test_mean_color_is_that_of_each_clip():
    clip = random_clip(2, 3, 4, 8, 8)
    color = mean_color_baseline(clip)
    assert color.shape == clip.shape
    torch.testing.assert_close(color[1, 2], clip[1, 2].mean().expand(4, 8, 8))


def test_downsampling_keeps_constant_clips_and_full_resolution():
    constant = torch.full((2, 3, 4, 8, 12), 0.3)
    torch.testing.assert_close(downsample_baseline(constant, 10), constant)
    clip = random_clip(2, 3, 4, 8, 12)
    torch.testing.assert_close(downsample_baseline(clip, clip[0].numel()), clip)


def test_downsampling_beats_the_mean_color_and_improves_with_more_values():
    ramp = torch.linspace(-1, 1, 16)
    clip = (ramp[:, None] * ramp).expand(1, 3, 8, 16, 16).contiguous()
    scores = [psnr(downsample_baseline(clip, n), clip).item() for n in (12, 48, 192)]
    assert psnr(mean_color_baseline(clip), clip).item() < scores[0] < scores[1] < scores[2]


def test_downsampling_antialiases_in_space_and_time():
    """One line in four is white, none where plain interpolation would look; brightness must survive."""
    white = (torch.arange(16) % 4 == 0) * 2.0 - 1
    for lines in (white, white[:, None], white[:, None, None]):
        clip = lines.expand(1, 3, 16, 16, 16)
        torch.testing.assert_close(_downsample(clip, (4, 4, 4)).mean(), clip.mean(), atol=0.1, rtol=0)


def test_downsampling_chooses_the_best_grid_for_each_clip():
    """A still picture keeps its pixels, a flickering flat one its frames, also within one batch."""
    picture = random_clip(1, 3, 1, 8, 8).expand(1, 3, 4, 8, 8)
    flicker = random_clip(1, 3, 4, 1, 1).expand(1, 3, 4, 8, 8)
    both = torch.cat([picture, flicker])
    torch.testing.assert_close(downsample_baseline(both, 3 * 64), both, atol=1e-5, rtol=0)


def test_downsampling_does_not_depend_on_the_batch():
    clips = torch.stack([random_clip(3, 6, 8, 8, seed=i) * (i + 1) / 4 for i in range(3)])
    torch.testing.assert_close(downsample_baseline(clips, 100)[1:2], downsample_baseline(clips[1:2], 100))


@given(
    shape=st.tuples(st.just(3), st.integers(1, 9), st.integers(1, 40), st.integers(1, 40)),
    share=st.floats(1e-6, 1),
)
@settings(max_examples=200, deadline=None)
def test_grids_hold_the_values_and_fit_the_clip(shape, share):
    num_values = max(1, int(share * math.prod(shape)))
    grids = downsample_grids(shape, num_values)
    assert grids
    for t, h, w in grids:
        assert 3 * t * h * w >= num_values
        assert 1 <= t <= shape[1] and 1 <= h <= shape[2] and 1 <= w <= shape[3]
        assert 3 * t * h * (w - 1) < num_values  # one column fewer would not do


def test_grids_keep_the_aspect():
    assert (1, 5, 10) in downsample_grids((3, 4, 50, 100), 150)
    assert (1, 10, 5) in downsample_grids((3, 4, 100, 50), 150)


@pytest.mark.parametrize("num_values", [0, 3 * 2 * 8 * 8 + 1])
def test_impossible_numbers_of_values_are_refused(num_values):
    with pytest.raises(UserError, match="num_values must be in"):
        downsample_baseline(random_clip(1, 3, 2, 8, 8), num_values)


# --- LPIPS ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return LPIPS("squeeze")  # random features are a distance too


def test_lpips_is_the_mean_over_frames_of_pixels_a_file_would_hold(network):
    a, b = random_clip(2, 3, 3, 32, 32), random_clip(2, 3, 3, 32, 32, seed=1)
    frames = [network(x, y) for x, y in zip(a.transpose(1, 2), b.transpose(1, 2), strict=True)]
    expected = torch.stack(frames).mean(dim=1)
    torch.testing.assert_close(lpips(a, b, network, quantize=False), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(lpips(a, b, network), expected, rtol=2e-2, atol=0)
    assert (lpips(a, b, network) != expected).all()
    assert lpips(a, a, network).tolist() == [0, 0]
    gray = torch.zeros(1, 3, 1, 32, 32) + 1 / 255  # on a pixel level
    assert lpips(gray + 0.3 * ONE_LEVEL, gray, network).item() == 0
    assert lpips(gray + 0.3 * ONE_LEVEL, gray, network, quantize=False).item() > 0


def test_accumulated_metrics_with_lpips_merge_across_processes(network):
    a, b = random_clip(3, 3, 2, 32, 32), random_clip(3, 3, 2, 32, 32, seed=1)
    metrics, other = ReconstructionMetrics(lpips=network), ReconstructionMetrics(lpips=network)
    metrics.update(a[:1], b[:1])
    other.update(a[1:], b[1:])
    metrics.totals += other.totals
    result = metrics.compute()
    assert result.keys() == {"psnr", "psnr_frame", "ssim", "lpips_squeeze", "num_clips"} and result["num_clips"] == 3
    assert result["lpips_squeeze"] == pytest.approx(lpips(a, b, network).mean().item())
    assert result["ssim"] == pytest.approx(ssim(a, b).mean().item())
    assert result["psnr"] == pytest.approx(psnr(a, b).mean().item())


def test_metrics_have_names_and_use_pixels_or_floats(network):
    torch.manual_seed(1)
    other = LPIPS("alex")
    a = random_clip(2, 3, 3, 64, 64)
    b = a + random_clip(2, 3, 3, 64, 64, seed=1) * torch.tensor([0.01, 0.02, 0.1]).view(3, 1, 1)
    for quantize in (True, False):
        values = clip_metrics(a, b, [network, other], quantize=quantize)
        assert values.keys() == {"psnr", "psnr_frame", "ssim", "lpips_squeeze", "lpips_alex"}
        torch.testing.assert_close(values["psnr"], psnr(a, b, quantize=quantize))
        torch.testing.assert_close(values["psnr_frame"], psnr(a, b, per="frame", quantize=quantize))
        assert (values["psnr_frame"] > values["psnr"]).all()
        torch.testing.assert_close(values["ssim"], ssim(a, b, quantize=quantize))
        for name, net in (("lpips_squeeze", network), ("lpips_alex", other)):
            torch.testing.assert_close(values[name], lpips(a, b, net, quantize=quantize), rtol=1e-6, atol=0)
        metrics = ReconstructionMetrics([network, other], quantize=quantize)
        metrics.update(a, b)
        means = {name: value.double().mean().item() for name, value in values.items()}
        assert metrics.compute() == pytest.approx({**means, "num_clips": 2})
    assert clip_metrics(a, b)["psnr"].tolist() != clip_metrics(a, b, quantize=False)["psnr"].tolist()


def test_metrics_are_the_same_under_autocast(network):
    a = random_clip(1, 3, 2, 32, 32)
    b = a + 0.05 * random_clip(1, 3, 2, 32, 32, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = ssim(a, b), lpips(a, b, network)
    assert half == (ssim(a, b), lpips(a, b, network))
