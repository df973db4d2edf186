"""What a GRPO run decides by itself where its configuration leaves it open, and says in the log (`log_level="info"`)."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers.utils import logging

from .grpo_config import VideoGRPOConfig


if TYPE_CHECKING:
    from .grpo_trainer import VideoGRPOTrainer


logger = logging.get_logger(__name__)

CHOICES = "grpo_choices.json"
ONE_STEP = ("single", "merged", "branch", "granular")  # schedules in which each video draws noise at one step
HEADROOM = 0.9  # of the free memory: allocators lose some to fragmentation, and clips differ in their text


def save_choices(directory: Path, **chosen: bool | None) -> None:
    """Write into a checkpoint what was chosen where the configuration left it open."""
    (directory / CHOICES).write_text(json.dumps(chosen))


def load_choices(directory: Path) -> dict[str, bool | None]:
    """Read back what [`save_choices`] wrote, if it did."""
    chosen = directory / CHOICES
    return json.loads(chosen.read_text()) if chosen.is_file() else {}


def choose_reuse(
    args: VideoGRPOConfig, *, own_reference: bool, num_denoisers: int, sharded: bool, dropout: bool
) -> bool:
    """
    Whether the update uses the rollout's forward instead of one of its own.

    Left open (`reuse_rollout=None`), it does where that is exact and keeps no more activations than one micro-batch has.

    Args:
        args ([`VideoGRPOConfig`]): The run's.
        own_reference (`bool`): The divergence is from weights that are swapped in.
        num_denoisers (`int`): Of the model, whether or not all of them are trained.
        sharded (`bool`): Training runs under FSDP or DeepSpeed.
        dropout (`bool`): The denoiser has any; a second forward then tells that rollouts are not what users will sample.

    Raises:
        `ValueError`: `reuse_rollout=True` where it cannot be exact; says why and what to set.
    """
    if args.reuse_rollout and own_reference:
        raise ValueError(
            "reuse_rollout keeps a graph over the weights, which a reference of its own (full fine-tuning or "
            "sync_ref_model, with beta > 0) takes the place of in between: set reuse_rollout=False or beta=0"
        )
    if args.reuse_rollout and sharded:
        raise ValueError(
            "reuse_rollout keeps graphs of the rollout until the update, over weights that FSDP and DeepSpeed gather for each "
            "call and free after it: set reuse_rollout=False, or train with DDP"
        )
    if args.reuse_rollout is not None:
        return args.reuse_rollout
    one_step = args.sde_schedule in ONE_STEP or (args.sde_schedule in ("random", "window") and args.sde_steps == 1)
    obstacles = {
        f"loss_type={args.loss_type!r} learns from finished videos, noised again": args.loss_type in ("nft", "awm"),
        "a generation is cut into several micro-steps or used several times": args.steps_per_generation > 1
        or args.num_iterations > 1,
        "the reference takes the place of the weights in between": own_reference,
        "the model has several denoisers, or weights are sharded": num_denoisers > 1 or sharded,
        "the denoiser has dropout": dropout,
        "each video draws noise at several steps, whose graphs would be kept together": not one_step,
    }
    reason = next((text for text, holds in obstacles.items() if holds), None)
    logger.info(
        "The update uses the rollout's forward of each stochastic step (reuse_rollout)."
        if reason is None
        else f"The update has a forward of its own (reuse_rollout=False): {reason}."
    )
    return reason is None


def choose_batch_guidance(trainer: "VideoGRPOTrainer", group: int) -> bool:
    """
    Whether both branches of guidance go through the denoiser in one call. All processes choose alike.

    On a CPU they do: one call is the faster one, and memory is not what limits a run there. On an accelerator one update
    is tried: they do if its peak and the optimizer's state to come fit into what is free now.

    Args:
        trainer ([`VideoGRPOTrainer`]): About to sample its first generation.
        group (`int`): A group of which it has the conditions.
    """
    args = trainer.args
    if args.guidance_scale == 1.0:
        return False
    if args.device.type == "cpu":
        return True
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        # a process that runs out of memory alone would leave the others waiting for its part of the weights
        fits, reason = False, "with sharded weights it is not tried"
    elif args.device.type not in ("cuda", "xpu"):
        fits, reason = False, f"torch reports no peak memory of {args.device.type}"
    else:
        needed, free = try_one_call(trainer, group), free_memory(args.device) - optimizer_memory(trainer)
        fits = needed is not None and needed <= HEADROOM * free
        found = "more than there is" if needed is None else f"{needed / 2**30:.2f} GiB"
        reason = f"an update in one call takes {found}, and {free / 2**30:.2f} GiB are free for it"
    everywhere = bool(trainer.accelerator.gather(torch.tensor([fits], device=args.device)).all())
    calls = "one call" if everywhere else "two calls"
    where = "" if everywhere == fits else "; another process has no room"
    logger.info(f"Both branches of guidance in {calls} (batch_guidance={everywhere}): {reason}{where}.")
    return everywhere


def try_one_call(trainer: "VideoGRPOTrainer", group: int) -> int | None:
    """
    The peak of a rollout's largest forward and of an update's forward and backward, with both branches in one call.

    Gradients are thrown away, and no random number is drawn.

    Args:
        trainer ([`VideoGRPOTrainer`]), group (`int`): As in [`choose_batch_guidance`].

    Returns:
        `int`, *optional*: Bytes above what is allocated now; `None` if memory ran out.
    """
    args, memory = trainer.args, torch.get_device_module(trainer.args.device)
    stats = trainer.args.device.type in ("cuda", "xpu")
    rows = args.per_device_train_batch_size
    sigma = float(trainer.grid[trainer._own_steps[0]])
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    before, chosen = 0, trainer.batch_guidance
    if stats:
        before = memory.memory_allocated(args.device)
        memory.reset_peak_memory_stats(args.device)

    def velocity(number: int) -> torch.Tensor:
        x = torch.zeros(number, *trainer.latent_shape, device=args.device)
        return trainer._velocity(trainer._unwrapped(), x, torch.full((number,), sigma), [group] * number)

    trainer.batch_guidance = True
    try:
        with trainer.compute_loss_context_manager():
            with torch.no_grad():
                velocity(args.rollout_batch_size or rows)
            torch.clear_autocast_cache()  # the casts of the weights have no graph
            torch.autograd.grad(velocity(rows).sum(), parameters, allow_unused=True)
    except torch.OutOfMemoryError:
        return None
    finally:
        trainer.batch_guidance = chosen
    return memory.max_memory_allocated(args.device) - before if stats else 0


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated: what the device has free, and what torch's allocator holds in reserve."""
    memory = torch.get_device_module(device)
    reserve = memory.memory_reserved(device) - memory.memory_allocated(device)
    return memory.mem_get_info(device)[0] + reserve


def optimizer_memory(trainer: "VideoGRPOTrainer") -> int:
    """Bytes of gradients' moments that the first update will add: two for each trained value, as AdamW has them."""
    return 2 * sum(p.numel() * p.element_size() for p in trainer.model.parameters() if p.requires_grad)
