"""What a GRPO run refuses or warns of, with the fix in the message."""

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers.utils import logging

from ..models import VideoModel
from .grpo_config import VideoGRPOConfig
from .grpo_recipes import DEFAULTS, RECIPES


logger = logging.get_logger(__name__)

FULL_RATE = 1e-5  # the rate of the recipe for all weights, DanceGRPO's


def check_arguments(args: VideoGRPOConfig, train_dataset: Any, peft_config: Any) -> None:
    """
    Before anything is loaded; a generation of few videos is a warning, and so is an adapter's learning rate for all weights.

    Args:
        args, train_dataset, peft_config: As the trainer takes them.

    Raises:
        `TypeError`, `ValueError`: If they do not fit.
    """
    if not isinstance(args, VideoGRPOConfig):
        raise TypeError(f"args must be a VideoGRPOConfig, not {type(args).__name__}")
    if train_dataset is None:
        raise ValueError("train_dataset is required: a datasets.Dataset with the column prompt")
    if isinstance(peft_config, LoraConfig) and peft_config.lora_dropout:
        raise ValueError("lora_dropout must be 0: rollout and update have to see the same policy")
    if args.num_prompts * args.num_generations < 64:
        logger.warning(
            f"{args.num_prompts} prompts x {args.num_generations} generations = "
            f"{args.num_prompts * args.num_generations} videos per generation: below 64, rewards often do not rise. "
            "Raise per_device_train_batch_size, gradient_accumulation_steps or steps_per_generation"
        )
    rate = (DEFAULTS | RECIPES[args.recipe])["learning_rate"]
    if peft_config is None and rate > FULL_RATE and args.learning_rate == rate:
        logger.warning(
            f"learning_rate={rate:g} is the recipe's for an adapter, and without peft_config all weights are trained: pass "
            f"peft_config=LoraConfig(r=16, lora_alpha=32), or set learning_rate to {FULL_RATE:g} or less"
        )


def check_denoisers(args: VideoGRPOConfig, model: VideoModel, trained: Sequence[str], swapped: bool) -> None:
    """
    Refuse what the model's denoisers do not allow.

    Args:
        args ([`VideoGRPOConfig`]), model ([`VideoModel`]): The run's.
        trained (`Sequence[str]`): Names of the denoisers in training.
        swapped (`bool`): Of two experts only one is on the device.

    Raises:
        `ValueError`: If graphs would be kept of a denoiser that leaves the device, or guidance be applied twice.
    """
    if args.reuse_rollout and len(model.denoisers) > 1 and (len(trained) > 1 or swapped):
        raise ValueError(
            "reuse_rollout keeps graphs across calls of both experts: set reuse_rollout=False, or train one expert "
            "(experts='high' or 'low') and keep both on the device (offload_experts=False)"
        )
    if args.guidance_scale != 1.0 and model.denoisers[trained[0]].config.get("guidance_embeds"):
        raise ValueError(
            f"guidance is distilled into this {type(model.pipe).__name__}: set guidance_scale=1.0, or every step "
            "pays for a second branch that the model was not trained for"
        )


def check_on_policy(deviation: float, args: VideoGRPOConfig, denoiser: nn.Module) -> None:
    """
    Nothing has been learned yet from a generation, so the update must see what the rollout saw.

    Args:
        deviation (`float`): Of the policy ratio from 1, at most, before the first update.
        args ([`VideoGRPOConfig`]): The run's.
        denoiser (`nn.Module`): That is trained.

    Raises:
        `ValueError`: If it is above what rounding explains: 1e-6 in float32, 1e-3 below.
    """
    exact = denoiser.dtype == torch.float32 and not (args.bf16 or args.fp16)
    limit = 1e-6 if exact else 1e-3
    if deviation > limit:
        raise ValueError(
            f"before the first update of a generation the policy ratio deviates from 1 by {deviation:.1e} (limit "
            f"{limit:.0e}): the update does not see the policy that sampled. Look for dropout, a stateful hook, or an "
            "autocast that differs between rollout and update"
        )
