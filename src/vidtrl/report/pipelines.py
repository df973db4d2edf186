"""All stages of a `vidtrl run` on one page: what each took and reached, its curves, and its videos beside those of the others."""

import json
import os
from collections import Counter
from pathlib import Path

from .curves import training_charts
from .html import Clip, Gallery, Stage, write_report
from .media import MAX_EMBEDDED
from .runs import Run, galleries, read_run, shown_settings


STATE_FILE = "pipeline_state.json"
NAMES = {"sft": "SFT", "grpo": "GRPO", "prompt": "Prompt enhancement", "distill": "Distillation"}
STEPS = {"prompt": ("sft", "grpo")}  # stages whose trainings have folders of their own
MAX_PROMPTS = 100


def is_pipeline(folder: str | os.PathLike) -> bool:
    """Whether `vidtrl run` writes into this folder."""
    return Path(folder, STATE_FILE).is_file()


def write_pipeline_report(
    folder: str | os.PathLike,
    output: str | os.PathLike | None = None,
    *,
    max_videos: int = 240,
    max_embedded: int = MAX_EMBEDDED,
    versions: dict | None = None,
) -> tuple[Path, list[str]]:
    """
    Write the report of a pipeline, finished or not.

    Args:
        folder (`str` or `PathLike`): The output directory of `vidtrl run`.
        output (`str` or `PathLike`, *optional*): HTML file; default: `report.html` in the folder.
        max_videos (`int`, *optional*, defaults to `240`): Of completions, and of validations, shared by the stages.
        max_embedded (`int`, *optional*, defaults to 64 MiB): As for [`write_report`].
        versions (`dict`, *optional*): Packages of this environment.

    Returns:
        `tuple[Path, list[str]]`: The file, and what could not be shown.

    Raises:
        `ValueError`: If it holds no pipeline, or its state cannot be read.

    Example:

    ```python
    >>> from vidtrl.report.pipelines import write_pipeline_report

    >>> page, warnings = write_pipeline_report("wan-four-stages")
    ```
    """
    folder = Path(os.path.abspath(folder))
    try:
        records = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))["stages"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} holds no {STATE_FILE} of vidtrl run that can be read: {error}") from error
    present = [name for name in NAMES if name in records]
    rows, warnings, shown, runs, settings = [], [], [], {}, {}
    for name in present:
        record, curves = records[name], []
        for step in STEPS.get(name, ("",)):
            run = _read(folder / name / step, warnings, max_videos // len(present))
            if run is None:
                continue
            prefix = f"{NAMES[step]}: " if step else ""
            curves += training_charts(run.log, prefix)
            runs[name] = run
            shown += [
                Gallery(f"{NAMES[name]}: {prefix}{gallery.title.lower()}", gallery.clips, gallery.note)
                for gallery in galleries(Run(run.name, completions=run.completions))
            ]
        seconds = record.get("seconds")
        rows.append(Stage(NAMES[name], train_seconds=seconds, curves=curves, note=_note(record)))
        settings |= {f"{name}: {key}": value for key, value in shown_settings(record.get("settings", {})).items()}
    finished = [NAMES[name] for name in present if records[name].get("status") == "finished"]
    path = write_report(
        output if output is not None else folder / "report.html",
        title=f"Pipeline {folder.name}",
        summary=f"Finished: {', '.join(finished) or 'no stage yet'}.",
        # a page is made to be shared: it names no folder of this machine
        warnings=[text.replace(f"{folder}{os.sep}", "") for text in warnings],
        stages=rows,
        galleries=[_side_by_side(runs), _enhanced(folder / "distill" / "prompts" / "train.jsonl", warnings), *shown],
        settings=settings,
        versions={"These are of": "the environment that wrote this page"} | versions if versions else None,
        max_embedded=max_embedded,
    )
    return path, warnings


def _read(folder: Path, warnings: list[str], max_videos: int) -> Run | None:
    """A training of the pipeline, if it has written anything."""
    try:
        run = read_run(folder, max(2, max_videos))
    except (NotADirectoryError, ValueError):
        warnings.append(f"{folder} has nothing to show yet")
        return None
    warnings += run.warnings
    return run


def _note(record: dict) -> str:
    """What a stage reached, in a line."""
    figures = record.get("figures") or {}
    parts = [] if record.get("status") == "finished" else [str(record.get("status"))]
    updates = figures.get("updates", {})
    for name, number in updates.items():
        step = f"{NAMES[name]} " if len(updates) > 1 else ""
        parts.append(f"{step}{number} update{'s' * (number != 1)}")
    for name, (first, last) in figures.get("metrics", {}).items():
        parts.append(f"{name.replace('rewards/', '').removesuffix('/mean')} {first:.4g} → {last:.4g}")
    return ", ".join(parts)


def _side_by_side(runs: dict[str, Run]) -> Gallery:
    """A card a validation prompt: before all training, and the last of each stage that has it."""
    clips: dict[tuple[str, int], Clip] = {}

    def add(column: str, videos: list) -> None:
        seen = Counter()
        for _, _, prompt, video in videos:
            clip = clips.setdefault((prompt, seen[prompt]), Clip(prompt, {}))
            clip.videos[column] = video
            seen[prompt] += 1

    for name, run in runs.items():
        steps = sorted({step for step, *_ in run.validation})
        if steps and not clips and len(steps) > 1:
            add("before", [one for one in run.validation if one[0] == steps[0]])
        if steps:
            add(NAMES[name], [one for one in run.validation if one[0] == steps[-1]])
    note = (
        "The last validation of each stage. Stages with other validation prompts or seeds stand on cards of their own."
    )
    return Gallery("Stage by stage", list(clips.values()), note)


def _enhanced(file: Path, warnings: list[str]) -> Gallery:
    """What the enhancer made of the prompts that the last stage trains on."""
    clips = []
    if file.is_file():
        try:
            lines = file.read_text(encoding="utf-8").split("\n")
            rows = [json.loads(line) for line in lines[:MAX_PROMPTS] if line.strip()]
            clips = [
                Clip(row["user_prompt"], {"enhanced": None}, enhanced={"enhanced": row["prompt"]}) for row in rows
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            warnings.append(f"{file} could not be read: {error}")
    return Gallery(
        "Enhanced prompts", clips, "Users' prompts, and what the distillation was trained on in their place."
    )
