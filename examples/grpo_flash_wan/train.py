"""Flash-GRPO: the Python side of config.yaml, to be copied and changed.

    bash run.sh                                              on every GPU of this machine
    accelerate launch train.py --config config.yaml          the same, launched your way
    python train.py --config config.yaml --recipe mix-grpo   one process; options win over the file

Without changes it does what `vidtrl grpo --config config.yaml` does.
"""

import sys

from vidtrl import VideoGRPOTrainer
from vidtrl.cli.grpo import load_prompts, make_parser, resolve_reward
from vidtrl.cli.sft import model_init_kwargs, resume_point


# A reward of your own is a function from videos, float32 tensors (frames, channels, height, width) in [0, 1], to one number
# each, or None where it does not apply. Write `train:brightness` into reward_funcs of config.yaml to use this one
def brightness(prompts, videos, **columns):
    return [video.mean().item() for video in videos]


def main():
    # one dataclass a topic: names of model, prompts and rewards, VideoGRPOConfig, LoRA, quantisation, launch
    script_args, training_args, lora_args, quantization_args, _ = make_parser().parse_args_and_config(sys.argv[1:])
    training_args.model_init_kwargs = model_init_kwargs(script_args, training_args)  # torch_dtype, revision

    # datasets with a column `prompt`; the other columns reach the rewards, as do those of
    # datasets.Dataset.from_list([{"prompt": "a red kite rises", "direction": "up"}])
    train_dataset = load_prompts(script_args, script_args.dataset_train_split)
    evaluate = training_args.eval_strategy != "no"
    eval_dataset = load_prompts(script_args, script_args.dataset_test_split) if evaluate else None

    trainer = VideoGRPOTrainer(
        model=script_args.model_name_or_path,  # or a pipeline that you have loaded
        reward_funcs=[resolve_reward(name) for name in script_args.reward_funcs],  # names and functions
        args=training_args,  # or VideoGRPOConfig("wan-grpo", recipe="flash-grpo", height=480, width=832, ...)
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=quantization_args.quantization_config(),
        peft_config=lora_args.peft_config(),
        # scored in evaluation alone, so that rewards that are gamed show
        eval_reward_funcs=[resolve_reward(name) for name in script_args.eval_reward_funcs or []] if evaluate else None,
    )
    if trainer.is_world_process_zero():
        videos = training_args.train_batch_size * training_args.gradient_accumulation_steps * training_args.world_size
        print(f"processes: {training_args.world_size}, videos an update: {videos}")

    trainer.train(resume_from_checkpoint=resume_point(training_args))  # --resume_from_checkpoint latest
    trainer.save_model()  # pytorch_lora_weights.safetensors, for pipe.load_lora_weights(output_dir)
    if training_args.push_to_hub:
        trainer.push_to_hub()
    trainer.end()


if __name__ == "__main__":
    main()
