"""What a GRPO run decides by itself where its configuration leaves it open, and says in the log (`log_level="info"`)."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers.utils import logging

from ..diffusion.step_schedules import Plan
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


def keep_graphs(trainer: "VideoGRPOTrainer", plans: dict[int, Plan], members: Sequence[range]) -> bool:
    """
    Whether the graphs of a generation's stochastic steps have room until its update. All processes choose alike.

    [`choose_reuse`] keeps no more activations than the update has, but they are there while videos are decoded. On an
    accelerator that is tried before the first rollout. If there is no room, the update has a forward of its own.

    Args:
        trainer ([`VideoGRPOTrainer`]): About to sample its first generation; `batch_guidance` is chosen.
        plans (`dict[int, Plan]`): Of the groups that this process has a part in, and the conditions of.
        members (`Sequence[range]`): By group, those that it samples.
    """
    args = trainer.args
    if not trainer.reuse_rollout or args.device.type not in ("cuda", "xpu"):
        return trainer.reuse_rollout
    group, rows = next(iter(plans)), kept_rows(plans, members)
    needed, free = try_kept_graphs(trainer, group, rows), free_memory(args.device) - optimizer_memory(trainer)
    fits = needed is not None and needed <= HEADROOM * free
    everywhere = bool(trainer.accelerator.gather(torch.tensor([fits], device=args.device)).all())
    if not everywhere:
        found = "more than there is" if needed is None else f"{needed / 2**30:.2f} GiB"
        where = "" if not fits else " here, but another process has no room"
        logger.info(
            "The update has a forward of its own (reuse_rollout=False): to decode videos beside the rollout's graphs takes "
            f"{found}, and {free / 2**30:.2f} GiB are free for it{where}."
        )
    return everywhere


def kept_rows(plans: dict[int, Plan], members: Sequence[range]) -> int:
    """The latents at which these members of these groups draw noise: so many forwards have a graph."""
    return sum(
        any(member in members[group] for child in children for member in child)
        for group, plan in plans.items()
        for *_, children in plan.decisions()
    )


def try_one_call(trainer: "VideoGRPOTrainer", group: int) -> int | None:
    """
    The peak of a rollout's largest forward and of an update's forward and backward, with both branches in one call.

    Gradients are thrown away, and no random number is drawn.

    Args:
        trainer ([`VideoGRPOTrainer`]), group (`int`): As in [`choose_batch_guidance`].

    Returns:
        `int`, *optional*: Bytes above what is allocated now; `None` if memory ran out.
    """
    args, chosen = trainer.args, trainer.batch_guidance
    rows = args.per_device_train_batch_size

    def work() -> None:
        with torch.no_grad():
            _velocity(trainer, group, args.rollout_batch_size or rows)
        torch.clear_autocast_cache()  # the casts of the weights have no graph
        _backward(trainer, [_velocity(trainer, group, rows)])

    trainer.batch_guidance = True
    try:
        return _peak(trainer, work)
    finally:
        trainer.batch_guidance = chosen


def try_kept_graphs(trainer: "VideoGRPOTrainer", group: int, rows: int) -> int | None:
    """
    The peak of a rollout that keeps the graphs of so many latents, decodes its videos, and of the backward pass after it.

    Gradients are thrown away, and the random state is left as it was.

    Args:
        trainer ([`VideoGRPOTrainer`]), group (`int`): As in [`choose_batch_guidance`].
        rows (`int`): How many.

    Returns:
        `int`, *optional*: Bytes above what is allocated now; `None` if memory ran out.
    """
    args = trainer.args
    size = args.rollout_batch_size or args.per_device_train_batch_size

    def work() -> None:
        torch.clear_autocast_cache()
        kept = [_velocity(trainer, group, min(size, rows - start)) for start in range(0, rows, size)]
        clips = torch.zeros(args.vae_batch_size, *trainer.latent_shape, device=args.device)
        with torch.no_grad(), torch.autocast(args.device.type, enabled=False):
            trainer.video_model.decode(clips, chunk_size=args.vae_batch_size)
        _backward(trainer, kept)

    devices = [args.device] if args.device.type != "cpu" else []
    with torch.random.fork_rng(devices, device_type=args.device.type if devices else "cuda"):  # of VAEs that draw
        return _peak(trainer, work)


def _velocity(trainer: "VideoGRPOTrainer", group: int, number: int) -> torch.Tensor:
    x = torch.zeros(number, *trainer.latent_shape, device=trainer.args.device)
    sigma = float(trainer.grid[trainer._own_steps[0]])
    return trainer._velocity(trainer._unwrapped(), x, torch.full((number,), sigma), [group] * number)


def _backward(trainer: "VideoGRPOTrainer", velocities: list[torch.Tensor]) -> None:
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    torch.autograd.grad(sum(v.sum() for v in velocities), parameters, allow_unused=True)


def _peak(trainer: "VideoGRPOTrainer", work: Callable[[], None]) -> int | None:
    """Bytes that some work allocates at most, 0 where torch does not count them; `None` if memory ran out."""
    device, before = trainer.args.device, 0
    stats, memory = device.type in ("cuda", "xpu"), torch.get_device_module(device)
    if stats:
        before = memory.memory_allocated(device)
        memory.reset_peak_memory_stats(device)
    try:
        with trainer.compute_loss_context_manager():
            work()
    except torch.OutOfMemoryError:
        return None
    return memory.max_memory_allocated(device) - before if stats else 0


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated: what the device has free, and what torch's allocator holds in reserve."""
    memory = torch.get_device_module(device)
    reserve = memory.memory_reserved(device) - memory.memory_allocated(device)
    return memory.mem_get_info(device)[0] + reserve


def optimizer_memory(trainer: "VideoGRPOTrainer") -> int:
    """Bytes of gradients' moments that the first update will add: two for each trained value, as AdamW has them."""
    return 2 * sum(p.numel() * p.element_size() for p in trainer.model.parameters() if p.requires_grad)
