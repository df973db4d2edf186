r"""`vidtrl distill`: a few-step or streaming student of a video diffusion model.

Four steps without guidance, from a file of prompts; the GRPO adapter stays under teacher and student:

    vidtrl distill --model_name_or_path Wan-AI/Wan2.1-T2V-1.3B-Diffusers --base_adapters wan-sft wan-grpo \
        --dataset_name prompts.txt --use_peft --height 480 --width 832 --num_frames 81 --output_dir wan-4-steps

A causal student that streams, with a larger teacher, options from a file, eight GPUs:

    vidtrl distill --config distill.yaml --recipe self-forcing --teacher_model_name_or_path Wan-AI/Wan2.1-T2V-14B-Diffusers \
        --accelerate_config multi_gpu --num_processes 8
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from .errors import UserError, guarded
from .grpo import load_prompts
from .sft import (
    LaunchArguments,
    LoraArguments,
    QuantizationArguments,
    ScriptArguments,
    fit,
    load_split,
    model_init_kwargs,
    require,
    run_here_or_launch,
)


@dataclass
class DistillScriptArguments(ScriptArguments):
    """
    What to distil, and on what.

    Args:
        dataset_name (`str`): Prompts, as for `vidtrl grpo`: a `.txt`, `.jsonl`, `.csv` or `.parquet` file, a folder, or an id on
            the Hub. With `--rollout data` (and recipes that set it) clips, as for `vidtrl sft`. Required.
        teacher_model_name_or_path (`str`, *optional*): Another teacher with the same latent space; the model itself by
            default.

    The other arguments are those of [`ScriptArguments`].
    """

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Prompts (a file, a folder, or an id on the Hub), or a folder of clips for recipes that need them (required)."
        },
    )
    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Another teacher with the same latent space. Default: the model itself."}
    )


def make_parser():
    """All options of `vidtrl distill`: [`DistillScriptArguments`], [`VideoDistillConfig`], LoRA, quantisation, launch."""
    from ..trainer import VideoDistillConfig
    from .parsing import VidtrlParser

    return VidtrlParser(
        [DistillScriptArguments, VideoDistillConfig, LoraArguments, QuantizationArguments, LaunchArguments],
        prog="vidtrl distill",
        description="Distil a video diffusion model into a few-step or streaming student. Options may also stand in a YAML "
        "file given with --config FILE; the command line wins.",
    )


def train(argv: Sequence[str]) -> int:
    """Parse the options, train, save, and push if asked to. This is what every rank runs."""
    script_args, training_args, lora_args, quantization_args, _ = make_parser().parse_args_and_config(argv)
    require(script_args, "model_name_or_path", "dataset_name")
    if training_args.init_adapter and not lora_args.use_peft:
        raise UserError("--init_adapter is the start of an adapter: add --use_peft")
    read = load_split if training_args.rollout == "data" else load_prompts
    train_dataset = read(script_args, script_args.dataset_train_split)
    evaluate = training_args.eval_strategy != "no"
    eval_dataset = read(script_args, script_args.dataset_test_split) if evaluate else None
    training_args.model_init_kwargs = model_init_kwargs(script_args, training_args)

    from ..trainer import VideoDistillTrainer

    trainer = VideoDistillTrainer(
        model=script_args.model_name_or_path,
        teacher_model=script_args.teacher_model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=quantization_args.quantization_config(),
        peft_config=lora_args.peft_config(),
    )
    return fit(trainer, script_args)


def run(argv: Sequence[str]) -> int:
    """Entry point of `vidtrl distill`."""
    return run_here_or_launch(__name__, train, argv)


if __name__ == "__main__":  # one rank of `accelerate launch`
    sys.exit(guarded(train, sys.argv[1:]))
