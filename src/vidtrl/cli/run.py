"""`vidtrl run`: SFT, GRPO, prompt enhancement and distillation of one model, from one file.

    vidtrl run --config pipeline.yaml --dry-run     every setting, the commands, the memory; starts nothing
    vidtrl run --config pipeline.yaml               again after an interruption: goes on where it stopped
    vidtrl run --config pipeline.yaml --stages sft grpo
    vidtrl run --config pipeline.yaml --redo grpo

Each stage is a process of its own under `accelerate launch`. Its adapter is stacked on those of the stages before it.
"""

import argparse
import json
import multiprocessing
import os
import shlex
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from .env import package_versions
from .errors import Interrupted, Parser, UserError
from .run_memory import estimated_memory
from .run_plan import (
    ADAPTERS,
    STAGES,
    Pipeline,
    has_accelerator,
    missing_data,
    parse_stage,
    read_pipeline,
    resolved_settings,
)
from .run_result import print_summary, write_script
from .run_stage import enhance_command, figures, run_process, stage_command, write_config
from .run_state import State, Step, data_digests, identity, lock, output_digest, plan, put_aside


WORDS = {
    "done": "done before",
    "run": "runs",
    "continue": "goes on from",
    "redo": "runs anew, what is there is put aside",
    "skip": "left out",
}


def make_parser() -> Parser:
    """The options of `vidtrl run`."""
    parser = Parser(prog="vidtrl run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="the pipeline, a YAML file")
    parser.add_argument("--stages", nargs="+", choices=STAGES, help="which of the file's stages run (default: all)")
    parser.add_argument(
        "--redo",
        nargs="+",
        choices=STAGES,
        default=[],
        metavar="STAGE",
        help="train these again, and what builds on them; the old results are kept",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print all settings, the commands and the memory, and start nothing"
    )
    return parser


def run(argv: Sequence[str]) -> int:
    """Run, or describe, the pipeline of a file."""
    args = make_parser().parse_args(argv)
    if sys.platform == "win32" and not args.dry_run:
        raise UserError(
            "vidtrl run stops and locks its stages with the process groups and file locks of POSIX, which Windows lacks: "
            "start it in WSL, or start the commands that --dry-run prints one by one"
        )
    pipeline = read_pipeline(args.config)
    names = [stage.name for stage in pipeline.stages]
    selected = [name for name in names if name in args.stages] if args.stages else names
    for option, given in (("stages", args.stages or []), ("redo", args.redo)):
        for name in given:
            if name not in (names if option == "stages" else selected):
                where = f"{args.config} has no stages.{name}" if name not in names else "--stages leaves it out"
                raise UserError(f"--{option} {name}: {where}")
    if args.dry_run:
        return dry_run(pipeline, selected, args.redo, args.config)
    _apart(check, pipeline)
    missing = [line for stage in pipeline.stages if stage.name in selected for line in missing_data(stage)]
    if missing:
        raise UserError("; ".join(missing))
    plan(pipeline, State(pipeline.output_dir), selected, args.redo)  # refuses before anything is made
    held = lock(pipeline.output_dir)
    state = State(pipeline.output_dir)
    steps = plan(pipeline, state, selected, args.redo)
    again = shlex.join(
        ["vidtrl", "run", "--config", args.config, *(["--stages", *args.stages] if args.stages else [])]
    )
    for step in steps:
        print(_line(step), flush=True)
    for number, step in enumerate(steps, 1):
        if step.action in ("run", "continue", "redo"):
            print(f"\n[{number}/{len(steps)}] {step.stage.name}", flush=True)
            code = run_stage(pipeline, step, state, held, again)
            if code:
                return code
    finished = [stage for stage in pipeline.stages if state.finished(stage.name)]
    print_summary(pipeline, finished, state, write_script(pipeline, finished))
    from ..report.pipelines import write_pipeline_report

    page, _ = write_pipeline_report(pipeline.output_dir, versions=package_versions())
    print(f"look at it:\n  {os.path.relpath(page)}   # all stages on one page; vidtrl report writes it anew")
    return 0


def _line(step: Step) -> str:
    reason = step.reason if step.action == "continue" else f"({step.reason})"
    return f"{step.stage.name}: {WORDS[step.action]}" + (f" {reason}" if step.reason else "")


def check(pipeline: Pipeline) -> None:
    """Let each stage's command read its settings."""
    for stage in pipeline.stages:
        parse_stage(stage)


def _apart(function: Callable, *args: Any) -> Any:
    """
    Call a function where it cannot take anything from the stages: reading a trainer's configuration opens the accelerator,
    and a process that has it open keeps some of its memory.
    """
    import torch

    if not torch.accelerator.is_available():
        return function(*args)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def run_stage(pipeline: Pipeline, step: Step, state: State, held: int, again: str) -> int:
    """
    Run one stage to its end.

    Args:
        pipeline ([`Pipeline`]): All of it.
        step ([`Step`]): The stage, and how it begins.
        state ([`State`]): Is kept up to date.
        held (`int`): The output directory's lock.
        again (`str`): The command line that goes on.

    Returns:
        `int`: 0, or the exit code of `vidtrl run` where the stage failed.

    Raises:
        [`Interrupted`], [`UserError`]: If it was stopped, or failed for a reason that its user can mend.
    """
    stage, log = step.stage, pipeline.output_dir / "logs" / f"{step.stage.name}.log"
    if step.action == "redo":
        aside = put_aside(stage)
        state.drop(stage.name)
        if aside:
            print(f"earlier results: {aside}", flush=True)
    write_config(stage)
    before = state.stages.get(stage.name, {}).get("seconds", 0.0)
    state.write(
        stage.name,
        status="running",
        settings=identity(stage),
        inputs={name: state.stages[name]["output"] for name in stage.needs},
        data=data_digests(stage),
        log=str(log.relative_to(pipeline.output_dir)),
        output=None,
        error=None,
    )
    start = time.monotonic()
    commands = ([enhance_command(stage)] if stage.enhance else []) + [stage_command(stage)]
    for command in commands:
        ended = run_process(command, log, held, lambda pid: state.write(stage.name, pid=pid))
        if ended.code or ended.stopped:
            break
    seconds = round(before + time.monotonic() - start, 1)
    if ended.code == 0 and command is commands[-1]:  # also if it was told to stop, but had ended by then
        digest = output_digest(stage)
        if digest is None:
            raise RuntimeError(f"stage {stage.name} ended without its result in {stage.folder}; see {log}")
        state.write(stage.name, status="finished", output=digest, seconds=seconds, pid=None, figures=figures(stage))
        if not ended.stopped:
            return 0
    if ended.stopped:
        if not state.finished(stage.name):
            state.write(stage.name, status="interrupted", seconds=seconds, pid=None)
        raise Interrupted(f"the stage was {stage.name}; `{again}` goes on")
    state.write(stage.name, status="failed", seconds=seconds, pid=None, error=ended.error)
    text = f"stage {stage.name} failed: {ended.error.removeprefix('vidtrl: error: ')} (all of it in {log})."
    text += f" Stages before it are kept; `{again}` goes on"
    if ended.error.startswith("vidtrl: error: "):
        raise UserError(text)
    print(f"vidtrl: {text}", file=sys.stderr)
    return 1


def dry_run(pipeline: Pipeline, selected: Sequence[str], redo: Sequence[str], path: str) -> int:
    """Print what would run and with what, without touching the output directory."""
    described = _apart(describe, pipeline)
    steps = plan(pipeline, State(pipeline.output_dir), selected, redo)
    width = 100
    print(f"{path}: {pipeline.model}, {len(steps)} stages, in {pipeline.output_dir}")
    for step in steps:
        print(f"  {_line(step)}")
    if not has_accelerator():
        print("this machine has no accelerator: settings marked derived are as they would be here (bf16 off)")
    for number, (step, (rows, memory)) in enumerate(zip(steps, described, strict=True), 1):
        stage = step.stage
        print(f"\n[{number}/{len(steps)}] {stage.name}")
        for name in ("base_adapters", "video_model_name_or_path", "model_name_or_path"):
            if value := stage.settings.get(name):
                print(f"  from    {name}: {', '.join(value) if isinstance(value, list) else value}")
        if stage.enhance:
            print(f"  first   {shlex.join(enhance_command(stage))}")
        print(f"  runs    {shlex.join(stage_command(stage))}")
        result = "an enhancer (vidtrl.prompts.PromptEnhancer)" if stage.name == "prompt" else ADAPTERS
        print(
            f"  leaves  {result} in {stage.folder}, {stage.config_file.name} with its settings, logs/{stage.name}.log"
        )
        for line in missing_data(stage):
            print(f"  missing {line}")
        print("  settings:")
        for name, value, origin in rows:
            if origin != "default":
                print(f"    {name}: {json.dumps(value, ensure_ascii=False)}  # {origin}")
        rest = ", ".join(f"{name}={json.dumps(value)}" for name, value, origin in rows if origin == "default")
        lines = textwrap.wrap(rest, width, break_long_words=False, break_on_hyphens=False)
        print("  defaults:")
        print(textwrap.indent("\n".join(lines), "    "))
        print("  memory:")
        print(textwrap.indent(memory, "    "))
    return 0


def describe(pipeline: Pipeline) -> list[tuple[list[tuple[str, Any, str]], str]]:
    """Resolved settings and estimated memory of each stage."""
    parsed = {stage.name: parse_stage(stage, dry_run=True) for stage in pipeline.stages}
    memory = estimated_memory(pipeline, parsed)
    return [(resolved_settings(stage, parsed[stage.name]), memory[stage.name]) for stage in pipeline.stages]
