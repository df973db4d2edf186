"""A training run as its files show it: completions, validation videos, the trainer's log and arguments."""

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq

from .curves import training_charts
from .html import Clip, Gallery, Metric, Stage, write_report
from .intervals import mean_interval
from .media import MAX_EMBEDDED, video_problem


EXPECTED = (
    "the output directory of a trainer, with trainer_state.json (or checkpoint-N/), completions/ or validation/; or its "
    "completions/ folder with completions_*.parquet; or its validation/ folder with step_N/prompts.json"
)
MAX_ROWS = 24  # steps in the table
NO_SETTING = (None, "", [], {})


@dataclass
class Run:
    """
    What a folder holds of a run.

    Args:
        name (`str`): The last part of its path.
        completions (`list[dict]`): A row each: `step`, `prompt`, `video` (`Path` or `None`), `text` (of a language model's
            completion), `scores` ({name: number}, with `advantage`), `facts` (other columns as text).
        validation (`list[tuple[int, str, str, Path | None]]`): (step, file name, prompt, video).
        log (`list[dict]`): The trainer's `log_history`.
        settings (`dict`): Its arguments.
        warnings (`list[str]`): What could not be read; each names its file.
    """

    name: str
    completions: list[dict] = field(default_factory=list)
    validation: list[tuple[int, str, str, Path | None]] = field(default_factory=list)
    log: list[dict] = field(default_factory=list)
    settings: dict = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def read_run(folder: str | os.PathLike, max_videos: int = 240) -> Run:
    """
    Read what a run wrote. A file that is broken or half written costs a warning, not the rest.

    Args:
        folder (`str` or `PathLike`): Output directory of a trainer, or the `completions/` or `validation/` in it.
        max_videos (`int`, *optional*, defaults to `240`): Steps are left out evenly, never the first and the last, until so
            many videos are left of completions, and of validations.

    Returns:
        [`Run`]

    Raises:
        `NotADirectoryError`: If there is no such folder.
        `ValueError`: If it holds no run.
    """
    folder = Path(os.path.abspath(folder))
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is no folder: give {EXPECTED}")
    root, parts = folder, {"completions": folder / "completions", "validation": folder / "validation"}
    if _tables(folder):
        parts = {"completions": folder}
    elif list(folder.glob("step_*/prompts.json")):
        parts = {"validation": folder}
    if folder not in parts.values() or folder.name in ("completions", "validation"):
        root = folder.parent if folder in parts.values() else folder
    else:
        root = None  # downloaded under another name: what lies beside it is no part of it
    run = Run(folder.name if root in (None, folder) else f"{root.name}/{folder.name}")
    state = _newest(root, "trainer_state.json") if root else None
    if state is None and not any(_tables(p) or list(p.glob("step_*")) for p in parts.values()):
        inside = sorted(p.name for p in folder.iterdir() if p.is_dir() and _newest(p, "trainer_state.json"))
        hint = f" The folders {', '.join(inside)} in it are runs." if inside else ""
        raise ValueError(f"{folder} holds no run: give {EXPECTED}.{hint}")
    if state is not None:
        history = _json(run, state).get("log_history", [])
        run.log = [e for e in history if isinstance(e, dict)] if isinstance(history, list) else []
        if (arguments := _newest(root, "training_args.json")) is not None:
            run.settings = shown_settings(_json(run, arguments))
    if "completions" in parts:
        _read_completions(run, parts["completions"], max_videos)
    if "validation" in parts:
        _read_validation(run, parts["validation"], max_videos)
    return run


def _tables(folder: Path) -> list[Path]:
    return sorted(folder.glob("completions_*.parquet"))


def _newest(folder: Path, name: str) -> Path | None:
    """A file of the run, or of its last checkpoint."""
    checkpoints = [p for p in folder.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    checkpoints.sort(key=lambda p: -int(p.name.removeprefix("checkpoint-")))
    return next((p / name for p in (folder, *checkpoints) if (p / name).is_file()), None)


def _json(run: Run, path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        run.warnings.append(f"{path} could not be read: {error}")
        return {}
    return value if isinstance(value, dict) else {}


def shown_settings(arguments: dict) -> dict:
    """Arguments that say something, without tokens, and of this machine's paths the last part alone."""
    shown = {}
    for name, value in arguments.items():
        if value in NO_SETTING or name.endswith("token"):
            continue
        if isinstance(value, dict):
            value = shown_settings(value)
        elif isinstance(value, list):
            value = [_named(one) for one in value]
        shown[name] = json.dumps(value) if isinstance(value, (dict, list)) else _named(value)
    return shown


def _named(value: object) -> object:
    if isinstance(value, str) and os.path.isabs(value):
        return f".../{os.path.basename(value.rstrip(os.sep))}"
    return value


def _evenly(sizes: Sequence[int], limit: int) -> list[int]:
    """Indices of as many entries as the limit holds: the first, the last, and an even choice between."""
    for count in range(min(len(sizes), limit), 1, -1):
        chosen = sorted({round(i * (len(sizes) - 1) / (count - 1)) for i in range(count)})
        if sum(sizes[i] for i in chosen) <= limit:
            return chosen
    return sorted({0, len(sizes) - 1}) if sizes else []


def _left_out(run: Run, kind: str, shown: int, total: int) -> None:
    if shown < total:
        run.warnings.append(f"{shown} of {total} {kind} are shown, evenly chosen: --max_videos shows more")


def _read_completions(run: Run, folder: Path, max_videos: int) -> None:
    steps: dict[int, list[dict]] = {}
    for path in _tables(folder):
        try:
            # in one go: a run that goes on may replace the file in between
            table = pq.read_table(pa.BufferReader(path.read_bytes()))
            rows, names = table.to_pylist(), table.column_names
        except (pa.ArrowException, OSError, ValueError) as error:
            run.warnings.append(f"{path} could not be read: {error}")
            continue
        if "prompt" not in names or not {"video", "completion"} & set(names):
            run.warnings.append(f"{path} has columns {', '.join(names)}: no completion log of a trainer")
            continue
        for row in rows:
            step, number = row.get("step"), re.search("[0-9]+$", path.stem)
            row["step"] = step if isinstance(step, int) else int(number[0]) if number else 0
            steps.setdefault(row["step"], []).append(row | {"_columns": names})
    order = sorted(steps)
    chosen = {order[i] for i in _evenly([len(steps[step]) for step in order], max_videos)}
    _left_out(run, "steps with completions", len(chosen), len(order))
    for step in order:
        for i, row in enumerate(steps[step]):
            # the table has all steps; videos are shown of the chosen ones
            run.completions.append(_completion(run, folder, row, step in chosen and i < max_videos))


def _completion(run: Run, folder: Path, row: dict, with_video: bool) -> dict:
    columns, scores, facts = row["_columns"], {}, {}
    last = columns.index("advantage") if "advantage" in columns else len(columns)
    for i, name in enumerate(columns):
        value = row[name]
        if name in ("step", "prompt", "video", "completion"):
            continue
        number = value is None or isinstance(value, (int, float)) and not isinstance(value, bool)
        if i <= last and number:
            scores[name] = float(value) if value is not None and math.isfinite(value) else None
        elif value is not None:
            facts[name] = str(value)
    video = None
    if with_video and "video" in columns:
        video = _video(run, folder, row["video"], facts)
    text = _text(row["completion"]) if "completion" in columns else None
    shown = {"step": row["step"], "prompt": _text(row["prompt"]), "video": video, "text": text}
    return shown | {"scores": scores, "facts": facts, "shown": with_video}


def _text(value: object) -> str:
    """A prompt; of a conversation, what its messages say."""
    if isinstance(value, list):
        return "\n".join(str(m.get("content", m)) if isinstance(m, dict) else str(m) for m in value)
    return str(value)


def _video(run: Run, folder: Path, name: object, facts: dict | None = None) -> Path | None:
    """The file, if it lies in the folder and can be decoded. A completion log may come from someone else."""
    path = PurePosixPath(str(name))
    if not isinstance(name, str) or path.is_absolute() or ".." in path.parts or "\\" in name or path.suffix != ".mp4":
        problem = f"{folder}{os.sep} lists {name!r}, which is no mp4 file inside it"
    else:
        problem = video_problem(folder / path)
    if problem is None:
        return folder / path
    run.warnings.append(problem)
    if facts is not None:
        facts["video"] = "could not be read"
    return None


def _read_validation(run: Run, folder: Path, max_videos: int) -> None:
    steps: dict[int, tuple[Path, dict]] = {}
    for path in sorted(folder.glob("step_*")):
        number = path.name.removeprefix("step_")
        if not number.isdigit() or not path.is_dir():
            continue
        if not (path / "prompts.json").is_file():
            run.warnings.append(f"{path} has no prompts.json: the step was not finished, or is being written")
            continue
        steps[int(number)] = path, _json(run, path / "prompts.json")
    order = sorted(steps)
    chosen = [order[i] for i in _evenly([len(steps[step][1]) for step in order], max_videos)]
    _left_out(run, "validations", len(chosen), len(order))
    for step in chosen:
        path, prompts = steps[step]
        for name, prompt in list(prompts.items())[:max_videos]:
            run.validation.append((step, name, str(prompt), _video(run, path, name)))


def galleries(run: Run) -> list[Gallery]:
    """Validations: a column a step. Completions: a card a group, a column a sample, and a slider over the steps."""
    made = []
    clips: dict[tuple[str, str], Clip] = {}
    for step, name, prompt, video in run.validation:
        clip = clips.setdefault((name, prompt), Clip(prompt, {}))
        clip.videos[f"step {step}"] = video
        if video is None:
            clip.notes[f"step {step}"] = "could not be read"
    if clips:
        note = "The same prompts from the same noise, before training and at each validation."
        made.append(Gallery("Validation videos", list(clips.values()), note))
    groups: dict[tuple[int, str], Clip] = {}
    for row in run.completions:
        if not row["shown"]:
            continue
        clip = groups.setdefault((row["step"], row["prompt"]), Clip(row["prompt"], {}, step=row["step"]))
        column = f"sample {len(clip.videos) + 1}"
        clip.videos[column] = row["video"]
        clip.scores[column] = row["scores"]
        if row["text"] is not None:
            clip.enhanced[column] = row["text"]
        if row["facts"]:
            clip.notes[column] = ", ".join(f"{name} {value}" for name, value in row["facts"].items())
    if groups:
        note = "A card is a group: the samples of one prompt at one step, with their rewards and the advantage that followed."
        made.append(Gallery("Completions", list(groups.values()), note))
    return made


def _rewards(run: Run) -> tuple[list[Stage], list[Metric]]:
    """Mean rewards of the completions of each step, as rows."""
    by_step: dict[int, list[dict]] = {}
    for row in run.completions:
        by_step.setdefault(row["step"], []).append(row)
    order = sorted(by_step)
    order = [order[i] for i in _evenly([1] * len(order), MAX_ROWS)]
    names = dict.fromkeys(n for row in run.completions for n in row["scores"] if n != "advantage")
    metrics = []
    for name in names:
        values = {}
        for step in order:
            groups: dict[str, list[float]] = {}
            for row in by_step[step]:
                if row["scores"].get(name) is not None:
                    groups.setdefault(row["prompt"], []).append(row["scores"][name])
            means = [sum(group) / len(group) for group in groups.values()]
            # samples of a prompt are alike: with several prompts, those are what is resampled
            if samples := means if len(means) > 1 else [x for group in groups.values() for x in group]:
                values[f"step {step}"] = mean_interval(samples)
        metrics.append(
            Metric(name, values, help="Mean reward of the step's completions; the interval is over prompts.")
        )
    return [Stage(f"step {step}", num_clips=len(by_step[step])) for step in order], metrics


def write_run_report(
    folder: str | os.PathLike,
    output: str | os.PathLike | None = None,
    *,
    max_videos: int = 240,
    max_embedded: int = MAX_EMBEDDED,
    versions: dict | None = None,
) -> tuple[Path, list[str]]:
    """
    Write the report of any run: mean rewards by step, validation videos, completions, learning curves, arguments.

    Args:
        folder (`str` or `PathLike`): As for [`read_run`].
        output (`str` or `PathLike`, *optional*): HTML file; default: `report.html` in the folder.
        max_videos (`int`, *optional*, defaults to `240`): As for [`read_run`].
        max_embedded (`int`, *optional*, defaults to 64 MiB): As for [`write_report`]; with 0 the videos are linked.
        versions (`dict`, *optional*): Packages of this environment.

    Returns:
        `tuple[Path, list[str]]`: The file, and what could not be shown.

    Raises:
        `NotADirectoryError`: If there is no such folder.
        `ValueError`: If it holds no run.

    Example:

    ```python
    >>> from vidtrl.report.runs import write_run_report

    >>> page, warnings = write_run_report("wan-grpo")
    ```
    """
    run, folder = read_run(folder, max_videos), Path(os.path.abspath(folder))
    stages, metrics = _rewards(run)
    last = max((e["step"] for e in run.log if isinstance(e.get("step"), int)), default=None)
    counts = [(len(run.completions), "completions"), (len(run.validation), "validation videos")]
    parts = [f"{last} optimizer steps logged"] if last is not None else []
    parts += [f"{count} {what}" for count, what in counts if count]
    path = write_report(
        output if output is not None else Path(folder, "report.html"),
        title=f"Run {run.name}",
        summary=f"{', '.join(parts) or 'Nothing logged yet'}.",
        # a page is made to be shared: it names no folder of this machine
        warnings=[
            text.replace(f"{folder}{os.sep}", "").replace(f"{folder.parent}{os.sep}", "") for text in run.warnings
        ],
        stages=stages if metrics else (),
        metrics=metrics,
        row_heading="Step",
        galleries=galleries(run),
        charts=training_charts(run.log),
        settings=run.settings,
        versions={"These are of": "the environment that wrote this page"} | versions if versions else None,
        max_embedded=max_embedded,
    )
    return path, run.warnings
