"""`vidtrl demo`: the main job end to end on the shipped toy model, in minutes on a laptop's CPU.

Captioned mp4 clips -> `VideoSFTTrainer` with LoRA -> `VideoGRPOTrainer` with a second LoRA on top -> a prompt enhancer, trained
with TRL against the videos of that model -> `VideoDistillTrainer` with a third LoRA, for four steps instead of twenty guided
ones -> all of them generate the same held-out clips with plain diffusers in fresh processes -> the mp4 files are decoded and
measured -> a table, `results.json` and `report.html`.
Each stage that is complete is skipped when the same command runs again; training goes on from its last checkpoint.
"""

import argparse
import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from .. import __version__
from ..inference.benchmark import peak_memory
from ..toy import pipeline_path
from .demo_clips import generate_clips, measure_clips, measure_speed
from .demo_report import enhancer_note, recipe_note, results_table, speed_note, verdict, write_demo_report
from .demo_settings import PACE, STAGES, DemoSettings, full_settings
from .demo_stages import distil, fine_tune, reinforce, train_enhancer, write_clips, write_json
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
        stages (`Sequence[str]`, *optional*, defaults to all): Which trainings, the first ones of `"sft"`, `"grpo"`, `"prompt"` and
            `"distill"`; `("sft",)` leaves the others out.

    Returns:
        `dict`: What `results.json` holds.

    Raises:
        [`UserError`]: If the folder holds something else, or a stage is asked for without the one it builds on.
    """
    if tuple(stages) != STAGES[: len(stages)] or not stages:
        raise UserError(
            f"stages {' '.join(stages)}: each builds on the ones before it, take the first so many of {' '.join(STAGES)}"
        )
    output, settings, console = Path(output), settings or DemoSettings(), console or Console()
    # a report is made to be shared: it names no folder of this machine unless asked to
    identity = {"seed": seed, "base": base or "shipped", "settings": asdict(settings)}
    base = str(Path(base or pipeline_path()).resolve())
    _claim(output, {"vidtrl": __version__, **identity})
    training = output, seed, base, settings, console
    counts = {name: getattr(settings, name)["max_steps"] for name in ("sft", "grpo", "distill")}
    steps = len(settings.distill["denoising_steps"])
    plan = {
        "clips": (f"write {settings.num_clips} captioned mp4 clips", write_clips, output, seed, settings),
        "sft": (f"SFT: fine-tune a LoRA for {counts['sft']} steps", fine_tune, *training),
        "grpo": (
            f"GRPO: train a second LoRA on {' + '.join(settings.rewards)}, {counts['grpo']} updates, "
            f"recipe {settings.grpo['recipe']}",
            reinforce,
            *training,
        ),
        "prompt": ("prompt enhancement: train a language model on what its videos show", train_enhancer, *training),
        "distill": (
            f"distillation: train a third LoRA for {steps} steps without guidance, {counts['distill']} updates",
            distil,
            *training,
        ),
        "generate": (
            f"generate {settings.num_generated} held-out clips with each model, with plain diffusers in fresh processes",
            generate_clips,
            *training[:-1],
            stages,
            console,
        ),
        "speed": ("time teacher and student, in turns", measure_speed, output, base, settings),
    }
    names = ["clips", *stages, "generate", *(["speed"] if "distill" in stages else []), "report"]
    watch = StageWatch(output / "stages.json", names, settings, console)
    returned = {}
    for name in names[:-1]:
        text, function, *args = plan[name]
        with watch.stage(name, text):
            returned[name] = function(*args)
    with watch.stage("report", "measure the mp4 files and write the report"):
        results = measure_clips(output, stages, settings, returned.get("speed"))
    results |= identity | {"versions": package_versions(), "stages": watch.record}
    results["seconds"] = round(sum(one["seconds"] for one in watch.record.values()), 1)
    write_json(output / "results.json", results)
    write_demo_report(output, results)
    return results


class StageWatch:
    """
    Says which stage begins and how long is left, and keeps what each took: seconds, over all runs that worked at it, and peak
    memory.

    Args:
        file (`Path`): Where that is kept.
        names (`Sequence[str]`): The stages of this run.
        settings ([`DemoSettings`]): Their sizes.
        console (`rich.console.Console`): Where to print.
    """

    def __init__(self, file: Path, names: Sequence[str], settings: DemoSettings, console: Console):
        self.file, self.names, self.console = file, names, console
        self.known = json.loads(file.read_text()) if file.is_file() else {}
        self.record = {
            # what is done anew in each run is not done before it
            name: {"seconds": 0.0, "peak_memory": 0, "finished": False}
            | (self.known.get(name, {}) if name not in ("speed", "report") else {})
            | ({"finished": False} if name == "generate" else {})  # with another stage there is more of it
            for name in names
        }
        self.expected = {name: PACE[name] * number for name, number in settings.units().items()}

    def seconds_left(self) -> float:
        """The usual time of what is not finished, by how much slower than usual the finished stages were."""
        done = [name for name in self.names if self.record[name]["finished"]]
        timed = [name for name in done if self.record[name]["seconds"] > 1]  # not those that another run left
        usual = sum(self.expected[name] for name in timed)
        took = sum(self.record[name]["seconds"] for name in timed)
        pace = took / usual if usual > 10 else 1.0
        return pace * sum(self.expected[name] for name in self.names if name not in done)

    @contextlib.contextmanager
    def stage(self, name: str, text: str):
        """Around the work of a stage."""
        number, one = self.names.index(name) + 1, self.record[name]
        left = self.seconds_left()
        about = f"; about {max(1, round(left / 60))} min left in all" if left > 20 else ""
        self.console.print(
            f"[bold]\\[{number}/{len(self.names)}][/bold] {escape(text)}[dim]{about}[/dim]", highlight=False
        )
        start, finished = time.perf_counter(), one["finished"]
        with peak_memory("cpu", children=True, interval=0.25) as peak:
            try:
                yield
                one["finished"] = True
            finally:
                if not finished:  # what a look at finished files takes is not the stage's time
                    one["seconds"] = round(one["seconds"] + time.perf_counter() - start, 1)
                    one["peak_memory"] = max(one["peak_memory"], peak[0])
                write_json(self.file, self.known | self.record)


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
        help="which trainings (default: sft grpo prompt distill); the same folder can be given the next one later",
    )
    parser.add_argument(
        "--base", metavar="DIR", help="another WanPipeline of the toy world in place of the shipped one"
    )
    parser.add_argument(
        "--full", action="store_true", help="more clips and longer trainings: about ten minutes on two quiet cores"
    )
    args = parser.parse_args(argv)
    if args.seed < 0:
        raise UserError(f"--seed must not be negative, got {args.seed}")
    if args.base and not (Path(args.base) / "model_index.json").is_file():
        raise UserError(f"--base {args.base!r} is no diffusers pipeline: it has no model_index.json")
    console = Console()
    if not console.is_terminal:
        _silence_progress_bars()
    settings = full_settings() if args.full else DemoSettings()
    results = run_demo(args.output, args.seed, args.base, settings, console, args.stages)
    console.print(results_table(results))
    console.print(verdict(results), highlight=False)
    for stage, reached in results["goals"].items():
        for goal, yes in reached.items():
            console.print(f"  {stage.upper()}: {goal}: {'[green]yes[/green]' if yes else '[red]no[/red]'}")
    if "speed" in results:
        console.print(speed_note(results), highlight=False)
    if "enhancer" in results["models"]:
        console.print(enhancer_note(results), highlight=False)
    if "grpo" in results["models"]:
        console.print(recipe_note(results, Path(args.output)), highlight=False)
    console.print(f"{results['seconds']:.0f} s in all. Report: {escape(str(Path(args.output) / 'report.html'))}")
    return 0
