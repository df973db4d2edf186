r"""`vidtrl prompt`: train a language model to write prompts for a video model, with TRL: on pairs, then on videos.

    vidtrl prompt --config prompt.yaml

Only the second step, with another reward, on four GPUs:

    vidtrl prompt --config prompt.yaml --steps grpo --reward_funcs my_rewards:matches \
        --accelerate_config multi_gpu --num_processes 4
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import Interrupted, UserError, guarded
from .grpo import GRPOScriptArguments, load_prompts, raised_in, resolve_reward
from .sft import LaunchArguments, LoraArguments, require, run_here_or_launch


HINT = "the same command with --resume_from_checkpoint latest goes on"


@dataclass
class PromptScriptArguments:
    """
    Which language model learns to write prompts, from what, for which video model.

    Args:
        model_name_or_path (`str`): The language model: id on the Hub, folder, or a saved enhancer. Required.
        torch_dtype (`str`, *optional*): `"float32"`, `"bfloat16"` or `"float16"`, for its weights. Default: float32 for
            weights that are trained, bfloat16 for those under an adapter.
        template (`str`, *optional*): Built-in template or JSON file; by default that of a saved enhancer, or `"neutral"`.
        language (`str`, *optional*): Of the enhanced prompts; by default that of the user's.
        max_new_tokens (`int`, *optional*, defaults to `256`): Of an answer.
        chat_template_kwargs (`dict`, *optional*): Such as `{"enable_thinking": false}` for Qwen3.
        steps (`list[str]`, *optional*, defaults to `["sft", "grpo"]`): Which steps run, in this order.
        pairs_dataset_name (`str`): Pairs for `sft`, with columns `prompt` and `enhanced`: a file, a folder or a Hub id.
        sft (`dict`, *optional*): Arguments of [`~trl.SFTConfig`].
        dataset_name (`str`): Prompts for `grpo`, as for `vidtrl grpo`.
        dataset_train_split (`str`, *optional*, defaults to `"train"`): Of both datasets.
        video_model_name_or_path (`str`): The frozen video model, for `grpo`.
        base_adapters (`list[str]`, *optional*): LoRA adapters under which it generates, such as those of earlier stages.
        reward_funcs (`list[str]`): Rewards of its videos: built-in names or `module:function`.
        reward_weights (`list[float]`, *optional*): One each.
        structure_weight (`float`, *optional*, defaults to `0.2`): Of `structure_reward`, beside the videos' sum.
        height, width, num_frames (`int`): Of the videos.
        num_inference_steps (`int`, *optional*, defaults to `10`), guidance_scale (`float`, *optional*, defaults to
            `5.0`), negative_prompt (`str`, *optional*), seeds (`list[int]`, *optional*, defaults to `[0]`),
            video_batch_size (`int`, *optional*, defaults to `4`), video_cache_size (`int`, *optional*, defaults to
            `1024`), pipeline_kwargs (`dict`, *optional*): As in [`video_reward`].
        grpo (`dict`, *optional*): Arguments of [`~trl.GRPOConfig`].
        output_dir (`str`): Where the steps and the enhancer are saved. Required.
        seed (`int`, *optional*, defaults to `42`): Of both steps.
        resume_from_checkpoint (`str`, *optional*): `latest` skips finished steps and goes on from the last checkpoint.
        push_to_hub (`bool`, *optional*, defaults to `False`), hub_model_id (`str`, *optional*): Upload the enhancer.
    """

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The language model: Hub id, folder, or a saved enhancer (required)."}
    )
    torch_dtype: str | None = field(
        default=None,
        metadata={"help": "Precision of its weights.", "choices": ["float32", "bfloat16", "float16"]},
    )
    template: str | None = field(default=None, metadata={"help": "Built-in template, or a JSON file."})
    language: str | None = field(default=None, metadata={"help": "Language of the enhanced prompts."})
    max_new_tokens: int | None = field(default=None, metadata={"help": "Tokens of one answer. Default: 256."})
    chat_template_kwargs: str | None = field(default=None, metadata={"help": "JSON, for the model's chat template."})
    steps: list[str] = field(
        default_factory=lambda: ["sft", "grpo"],
        metadata={"help": "Which steps run: sft (on pairs), grpo (on videos).", "choices": ["sft", "grpo"]},
    )
    pairs_dataset_name: str | None = field(
        default=None, metadata={"help": "Pairs for sft, columns 'prompt' and 'enhanced': file, folder or Hub id."}
    )
    sft: str | None = field(default=None, metadata={"help": "Arguments of trl.SFTConfig, a mapping (JSON)."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Prompts for grpo: a .txt, .jsonl, .csv or .parquet file, a folder, a Hub id."}
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split of both datasets."})
    video_model_name_or_path: str | None = field(
        default=None, metadata={"help": "The frozen video model, for grpo: Hub id or folder of a pipeline."}
    )
    base_adapters: list[str] | None = field(
        default=None, metadata={"help": "LoRA adapters under which it generates: folders or Hub ids."}
    )
    reward_funcs: list[str] | None = field(
        default=None, metadata={"help": "Rewards of its videos: built-in names, or module:function."}
    )
    reward_weights: list[float] | None = field(default=None, metadata={"help": "One weight a reward."})
    structure_weight: float = field(default=0.2, metadata={"help": "Weight of the form of the prompt."})
    height: int | None = field(default=None, metadata={"help": "Of the videos."})
    width: int | None = field(default=None, metadata={"help": "Of the videos."})
    num_frames: int | None = field(default=None, metadata={"help": "Of the videos."})
    num_inference_steps: int = field(default=10, metadata={"help": "Sampling steps of the videos."})
    guidance_scale: float = field(default=5.0, metadata={"help": "Classifier-free guidance; 1 turns it off."})
    negative_prompt: str = field(default="", metadata={"help": "For guidance."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "One video a completion and seed."})
    video_batch_size: int = field(default=4, metadata={"help": "Videos generated at once."})
    video_cache_size: int = field(default=1024, metadata={"help": "Videos kept for prompts that come again."})
    pipeline_kwargs: str | None = field(default=None, metadata={"help": "Further pipeline arguments (JSON)."})
    grpo: str | None = field(default=None, metadata={"help": "Arguments of trl.GRPOConfig, a mapping (JSON)."})
    output_dir: str | None = field(default=None, metadata={"help": "Where everything is saved (required)."})
    seed: int = field(default=42, metadata={"help": "Of both steps."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "Skip finished steps, go on from the last checkpoint.", "choices": ["latest"]}
    )
    push_to_hub: bool = field(default=False, metadata={"help": "Upload the enhancer at the end."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Repository on the Hub; needed to upload."})

    def __post_init__(self):
        for name in ("sft", "grpo", "pipeline_kwargs", "chat_template_kwargs"):
            setattr(self, name, _mapping(name, getattr(self, name)))
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError("push_to_hub needs hub_model_id, such as me/wan-prompts")


def _mapping(name: str, text: str | dict | None) -> dict[str, Any]:
    if text is None or isinstance(text, dict):
        return text or {}
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} must be a mapping in YAML, or JSON on the command line: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a mapping, not {text}")
    return value


def make_parser():
    """All options of `vidtrl prompt`: [`PromptScriptArguments`], LoRA, launch."""
    from .parsing import VidtrlParser

    return VidtrlParser(
        [PromptScriptArguments, LoraArguments, LaunchArguments],
        prog="vidtrl prompt",
        description="Train a language model to write prompts for a video model: on pairs, then on videos. Options may "
        "also stand in a YAML file given with --config FILE; the command line wins.",
    )


def trl_config(kind: str, script_args: PromptScriptArguments, **defaults: Any):
    """
    The [`~trl.SFTConfig`] or [`~trl.GRPOConfig`] of a step.

    Args:
        kind (`str`): `"sft"` or `"grpo"`.
        script_args ([`PromptScriptArguments`]): With the user's arguments.
        **defaults: Arguments that the user's replace.

    Raises:
        [`UserError`]: If an argument is unknown, belongs elsewhere, or has a value that TRL refuses.
    """
    import trl

    from .errors import suggest

    cls, given = {"sft": trl.SFTConfig, "grpo": trl.GRPOConfig}[kind], getattr(script_args, kind)
    known = [f.name for f in dataclasses.fields(cls) if f.init]
    own = {"output_dir": "output_dir", "seed": "seed", "push_to_hub": "push_to_hub", "hub_model_id": "hub_model_id"}
    own |= {"reward_weights": "reward_weights and structure_weight", "chat_template_kwargs": "chat_template_kwargs"}
    for name in given:
        if name in own:
            raise UserError(f"{kind}.{name} is set by vidtrl: give {own[name]} beside {kind}, not inside")
        if name not in known:
            raise UserError(f"trl.{cls.__name__} has no argument {name!r}{suggest(name, known)}")
    values = {"output_dir": str(Path(script_args.output_dir) / kind), "seed": script_args.seed, **defaults, **given}
    try:
        return cls(**values)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"{kind}: {error}") from error


def load_enhancer(script_args: PromptScriptArguments, source: str, training: bool = True, use_peft: bool = False):
    """
    The enhancer that a step begins with.

    Args:
        script_args ([`PromptScriptArguments`]): Template, language and limits; what is not given keeps the saved values.
        source (`str`): Language model or saved enhancer.
        training (`bool`, *optional*, defaults to `True`): Load weights in the precision in which they are trained.
        use_peft (`bool`, *optional*, defaults to `False`): The weights stay frozen under an adapter.

    Returns:
        [`PromptEnhancer`]

    Raises:
        [`UserError`]: If there is no such model.
    """
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..prompts import PromptEnhancer
    from ..prompts.enhancer import CONFIG_FILE

    names = ("template", "language", "max_new_tokens")
    settings = {name: getattr(script_args, name) for name in names if getattr(script_args, name) is not None}
    if script_args.chat_template_kwargs:
        settings["chat_template_kwargs"] = script_args.chat_template_kwargs
    adapted = (Path(source) / "adapter_config.json").is_file()
    narrow = (use_peft or adapted or not training) and torch.accelerator.is_available()
    dtype = getattr(torch, script_args.torch_dtype or ("bfloat16" if narrow else "float32"))
    try:
        base = PeftConfig.from_pretrained(source).base_model_name_or_path if adapted else source
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the language model {source!r}: {error}") from error
    if adapted:
        model = PeftModel.from_pretrained(model, source, is_trainable=training)
    if (Path(source) / CONFIG_FILE).is_file():
        return PromptEnhancer.from_pretrained(source, model, tokenizer, **settings)
    return PromptEnhancer(model, tokenizer, **settings)


def train(argv: Sequence[str]) -> int:
    """Run the steps and save the enhancer. This is what every rank runs."""
    script_args, lora_args, _ = make_parser().parse_args_and_config(argv)
    require(script_args, "model_name_or_path", "output_dir", "steps")
    # all mistakes that can be seen, before anything is loaded
    rewards, pairs, prompts = [], None, None
    if "sft" in script_args.steps:
        require(script_args, "pairs_dataset_name")
        pairs = _dataset(script_args, script_args.pairs_dataset_name)
        trl_config("sft", script_args)
    if "grpo" in script_args.steps:
        require(
            script_args, "dataset_name", "video_model_name_or_path", "reward_funcs", "height", "width", "num_frames"
        )
        rewards = [resolve_reward(name) for name in script_args.reward_funcs]
        prompts = _dataset(script_args, script_args.dataset_name)
        trl_config("grpo", script_args)
    peft_config = lora_args.peft_config()
    if peft_config is not None:
        peft_config.task_type = "CAUSAL_LM"
        peft_config.target_modules = peft_config.target_modules or "all-linear"

    from peft import PeftModel

    output, source, enhancer = Path(script_args.output_dir), script_args.model_name_or_path, None
    for kind in [step for step in ("sft", "grpo") if step in script_args.steps]:
        target = output / kind
        if script_args.resume_from_checkpoint and (target / "trainer_state.json").is_file():
            print(f"{kind}: done before")
            source, enhancer = str(target), None
            continue
        enhancer = enhancer or load_enhancer(script_args, source, use_peft=peft_config is not None)
        config = None if isinstance(enhancer.model, PeftModel) else peft_config  # an adapter goes on being trained
        if kind == "sft":
            trainer = sft_trainer(script_args, enhancer, pairs, config)
        else:
            trainer = grpo_trainer(script_args, enhancer, prompts, rewards, config)
        _fit(trainer, enhancer, script_args, target)
    enhancer = enhancer or load_enhancer(script_args, source, training=False)
    if trainer_is_main():
        enhancer.save_pretrained(output)
        if script_args.push_to_hub:
            print(enhancer.push_to_hub(script_args.hub_model_id))
    return 0


def sft_trainer(script_args: PromptScriptArguments, enhancer, rows, peft_config=None):
    """The [`~trl.SFTTrainer`] of the first step."""
    import trl

    from ..prompts import pairs_dataset

    return trl.SFTTrainer(
        enhancer.model,
        trl_config("sft", script_args),
        train_dataset=pairs_dataset(enhancer, rows),
        processing_class=enhancer.tokenizer,
        peft_config=peft_config,
    )


def grpo_trainer(script_args: PromptScriptArguments, enhancer, rows, rewards: list, peft_config=None):
    """The [`~trl.GRPOTrainer`] of the second step, with the video model in its reward."""
    import trl

    from ..prompts import prompts_dataset, structure_reward, video_reward

    args = trl_config(
        "grpo",
        script_args,
        max_completion_length=enhancer.max_new_tokens,
        reward_weights=[1.0, script_args.structure_weight],
        chat_template_kwargs=enhancer.chat_template_kwargs or None,
    )
    video = video_reward(
        script_args.video_model_name_or_path,
        rewards,
        enhancer=enhancer,
        reward_weights=script_args.reward_weights,
        batch_size=script_args.video_batch_size,
        cache_size=script_args.video_cache_size,
        **{
            name: getattr(script_args, name)
            for name in ("height", "width", "num_frames", "num_inference_steps", "guidance_scale", "negative_prompt")
        },
        base_adapters=script_args.base_adapters,
        seeds=script_args.seeds,
        device=args.device,
        **script_args.pipeline_kwargs,
    )
    return trl.GRPOTrainer(
        enhancer.model,
        [video, structure_reward(enhancer)],
        args,
        train_dataset=prompts_dataset(enhancer, rows),
        processing_class=enhancer.tokenizer,
        peft_config=peft_config,
    )


def _fit(trainer, enhancer, script_args: PromptScriptArguments, target: Path) -> None:
    from transformers.trainer_utils import get_last_checkpoint

    from ..rewards import RewardError

    checkpoint = None
    if script_args.resume_from_checkpoint and target.is_dir():
        checkpoint = get_last_checkpoint(str(target))
        print(f"resuming from {checkpoint}" if checkpoint else f"no checkpoint in {target}: starting anew")
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        raise Interrupted(HINT) from None
    except RewardError as error:
        raise UserError(f"{error}{raised_in(error.__cause__)}") from error
    trainer.save_model(str(target))
    enhancer.model = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.is_world_process_zero():
        enhancer.save_settings(target)
    trainer.save_state()  # last: it says that the step is finished


def trainer_is_main() -> bool:
    """Whether this process is the one that writes."""
    from accelerate import PartialState

    return PartialState().is_main_process


def _dataset(script_args: PromptScriptArguments, name: str):
    return load_prompts(
        GRPOScriptArguments(dataset_name=name, dataset_train_split=script_args.dataset_train_split),
        script_args.dataset_train_split,
    )


def run(argv: Sequence[str]) -> int:
    """Entry point of `vidtrl prompt`."""
    return run_here_or_launch(__name__, train, argv)


if __name__ == "__main__":  # one rank of `accelerate launch`
    sys.exit(guarded(train, sys.argv[1:]))
