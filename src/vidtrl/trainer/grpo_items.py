"""What the micro-batches of GRPO train on, and how those of a generation are shared out over updates and processes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import Tensor

from ..models import VideoModel
from ..rollout.branching import Decision
from .grpo_config import VideoGRPOConfig


@dataclass
class Item:
    """What one row of a micro-batch trains on: a decision, or (NFT, AWM) a video at one noise level."""

    group: int
    advantages: Tensor  # (M,) of the decision's children, or (1,)
    weight: Tensor  # (M,) in the loss; all of an optimizer step sum to 1 over all processes
    kl_weight: Tensor
    decision: Decision | None = None
    x0: Tensor | None = None  # (C, f, h, w)
    noise: Tensor | None = None
    sigma: float = 0.0
    v_old: Tensor | None = None
    old_log_prob: Tensor | None = None

    @property
    def step(self) -> int | None:
        """Index of the sampling step."""
        return None if self.decision is None else self.decision.step

    @property
    def noise_level(self) -> float:
        """The sigma at which it is trained."""
        return self.sigma if self.decision is None else self.decision.sigma


def noised(
    model: VideoModel, latent_shape: tuple[int, ...], number: int, times: tuple[float, float], source: torch.Generator
) -> Iterator[tuple[float, Tensor]]:
    """
    Noise levels and noise at which a finished video is trained on, stratified over the training times.

    Args:
        model ([`VideoModel`]): Its `training_sigma` turns times u into noise levels.
        latent_shape (`tuple[int, ...]`): Of the video.
        number (`int`): Of noise levels.
        times (`tuple[float, float]`): The smallest and largest u.
        source (`torch.Generator`): Of both; on the CPU.
    """
    low, high = times
    for j in range(number):
        u = low + (high - low) * (j + torch.rand(1, generator=source)) / number
        yield (
            model.training_sigma(u, latent_shape).clamp(min=1e-4).item(),
            torch.randn(latent_shape, generator=source),
        )


def micro_batches(items: Sequence[Item], size: int, kind: Callable[[Item], tuple]) -> list[list[Item]]:
    """
    Micro-batches of at most so many items, each of one kind.

    Args:
        items (`Sequence[Item]`): In their order.
        size (`int`): Of the largest.
        kind (`Callable`): What items of a micro-batch have in common, to sort them by.
    """
    return [
        mine[i : i + size]
        for wanted in sorted({kind(item) for item in items})
        for mine in [[item for item in items if kind(item) == wanted]]
        for i in range(0, len(mine), size)
    ]


def share_out(
    items: list[Item],
    args: VideoGRPOConfig,
    accelerator: Accelerator,
    batches_of: Callable[[list[Item]], list[list[Item]]],
) -> list[list[list[Item]]]:
    """
    Cut a generation into micro-steps and micro-batches, equally many on all processes, and set the loss weights.

    Items whose advantages are all zero are left out; a process that runs out of items repeats one with weight 0.

    Args:
        items (`list[Item]`): Of this process, at least one. Weights are those of their sampling steps; those that are used
            become shares of their update's loss, in place.
        args ([`VideoGRPOConfig`]): `steps_per_generation`, `gradient_accumulation_steps` and `beta` count.
        accelerator (`Accelerator`): All processes must call this.
        batches_of (`Callable`): Cuts the items of a micro-step into micro-batches.

    Returns:
        `list[list[list[Item]]]`: By micro-step and micro-batch.
    """

    def count(item: Item) -> int:  # the children that teach something
        return int(((item.weight > 0) & ((item.advantages != 0) | (args.beta > 0))).sum())

    useful = [item for item in items if count(item)]
    number = args.steps_per_generation
    if number > args.gradient_accumulation_steps:
        useful.sort(key=lambda item: item.group)  # several updates share out the videos, not their steps
    bounds = [round(i * len(useful) / number) for i in range(number + 1)]
    slices = [useful[low:high] for low, high in zip(bounds[:-1], bounds[1:], strict=True)]
    batches = [batches_of(part) for part in slices]

    per_update = args.gradient_accumulation_steps
    counts = torch.zeros(2, number, dtype=torch.float64)
    for i, part in enumerate(slices):
        counts[0, i - i % per_update] += sum(map(count, part))
        counts[1, i] = len(batches[i])
    everywhere = accelerator.gather(counts[None].to(args.device)).cpu()  # (processes, 2, number)
    children, longest = everywhere[:, 0].sum(0), everywhere[:, 1].amax(0).long().tolist()
    for end in range(per_update - 1, number, per_update):
        # processes exchange gradients with the last slice of an update: it must not be empty if others are not
        if any(longest[end + 1 - per_update : end]):
            longest[end] = max(1, longest[end])
    for i, part in enumerate(slices):
        share = max(1.0, float(children[i - i % per_update]))
        for item in part:
            # gradients are averaged over processes, and the loss of a step is the mean over all its children
            item.weight = item.weight * args.world_size / share
            item.kl_weight = item.kl_weight * args.world_size / share
    nothing = items[0].weight * 0
    idle = [[replace(items[0], weight=nothing, kl_weight=nothing)]]
    return [part + idle * (longest[i] - len(part)) for i, part in enumerate(batches)]
