"""Line charts as markup: stretched SVG for the lines, HTML for the words, so that both stay readable at any width."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from reports.markup import Markup, element, join

_MAX_POINTS = 300


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        name: for the legend.
        xs: ascending.
        ys: as many; a value that is not finite, or not positive on a logarithmic axis, is left out.
        style: class of its colour.
        bounds: lower and upper end of an upright bar at every point; None draws none.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: str
    bounds: Sequence[tuple[float, float]] | None = None


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    x_span: tuple[float, float] | None = None,
    log_y: bool = False,
    level: tuple[str, float] | None = None,
    x_names: Sequence[str] | None = None,
) -> Markup:
    """A figure with its caption, axes and, for several lines, a legend.

    Args:
        title: caption, and what a screen reader says.
        lines: at least one, each with at least one point.
        x_label: below the axis.
        x_span: ends of the x axis; None takes the lines'.
        log_y: logarithmic y axis.
        level: name and height of a dashed horizontal line.
        x_names: what stands below 0, 1, 2 and so on; None writes numbers.
    """
    thinned = [_thinned(line) for line in lines]
    x_low, x_high = x_span or _span([x for line in thinned for x in line.xs])
    drawn = [y for line in thinned for y in (*line.ys, *(end for bar in line.bounds or () for end in bar))]
    heights = [y for y in drawn if math.isfinite(y) and (y > 0 or not log_y)]
    heights += [level[1]] if level else []
    y_ticks = _log_ticks(heights) if log_y else _ticks(*_span(heights or [0.0]))
    scale = math.log10 if log_y else float
    y_low = min(scale(y_ticks[0]), *(scale(height) for height in heights)) if heights else scale(y_ticks[0])
    y_high = max(scale(y_ticks[-1]), *(scale(height) for height in heights)) if heights else scale(y_ticks[-1])
    y_high += (y_high == y_low) * 1.0

    def place_x(x: float) -> float:
        return 100 * (x - x_low) / (x_high - x_low)

    def place_y(y: float) -> float:
        return 100 - 100 * (scale(y) - y_low) / (y_high - y_low)

    grid = "".join(f"M0 {place_y(tick):.2f}H100" for tick in y_ticks)
    paths = [element("path", class_="grid", d=grid)]
    if level:
        paths.append(element("path", class_="level", d=f"M0 {place_y(level[1]):.2f}H100"))
    for line in thinned:
        points = [
            (place_x(x), place_y(y))
            for x, y in zip(line.xs, line.ys, strict=True)
            if math.isfinite(y) and (y > 0 or not log_y)
        ]
        paths.append(element("path", class_=f"line {line.style}", d=_path(points)))
        if line.bounds is not None:
            ends = [
                (place_x(x), *bar) for x, bar in zip(line.xs, line.bounds, strict=True) if min(bar) > 0 or not log_y
            ]
            bars = "".join(f"M{x:.2f} {place_y(low):.2f}V{place_y(high):.2f}" for x, low, high in ends)
            paths.append(element("path", class_=f"bound {line.style}", d=bars))
    x_words = {tick: short(tick) for tick in _ticks(x_low, x_high)} if x_names is None else dict(enumerate(x_names))
    words = [
        element("span", short(tick), class_="y", style=f"top:{place_y(tick):.2f}%", aria_hidden="true")
        for tick in y_ticks
    ] + [
        element("span", name, class_="x", style=f"left:{place_x(tick):.2f}%", aria_hidden="true")
        for tick, name in x_words.items()
        if x_low <= tick <= x_high
    ]
    drawing = element("svg", *paths, viewBox="0 0 100 100", preserveAspectRatio="none", aria_hidden="true")
    plot = element("div", drawing, *words, class_="plot", role="img", aria_label=_spoken(title, lines))
    return element(
        "figure",
        element("figcaption", title),
        plot,
        element("div", x_label, class_="x-label"),
        _legend(lines, level),
        class_="chart",
    )


def short(value: float) -> str:
    """A number for an axis: 0.05, 12, 3k, 1.5M, 1e-05."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:g}M"
    if size >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{value:.4g}"


def _legend(lines: Sequence[Line], level: tuple[str, float] | None) -> Markup:
    entries = [element("span", line.name, class_=f"entry {line.style}") for line in lines if len(lines) > 1]
    if level:
        entries.append(element("span", level[0], class_="entry dashed"))
    return element("div", *entries, class_="legend") if entries else join()


def _spoken(title: str, lines: Sequence[Line]) -> str:
    ends = "; ".join(f"{line.name} from {short(line.ys[0])} to {short(line.ys[-1])}" for line in lines)
    return f"{title}: {ends}"


def _thinned(line: Line) -> Line:
    """At most so many points: the ends, and the lowest and the highest of every stretch between, so that peaks stay."""
    finite = [place for place, y in enumerate(line.ys) if math.isfinite(y)]
    count, stretches = len(finite), _MAX_POINTS // 2 - 1
    if count <= _MAX_POINTS:
        return line
    bounds = [1 + index * (count - 2) // stretches for index in range(stretches + 1)]
    inner = [finite[begin:end] for begin, end in pairwise(bounds)]
    extremes = {first(places, key=line.ys.__getitem__) for places in inner for first in (min, max)}
    places = [finite[0], *sorted(extremes), finite[-1]]
    return replace(
        line,
        xs=[line.xs[place] for place in places],
        ys=[line.ys[place] for place in places],
        bounds=None if line.bounds is None else [line.bounds[place] for place in places],
    )


def _path(points: Sequence[tuple[float, float]]) -> str:
    if len(points) == 1:  # a dot
        return f"M{points[0][0]:.2f} {points[0][1]:.2f}h.01"
    return "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in points) if points else ""


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Lowest and highest; from zero where they are one."""
    low, high = min(values), max(values)
    if high > low:
        return low, high
    return min(low, 0.0), max(high, 0.0) or float(low == 0)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers around low..high, about five."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.10g}") for index in range(first, last + 1)]


def _log_ticks(heights: Sequence[float]) -> list[float]:
    """Powers of ten around the heights, and 2 and 5 times them where there are few."""
    if not heights:
        return [1.0, 10.0]
    first, last = math.floor(math.log10(min(heights))), math.ceil(math.log10(max(heights)))
    if last - first > 2:
        return [10.0**power for power in range(first, last + 1)]
    inside = [factor * 10.0**power for power in range(first, last + 1) for factor in (1, 2, 5)]
    below = [tick for tick in inside if tick <= min(heights)]
    above = [tick for tick in inside if tick >= max(heights)]
    return [tick for tick in inside if below[-1] <= tick <= above[0]]
