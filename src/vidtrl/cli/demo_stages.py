"""The trainings of `vidtrl demo`. Each does only what its files do not hold yet."""

import json
import shutil
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from transformers import TrainerCallback

from .demo_settings import DemoSettings
from .errors import Interrupted


class PlainProgress(TrainerCallback):
    """
    About ten lines a training, for output that goes to a file, where a progress bar is one line for every step.

    Args:
        console (`rich.console.Console`): Where to print.
        lines (`int`, *optional*, defaults to `10`): How many.
    """

    def __init__(self, console: Console, lines: int = 10):
        self.console, self.lines = console, lines
        self.start = (0.0, 0)
        self.shown: dict[str, float] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter(), state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.shown |= {name: logs[name] for name in ("loss", "eval_loss", "reward", "eval_reward") if name in logs}

    def on_step_end(self, args, state, control, **kwargs):
        step, total = state.global_step, state.max_steps
        if step * self.lines // total == (step - 1) * self.lines // total:
            return
        seconds, done = time.perf_counter() - self.start[0], step - self.start[1]
        text = "".join(f", {name} {value:.4g}" for name, value in self.shown.items())
        left = seconds / done * (total - step)
        self.console.print(f"      step {step}/{total}{text}, {seconds:.0f} s, {left:.0f} s left", highlight=False)


def write_clips(output: Path, seed: int, settings: DemoSettings) -> None:
    """Two VideoFolder datasets of clean clips; they share no clip."""
    from ..toy import write_dataset

    for split, num_clips, clip_seed in (
        ("train", settings.num_clips, seed),
        ("eval", settings.num_eval_clips, seed + 500),
    ):
        target = output / "data" / split
        if target.exists():
            continue
        partial = target.with_name(split + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        write_dataset(partial, num_clips=num_clips, quality="clean", seed=clip_seed, fps=settings.fps)
        partial.rename(target)


def is_trained(target: Path) -> bool:
    """Whether the training that writes into this folder is complete."""
    return (target / "trainer_state.json").is_file()  # written last


def fine_tune(output: Path, seed: int, base: str, settings: DemoSettings, console: Console):
    """
    SFT: what a user's own script would contain. Leaves `sft/pytorch_lora_weights.safetensors`.

    Returns:
        [`VideoSFTTrainer`] or `None`: The trainer, if there was anything left to train.
    """
    target = output / "sft"
    if is_trained(target):
        console.print("      done before")
        return None
    from datasets import load_dataset
    from peft import LoraConfig

    from ..trainer import VideoSFTConfig, VideoSFTTrainer

    splits = {
        split: load_dataset(str(output / "data" / split), split="train", cache_dir=str(output / "cache" / "datasets"))
        for split in ("train", "eval")
    }
    args = VideoSFTConfig(
        **_common(target, seed, settings, console),
        fps=settings.fps,
        cache_dir=str(output / "cache" / "latents"),
        **settings.sft,
    )
    trainer = VideoSFTTrainer(
        model=base,
        args=args,
        train_dataset=splits["train"],
        eval_dataset=splits["eval"],
        peft_config=LoraConfig(r=settings.lora_r, lora_alpha=settings.lora_r),
    )
    return _train(trainer, target, console)


def load_fused(base: str, *adapters: Path):
    """
    The base with adapters merged into its weights, in memory: for generating, where nothing is trained. Trainings stack them
    (`base_adapters`).

    Args:
        base (`str`): Folder of the base pipeline.
        *adapters (`Path`): Folders with `pytorch_lora_weights.safetensors`.

    Returns:
        `DiffusionPipeline`: In float32, without adapter layers.
    """
    import torch
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(base, dtype=torch.float32)
    for adapter in adapters:
        pipe.load_lora_weights(adapter)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    return pipe


def reinforce(output: Path, seed: int, base: str, settings: DemoSettings, console: Console):
    """
    GRPO: a second adapter, trained on rewards on top of the first. Leaves `grpo/pytorch_lora_weights.safetensors`.

    Returns:
        [`VideoGRPOTrainer`] or `None`: The trainer, if there was anything left to train.
    """
    target = output / "grpo"
    if is_trained(target):
        console.print("      done before")
        return None
    from datasets import Dataset
    from peft import LoraConfig

    from ..toy import captions
    from ..trainer import VideoGRPOConfig, VideoGRPOTrainer

    trainer = VideoGRPOTrainer(
        model=base,
        reward_funcs=list(settings.rewards),
        eval_reward_funcs=list(settings.watched_rewards),
        # the SFT stage has proven this pipeline
        args=VideoGRPOConfig(
            **_common(target, seed, settings, console),
            check_model=False,
            base_adapters=[str(output / "sft")],
            **settings.grpo,
        ),
        train_dataset=Dataset.from_dict({"prompt": captions()}),
        eval_dataset=Dataset.from_dict({"prompt": spread(captions(), settings.num_eval_prompts)}),
        peft_config=LoraConfig(r=settings.lora_r, lora_alpha=settings.lora_r),
    )
    return _train(trainer, target, console)


def train_enhancer(output: Path, seed: int, base: str, settings: DemoSettings, console: Console):
    """
    Prompt enhancement: a language model learns, with stock TRL, to write what the video model after GRPO understands; first
    from pairs, then from the videos that come of what it writes. Leaves `prompt/`, a saved [`PromptEnhancer`].

    Returns:
        `trl.GRPOTrainer` or `None`: The trainer of the second step, if there was anything left to train.
    """
    target = output / "prompt"
    if is_trained(target):
        console.print("      done before")
        return None
    from ..toy import enhancement

    learning = enhancement_settings(settings)
    plain = not console.is_terminal
    callbacks = [PlainProgress(console)] if plain else None
    checkpoint = _last_checkpoint(target, console)
    enhancer = enhancement.load_enhancer()
    pipe = load_fused(base, output / "sft", output / "grpo")
    pipe.set_progress_bar_config(disable=True)
    try:
        # a few seconds, and the same adapter each time: it goes without checkpoints
        enhancement.fine_tune(enhancer, target / "sft", seed, learning, disable_tqdm=plain)
        enhancer.save_pretrained(target / "sft")
        options = {"save_strategy": "steps", "save_total_limit": 2, "resume_from_checkpoint": checkpoint}
        trainer = enhancement.reinforce(
            enhancer, pipe, target, seed, learning, callbacks=callbacks, disable_tqdm=plain, **options
        )
    except KeyboardInterrupt:
        raise Interrupted("the same command goes on from the last checkpoint") from None
    enhancer.save_pretrained(target)
    trainer.save_state()
    return trainer


def enhancement_settings(settings: DemoSettings):
    """The demo's [`~toy.enhancement.EnhancementSettings`]."""
    from ..toy.enhancement import EnhancementSettings

    usual = EnhancementSettings()
    given = {k: getattr(usual, k) | v if isinstance(v, dict) else v for k, v in settings.prompt.items()}
    return EnhancementSettings(**given)


def distil(output: Path, seed: int, base: str, settings: DemoSettings, console: Console):
    """
    Distillation: a third adapter, with which few steps without guidance do. Leaves `distill/`, with its scheduler.

    Returns:
        [`VideoDistillTrainer`] or `None`: The trainer, if there was anything left to train.
    """
    target, below = output / "distill", [output / "sft", output / "grpo"]
    if is_trained(target):
        console.print("      done before")
        return None
    from datasets import Dataset
    from peft import LoraConfig

    from ..toy import captions
    from ..trainer import VideoDistillConfig, VideoDistillTrainer

    common = {**_common(target, seed, settings, console), "check_model": False, "eval_on_start": False}
    common["cache_dir"] = str(output / "cache" / "latents")
    trainer = VideoDistillTrainer(
        model=base,
        args=VideoDistillConfig(**{**common, **settings.distill}, base_adapters=[str(adapter) for adapter in below]),
        train_dataset=Dataset.from_dict({"prompt": captions()}),
        peft_config=LoraConfig(r=settings.lora_r, lora_alpha=settings.lora_r),
    )
    return _train(trainer, target, console)


def _common(target: Path, seed: int, settings: DemoSettings, console: Console) -> dict:
    """The arguments that both trainings share."""
    return {
        "output_dir": str(target),
        "seed": seed,
        "height": settings.height,
        "width": settings.width,
        "num_frames": settings.num_frames,
        "max_sequence_length": settings.max_sequence_length,
        "eval_strategy": "steps",
        "eval_on_start": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,  # the figures in the docs are the CPU's, and the toy is too small for a GPU to help
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": not console.is_terminal,
    }


def _train(trainer, target: Path, console: Console):
    """Train from the last checkpoint on, if there is one, and save."""
    if not console.is_terminal:
        trainer.add_callback(PlainProgress(console))
    checkpoint = _last_checkpoint(target, console)
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except KeyboardInterrupt:
        raise Interrupted("the same command goes on from the last checkpoint") from None
    trainer.save_model(str(target))
    trainer.save_state()
    return trainer


def _last_checkpoint(target: Path, console: Console) -> str | None:
    from transformers.trainer_utils import get_last_checkpoint

    checkpoint = get_last_checkpoint(str(target)) if target.is_dir() else None
    if checkpoint:
        console.print(f"      going on from {escape(Path(checkpoint).name)}")
    return checkpoint


def spread(items: list, count: int) -> list:
    """So many of the items, evenly over all of them."""
    return [items[i * len(items) // count] for i in range(count)]


def write_json(path: Path, data) -> None:
    """Write a JSON file; the name appears when the file is complete."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(data, indent=1))
    partial.replace(path)
