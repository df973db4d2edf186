r"""`vidtrl sft`: fine-tune a video diffusion model on captioned clips.

Full fine-tuning:

    vidtrl sft --model_name_or_path Wan-AI/Wan2.1-T2V-1.3B-Diffusers --dataset_name ./clips \
        --height 480 --width 832 --num_frames 81 --output_dir wan-sft

LoRA, options from a file, two GPUs:

    vidtrl sft --config sft.yaml --use_peft --learning_rate 1e-4 --accelerate_config multi_gpu --num_processes 2
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

from .errors import Interrupted, UserError, guarded
from .launch import launch, split_launch_options


@dataclass
class ScriptArguments:
    """
    What to train, and on what.

    Args:
        model_name_or_path (`str`): Id on the Hub, or directory of a diffusers pipeline. Required.
        model_revision (`str`, *optional*): Branch, tag or commit.
        torch_dtype (`str`, *optional*): `"float32"`, `"bfloat16"` or `"float16"`, for the frozen weights.
        dataset_name (`str`): Id on the Hub, or a folder of clips (VideoFolder). A column `image` of its metadata, for
            image-to-video models, holds paths inside the folder. Required.
        dataset_config (`str`, *optional*): Configuration name, as in [`~datasets.load_dataset`].
        dataset_train_split (`str`, *optional*, defaults to `"train"`): Slices such as `"train[:90%]"` work.
        dataset_test_split (`str`, *optional*, defaults to `"test"`): Read only with `eval_strategy`.
        dataset_streaming (`bool`, *optional*, defaults to `False`): Read without downloading all of it first.
    """

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Id on the Hub, or directory of a diffusers pipeline (required)."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    torch_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Precision in which the model is loaded. Default: chosen by the trainer.",
            "choices": ["float32", "bfloat16", "float16"],
        },
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Id on the Hub, or a folder of clips (required)."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration name of the dataset."})
    dataset_train_split: str = field(
        default="train", metadata={"help": "Split to train on; slices such as 'train[:90%%]' work."}
    )
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split to evaluate on, read only with --eval_strategy."}
    )
    dataset_streaming: bool = field(
        default=False, metadata={"help": "Stream the dataset instead of downloading it first."}
    )


@dataclass
class LoraArguments:
    """
    LoRA and DoRA. Without `use_peft` all weights of the denoiser are trained.

    Args:
        use_peft (`bool`, *optional*, defaults to `False`): Train an adapter.
        lora_r (`int`, *optional*, defaults to `32`): Rank.
        lora_alpha (`int`, *optional*, defaults to `32`): The adapter is scaled by `lora_alpha / lora_r`.
        lora_dropout (`float`, *optional*, defaults to `0.0`): In [0, 1).
        lora_target_modules (`list[str]`, *optional*): Names or name endings of Linear layers. By default those inside
            the repeated blocks of the denoiser.
        use_dora (`bool`, *optional*, defaults to `False`): DoRA, https://huggingface.co/papers/2402.09353.
        use_rslora (`bool`, *optional*, defaults to `False`): Scale by `lora_alpha / sqrt(lora_r)`,
            https://huggingface.co/papers/2312.03732.
    """

    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of all weights."})
    lora_r: int = field(default=32, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "The adapter is scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapter."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Linear layers to adapt. Default: those inside the denoiser's repeated blocks."},
    )
    use_dora: bool = field(default=False, metadata={"help": "Train DoRA: direction and magnitude apart."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(lora_r)."})

    def __post_init__(self):
        if not self.use_peft:
            changed = [f.name for f in fields(self) if f.default is not MISSING and getattr(self, f.name) != f.default]
            if changed:
                raise ValueError(f"{changed[0]} is set, but all weights would be trained: add --use_peft for LoRA")
        if self.lora_r < 1:
            raise ValueError(f"lora_r must be at least 1, not {self.lora_r}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must lie in [0, 1), not {self.lora_dropout}")

    def peft_config(self):
        """The `peft.LoraConfig`, or `None` without `use_peft`."""
        if not self.use_peft:
            return None
        from peft import LoraConfig

        targets = self.lora_target_modules
        # No task type: PEFT's task classes expect language models.
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules="all-linear" if targets == ["all-linear"] else targets,
            use_dora=self.use_dora,
            use_rslora=self.use_rslora,
        )


@dataclass
class QuantizationArguments:
    """
    bitsandbytes quantisation of the frozen denoiser, through diffusers.

    Args:
        load_in_4bit (`bool`, *optional*, defaults to `False`): NF4 weights with bfloat16 arithmetic (QLoRA).
        load_in_8bit (`bool`, *optional*, defaults to `False`): LLM.int8 weights.
    """

    load_in_4bit: bool = field(default=False, metadata={"help": "Load the denoiser in 4 bit (NF4, bitsandbytes)."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Load the denoiser in 8 bit (bitsandbytes)."})

    def __post_init__(self):
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("choose one of load_in_4bit and load_in_8bit")

    def quantization_config(self):
        """The `diffusers.PipelineQuantizationConfig` over the denoisers, or `None`."""
        if not (self.load_in_4bit or self.load_in_8bit):
            return None
        import torch
        from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig

        if self.load_in_4bit:
            config = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
            )
        else:
            config = BitsAndBytesConfig(load_in_8bit=True)
        return PipelineQuantizationConfig(quant_mapping={"transformer": config, "transformer_2": config})


@dataclass
class LaunchArguments:
    """
    How many processes run the training; read before it starts.

    Args:
        accelerate_config (`str`, *optional*): `single`, `multi_gpu`, `fsdp2`, `zero2`, `zero3`, or an accelerate file.
        num_processes (`int`, *optional*): Processes in all; by default one a device.
        num_machines (`int`, *optional*): Machines.
        machine_rank (`int`, *optional*): Rank of this machine.
        main_process_ip (`str`, *optional*): Address of rank 0.
        main_process_port (`int`, *optional*): Port of rank 0.
    """

    accelerate_config: str | None = field(
        default=None, metadata={"help": "Launch with accelerate: single, multi_gpu, fsdp2, zero2, zero3, or a file."}
    )
    num_processes: int | None = field(default=None, metadata={"help": "Processes in all. Default: one a device."})
    num_machines: int | None = field(default=None, metadata={"help": "Machines."})
    machine_rank: int | None = field(default=None, metadata={"help": "Rank of this machine."})
    main_process_ip: str | None = field(default=None, metadata={"help": "Address of rank 0."})
    main_process_port: int | None = field(default=None, metadata={"help": "Port of rank 0."})


def make_parser():
    """All options of `vidtrl sft`: [`ScriptArguments`], [`VideoSFTConfig`], LoRA, quantisation, launch."""
    from ..trainer import VideoSFTConfig
    from .parsing import VidtrlParser

    return VidtrlParser(
        [ScriptArguments, VideoSFTConfig, LoraArguments, QuantizationArguments, LaunchArguments],
        prog="vidtrl sft",
        description="Fine-tune a video diffusion model on captioned clips. Options may also stand in a YAML file "
        "given with --config FILE; the command line wins.",
    )


def load_split(script_args: ScriptArguments, split: str):
    """
    One split of the dataset that the arguments name.

    Args:
        script_args ([`ScriptArguments`]): Names the dataset.
        split (`str`): Split or slice.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`

    Raises:
        [`UserError`]: If there is no such dataset or split.
    """
    name = script_args.dataset_name
    if Path(name).is_file():
        raise UserError(f"dataset_name {name!r} is a file; give the folder that holds the clips and metadata.jsonl")
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise UserError(f"dataset folder {name!r} does not exist")
    local = Path(name).expanduser()
    if not local.is_dir():
        return load(script_args, split, name, script_args.dataset_config)
    from ..data.video import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS

    found = {path.suffix.lower() for path in local.rglob("*")}
    if found & set(VIDEO_EXTENSIONS) and found & set(
        IMAGE_EXTENSIONS
    ):  # datasets would guess which of them it is about
        dataset = load(script_args, split, "videofolder", script_args.dataset_config, data_dir=str(local))
    else:
        dataset = load(script_args, split, str(local), script_args.dataset_config)
    return image_paths(dataset, local, local / split.split("[")[0])


def image_paths(dataset, *folders: Path):
    """
    The paths of a column `image` as absolute ones.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): Other kinds of columns stay as they are.
        *folders (`Path`): What the paths are relative to: the first that has the file.

    Raises:
        `ValueError`: If a path leads out of its folder.
    """
    from datasets import Value

    from ..data.columns import inside

    def resolve(row: dict) -> dict:
        paths = [inside(folder, row["image"]) for folder in folders] if row["image"] else [None]
        return {"image": next((path for path in paths if path and Path(path).exists()), paths[0])}

    return dataset.map(resolve) if (dataset.features or {}).get("image") == Value("string") else dataset


def load(script_args: ScriptArguments, split: str, *source, **kwargs):
    """[`~datasets.load_dataset`] of one split, with a [`UserError`] that names the dataset where that fails."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return load_dataset(*source, split=split, streaming=script_args.dataset_streaming, **kwargs)
    # missing, empty, unreachable, malformed, unknown split
    except (FileNotFoundError, ConnectionError, ValueError, DatasetsError) as error:
        reason = f"{error}: {error.__cause__}" if error.__cause__ else error
        raise UserError(f"cannot load split {split!r} of {script_args.dataset_name!r}: {reason}") from error


def train(argv: Sequence[str]) -> int:
    """Parse the options, train, save, and push if asked to. This is what every rank runs."""
    script_args, training_args, lora_args, quantization_args, _ = make_parser().parse_args_and_config(argv)
    require(script_args, "model_name_or_path", "dataset_name")
    train_dataset = load_split(script_args, script_args.dataset_train_split)
    evaluate = training_args.eval_strategy != "no"
    eval_dataset = load_split(script_args, script_args.dataset_test_split) if evaluate else None
    training_args.model_init_kwargs = model_init_kwargs(script_args, training_args)

    from ..trainer import VideoSFTTrainer

    trainer = VideoSFTTrainer(
        model=script_args.model_name_or_path,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=quantization_args.quantization_config(),
        peft_config=lora_args.peft_config(),
    )
    return fit(trainer, script_args)


def require(script_args: ScriptArguments, *names: str) -> None:
    """Options without a default, which may stand in either place."""
    for name in names:
        if not getattr(script_args, name):
            raise UserError(f"--{name} is required, on the command line or in the config file")


def model_init_kwargs(script_args: ScriptArguments, training_args) -> dict | None:
    """Those of the configuration, with the model options of the command in them."""
    loading = {"revision": script_args.model_revision, "torch_dtype": script_args.torch_dtype}
    chosen = {k: v for k, v in loading.items() if v is not None}
    return (training_args.model_init_kwargs or {}) | chosen or None


def fit(trainer, script_args: ScriptArguments) -> int:
    """Train from the start or from where `--resume_from_checkpoint` says, save, push if asked to, and leave."""
    args = trainer.args
    try:
        trainer.train(resume_from_checkpoint=resume_point(args))
    except KeyboardInterrupt:
        raise Interrupted(resume_hint(args.output_dir)) from None
    except Exception:
        if trainer.is_local_process_zero() and not args.disable_tqdm:
            print(file=sys.stderr)  # the progress bar has not ended its line
        raise
    if args.push_to_hub:  # saves as well, and save_model would push as well
        local = Path(script_args.dataset_name).expanduser().exists()
        trainer.push_to_hub(dataset_name=None if local else script_args.dataset_name)
    else:
        trainer.save_model(args.output_dir)
    trainer.end()
    return 0


def resume_point(training_args) -> str | bool | None:
    """`resume_from_checkpoint` as the trainer takes it; `latest` is the last checkpoint, or a new start without one."""
    from transformers.trainer_utils import get_last_checkpoint

    wanted = training_args.resume_from_checkpoint
    if wanted is None or wanted.lower() in ("false", "no", "none"):
        return None
    if wanted.lower() in ("true", "yes"):
        return True
    if wanted.lower() != "latest":
        return wanted
    last = get_last_checkpoint(training_args.output_dir) if Path(training_args.output_dir).is_dir() else None
    if training_args.process_index == 0:
        print(f"resuming from {last}" if last else f"no checkpoint in {training_args.output_dir}: starting anew")
    return last


def resume_hint(output_dir: str) -> str:
    """What to type to go on after Ctrl-C."""
    from transformers.trainer_utils import get_last_checkpoint

    last = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
    if last is None:
        return f"no checkpoint was written to {output_dir} yet (see --save_steps)"
    return f"the same command with --resume_from_checkpoint latest goes on from {last}"


def run(argv: Sequence[str]) -> int:
    """Entry point of `vidtrl sft`."""
    return run_here_or_launch(__name__, train, argv)


def run_here_or_launch(module: str, train: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Train here, or under `accelerate launch` where `--accelerate_config` is given."""
    options, rest = split_launch_options(argv)
    if "accelerate_config" in options and not {"-h", "--help"} & set(rest):
        return launch(module, options, rest)
    if options and not {"-h", "--help"} & set(rest):
        raise UserError(f"--{next(iter(options))} needs --accelerate_config")
    return train(rest)


if __name__ == "__main__":  # one rank of `accelerate launch`
    sys.exit(guarded(train, sys.argv[1:]))
