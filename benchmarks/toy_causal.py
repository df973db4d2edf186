"""Can a bidirectional model become one that streams? A causal student of the toy, from nothing, each stage measured.

    pip install -e '.[benchmarks]'                            # for the picture
    python benchmarks/toy_causal.py                           # all; finished stages are kept in --output
    python benchmarks/toy_causal.py --stages causal           # up to this stage only

The teacher is the shipped pipeline with an SFT adapter: 20 Euler steps over all frames, without guidance, which overshoots on
this toy. The student generates 5 blocks of one latent frame, each in 4 steps upon a KV cache. The route is that of Causal
Forcing (https://huggingface.co/papers/2602.02214) and Self Forcing (https://huggingface.co/papers/2506.08009):

    teacher      SFT of the base on clean clips
    causal       SFT with teacher forcing: every frame has its own noise level and sees the clean frames before it
    consistency  of the causal model along its own trajectories, given clean frames (recipe "causal-forcing")
    student      distribution matching on the student's own streams (recipe "self-forcing"); teacher = first stage
    direct       the same from the causal model, without consistency in between

Held out of all stages: circles moving right, squares moving left and triangles moving up, in all colours (18 of the 72
captions; the base knows them from its pretraining), and the seeds of their noise.
Results go to docs/toy_causal.json, docs/toy_causal.png and docs/toy_causal_sheet.png.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, load_dataset
from diffusers import WanPipeline
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from vidtrl import VideoDistillConfig, VideoDistillTrainer, VideoSFTConfig, VideoSFTTrainer
from vidtrl.inference import CausalVideoPipeline
from vidtrl.report import mean_interval, paired_difference, share_interval
from vidtrl.toy import captions, measure, parse_caption, pipeline_path, render, write_dataset
from vidtrl.trainer.lora import ADAPTER_FILE


ROOT = Path(__file__).resolve().parent.parent
SHAPE = {"height": 64, "width": 64, "num_frames": 17, "max_sequence_length": 16}
UNSEEN = {"circle": "right", "square": "left", "triangle": "up"}  # pairs that no training clip or prompt has
HELD_OUT = [c for c in captions() if UNSEEN[parse_caption(c)["shape"]] == parse_caption(c)["direction"]]
TRAINED_ON = [caption for caption in captions() if caption not in HELD_OUT]
STEPS = [1000, 750, 500, 250]  # of the student, before the model's own shift of 3
NUM_CLIPS = 432  # rendered; those of held-out captions are left out
LONG = [1000 - 50 * i for i in range(20)]
ATTRIBUTES = ("color", "shape", "direction")
COMMON = {
    "per_device_train_batch_size": 16, "weight_decay": 0.0, "max_grad_norm": 1.0, "ema_decay": 0.99, "logging_steps": 10,
    "gradient_checkpointing": False, "check_model": False, "dataloader_pin_memory": False, "use_cpu": True,
    "log_level": "error", "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "seed": 0, **SHAPE,
}  # fmt: skip
SETTINGS = {
    "teacher": {
        "max_steps": 600, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "lr_scheduler_type": "cosine",
        "warmup_steps": 30, "sigma_sampling": "uniform", "fps": 8,
    },
    "causal": {
        "max_steps": 400, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "lr_scheduler_type": "cosine",
        "warmup_steps": 30, "sigma_sampling": "uniform", "fps": 8, "causal": "teacher_forcing", "frames_per_block": 1,
    },
    "consistency": {
        "recipe": "causal-forcing", "max_steps": 300, "per_device_train_batch_size": 8, "learning_rate": 5e-4,
        "frames_per_block": 1, "shift": "auto", "teacher_guidance_scale": 1.0, "teacher_steps": 24, "fps": 8,
    },
    "student": {
        "recipe": "self-forcing", "max_steps": 268, "learning_rate": 1e-4, "fake_learning_rate": 5e-4,
        "frames_per_block": 1, "shift": "auto", "teacher_guidance_scale": 1.0, "fake_updates_per_student": 3,
        "ema_decay": 0.95,
    },
}  # fmt: skip
SETTINGS["direct"] = SETTINGS["student"]
STAGES = tuple(SETTINGS)
RANK = {"teacher": 32, "causal": 64, "consistency": 64, "student": 128, "direct": 64}
# adapters under a stage's own, which are its teacher
BELOW = {"teacher": [], "causal": ["teacher"], "consistency": ["teacher", "causal"]}
BELOW |= {"student": ["teacher"], "direct": ["teacher"]}
START = {"student": ["causal", "consistency"], "direct": ["causal"]}  # where a stage's own adapter starts

# name, adapters on the shipped pipeline, steps of each block (None: all frames at once), sampler
MODELS = (
    ("teacher, 20 steps, all frames", ("teacher",), None, None),
    ("control: teacher, 4 steps, causal", ("teacher",), STEPS, "renoise"),
    ("causal SFT, 20 steps", ("teacher", "causal"), LONG, "ode"),
    ("causal SFT, 4 steps", ("teacher", "causal"), STEPS, "renoise"),
    ("consistency, 4 steps", ("teacher", "causal", "consistency"), STEPS, "renoise"),
    ("student, 4 steps", ("teacher", "student"), STEPS, "renoise"),
    ("without consistency, 4 steps", ("teacher", "direct"), STEPS, "renoise"),
    # fewer than any of them was trained for
    ("causal SFT, 2 steps", ("teacher", "causal"), STEPS[::2], "renoise"),
    ("consistency, 2 steps", ("teacher", "causal", "consistency"), STEPS[::2], "renoise"),
    ("student, 2 steps", ("teacher", "student"), STEPS[::2], "renoise"),
)
SHEET = tuple(MODELS[i][0] for i in (0, 1, 2, 5, 6))
SHARES = ("all", "halves", *ATTRIBUTES, "present")


# ---- Stages: each leaves an adapter and `stage.json` in its folder ----


class Watch(TrainerCallback):
    """Measures held-out clips now and then; what that costs is not the training's time."""

    def __init__(self, points: int, clips: int, sampling: dict):
        self.points, self.clips, self.sampling, self.curve, self.spent = points, clips, sampling, [], np.zeros(2)
        self.trainer: VideoSFTTrainer | VideoDistillTrainer | None = None

    def measure(self, step: int) -> None:
        start, (prompts, seeds) = clock(), held_out(self.clips)
        rows = judge(self.trainer.generate_videos(prompts, seeds, batch_size=36, **self.sampling), prompts)
        shares = {name: sum(row[name] for row in rows) / len(rows) for name in ("all", "halves", *ATTRIBUTES)}
        self.curve.append({"step": step, **shares})
        self.spent += clock() - start
        print(f"  step {step}: " + "  ".join(f"{k} {v:.3f}" for k, v in shares.items()), flush=True)

    def on_train_begin(self, args, state, control, **kwargs):
        self.measure(0)

    def on_step_end(self, args, state, control, **kwargs):
        step, last = state.global_step, state.max_steps
        if step * self.points // last > (step - 1) * self.points // last:
            self.measure(step)


def clock() -> np.ndarray:
    """Seconds of the wall and of the CPU; the second does not mind other jobs."""
    return np.array([time.perf_counter(), time.process_time()])


def train(stage: str, output: Path, points: int, clips: int) -> None:
    """One stage, unless it is finished."""
    target, start = output / stage, clock()
    if (target / "stage.json").is_file():  # written last
        print(f"{stage}: done before")
        return
    print(f"{stage}:", flush=True)
    options = {**COMMON, **SETTINGS[stage], "output_dir": str(target), "cache_dir": str(output / "cache")}
    sampling, trainer_class, config_class = {}, VideoDistillTrainer, VideoDistillConfig
    if stage in ("teacher", "causal"):
        sampling = {"num_inference_steps": 20, "guidance_scale": 1.0}
        trainer_class, config_class = VideoSFTTrainer, VideoSFTConfig
    if stage in START:
        data = Dataset.from_dict({"prompt": TRAINED_ON})
        options["init_adapter"] = str(output / f"{stage}-start")
        merge_adapters([output / name for name in START[stage]], output / f"{stage}-start")
    else:
        data = clean_clips(output)
    watch = Watch(points, clips, sampling)
    trainer = trainer_class(
        str(pipeline_path()),
        args=config_class(**options, base_adapters=[str(output / name) for name in BELOW[stage]] or None),
        train_dataset=data,
        callbacks=[watch],
        peft_config=LoraConfig(r=RANK[stage], lora_alpha=RANK[stage]),
    )
    watch.trainer = trainer
    trainer.train()
    trainer.save_model()
    seconds, cpu_seconds = (clock() - start - watch.spent).round().tolist()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    report = {"seconds": seconds, "cpu_seconds": cpu_seconds, "curve": watch.curve, "log": log}
    (target / "stage.json").write_text(json.dumps(report, indent=1))
    print(f"  {seconds:.0f} s, {cpu_seconds:.0f} s of CPU time", flush=True)


def clean_clips(output: Path) -> Dataset:
    """Clean clips of the captions that are trained on, as mp4 files."""
    folder = output / "clips"
    if not (folder / "metadata.jsonl").is_file():  # written last
        write_dataset(folder, num_clips=NUM_CLIPS, quality="clean", seed=0)
    clips = load_dataset(str(folder), split="train", cache_dir=str(output / "cache" / "datasets"))
    return clips.select([i for i, prompt in enumerate(clips["prompt"]) if prompt not in HELD_OUT])


def merge_adapters(adapters: list[Path], target: Path) -> None:
    """One adapter that acts as several together: B1 A1 + B2 A2 = [B1 B2] [A1; A2]."""
    files = [load_file(a / ADAPTER_FILE) for a in adapters]
    merged = {
        name: torch.cat([f[name] for f in files], 0 if "lora_A" in name else 1).contiguous() for name in files[0]
    }
    target.mkdir(exist_ok=True)
    save_file(merged, target / ADAPTER_FILE)


# ---- Measuring ----


def held_out(number: int) -> tuple[list[str], list[int]]:
    """So many prompts that were never trained on, and a seed for each."""
    return [HELD_OUT[i % len(HELD_OUT)] for i in range(number)], [1_000_000 + i for i in range(number)]


def judge(videos: list[torch.Tensor], prompts: list[str]) -> list[dict]:
    """What each clip shows, and whether it was asked for."""
    rows = []
    for video, prompt in zip(videos, prompts, strict=True):
        seen, want = asdict(measure(video)), parse_caption(prompt)
        right = {name: seen[name] == want[name] for name in ATTRIBUTES}
        # a shape that turns into another one on the way can still be right on the whole
        halves = [asdict(measure(half)) for half in (video[: len(video) // 2 + 1], video[len(video) // 2 :])]
        steady = all(half[name] == want[name] for half in halves for name in ATTRIBUTES)
        others = {name: seen[name] for name in ("present", "flicker", "smoothness")}
        energy = (video[1:] - video[:-1]).square().mean().item()
        rows.append({"all": all(right.values()), "halves": steady, **right, **others, "energy": energy})
    return rows


def summary(rows: list[dict]) -> dict:
    """Each measure's mean with its 95 % interval."""
    intervals = {name: share_interval if name in SHARES else mean_interval for name in rows[0]}
    return {name: interval([row[name] for row in rows])._asdict() for name, interval in intervals.items()}


def load(output: Path, adapters: tuple[str, ...]) -> WanPipeline:
    """The shipped pipeline with some stages' adapters in its weights."""
    pipe = WanPipeline.from_pretrained(pipeline_path(), dtype={"vae": torch.bfloat16, "default": torch.float32})
    pipe.set_progress_bar_config(disable=True)
    for name in adapters:
        pipe.load_lora_weights(output / name, adapter_name=name)
    if adapters:
        pipe.set_adapters(list(adapters))
        pipe.fuse_lora(adapter_names=list(adapters))
        pipe.unload_lora_weights()
    return pipe


def streaming(pipe: WanPipeline, steps: list[float], sampler: str) -> CausalVideoPipeline:
    """The same pipeline, block by block."""
    return CausalVideoPipeline(pipe, denoising_steps=steps, shift=3.0, frames_per_block=1, sampler=sampler)


def generate(pipe, prompts, seeds, steps=None, sampler="renoise", batch_size=36) -> list[torch.Tensor]:
    """Clips as (F, C, H, W): of all frames at once in 20 steps, or block by block in those of `steps`."""
    videos = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        sources = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        if steps is None:
            call = {"num_inference_steps": 20, "guidance_scale": 1.0, "output_type": "pt", **SHAPE}
            videos += list(pipe(prompts[part], generator=sources, **call).frames.float())
        else:
            videos += streaming(pipe, steps, sampler)(prompts[part], generator=sources, **SHAPE)
    return videos


def compare(output: Path, number: int) -> tuple[dict, dict]:
    """All models on the same prompts and seeds: their measures, and the clips of the contact sheet."""
    prompts, seeds = held_out(number)
    table, sheet, teacher = {}, {}, None
    real = [render(prompt, seed=seed).float() / 255 for prompt, seed in zip(prompts, seeds, strict=True)]
    for name, adapters, steps, sampler in (("real clips", None, None, None), *MODELS):
        videos = real if adapters is None else generate(load(output, adapters), prompts, seeds, steps, sampler)
        rows = judge(videos, prompts)
        table[name] = summary(rows)
        if name == MODELS[0][0]:
            teacher = rows
        if teacher is not None:
            for metric in ("all", "halves"):
                before, after = ([row[metric] for row in rows_] for rows_ in (teacher, rows))
                table[name][metric] |= {
                    "kept": sum(after) / max(1, sum(before)),
                    "difference": paired_difference(before, after)._asdict(),
                }
        sheet[name] = videos[: len(HELD_OUT)]
        print(f"{name:34s}" + "  ".join(f"{k} {table[name][k]['value']:.4f}" for k in table[name]), flush=True)
    return table, sheet


def stream_times(output: Path, repeats: int = 9) -> dict:
    """Seconds to one clip at once and to each block of a stream, text encoding and decoding included; medians."""
    teacher, whole, blocks = load(output, ("teacher",)), [], []
    student = streaming(load(output, ("teacher", "student")), STEPS, "renoise")
    for i in range(repeats + 1):  # in turns, so that both meet the same load; the first ones warm up
        start = time.perf_counter()
        generate(teacher, HELD_OUT[:1], [i])
        whole.append(time.perf_counter() - start)
        start, times, frames = time.perf_counter(), [], []
        for part in student.stream(HELD_OUT[0], generator=torch.Generator().manual_seed(i), **SHAPE):
            times.append(time.perf_counter() - start)
            frames.append(part)
        blocks.append(times)
    again = student(HELD_OUT[0], generator=torch.Generator().manual_seed(repeats), **SHAPE)
    return {
        "whole_clip": float(np.median(whole[1:])),
        "blocks": np.median(blocks[1:], 0).tolist(),
        "frames": [len(part) for part in frames],
        "streamed_equals_whole": (torch.cat(frames) - again).abs().max().item(),
    }


# ---- Pictures ----


def plot(stages: dict, table: dict, path: Path) -> None:
    """All three attributes right over the stages' CPU minutes, and what each model reaches."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4), width_ratios=(3, 2))
    spent = 0.0
    for i, (stage, report) in enumerate(stages.items()):
        minutes, steps = report["cpu_seconds"] / 60, SETTINGS[stage]["max_steps"]
        if stage == "direct":  # branches off
            spent = sum(stages[name]["cpu_seconds"] for name in ("teacher", "causal")) / 60
            line = left.plot([], [], "o-", color=f"C{i}", markersize=4, label="without consistency")
            left.legend(handles=line, fontsize=8, loc="center right")
        else:
            left.axvspan(spent, spent + minutes, color=f"C{i}", alpha=0.08)
            left.text(spent + minutes / 2, 0.02, stage, ha="center", fontsize=8)
        for metric, style in (("all", "o-"), ("halves", "s:")):
            points = [(spent + minutes * p["step"] / steps, p[metric]) for p in report["curve"]]
            left.plot(*zip(*points, strict=True), style, color=f"C{i}", markersize=4)
        spent += minutes
    for metric, style in (("all", "-"), ("halves", ":")):
        left.axhline(table[MODELS[0][0]][metric]["value"], color="grey", linestyle=style, linewidth=1)
    left.set(xlabel="CPU minutes of training", ylabel="held-out clips", ylim=(0, 1.02))
    left.set_title("right: whole clip (solid), both halves (dotted); grey: the teacher", fontsize=9)
    names = list(table)[::-1]
    for j, (metric, label) in enumerate((("all", "whole clip"), ("halves", "both halves"))):
        found = [table[name][metric] for name in names]
        values = [f["value"] for f in found]
        ends = [[f["value"] - f["low"] for f in found], [f["high"] - f["value"] for f in found]]
        places = [k + 0.2 - 0.4 * j for k in range(len(names))]
        right.barh(places, values, 0.38, xerr=ends, color=f"C{j + 4}", label=label, error_kw={"linewidth": 0.8})
    right.set_yticks(range(len(names)), names, fontsize=8)
    right.set_xlabel("all three attributes right, 95 % intervals")
    right.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def contact_sheet(sheet: dict, path: Path, clips: tuple[int, ...] = (0, 4, 8, 9, 13, 17)) -> None:
    """The same prompts and seeds of several models, every second frame."""
    from PIL import Image, ImageDraw

    names, label, gap = SHEET, 210, 6
    side, frames = SHAPE["height"], (SHAPE["num_frames"] + 1) // 2
    height = len(clips) * (14 + len(names) * side + gap)
    image = Image.new("RGB", (label + frames * side, height), "white")
    draw, y = ImageDraw.Draw(image), 0
    for clip in clips:
        draw.text((label, y + 1), HELD_OUT[clip], fill="black")
        y += 14
        for name in names:
            strip = torch.cat(list(sheet[name][clip][::2]), 2).clamp(0, 1)
            draw.text((4, y + side // 2 - 6), name, fill="black")
            image.paste(Image.fromarray((strip * 255).round().byte().permute(1, 2, 0).numpy()), (label, y))
            y += side
        y += gap
    image.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("toy_causal_runs"), help="where finished stages are kept")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where table and pictures go")
    parser.add_argument("--clips", type=int, default=144, help="held-out clips of the table")
    parser.add_argument("--points", type=int, default=3, help="measurements while a stage trains")
    parser.add_argument("--curve-clips", type=int, default=108, help="clips of each of them")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    for stage in STAGES:
        train(stage, args.output, args.points, args.curve_clips)
    table, sheet = compare(args.output, args.clips)
    times = stream_times(args.output)
    stages = {name: json.loads((args.output / name / "stage.json").read_text()) for name in STAGES}
    for report in stages.values():
        del report["log"]  # long; it stays in the stage's folder
    result = {
        "clips": args.clips,
        "models": table,
        "streaming": times,
        "settings": SETTINGS,
        "rank": RANK,
        "stages": stages,
    }
    (args.docs / "toy_causal.json").write_text(json.dumps(result, indent=1) + "\n")
    plot(stages, table, args.docs / "toy_causal.png")
    contact_sheet(sheet, args.docs / "toy_causal_sheet.png")
    for stage, report in stages.items():
        print(f"{stage}: {report['seconds'] / 60:.1f} minutes, {report['cpu_seconds'] / 60:.1f} of CPU time")
    kept = table["student, 4 steps"]["all"]["kept"]
    print(f"the student keeps {kept:.0%} of the teacher's clips with all attributes right")
    print(
        f"one clip: {times['whole_clip']:.3f} s at once; streamed: first frame after {times['blocks'][0]:.3f} s, "
        f"all after {times['blocks'][-1]:.3f} s"
    )
