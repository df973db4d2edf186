"""`vidtrl demo`: the main job end to end on the shipped toy model, in minutes on a laptop's CPU.

Captioned mp4 clips -> `VideoSFTTrainer` with LoRA -> base and base + LoRA generate the same held-out clips with plain
diffusers in fresh processes -> the mp4 files are decoded and measured -> a table, `results.json` and `report.html`.
Each stage that is complete is skipped when the same command runs again; training goes on from its last checkpoint.
"""

import argparse
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from .. import __version__
from ..toy import pipeline_path
from . import generate
from .env import hardware, package_versions
from .errors import Interrupted, Parser, UserError


MODELS = {"base": "base", "sft": "base + LoRA"}
ATTRIBUTES = ("color", "shape", "direction")
HELD_OUT_SEED = 1_000_000  # initial noise of the generated clips
GOAL = 0.15  # how much the share of clips with all three attributes right shall rise


@dataclass(frozen=True)
class DemoSettings:
    """
    Everything that decides what the demo trains and measures.

    Args:
        num_clips (`int`): Training clips, all `clean`.
        num_eval_clips (`int`): Further clips for the held-out loss.
        num_generated (`int`): Generated clips a model, at most one a caption.
        lora_r (`int`): Rank; `lora_alpha` is equal to it.
        sft (`dict`): Arguments of [`VideoSFTConfig`].
        height (`int`), width (`int`), num_frames (`int`), fps (`int`), max_sequence_length (`int`): The toy's shape.
        num_inference_steps (`int`): Sampling steps of the generated clips.
        guidance_scale (`float`): Classifier-free guidance of the generated clips.
    """

    num_clips: int = 432
    num_eval_clips: int = 36
    num_generated: int = 72
    lora_r: int = 32
    sft: dict = field(
        default_factory=lambda: {
            "max_steps": 800,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 50,
            "weight_decay": 0.0,
            "max_grad_norm": 1.0,
            "caption_dropout": 0.1,
            "ema_decay": 0.99,
            "sigma_sampling": "uniform",
            "gradient_checkpointing": False,
            "eval_steps": 200,
            "save_steps": 100,
            "logging_steps": 10,
        }
    )
    height: int = 64
    width: int = 64
    num_frames: int = 17
    fps: int = 8
    max_sequence_length: int = 16
    num_inference_steps: int = 20
    guidance_scale: float = 2.0


def run_demo(
    output, seed: int = 0, base: str | None = None, settings: DemoSettings | None = None, console=None
) -> dict:
    """
    Run the stages that are not complete yet, and write `results.json` and `report.html`.

    Args:
        output (`str` or `PathLike`): Folder for everything; new, empty, or of an earlier run with the same arguments.
        seed (`int`, *optional*, defaults to `0`): Seeds clips, training and sampling.
        base (`str`, *optional*): Folder of another `WanPipeline` that knows the toy world; the shipped one by default.
        settings ([`DemoSettings`], *optional*): What to train and measure.
        console (`rich.console.Console`, *optional*): Where to print.

    Returns:
        `dict`: What `results.json` holds.

    Raises:
        [`UserError`]: If the folder holds something else.
    """
    output, settings, console = Path(output), settings or DemoSettings(), console or Console()
    # a report is made to be shared: it names no folder of this machine unless asked to
    identity = {"seed": seed, "base": base or "shipped", "settings": asdict(settings)}
    base = str(Path(base or pipeline_path()).resolve())
    _claim(output, {"vidtrl": __version__, **identity})
    seconds = {}

    def stage(number, text, function, *args):
        console.print(f"[bold]\\[{number}/4][/bold] {escape(text)}")
        start = time.perf_counter()
        result = function(*args)
        seconds[function.__name__] = round(time.perf_counter() - start, 1)
        return result

    steps = settings.sft["max_steps"]
    stage(1, f"write {settings.num_clips} captioned mp4 clips", write_clips, output, seed, settings)
    stage(2, f"fine-tune a LoRA for {steps} steps", fine_tune, output, seed, base, settings, console)
    jobs = stage(
        3,
        f"generate {settings.num_generated} held-out clips with each model, with plain diffusers in fresh processes",
        generate_clips,
        output,
        seed,
        base,
        settings,
        console,
    )
    results = stage(4, "measure the mp4 files and write the report", measure_clips, output, jobs)
    results |= identity | {"versions": package_versions()}
    results["seconds"] = seconds | {"total": round(sum(seconds.values()), 1)}
    _write_json(output / "results.json", results)
    write_demo_report(output, results)
    return results


def write_clips(output: Path, seed: int, settings: DemoSettings) -> None:
    """Stage 1: two VideoFolder datasets of clean clips; they share no clip."""
    from ..toy import write_dataset

    for split, num_clips, clip_seed in (
        ("train", settings.num_clips, seed),
        ("eval", settings.num_eval_clips, seed + 500),
    ):
        target = output / "data" / split
        if target.exists():
            continue
        partial = target.with_name(split + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        write_dataset(partial, num_clips=num_clips, quality="clean", seed=clip_seed, fps=settings.fps)
        partial.rename(target)


def fine_tune(output: Path, seed: int, base: str, settings: DemoSettings, console: Console) -> None:
    """Stage 2: what a user's own script would contain. Leaves `sft/pytorch_lora_weights.safetensors`."""
    target = output / "sft"
    if (target / "trainer_state.json").is_file():  # written last
        console.print("      done before")
        return
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers.trainer_utils import get_last_checkpoint

    from ..trainer import VideoSFTConfig, VideoSFTTrainer

    splits = {
        split: load_dataset(str(output / "data" / split), split="train", cache_dir=str(output / "cache" / "datasets"))
        for split in ("train", "eval")
    }
    args = VideoSFTConfig(
        output_dir=str(target),
        seed=seed,
        height=settings.height,
        width=settings.width,
        num_frames=settings.num_frames,
        fps=settings.fps,
        max_sequence_length=settings.max_sequence_length,
        cache_dir=str(output / "cache" / "latents"),
        eval_strategy="steps",
        eval_on_start=True,
        dataloader_pin_memory=False,
        use_cpu=True,  # the figures in the docs are the CPU's, and the toy is too small for a GPU to help
        save_total_limit=2,
        report_to="none",
        **settings.sft,
    )
    trainer = VideoSFTTrainer(
        model=base,
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits["eval"],
        peft_config=LoraConfig(r=settings.lora_r, lora_alpha=settings.lora_r),
    )
    checkpoint = get_last_checkpoint(str(target)) if target.is_dir() else None
    if checkpoint:
        console.print(f"      going on from {escape(Path(checkpoint).name)}")
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        raise Interrupted("the same command goes on from the last checkpoint") from None
    trainer.save_model(str(target))
    trainer.save_state()


def generate_clips(output: Path, seed: int, base: str, settings: DemoSettings, console: Console) -> list[dict]:
    """Stage 3: both models generate the same prompts from the same noise, one process each."""
    from ..toy import captions

    every = captions()
    jobs = [
        {"prompt": caption, "seed": HELD_OUT_SEED + 1000 * seed + i, "file": f"{i:03d}.mp4"}
        # spread over the captions where not all of them are used
        for i, caption in enumerate(
            every[j * len(every) // settings.num_generated] for j in range(settings.num_generated)
        )
    ]
    _write_json(output / "jobs.json", jobs)
    script = Path(shutil.copy(generate.__file__, output / "generate.py"))
    threads = max(1, (os.cpu_count() or 2) // 2)
    shape = ("height", "width", "num_frames", "fps", "max_sequence_length", "num_inference_steps", "guidance_scale")
    common = [f"--{name}={getattr(settings, name)}" for name in shape]
    common += [f"--pipeline={base}", f"--jobs={output / 'jobs.json'}", f"--threads={threads}"]
    commands = {
        "base": [sys.executable, str(script), *common, f"--output={output / 'videos' / 'base'}"],
        "sft": [
            sys.executable,
            str(script),
            *common,
            f"--output={output / 'videos' / 'sft'}",
            f"--lora={output / 'sft'}",
        ],
    }
    missing = {name: sum(not (output / "videos" / name / job["file"]).exists() for job in jobs) for name in commands}
    commands = {name: command for name, command in commands.items() if missing[name]}
    if commands:
        run_side_by_side(commands, missing, len(jobs), output, console)
    else:
        console.print("      done before")
    return jobs


def run_side_by_side(
    commands: dict[str, list[str]], missing: dict[str, int], total: int, output: Path, console
) -> None:
    """Run the generating processes at once, with one progress bar each."""
    lines: queue.Queue = queue.Queue()

    def follow(name, process):
        for line in process.stdout:
            lines.put((name, line))
        lines.put((name, None))

    processes = {}
    columns = (TextColumn("      {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("ETA"), TimeRemainingColumn(), console=console) as progress:
        try:
            tasks = {}
            for name, command in commands.items():
                log = open(output / f"generate_{name}.log", "w")  # noqa: SIM115 - closed below, the process holds its own
                processes[name] = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
                )
                log.close()
                tasks[name] = progress.add_task(MODELS[name], total=total, completed=total - missing[name])
                threading.Thread(target=follow, args=(name, processes[name]), daemon=True).start()
            running = set(commands)
            while running:
                name, line = lines.get()
                if line is None:
                    running.discard(name)
                else:
                    progress.advance(tasks[name])
        except KeyboardInterrupt:
            raise Interrupted("the same command generates the clips that are missing") from None
        finally:
            for process in processes.values():
                if process.poll() is None and sys.exc_info()[0] is not None:
                    process.terminate()
                process.wait()
    for name, process in processes.items():
        if process.returncode:
            log = output / f"generate_{name}.log"
            last = (log.read_text().strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"generating with {MODELS[name]} failed: {last} (all of it in {log})")


def measure_clips(output: Path, jobs: list[dict]) -> dict:
    """Stage 4: decode every mp4, measure its pixels, and compare the models pair by pair."""
    from ..data.video import read_video
    from ..report import mean_interval, paired_difference, share_interval
    from ..toy import measure, parse_caption

    clips = []
    for job in jobs:
        want, clip = parse_caption(job["prompt"]), dict(job)
        for name in MODELS:
            found = asdict(measure(read_video(output / "videos" / name / job["file"]).float() / 255))
            right = {a: found[a] == want[a] for a in ATTRIBUTES}
            clip[name] = found | {"right": right, "all": all(right.values())}
        clips.append(clip)

    shares = {"all": [], "present": [], **{a: [] for a in ATTRIBUTES}}
    columns = {
        "all": lambda m: m["all"],
        **{a: lambda m, a=a: m["right"][a] for a in ATTRIBUTES},
        "present": lambda m: m["present"],
        "flicker": lambda m: m["flicker"],
        "smoothness": lambda m: m["smoothness"],
    }
    results = {}
    for metric, value in columns.items():
        samples = {name: [value(clip[name]) for clip in clips] for name in MODELS}
        interval = share_interval if metric in shares else mean_interval
        results[metric] = {name: interval(x)._asdict() for name, x in samples.items()}
        results[metric]["difference"] = paired_difference(samples["base"], samples["sft"])._asdict()
    goal = {
        "all_rises_by_0.15": results["all"]["difference"]["value"] >= GOAL,
        "flicker_falls": results["flicker"]["difference"]["value"] < 0,
    }
    return {"num_clips": len(clips), "goal": goal, "metrics": results, "clips": clips}


METRICS = {  # name -> (label, digits after the point of its percentage, higher is better, how it is measured)
    "all": ("All three right", 0, True, "colour, shape and direction as the prompt asks"),
    "color": ("Colour", 0, True, "palette colour nearest to the shape's pixels"),
    "shape": ("Shape", 0, True, "filled share of the bounding box"),
    "direction": ("Direction", 0, True, "slope of the centroid"),
    "present": ("Shape visible", 0, True, "in at least 60 % of the frames"),
    "flicker": (
        "Flicker",
        1,
        False,
        "standard deviation of the shape's brightness over time, relative to its mean",
    ),
    "smoothness": ("Smoothness", 1, True, "100 % is uniform motion"),
}


def results_table(results: dict) -> Table:
    """The results as a table for the terminal, with 95 % intervals."""
    title = f"{results['num_clips']} held-out clips a model, measured from their mp4 files: % [95 % interval]"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for name in ("Measured", *MODELS.values(), "Difference"):
        table.add_column(name, justify="left" if name == "Measured" else "right")
    for metric, (label, digits, higher, _) in METRICS.items():
        row = results["metrics"][metric]

        def show(e, sign="", digits=digits):
            value, low, high = (f"{100 * e[k]:{sign}.{digits}f}" for k in ("value", "low", "high"))
            return escape(f"{value} [{low}, {high}]")

        difference = row["difference"]
        clear = not difference["low"] <= 0 <= difference["high"]
        style = "" if not clear else "green" if (difference["value"] > 0) == higher else "red"
        table.add_row(
            label, *(show(row[name]) for name in MODELS), Text.from_markup(show(difference, "+"), style=style)
        )
    return table


def verdict(results: dict) -> str:
    """The result in one sentence."""
    row, flicker = results["metrics"]["all"], results["metrics"]["flicker"]
    before, after = (f"{100 * flicker[name]['value']:.1f} %" for name in MODELS)
    moved = "fell" if flicker["difference"]["value"] < 0 else "rose"
    return (
        f"Clips that show the asked colour, shape and direction: {100 * row['base']['value']:.0f} % before, "
        f"{100 * row['sft']['value']:.0f} % after fine-tuning ({100 * row['difference']['value']:+.0f} points; "
        f"95 % interval {100 * row['difference']['low']:+.0f} to {100 * row['difference']['high']:+.0f}). "
        + (f"Flicker stayed at {after}." if before == after else f"Flicker {moved} from {before} to {after}.")
    )


def write_demo_report(output: Path, results: dict) -> Path:
    """Write `report.html` from the results, the videos and the training log."""
    from ..report import Chart, Clip, Estimate, Metric, write_report

    metrics = [
        Metric(
            label,
            {MODELS[name]: Estimate(**results["metrics"][key][name]) for name in MODELS},
            Estimate(**results["metrics"][key]["difference"]),
            higher_is_better=higher,
            percent=True,
            digits=digits,
            help=text,
        )
        for key, (label, digits, higher, text) in METRICS.items()
    ]
    describe = lambda m: f"{m['color']} {m['shape']} {m['direction']}" if m["present"] else "no shape seen"  # noqa: E731
    clips = [
        Clip(
            clip["prompt"],
            {label: output / "videos" / name / clip["file"] for name, label in MODELS.items()},
            notes={label: describe(clip[name]) for name, label in MODELS.items()},
            right={label: clip[name]["all"] for name, label in MODELS.items()},
        )
        for clip in results["clips"]
    ]
    # an even walk through all captions first: twelve that no one picked by their result
    stride = max(1, len(clips) // 12)
    shown = clips[::stride][:12]
    clips = shown + [clip for clip in clips if clip not in shown]
    settings = results["settings"]
    flat = {k: v for k, v in settings.items() if k != "sft"} | {f"sft.{k}": v for k, v in settings["sft"].items()}
    return write_report(
        output / "report.html",
        title="vidtrl demo: supervised fine-tuning of the toy model",
        summary=verdict(results),
        metrics=metrics,
        clips=clips,
        clips_note="Same prompt and same initial noise on both sides. The first twelve are an even walk through all "
        "prompts, not a choice by result. Under each video: what was measured in it.",
        charts=training_charts(output / "sft" / "trainer_state.json", Chart),
        settings={"base": results["base"], "seed": results["seed"], **flat},
        versions=results["versions"] | hardware(),
    )


def training_charts(state_file: Path, chart) -> list:
    """Loss curves from the trainer's log: training loss, held-out loss, and held-out loss by noise level."""
    log = json.loads(state_file.read_text())["log_history"]
    train = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    evals = [entry for entry in log if "eval_loss" in entry]
    charts = []
    if train:
        charts.append(chart("Training loss", {"training loss": train}, "step", "velocity error"))
    if evals:
        held_out = [(entry["step"], entry["eval_loss"]) for entry in evals]
        charts.append(
            chart("Held-out loss", {"held-out loss": held_out}, "step", "velocity error", "Fixed noise, unseen clips.")
        )
        strata = {k: float(k.rsplit("_", 1)[1]) for k in evals[-1] if "loss_sigma_" in k}
        curve = lambda entry: sorted((sigma, entry[k]) for k, sigma in strata.items() if k in entry)  # noqa: E731
        series = {f"step {evals[-1]['step']}": curve(evals[-1]), f"step {evals[0]['step']}": curve(evals[0])}
        if strata:
            note = "Fine detail on the left, layout and motion on the right."
            charts.append(chart("Held-out loss by noise level", series, "noise level (sigma)", "velocity error", note))
    return charts


def _claim(output: Path, identity: dict) -> None:
    """Make the folder this run's own, or refuse it: stages of two different runs must never be mixed."""
    marker = output / "demo.json"
    if marker.is_file():
        if json.loads(marker.read_text()) != json.loads(json.dumps(identity)):
            raise UserError(f"{output} holds a demo with another seed, base or version: choose another --output")
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is not empty and holds no demo: choose another --output")
    output.mkdir(parents=True, exist_ok=True)
    _write_json(marker, identity)


def _write_json(path: Path, data) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(data, indent=1))
    partial.replace(path)


def run(argv: Sequence[str]) -> int:
    """Run the demo and print where its results are."""
    parser = Parser(prog="vidtrl demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", default="demo", help="folder for clips, adapter, videos and report (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--base", metavar="DIR", help="another WanPipeline of the toy world in place of the shipped one"
    )
    args = parser.parse_args(argv)
    if args.seed < 0:
        raise UserError(f"--seed must not be negative, got {args.seed}")
    if args.base and not (Path(args.base) / "model_index.json").is_file():
        raise UserError(f"--base {args.base!r} is no diffusers pipeline: it has no model_index.json")
    console = Console()
    results = run_demo(args.output, args.seed, args.base, console=console)
    console.print(results_table(results))
    console.print(verdict(results), highlight=False)
    for name, reached in results["goal"].items():
        console.print(f"  {name.replace('_', ' ')}: {'[green]yes[/green]' if reached else '[red]no[/red]'}")
    console.print(
        f"{results['seconds']['total']:.0f} s in this run. Report: {escape(str(Path(args.output) / 'report.html'))}"
    )
    return 0
