"""Do the recipes learn? Six of them on the toy, and three variants of the paper's, at equal denoiser evaluations, several
seeds, from the same start.

    pip install -e '.[benchmarks]'                            # for the picture
    python benchmarks/toy_rl.py                               # all, 4 to 5 minutes a run on one CPU core
    python benchmarks/toy_rl.py --recipes flash-grpo --seeds 0 1 --evaluations 20000
    python benchmarks/toy_rl.py --sweep                       # what flash-grpo needs: learning rate, group size, batch
    python benchmarks/toy_rl.py --plot                        # only the table and the picture, from runs.jsonl

Every run trains a LoRA on the shipped toy pipeline: 8 prompts x 8 videos a generation, 10 steps without guidance, reward =
prompt accuracy (mean of colour, shape and direction, soft) + half the smoothness, from pixels. One evaluation is one sample through the denoiser; a training sample counts 3
(forward = 1, backward = 2). Held out: 72 captions from fixed seeds, 10 Euler steps, never the seeds of training.
Results go to docs/toy_rl.json and docs/toy_rl.png (of the sweep: toy_rl_sweep); finished runs are kept in `--output` and not repeated.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from datasets import Dataset
from diffusers import WanPipeline
from peft import LoraConfig
from transformers import TrainerCallback

from vidtrl import VideoGRPOConfig, VideoGRPOTrainer
from vidtrl.rewards import RewardRunner
from vidtrl.toy import captions, pipeline_path, score


ROOT = Path(__file__).resolve().parent.parent
# what each recipe gets besides its published values: a step size that suits 64 videos of this size (see docs/grpo_trainer.md)
RECIPES = {
    "flash-grpo": {"learning_rate": 1e-3},
    "flow-grpo": {"learning_rate": 1e-3, "beta": 0.0, "epsilon": 1e-3},
    "dance-grpo": {"learning_rate": 1e-3, "epsilon": 1e-3},
    "mix-grpo": {"learning_rate": 1e-3, "sde_range": [0.0, 0.9]},
    "diffusion-nft": {"learning_rate": 7e-4, "nft_beta": 0.3, "num_train_sigmas": 3},
    "awm": {"learning_rate": 5e-4},
    # variants of the paper's recipe: what removes the variance of one-step credit?
    "flash-grpo+shared": {"recipe": "flash-grpo", "learning_rate": 1e-3, "shared_noise": True},
    "flash-grpo+seed-groups": {"recipe": "flash-grpo", "learning_rate": 1e-3, "num_latents": 2, "baseline": "latent"},
    "flash-grpo+antithetic": {
        "recipe": "flash-grpo", "learning_rate": 1e-3, "num_latents": 4, "baseline": "latent", "antithetic": True,
    },
}  # fmt: skip
# one setting of the paper's recipe at a time, against the first: 8 prompts x 8 videos, learning rate 1e-3
SWEEP = {"flash-grpo": RECIPES["flash-grpo"]} | {
    f"flash-grpo, {name}": {"recipe": "flash-grpo", "learning_rate": 1e-3, **changes}
    for name, changes in {
        "learning rate 3e-4": {"learning_rate": 3e-4},
        "learning rate 3e-3": {"learning_rate": 3e-3},
        "groups of 4": {"num_generations": 4},
        "groups of 16": {"num_generations": 16},
        "32 videos": {"gradient_accumulation_steps": 2},
        "128 videos": {"gradient_accumulation_steps": 8},
    }.items()
}
REWARDS = {"toy-color": 1 / 3, "toy-shape": 1 / 3, "toy-direction": 1 / 3, "toy-smoothness": 0.5}


class Watch(TrainerCallback):
    """Counts evaluations, measures held-out clips now and then, and stops at the budget."""

    def __init__(self, budget: int, points: int):
        self.budget, self.every, self.used, self.curve = budget, budget / points, 0, []
        self.trainer: VideoGRPOTrainer | None = None

    def count(self, module, args, kwargs, output):
        self.used += len(kwargs["hidden_states"]) * (3 if torch.is_grad_enabled() else 1)

    def measure(self):
        used = self.used
        trainer, prompts = self.trainer, captions()
        videos = trainer.generate_videos(
            prompts, seeds=[10_000 + i for i in range(len(prompts))], batch_size=24, num_inference_steps=10,
            guidance_scale=1.0,
        )  # fmt: skip
        seen = score(videos, prompts)
        judge = RewardRunner(list(REWARDS), weights=list(REWARDS.values()))
        reward = (judge.collect(judge.submit(prompts, videos)) * judge.weights).sum(1).mean().item()
        self.curve.append({"evaluations": used, "step": trainer.state.global_step, "reward": reward, **seen})
        self.used = used

    def on_train_begin(self, args, state, control, **kwargs):
        self.measure()

    def on_step_end(self, args, state, control, **kwargs):
        if self.used >= self.every * len(self.curve):
            self.measure()
        control.should_training_stop = self.used >= self.budget


def run(name: str, seed: int, budget: int, points: int, output: Path, gpu: bool = False) -> dict:
    """One training run; returns its curve."""
    options = {"recipe": name, **(RECIPES | SWEEP)[name]}
    watch, start = Watch(budget, points), time.perf_counter()
    settings = dict(
        output_dir=str(output / f"{name}-{seed}"), seed=seed, height=64, width=64, num_frames=17, max_sequence_length=16,
        num_generations=8, per_device_train_batch_size=16, gradient_accumulation_steps=4, max_steps=10_000,
        lr_scheduler_type="constant", num_inference_steps=10, guidance_scale=1.0, rollout_batch_size=32, vae_batch_size=8,
        gradient_checkpointing=False, check_model=False, ema_decay=0, logging_steps=1,
        reward_weights=list(REWARDS.values()), multi_objective_aggregation="sum_then_normalize",
        save_strategy="no", report_to="none", use_cpu=not gpu, disable_tqdm=True,
    )  # fmt: skip
    args = VideoGRPOConfig(**(settings | options))
    # the VAE in bfloat16 decodes almost twice as fast
    pipe = WanPipeline.from_pretrained(pipeline_path(), dtype={"vae": torch.bfloat16, "default": torch.float32})
    trainer = VideoGRPOTrainer(
        pipe, list(REWARDS), args, callbacks=[watch],
        train_dataset=Dataset.from_dict({"prompt": captions()}), peft_config=LoraConfig(r=32, lora_alpha=32),
    )  # fmt: skip
    watch.trainer = trainer
    trainer.video_model.denoisers["transformer"].register_forward_hook(watch.count, with_kwargs=True)
    trainer.train()
    log = [{k: h[k] for k in ("step", "reward", "grad_norm", "nfe") if k in h} for h in trainer.state.log_history]
    seconds = time.perf_counter() - start
    key = {"recipe": name, "seed": seed, "budget": budget, "options": options}
    return {**key, "device": args.device.type, "seconds": round(seconds), "curve": watch.curve, "log": log}


def interval(values: list[float]) -> dict[str, float]:
    """Mean and 95 % interval over seeds (Student's t); one seed has no interval."""
    t = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57}
    numbers = torch.tensor(values, dtype=torch.float64)
    mean = numbers.mean().item()
    if len(values) == 1:
        return {"gain": mean}
    half = t.get(len(values), 2.0) * numbers.std().item() / len(values) ** 0.5
    return {"gain": mean, "low": mean - half, "high": mean + half}


def summary(runs: list[dict]) -> dict:
    """Mean gain in held-out reward and in all-three-right over seeds, and what each recipe gains more than flash-grpo."""
    gains = lambda r, metric: r["curve"][-1][metric] - r["curve"][0][metric]  # noqa: E731
    plain = {r["seed"]: gains(r, "reward") for r in runs if r["recipe"] == "flash-grpo"}
    table = {}
    for name in dict.fromkeys(r["recipe"] for r in runs):
        mine = [r for r in runs if r["recipe"] == name]
        row = {"seeds": len(mine), "seconds": sum(r["seconds"] for r in mine) / len(mine)}
        row["devices"] = sorted(r["device"] for r in mine)
        row["updates"] = sum(r["curve"][-1]["step"] for r in mine) / len(mine)
        for metric in ("reward", "all", "smoothness", "flicker", "present"):
            start = sum(r["curve"][0][metric] for r in mine) / len(mine)
            row[metric] = {"start": start, **interval([gains(r, metric) for r in mine])}
        paired = [gains(r, "reward") - plain[r["seed"]] for r in mine if r["seed"] in plain]
        if name != "flash-grpo" and paired:
            row["reward beyond flash-grpo"] = interval(paired)
        table[name] = row
    return table


def plot(runs: list[dict], path: Path) -> None:
    """Held-out reward over evaluations: the mean over seeds, and each seed faintly."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(13, 4.2))
    names = list(dict.fromkeys(r["recipe"] for r in runs))
    for axis, metric, label in zip(
        axes, ("reward", "all"), ("held-out reward", "all three attributes right"), strict=True
    ):
        for i, name in enumerate(names):
            curves = [r["curve"] for r in runs if r["recipe"] == name]
            for curve in curves:
                axis.plot(
                    [p["evaluations"] / 1000 for p in curve], [p[metric] for p in curve], color=f"C{i}", alpha=0.2
                )
            points = range(min(len(c) for c in curves))
            mean = {
                key: [sum(c[j][key] for c in curves) / len(curves) for j in points] for key in ("evaluations", metric)
            }
            axis.plot([e / 1000 for e in mean["evaluations"]], mean[metric], color=f"C{i}", label=name, linewidth=2)
        axis.set_xlabel("thousand denoiser evaluations (forward 1, backward 2)")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", help="some of them alone")
    parser.add_argument("--sweep", action="store_true", help="settings of flash-grpo in place of the recipes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--evaluations", type=int, default=30_000, help="budget of a run")
    parser.add_argument("--points", type=int, default=4, help="held-out measurements of a run, after the first")
    parser.add_argument("--output", type=Path, default=Path("toy_rl_runs"), help="where finished runs are kept")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where the table and the picture go")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--gpu", action="store_true", help="train on the GPU; the noise is the CPU's all the same")
    parser.add_argument("--plot", action="store_true", help="run nothing")
    args = parser.parse_args()
    table, stem = (SWEEP, "toy_rl_sweep") if args.sweep else (RECIPES, "toy_rl")
    args.recipes = args.recipes or list(table)
    if unknown := set(args.recipes) - set(table):
        parser.error(f"no {', '.join(unknown)}; there are {', '.join(table)}")
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "runs.jsonl"
    known = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for seed in args.seeds:
        for name in args.recipes:
            key = {
                "recipe": name,
                "seed": seed,
                "budget": args.evaluations,
                "options": {"recipe": name, **table[name]},
            }
            if args.plot or any(key.items() <= r.items() for r in known):
                continue
            known.append(run(name, seed, args.evaluations, args.points, args.output, args.gpu))
            with open(file, "a") as out:
                out.write(json.dumps(known[-1]) + "\n")
            first, last = known[-1]["curve"][0], known[-1]["curve"][-1]
            print(f"{name} seed {seed}: {known[-1]['seconds']} s, {last['step']} updates, reward {first['reward']:.3f} -> {last['reward']:.3f}, all {first['all']:.3f} -> {last['all']:.3f}", flush=True)  # fmt: skip
    chosen = [r for r in known if r["recipe"] in args.recipes and r["budget"] == args.evaluations]
    results = summary(chosen)
    (args.docs / f"{stem}.json").write_text(json.dumps(results, indent=2) + "\n")
    plot(chosen, args.docs / f"{stem}.png")
    for name, row in results.items():
        cells = []
        for metric in ("reward", "all", "smoothness", "reward beyond flash-grpo"):
            if metric in row:
                gain = row[metric]
                bounds = f" [{gain['low']:+.3f}, {gain['high']:+.3f}]" if "low" in gain else ""
                start = f" {gain['start']:.3f}" if "start" in gain else ""
                cells.append(f"{metric}{start} {gain['gain']:+.3f}{bounds}")
        print(f"{name:24s} {row['updates']:5.0f} updates  " + "  ".join(cells))
