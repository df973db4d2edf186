"""What the GRPO stage of `vidtrl demo` needs: settings in turn, from the same SFT adapter, on other noise than the demo's.

    vidtrl demo --stages sft --output demo                    # makes the adapter that all runs start from
    python benchmarks/demo_grpo.py --demo demo                # all, about 8 minutes a run on one CPU core
    python benchmarks/demo_grpo.py --demo demo --variants demo "learning rate 7e-4" --seed 1 --updates 32

Every run is the demo's own but for the settings that its name says. Held out: three clips a caption, 20 steps, every 8
updates, from seeds that neither training nor the demo's clips use. Finished runs are kept in `--output`, and not repeated.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from vidtrl import VideoGRPOConfig, VideoGRPOTrainer
from vidtrl.cli.demo_settings import DemoSettings
from vidtrl.cli.demo_stages import load_fused
from vidtrl.toy import captions, pipeline_path, score


SEPARATE = {
    "rewards": ["toy-color", "toy-shape", "toy-direction", "toy-smoothness"],
    "reward_weights": [1 / 3, 1 / 3, 1 / 3, 0.5],
    "scale_rewards": "group",
}
GENTLE = {"learning_rate": 7e-4, "beta": 1e-4, "num_train_sigmas": 3}
ONE_STEP = {"learning_rate": 1e-3, "beta": 0.0, "shared_noise": True}
VARIANTS = {  # name -> what differs from the demo
    "demo": {},
    "separate rewards": {**SEPARATE, **GENTLE},
    "separate rewards, beta 1": {**SEPARATE, **GENTLE, "beta": 1.0},
    "separate rewards, batch scale": {**SEPARATE, **GENTLE, "scale_rewards": "batch"},
    "learning rate 7e-4": GENTLE,
    "learning rate 7e-4, group scale": {**GENTLE, "scale_rewards": "group"},
    "learning rate 7e-4, beta 0.1": {**GENTLE, "beta": 0.1},
    "learning rate 7e-4, beta 1": {**GENTLE, "beta": 1.0},
    "learning rate 7e-4, nft_beta 1": {**GENTLE, "nft_beta": 1.0},
    "learning rate 7e-4, groups of 16": {**GENTLE, "num_generations": 16},
    "learning rate 3e-4": {**GENTLE, "learning_rate": 3e-4},
    "learning rate 1.5e-3": {**GENTLE, "learning_rate": 1.5e-3},
    # other recipes, with what benchmarks/toy_rl.py gives them
    "flash-grpo, shared noise": {**ONE_STEP, "recipe": "flash-grpo"},
    "mix-grpo": {**ONE_STEP, "recipe": "mix-grpo", "sde_range": [0.0, 0.9]},
}
SHOWN = ("all", "color", "shape", "present", "flicker", "smoothness")
FIRST_SEED = 4_000_000  # of the held-out clips


class Watch(TrainerCallback):
    """Measures held-out clips of the averaged weights every few updates; the time it takes is not the training's."""

    def __init__(self, every: int, first_seed: int):
        self.every, self.first_seed, self.curve, self.seconds = every, first_seed, [], 0.0
        self.trainer: VideoGRPOTrainer | None = None

    def measure(self, step):
        began, prompts, settings = time.perf_counter(), captions() * 3, DemoSettings()
        videos = self.trainer.generate_videos(
            prompts, seeds=[self.first_seed + i for i in range(len(prompts))], batch_size=72,
            num_inference_steps=settings.num_inference_steps, guidance_scale=settings.guidance_scale,
        )  # fmt: skip
        self.curve.append({"step": step, **score(videos, prompts)})
        self.seconds += time.perf_counter() - began

    def on_train_begin(self, args, state, control, **kwargs):
        self.measure(0)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            self.measure(state.global_step)


def run(name: str, demo: Path, seed: int, updates: int, output: Path, gpu: bool) -> dict:
    """One training run; returns its curve."""
    settings, options = DemoSettings(), dict(VARIANTS[name])
    rewards = options.pop("rewards", list(settings.rewards))
    watch = Watch(8, FIRST_SEED + 10_000 * seed)
    rest = {"eval_steps", "eval_num_inference_steps", "per_device_eval_batch_size", "save_steps"}
    args = VideoGRPOConfig(
        output_dir=str(output / f"{name}-{seed}"), seed=seed, height=settings.height, width=settings.width,
        num_frames=settings.num_frames, max_sequence_length=settings.max_sequence_length, check_model=False,
        save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=not gpu,
        **{k: v for k, v in settings.grpo.items() if k not in rest} | options | {"max_steps": updates},
    )  # fmt: skip
    trainer = VideoGRPOTrainer(
        load_fused(pipeline_path(), demo / "sft"), rewards, args, callbacks=[watch],
        train_dataset=Dataset.from_dict({"prompt": captions()}),
        peft_config=LoraConfig(r=settings.lora_r, lora_alpha=settings.lora_r),
    )  # fmt: skip
    watch.trainer, began = trainer, time.perf_counter()
    trainer.train()
    seconds = round(time.perf_counter() - began - watch.seconds)
    return {"variant": name, "seed": seed, "device": args.device.type, "seconds": seconds, "curve": watch.curve}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True, help="folder of a demo with a finished SFT stage")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seed", type=int, default=0, help="of the training and of the held-out clips")
    parser.add_argument("--updates", type=int, default=48)
    parser.add_argument("--output", type=Path, default=Path("demo_grpo_runs"), help="where finished runs are kept")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--gpu", action="store_true", help="train on the GPU; the noise is the CPU's all the same")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "runs.jsonl"
    known = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for name in args.variants:
        if not any(r["variant"] == name and r["seed"] == args.seed for r in known):
            known.append(run(name, args.demo, args.seed, args.updates, args.output, args.gpu))
            with open(file, "a") as out:
                out.write(json.dumps(known[-1]) + "\n")
    print(
        f"{'variant':34s} seed  seconds  all three right after each 8 updates; " + ", ".join(SHOWN[1:]) + " at the end"
    )
    for r in known:
        if r["variant"] in args.variants and r["seed"] == args.seed:
            rights = " ".join(f"{point['all']:.2f}" for point in r["curve"])
            last = " ".join(f"{r['curve'][-1][metric]:.3f}" for metric in SHOWN[1:])
            print(f"{r['variant']:34s} {r['seed']:4d} {r['seconds']:8d}  {rights}; {last}")
