r"""`vidtrl grpo`: train a video diffusion model on reward functions.

LoRA on a file of prompts, two rewards, the paper's recipe:

    vidtrl grpo --model_name_or_path Wan-AI/Wan2.1-T2V-1.3B-Diffusers --dataset_name prompts.txt \
        --reward_funcs my_rewards:smooth my_rewards:matches_prompt --use_peft \
        --height 480 --width 832 --num_frames 81 --output_dir wan-grpo

Another recipe, options from a file, eight GPUs:

    vidtrl grpo --config grpo.yaml --recipe mix-grpo --accelerate_config multi_gpu --num_processes 8
"""

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..rewards.builtin import is_url
from .errors import PACKAGE, UserError, guarded
from .sft import (
    LaunchArguments,
    LoraArguments,
    QuantizationArguments,
    ScriptArguments,
    fit,
    image_paths,
    load,
    load_split,
    model_init_kwargs,
    require,
    run_here_or_launch,
)


PROMPT_FILES = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass
class GRPOScriptArguments(ScriptArguments):
    """
    What to train, on which prompts, for which rewards.

    Args:
        dataset_name (`str`): Prompts: a `.txt` file with one a line, a `.jsonl`, `.csv` or `.parquet` file with a column
            `prompt` (the other columns reach the rewards), a folder, or an id on the Hub. Required.
        reward_funcs (`list[str]`): Names of built-in rewards, `module:function`, or addresses of reward servers. Required.
        eval_reward_funcs (`list[str]`, *optional*): Rewards that are measured in evaluation and never trained on.

    The other arguments are those of [`ScriptArguments`].
    """

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Prompts: a .txt, .jsonl, .csv or .parquet file, a folder, or an id on the Hub (required)."},
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Built-in rewards by name, module:function, or http://host:port of a reward server (required)."
        },
    )
    eval_reward_funcs: list[str] | None = field(
        default=None, metadata={"help": "Rewards measured in evaluation and never trained on."}
    )


def make_parser():
    """All options of `vidtrl grpo`: [`GRPOScriptArguments`], [`VideoGRPOConfig`], LoRA, quantisation, launch."""
    from ..trainer import VideoGRPOConfig
    from .parsing import VidtrlParser

    return VidtrlParser(
        [GRPOScriptArguments, VideoGRPOConfig, LoraArguments, QuantizationArguments, LaunchArguments],
        prog="vidtrl grpo",
        description="Train a video diffusion model on reward functions. Options may also stand in a YAML file given with "
        "--config FILE; the command line wins.",
    )


def load_prompts(script_args: GRPOScriptArguments, split: str):
    """
    One split of the prompts that the arguments name.

    Args:
        script_args ([`GRPOScriptArguments`]): Names the dataset. Blank lines of a `.txt` file are no prompts.
        split (`str`): Split or slice. A single file has the split `train` alone.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: Videos, where it has any, are not decoded.

    Raises:
        [`UserError`]: If there is no such dataset or split, or it is no kind of file that holds prompts.
    """
    from datasets import Video

    name = script_args.dataset_name
    path = Path(name).expanduser()
    if path.is_file() or path.suffix.lower() in PROMPT_FILES and not path.is_dir():
        if not path.is_file():
            raise UserError(f"prompt file {name!r} does not exist")
        builder = PROMPT_FILES.get(path.suffix.lower())
        if builder is None:
            raise UserError(f"dataset_name {name!r} must be one of {', '.join(PROMPT_FILES)}, a folder, or a Hub id")
        reading = {"encoding": "utf-8-sig"} if builder == "text" else {}  # editors may begin a file with a mark
        dataset = load(script_args, split, builder, data_files=str(path), **reading)
        dataset = image_paths(dataset, path.parent)
        if builder == "text":
            dataset = dataset.filter(lambda row: bool(row["text"].strip())).rename_column("text", "prompt")
    else:
        dataset = load_split(script_args, split)
    for column, feature in (dataset.features or {}).items():
        if isinstance(feature, Video):
            dataset = dataset.cast_column(column, Video(decode=False))
    return dataset


def resolve_reward(name: str) -> str | Callable:
    """
    What the trainer takes for a reward that is named on the command line.

    Args:
        name (`str`): A built-in reward such as `"toy-color"`, the address of a reward server such as
            `"http://host:8000"`, or `"module:function"` with a module that can be imported from the present directory or
            the environment.

    Returns:
        `str` or `Callable`: A built-in reward stays a name, and a server an address.

    Raises:
        [`UserError`] or `ValueError`: If there is no such reward, module, function or server.

    Example:

    ```python
    >>> resolve_reward("toy-color")
    'toy-color'
    ```
    """
    module_name, colon, function = name.partition(":")
    if not colon or is_url(name):
        from ..rewards import RewardUnavailable, get_reward

        reward = get_reward(name)  # a misspelt name shows before the model is loaded
        if is_url(name):
            try:
                reward.check()
            except RewardUnavailable as error:
                raise UserError(str(error)) from error
        return name
    if module_name.endswith(".py") or "/" in module_name or not module_name or not function:
        raise UserError(
            f"reward {name!r}: write module:function, with the module as in an import statement (my_rewards:smooth for "
            "smooth in my_rewards.py)"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python script.py` does, and the installed command does not
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"reward {name!r}: {error}. Start in the folder that holds it, or set PYTHONPATH") from error
    functions = {key: value for key, value in vars(module).items() if callable(value)}
    if function not in functions:
        near = difflib.get_close_matches(function, functions, n=1)
        hint = f"; did you mean {module_name}:{near[0]}?" if near else ""
        raise UserError(f"reward {name!r}: {module.__file__} has no function {function!r}{hint}")
    return functions[function]


def train(argv: Sequence[str]) -> int:
    """Parse the options, train, save, and push if asked to. This is what every rank runs."""
    script_args, training_args, lora_args, quantization_args, _ = make_parser().parse_args_and_config(argv)
    require(script_args, "model_name_or_path", "dataset_name", "reward_funcs")
    reward_funcs = [resolve_reward(name) for name in script_args.reward_funcs]
    eval_reward_funcs = [resolve_reward(name) for name in script_args.eval_reward_funcs or []]
    train_dataset = load_prompts(script_args, script_args.dataset_train_split)
    evaluate = training_args.eval_strategy != "no"
    if eval_reward_funcs and not evaluate:
        raise UserError("eval_reward_funcs are measured in evaluation: set --eval_strategy steps and --eval_steps")
    eval_dataset = load_prompts(script_args, script_args.dataset_test_split) if evaluate else None
    training_args.model_init_kwargs = model_init_kwargs(script_args, training_args)

    from ..rewards import RewardError
    from ..trainer import VideoGRPOTrainer

    trainer = VideoGRPOTrainer(
        model=script_args.model_name_or_path,
        reward_funcs=reward_funcs,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        quantization_config=quantization_args.quantization_config(),
        peft_config=lora_args.peft_config(),
        eval_reward_funcs=eval_reward_funcs or None,
    )
    try:
        return fit(trainer, script_args)
    except RewardError as error:
        raise UserError(f"{error}{raised_in(error.__cause__)}") from error


def raised_in(error: BaseException) -> str:
    """File and line of an error that came out of somebody else's code; empty for one of ours."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or Path(frames[-1].filename).resolve().is_relative_to(PACKAGE):
        return ""
    return f" Raised in {frames[-1].filename}, line {frames[-1].lineno}."


def run(argv: Sequence[str]) -> int:
    """Entry point of `vidtrl grpo`."""
    return run_here_or_launch(__name__, train, argv)


if __name__ == "__main__":  # one rank of `accelerate launch`
    sys.exit(guarded(train, sys.argv[1:]))
