"""The stages of `vidtrl demo`. Each does only what its files do not hold yet."""

import json
import os
import queue
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

from . import generate
from .demo_settings import ATTRIBUTES, MODELS, STAGES, DemoSettings
from .errors import Interrupted


HELD_OUT_SEED = 1_000_000  # initial noise of the generated clips


class PlainProgress(TrainerCallback):
    """
    About ten lines a training, for output that goes to a file, where a progress bar is one line for every step.

    Args:
        console (`rich.console.Console`): Where to print.
        lines (`int`, *optional*, defaults to `10`): How many.
    """

    def __init__(self, console: Console, lines: int = 10):
        self.console, self.lines = console, lines
        self.start = (0.0, 0)
        self.shown: dict[str, float] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter(), state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.shown |= {name: logs[name] for name in ("loss", "eval_loss", "reward", "eval_reward") if name in logs}

    def on_step_end(self, args, state, control, **kwargs):
        step, total = state.global_step, state.max_steps
        if step * self.lines // total == (step - 1) * self.lines // total:
            return
        seconds, done = time.perf_counter() - self.start[0], step - self.start[1]
        text = "".join(f", {name} {value:.4g}" for name, value in self.shown.items())
        left = seconds / done * (total - step)
        self.console.print(f"      step {step}/{total}{text}, {seconds:.0f} s, {left:.0f} s left", highlight=False)


def write_clips(output: Path, seed: int, settings: DemoSettings) -> None:
    """Two VideoFolder datasets of clean clips; they share no clip."""
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


def is_trained(target: Path) -> bool:
    """Whether the training that writes into this folder is complete."""
    return (target / "trainer_state.json").is_file()  # written last


def fine_tune(output: Path, seed: int, base: str, settings: DemoSettings, console: Console):
    """
    SFT: what a user's own script would contain. Leaves `sft/pytorch_lora_weights.safetensors`.

    Returns:
        [`VideoSFTTrainer`] or `None`: The trainer, if there was anything left to train.
    """
    target = output / "sft"
    if is_trained(target):
        console.print("      done before")
        return None
    from datasets import load_dataset
    from peft import LoraConfig

    from ..trainer import VideoSFTConfig, VideoSFTTrainer

    splits = {
        split: load_dataset(str(output / "data" / split), split="train", cache_dir=str(output / "cache" / "datasets"))
        for split in ("train", "eval")
    }
    args = VideoSFTConfig(
        **_common(target, seed, settings, console),
        fps=settings.fps,
        cache_dir=str(output / "cache" / "latents"),
        **settings.sft,
    )
    trainer = VideoSFTTrainer(
        model=base,
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits["eval"],
        peft_config=LoraConfig(r=settings.lora_r, lora_alpha=settings.lora_r),
    )
    return _train(trainer, target, console)


def load_fused(base: str, *adapters: Path):
    """
    The base with adapters merged into its weights, in memory: what the next stage trains its own adapter on.

    `base_adapters` would stack them instead; on a model this small each costs about as much time as the model itself.

    Args:
        base (`str`): Folder of the base pipeline.
        *adapters (`Path`): Folders with `pytorch_lora_weights.safetensors`.

    Returns:
        `DiffusionPipeline`: In float32, without adapter layers.
    """
    import torch
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(base, dtype=torch.float32)
    for adapter in adapters:
        pipe.load_lora_weights(adapter)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    return pipe


def reinforce(output: Path, seed: int, base: str, settings: DemoSettings, console: Console):
    """
    GRPO: a second adapter, trained on rewards on top of the first. Leaves `grpo/pytorch_lora_weights.safetensors`.

    Returns:
        [`VideoGRPOTrainer`] or `None`: The trainer, if there was anything left to train.
    """
    target = output / "grpo"
    if is_trained(target):
        console.print("      done before")
        return None
    from datasets import Dataset
    from peft import LoraConfig

    from ..toy import captions
    from ..trainer import VideoGRPOConfig, VideoGRPOTrainer

    trainer = VideoGRPOTrainer(
        model=load_fused(base, output / "sft"),
        reward_funcs=list(settings.rewards),
        eval_reward_funcs=list(settings.watched_rewards),
        # the SFT stage has proven this pipeline
        args=VideoGRPOConfig(**_common(target, seed, settings, console), check_model=False, **settings.grpo),
        train_dataset=Dataset.from_dict({"prompt": captions()}),
        eval_dataset=Dataset.from_dict({"prompt": _spread(captions(), settings.num_eval_prompts)}),
        peft_config=LoraConfig(r=settings.lora_r, lora_alpha=settings.lora_r),
    )
    return _train(trainer, target, console)


def distil(output: Path, seed: int, base: str, settings: DemoSettings, console: Console):
    """
    Distillation: a third adapter, with which few steps without guidance do. Leaves `distill/`, with its scheduler.

    Returns:
        [`VideoDistillTrainer`] or `None`: The trainer, if there was anything left to train.
    """
    target, below = output / "distill", [output / "sft", output / "grpo"]
    if is_trained(target):
        console.print("      done before")
        return None
    from datasets import Dataset
    from peft import LoraConfig

    from ..inference import write_distill_config
    from ..toy import captions
    from ..trainer import VideoDistillConfig, VideoDistillTrainer

    common = {**_common(target, seed, settings, console), "check_model": False, "eval_on_start": False}
    common["cache_dir"] = str(output / "cache" / "latents")
    trainer = VideoDistillTrainer(
        model=load_fused(base, *below),
        args=VideoDistillConfig(**{**common, **settings.distill}),
        train_dataset=Dataset.from_dict({"prompt": captions()}),
        peft_config=LoraConfig(r=settings.lora_r, lora_alpha=settings.lora_r),
    )
    _train(trainer, target, console)
    # merged in memory alone: whoever loads the student stacks them under it
    student = asdict(trainer.student_config()) | {"base_adapters": ["../sft", "../grpo"]}
    write_distill_config(target, **student)
    return trainer


def _common(target: Path, seed: int, settings: DemoSettings, console: Console) -> dict:
    """The arguments that both trainings share."""
    return {
        "output_dir": str(target),
        "seed": seed,
        "height": settings.height,
        "width": settings.width,
        "num_frames": settings.num_frames,
        "max_sequence_length": settings.max_sequence_length,
        "eval_strategy": "steps",
        "eval_on_start": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,  # the figures in the docs are the CPU's, and the toy is too small for a GPU to help
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": not console.is_terminal,
    }


def _train(trainer, target: Path, console: Console):
    """Train from the last checkpoint on, if there is one, and save."""
    from transformers.trainer_utils import get_last_checkpoint

    if not console.is_terminal:
        trainer.add_callback(PlainProgress(console))
    checkpoint = get_last_checkpoint(str(target)) if target.is_dir() else None
    if checkpoint:
        console.print(f"      going on from {escape(Path(checkpoint).name)}")
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        raise Interrupted("the same command goes on from the last checkpoint") from None
    trainer.save_model(str(target))
    trainer.save_state()
    return trainer


def _spread(items: list, count: int) -> list:
    """So many of the items, evenly over all of them."""
    return [items[i * len(items) // count] for i in range(count)]


def generate_clips(
    output: Path, seed: int, base: str, settings: DemoSettings, models: Sequence[str], console: Console
) -> list[dict]:
    """All models generate the same prompts from the same noise, one fresh process each, that knows diffusers only."""
    from ..toy import captions

    jobs = [
        {"prompt": caption, "seed": HELD_OUT_SEED + 1000 * seed + i, "file": f"{i:03d}.mp4"}
        for i, caption in enumerate(_spread(captions(), settings.num_generated))
    ]
    write_json(output / "jobs.json", jobs)
    script = Path(shutil.copy(generate.__file__, output / "generate.py"))
    threads = max(1, (os.cpu_count() or 2) // len(models))
    shape = ("height", "width", "num_frames", "fps", "max_sequence_length", "num_inference_steps", "guidance_scale")
    common = [f"--{name}={getattr(settings, name)}" for name in shape]
    common += [f"--pipeline={base}", f"--jobs={output / 'jobs.json'}", f"--threads={threads}"]
    commands = {}
    for i, name in enumerate(models):
        adapters = [str(output / stage) for stage in models[1 : i + 1] if stage in STAGES]
        commands[name] = [sys.executable, str(script), *common, f"--output={output / 'videos' / name}"]
        commands[name] += ["--lora", *adapters] if adapters else []
        if name == "teacher":
            commands[name] += [f"--guidance_scale={settings.distill['teacher_guidance_scale']}"]
        if name in ("control", "distill"):
            steps = len(settings.distill["denoising_steps"])
            commands[name] += [f"--num_inference_steps={steps}", "--guidance_scale=1"]
            commands[name] += [f"--scheduler={output / 'distill' / 'scheduler'}"]
    missing = {name: sum(not (output / "videos" / name / job["file"]).exists() for job in jobs) for name in commands}
    commands = {name: command for name, command in commands.items() if missing[name]}
    if commands:
        run_side_by_side(commands, missing, len(jobs), output, console)
    else:
        console.print("      done before")
    return jobs


def run_side_by_side(
    commands: dict[str, list[str]], missing: dict[str, int], total: int, output: Path, console: Console
) -> None:
    """Run the generating processes at once, with one progress bar each, or a line each quarter."""
    lines: queue.Queue = queue.Queue()

    def follow(name, process):
        for line in process.stdout:
            lines.put((name, line))
        lines.put((name, None))

    processes = {}
    done = {name: total - missing[name] for name in commands}
    columns = (TextColumn("      {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns, TextColumn("ETA"), TimeRemainingColumn(), console=console, disable=not console.is_terminal
    ) as progress:
        try:
            tasks = {}
            for name, command in commands.items():
                log = open(output / f"generate_{name}.log", "w")  # noqa: SIM115 - closed below, the process holds its own
                processes[name] = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
                )
                log.close()
                tasks[name] = progress.add_task(MODELS[name], total=total, completed=done[name])
                threading.Thread(target=follow, args=(name, processes[name]), daemon=True).start()
            running = set(commands)
            while running:
                name, line = lines.get()
                if line is None:
                    running.discard(name)
                    continue
                progress.advance(tasks[name])
                done[name] += 1
                if not console.is_terminal and done[name] * 4 // total > (done[name] - 1) * 4 // total:
                    console.print(f"      {MODELS[name]}: {done[name]} of {total} clips", highlight=False)
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


def measure_clips(output: Path, jobs: list[dict], models: Sequence[str], speed: dict | None = None) -> dict:
    """Decode every mp4, measure its pixels, and compare each model with the one before it, pair by pair."""
    from ..data.video import read_video
    from ..report import mean_interval, paired_difference, share_interval
    from ..toy import measure, parse_caption

    clips = []
    for job in jobs:
        want, clip = parse_caption(job["prompt"]), dict(job)
        for name in models:
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
    metrics = {}
    for metric, value in columns.items():
        samples = {name: [value(clip[name]) for clip in clips] for name in models}
        interval = share_interval if metric in shares else mean_interval
        metrics[metric] = {name: interval(x)._asdict() for name, x in samples.items()}
        metrics[metric]["differences"] = {
            name: paired_difference(samples[before], samples[name])._asdict()
            for before, name in zip(models, models[1:], strict=False)
        }
    return {
        "num_clips": len(clips),
        "models": list(models),
        "goals": goals(metrics, speed),
        **({"speed": speed} if speed else {}),
        "metrics": metrics,
        "clips": clips,
    }


def goals(metrics: dict, speed: dict | None = None) -> dict[str, dict[str, bool]]:
    """What each stage was to reach over the one before it, and whether it did."""
    change = lambda metric, stage: metrics[metric]["differences"][stage]["value"]  # noqa: E731
    reached = {
        "sft": {"all right rises by 15 points": change("all", "sft") >= 0.15, "flicker falls": change("flicker", "sft") < 0}
    }  # fmt: skip
    if "grpo" in metrics["all"]["differences"]:
        right = metrics["all"]["grpo"]["value"]
        reached["grpo"] = {
            "all right rises by 10 points or reaches 95 %": change("all", "grpo") >= 0.1 or right >= 0.95,
            # clip by clip it wanders; worse is what the interval says
            "flicker is not worse": metrics["flicker"]["differences"]["grpo"]["low"] <= 0,
            "presence, never trained on, falls by 3 points at most": change("present", "grpo") >= -0.03,
        }
    if "distill" in metrics["all"]["differences"]:
        kept = metrics["all"]["distill"]["value"] / max(metrics["all"]["teacher"]["value"], 1e-9)
        reached["distill"] = {
            "the student keeps 90 % of its teacher's clips with all right": kept >= 0.9,
            "denoising is at least 8 times as fast": speed["denoise_ratio"] >= 8,
            "a whole clip is made at least 6 times as fast": speed["total_ratio"] >= 6,
        }
    return reached


def measure_speed(output: Path, base: str, settings: DemoSettings) -> dict:
    """
    Seconds for the same clips by the guided teacher and by the student, in turns, in one process, adapters merged in both.

    Returns:
        `dict`: `teacher` and `distill` (denoiser evaluations a clip, seconds of denoising and of the whole call a clip, medians),
        `denoise_ratio`, `total_ratio` and `num_clips`.
    """
    import torch

    from ..inference import FewStepFlowScheduler
    from ..inference.benchmark import measure
    from ..toy import captions

    prompts = _spread(captions(), 12)
    steps = settings.num_inference_steps, len(settings.distill["denoising_steps"])
    guidance = settings.distill["teacher_guidance_scale"], 1.0
    pipes = {
        "teacher": load_fused(base, output / "sft", output / "grpo"),
        "distill": load_fused(base, output / "sft", output / "grpo", output / "distill"),
    }
    scheduler = output / "distill" / "scheduler"
    pipes["distill"].scheduler = FewStepFlowScheduler.from_pretrained(scheduler)
    rounds: dict[str, list] = {name: [] for name in pipes}
    for _ in range(3):
        for (name, pipe), number, scale in zip(pipes.items(), steps, guidance, strict=True):
            pipe.set_progress_bar_config(disable=True)

            def sample(output_type, pipe=pipe, number=number, scale=scale):
                return pipe(
                    prompt=prompts, height=settings.height, width=settings.width, num_frames=settings.num_frames,
                    num_inference_steps=number, guidance_scale=scale, output_type=output_type,
                    max_sequence_length=settings.max_sequence_length,
                    generator=[torch.Generator().manual_seed(i) for i in range(len(prompts))],
                ).frames  # fmt: skip

            result, _ = measure(name, sample, [pipe.transformer], "cpu", number, repeats=1)
            rounds[name].append(result)
    found: dict = {"num_clips": len(prompts)}
    for name, results in rounds.items():
        found[name] = {"evaluations": results[0].evaluations}
        for key in ("denoise_seconds", "total_seconds"):
            found[name][key] = statistics.median(getattr(r, key) for r in results) / len(prompts)
    for key in ("denoise", "total"):
        found[f"{key}_ratio"] = found["teacher"][f"{key}_seconds"] / found["distill"][f"{key}_seconds"]
    return found


def write_json(path: Path, data) -> None:
    """Write a JSON file; the name appears when the file is complete."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(data, indent=1))
    partial.replace(path)
