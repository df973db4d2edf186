"""Line charts as plain numbers for the template, which draws them as inline SVG."""

import json
import math
from collections.abc import Mapping, Sequence

from .intervals import Estimate


WIDTH, HEIGHT = 360, 220  # SVG units; near the width of a phone, so that text keeps its size there
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 24, 36


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """
    Round tick values (steps of 1, 2, 2.5 or 5 times a power of ten) that cover `[low, high]`.

    Args:
        low (`float`): Smallest value shown.
        high (`float`): Largest value shown; equal to `low` is allowed.
        count (`int`, *optional*, defaults to `4`): Intervals aimed for.

    Returns:
        `list[float]`: Ascending; the first is <= `low`, the last >= `high`.
    """
    if high - low <= max(1e-12, 1e-9 * max(abs(low), abs(high))):  # flat, up to rounding
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def tick_label(value: float) -> str:
    """Shortest plain spelling of a tick: no trailing zeros, no `-0`."""
    text = f"{value:.6g}"
    return "0" if text == "-0" else text


def layout(series: Mapping[str, Sequence[tuple[float, float]]]) -> dict:
    """
    Place the points of a line chart in SVG units.

    Args:
        series (`Mapping[str, Sequence[tuple[float, float]]]`): Name to (x, y) points. Points that are not finite are
            left out; a series without any keeps its legend entry.

    Returns:
        `dict`: `width`, `height`, the plot frame, `x_ticks`, `y_ticks` (position, label), `lines` (name, SVG path, end
        point), and `data` for the page's script as JSON: the values at the frame's ends, and each line's name and points.
    """
    clean = {
        name: [(float(x), float(y)) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        for name, points in series.items()
    }
    every = [p for points in clean.values() for p in points]
    xs, ys = [x for x, _ in every] or [0.0, 1.0], [y for _, y in every] or [0.0, 1.0]
    x_ticks, y_ticks = nice_ticks(min(xs), max(xs)), nice_ticks(min(ys), max(ys))
    x_low, x_high = min(xs), max(xs)
    if x_low == x_high:
        x_low, x_high = x_ticks[0], x_ticks[-1]
    y_low, y_high = y_ticks[0], y_ticks[-1]
    to_x = lambda x: LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)  # noqa: E731
    to_y = lambda y: HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)  # noqa: E731
    lines = []
    for name, points in clean.items():
        path = " ".join(f"{'L' if i else 'M'}{to_x(x):.1f} {to_y(y):.1f}" for i, (x, y) in enumerate(points))
        last = (round(to_x(points[-1][0]), 1), round(to_y(points[-1][1]), 1)) if points else None
        text = f"{name}: {points[-1][1]:.4g} at {tick_label(points[-1][0])}" if points else name
        lines.append({"name": name, "path": path, "end": last, "text": text})
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "bottom": HEIGHT - BOTTOM,
        "top": TOP,
        "x_ticks": [(round(to_x(x), 1), tick_label(x)) for x in x_ticks if x_low <= x <= x_high],
        "y_ticks": [(round(to_y(y), 1), tick_label(y)) for y in y_ticks],
        "lines": lines,
        "data": json.dumps(
            {
                "x": [x_low, x_high],
                "y": [y_low, y_high],
                "lines": [[name, [[x, float(f"{y:.6g}")] for x, y in points]] for name, points in clean.items()],
            }
        ),
    }


def interval_bars(values: Mapping[str, Estimate], min_span: float = 0.0, width: int = 80) -> dict[str, dict]:
    """
    Estimates as bars on one scale, from the lowest to the highest end of their intervals.

    Args:
        values (`Mapping[str, Estimate]`): Name to estimate.
        min_span (`float`, *optional*, defaults to `0.0`): The scale covers at least so much, so that what hardly differs looks
            like it.
        width (`int`, *optional*, defaults to `80`): In SVG units.

    Returns:
        `dict[str, dict]`: Name to the positions `value`, `low` and `high`; without what is not finite.
    """
    values = {name: e for name, e in values.items() if all(map(math.isfinite, e))}
    low, high = min((e.low for e in values.values()), default=0.0), max((e.high for e in values.values()), default=0.0)
    span = max(high - low, min_span) or 1.0
    left = (low + high - span) / 2
    at = lambda x: round(4 + (width - 8) * (x - left) / span, 1)  # noqa: E731
    return {name: {"value": at(e.value), "low": at(e.low), "high": at(e.high)} for name, e in values.items()}
