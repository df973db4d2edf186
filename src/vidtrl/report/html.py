"""One HTML file that shows what a run did, and needs nothing else to be read."""

import base64
import hashlib
import json
import math
import os
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .charts import interval_bars, layout
from .intervals import Estimate
from .media import MAX_EMBEDDED, total_size, video_source


@dataclass
class Metric:
    """
    One column of the results.

    Args:
        name (`str`): What is measured.
        values (`Mapping[str, Estimate]`): Stage name to its estimate; a stage may be missing.
        differences (`Mapping[str, Estimate]`, *optional*): Stage name to its difference, over pairs, from the stage before
            it that has the metric. The first of them has none.
        higher_is_better (`bool`, *optional*, defaults to `True`): Which sign of a difference is an improvement.
        percent (`bool`, *optional*, defaults to `False`): Show as a percentage.
        digits (`int`, *optional*, defaults to `0` for a percentage and `3` else): Digits after the point.
        help (`str`, *optional*, defaults to `""`): One sentence on how it is measured.
    """

    name: str
    values: Mapping[str, Estimate]
    differences: Mapping[str, Estimate] = field(default_factory=dict)
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

    def verdict(self, stage: str) -> str:
        """Of a stage against the one before it: `"better"`, `"worse"`, `"equal"` in every pair, or `"unclear"` when the
        interval holds 0."""
        difference = self.differences[stage]
        if difference.value == difference.low == difference.high == 0:
            return "equal"
        if difference.low <= 0 <= difference.high:
            return "unclear"
        return "better" if (difference.value > 0) == self.higher_is_better else "worse"


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


@dataclass
class Stage:
    """
    One row of the results, beside what the metrics say of it: what the stage costs. `None` is shown as a dash, and a column
    that no stage has is left out.

    Args:
        name (`str`): As the metrics and the clips name it.
        num_clips (`int`, *optional*): Measured clips.
        evaluations (`float`, *optional*): Evaluations of the denoiser a clip; guidance doubles them.
        clip_seconds (`float`, *optional*): Seconds to make a clip.
        train_seconds (`float`, *optional*): Seconds of training.
        peak_memory (`int`, *optional*): Bytes.
        curves (`Sequence[Chart]`, *optional*): Of its training.
        note (`str`, *optional*, defaults to `""`): One line under the name.
    """

    name: str
    num_clips: int | None = None
    evaluations: float | None = None
    clip_seconds: float | None = None
    train_seconds: float | None = None
    peak_memory: int | None = None
    curves: Sequence[Chart] = ()
    note: str = ""


@dataclass
class Clip:
    """
    One prompt and the video that each stage made of it.

    Args:
        prompt (`str`): Shown as text, whatever it contains.
        videos (`Mapping[str, str | PathLike | None]`): Column (a stage, a training step, a sample) to h264 mp4 file; `None`
            keeps the place of a video that cannot be shown, and the note says why.
        notes (`Mapping[str, str]`, *optional*): Column to a line under its video.
        right (`Mapping[str, bool]`, *optional*): Column to whether the video shows what was asked.
        enhanced (`Mapping[str, str]`, *optional*): Column to the prompt that its model was given, where that is not `prompt`.
        scores (`Mapping[str, Mapping[str, float | bool | None]]`, *optional*): Column to {name: score}. The page filters and
            sorts by them.
        step (`int`, *optional*): Training step. Where clips have one, a slider chooses the step.
    """

    prompt: str
    videos: Mapping[str, str | os.PathLike | None]
    notes: Mapping[str, str] = field(default_factory=dict)
    right: Mapping[str, bool] = field(default_factory=dict)
    enhanced: Mapping[str, str] = field(default_factory=dict)
    scores: Mapping[str, Mapping[str, float | bool | None]] = field(default_factory=dict)
    step: int | None = None


@dataclass
class Gallery:
    """
    Clips under a heading, with filters of their own.

    Args:
        title (`str`): Heading.
        clips (`Sequence[Clip]`): In the order in which they are shown at first.
        note (`str`, *optional*, defaults to `""`): How the clips were chosen.
    """

    title: str
    clips: Sequence[Clip]
    note: str = ""

    def columns(self) -> list[str]:
        """Names of the columns, in the order in which clips name them."""
        return list(dict.fromkeys(name for clip in self.clips for name in clip.videos))


COSTS: dict[str, tuple[str, str, Callable[[float], str]]] = {  # field of Stage -> (heading, meaning, how it is shown)
    "evaluations": ("Evaluations", "of the denoiser a clip; guidance doubles them", lambda n: f"{n:,.4g}"),
    "clip_seconds": ("A clip takes", "seconds to make one clip", lambda s: duration(s)),
    "train_seconds": ("Training took", "seconds", lambda s: duration(s)),
    "peak_memory": ("Peak memory", "of the stage", lambda b: size(b)),
}


def duration(seconds: float) -> str:
    """Seconds in the unit in which they are best read."""
    if seconds < 0.9995:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def size(num_bytes: float) -> str:
    """Bytes in MiB or GiB."""
    return f"{num_bytes / 2**20:.0f} MiB" if num_bytes < 2**30 else f"{num_bytes / 2**30:.2f} GiB"


def visible(text: object) -> object:
    """
    Text without characters that act instead of being seen: controls, and overrides of the writing direction, which could
    reverse what follows, become escapes such as `\\u202e`. Markup and whatever is no text are left alone.
    """
    if type(text) is not str or text.isascii() and text.isprintable():
        return text
    return "".join(
        c
        if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") and not _turns(c)
        else c.encode("unicode_escape").decode("ascii")
        for c in text
    )


def _turns(character: str) -> bool:
    return unicodedata.bidirectional(character) in ("LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI")


def write_report(
    path: str | os.PathLike,
    *,
    title: str,
    summary: str,
    notes: Sequence[str] = (),
    warnings: Sequence[str] = (),
    stages: Sequence[Stage] = (),
    metrics: Sequence[Metric] = (),
    row_heading: str = "Stage",
    clips: Sequence[Clip] = (),
    clips_note: str = "",
    galleries: Sequence[Gallery] = (),
    charts: Sequence[Chart] = (),
    settings: Mapping[str, object] | None = None,
    versions: Mapping[str, object] | None = None,
    num_open_clips: int = 12,
    max_embedded: int = MAX_EMBEDDED,
) -> Path:
    """
    Write a self-contained HTML report: videos are embedded, curves are inline SVG, nothing is requested from anywhere.
    All texts are escaped, and a Content-Security-Policy lets only the page's own script and style apply. Without JavaScript
    the page can be read, and its videos play one by one.

    Args:
        path (`str` or `PathLike`): HTML file to write; replaced as a whole.
        title (`str`): Heading.
        summary (`str`): The result in a sentence or two.
        notes (`Sequence[str]`, *optional*): Further paragraphs under it, such as which method ran.
        warnings (`Sequence[str]`, *optional*): What could not be shown, and why.
        stages (`Sequence[Stage]`, *optional*): Rows of the results table and their costs. Default: what the metrics name.
        metrics (`Sequence[Metric]`, *optional*): Columns of the results table.
        row_heading (`str`, *optional*, defaults to `"Stage"`): What a row of it is.
        clips (`Sequence[Clip]`, *optional*): Prompts with their videos side by side; short for one gallery.
        clips_note (`str`, *optional*): How the clips were chosen.
        galleries (`Sequence[Gallery]`, *optional*): Further ones.
        charts (`Sequence[Chart]`, *optional*): Learning curves, beside those of the stages.
        settings (`Mapping[str, object]`, *optional*): What was run.
        versions (`Mapping[str, object]`, *optional*): Packages and hardware.
        num_open_clips (`int`, *optional*, defaults to `12`): Clips shown at once; a button shows more.
        max_embedded (`int`, *optional*, defaults to 64 MiB): Bytes of mp4 that the page may hold. Where there are more, and
            with 0, all are linked relative to the page instead, which says so: it must then be moved together with them.

    Returns:
        `Path`: The file.

    Raises:
        `ValueError`: If a metric is of a stage that is not among `stages`, has a difference of a stage without a value or of the
            first one, or a video cannot be read.

    Example:

    ```python
    from vidtrl.report import Chart, Estimate, Metric, Stage, write_report

    write_report(
        "report.html",
        title="My run",
        summary="The loss fell.",
        stages=[Stage("base", evaluations=40), Stage("distilled", evaluations=4, peak_memory=2**30)],
        metrics=[Metric("quality", {"base": Estimate(0.7, 0.6, 0.8), "distilled": Estimate(0.68, 0.6, 0.77)})],
        charts=[Chart("Loss", {"train": [(0, 1.0), (100, 0.4)]}, x_label="step", y_label="loss")],
    )
    ```
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    path = Path(path)
    stages = list(stages) or [Stage(name) for name in dict.fromkeys(n for m in metrics for n in m.values)]
    _check(stages, metrics)
    galleries = ([Gallery("Videos", clips, clips_note)] if clips else []) + [g for g in galleries if g.clips]
    files = [file for gallery in galleries for clip in gallery.clips for file in clip.videos.values() if file]
    embed = total_size(files) <= max_embedded
    environment = Environment(
        loader=PackageLoader("vidtrl.report"),
        autoescape=True,
        finalize=visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = (environment.get_template(name).render() for name in ("report.css", "report.js"))
    curves = [("", charts), *((stage.name, stage.curves) for stage in stages)]
    html = environment.get_template("report.html").render(
        title=title,
        summary=summary,
        notes=notes,
        warnings=warnings,
        stages=stages,
        metrics=metrics,
        row_heading=row_heading,
        bars=[interval_bars(m.values, 0.1 if m.percent else 0.0) for m in metrics],
        costs={k: v for k, v in COSTS.items() if any(getattr(stage, k) is not None for stage in stages)},
        table=bool(metrics) or any(getattr(stage, k) is not None for k in COSTS for stage in stages),
        galleries=[
            {
                "title": gallery.title,
                "note": gallery.note,
                "columns": gallery.columns(),
                "clips": [_card(clip, path, embed) for clip in gallery.clips],
                "steps": sorted({clip.step for clip in gallery.clips if clip.step is not None}),
            }
            for gallery in galleries
        ],
        linked=None if embed or not files else size(total_size(files)),
        num_open_clips=num_open_clips,
        curves=[
            (name, [{"title": c.title, "x": c.x_label, "y": c.y_label, "note": c.note} | layout(c.series) for c in group])
            for name, group in curves
            if group
        ],
        settings=settings or {},
        versions=versions or {},
        style=style,
        script=script,
        policy=_policy(style, script, embed),
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(html, encoding="utf-8")
    partial.replace(path)
    return path


def _check(stages: Sequence[Stage], metrics: Sequence[Metric]) -> None:
    names = [stage.name for stage in stages]
    for metric in metrics:
        if unknown := set(metric.values) - set(names):
            raise ValueError(
                f"metric {metric.name!r} is of {sorted(unknown)}, but the stages are {names}: name them alike"
            )
        measured = [name for name in names if name in metric.values]
        if unknown := set(metric.differences) - set(measured[1:]):
            raise ValueError(f"metric {metric.name!r} has differences of {sorted(unknown)}, which follow no stage")


def _card(clip: Clip, page: Path, embed: bool) -> dict:
    """A clip as the template wants it."""
    prompts: dict[str, list[str]] = {}
    for name, text in clip.enhanced.items():
        prompts.setdefault(text, []).append(name)
    scores = {name: dict(values) for name, values in clip.scores.items()}
    for name, right in clip.right.items():
        scores[name] = {"right": bool(right)} | scores.get(name, {})
    for values in scores.values():  # the page's script reads JSON, which knows neither NaN nor infinity
        values |= {k: None for k, v in values.items() if isinstance(v, float) and not math.isfinite(v)}
    return {
        "prompt": clip.prompt,
        "step": clip.step,
        "notes": clip.notes,
        "scores": scores,
        "data": json.dumps(scores),
        "enhanced": [(names, text) for text, names in prompts.items()],
        "videos": {k: video_source(v, page, embed) if v is not None else None for k, v in clip.videos.items()},
    }


def _policy(style: str, script: str, embed: bool) -> str:
    """Content-Security-Policy: the hashes are of the exact text between the tags."""
    style, script = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii") for text in (style, script)
    )
    # for a page that is opened from the disk, 'self' is not the same in all browsers
    media = "data:" if embed else "data: 'self' file:"
    return (
        f"default-src 'none'; media-src {media}; img-src data:; style-src 'sha256-{style}'; script-src 'sha256-{script}'; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
