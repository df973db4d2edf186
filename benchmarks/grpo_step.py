"""What each saving of `VideoGRPOTrainer` saves: denoiser evaluations (samples x forwards) and seconds per update.

    OMP_NUM_THREADS=1 python benchmarks/grpo_step.py

A randomly initialised Wan of about 30 M parameters gets an adapter. The first part is the paper's recipe with shared noise
(T=20, G=8, guidance, one stochastic step in the first half, uniform: the four prompts of an update take steps whose mean
is exactly the half's). Its arms follow each other inside one run of one trainer, on the same steps:

    all           what is shared is computed once, one update per decision
    per video     rollouts shared, but each video is updated by itself
    unshared      every video is sampled and updated by itself
    reuse         all, and the stochastic step's forward is kept for the update
    one call      all, and both branches of guidance in one denoiser call
    bare          the denoiser calls of "all" alone: the same batches forward (and backward), and nothing else

The second part does one update of one prompt for each recipe and arm, on smaller clips.

Evaluations are counted by a hook on the denoiser; a forward counts 1 and a backward 2. The rollout of DiffusionNFT and AWM
holds the old policy's forwards, too. Seconds are the process's own (CPU time of its one thread), so that other load on the
machine does not count. Exit code 1 if a target is missed.
"""

import argparse
import copy
import dataclasses
import os
import random
import sys
import tempfile
import time

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from sft_overhead import build_pipeline
from transformers import TrainerCallback
from transformers.utils import logging

from vidtrl import VideoGRPOConfig, VideoGRPOTrainer
from vidtrl.trainer import grpo_trainer
from vidtrl.trainer.grpo_plans import draw_plan
from vidtrl.trainer.grpo_recipes import RECIPES


ARMS = {
    "all": {},
    "per video": {"per_video": True},
    "unshared": {"share_prefix": False},
    "reuse": {"reuse_rollout": True},
    "one call": {"batch_guidance": True},
}
# steps of the four prompts of a round: the mean of each is 4.5
ROUNDS = [(0, 9, 4, 5), (1, 8, 3, 6), (2, 7, 0, 9), (4, 5, 1, 8)]
CLIP = {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 16}
SMALL_CLIP = {**CLIP, "height": 16, "width": 16}  # of the second part, for time
ROLLOUT_TARGET, TOTAL_TARGET, MATCH_TARGET, OVERHEAD_TARGET = 0.22, 0.30, 0.05, 0.10
BACKWARD = 2  # in units of a forward


def brightness(prompts, videos, **kwargs):
    """A reward that costs next to nothing, and differs between videos."""
    return [video.mean().item() + i % 7 for i, video in enumerate(videos)]


class FixedChoice(random.Random):
    """Draws the given step where a recipe draws one, and anything else from a seed of its own."""

    def __init__(self, step: int):
        super().__init__(0)
        self.step = step

    def choice(self, options):
        return options[self.step]


class CountingTrainer(VideoGRPOTrainer):
    """Counts the denoiser's evaluations, and is told which arm to run."""

    phase = "update"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.per_video, self.steps, self.calls, self.minimum = False, (), [], 0
        self.denoiser = self.video_model.denoisers[self.denoiser_name]
        self.bare = copy.deepcopy(self.denoiser)
        # after the call: capturing a prompt's condition enters the denoiser and leaves it at once
        self.denoiser.register_forward_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs, output):
        text = kwargs["encoder_hidden_states"].shape[1]
        self.calls.append((self.phase, len(kwargs["hidden_states"]), torch.is_grad_enabled(), text))

    def set_arm(self, arm: str, steps: tuple[int, ...]) -> None:
        options = {"share_prefix": True, "reuse_rollout": False, "batch_guidance": False, "per_video": False}
        options |= ARMS[arm]
        self.per_video, self.steps, self.calls = options.pop("per_video"), steps, []
        self.args.share_prefix = options["share_prefix"]
        self.reuse_rollout, self.batch_guidance = options["reuse_rollout"], options["batch_guidance"]

    def draw_plan(self, args, grid, own_steps, iteration, rng):
        # the same plans for all arms: by the group's turn, not by the number of the generation
        own = FixedChoice(self.steps[len(self.planned)]) if self.steps else random.Random(len(self.planned))
        self.planned.append(draw_plan(args, grid, own_steps, 0, own))
        return self.planned[-1]

    def generate(self, inputs):
        self.phase, self.planned = "rollout", []
        grpo_trainer.draw_plan = self.draw_plan
        generation = super().generate(inputs)
        self.phase = "update"
        guided = 1 if self.args.guidance_scale == 1.0 else 2
        self.minimum = guided * sum(plan.num_evaluations() for plan in self.planned)
        return generation

    def _decision_items(self, decisions, plans, advantages):
        if self.per_video:
            decisions = [
                dataclasses.replace(
                    d,
                    children=[child],
                    next_latents=d.next_latents[i : i + 1],
                    old_log_prob=d.old_log_prob[i : i + 1],
                )
                for d in decisions
                for i, child in enumerate(d.children)
            ]
        return super()._decision_items(decisions, plans, advantages)

    def evaluations(self) -> dict[str, int]:
        """Of the last update: forwards of the rollout and in all, backwards, and their cost in forwards."""
        forwards = sum(batch for _, batch, _, _ in self.calls)
        backwards = sum(batch for _, batch, gradient, _ in self.calls if gradient)
        rollout = sum(batch for phase, batch, _, _ in self.calls if phase == "rollout")
        return {"rollout": rollout, "backwards": backwards, "cost": forwards + BACKWARD * backwards}

    def replay(self) -> float:
        """Seconds that the same denoiser calls take by themselves."""
        began, shape = time.process_time(), self.latent_shape
        for _, batch, gradient, text in self.calls:
            with torch.set_grad_enabled(gradient):
                velocity = self.bare(
                    hidden_states=torch.randn(batch, *shape),
                    timestep=torch.full((batch,), 500.0),
                    encoder_hidden_states=torch.randn(batch, text, 64),
                    return_dict=False,
                )[0]
            if gradient:
                velocity.backward(torch.ones_like(velocity))
        self.bare.zero_grad()
        return time.process_time() - began


class Interleave(TrainerCallback):
    """Before each update, choose the arm; after it, write down what it took."""

    def __init__(self, schedule: list[tuple[str, tuple[int, ...]]], replay: str | None = None):
        self.schedule, self.replay, self.rows, self.trainer = schedule, replay, [], None

    def begin(self):
        if len(self.rows) < len(self.schedule):
            self.trainer.set_arm(*self.schedule[len(self.rows)])
        self.mark = time.process_time()

    def on_train_begin(self, args, state, control, **kwargs):
        self.begin()

    def on_step_end(self, args, state, control, **kwargs):
        arm, _ = self.schedule[len(self.rows)]
        row = {"arm": arm, "seconds": time.process_time() - self.mark, **self.trainer.evaluations()}
        row["minimum"] = self.trainer.minimum
        if arm == self.replay:
            row["bare"] = self.trainer.replay()
        self.rows.append(row)
        self.begin()


def train(folder: str, interleave: Interleave, prompts: int, **config) -> CountingTrainer:
    """One run; each update is one generation of `prompts` groups."""
    args = VideoGRPOConfig(
        f"{folder}/{len(os.listdir(folder))}",
        max_steps=len(interleave.schedule),
        gradient_checkpointing=False,
        check_model=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        per_device_train_batch_size=48,  # a multiple of every recipe's group
        rollout_batch_size=8,
        **config,
    )
    # a generation in one piece, so that the kept graphs can be compared with the rest
    args.per_device_train_batch_size = prompts * args.num_generations
    trainer = CountingTrainer(
        model=build_pipeline(),
        reward_funcs=brightness,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": [f"{a} {b}" for a in "abcdefgh" for b in "abcdefgh"]}),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=["to_q", "to_k", "to_v", "to_out.0"]),
    )
    interleave.trainer = trainer
    trainer.add_callback(interleave)
    trainer.train()
    return trainer


def interval(values: list[float]) -> tuple[float, float, float]:
    """Median and its 95 % bootstrap interval."""
    values = np.array(values)
    picks = np.random.default_rng(0).integers(0, len(values), (4000, len(values)))
    low, high = np.percentile(np.median(values[picks], axis=1), [2.5, 97.5])
    return float(np.median(values)), float(low), float(high)


def savings(folder: str, rounds: int, names: list[str]) -> list[str]:
    """The first part. Returns the targets that are missed."""
    schedule = [("all", ROUNDS[0])]  # warm-up
    for i in range(rounds):
        arms = names[i % len(names) :] + names[: i % len(names)]  # none is always first
        schedule += [(arm, ROUNDS[i % len(ROUNDS)]) for arm in arms]
    interleave = Interleave(schedule, replay="all")
    trainer = train(
        folder, interleave, prompts=4, recipe="flash-grpo", shared_noise=True, num_inference_steps=20, **CLIP
    )
    rows = interleave.rows[1:]
    parameters = sum(p.numel() for p in trainer.denoiser.parameters())
    by_arm = {arm: [row for row in rows if row["arm"] == arm] for arm in names}
    print(f"{parameters / 1e6:.1f} M parameters, {torch.get_num_threads()} thread(s), {rounds} rounds, ", end="")
    print(f"load average {os.getloadavg()[0]:.2f} on {os.cpu_count()} cores")
    print("flash-grpo, shared noise, T=20, G=8, guidance, 4 prompts per update\n")
    print(
        f"{'arm':10} {'rollout':>8} {'backward':>8} {'cost':>6} {'saved':>7} {'seconds':>8} {'saved':>7}  95 % interval"
        "     best"
    )
    missed, result, best = [], {}, {}
    for arm, mine in by_arm.items():
        cost, base = mine[0]["cost"], by_arm["unshared"][0]["cost"]
        ratios = [1 - a["seconds"] / b["seconds"] for a, b in zip(mine, by_arm["unshared"], strict=True)]
        middle, low, high = result[arm] = interval(ratios)
        # every round is the same work, so the quickest is the one that other load disturbed least
        seconds, best[arm] = (f([row["seconds"] for row in mine]) for f in (np.median, min))
        print(
            f"{arm:10} {mine[0]['rollout']:8} {mine[0]['backwards']:8} {cost:6} {1 - cost / base:7.1%} {seconds:8.2f} "
            f"{middle:7.1%}  {low:6.1%} to {high:6.1%} {best[arm]:8.2f}"
        )
        constant = all(row[name] == mine[0][name] for row in mine for name in ("rollout", "backwards", "cost"))
        if not constant or (arm != "unshared" and any(row["rollout"] != row["minimum"] for row in mine)):
            missed.append(f"evaluations of {arm!r} are not the minimum")
    shared, unshared = by_arm["all"][0], by_arm["unshared"][0]
    rollout, total = (1 - shared[name] / unshared[name] for name in ("rollout", "cost"))
    gain = result["all"][0]
    overhead, low, high = interval([row["seconds"] / row["bare"] - 1 for row in by_arm["all"]])
    for name, value, target, met in (
        ("rollout evaluations saved", rollout, f">= {ROLLOUT_TARGET:.0%}", rollout >= ROLLOUT_TARGET),
        ("all evaluations saved", total, f">= {TOTAL_TARGET:.0%}", total >= TOTAL_TARGET),
        ("seconds saved minus that", gain - total, f"within {MATCH_TARGET:.0%}", abs(gain - total) <= MATCH_TARGET),
        ("the same, best of all", 1 - best["all"] / best["unshared"] - total, "not judged", True),
        ("overhead over bare calls", overhead, f"<= {OVERHEAD_TARGET:.0%}", overhead <= OVERHEAD_TARGET),
    ):
        print(f"\n{name:27} {value:6.1%}  (target {target}{'' if met else ', MISSED'})", end="")
        if not met:
            missed.append(name)
    print(f"; 95 % interval of the overhead {low:.1%} to {high:.1%}\n")
    return missed


def recipes(folder: str, names: list[str]) -> list[str]:
    """The second part: one update of one prompt for each recipe and arm."""
    print(
        f"{'recipe':15} {'arm':10} {'minimum':>8} {'rollout':>8} {'backward':>8} {'cost':>6} {'saved':>7} {'seconds':>8}"
    )
    missed = []
    for name in names:
        args = VideoGRPOConfig("unused", recipe=name, use_cpu=True, per_device_train_batch_size=48)
        arms = ["all"]
        if args.latents_per_prompt < args.num_generations:
            arms += ["per video", "unshared"]
        if args.loss_type in ("clipped", "dppo"):
            arms += ["reuse"]
        if args.guidance_scale != 1.0:
            arms += ["one call"]
        interleave = Interleave([(arm, ()) for arm in ("all", *arms)])  # the first is a warm-up
        train(folder, interleave, prompts=1, recipe=name, **SMALL_CLIP)
        rows = {row["arm"]: row for row in interleave.rows}
        base = rows.get("unshared", rows["all"])["cost"]
        for row in interleave.rows[1:]:
            print(
                f"{name:15} {row['arm']:10} {row['minimum']:8} {row['rollout']:8} {row['backwards']:8} {row['cost']:6} "
                f"{1 - row['cost'] / base:7.1%} {row['seconds']:8.2f}",
                flush=True,
            )
            if row["arm"] != "unshared" and args.loss_type not in ("nft", "awm") and row["rollout"] != row["minimum"]:
                missed.append(f"{name}: rollout evaluations are not the minimum")
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument(
        "--arms", nargs="*", default=list(ARMS), choices=list(ARMS), help='"all" and "unshared" at least'
    )
    options = parser.parse_args()
    logging.set_verbosity_error()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        missed = savings(folder, options.rounds, options.arms) if options.rounds else []
        missed += recipes(folder, options.recipes)
    print(
        f"\n{time.perf_counter() - began:.0f} s. " + ("MISSED: " + "; ".join(missed) if missed else "All targets met.")
    )
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
