"""Which denoising steps are stochastic, and which videos of a group share what.

A [`Plan`] says for each of the G videos ("members") of a group which initial latent it starts from, and for each of the
T steps whether the step is deterministic or draws noise, and where on the sigma grid it leads. Everything else follows:
members that made the same choices so far ARE the same latent and are computed once, so a rollout that walks a plan
needs the least possible number of denoiser evaluations, whatever the method.

Members of one node that draw different noise are its children: the decisions that reinforcement learning credits.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


ODE = -1  # in `Plan.branch`: a deterministic step


@dataclass
class Plan:
    """
    What the members of one group do.

    Args:
        seed (`Tensor`): (G,) int64; members of equal seed start from the same initial latent.
        branch (`Tensor`): (T, G) int64; `ODE` for a deterministic step, else which noise the member draws: members of one
            node and branch share it.
        target (`Tensor`): (T, G) int64; index in the sigma grid that the member's step from i leads to. A member that
            jumped over a step sits it out.
        tail (`Tensor`): (G,) int64; members that differ only here are the same decision, scored on different tails
            (G2RPO's granularities).
    """

    seed: Tensor
    branch: Tensor
    target: Tensor
    tail: Tensor

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.branch)

    @property
    def num_members(self) -> int:
        """G."""
        return len(self.seed)

    def active(self) -> Tensor:
        """(T, G) bool: which members take a step at i (the others have jumped over it)."""
        position, rows = torch.zeros_like(self.seed), []
        for i in range(self.num_steps):
            rows.append(position == i)
            position = torch.where(rows[-1], self.target[i], position)
        return torch.stack(rows)

    def nodes(self) -> Tensor:
        """(T + 1, G) int64: members with the same number before step i are one latent. The number is the smallest such
        member's."""
        active, labels = self.active(), [_canonical(self.seed.tolist())]
        for i in range(self.num_steps):
            keys = [
                (label, branch, target) if on else (label, None, None)
                for label, branch, target, on in zip(
                    labels[-1], self.branch[i].tolist(), self.target[i].tolist(), active[i].tolist(), strict=True
                )
            ]
            labels.append(_canonical(keys))
        return torch.tensor(labels)

    def decisions(self) -> list[tuple[int, int, list[list[int]]]]:
        """(step, node, children) for every node with a stochastic step; a child is the list of its members."""
        active, nodes, branches, found = self.active().tolist(), self.nodes().tolist(), self.branch.tolist(), []
        for i in range(self.num_steps):
            children: dict[int, dict[int, list[int]]] = {}
            for member in range(self.num_members):
                if active[i][member] and branches[i][member] != ODE:
                    siblings = children.setdefault(nodes[i][member], {})
                    siblings.setdefault(branches[i][member], []).append(member)
            found += [(i, node, list(by_branch.values())) for node, by_branch in children.items()]
        return found

    def num_evaluations(self) -> int:
        """Denoiser evaluations (without guidance) of a rollout that computes every node once."""
        active, nodes = self.active(), self.nodes()
        return sum(len(set(nodes[i][active[i]].tolist())) for i in range(self.num_steps))


def _canonical(keys: Sequence) -> list[int]:
    first: dict = {}
    return [first.setdefault(key, index) for index, key in enumerate(keys)]


# ---- Plans ----


def chain_plan(
    num_steps: int,
    num_members: int,
    stochastic: Sequence[int],
    num_latents: int | None = None,
    merged: Sequence[tuple[int, int]] = (),
) -> Plan:
    """
    Every member follows one path, with its own noise at each stochastic step.

    The plan of Flow-GRPO (all steps, own latents), DanceGRPO (all steps, one latent), MixGRPO and Flow-GRPO-Fast (a window,
    one latent), Flash-GRPO and LongCat (one step), E-GRPO (merged steps).

    Args:
        num_steps (`int`): T.
        num_members (`int`): G.
        stochastic (`Sequence[int]`): The steps that draw noise.
        num_latents (`int`, *optional*): Distinct initial latents, a divisor of G; 1 shares one, `None` gives each
            member its own. Members next to each other share.
        merged (`Sequence[tuple[int, int]]`, *optional*): Spans (i, j) that are taken as one step from i to j.
    """
    num_latents = num_members if num_latents is None else num_latents
    if num_latents < 1 or num_members % num_latents:
        raise ValueError(f"num_latents must divide num_generations={num_members}, got {num_latents}.")
    if bad := [i for i in stochastic if not 0 <= i < num_steps]:
        raise ValueError(
            f"stochastic steps {bad} lie outside the schedule of {num_steps} steps (0 to {num_steps - 1})."
        )
    members = torch.arange(num_members)
    branch = torch.full((num_steps, num_members), ODE)
    branch[list(stochastic)] = members
    target = (torch.arange(num_steps) + 1)[:, None].repeat(1, num_members)
    for i, j in merged:
        target[i] = j
    seed = members // (num_members // num_latents)
    return Plan(seed, branch, target, torch.zeros_like(members))


def branch_plan(num_steps: int, steps: Sequence[int], num_latents: int, num_branches: int) -> Plan:
    """
    TempFlow-GRPO (https://huggingface.co/papers/2508.04324): from the deterministic path of each of `num_latents` latents,
    `num_branches` children leave at each of `steps` and go on deterministically. G = steps x latents x branches.
    """
    member = torch.arange(len(steps) * num_latents * num_branches)
    plan = chain_plan(num_steps, len(member), [], num_latents=len(member))
    plan.seed = member // num_branches % num_latents
    for position, step in enumerate(steps):
        mine = member // (num_branches * num_latents) == position
        plan.branch[step, mine] = member[mine]
    return plan


def tree_plan(num_steps: int, splits: Sequence[int], num_branches: int = 2) -> Plan:
    """
    BranchGRPO (https://huggingface.co/papers/2509.06040): one latent; at each of `splits` every path splits into
    `num_branches`. G = num_branches ** len(splits) leaves.
    """
    num_members = num_branches ** len(splits)
    plan = chain_plan(num_steps, num_members, [], num_latents=1)
    for depth, step in enumerate(sorted(splits)):
        plan.branch[step] = torch.arange(num_members) // num_branches ** (len(splits) - 1 - depth) % num_branches
    return plan


def granular_plan(num_steps: int, step: int, num_branches: int, granularities: Sequence[int] = (1, 2, 3)) -> Plan:
    """
    G2RPO (https://huggingface.co/papers/2510.01982): `num_branches` children of one latent at `step`, each finished on
    several deterministic tails that take every g-th point of the grid. G = branches x granularities.
    """
    num_members = num_branches * len(granularities)
    plan = chain_plan(num_steps, num_members, [step], num_latents=1)
    member = torch.arange(num_members)
    plan.branch[step] = member // len(granularities)
    plan.tail = member % len(granularities)
    for column, granularity in enumerate(granularities):
        for i in range(step + 1, num_steps):
            plan.target[i, plan.tail == column] = min(i + granularity, num_steps)
    return plan


def compress_tail(plan: Plan, ratio: float) -> Plan:
    """
    MixGRPO-Flash (https://huggingface.co/papers/2507.21802): after the last stochastic step, keep only a share `ratio` of
    the remaining deterministic steps (at least one). Pair it with a second-order solver.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"tail_ratio must lie in (0, 1], got {ratio}.")
    stochastic = (plan.branch != ODE).any(1).nonzero().flatten().tolist()
    # where the last stochastic step leads, which may be a jump
    start, end = (int(plan.target[stochastic[-1]].max()) if stochastic else 0), plan.num_steps
    kept = max(1, math.ceil(ratio * (end - start)))
    points = torch.linspace(start, end, kept + 1).round().long().tolist()
    for i, j in zip(points[:-1], points[1:], strict=True):
        plan.target[i] = j
    return plan


# ---- Which steps ----


def step_range(num_steps: int, share: tuple[float, float]) -> range:
    """The steps whose index lies in `share` of the schedule; the last step of all leads to sigma 0 and stays out."""
    low, high = (round(s * num_steps) for s in share)
    steps = range(low, min(high, num_steps - 1))
    if not 0 <= share[0] < share[1] <= 1 or not steps:
        raise ValueError(
            f"sde_range={tuple(share)} holds no step of a schedule of {num_steps} steps; give two shares of the "
            "schedule in increasing order, such as (0.0, 0.5)."
        )
    return steps


def random_steps(steps: Sequence[int], count: int, rng: random.Random) -> list[int]:
    """`count` distinct steps drawn uniformly."""
    if not 1 <= count <= len(steps):
        raise ValueError(
            f"sde_steps={count} but there are {len(steps)} steps to choose from; lower it or widen sde_range."
        )
    return sorted(rng.sample(list(steps), count))


def window(
    steps: Sequence[int],
    size: int,
    iteration: int,
    mode: str = "sliding",
    stride: int = 1,
    interval: int = 25,
    rng: random.Random | None = None,
) -> list[int]:
    """
    MixGRPO's window of stochastic steps (https://huggingface.co/papers/2507.21802, section 3.3).

    Args:
        steps (`Sequence[int]`): Where the window may lie.
        size (`int`): Its width.
        iteration (`int`): Training iteration (generation batch), from 0.
        mode (`str`): `"sliding"` moves by `stride` every `interval` iterations and starts over at the end; `"random"`
            draws its place each iteration; `"decay"` slides with intervals `ceil(interval exp(-0.1 max(0, l - 13)))` at
            position l, so that late (low-noise) positions take less time.
        rng (`random.Random`, *optional*): For `"random"`.
    """
    if not 1 <= size <= len(steps):
        raise ValueError(
            f"the window of {size} steps lies outside the schedule: there are {len(steps)} steps to choose from; lower "
            "sde_steps or widen sde_range."
        )
    starts = list(range(0, len(steps) - size + 1, stride))
    if mode == "random":
        start = rng.choice(starts)
    elif mode == "sliding":
        start = starts[iteration // interval % len(starts)]
    elif mode == "decay":
        lengths = [math.ceil(interval * math.exp(-0.1 * max(0, left - 13))) for left in starts]
        iteration %= sum(lengths)
        index = 0
        while iteration >= lengths[index]:
            iteration -= lengths[index]
            index += 1
        start = starts[index]
    else:
        raise ValueError(f"window mode must be 'sliding', 'random' or 'decay', got {mode!r}.")
    return list(steps[start : start + size])


def merge_steps(sigmas: Sequence[float], threshold: float, last: int) -> list[tuple[int, int]]:
    """
    E-GRPO (https://huggingface.co/papers/2601.00423): join neighbouring low-entropy steps until one stochastic jump over
    the span has enough of it, `s/(1-s) (s - s_next) > threshold` with s the span's first sigma.

    Args:
        sigmas (`Sequence[float]`): The grid, descending, T + 1 values.
        threshold (`float`): tau.
        last (`int`): Spans end at or before this step index.

    Returns:
        `list[tuple[int, int]]`: Spans (i, j) that cover [0, last], in order.
    """
    spans, i = [], 0
    while i < last:
        s = min(sigmas[i], sigmas[1])  # s/(1-s) is infinite at 1
        j = i + 1
        while j < last and s / (1 - s) * (sigmas[i] - sigmas[j]) <= threshold:
            j += 1
        spans.append((i, j))
        i = j
    return spans
