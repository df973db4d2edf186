"""Curves of a run as a PNG for its card: the Hub's page shows no scripts, and no SVG of a repository."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..report.charts import nice_ticks, tick_label


WIDTH, HEIGHT, COLUMNS = 720, 420, 3  # pixels of a panel, twice what it is shown at; panels in a row
LEFT, RIGHT, TOP, BOTTOM = 100, 24, 60, 80
INK, GRID, LINE = "#404040", "#e0e0e0", "#2563eb"
MAX_POINTS = 1000


def draw_curves(path: Path, series: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """
    Draw one panel for each series.

    Args:
        path (`Path`): The PNG to write.
        series (`Mapping[str, Sequence[tuple[float, float]]]`): Title to (step, value); values that are not finite are left
            out.
    """
    clean = {
        name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)] for name, points in series.items()
    }
    clean = {name: points for name, points in clean.items() if points}
    columns = max(1, min(COLUMNS, len(clean)))
    rows = max(1, -(-len(clean) // columns))
    image = Image.new("RGB", (columns * WIDTH, rows * HEIGHT), "white")
    for i, (name, points) in enumerate(clean.items()):
        panel = Image.new("RGB", (WIDTH, HEIGHT), "white")
        _panel(ImageDraw.Draw(panel), name, points[:: max(1, len(points) // MAX_POINTS)])
        image.paste(panel, (i % columns * WIDTH, i // columns * HEIGHT))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"_{path.name}")
    image.quantize(64).save(partial, "PNG", optimize=True)
    partial.replace(path)


def _panel(draw: ImageDraw.ImageDraw, title: str, points: Sequence[tuple[float, float]]) -> None:
    small, large = ImageFont.load_default(22), ImageFont.load_default(28)
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x_ticks, y_ticks = nice_ticks(min(xs), max(xs)), nice_ticks(min(ys), max(ys))
    x_low, x_high = (min(xs), max(xs)) if min(xs) < max(xs) else (x_ticks[0], x_ticks[-1])
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    draw.text((LEFT, 14), title, fill=INK, font=large)
    for y in y_ticks:
        draw.line([at(x_low, y), at(x_high, y)], fill=GRID, width=2)
        draw.text((LEFT - 12, at(x_low, y)[1]), tick_label(y), fill=INK, font=small, anchor="rm")
    for x in x_ticks:
        if x_low <= x <= x_high:
            draw.text((at(x, y_low)[0], HEIGHT - BOTTOM + 10), tick_label(x), fill=INK, font=small, anchor="ma")
    draw.text((WIDTH - RIGHT, HEIGHT - 8), "step", fill=INK, font=small, anchor="rb")
    if len(points) == 1:
        x, y = at(*points[0])
        draw.ellipse([x - 5, y - 5, x + 5, y + 5], fill=LINE)
    draw.line([at(*point) for point in points], fill=LINE, width=4, joint="curve")
