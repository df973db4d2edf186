"""From a configuration to the plan of one group: which steps are stochastic, and who shares what."""

import inspect
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..diffusion import step_schedules
from ..diffusion.step_schedules import Plan
from ..diffusion.transitions import timestep_weight
from ..models import VideoModel
from .draws import draw_seed
from .grpo_config import VideoGRPOConfig


MEAN_ONE = ("tgr", "tempflow")  # weightings that are normalised to mean 1 over the global batch


def embedded_guidance(args: VideoGRPOConfig, model: VideoModel) -> float:
    """
    What a model that takes guidance as an input is told in rollout, update and evaluation: as asked, or the pipeline's default.

    Raises:
        `ValueError`: If it is asked for and the model takes none.
    """
    if model.embeds_guidance:
        default = inspect.signature(type(model.pipe).__call__).parameters["guidance_scale"].default
        return default if args.embedded_guidance is None else args.embedded_guidance
    if args.embedded_guidance is not None:
        raise ValueError(
            f"embedded_guidance is for models that take guidance as an input (HunyuanVideo), and {type(model.pipe).__name__} "
            "does not: leave it out, and set guidance_scale"
        )
    return 1.0


def candidate_steps(args: VideoGRPOConfig, own_steps: list[int]) -> list[int]:
    """
    The steps that may be stochastic: inside `sde_range`, and where the denoiser in training is used.

    Raises:
        `ValueError`: If there is none.
    """
    steps = step_schedules.step_range(args.num_inference_steps, tuple(args.sde_range))
    mine = [i for i in steps if i in own_steps]
    if not mine:
        raise ValueError(
            f"no step of sde_range={args.sde_range} belongs to the expert {args.experts!r}; widen it or train the "
            "other expert"
        )
    return mine


def draw_plan(args: VideoGRPOConfig, grid: Tensor, own_steps: list[int], iteration: int, rng: random.Random) -> Plan:
    """
    Draw the plan of one group.

    Args:
        args ([`VideoGRPOConfig`]): Its `sde_*` fields.
        grid (`Tensor`): (T + 1,) the sampler's sigmas.
        own_steps (`list[int]`): Where the denoiser in training is used.
        iteration (`int`): Number of the generation, from 0.
        rng (`random.Random`): The group's own; every process draws the same.
    """
    total, members, latents = args.num_inference_steps, args.num_generations, args.latents_per_prompt
    if args.sde_schedule == "none":
        return step_schedules.chain_plan(total, members, [], latents)
    steps = candidate_steps(args, own_steps)
    if args.sde_schedule == "tree":
        plan = step_schedules.tree_plan(total, args.tree_splits)
    elif args.sde_schedule == "branch":
        chosen = step_schedules.random_steps(steps, args.sde_steps, rng)
        plan = step_schedules.branch_plan(total, chosen, latents, members // (len(chosen) * latents))
    elif args.sde_schedule == "granular":
        branches = members // len(args.granularities)
        plan = step_schedules.granular_plan(total, rng.choice(steps), branches, args.granularities)
    elif args.sde_schedule == "merged":
        spans = step_schedules.merge_steps(grid.tolist(), args.merge_threshold, last=steps[-1] + 1)
        spans = [span for span in spans if span[0] >= steps[0]]
        if not spans:
            raise ValueError(
                f"no merged step of merge_threshold={args.merge_threshold} lies inside sde_range={args.sde_range}: lower the "
                "threshold or widen the range"
            )
        span = rng.choice(spans)
        plan = step_schedules.chain_plan(total, members, [span[0]], latents, merged=[span])
    else:
        if args.sde_schedule == "single":
            chosen = [rng.choice(steps)]
        elif args.sde_schedule == "random":
            chosen = step_schedules.random_steps(steps, args.sde_steps, rng)
        elif args.sde_schedule == "window":
            mode, interval = args.window_mode, args.window_interval
            chosen = step_schedules.window(steps, args.sde_steps, iteration, mode, interval=interval, rng=rng)
        else:  # "all"
            chosen = steps
        plan = step_schedules.chain_plan(total, members, chosen, latents)
    return step_schedules.compress_tail(plan, args.tail_ratio) if args.tail_ratio < 1 else plan


def check_schedule(args: VideoGRPOConfig, grid: Tensor, own_steps: list[int], kernel: Callable) -> None:
    """
    Fail at start-up, not in the middle of a run, where the schedule is impossible or the kernel is singular.

    Args:
        args ([`VideoGRPOConfig`]), grid (`Tensor`), own_steps (`list[int]`): As in [`draw_plan`].
        kernel (`Callable`): (x, velocity, sigma, sigma_next) -> `Transition`.

    Raises:
        `ValueError`: With the field to change.
    """
    if args.sde_schedule == "none":
        return
    steps, point = candidate_steps(args, own_steps), torch.zeros(1, 1)
    if args.sde_schedule == "tree":
        mine = [i for i in own_steps if i < args.num_inference_steps - 1]  # the last step of all leads to sigma 0
        if outside := sorted(set(args.tree_splits) - set(mine)):
            raise ValueError(
                f"tree_splits={args.tree_splits}: steps {outside} lie outside the schedule of the model in training, steps "
                f"{mine[0]} to {mine[-1]}; change tree_splits or num_inference_steps"
            )
        steps = args.tree_splits
    draw_plan(args, grid, own_steps, 0, random.Random(0))
    for step in steps:
        std = float(kernel(point, point, float(grid[step]), float(grid[step + 1])).std)
        if not 0 < std < float("inf"):
            raise ValueError(
                f"transition={args.transition!r} with noise_level={args.noise_level} draws no usable noise at step {step} "
                f"(standard deviation {std:g}): change noise_level"
            )


def trained_steps(args: VideoGRPOConfig, plan: Plan, step: int, group: int, member: int) -> set[int]:
    """
    The stochastic steps of a video that are trained on: all, or (DanceGRPO) a random share of them.

    Args:
        args ([`VideoGRPOConfig`]): `train_fraction` counts.
        plan (`Plan`): The group's.
        step (`int`): Optimizer steps done; with group and member the seed of the choice.
        group, member (`int`): Which video.
    """
    steps = (plan.branch[:, member] != step_schedules.ODE).nonzero().flatten().tolist()
    if args.train_fraction == 1:
        return set(steps)
    rng = random.Random(draw_seed(args.seed, step, group, member))
    return set(rng.sample(steps, max(1, round(args.train_fraction * len(steps)))))


def step_weights(
    args: VideoGRPOConfig,
    grid: Tensor,
    plans: Sequence[Plan],
    chosen: dict[tuple[int, int], set[int]],
    advantages: dict[tuple[int, int, int], float],
    kernel: Callable,
) -> dict[tuple[int, int], float]:
    """
    w_k of each stochastic step of a generation, as [`~vidtrl.diffusion.transitions.timestep_weight`] has it.

    Those of [`MEAN_ONE`] are divided by their mean over all that is trained on, on all processes.

    Args:
        args ([`VideoGRPOConfig`]), grid (`Tensor`): As in [`draw_plan`].
        plans (`Sequence[Plan]`): One per group.
        chosen (`dict`): {(group, member): steps that are trained on}.
        advantages (`dict`): {(group, step, first member of the child): advantage}; where it is 0 there is nothing to train on.
        kernel (`Callable`): As in [`check_schedule`].

    Returns:
        `dict[tuple[int, int], float]`: {(step, the grid point that it leads to): weight}.
    """
    point, weights = torch.zeros(1, 1), {}
    total, count = 0.0, 0  # over the children of all processes, which every process knows
    for group, plan in enumerate(plans):
        for step, _, children in plan.decisions():
            key = step, int(plan.target[step, children[0][0]])
            if key not in weights:
                sigma, sigma_next = (float(grid[i]) for i in key)
                std = kernel(point, point, sigma, sigma_next).std
                weights[key] = timestep_weight(
                    args.timestep_weighting, sigma, sigma_next, std, args.noise_level, name=args.transition
                ).item()
            for child in children:
                if advantages[group, step, child[0]] != 0 and step in chosen[group, child[0]]:
                    total, count = total + weights[key], count + 1
    if args.timestep_weighting in MEAN_ONE and count:
        weights = {key: weight * count / total for key, weight in weights.items()}
    return weights


def training_times(model: VideoModel, trained: Sequence[str], latent_shape: tuple[int, ...]) -> tuple[float, float]:
    """
    The training times u between which what is trained is used: all, unless it is one of two experts.

    Args:
        model ([`VideoModel`]): The run's.
        trained (`Sequence[str]`): Names of the denoisers in training.
        latent_shape (`tuple[int, ...]`): Of one video.
    """
    if len(trained) == len(model.denoisers):
        return 0.0, 1.0
    u = torch.arange(1000) / 1000
    sigmas = model.training_sigma(u, latent_shape).tolist()
    mine = [x for x, s in zip(u.tolist(), sigmas, strict=True) if model.expert(s) in trained]
    return mine[0], mine[-1]


def credited(plan: Plan) -> list[tuple[int, int, list[list[int]]]]:
    """What the rewards are credited to: decisions, or the videos themselves (step -1) where none was taken."""
    return plan.decisions() or [(-1, -1, [[m] for m in range(plan.num_members)])]
