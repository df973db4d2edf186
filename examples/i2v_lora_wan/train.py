"""LoRA of an image-to-video model on clips and their first frames: the Python side of config.yaml, to be copied and changed.

    bash run.sh                                              on every GPU of this machine
    accelerate launch train.py --config config.yaml          the same, launched your way
    python train.py --config config.yaml --max_steps 10      one process; options win over the file

Without changes it does what `vidtrl sft --config config.yaml` does.
"""

import sys
from pathlib import Path

from datasets import load_dataset

from vidtrl import VideoSFTTrainer
from vidtrl.cli.sft import make_parser, model_init_kwargs, resume_point


def load_clips(folder, split):
    """
    Clips of a folder: mp4 files, and a metadata.jsonl with lines such as
    {"file_name": "0001.mp4", "prompt": "a dog runs", "image": "images/0001.png"}; the image is relative to the folder.

    Without a column `image`, or where it is null, a clip starts from its own first frame. Any dataset with the columns
    `video` and `prompt` will do; images may also be PIL images, bytes, or a `datasets.Image` feature.
    """
    clips = load_dataset("videofolder", data_dir=folder, split=split)
    if "image" in clips.column_names:
        clips = clips.map(lambda row: {"image": row["image"] and str(Path(folder, row["image"]))})
    return clips


def main():
    # one dataclass a topic: names of model and data, VideoSFTConfig, LoRA, quantisation, launch
    script_args, training_args, lora_args, quantization_args, _ = make_parser().parse_args_and_config(sys.argv[1:])
    training_args.model_init_kwargs = model_init_kwargs(script_args, training_args)  # torch_dtype, revision

    train_dataset = load_clips(script_args.dataset_name, script_args.dataset_train_split)
    eval_dataset = None
    if training_args.eval_strategy != "no":
        eval_dataset = load_clips(script_args.dataset_name, script_args.dataset_test_split)

    trainer = VideoSFTTrainer(
        model=script_args.model_name_or_path,  # or a pipeline that you have loaded
        args=training_args,  # or VideoSFTConfig("wan-i2v", height=480, width=832, num_frames=81, ...)
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=quantization_args.quantization_config(),
        peft_config=lora_args.peft_config(),  # a peft.LoraConfig; None trains all weights
    )
    if trainer.is_world_process_zero():
        clips = training_args.train_batch_size * training_args.gradient_accumulation_steps * training_args.world_size
        print(f"processes: {training_args.world_size}, clips an update: {clips}")

    trainer.train(resume_from_checkpoint=resume_point(training_args))  # --resume_from_checkpoint latest
    trainer.save_model()  # pytorch_lora_weights.safetensors, for WanImageToVideoPipeline's load_lora_weights
    if training_args.push_to_hub:
        trainer.push_to_hub()
    trainer.end()


if __name__ == "__main__":
    main()
