"""Over-training: a reward that can be gamed, trained far past the point where the videos are best, and what prevents it.

    pip install -e '.[benchmarks]'                            # for the picture
    python benchmarks/over_training.py                        # all three runs, about 10 minutes on one shared CPU core
    python benchmarks/over_training.py --plot                 # only the table and the picture, from docs/over_training.json

The reward is smoothness, minus the mean second difference of the pixels over time: what trembles is punished, and so is what
moves. A LoRA on the shipped toy pipeline is trained on it with DiffusionNFT. Every few updates 24 clips of fixed seeds are
scored by the reward, and by two that training never sees: whether the clip shows what its prompt says (`toy-accuracy`, the
product of colour, shape and direction) and how far its shape travels.

    reward alone      to the end
    early stopping    the same run, stopped when the held-out reward has not been better for two evaluations, and the best
                      weights loaded: `load_best_model_at_end` and transformers' `EarlyStoppingCallback`
    beta              a divergence from the model before training (`beta`), to the end
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from diffusers import WanPipeline
from peft import LoraConfig
from transformers import EarlyStoppingCallback

from vidtrl import VideoGRPOConfig, VideoGRPOTrainer
from vidtrl.toy import captions, measure, pipeline_path


ROOT = Path(__file__).resolve().parent.parent
RUNS = {
    "reward alone": {},
    "early stopping": {"load_best_model_at_end": True, "save_strategy": "steps"},
    "beta": {"beta": 1.0},
}
PATIENCE = 2  # evaluations
HELD_OUT = "toy-accuracy"


def smooth(videos, **kwargs):
    """The reward: 0 for uniform brightness over time, negative for everything else. A frozen clip is the best there is."""
    return [-100 * (v[2:] - 2 * v[1:-1] + v[:-2]).abs().mean().item() for v in videos]


def travel(videos, **kwargs):
    """How far the shape moves, as a share of the side; 0 for a clip without a shape."""
    return [sum(x * x for x in measure(video).motion) ** 0.5 for video in videos]


def run(name: str, args: argparse.Namespace, folder: str) -> dict:
    """One training run; returns its curve, and the scores of the weights that the trainer holds afterwards."""
    every = args.updates // args.evaluations
    config = VideoGRPOConfig(
        f"{folder}/{name}", recipe="diffusion-nft", learning_rate=args.learning_rate, nft_beta=0.3, num_train_sigmas=2,
        num_generations=8, per_device_train_batch_size=32, num_inference_steps=6, rollout_batch_size=32, vae_batch_size=4,
        height=64, width=64, num_frames=17, max_sequence_length=16, max_steps=args.updates, gradient_checkpointing=False,
        eval_strategy="steps", eval_steps=every, eval_on_start=True, eval_num_inference_steps=8,
        per_device_eval_batch_size=12, metric_for_best_model=f"eval_rewards/{HELD_OUT}/mean", greater_is_better=True,
        seed=args.seed, ema_decay=0.0, check_model=False, report_to="none", disable_tqdm=True, use_cpu=True,
        **{"save_strategy": "no", "beta": 0.0, **RUNS[name]}, save_steps=every, logging_steps=every,
    )  # fmt: skip
    prompts = captions()
    # the VAE in bfloat16 decodes faster
    pipe = WanPipeline.from_pretrained(pipeline_path(), dtype={"vae": torch.bfloat16, "default": torch.float32})
    pipe.set_progress_bar_config(disable=True)
    trainer = VideoGRPOTrainer(
        pipe, smooth, config, eval_reward_funcs=[HELD_OUT, travel],
        train_dataset=Dataset.from_dict({"prompt": prompts}), eval_dataset=Dataset.from_dict({"prompt": prompts[::3]}),
        peft_config=LoraConfig(r=32, lora_alpha=32),
        callbacks=[EarlyStoppingCallback(PATIENCE)] if name == "early stopping" else [],
    )  # fmt: skip
    began = time.perf_counter()
    trainer.train()
    seconds = round(time.perf_counter() - began)
    curve = [scores(entry) for entry in trainer.state.log_history if "eval_reward" in entry]
    end = scores({"step": trainer.state.global_step, **trainer.evaluate()})
    return {"name": name, "seconds": seconds, "curve": curve, "end": end}


def scores(logs: dict) -> dict:
    """What is kept of an evaluation."""
    names = {"reward": "smooth", "held_out": HELD_OUT, "travel": "travel"}
    return {"step": logs["step"]} | {key: round(logs[f"eval_rewards/{name}/mean"], 4) for key, name in names.items()}


def table(runs: list[dict]) -> str:
    """One row for each run: before, where the held-out reward was highest, and the weights it ends with."""
    lines = [f"{'':16} {'updates':>7} {'reward':>8} {'held out':>8} {'travel':>7}"]
    first = runs[0]["curve"][0]
    rows = [("before", first)]
    for one in runs:
        best = max(one["curve"], key=lambda point: point["held_out"])
        if one["name"] == "reward alone":
            rows.append(("  at its best", best))
        rows.append((one["name"], one["end"]))
    for name, p in rows:
        lines.append(f"{name:16} {p['step']:7} {p['reward']:8.3f} {p['held_out']:8.3f} {p['travel']:7.3f}")
    return "\n".join(lines)


def plot(runs: list[dict], path: Path) -> None:
    """The three scores over the updates."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    titles = {"reward": "the reward that is trained", "held_out": "held out: shows what the prompt says",
              "travel": "held out: how far the shape travels"}  # fmt: skip
    styles = {"reward alone": ("#c44", "-"), "early stopping": ("#222", "--"), "beta": ("#27a", "-")}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for one in runs:
            color, line = styles[one["name"]]
            steps = [point["step"] for point in one["curve"]]
            axis.plot(steps, [point[key] for point in one["curve"]], line, color=color, label=one["name"])
            if one["name"] == "early stopping":  # the weights that it keeps
                axis.plot(*best_of(one, key), "o", color=color)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("updates")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def best_of(one: dict, key: str) -> tuple[int, float]:
    """Where the run's kept weights are from, and their score."""
    best = max(one["curve"][1:], key=lambda point: point["held_out"])  # before training there is no checkpoint
    return best["step"], one["end"][key]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--updates", type=int, default=18)
    parser.add_argument("--evaluations", type=int, default=6)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "docs/over_training.json")
    parser.add_argument("--plot", action="store_true", help="only print and draw what --output holds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.plot:
        results = json.loads(options.output.read_text())["runs"]
    else:
        with tempfile.TemporaryDirectory() as temporary:
            results = [run(name, options, temporary) for name in options.runs]
        settings = {k: v for k, v in vars(options).items() if k not in ("output", "plot")}
        options.output.write_text(json.dumps({"settings": settings, "runs": results}, indent=1) + "\n")
    print(table(results))
    print("seconds of training: " + ", ".join(f"{one['name']} {one['seconds']}" for one in results))
    plot(results, options.output.with_suffix(".png"))
