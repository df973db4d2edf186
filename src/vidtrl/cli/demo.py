"""`vidtrl demo`: the main job end to end on the shipped toy model, in minutes on a laptop's CPU.

Captioned mp4 clips -> `VideoSFTTrainer` with LoRA -> `VideoGRPOTrainer` with a second LoRA on top -> `VideoDistillTrainer`
with a third, for four steps instead of twenty guided ones -> all of them generate the same held-out clips with plain
diffusers in fresh processes -> the mp4 files are decoded and measured -> a table, `results.json` and `report.html`.
Each stage that is complete is skipped when the same command runs again; training goes on from its last checkpoint.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from .. import __version__
from ..toy import pipeline_path
from .demo_report import recipe_note, results_table, speed_note, verdict, write_demo_report
from .demo_settings import STAGE_MODELS, STAGES, DemoSettings
from .demo_stages import (
    distil,
    fine_tune,
    generate_clips,
    measure_clips,
    measure_speed,
    reinforce,
    write_clips,
    write_json,
)
from .env import package_versions
from .errors import Parser, UserError


def run_demo(
    output,
    seed: int = 0,
    base: str | None = None,
    settings: DemoSettings | None = None,
    console: Console | None = None,
    stages: Sequence[str] = STAGES,
) -> dict:
    """
    Run the stages that are not complete yet, and write `results.json` and `report.html`.

    Args:
        output (`str` or `PathLike`): Folder for everything; new, empty, or of an earlier run with the same arguments.
        seed (`int`, *optional*, defaults to `0`): Seeds clips, training and sampling.
        base (`str`, *optional*): Folder of another `WanPipeline` that knows the toy world; the shipped one by default.
        settings ([`DemoSettings`], *optional*): What to train and measure.
        console (`rich.console.Console`, *optional*): Where to print.
        stages (`Sequence[str]`, *optional*, defaults to all): Which trainings, of `"sft"`, `"grpo"` and `"distill"` in this order;
            `("sft",)` leaves the others out.

    Returns:
        `dict`: What `results.json` holds.

    Raises:
        [`UserError`]: If the folder holds something else, or a stage is asked for without the one it builds on.
    """
    if tuple(stages) != STAGES[: len(stages)] or not stages:
        raise UserError(
            f"stages {' '.join(stages)}: each builds on the one before it, take sft, or sft grpo, or sft grpo distill"
        )
    output, settings, console = Path(output), settings or DemoSettings(), console or Console()
    # a report is made to be shared: it names no folder of this machine unless asked to
    identity = {"seed": seed, "base": base or "shipped", "settings": asdict(settings)}
    base = str(Path(base or pipeline_path()).resolve())
    _claim(output, {"vidtrl": __version__, **identity})
    models = ["base", *(model for stage in stages for model in STAGE_MODELS[stage])]
    number = len(stages) + 3 + ("distill" in stages)
    seconds: dict[str, float] = {}

    def stage(text, function, *args):
        console.print(f"[bold]\\[{len(seconds) + 1}/{number}][/bold] {escape(text)}")
        start = time.perf_counter()
        result = function(*args)
        seconds[function.__name__] = round(time.perf_counter() - start, 1)
        return result

    training = output, seed, base, settings, console
    stage(f"write {settings.num_clips} captioned mp4 clips", write_clips, output, seed, settings)
    stage(f"SFT: fine-tune a LoRA for {settings.sft['max_steps']} steps", fine_tune, *training)
    if "grpo" in stages:
        rewards = " + ".join(settings.rewards)
        text = f"GRPO: train a second LoRA on {rewards}, {settings.grpo['max_steps']} updates, recipe {settings.grpo['recipe']}"
        stage(text, reinforce, *training)
    if "distill" in stages:
        steps = len(settings.distill["denoising_steps"])
        text = f"distillation: train a third LoRA for {steps} steps without guidance, {settings.distill['max_steps']} updates"
        stage(text, distil, *training)
    text = f"generate {settings.num_generated} held-out clips with each model, with plain diffusers in fresh processes"
    jobs = stage(text, generate_clips, output, seed, base, settings, models, console)
    speed = None
    if "distill" in stages:
        speed = stage("time teacher and student, in turns", measure_speed, output, base, settings)
    results = stage("measure the mp4 files and write the report", measure_clips, output, jobs, models, speed)
    results |= identity | {"versions": package_versions()}
    results["seconds"] = seconds | {"total": round(sum(seconds.values()), 1)}
    write_json(output / "results.json", results)
    write_demo_report(output, results)
    return results


def _claim(output: Path, identity: dict) -> None:
    """Make the folder this run's own, or refuse it: stages of two different runs must never be mixed."""
    marker = output / "demo.json"
    if marker.is_file():
        if json.loads(marker.read_text()) != json.loads(json.dumps(identity)):
            raise UserError(
                f"{output} holds a demo with another seed, base, version or settings: choose another --output"
            )
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is not empty and holds no demo: choose another --output")
    output.mkdir(parents=True, exist_ok=True)
    write_json(marker, identity)


def _silence_progress_bars() -> None:
    """Where the output goes to a file, a bar is a line for every step; the demo prints lines of its own."""
    import datasets
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def run(argv: Sequence[str]) -> int:
    """Run the demo and print where its results are."""
    parser = Parser(prog="vidtrl demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", default="demo", help="folder for clips, adapters, videos and report (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=STAGES,
        default=list(STAGES),
        help="which trainings (default: sft grpo distill); the same folder can be given the next one later",
    )
    parser.add_argument(
        "--base", metavar="DIR", help="another WanPipeline of the toy world in place of the shipped one"
    )
    args = parser.parse_args(argv)
    if args.seed < 0:
        raise UserError(f"--seed must not be negative, got {args.seed}")
    if args.base and not (Path(args.base) / "model_index.json").is_file():
        raise UserError(f"--base {args.base!r} is no diffusers pipeline: it has no model_index.json")
    console = Console()
    if not console.is_terminal:
        _silence_progress_bars()
    results = run_demo(args.output, args.seed, args.base, console=console, stages=args.stages)
    console.print(results_table(results))
    console.print(verdict(results), highlight=False)
    for stage, reached in results["goals"].items():
        for goal, yes in reached.items():
            console.print(f"  {stage.upper()}: {goal}: {'[green]yes[/green]' if yes else '[red]no[/red]'}")
    if "speed" in results:
        console.print(speed_note(results), highlight=False)
    if "grpo" in results["models"]:
        console.print(recipe_note(results, Path(args.output)), highlight=False)
    console.print(
        f"{results['seconds']['total']:.0f} s in this run. Report: {escape(str(Path(args.output) / 'report.html'))}"
    )
    return 0
