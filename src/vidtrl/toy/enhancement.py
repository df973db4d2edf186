"""Training the toy world's prompt enhancer with stock TRL: on pairs, then on what the videos show."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import trl
from peft import LoraConfig
from transformers import PrinterCallback, TrainerCallback

from ..prompts import PromptEnhancer, pairs_dataset, prompts_dataset, structure_reward, video_reward
from .measurement import measure
from .paraphrases import enhancer_path, intent_reward, paraphrases, read_paraphrase


@dataclass(frozen=True)
class EnhancementSettings:
    """
    Everything that decides what the toy's enhancer learns from.

    Args:
        num_pairs (`int`): Pairs of a paraphrase and its caption, of the tier `"pairs"`.
        num_prompts (`int`): Prompts without a caption, of the tier `"prompts"`.
        lora_r (`int`): Rank of the adapter that both steps train. The embeddings stay as they are, and with them what the
            model knows about words that the training does not contain.
        sft (`dict`): Arguments of [`~trl.SFTConfig`].
        grpo (`dict`): Arguments of [`~trl.GRPOConfig`]. The rewards are `video_reward` (the share of attributes that the
            user's words ask for and the video shows) and `structure_reward`.
        video (`dict`): Arguments of [`video_reward`].
    """

    num_pairs: int = 8
    num_prompts: int = 512
    lora_r: int = 32
    sft: dict[str, Any] = field(
        default_factory=lambda: {
            "max_steps": 60,
            "per_device_train_batch_size": 16,
            "learning_rate": 3e-3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 10,
            "weight_decay": 0.0,
        }
    )
    grpo: dict[str, Any] = field(
        default_factory=lambda: {
            "max_steps": 40,
            "per_device_train_batch_size": 64,
            "num_generations": 8,
            "max_completion_length": 8,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "temperature": 1.0,
            "reward_weights": [1.0, 0.2],
        }
    )
    video: dict[str, Any] = field(
        default_factory=lambda: {
            "height": 64,
            "width": 64,
            "num_frames": 17,
            "max_sequence_length": 16,
            "num_inference_steps": 10,
            "guidance_scale": 1.0,
            "seeds": (0, 1),
            "batch_size": 16,
        }
    )


HELD_OUT_SEED = 2_000_000  # initial noise of the clips that are measured; training uses others
QUIET = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 10,
}


def load_enhancer(source: str | os.PathLike | None = None, **settings: Any) -> PromptEnhancer:
    """
    An enhancer of the toy world, in float32, answering greedily.

    Args:
        source (`str` or `PathLike`, *optional*): Where a trained one was saved with `save_pretrained`; by default the
            shipped language model, untrained in its task.
        **settings: Arguments of [`PromptEnhancer`] that replace the saved ones.

    Returns:
        [`PromptEnhancer`]
    """
    enhancer = PromptEnhancer.from_pretrained(source or enhancer_path(), **settings)
    enhancer.model.float()
    return enhancer


def fine_tune(
    enhancer: PromptEnhancer,
    output_dir: str | os.PathLike,
    seed: int = 0,
    settings: EnhancementSettings | None = None,
    callbacks: list[TrainerCallback] | None = None,
    **options: Any,
) -> trl.SFTTrainer:
    """
    Supervised fine-tuning on pairs, in place.

    Args:
        enhancer ([`PromptEnhancer`]): From [`load_enhancer`].
        output_dir (`str` or `PathLike`): For the trainer.
        seed (`int`, *optional*, defaults to `0`): Of pairs and training.
        settings ([`EnhancementSettings`], *optional*): What to learn from.
        callbacks (`list[TrainerCallback]`, *optional*): Such as one that shows progress.
        **options: Further arguments of [`~trl.SFTConfig`]. With `disable_tqdm=True` nothing is printed.

    Returns:
        `trl.SFTTrainer`: Trained.
    """
    settings = settings or EnhancementSettings()
    rows = [{"prompt": r["prompt"], "enhanced": r["caption"]} for r in paraphrases(settings.num_pairs, "pairs", seed)]
    trainer = trl.SFTTrainer(
        enhancer.model,
        trl.SFTConfig(output_dir=str(output_dir), seed=seed, **{**QUIET, **settings.sft, **options}),
        train_dataset=pairs_dataset(enhancer, rows),
        processing_class=enhancer.tokenizer,
        callbacks=callbacks,
        peft_config=LoraConfig(
            r=settings.lora_r, lora_alpha=settings.lora_r, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    return _train(trainer, enhancer)


def reinforce(
    enhancer: PromptEnhancer,
    pipe: Any,
    output_dir: str | os.PathLike,
    seed: int = 0,
    settings: EnhancementSettings | None = None,
    reward: video_reward | None = None,
    callbacks: list[TrainerCallback] | None = None,
    resume_from_checkpoint: str | None = None,
    **options: Any,
) -> trl.GRPOTrainer:
    """
    GRPO on prompts without captions, in place: each completion is rendered with the frozen pipeline.

    Args:
        enhancer ([`PromptEnhancer`]): After [`fine_tune`].
        pipe (`DiffusionPipeline`): The frozen generator.
        output_dir, seed, settings, callbacks, **options: As in [`fine_tune`], of [`~trl.GRPOConfig`].
        reward ([`video_reward`], *optional*): From [`make_video_reward`]; one that has rendered before, for the same
            generator, does not render those videos again.
        resume_from_checkpoint (`str`, *optional*): Folder of a checkpoint to go on from. The enhancer must be as it was when
            that run began.

    Returns:
        `trl.GRPOTrainer`: Trained. Its `reward_funcs[0]` is the [`video_reward`] with its cache.
    """
    settings = settings or EnhancementSettings()
    rows = [{"prompt": row["prompt"]} for row in paraphrases(settings.num_prompts, "prompts", seed)]
    if reward is None:
        reward = make_video_reward(pipe, enhancer, settings)
    reward.enhancer = enhancer
    trainer = trl.GRPOTrainer(
        enhancer.model,
        [reward, structure_reward(enhancer)],
        trl.GRPOConfig(output_dir=str(output_dir), seed=seed, **{**QUIET, **settings.grpo, **options}),
        train_dataset=prompts_dataset(enhancer, rows),
        processing_class=enhancer.tokenizer,
        callbacks=callbacks,
    )
    return _train(trainer, enhancer, resume_from_checkpoint)


def _train(trainer, enhancer: PromptEnhancer, resume_from_checkpoint: str | None = None):
    if trainer.args.disable_tqdm:
        trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    enhancer.model = trainer.model
    return trainer


def make_video_reward(
    pipe: Any, enhancer: PromptEnhancer, settings: EnhancementSettings | None = None, **options: Any
) -> video_reward:
    """
    The reward of [`reinforce`].

    Args:
        pipe (`DiffusionPipeline`): The frozen generator.
        enhancer ([`PromptEnhancer`]): What is trained.
        settings ([`EnhancementSettings`], *optional*): Its `video` arguments are used.
        **options: Arguments of [`video_reward`] that replace them.
    """
    settings = settings or EnhancementSettings()
    return video_reward(pipe, intent_reward, enhancer=enhancer, **{**settings.video, **options})


def right_clips(
    reward: video_reward, prompts: Sequence[str], texts: Sequence[str], first_seed: int = HELD_OUT_SEED
) -> list[bool]:
    """
    Whether each clip shows colour, shape and direction that its user's words ask for.

    Args:
        reward ([`video_reward`]): Renders, and keeps what it has rendered.
        prompts (`Sequence[str]`): What users wrote; each names all three.
        texts (`Sequence[str]`): What to generate from, one a prompt.
        first_seed (`int`, *optional*, defaults to `2_000_000`): Prompt number i has the initial noise of seed
            `first_seed + i`, whatever its text.

    Returns:
        `list[bool]`: One a prompt.
    """
    videos = reward.render([(text, first_seed + i) for i, text in enumerate(texts)])
    return [
        all(getattr(seen, attribute) == value for attribute, value in read_paraphrase(prompt).items())
        for prompt, seen in zip(prompts, map(measure, videos), strict=True)
    ]
