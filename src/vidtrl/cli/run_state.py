"""What `vidtrl run` remembers in its output directory, and what follows for each stage."""

import hashlib
import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from .errors import UserError
from .run_plan import ADAPTERS, OWNED, Pipeline, Stage


STATE_FILE = "pipeline_state.json"
LOCK_FILE = ".lock"
# what a setting may begin with that leaves the result as it is: it can change while a stage is unfinished or done
FREE = (
    "accelerate_config", "num_processes", "main_process_port", "log_", "logging_", "num_completions_to_print", "report_to",
    "run_name", "disable_tqdm", "save_", "push_to_hub", "hub_", "gradient_checkpointing", "activation_checkpointing",
    "dataloader_num_workers", "dataloader_pin_memory",
)  # fmt: skip


@dataclass
class Step:
    """
    What is to be done about a stage.

    Args:
        stage ([`Stage`]): The stage.
        action (`str`): `"done"`, `"run"`, `"continue"` (from its last checkpoint), `"redo"` (what is there is put aside), or
            `"skip"` (not asked for).
        reason (`str`, *optional*, defaults to `""`): Why, in words.
    """

    stage: Stage
    action: str
    reason: str = ""


class State:
    """
    `pipeline_state.json`: a record for each stage that was started. Written whole, or not at all.

    Args:
        output (`Path`): The output directory.

    Raises:
        [`UserError`]: If the directory holds something else.
    """

    def __init__(self, output: Path):
        self.path = output / STATE_FILE
        self.stages: dict[str, dict[str, Any]] = {}
        if self.path.is_file():
            try:
                self.stages = json.loads(self.path.read_text())["stages"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise UserError(f"{str(self.path)!r} is damaged ({error}): choose another output_dir") from error
        elif output.exists() and (not output.is_dir() or any(path.name != LOCK_FILE for path in output.iterdir())):
            raise UserError(f"output_dir {str(output)!r} is not empty and holds no pipeline: choose another one")

    def write(self, name: str, **record: Any) -> None:
        """Change a stage's record. A value `None` removes its entry."""
        merged = {**self.stages.get(name, {}), **record}
        self.stages[name] = {key: value for key, value in merged.items() if value is not None}
        self.save()

    def drop(self, name: str) -> None:
        """Forget a stage."""
        self.stages.pop(name, None)
        self.save()

    def save(self) -> None:
        """Write the file."""
        partial = self.path.with_suffix(".json.partial")
        with open(partial, "w") as file:
            json.dump({"vidtrl": __version__, "stages": self.stages}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path)

    def finished(self, name: str) -> bool:
        """Whether the stage ended well."""
        return self.stages.get(name, {}).get("status") == "finished"


def plan(pipeline: Pipeline, state: State, selected: Sequence[str], redo: Sequence[str]) -> list[Step]:
    """
    What is to be done, stage by stage.

    Args:
        pipeline ([`Pipeline`]): What is wanted.
        state ([`State`]): What is there.
        selected (`Sequence[str]`): Stages that may run.
        redo (`Sequence[str]`): Stages that run again although they are finished.

    Returns:
        `list[Step]`: One a stage of the pipeline, in order.

    Raises:
        [`UserError`]: If a setting of a stage that has results was changed, a result is gone, or a stage is asked for
            without one that it builds on.
    """
    steps, anew = [], set()
    wanted = set(selected) | {need for name in selected for need in pipeline.stage(name).needs}
    for stage in pipeline.stages:
        if stage.name not in wanted:
            steps.append(Step(stage, "skip", "not in --stages"))
            continue
        step = Step(stage, *_action(stage, state, anew, redo))
        if step.action != "done":
            anew.add(stage.name)
            if stage.name not in selected:
                later = next(name for name in selected if stage.name in pipeline.stage(name).needs)
                raise UserError(f"{later} builds on {stage.name}, which is not finished: add {stage.name} to --stages")
        steps.append(step)
    return steps


def _action(stage: Stage, state: State, anew: set[str], redo: Sequence[str]) -> tuple[str, str]:
    record = state.stages.get(stage.name)
    if record is None:
        return ("redo", "remains of a stage") if stage.folder.exists() else ("run", "")
    if stage.name in redo:
        return "redo", "--redo"
    below = [name for name in stage.needs if name in anew]
    below += [n for n in stage.needs if n not in anew and state.stages[n].get("output") != record["inputs"].get(n)]
    if below:
        return "redo", f"builds on {below[0]}, which {'runs' if below[0] in anew else 'ran'} again"
    checkpoint = newest_checkpoint(stage)
    changed = _changes(record, stage)
    if changed and (checkpoint or state.finished(stage.name)):
        raise UserError(
            f"stage {stage.name} {'is finished' if state.finished(stage.name) else 'has trained'} with other settings: "
            f"{'; '.join(changed)}. Set back what changed, or train it again with --redo {stage.name} (the old results are kept "
            f"under {stage.folder.parent / 'replaced'}; stages that build on it run again as well)"
        )
    if changed:
        return "redo", "other settings, and no checkpoint yet"
    if not state.finished(stage.name):
        return ("continue", checkpoint) if checkpoint else ("run", "no checkpoint yet")
    found = output_digest(stage)
    if found != record["output"]:
        what = "is gone" if found is None else "is not the one that the stage wrote"
        raise UserError(
            f"the result of stage {stage.name} in {str(stage.folder)!r} {what}: put it back, or train it again with "
            f"--redo {stage.name}"
        )
    return "done", ""


def _changes(record: dict, stage: Stage) -> list[str]:
    now, then = identity(stage), record["settings"]
    lines = [
        f"{name} was {json.dumps(then[name]) if name in then else 'not set'}, is "
        f"{json.dumps(now[name]) if name in now else 'not set'}"
        for name in sorted({*now, *then})
        if now.get(name) != then.get(name)
    ]
    data = data_digests(stage)
    return lines + [
        f"the contents of {name} {path!r} changed"
        for name, (path, digest) in record["data"].items()
        if name in data and data[name][0] == path and data[name][1] != digest
    ]


def identity(stage: Stage) -> dict[str, Any]:
    """The settings that decide what a stage learns, as JSON values."""
    fixed = {"model_name_or_path", "video_model_name_or_path"}
    settings = {k: v for k, v in stage.settings.items() if k in fixed or k not in OWNED}
    settings |= {f"{name} before enhancement": value for name, value in (stage.enhance or {}).items()}
    if stage.enhance:
        del settings["dataset_name"]  # below the output directory, which may move
    own = stage.folder.parent
    base = [adapter for adapter in stage.settings.get("base_adapters", []) if Path(adapter).parent != own]
    kept: dict[str, Any] = {"base_adapters": base} if base else {}
    for name, value in settings.items():
        if isinstance(value, dict):  # arguments of TRL's trainers
            value = {k: v for k, v in value.items() if not k.startswith(FREE)}
        if value is not None and not name.startswith(FREE):
            kept[name] = value
    return json.loads(json.dumps(kept, default=str))


def data_digests(stage: Stage) -> dict[str, list[str]]:
    """Path and digest of each local dataset of a stage: the contents of a file, names and sizes in a folder."""
    found = {}
    for name in ("dataset_name", "pairs_dataset_name"):
        value = (stage.enhance or {}).get(name, stage.settings.get(name))
        if value and Path(value).expanduser().exists():
            found[name] = [value, _digest(Path(value).expanduser())]
    return found


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    if path.is_dir():
        for one in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(f"{one.relative_to(path)} {one.stat().st_size}\n".encode())
    else:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()[:16]


def output_files(stage: Stage) -> list[Path]:
    """The files that later stages and users load; empty as long as the stage has not saved any."""
    if stage.name == "prompt":
        names = ("prompt_enhancer.json", "adapter_model.safetensors", "model*.safetensors")
        files = sorted(path for name in names for path in stage.folder.glob(name))
        return files if len(files) > 1 else []
    return sorted(stage.folder.glob(ADAPTERS))


def output_digest(stage: Stage) -> str | None:
    """A digest of [`output_files`], `None` without any."""
    files = output_files(stage)
    return "-".join(_digest(path) for path in files) if files else None


def newest_checkpoint(stage: Stage) -> str:
    """Name of the checkpoint that the stage goes on from, `""` if there is none."""
    folders = [stage.folder / "grpo", stage.folder / "sft"] if stage.name == "prompt" else [stage.folder]
    for folder in folders:
        found = [p for p in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
        if found:
            newest = max(found, key=lambda p: int(p.name.rpartition("-")[2]))
            return str(newest.relative_to(stage.folder))
    return ""


def put_aside(stage: Stage) -> Path | None:
    """Move what a stage has left out of the way. Nothing is deleted."""
    if not stage.folder.exists():
        return None
    target = stage.folder.parent / "replaced" / f"{stage.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    while target.exists():
        target = target.with_name(target.name + "-2")
    target.parent.mkdir(exist_ok=True)
    stage.folder.rename(target)
    return target


def lock(output: Path) -> int:
    """
    Make the output directory this process's own, and that of the stages it starts: they inherit the descriptor, so that a
    stage whose `vidtrl run` was killed still holds it.

    Raises:
        [`UserError`]: If another one is at work there.
    """
    import fcntl  # POSIX has it, see `run`

    output.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(output / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"{holder(output)}: wait for it, or stop it first") from None
    return descriptor


def holder(output: Path) -> str:
    """Who works in an output directory that is locked."""
    running = {n: r for n, r in State(output).stages.items() if r.get("status") == "running"}
    for name, record in running.items():
        return f"stage {name} is running in {str(output)!r} (process group {record.get('pid')})"
    return f"another vidtrl run is at work in {str(output)!r}"
