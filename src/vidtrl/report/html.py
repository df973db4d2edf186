"""One HTML file that shows what a run did, and needs nothing else to be read."""

import base64
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..data.video import probe_video
from .charts import layout
from .intervals import Estimate


@dataclass
class Metric:
    """
    One row of the results.

    Args:
        name (`str`): What is measured.
        values (`Mapping[str, Estimate]`): One estimate a model, in the order of the columns.
        differences (`Mapping[str, Estimate]`): Model name to its difference from the model before it, over pairs. The
            first model has none.
        higher_is_better (`bool`, *optional*, defaults to `True`): Which sign of a difference is an improvement.
        percent (`bool`, *optional*, defaults to `False`): Show as a percentage.
        digits (`int`, *optional*, defaults to `0` for a percentage and `3` else): Digits after the point.
        help (`str`, *optional*, defaults to `""`): One sentence on how it is measured.
    """

    name: str
    values: Mapping[str, Estimate]
    differences: Mapping[str, Estimate]
    higher_is_better: bool = True
    percent: bool = False
    digits: int | None = None
    help: str = ""

    def show(self, value: float) -> str:
        """A value in the metric's unit."""
        digits = self.digits if self.digits is not None else 0 if self.percent else 3
        text = f"{100 * value:.{digits}f}\N{NO-BREAK SPACE}%" if self.percent else f"{value:.{digits}f}"
        return text.replace("-", "\N{MINUS SIGN}")

    def show_difference(self, value: float) -> str:
        """A signed difference; one of two percentages is in points."""
        return ("+" if value > 0 else "") + self.show(value).removesuffix("\N{NO-BREAK SPACE}%")

    def verdict(self, model: str) -> str:
        """Of a model against the one before it: `"better"`, `"worse"`, `"equal"` in every pair, or `"unclear"` when the
        interval holds 0."""
        difference = self.differences[model]
        if difference.value == difference.low == difference.high == 0:
            return "equal"
        if difference.low <= 0 <= difference.high:
            return "unclear"
        return "better" if (difference.value > 0) == self.higher_is_better else "worse"


@dataclass
class Clip:
    """
    One prompt and the video that each model made of it.

    Args:
        prompt (`str`): Shown as text, whatever it contains.
        videos (`Mapping[str, str | PathLike]`): Model name to h264 mp4 file, which is embedded.
        notes (`Mapping[str, str]`, *optional*): Model name to a line under its video.
        right (`Mapping[str, bool]`, *optional*): Model name to whether the video shows what was asked.
    """

    prompt: str
    videos: Mapping[str, str | os.PathLike]
    notes: Mapping[str, str] = field(default_factory=dict)
    right: Mapping[str, bool] = field(default_factory=dict)


@dataclass
class Chart:
    """
    A line chart.

    Args:
        title (`str`): What the chart shows.
        series (`Mapping[str, Sequence[tuple[float, float]]]`): Name to (x, y) points; at most four series.
        x_label (`str`): With unit.
        y_label (`str`): With unit.
        note (`str`, *optional*, defaults to `""`): One sentence on how to read it.
    """

    title: str
    series: Mapping[str, Sequence[tuple[float, float]]]
    x_label: str
    y_label: str
    note: str = ""

    def __post_init__(self):
        if not 1 <= len(self.series) <= 4:
            raise ValueError(f"chart {self.title!r} has {len(self.series)} series; it can show 1 to 4")


def _embed(path: str | os.PathLike) -> dict:
    """A video file as a data URI with its size, so that the page keeps its layout before the video is loaded."""
    info = probe_video(path)
    data = base64.b64encode(Path(path).read_bytes()).decode("ascii")
    return {"src": f"data:video/mp4;base64,{data}", "width": info.width, "height": info.height}


def write_report(
    path: str | os.PathLike,
    *,
    title: str,
    summary: str,
    notes: Sequence[str] = (),
    metrics: Sequence[Metric] = (),
    clips: Sequence[Clip] = (),
    clips_note: str = "",
    charts: Sequence[Chart] = (),
    settings: Mapping[str, object] | None = None,
    versions: Mapping[str, object] | None = None,
    num_open_clips: int = 12,
) -> Path:
    """
    Write a self-contained HTML report: videos are embedded, curves are inline SVG, nothing is requested from anywhere.
    All texts are escaped, and a Content-Security-Policy lets only the page's own script run.

    Args:
        path (`str` or `PathLike`): HTML file to write; replaced as a whole.
        title (`str`): Heading.
        summary (`str`): The result in a sentence or two.
        notes (`Sequence[str]`, *optional*): Further paragraphs under it, such as which method ran.
        metrics (`Sequence[Metric]`, *optional*): Rows of the results table; all over the same models.
        clips (`Sequence[Clip]`, *optional*): Prompts with their videos side by side.
        clips_note (`str`, *optional*): How the clips were chosen.
        charts (`Sequence[Chart]`, *optional*): Learning curves.
        settings (`Mapping[str, object]`, *optional*): What was run.
        versions (`Mapping[str, object]`, *optional*): Packages and hardware.
        num_open_clips (`int`, *optional*, defaults to `12`): Clips shown at once; the others unfold.

    Returns:
        `Path`: The file.

    Raises:
        `ValueError`: If the metrics disagree about the models, or a video cannot be read.

    Example:

    ```python
    from vidtrl.report import Chart, write_report

    write_report(
        "report.html",
        title="My run",
        summary="The loss fell.",
        charts=[Chart("Loss", {"train": [(0, 1.0), (100, 0.4)]}, x_label="step", y_label="loss")],
    )
    ```
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    models = list(metrics[0].values) if metrics else []
    for metric in metrics:
        if list(metric.values) != models:
            raise ValueError(f"metric {metric.name!r} covers {list(metric.values)}, the first one covers {models}")
        if unknown := set(metric.differences) - set(models[1:]):
            raise ValueError(f"metric {metric.name!r} has differences of {sorted(unknown)}, which follow no model")
    environment = Environment(
        loader=PackageLoader("vidtrl.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = environment.get_template("report.js").render()
    html = environment.get_template("report.html").render(
        title=title,
        summary=summary,
        notes=notes,
        models=models,
        metrics=metrics,
        clips=[
            {
                "prompt": c.prompt,
                "notes": c.notes,
                "right": c.right,
                "videos": {k: _embed(v) for k, v in c.videos.items()},
            }
            for c in clips
        ],
        clips_note=clips_note,
        num_open_clips=num_open_clips,
        charts=[
            {"title": c.title, "x": c.x_label, "y": c.y_label, "note": c.note, **layout(c.series)} for c in charts
        ],
        settings=settings or {},
        versions=versions or {},
        script=script,
        # CSP hashes the exact text between the script tags
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii"),
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(html, encoding="utf-8")
    partial.replace(path)
    return path
