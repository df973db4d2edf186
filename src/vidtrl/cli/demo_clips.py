"""What `vidtrl demo` generates with its models, and what it measures in the files."""

import json
import os
import queue
import shutil
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from . import generate
from .demo_settings import ADAPTERS, ATTRIBUTES, MODELS, STAGE_MODELS, USER_MODELS, DemoSettings
from .demo_stages import load_fused, spread, write_json
from .errors import Interrupted


HELD_OUT_SEED = 1_000_000  # initial noise of the clips from captions; those from users' prompts have 500 more
USER_PROMPTS_SEED = 10_000  # of the paraphrases: benchmarks/toy_prompts.py has them too


@dataclass
class Generation:
    """
    The clips that one model makes in a process of its own.

    Args:
        label (`str`): For messages.
        command (`list[str]`): Announces each finished clip with a line on stdout.
        total (`int`), missing (`int`): Clips in all, and those that are still to be made.
        log (`Path`): Where its stderr goes.
    """

    label: str
    command: list[str]
    total: int
    missing: int
    log: Path


def caption_models(stages: Sequence[str]) -> list[str]:
    """Which models generate from captions."""
    return ["base", *(model for stage in stages for model in STAGE_MODELS.get(stage, ()))]


def user_models(stages: Sequence[str], settings: DemoSettings) -> list[str]:
    """Which models generate from what users write."""
    if "prompt" not in stages:
        return []
    models = [model for stage in stages for model in USER_MODELS.get(stage, ())]
    return ["grpo", "enhancer_sft", *models[1:]] if settings.compare_enhancers else models


def write_jobs(output: Path, seed: int, settings: DemoSettings, stages: Sequence[str]) -> None:
    """
    The prompts and seeds of all clips: `jobs.json` with captions, `users/jobs.json` with users' prompts, `users/enhanced.json` with
    what the enhancer makes of them.
    """
    from ..toy import captions

    first = HELD_OUT_SEED + 1000 * seed
    write_json(output / "jobs.json", _jobs(spread(captions(), settings.num_generated), first))
    if "prompt" not in stages:
        return
    from ..prompts import PromptFallbackWarning
    from ..toy.enhancement import load_enhancer
    from ..toy.paraphrases import paraphrases

    (output / "users").mkdir(exist_ok=True)
    rows = paraphrases(settings.num_user_prompts, "held_out", USER_PROMPTS_SEED)
    prompts = [row["prompt"] for row in rows]
    write_json(output / "users" / "jobs.json", _jobs(prompts, first + 500))
    sources = {"enhanced": output / "prompt"}
    if settings.compare_enhancers:
        sources["enhanced_sft"] = output / "prompt" / "sft"
    for name, source in sources.items():
        target = output / "users" / f"{name}.json"
        if target.exists():
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PromptFallbackWarning)  # each clip's entry says so
            found = load_enhancer(source).enhance(prompts)
        jobs = _jobs([one.text for one in found], first + 500)
        write_json(target, [job | {"enhanced": one.enhanced} for job, one in zip(jobs, found, strict=True)])


def _jobs(prompts: Sequence[str], first_seed: int) -> list[dict]:
    return [{"prompt": p, "seed": first_seed + i, "file": f"{i:03d}.mp4"} for i, p in enumerate(prompts)]


def generate_clips(
    output: Path, seed: int, base: str, settings: DemoSettings, stages: Sequence[str], console: Console
) -> None:
    """All models generate the same prompts from the same noise, one fresh process each, that knows diffusers only."""
    write_jobs(output, seed, settings, stages)
    script = Path(shutil.copy(generate.__file__, output / "generate.py"))
    shape = ("height", "width", "num_frames", "fps", "max_sequence_length", "num_inference_steps", "guidance_scale")
    common = [f"--{name}={getattr(settings, name)}" for name in shape] + [f"--pipeline={base}", "--threads=1"]
    after = {"base": 0, "sft": 1, "distill": 3}  # how many adapters; for all others: two
    written = [("jobs.json", Path(), name) for name in caption_models(stages)]
    files = {"grpo": "jobs.json", "enhancer_sft": "enhanced_sft.json"}
    written += [(files.get(n, "enhanced.json"), Path("users"), n) for n in user_models(stages, settings)]
    generations = []
    for file, folder, name in written:
        jobs_file, videos = output / folder / file, output / folder / "videos" / name
        jobs = json.loads(jobs_file.read_text())
        command = [sys.executable, str(script), *common, f"--jobs={jobs_file}", f"--output={videos}"]
        adapters = [str(output / stage) for stage in ADAPTERS[: after.get(name, 2)]]
        command += ["--lora", *adapters] if adapters else []
        if name == "teacher":
            command += [f"--guidance_scale={settings.distill['teacher_guidance_scale']}"]
        if name in ("control", "distill"):
            command += [f"--num_inference_steps={len(settings.distill['denoising_steps'])}", "--guidance_scale=1"]
            command += [f"--scheduler={output / 'distill' / 'scheduler'}"]
        missing = sum(not (videos / job["file"]).exists() for job in jobs)
        if missing:
            label = MODELS[name] + (", users' prompts" if folder.name else "")
            log = output / f"generate_{'users_' if folder.name else ''}{name}.log"
            generations.append(Generation(label, command, len(jobs), missing, log))
    if generations:
        run_side_by_side(generations, console)
    else:
        console.print("      done before")


def run_side_by_side(generations: Sequence[Generation], console: Console) -> None:
    """Run the generating processes, one for each core at a time, with a progress bar each, or eight lines in all."""
    events: queue.Queue = queue.Queue()

    def follow(i: int, process: subprocess.Popen) -> None:
        for line in process.stdout:
            events.put((i, line))
        events.put((i, None))

    waiting, running, processes = list(range(len(generations))), set(), {}
    total, done, start = sum(one.missing for one in generations), 0, time.perf_counter()
    columns = (TextColumn("      {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns, TextColumn("ETA"), TimeRemainingColumn(), console=console, disable=not console.is_terminal
    ) as progress:
        # of all clips first: a model that waits for a free core knows nothing of the time that is left
        whole = progress.add_task("all", total=total)
        tasks = [
            progress.add_task(one.label, total=one.total, completed=one.total - one.missing) for one in generations
        ]
        try:
            while waiting or running:
                if waiting and len(running) < (os.cpu_count() or 2):
                    i = waiting.pop(0)
                    running.add(i)
                    with open(generations[i].log, "w") as log:  # the process holds its own
                        processes[i] = subprocess.Popen(
                            generations[i].command,
                            stdout=subprocess.PIPE,
                            stderr=log,
                            text=True,
                            env=os.environ | {"HF_HUB_OFFLINE": "1"},
                        )
                    threading.Thread(target=follow, args=(i, processes[i]), daemon=True).start()
                    continue
                i, line = events.get()
                if line is None:
                    running.discard(i)
                    if processes[i].wait():
                        last = (generations[i].log.read_text().strip().splitlines() or ["no message"])[-1]
                        raise RuntimeError(
                            f"generating with {generations[i].label} failed: {last} (all of it in {generations[i].log})"
                        )
                    continue
                progress.advance(whole)
                progress.advance(tasks[i])
                done += 1
                if not console.is_terminal and done * 8 // total > (done - 1) * 8 // total:
                    seconds = time.perf_counter() - start
                    left = seconds / done * (total - done)
                    text = f"      {done} of {total} clips, {generations[i].label}, {seconds:.0f} s, {left:.0f} s left"
                    console.print(text, highlight=False)
        except KeyboardInterrupt:
            raise Interrupted("the same command generates the clips that are missing") from None
        finally:
            for process in processes.values():
                if process.poll() is None:
                    process.terminate()
                process.wait()


def measure_clips(
    output: Path,
    stages: Sequence[str],
    settings: DemoSettings,
    speed: dict | None = None,
) -> dict:
    """Decode every mp4, measure its pixels, and compare each model with the one before it, pair by pair."""
    from ..report import mean_interval, share_interval
    from ..toy.paraphrases import caption_of

    models = caption_models(stages)
    clips = _judged(output, models, lambda prompt: prompt)
    shares = {"all": lambda m: m["all"], **{a: lambda m, a=a: m["right"][a] for a in ATTRIBUTES}}
    means = {"flicker": lambda m: m["flicker"], "smoothness": lambda m: m["smoothness"]}
    metrics = {name: _compared(clips, models, value, share_interval) for name, value in shares.items()}
    metrics["present"] = _compared(clips, models, lambda m: m["present"], share_interval)
    metrics |= {name: _compared(clips, models, value, mean_interval) for name, value in means.items()}
    users, user_clips = user_models(stages, settings), []
    if users:
        user_clips = _judged(output / "users", users, caption_of)
        for name, file in (("enhancer_sft", "enhanced_sft"), ("enhancer", "enhanced"), ("distill", "enhanced")):
            if name in users:
                jobs = json.loads((output / "users" / f"{file}.json").read_text())
                for clip, job in zip(user_clips, jobs, strict=True):
                    clip[name] |= {"prompt": job["prompt"], "enhanced": job["enhanced"]}
        metrics |= {f"users_{n}": _compared(user_clips, users, value, share_interval) for n, value in shares.items()}
    return {
        "num_clips": len(clips),
        "num_user_clips": len(user_clips),
        "models": [name for name in MODELS if name in (*models, *users)],
        "goals": goals(metrics, speed),
        **({"speed": speed} if speed else {}),
        "metrics": metrics,
        "clips": clips,
        "user_clips": user_clips,
    }


def _judged(folder: Path, models: Sequence[str], caption) -> list[dict]:
    """Each job of the folder, with what is seen in the clip that each model made of it."""
    from ..data.video import read_video
    from ..toy import measure, parse_caption

    clips = []
    for job in json.loads((folder / "jobs.json").read_text()):
        want, clip = parse_caption(caption(job["prompt"])), dict(job)
        for name in models:
            found = asdict(measure(read_video(folder / "videos" / name / job["file"]).float() / 255))
            right = {a: found[a] == want[a] for a in ATTRIBUTES}
            clip[name] = found | {"right": right, "all": all(right.values())}
        clips.append(clip)
    return clips


def _compared(clips: Sequence[dict], models: Sequence[str], value, interval) -> dict:
    """One measure of all models, with the difference of each to the one before it."""
    from ..report import paired_difference

    samples = {name: [value(clip[name]) for clip in clips] for name in models}
    differences = {
        name: paired_difference(samples[before], samples[name])._asdict()
        for before, name in zip(models, models[1:], strict=False)
    }
    return {name: interval(x)._asdict() for name, x in samples.items()} | {"differences": differences}


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
    users = metrics.get("users_all")
    if users:
        reached["prompt"] = {
            "of users' prompts as they are, 35 % at most come out all right": users["grpo"]["value"] <= 0.35,
            "enhanced, at least 70 %": users["enhancer"]["value"] >= 0.7,
        }
        if "enhancer_sft" in users:
            gain = "the enhancer's GRPO adds 5 points to its SFT"
            reached["prompt"][gain] = change("users_all", "enhancer") >= 0.05
    if "distill" in metrics["all"]["differences"]:
        kept = metrics["all"]["distill"]["value"] / max(metrics["all"]["teacher"]["value"], 1e-9)
        reached["distill"] = {
            "the student keeps 90 % of its teacher's clips with all right": kept >= 0.9,
            "denoising is at least 8 times as fast": speed["denoise_ratio"] >= 8,
            "a whole clip is made at least 6 times as fast, same decoder": speed["total_ratio"] >= 6,
            "a whole clip is made at least 6 times as fast, the student with a faster decoder": speed[
                "total_ratio_student"
            ]
            >= 6,
        }
    return reached


def measure_speed(output: Path, base: str, settings: DemoSettings) -> dict:
    """
    Seconds for the same clips by the guided teacher and by the student, in turns, in one process, adapters merged in all. Both
    as they are loaded, and both with the decoder that [`InferenceOptimization`] makes faster (bfloat16, channels last).

    Returns:
        `dict`: `teacher`, `distill`, `teacher_fast` and `distill_fast` (denoiser evaluations a clip, seconds of denoising and of the
        whole call a clip, medians); `denoise_ratio` and `total_ratio` of teacher to student, `total_ratio_fast` of the two with
        the faster decoder, `total_ratio_student` of the plain teacher to the student with it; and `num_clips`.
    """
    import torch

    from ..inference import FewStepFlowScheduler, InferenceOptimization
    from ..inference.benchmark import measure
    from ..toy import captions

    prompts = spread(captions(), 12)
    faster = InferenceOptimization(vae_dtype=torch.bfloat16, vae_channels_last=True)
    pipes = {}
    for name in ("teacher", "distill", "teacher_fast", "distill_fast"):
        student = name.startswith("distill")
        stages = ("sft", "grpo", "distill") if student else ("sft", "grpo")
        pipes[name] = load_fused(base, *(output / stage for stage in stages))
        if student:
            pipes[name].scheduler = FewStepFlowScheduler.from_pretrained(output / "distill" / "scheduler")
        if name.endswith("fast"):
            pipes[name] = faster.apply(pipes[name])
        pipes[name].set_progress_bar_config(disable=True)
    rounds: dict[str, list] = {name: [] for name in pipes}
    for _ in range(3):
        for name, pipe in pipes.items():
            student = name.startswith("distill")
            number = len(settings.distill["denoising_steps"]) if student else settings.num_inference_steps
            scale = 1.0 if student else settings.distill["teacher_guidance_scale"]

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
    total = {name: found[name]["total_seconds"] for name in pipes}
    found["denoise_ratio"] = found["teacher"]["denoise_seconds"] / found["distill"]["denoise_seconds"]
    found["total_ratio"] = total["teacher"] / total["distill"]
    found["total_ratio_fast"] = total["teacher_fast"] / total["distill_fast"]
    found["total_ratio_student"] = total["teacher"] / total["distill_fast"]
    return found
