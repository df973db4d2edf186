"""Self-Forcing, a student that streams: the Python side of config.yaml, to be copied and changed.

    bash run.sh                                              on every GPU of this machine
    accelerate launch train.py --config config.yaml          the same, launched your way
    python train.py --config config.yaml --window 12 --sink 3   one process; options win over the file

Without changes it does what `vidtrl distill --config config.yaml` does.
"""

import sys

from vidtrl import VideoDistillTrainer
from vidtrl.cli.distill import make_parser
from vidtrl.cli.grpo import load_prompts
from vidtrl.cli.sft import model_init_kwargs, resume_point


def main():
    # one dataclass a topic: names of model and prompts, VideoDistillConfig, LoRA, quantisation, launch
    script_args, training_args, lora_args, quantization_args, _ = make_parser().parse_args_and_config(sys.argv[1:])
    training_args.model_init_kwargs = model_init_kwargs(script_args, training_args)  # torch_dtype, revision

    # a dataset with a column `prompt`, such as datasets.Dataset.from_dict({"prompt": [...]}). Videos are not needed: the
    # student learns on what it generates
    train_dataset = load_prompts(script_args, script_args.dataset_train_split)

    trainer = VideoDistillTrainer(
        model=script_args.model_name_or_path,  # the student, which starts from init_adapter
        teacher_model=script_args.teacher_model_name_or_path,  # None: the model itself, not causal, with the adapters off
        args=training_args,  # or VideoDistillConfig("wan-streaming", recipe="self-forcing", height=480, width=832, ...)
        train_dataset=train_dataset,
        quantization_config=quantization_args.quantization_config(),
        peft_config=lora_args.peft_config(),  # of student and fake score, each
    )
    if trainer.is_world_process_zero():
        videos = training_args.train_batch_size * training_args.gradient_accumulation_steps * training_args.world_size
        print(f"processes: {training_args.world_size}, videos an update: {videos}")

    trainer.train(resume_from_checkpoint=resume_point(training_args))  # --resume_from_checkpoint latest
    trainer.save_model()  # the adapter and distill_config.json: what vidtrl.load_student and CausalVideoPipeline read
    if training_args.push_to_hub:
        trainer.push_to_hub()
    trainer.end()


if __name__ == "__main__":
    main()
