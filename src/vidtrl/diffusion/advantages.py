"""From rewards to advantages: what a sample earned beyond the other samples of its group (the same prompt).

NaN marks a reward that does not apply to a sample (its reward function returned None): it takes no part in means and
standard deviations and gets advantage 0. Arithmetic is float64 on (N,) vectors; results are float32.
"""

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, group_ids: Tensor, scale: str = "group", eps: float = 1e-4) -> Tensor:
    """(reward - mean of its group) / (std + eps), the advantage of GRPO (https://huggingface.co/papers/2402.03300).

    Args:
        rewards: (N,), NaN where not applicable. N is the global batch: groups must be complete.
        group_ids: (N,) integers, equal within a group. By sample, not by prompt text: a prompt may occur twice.
        scale: which std divides: "group" (that of the group), "batch" (that of all N rewards,
            https://huggingface.co/papers/2605.15980), "max_group" (largest group std,
            https://huggingface.co/papers/2510.22200, so that a quiet group is not blown up) or "none".
            Population std (divided by n).
        eps: added to the std.

    Returns:
        (N,) float32. A group whose rewards are all equal gives exactly 0.

    Raises:
        ValueError: unknown `scale`.

    Example:
        >>> group_advantages(torch.tensor([1.0, 3.0, 5.0, 5.0]), torch.tensor([0, 0, 1, 1]), scale="none").tolist()
        [-1.0, 1.0, 0.0, 0.0]
    """
    if scale not in ("group", "batch", "max_group", "none"):
        raise ValueError(f"scale_rewards must be 'group', 'batch', 'max_group' or 'none', got {scale!r}.")
    rewards = rewards.double()
    valid = ~rewards.isnan()
    index, count = _groups(group_ids, valid)
    filled = rewards.masked_fill(~valid, 0)
    mean = torch.zeros_like(count).index_add_(0, index, filled) / count.clamp(min=1)
    # The mean of equal numbers may differ from them in the last bit, and a division by eps would make that visible.
    mute = ~valid | zero_std_groups(rewards, group_ids)
    centered = (rewards - mean[index]).masked_fill(mute, 0)
    if scale == "none":
        return centered.float()
    if scale == "batch":
        total = valid.sum().clamp(min=1)
        std = torch.sqrt((filled - filled.sum() / total).masked_fill(~valid, 0).square().sum() / total)
    else:
        group_std = torch.sqrt(torch.zeros_like(count).index_add_(0, index, centered**2) / count.clamp(min=1))
        std = group_std.max() if scale == "max_group" else group_std[index]
    return (centered / (std + eps)).masked_fill(mute, 0).float()  # 0 / 0 where eps = 0


def zero_std_groups(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """Which samples are in a group that teaches nothing, because every reward is the same for all its members.

    Args:
        rewards: (N,) or (N, R), NaN where not applicable.
        group_ids: (N,) integers.

    Returns:
        (N,) bool.

    Example:
        >>> zero_std_groups(torch.tensor([1.0, 3.0, 5.0, 5.0]), torch.tensor([0, 0, 1, 1])).tolist()
        [False, False, True, True]
    """
    columns = rewards.reshape(len(rewards), -1)
    unique, index = torch.unique(group_ids, return_inverse=True)
    index = index[:, None].expand_as(columns)
    nan = columns.isnan()
    bounds = [
        torch.full(
            (len(unique), columns.shape[1]), -torch.inf, dtype=columns.dtype, device=columns.device
        ).scatter_reduce_(0, index, signed.masked_fill(nan, -torch.inf), "amax")
        for signed in (columns, -columns)
    ]
    # max <= min; a group without any applicable reward has max = -inf and min = inf
    return (bounds[0] <= -bounds[1]).all(1)[index[:, 0]]


def aggregate_rewards(
    rewards: Tensor,
    weights: Tensor,
    group_ids: Tensor,
    scale: str = "group",
    aggregation: str = "advantage",
    clip: float | None = 5.0,
    eps: float = 1e-4,
) -> Tensor:
    """Several rewards to one advantage per sample.

    Args:
        rewards: (N, R), NaN where a reward does not apply to a sample.
        weights: (R,).
        group_ids, scale, eps: as in `group_advantages`.
        aggregation: "advantage" normalises every reward, then weights and sums, so that weights mean the same whatever
            the rewards' units (https://huggingface.co/papers/2505.07818); "reward" weights and sums, then normalises
            (a reward that does not apply counts as 0 there, as in TRL).
        clip: advantages are clipped to [-clip, clip]; None for no clipping.

    Returns:
        (N,) float32.

    Raises:
        ValueError: unknown `aggregation` or `scale`, or another number of weights than rewards.

    Example:
        >>> rewards = torch.tensor([[1.0, 200.0], [2.0, 100.0], [3.0, float("nan")]])
        >>> aggregate_rewards(rewards, torch.ones(2), torch.zeros(3, dtype=torch.long), scale="none").tolist()
        [5.0, -5.0, 1.0]
    """
    if weights.shape != rewards.shape[1:]:
        raise ValueError(f"reward_weights needs one number per reward ({rewards.shape[1]}), got {weights.numel()}.")
    weights = weights.to(rewards.device, torch.float64)
    if aggregation == "advantage":
        columns = [group_advantages(column, group_ids, scale, eps) for column in rewards.unbind(1)]
        advantages = (torch.stack(columns, 1).double() * weights).sum(1).float()
    elif aggregation == "reward":
        total = (rewards.double() * weights).nansum(1).masked_fill(rewards.isnan().all(1), torch.nan)
        advantages = group_advantages(total, group_ids, scale, eps)
    else:
        raise ValueError(f"aggregation must be 'advantage' or 'reward', got {aggregation!r}.")
    return advantages if clip is None else advantages.clamp(-clip, clip)


def _groups(group_ids: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Index of each sample's group (N,) and number of applicable rewards of each group, float64."""
    unique, index = torch.unique(group_ids, return_inverse=True)
    count = torch.zeros(len(unique), dtype=torch.float64, device=group_ids.device)
    return index, count.index_add_(0, index, valid.double())
