import math
import re

import pytest

from reports.charts import Line, line_chart, short


def paths(chart, style):
    """Points of every line of a style, as numbers."""
    found = re.findall(rf'<path class="line {style}" d="([^"]*)"', chart)
    return [[tuple(map(float, point.split())) for point in path[1:].split("L")] for path in found]


def ticks(chart, axis):
    return re.findall(rf'<span class="{axis}"[^>]*>([^<]*)</span>', chart)


def test_a_line_by_hand():
    chart = line_chart("Loss", [Line("train", [0, 5, 10], [0.0, 4.0, 8.0], "l0")], x_label="step")
    assert paths(chart, "l0") == [[(0, 100), (50, 50), (100, 0)]]
    assert ticks(chart, "y") == ["0", "2", "4", "6", "8"]
    assert ticks(chart, "x") == ["0", "5", "10"]
    assert 'aria-label="Loss: train from 0 to 8"' in chart
    assert "legend" not in chart


def test_a_logarithmic_axis_leaves_zeros_out():
    chart = line_chart(
        "Use", [Line("a", [0, 1, 2], [100, 1, 0], "l0")], x_label="%", x_span=(0, 4), log_y=True, level=("even", 10)
    )
    assert paths(chart, "l0") == [[(0, 0), (25, 100)]]
    assert '<path class="level" d="M0 50.00H100"' in chart
    assert ">even</span>" in chart


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-30])
def test_a_flat_line_and_a_single_point(value):
    flat = line_chart("Flat", [Line("a", [1, 2], [value] * 2, "l0")], x_label="step")
    (points,) = paths(flat, "l0")
    assert points[0][1] == points[1][1]
    assert 0 <= points[0][1] <= 100
    single = line_chart("One", [Line("a", [7], [value], "l0")], x_label="step")
    assert re.search(r'd="M[\d.]+ [\d.]+h.01"', single)


def test_values_that_are_not_finite_are_left_out():
    chart = line_chart("Loss", [Line("a", [0, 1, 2], [1.0, math.nan, 2.0], "l0")], x_label="step")
    assert paths(chart, "l0") == [[(0, 100), (100, 0)]]
    only = line_chart("Loss", [Line("a", [0, 1], [math.nan, math.inf], "l0")], x_label="step")
    assert 'class="line l0" d=""' in only


def test_dead_codes_alone_can_be_drawn():
    assert 'd=""' in line_chart("Use", [Line("a", [0, 1], [0, 0], "l0")], x_label="%", log_y=True)


def test_long_lines_are_thinned_and_keep_their_ends_and_their_peaks():
    ys = [1.0, *(0.5 + 0.01 * (step % 2) for step in range(9999)), 2.0]
    ys[4321], ys[7654], ys[5000:6000] = 3.0, 0.0, [math.nan] * 1000
    (points,) = paths(line_chart("Loss", [Line("a", range(10_001), ys, "l0")], x_label="step"), "l0")
    assert len(points) == 300
    assert points[0] == (0, 66.67)
    assert points[-1] == (100, 33.33)
    assert (43.21, 0) in points
    assert (76.54, 100) in points
    assert points == sorted(points)


def test_names_are_text():
    lines = [Line("<b>", [0, 1], [0, 1], "l0"), Line("b", [0, 1], [1, 0], "l1")]
    chart = line_chart("<script>", lines, x_label="<i>")
    assert "<b>" not in chart
    assert "<script>" not in chart
    assert "<i>" not in chart
    assert ">&lt;b&gt;</span>" in chart


def test_short_numbers():
    assert [short(value) for value in (0, 0.05, 12, 1234, 30_000, 1.5e6, 1e-5)] == [
        *("0", "0.05", "12", "1234", "30k", "1.5M", "1e-05"),
    ]


def test_bars_and_names_stand_where_they_belong():
    line = Line("a", [0, 1], [1.0, 2.0], "l3", bounds=[(0.0, 2.0), (1.0, 4.0)])
    chart = line_chart("Recall", [line], x_label="group", x_span=(-0.5, 1.5), x_names=["few", "many"])
    assert re.search(r'<path class="bound l3" d="([^"]*)"', chart)[1] == "M25.00 100.00V50.00M75.00 75.00V0.00"
    assert ticks(chart, "y") == ["0", "1", "2", "3", "4"]
    assert ticks(chart, "x") == ["few", "many"]
    assert 'left:25.00%" aria-hidden="true">few' in chart
