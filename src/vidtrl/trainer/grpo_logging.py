"""What a GRPO run logs: metrics under TRL's names, and the generated videos."""

import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ..diffusion.step_schedules import Plan
from ..rewards import RewardRunner
from ..rewards.runner import RewardHandle
from .completions import CompletionLog
from .draws import draw_seed
from .grpo_config import VideoGRPOConfig
from .grpo_plans import credited
from .prompt_batches import members_here


if TYPE_CHECKING:
    from .grpo_trainer import VideoGRPOTrainer


class GenerationMetrics:
    """
    Values since the last log, by name; what was computed on a device stays there until it is logged.

    Example:

    ```python
    >>> from vidtrl.trainer.grpo_logging import GenerationMetrics

    >>> metrics = GenerationMetrics()
    >>> metrics.values["nfe"].append(640.0)
    ```
    """

    def __init__(self):
        self.values: dict[str, list[float | Tensor]] = defaultdict(list)
        self.seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds inside to a sum, which [`GenerationMetrics.add_time`] turns into a value."""
        began = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - began

    def add_time(self, *names: str) -> None:
        """What was summed under these names is a value now, and the sums start again."""
        for name in names:
            self.values[name].append(self.seconds.pop(name, 0.0))

    def collect_rewards(self, runner: RewardRunner, handles: list[RewardHandle]) -> tuple[Tensor, dict[str, list]]:
        """
        Wait for the rewards of a generation's parts, and keep what their functions logged.

        Args:
            runner (`RewardRunner`): That scores the videos.
            handles (`list[RewardHandle]`): One a part, in their order.

        Returns:
            `tuple[Tensor, dict[str, list]]`: (B, R) of the videos of this process, and columns of `log_extra`.
        """
        parts: list[Tensor] = []
        extra: dict[str, list] = defaultdict(list)
        for handle in handles:
            parts.append(runner.collect(handle))
            self.seconds["reward_time"] += runner.seconds
            for name, values in runner.metrics.items():
                self.values[name] += values
            for name, values in runner.extra.items():  # a function may log for some parts only
                extra[name] += [None] * (sum(map(len, parts[:-1])) - len(extra[name])) + values
            if runner.num_skipped:
                self.values["num_skipped_rewards"].append(float(runner.num_skipped))
        return torch.cat(parts), extra

    def rewards(self, runner: RewardRunner, rewards: Tensor) -> None:
        """Of a generation, (P, G, R), NaN where a reward does not apply."""
        for i, name in enumerate(runner.names):
            column = rewards[..., i]
            self.values[f"rewards/{name}/mean"].append(column.nanmean().item())
            self.values[f"rewards/{name}/std"].append(nanstd(column).item())
        total = total_rewards(rewards, runner.weights)  # (P, G)
        self.values["reward"].append(total.nanmean().item())
        self.values["reward_std"].append(nanstd(total).item())
        self.values["reward_std/within_prompt"].append(sum(nanstd(group).item() for group in total) / len(total))

    def policy(
        self,
        args: VideoGRPOConfig,
        steps: list[int | None],
        velocity: Tensor,
        ratio: Tensor,
        kl: Tensor,
        weight: Tensor,
        advantages: Tensor,
        expert: str | None = None,
    ) -> None:
        """
        Of a micro-batch: its items' steps and velocities; ratio, divergence, weight and advantage of each child.

        With an expert (where two are trained), also each for itself, as `transformer/ratio/mean`.
        """
        counted, values = weight > 0, self.values
        ratio, a = ratio.detach()[counted], advantages[counted]
        high = args.epsilon if args.epsilon_high is None else args.epsilon_high
        own = [""] if expert is None else ["", f"{expert}/"]
        for prefix in own:
            values[f"{prefix}ratio/mean"].append(ratio)
        if args.loss_type in ("clipped", "awm"):
            low_clipped, high_clipped = (ratio < 1 - args.epsilon) & (a < 0), (ratio > 1 + high) & (a > 0)
            for mean, extreme, clipped in (
                ("low_mean", "low_min", low_clipped),
                ("high_mean", "high_max", high_clipped),
            ):
                values[f"clip_ratio/{mean}"].append(clipped.float())
                values[f"clip_ratio/{extreme}"].append(clipped.float().mean())
            for prefix in own:
                values[f"{prefix}clip_ratio/region_mean"].append((low_clipped | high_clipped).float())
        if args.beta > 0:
            for prefix in own:
                values[f"{prefix}kl"].append(kl.detach()[counted])
        if steps[0] is not None and velocity.requires_grad:

            def norms(gradient: Tensor) -> None:
                # weights make up for the average over processes
                for step, norm in zip(steps, gradient.float().flatten(1).norm(dim=1) / args.world_size, strict=True):
                    values[f"grad_norm/step_{step}"].append(norm)
                    if expert is not None:
                        values[f"{expert}/grad_norm"].append(norm)

            velocity.register_hook(norms)

    def collect(self) -> dict[str, float]:
        """
        Means over all values of all processes, and start again. Every process must call it.

        A name that ends in `_min` or `_max` is the smallest or largest value instead. Values that are NaN, such as the mean
        of a reward that applied to no video, are left out where there are others.
        """
        local = {
            name: [number for value in values for number in torch.as_tensor(value).flatten().tolist()]
            for name, values in self.values.items()
        }
        merged: dict[str, list[float]] = defaultdict(list)
        for one in gather_object([local]):
            for name, values in one.items():
                merged[name] += values
        merged = {name: [v for v in values if not math.isnan(v)] or values for name, values in merged.items()}
        self.values.clear()
        reduce = {"min": min, "max": max}
        return {
            name: reduce.get(name.rsplit("_", 1)[-1], lambda values: sum(values) / len(values))(merged[name])
            for name in sorted(merged)
            if merged[name]
        }


def nanstd(values: Tensor) -> Tensor:
    """Standard deviation of what is known; 0 of fewer than two."""
    known = values[~values.isnan()]
    return known.std() if len(known) > 1 else torch.tensor(0.0)


def total_rewards(rewards: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums (...,) of rewards (..., R) as far as they apply; NaN where none does."""
    return torch.where(rewards.isnan().all(-1), torch.nan, (rewards * weights).nansum(-1))


def video_advantages(plans: list[Plan], advantages: dict[tuple[int, int, int], float]) -> dict[tuple[int, int], float]:
    """{(group, member): mean advantage of everything that was drawn for the video}."""
    worth: dict[tuple[int, int], list[float]] = defaultdict(list)
    for group, plan in enumerate(plans):
        for step, _, children in credited(plan):
            for child in children:
                for member in child:
                    worth[group, member].append(advantages[group, step, child[0]])
    return {key: sum(values) / len(values) for key, values in worth.items()}


def log_completions(
    trainer: "VideoGRPOTrainer",
    completions: CompletionLog | None,
    inputs: list[tuple[tuple[int, ...], dict]],
    plans: list[Plan],
    videos: list[Tensor],
    rewards: Tensor,
    advantages: dict[tuple[int, int, int], float],
    extra: dict[str, list],
) -> CompletionLog | None:
    """
    Bring a generation's videos to the main process, which writes, prints and tracks them.

    Args:
        trainer ([`VideoGRPOTrainer`]): Whose run it is.
        completions ([`CompletionLog`], *optional*): From the call before.
        inputs (`list`): What [`VideoGRPOTrainer.generate`] was given.
        plans (`list[Plan]`): One per group.
        videos (`list[Tensor]`): (F, 3, H, W) in [0, 1], those of this process.
        rewards (`Tensor`): (P, G, R), of all processes.
        advantages (`dict`): {(group, step, first member of the child): advantage}, of all processes.
        extra (`dict[str, list]`): Columns of `log_extra`.

    Returns:
        [`CompletionLog`]: On the main process.
    """
    args, members = trainer.args, members_here(trainer.args)
    rows = [
        # the seed is that of the first noise
        (group, m, row["prompt"], draw_seed(args.seed, epoch, number, group, 0, int(plans[group].seed[m])))
        for (epoch, number, _, group, _), row in inputs
        for m in members[group]
    ]
    local = [
        (*row, video.cpu(), {name: values[i] for name, values in extra.items() if i < len(values)})
        for i, (row, video) in enumerate(zip(rows, videos, strict=True))
    ]
    everything = gather_object(local)
    if not trainer.is_world_process_zero():
        return None
    groups, members, prompts, seeds, videos, columns = (list(column) for column in zip(*everything, strict=True))
    if completions is None:
        completions = CompletionLog(
            args.output_dir, args.num_completions_to_print, args.log_unique_prompts, args.log_completions_hub_repo,
            fps=trainer.validation_fps(), hub_token=args.hub_token, hub_private_repo=args.hub_private_repo,
        )  # fmt: skip
    worth = video_advantages(plans, advantages)
    completions.write(
        step=trainer.state.global_step,
        prompts=prompts,
        videos=videos,
        rewards={
            name: [rewards[g, m, i].item() for g, m in zip(groups, members, strict=True)]
            for i, name in enumerate(trainer.rewards.names)
        },
        advantages=[worth[key] for key in zip(groups, members, strict=True)],
        seeds=seeds,
        extra={name: [c.get(name) for c in columns] for name in dict.fromkeys(n for c in columns for n in c)},
        report_to=args.report_to,
        callbacks=trainer.callback_handler.callbacks,
    )
    return completions
