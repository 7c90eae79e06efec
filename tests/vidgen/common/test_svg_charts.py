"""Line charts as SVG: places of points, axes, and text that needs escaping."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from vidgen.common.svg_charts import COLORS, MAX_POINTS, Line, line_chart

LINEAR = {0: 1.0, 10: 3.0, 20: 2.0}


def places(chart: str) -> list[list[tuple[float, float]]]:
    """The points of every line, in pixels."""
    lines = ElementTree.fromstring(chart).iter("polyline")
    return [[tuple(map(float, point.split(","))) for point in line.get("points").split()] for line in lines]


def ticks(chart: str, anchor: str) -> list[float]:
    texts = ElementTree.fromstring(chart).iter("text")
    return [float(text.text) for text in texts if text.get("text-anchor") == anchor]


def test_points_are_where_their_values_are():
    [[low, high, middle]] = places(line_chart("loss", [Line("run", LINEAR, 0)]))
    assert low[0] < high[0] < middle[0] and high[1] < middle[1] < low[1], "y grows downward in an SVG"
    assert middle[1] == pytest.approx((low[1] + high[1]) / 2, abs=0.11)
    assert high[0] == pytest.approx((low[0] + middle[0]) / 2, abs=0.11)


@pytest.mark.parametrize(
    ("values", "is_log"),
    [([0.01, 0.1, 1.0], True), ([1.0, 5.0], False), ([-1.0, 100.0], False), ([2.0, 2.0], False), ([0.0, 0.0], False)],
)
def test_axes_have_a_few_ticks_within_the_values(values, is_log):
    chart = line_chart("loss", [Line("run", dict(enumerate(values)), 0)])
    assert ("loss (log)" in chart) == is_log
    y = ticks(chart, "end")
    assert 2 <= len(y) <= 8 and y == sorted(y)
    if len(set(values)) > 1:
        assert min(values) <= y[0] and y[-1] <= max(values)
    if is_log:
        [line] = places(chart)
        assert line[1][1] == pytest.approx((line[0][1] + line[2][1]) / 2, abs=0.11)


def test_ticks_of_whole_numbers_are_whole():
    channels = line_chart("std", [Line("latent", {1: 0.5, 2: 0.7, 3: 0.6}, 0)])
    assert ticks(channels, "middle") == [1, 2, 3]
    frequencies = line_chart("power", [Line("latent", {0.0: 1.0, 0.25: 0.7}, 0)])
    assert len(ticks(frequencies, "middle")) > 2


def test_names_are_escaped_and_the_best_point_is_marked():
    chart = line_chart("a<b", [Line("x&y", LINEAR, 1, marked=10)])
    assert "a&lt;b" in chart and "x&amp;y, best: 3 at 10" in chart and COLORS[1] in chart


def test_long_curves_are_averaged_and_more_lines_than_colors_are_dashed():
    long = dict.fromkeys(range(10 * MAX_POINTS), 1.0) | {1: 11.0}
    [points] = places(line_chart("loss", [Line("run", long, 0)]))
    assert len(points) == MAX_POINTS
    first, other = (line_chart("loss", [Line("run", LINEAR, style)]) for style in (0, len(COLORS)))
    assert first != other and first == other.replace('dasharray="6 3"', 'dasharray=""')
    with pytest.raises(ValueError, match="'loss' has no points"):
        line_chart("loss", [Line("run", {}, 0)])
