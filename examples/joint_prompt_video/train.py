"""A prompt enhancer and a video model, trained in turns over the same rewards, after PromptRL
(https://huggingface.co/papers/2602.01382): the Python side of config.yaml, to be copied and changed.

    bash run.sh                                                     from config.yaml
    accelerate launch train.py --config config.yaml --rounds 2      the same, launched your way

An enhancer that is trained for one video model, and a video model that is trained on one style of prompts, drift apart. Here each
round is a `trl.GRPOTrainer` with the video model frozen, then a `VideoGRPOTrainer` with the prompts fixed. Both see rewards that
judge a video against what the user wrote. As in the paper, the video model also keeps seeing users' own prompts.

What it leaves in `output_dir`: `enhancer/` for `PromptEnhancer.from_pretrained`, and `round-N/video/`, one adapter a round.
Load all of them, in order, into the base pipeline; each was trained on top of those before it.
"""

import argparse
import json
import random
from pathlib import Path
from types import SimpleNamespace

import trl
import yaml
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig

from vidtrl import VideoGRPOConfig, VideoGRPOTrainer
from vidtrl.cli.grpo import resolve_reward
from vidtrl.prompts import (
    PromptEnhancer,
    pairs_dataset,
    prompts_dataset,
    score_original,
    structure_reward,
    video_reward,
)


def fine_tune(enhancer, pairs, args):
    """A start from pairs: without one, few completions of a small model are prompts at all."""
    lora = LoraConfig(r=args.lora_r, lora_alpha=args.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = trl.SFTTrainer(
        enhancer.model,
        trl.SFTConfig(f"{args.output_dir}/sft", seed=args.seed, **args.sft),
        train_dataset=pairs_dataset(enhancer, pairs),
        processing_class=enhancer.tokenizer,
        peft_config=lora,
    )
    trainer.train()
    enhancer.model = trainer.accelerator.unwrap_model(trainer.model)


def train_prompts(enhancer, adapters, prompts, rewards, args, folder, seed):
    """The language model learns; the video model, with the adapters of earlier rounds, is frozen."""
    config = trl.GRPOConfig(
        f"{folder}/prompts",
        seed=seed,
        max_completion_length=enhancer.max_new_tokens,
        reward_weights=[1.0, args.structure_weight],
        **args.grpo,
    )
    video = video_reward(
        args.video_model_name_or_path,
        rewards,
        enhancer=enhancer,
        reward_weights=args.reward_weights,
        base_adapters=adapters,
        device=config.device,
        **args.sampling,
        **args.pipeline_kwargs,
    )
    trainer = trl.GRPOTrainer(
        enhancer.model,
        [video, structure_reward(enhancer)],
        config,
        train_dataset=prompts_dataset(enhancer, [{"prompt": prompt} for prompt in prompts]),
        processing_class=enhancer.tokenizer,
    )
    trainer.train()
    enhancer.model = trainer.accelerator.unwrap_model(trainer.model)
    return trainer.state.log_history


def train_video(enhancer, adapters, prompts, rewards, args, folder, seed):
    """The video model learns on what the language model now writes; the rewards still see the users' prompts."""
    rng = random.Random(seed)
    rows = [
        {"prompt": user if rng.random() < args.keep_prompts else text, "user_prompt": user}
        for user, text in zip(prompts, enhancer(prompts), strict=True)
    ]
    trainer = VideoGRPOTrainer(
        model=args.video_model_name_or_path,
        reward_funcs=[score_original(reward) for reward in rewards],
        args=VideoGRPOConfig(
            f"{folder}/video",
            seed=seed,
            reward_weights=args.reward_weights,
            base_adapters=adapters,
            **args.sampling | args.video,
        ),
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(r=args.lora_r, lora_alpha=args.lora_alpha),
    )
    trainer.train()
    trainer.save_model()
    return trainer.state.log_history


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="config.yaml")
    parser.add_argument("--rounds", type=int, help="instead of the file's")
    options = parser.parse_args()
    args = SimpleNamespace(**yaml.safe_load(Path(options.config).read_text()))
    args.rounds = options.rounds or args.rounds
    sampling = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale")
    args.sampling = {name: getattr(args, name) for name in sampling}
    return args


def main():
    args = read_arguments()
    rewards = [resolve_reward(name) for name in args.reward_funcs]
    prompts = [line for line in Path(args.dataset_name).read_text().splitlines() if line.strip()]
    saved = Path(args.model_name_or_path, "prompt_enhancer.json").is_file()  # an enhancer that goes on being trained
    load, template = (PromptEnhancer.from_pretrained, {}) if saved else (PromptEnhancer, {"template": args.template})
    enhancer = load(args.model_name_or_path, max_new_tokens=args.max_new_tokens, **template)
    if args.pairs_dataset_name:
        fine_tune(
            enhancer, [json.loads(line) for line in Path(args.pairs_dataset_name).read_text().splitlines()], args
        )
    adapters = []
    for number in range(args.rounds):
        folder, seed = f"{args.output_dir}/round-{number}", args.seed + number  # other prompts and noise each round
        logs = {"prompts": train_prompts(enhancer, adapters, prompts, rewards, args, folder, seed)}
        logs["video"] = train_video(enhancer, adapters, prompts, rewards, args, folder, seed)
        adapters.append(f"{folder}/video")
        if PartialState().is_main_process:
            enhancer.save_pretrained(f"{args.output_dir}/enhancer")
            for name, log in logs.items():
                seen = [entry["reward"] for entry in log if "reward" in entry]
                print(f"round {number}, {name}: reward {seen[0]:.3f}, at the end {seen[-1]:.3f}", flush=True)


if __name__ == "__main__":
    main()
