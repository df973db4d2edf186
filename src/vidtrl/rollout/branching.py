"""Sampling groups of videos along a [`~vidtrl.diffusion.step_schedules.Plan`], every shared latent computed once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..diffusion.flow import dpm_solver_step, x0_from_velocity
from ..diffusion.step_schedules import ODE, Plan
from ..diffusion.transitions import Transition
from ..models import Condition, VideoModel
from .sampling import guidance_at, guided_velocity


@dataclass
class Decision:
    """
    One latent at a stochastic step, and what was drawn from it. Reinforcement learning credits the children.

    Args:
        group (`int`): Index of the group within the rollout.
        step (`int`): Index of the step.
        node (`int`): The node's number in the plan.
        sigma, sigma_next (`float`): Where the step starts and ends.
        latents (`Tensor`): x, (C, f, h, w).
        children (`list[list[int]]`): The members below each child.
        next_latents (`Tensor`): x' of each child, (M, C, f, h, w).
        old_log_prob (`Tensor`): (M,).
        old_mean (`Tensor`): The step's mean under the policy that sampled, (C, f, h, w).
        velocity (`Tensor`, *optional*): The velocity with its graph, if the rollout kept it for the update.
    """

    group: int
    step: int
    node: int
    sigma: float
    sigma_next: float
    latents: Tensor
    children: list[list[int]]
    next_latents: Tensor
    old_log_prob: Tensor
    old_mean: Tensor
    velocity: Tensor | None = None


@dataclass
class Rollout:
    """
    Args:
        latents (`list[Tensor]`): For each group the clean latents of its members here, (n, C, f, h, w).
        decisions (`list[Decision]`): In the order of the steps.
        num_evaluations (`int`): Samples that went through the denoiser, both branches of guidance counted.
    """

    latents: list[Tensor]
    decisions: list[Decision]
    num_evaluations: int


@dataclass
class _Path:
    """A latent on its way: the members that are still one."""

    group: int
    members: list[int]
    x: Tensor
    position: int = 0
    previous: tuple[Tensor, float] | None = None  # x0 and sigma of the step before, for dpm-solver++


def rollout(
    model: VideoModel,
    plans: Sequence[Plan],
    members: Sequence[Sequence[int]],
    condition: Condition,
    negative_condition: Condition | None,
    *,
    sigmas: Tensor,
    transition: Callable[[Tensor, Tensor, float, float], Transition],
    draw: Callable[..., Tensor],
    guidance_scale: float | dict[str, float] = 1.0,
    batch_size: int | None = None,
    batch_guidance: bool = True,
    antithetic: bool = False,
    tail_solver: str = "euler",
    share: bool = True,
    keep_graph: bool = False,
    storage_dtype: torch.dtype = torch.float32,
    denoiser: nn.Module | dict[str, nn.Module] | None = None,
) -> Rollout:
    """
    Sample some members of some groups.

    Args:
        model (`VideoModel`): The policy.
        plans (`Sequence[Plan]`): One per group.
        members (`Sequence[Sequence[int]]`): Which members of each group to sample here (others belong to another process).
        condition (`Condition`): One clip per group.
        negative_condition (`Condition`, *optional*): Of one clip, or of one per group; needed when `guidance_scale` is not
            1.
        sigmas (`Tensor`): (T + 1,) the sampler's grid.
        transition (`Callable`): (x, velocity, sigma, sigma_next) -> `Transition` of a stochastic step.
        draw (`Callable`): (group, *key) -> unit noise (C, f, h, w) for a key of ints; equal keys give equal noise.
        guidance_scale (`float` or `dict[str, float]`): Classifier-free guidance, of two experts also by name; 1 is none.
        batch_size (`int`, *optional*): Latents per denoiser call; default all.
        batch_guidance (`bool`): Both branches of guidance in one call.
        antithetic (`bool`): Branches 2j and 2j + 1 of a node draw opposite noise.
        tail_solver (`str`): `"euler"`, or `"dpm-solver++"` (2M) for the steps after a path's last stochastic one.
        share (`bool`): Compute shared latents once. `False` computes every member by itself, for comparison.
        keep_graph (`bool`): Run the stochastic steps with gradient and keep their graphs in the decisions.
        storage_dtype (`torch.dtype`): Stochastic samples are rounded through it before their log-probability is taken,
            so that the update sees exactly what was scored.
        denoiser: The wrapped module to call, as in `VideoModel.velocity`.
    """
    grid = sigmas.tolist()
    condition = condition.to(model.device)  # once, not in every denoiser call
    negative_condition = None if negative_condition is None else negative_condition.to(model.device)
    nodes = [plan.nodes().tolist() for plan in plans]
    branches = [plan.branch.tolist() for plan in plans]
    several = negative_condition is not None and len(negative_condition) > 1
    targets = [plan.target.tolist() for plan in plans]

    paths: list[_Path] = []
    for group, (plan, mine) in enumerate(zip(plans, members, strict=True)):
        start = nodes[group][0]
        for together in _split(mine, (lambda m, start=start: start[m]) if share else (lambda m: m)):
            noise = draw(group, 0, int(plan.seed[together[0]])).to(model.device, torch.float32)
            # what an image gives is there from the start, and no step touches it
            x = condition[group].with_fixed((noise * model.noise_scale(grid[0]))[None])[0]
            paths.append(_Path(group, together, x))

    decisions, num_evaluations = [], 0
    for i in range(len(grid) - 1):
        scale = guidance_at(model, grid[i], guidance_scale)
        now = [path for path in paths if path.position == i]
        paths = [path for path in paths if path.position != i]
        kept = [keep_graph and any(branches[p.group][i][m] != ODE for m in p.members) for p in now]
        for with_graph in (True, False):  # the stochastic nodes by themselves, so that only they keep a graph
            chosen = [path for path, graph in zip(now, kept, strict=True) if graph == with_graph]
            for start in range(0, len(chosen), batch_size or max(1, len(chosen))):
                part = chosen[start : start + (batch_size or len(chosen))]
                if with_graph:  # up to torch 2.10 the cast weights of the steps before have no graph
                    torch.clear_autocast_cache()
                with torch.set_grad_enabled(with_graph):
                    velocities = guided_velocity(
                        model, torch.stack([path.x for path in part]), grid[i],
                        condition[[path.group for path in part]],
                        negative_condition[[path.group for path in part]] if several else negative_condition,
                        scale, batched=batch_guidance, denoiser=denoiser,
                    ).unbind()  # fmt: skip
                num_evaluations += len(part) * (1 if scale == 1.0 else 2)
                for path, v in zip(part, velocities, strict=True):
                    branch, target = branches[path.group][i], targets[path.group][i]
                    for together in _split(path.members, lambda m, branch=branch: branch[m] != ODE):
                        mine = _Path(path.group, together, path.x, i, path.previous)
                        if branch[together[0]] == ODE:
                            later = any(
                                branches[path.group][j][m] != ODE for j in range(i, len(grid) - 1) for m in together
                            )
                            solver = "euler" if later else tail_solver
                            paths += _deterministic(mine, v.detach(), grid, target, solver)
                            continue
                        node = nodes[path.group][i][together[0]]
                        children = _split(together, lambda m, branch=branch: branch[m])
                        noise = []
                        for child in children:
                            b = branch[child[0]]
                            unit = draw(path.group, 1, i, node, b // 2 if antithetic else b)
                            noise.append(-unit if antithetic and b % 2 else unit)
                        j = target[together[0]]
                        assert all(target[m] == j for m in together), "the children of one decision step to one sigma"
                        step = transition(path.x[None], v.detach()[None], grid[i], grid[j])
                        step = step.held(path.x[None], condition[path.group].free(path.x.device))
                        step_of_each = step[torch.zeros(len(children), dtype=torch.long, device=step.mean.device)]
                        following = step_of_each.sample(noise=torch.stack(noise).to(model.device, torch.float32))
                        following = condition[path.group].with_fixed(following.to(storage_dtype).float())
                        decisions.append(
                            Decision(
                                group=path.group,
                                step=i,
                                node=node,
                                sigma=grid[i],
                                sigma_next=grid[j],
                                latents=path.x,
                                children=children,
                                next_latents=following,
                                old_log_prob=step_of_each.log_prob(following),
                                old_mean=step.mean[0],
                                velocity=v if with_graph else None,
                            )  # fmt: skip
                        )
                        for child, x in zip(children, following, strict=True):
                            paths.append(_Path(path.group, child, x, j))

    latents = []
    for group, mine in enumerate(members):
        found = {m: path.x for path in paths if path.group == group for m in path.members}
        latents.append(torch.stack([found[m] for m in mine]))
    return Rollout(latents, decisions, num_evaluations)


def _split(members: Sequence[int], key: Callable[[int], int]) -> list[list[int]]:
    """Members with equal keys together, in order of first appearance."""
    parts: dict[int, list[int]] = {}
    for member in members:
        parts.setdefault(key(member), []).append(member)
    return list(parts.values())


def _deterministic(path: _Path, velocity: Tensor, grid: list[float], target: list[int], solver: str) -> list[_Path]:
    """One step without noise; members with different targets part here."""
    after, i = [], path.position
    for together in _split(path.members, lambda m: target[m]):
        j = target[together[0]]
        if solver == "euler":
            x, previous = path.x + (grid[j] - grid[i]) * velocity, None
        else:
            x0 = x0_from_velocity(path.x, velocity, grid[i])
            x, previous = dpm_solver_step(path.x, x0, grid[i], grid[j], path.previous), (x0, grid[i])
        after.append(_Path(path.group, together, x, j, previous))
    return after
