"""The pooled-pixels detector: what its features say, and what they cannot see."""

import pytest
import torch

from vidgen.metrics import FeatureStatistics, PooledPixels, frechet_distance, get_detector

COLOUR, FIRST, LAST, DETAIL = slice(0, 48), slice(48, 64), slice(64, 80), slice(80, 96)
MOTION_1, MOTION_4 = slice(96, 112), slice(112, 128)


@pytest.fixture
def detector():
    return get_detector("pooled_pixels")


def moving_squares(n, seed=0, size=16, frames=8):
    """Clips (n, 3, frames, size, size): a square of random colour crosses a flat background from left to right."""
    g = torch.Generator().manual_seed(seed)
    clips = torch.rand(n, 3, 1, 1, 1, generator=g).sub(1).expand(n, 3, frames, size, size).clone()
    colours = torch.rand(n, 3, generator=g)
    rows = torch.randint(0, size - 4, (n,), generator=g).tolist()
    for i, row in enumerate(rows):
        for t in range(frames):
            clips[i, :, t, row : row + 4, t : t + 4] = colours[i, :, None, None]
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


def test_a_flat_clip_is_its_colour_and_nothing_else(detector):
    colour = torch.tensor([0.5, -0.25, 0.75])
    values = detector(colour.view(1, 3, 1, 1, 1).expand(1, 3, 6, 8, 8))[0]
    torch.testing.assert_close(values[COLOUR], colour.repeat_interleave(16))
    luma = 0.299 * 0.5 - 0.587 * 0.25 + 0.114 * 0.75
    torch.testing.assert_close(values[FIRST], torch.full((16,), luma))
    torch.testing.assert_close(values[LAST], torch.full((16,), luma))
    torch.testing.assert_close(values[DETAIL.start :], torch.zeros(48), atol=1e-6, rtol=0)


def test_cells_are_where_they_are_said_to_be(detector):
    clip = torch.zeros(1, 3, 3, 8, 8)
    clip[:, 1, :, 2:4, 6:8] = 1  # green, second row, last column
    expected = torch.zeros(48)
    expected[16 + 4 + 3] = 1
    torch.testing.assert_close(detector(clip)[0, COLOUR], expected)


def test_detail_is_the_size_of_steps_between_pixels_either_way(detector):
    stripes = (torch.arange(16) % 2).float().expand(1, 3, 4, 16, 16)
    across, down = detector(stripes)[0, DETAIL], detector(stripes.transpose(3, 4))[0, DETAIL]
    torch.testing.assert_close(across, across.new_ones(16), atol=0.15, rtol=0)  # the last column has no neighbour
    torch.testing.assert_close(down.view(4, 4), across.view(4, 4).T)


def test_motion_is_the_size_of_change_at_its_lag(detector):
    blink = torch.tensor([0.0, 1, 0, 1, 0, 1, 0, 1]).view(1, 1, 8, 1, 1).expand(1, 3, 8, 8, 8)
    values = detector(blink)[0]
    torch.testing.assert_close(values[MOTION_1], torch.ones(16))
    torch.testing.assert_close(values[MOTION_4], torch.zeros(16))
    torch.testing.assert_close(detector(0.5 * blink)[0, MOTION_1], torch.full((16,), 0.5))


def test_reversal_swaps_the_thirds_and_changes_nothing_else(detector):
    clips = moving_squares(4)
    forward, backward = detector(clips), detector(clips.flip(2))
    assert (forward - backward).abs().max() > 0.1
    torch.testing.assert_close(backward[:, FIRST], forward[:, LAST])
    torch.testing.assert_close(backward[:, LAST], forward[:, FIRST])
    for part in (COLOUR, DETAIL, MOTION_1, MOTION_4):
        torch.testing.assert_close(backward[:, part], forward[:, part])


def test_faults_of_generated_clips_are_farther_than_other_real_clips(detector):
    real, other = moving_squares(200), moving_squares(200, seed=1)
    blurred = torch.nn.functional.avg_pool3d(other, (1, 5, 5), stride=1, padding=(0, 2, 2))
    faults = {
        "noise": other + 0.3 * torch.randn(other.shape, generator=torch.Generator().manual_seed(0)),
        "blur": blurred,
        "frozen": other[:, :, :1].expand_as(other),
        "reversed": other.flip(2),
        "other colours": -other,
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
    with pytest.raises(ValueError, match="known are i3d, .*pooled_pixels"):
        get_detector("xyz")
