"""A prompt enhancer, from pairs and then from videos: the Python side of config.yaml, to be copied and changed.

    bash run.sh                                              on every GPU of this machine
    accelerate launch train.py --config config.yaml          the same, launched your way
    python train.py --config config.yaml --steps grpo --model_name_or_path wan-prompts/sft    the second step alone

Both trainers are TRL's own. `vidtrl prompt --config config.yaml` does the same, resumes (--resume_from_checkpoint latest), and
pushes to the Hub.
"""

import sys

import trl
from datasets import load_dataset

from vidtrl.cli.grpo import resolve_reward
from vidtrl.cli.prompt import load_enhancer, make_parser, trl_config
from vidtrl.prompts import pairs_dataset, prompts_dataset, structure_reward, video_reward


def from_pairs(enhancer, script_args, peft_config):
    """What a good prompt looks like: supervised fine-tuning on what users wrote and what should have been written."""
    pairs = load_rows(script_args.pairs_dataset_name)  # [{"prompt": "a cat", "enhanced": "A grey tabby cat ..."}, ...]
    trainer = trl.SFTTrainer(
        enhancer.model,
        trl_config("sft", script_args),  # a trl.SFTConfig of the section `sft`
        train_dataset=pairs_dataset(enhancer, pairs),
        processing_class=enhancer.tokenizer,
        peft_config=peft_config,
    )
    trainer.train()
    return trainer


def from_videos(enhancer, script_args, peft_config):
    """Which prompts work: GRPO on the videos that the frozen generator makes of them, judged by what the user asked for."""
    args = trl_config(  # a trl.GRPOConfig of the section `grpo`
        "grpo",
        script_args,
        max_completion_length=enhancer.max_new_tokens,
        reward_weights=[1.0, script_args.structure_weight],
        chat_template_kwargs=enhancer.chat_template_kwargs or None,
    )
    video = video_reward(
        script_args.video_model_name_or_path,  # or a pipeline that you have loaded
        [
            resolve_reward(name) for name in script_args.reward_funcs
        ],  # the rewards of VideoGRPOTrainer; functions as well
        enhancer=enhancer,
        reward_weights=script_args.reward_weights,
        height=script_args.height,
        width=script_args.width,
        num_frames=script_args.num_frames,
        num_inference_steps=script_args.num_inference_steps,
        guidance_scale=script_args.guidance_scale,
        negative_prompt=script_args.negative_prompt,
        base_adapters=script_args.base_adapters,  # LoRAs of earlier stages
        seeds=script_args.seeds,
        batch_size=script_args.video_batch_size,
        cache_size=script_args.video_cache_size,
        device=args.device,
        **script_args.pipeline_kwargs,
    )
    trainer = trl.GRPOTrainer(
        enhancer.model,
        [video, structure_reward(enhancer)],
        args,
        train_dataset=prompts_dataset(enhancer, load_rows(script_args.dataset_name)),
        processing_class=enhancer.tokenizer,
        peft_config=peft_config,
    )
    trainer.train()
    return trainer


def load_rows(path):
    """Rows of a .jsonl file, or the lines of a .txt file as prompts."""
    if path.endswith(".txt"):
        rows = load_dataset("text", data_files=path, split="train").rename_column("text", "prompt")
        return rows.filter(lambda row: bool(row["prompt"].strip()))
    return load_dataset("json", data_files=path, split="train")


def main():
    script_args, lora_args, _ = make_parser().parse_args_and_config(sys.argv[1:])
    peft_config = lora_args.peft_config()
    if peft_config is not None:
        peft_config.task_type, peft_config.target_modules = "CAUSAL_LM", peft_config.target_modules or "all-linear"

    enhancer = load_enhancer(script_args, script_args.model_name_or_path, use_peft=peft_config is not None)
    for step, train in (("sft", from_pairs), ("grpo", from_videos)):
        if step not in script_args.steps:
            continue
        trainer = train(enhancer, script_args, peft_config)
        peft_config = None  # the adapter goes on being trained
        enhancer.model = trainer.accelerator.unwrap_model(trainer.model)
        trainer.accelerator.wait_for_everyone()
        if trainer.is_world_process_zero():
            print(f"processes: {trainer.args.world_size}, done: {step}")
            enhancer.save_pretrained(f"{script_args.output_dir}/{step}")
            enhancer.save_pretrained(
                script_args.output_dir
            )  # for PromptEnhancer.from_pretrained; of a LoRA, itself alone


if __name__ == "__main__":
    main()
