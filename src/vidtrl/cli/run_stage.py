"""One stage of `vidtrl run`: its process, its log, and the figures that it leaves."""

import codecs
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from .launch import launch_command
from .run_plan import LAUNCH, Stage
from .run_state import newest_checkpoint


GRACE = 30.0  # seconds for a stage's processes to leave after its launcher has
STOPPING = ("SIGINT", "SIGTERM", "SIGKILL")  # what the first, second and third Ctrl-C send; by name: Windows lacks one
# a line that says what went wrong, in the log of one or several ranks
ERROR = re.compile(r"^(?:\[rank\d+\]: ?)?(vidtrl: error: .+|[\w.]*(?:Error|Exception)\b.*)$", re.MULTILINE)
LAUNCHERS = ("CalledProcessError", "ChildFailedError")  # theirs, which follow the stage's own


@dataclass
class Ended:
    """
    How a process ended.

    Args:
        code (`int`): Its exit code.
        stopped (`bool`): Whether it was told to stop, by Ctrl-C or a signal.
        error (`str`): The line of its output that says what went wrong, or its last one.
    """

    code: int
    stopped: bool
    error: str


def stage_command(stage: Stage) -> list[str]:
    """The `accelerate launch` command line of a stage."""
    options = {name: str(stage.settings[name]) for name in LAUNCH if stage.settings.get(name) is not None}
    command = launch_command(stage.module, options, ["--config", str(stage.config_file)])
    command.insert(command.index("--module"), "--quiet")  # the stage's own error is the last that is printed
    return command


def enhance_command(stage: Stage) -> list[str]:
    """The command line that writes the enhanced prompts of a distillation."""
    assert stage.enhance is not None
    script = [sys.executable, "-m", "vidtrl.cli.run_prompts", "--enhancer", str(stage.folder.parent / "prompt")]
    return [*script, "--output", stage.settings["dataset_name"], "--dataset", json.dumps(stage.enhance)]


def write_config(stage: Stage) -> None:
    """Write the file that the stage is started with. It works with the stage's own command as well."""
    stage.folder.mkdir(parents=True, exist_ok=True)
    head = f"# Stage {stage.name} of vidtrl run. By itself: vidtrl {stage.name} --config {stage.config_file}\n"
    partial = stage.config_file.with_suffix(".yaml.partial")
    partial.write_text(head + yaml.safe_dump(stage.settings, sort_keys=False, allow_unicode=True))
    partial.replace(stage.config_file)


def run_process(command: list[str], log: Path, lock: int, started: Callable[[int], None]) -> Ended:
    """
    Run a command in a process group of its own, with its output in a file and on the terminal.

    Ctrl-C and SIGTERM are passed on to the group; a second time they insist, a third time they kill.

    Args:
        command (`list[str]`): The command line.
        log (`Path`): File that the output is appended to. It is the process's own, so that a process outlives whoever
            watches it.
        lock (`int`): File descriptor that the process inherits.
        started (`Callable`): Called with the process group's id.

    Returns:
        [`Ended`]
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    told: list[int] = []
    process = None

    def stop(number, frame):
        told.append(number)
        if process is not None:
            _signal(process.pid, signal.Signals[STOPPING[min(len(told), len(STOPPING)) - 1]])

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        with open(log, "ab") as output:
            output.write(f"$ {shlex.join(command)}\n".encode())
            output.flush()
            begin = output.tell()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(lock,),
                env={"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", **os.environ, "PYTHONUNBUFFERED": "1"},
            )
        started(process.pid)
        if told:  # before there was a process to tell
            _signal(process.pid, signal.SIGINT)
        _follow(process, log, begin)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    with open(log, "rb") as file:
        file.seek(begin)
        text = file.read().decode(errors="replace").replace("\r", "\n")
    found = [line for line in ERROR.findall(text) if not line.rpartition(".")[2].startswith(LAUNCHERS)]
    lines = [line for line in text.splitlines() if line.strip()]
    return Ended(process.returncode, bool(told), (found or lines or ["no output"])[-1].strip())


def _follow(process: subprocess.Popen, log: Path, begin: int) -> None:
    """Copy the log to the terminal until the process and what it started are gone."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    with open(log, "rb") as file:
        file.seek(begin)
        deadline = None
        while True:
            ended = process.poll() is not None
            if text := decoder.decode(file.read()):
                sys.stdout.write(text)
                sys.stdout.flush()
            if ended:
                deadline = deadline or time.monotonic() + GRACE
                if not _alive(process.pid):
                    return
                if time.monotonic() > deadline:
                    _signal(process.pid, signal.SIGKILL)
                    return
            time.sleep(0.1)


def _alive(group: int) -> bool:
    """Whether anything in the process group still runs. What has ended may stay a zombie, in a container without an init."""
    for one in psutil.process_iter(["status"]):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if one.info["status"] != psutil.STATUS_ZOMBIE and os.getpgid(one.pid) == group:
                return True
    return False


def _signal(group: int, number: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)
        return True
    return False


def figures(stage: Stage) -> dict:
    """
    What a stage's log says about how it went.

    Args:
        stage ([`Stage`]): A finished one.

    Returns:
        `dict`: `updates`, and `metrics`: name -> first and last value. Those of its evaluation; of one without, reward or loss
        of the training. Empty where the stage kept no checkpoint.
    """
    steps = ["sft", "grpo"] if stage.name == "prompt" else [""]
    found: dict = {"updates": {}, "metrics": {}}
    for step in steps:
        folder = stage.folder / step
        checkpoint = newest_checkpoint(stage) if not step else ""
        path = folder / checkpoint / "trainer_state.json"
        if not path.is_file():
            continue
        state = json.loads(path.read_text())
        prefix = f"{step}: " if step else ""
        found["updates"][step or stage.name] = state["global_step"]
        found["metrics"] |= {prefix + name: values for name, values in _metrics(state["log_history"]).items()}
    return found


def _metrics(history: list[dict]) -> dict[str, tuple[float, float]]:
    series: dict[str, list[float]] = {}
    for entry in history:
        for name, value in entry.items():
            if isinstance(value, int | float):
                series.setdefault(name, []).append(value)
    detail = ("runtime", "_per_second", "seconds", "_sigma_", "/std")
    names = [name for name in series if name.startswith("eval_") and not any(part in name for part in detail)]
    for fallback in (
        ["rewards/video_reward/mean", "rewards/structure_reward/mean"],
        ["reward"],
        ["loss/student"],
        ["loss"],
    ):
        names = names or [name for name in fallback if name in series]
    return {name: (series[name][0], series[name][-1]) for name in names}
