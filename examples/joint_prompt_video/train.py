r"""Joint mode: the language model that writes prompts and the video model that reads them learn from the same rewards.

PromptRL (https://huggingface.co/papers/2602.01382) trains both in one loop; here rounds alternate, so that each trainer is the
stock one: `trl.GRPOTrainer` with the video model frozen, then `VideoGRPOTrainer` with the prompts fixed. Both see rewards that
judge a video against what the user wrote. As in the paper, the video model also keeps seeing users' own prompts (a share of
`--keep_prompts`), so that it does not forget them.

    python examples/joint_prompt_video.py --pairs pairs.jsonl --prompts prompts.txt --rewards motion-magnitude prompt-ocr
    python examples/joint_prompt_video.py --smoke          # two short rounds on the toy world, about a minute

What it leaves in `--output_dir`: `enhancer/` for `PromptEnhancer.from_pretrained`, and `round-N/video/`, one adapter a round.
Load all of them, in order, into the base pipeline; each was trained on top of those before it.
"""

import argparse
import json
import random
from pathlib import Path

import torch
import trl
from datasets import Dataset
from diffusers import DiffusionPipeline
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


def load_video_model(path, adapters):
    """The base pipeline with the adapters of earlier rounds merged into its weights, in memory."""
    cuda = torch.cuda.is_available()
    pipe = DiffusionPipeline.from_pretrained(path, dtype=torch.bfloat16 if cuda else torch.float32)
    for adapter in adapters:
        pipe.load_lora_weights(adapter)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    return pipe.to("cuda" if cuda else "cpu")


def fine_tune(enhancer, pairs, args):
    """A start from pairs: without one, few completions of a small model are prompts at all."""
    trainer = trl.SFTTrainer(
        enhancer.model,
        trl.SFTConfig(
            f"{args.output_dir}/sft", max_steps=args.sft_steps, learning_rate=args.sft_learning_rate, **args.lm
        ),
        train_dataset=pairs_dataset(enhancer, pairs),
        processing_class=enhancer.tokenizer,
        peft_config=LoraConfig(r=32, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    enhancer.model = trainer.model


def train_prompts(enhancer, pipe, prompts, rewards, args, folder):
    """The language model learns; the video model is frozen."""
    reward = video_reward(
        pipe, rewards, enhancer=enhancer, num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale, **args.shape, **args.pipeline_kwargs,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        enhancer.model,
        [reward, structure_reward(enhancer)],
        trl.GRPOConfig(
            f"{folder}/prompts", max_steps=args.prompt_steps, per_device_train_batch_size=args.batch_size,
            num_generations=args.num_generations, max_completion_length=enhancer.max_new_tokens,
            reward_weights=[1.0, 0.2], learning_rate=args.prompt_learning_rate, **args.lm,
        ),
        train_dataset=prompts_dataset(enhancer, [{"prompt": p} for p in prompts]),
        processing_class=enhancer.tokenizer,
    )  # fmt: skip
    trainer.train()
    enhancer.model = trainer.model
    return trainer.state.log_history


def train_video(enhancer, pipe, prompts, rewards, args, folder, rng):
    """The video model learns on what the language model now writes; the rewards still see the users' prompts."""
    texts = enhancer(prompts)
    rows = [
        {"prompt": user if rng.random() < args.keep_prompts else text, "user_prompt": user}
        for user, text in zip(prompts, texts, strict=True)
    ]
    trainer = VideoGRPOTrainer(
        model=pipe,
        reward_funcs=[score_original(reward) for reward in rewards],
        args=VideoGRPOConfig(
            output_dir=f"{folder}/video", max_steps=args.video_steps, per_device_train_batch_size=args.batch_size,
            num_generations=args.num_generations, num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale, check_model=not args.smoke, **args.shape, **args.video,
        ),
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(r=32, lora_alpha=64),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(f"{folder}/video")
    return trainer.state.log_history


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct", help="language model")
    parser.add_argument("--template", default="wan")
    parser.add_argument("--video_model", default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    parser.add_argument("--pairs", help="JSON lines with 'prompt' and 'enhanced', to start from")
    parser.add_argument("--prompts", help="users' prompts, one a line")
    parser.add_argument("--rewards", nargs="+", default=["motion-magnitude"], help="names, or module:function")
    parser.add_argument("--output_dir", default="joint")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--sft_steps", type=int, default=100)
    parser.add_argument("--sft_learning_rate", type=float, default=1e-4)
    parser.add_argument("--prompt_learning_rate", type=float, default=1e-5)
    parser.add_argument("--prompt_steps", type=int, default=25, help="updates of the language model a round")
    parser.add_argument("--video_steps", type=int, default=25, help="updates of the video model a round")
    parser.add_argument(
        "--keep_prompts", type=float, default=0.5, help="share of prompts that the video model sees as is"
    )
    parser.add_argument("--num_generations", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=8, help="completions, and videos, of one update")
    parser.add_argument("--num_inference_steps", type=int, default=10)
    parser.add_argument("--guidance_scale", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="two short rounds on the toy world, on the CPU")
    args = parser.parse_args()
    args.shape = {"height": 480, "width": 832, "num_frames": 33}
    args.pipeline_kwargs, args.video = {}, {"seed": args.seed}
    args.lm = {"seed": args.seed, "report_to": "none", "logging_steps": 1, "save_strategy": "no"}
    if args.smoke:
        args.rounds, args.sft_steps, args.prompt_steps, args.video_steps = 2, 20, 2, 2
        args.batch_size, args.num_generations, args.num_inference_steps, args.guidance_scale = 8, 4, 4, 1.0
        args.sft_learning_rate, args.prompt_learning_rate = 3e-3, 1e-3
        args.shape = {"height": 64, "width": 64, "num_frames": 17}
        args.pipeline_kwargs = {"max_sequence_length": 16}
        quiet = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True}
        args.lm |= quiet
        args.video |= quiet | {
            "max_sequence_length": 16,
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 1,
        }
    elif not args.prompts:
        parser.error("--prompts is required (or --smoke)")
    return args


def main():
    args = read_arguments()
    if args.smoke:
        from vidtrl import toy
        from vidtrl.toy.enhancement import load_enhancer
        from vidtrl.toy.paraphrases import intent_reward, paraphrases

        args.video_model, rewards, enhancer = toy.pipeline_path(), [intent_reward], load_enhancer()
        pairs = [{"prompt": r["prompt"], "enhanced": r["caption"]} for r in paraphrases(64, "pairs")]
        prompts = [row["prompt"] for row in paraphrases(8, "prompts")]
    else:
        rewards = [resolve_reward(name) for name in args.rewards]
        enhancer = PromptEnhancer(args.model, template=args.template)
        pairs = [json.loads(line) for line in Path(args.pairs).read_text().splitlines()] if args.pairs else []
        prompts = [line for line in Path(args.prompts).read_text().splitlines() if line.strip()]
    if pairs:
        fine_tune(enhancer, pairs, args)
    adapters, rng = [], random.Random(args.seed)
    for number in range(args.rounds):
        folder = f"{args.output_dir}/round-{number}"
        pipe = load_video_model(args.video_model, adapters)
        args.lm["seed"] = args.video["seed"] = args.seed + number  # other prompts and noise
        logs = {"prompts": train_prompts(enhancer, pipe, prompts, rewards, args, folder)}
        logs["video"] = train_video(enhancer, pipe, prompts, rewards, args, folder, rng)
        adapters.append(f"{folder}/video")
        enhancer.save_pretrained(f"{args.output_dir}/enhancer")
        for name, log in logs.items():
            seen = [entry["reward"] for entry in log if "reward" in entry]
            print(f"round {number}, {name}: reward {seen[0]:.3f}, at the end {seen[-1]:.3f}", flush=True)


if __name__ == "__main__":
    main()
