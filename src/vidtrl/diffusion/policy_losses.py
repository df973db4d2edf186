"""Objectives of reinforcement learning for flow models: per-sample losses (B,), to be weighted and averaged by the caller.

Two families. Policy gradients compare the log-probability of one sampling step under the current and the rollout policy
(`clipped_loss`, `guard_log_ratio`, `dppo_loss`; log-probabilities from `transitions`). Forward-process methods need no
stochastic sampling: they noise the finished sample and regress on it (`nft_loss`, `awm_log_prob`).

`free` is broadcastable to a sample, 1 for coordinates that were generated and 0 for those that a condition fixes (the first
frame of image-to-video); means are over the free ones, and all are by default.
"""

import torch
from torch import Tensor

from .flow import _like, sample_mean, velocity_target, x0_from_velocity


def clipped_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    epsilon: float,
    epsilon_high: float | None = None,
) -> Tensor:
    """PPO's clipped surrogate (https://huggingface.co/papers/1707.06347, eq. 7), to be minimised.

    max(-A r, -A clip(r, 1 - epsilon, 1 + epsilon_high)) with r = exp(log_prob - old_log_prob).

    Args:
        log_prob: (B,) of the current policy, with gradient; float32 or float64.
        old_log_prob: (B,) of the policy that sampled.
        advantages: (B,).
        epsilon: clip range below 1. Log-probabilities are means over a video's coordinates, so ranges are small:
            1e-3 for videos, 1e-4 for images.
        epsilon_high: clip range above 1, `epsilon` if None (https://huggingface.co/papers/2503.14476).

    Returns:
        (B,).

    Example:
        >>> loss = clipped_loss(torch.zeros(2), torch.zeros(2), torch.tensor([1.0, -2.0]), epsilon=1e-3)
        >>> loss.tolist()
        [-1.0, 2.0]
    """
    ratio = torch.exp(log_prob - old_log_prob)
    clipped = ratio.clamp(1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high))
    return torch.maximum(-advantages * ratio, -advantages * clipped)


def guard_log_ratio(
    log_prob: Tensor, old_log_prob: Tensor, mean: Tensor, old_mean: Tensor, std: Tensor, free: Tensor | None = None
) -> Tensor:
    """GRPO-Guard's centred and scaled log-ratio (https://huggingface.co/papers/2510.22319, RatioNorm).

    std * (log_prob - old_log_prob + mean((mean - old_mean)^2) / (2 std^2)), which equals mean((mean - old_mean) noise)
    for the sampled noise: its expectation is 0 and its spread no longer depends on the step, so that one clip range
    fits all steps. Put it into `clipped_loss` as the log-probability with an old one of 0, and divide the loss by D
    (`transitions.timestep_weight("guard", ...)`).

    Args:
        log_prob, old_log_prob: (B,) of a Gaussian transition.
        mean, old_mean: (B, ...), `Transition.mean` under the two policies.
        std: (B,), `Transition.std`, equal under both.
        free: as above.

    Returns:
        (B,).

    Example:
        >>> zero = torch.zeros(2)
        >>> guard_log_ratio(zero, zero, torch.ones(2, 3), torch.ones(2, 3), torch.ones(2)).tolist()
        [0.0, 0.0]
    """
    distance = sample_mean(torch.square(mean - old_mean), free)
    return std * (log_prob - old_log_prob) + distance / (2 * std)


def dppo_loss(log_prob: Tensor, old_log_prob: Tensor, kl: Tensor, advantages: Tensor, threshold: float) -> Tensor:
    """Flow-DPPO (https://huggingface.co/papers/2606.11025): a trust region by the exact KL instead of ratio clipping.

    -A r, except for samples whose KL to the rollout policy exceeds `threshold` and that the gradient would push still
    further away (r > 1 with A > 0, or r < 1 with A < 0): they are dropped.

    Args:
        log_prob, old_log_prob: (B,).
        kl: (B,), `Transition.kl` between the current and the rollout policy.
        advantages: (B,).
        threshold: largest KL.

    Returns:
        (B,), 0 for dropped samples.

    Example:
        >>> high, zero = torch.full((2,), 0.1), torch.zeros(2)
        >>> loss = dppo_loss(high, zero, kl=torch.ones(2), advantages=torch.tensor([1.0, -1.0]), threshold=0.5)
        >>> [round(x, 4) for x in loss.tolist()]
        [0.0, 1.1052]
    """
    ratio = torch.exp(log_prob - old_log_prob)
    outward = (ratio - 1) * advantages > 0
    return (-advantages * ratio).masked_fill(outward & (kl > threshold), 0)


def nft_loss(
    v: Tensor,
    v_old: Tensor,
    x_t: Tensor,
    x0: Tensor,
    sigma: float | Tensor,
    advantages: Tensor,
    beta: float = 1.0,
    advantage_clip: float = 5.0,
    free: Tensor | None = None,
) -> Tensor:
    """DiffusionNFT (https://huggingface.co/papers/2509.16117): negative-aware fine-tuning.

    With optimality r = clip(A / A_max, -1, 1) / 2 + 1/2, the implicit positive and negative policies
    v+ = (1 - beta) v_old + beta v and v- = (1 + beta) v_old - beta v, and their x0 estimates:

        [r mean((x0+ - x0)^2) / w+ + (1 - r) mean((x0- - x0)^2) / w-] A_max / beta,

    where w = mean |x0+- - x0| (no gradient) takes the scale out of each term. With the w held at their value at
    v = v_old, the minimum is at v_old + (2 r - 1) (noise - x0 - v_old) / beta. As they follow v, the pull of one sample
    does not fade on the way there: it ends at v_old +- (noise - x0 - v_old) / beta unless r = 1/2.

    Args:
        v: (B, ...) velocity of the trained policy at x_t, with gradient.
        v_old: (B, ...) velocity of the rollout policy, no gradient.
        x_t: (B, ...) = (1 - sigma) x0 + sigma noise, with fresh noise.
        x0: (B, ...) generated sample.
        sigma: float or (B,).
        advantages: (B,).
        beta: strength of the implicit policies; smaller is stronger guidance.
        advantage_clip: A_max > 0.
        free: as above.

    Returns:
        (B,) float32.

    Example:
        >>> x = torch.zeros(2, 3)
        >>> nft_loss(x + 1, x + 1, x, x, 0.5, torch.tensor([5.0, -5.0])).tolist()
        [2.5, 2.5]
    """
    v, v_old, x0 = v.float(), v_old.detach().float(), x0.float()
    r = (advantages.float() / advantage_clip).clamp(-1, 1) / 2 + 0.5
    positive = _normalized_error((1 - beta) * v_old + beta * v, x_t, x0, sigma, free)
    negative = _normalized_error((1 + beta) * v_old - beta * v, x_t, x0, sigma, free)
    return (r * positive + (1 - r) * negative) * (advantage_clip / beta)


def awm_log_prob(
    v: Tensor,
    noise: Tensor,
    x0: Tensor,
    sigma: float | Tensor,
    weighting: str = "uniform",
    free: Tensor | None = None,
) -> Tensor:
    """Surrogate log-probability of advantage-weighted matching (https://huggingface.co/papers/2509.25050).

    -w(sigma) l with l = mean((v - (noise - x0))^2), the flow-matching loss of the sample. Put it into `clipped_loss`
    with the same (noise, sigma) for both policies.

    Args:
        v: (B, ...) velocity at x_sigma = (1 - sigma) x0 + sigma noise.
        noise, x0: (B, ...).
        sigma: float or (B,).
        weighting: "uniform" (w = 1), "t" (sigma), "t2" (sigma^2), or a robust loss: "huber"
            (sigma (sqrt(l + 1e-10) - 1e-5)), "ghuber" (sigma / p ((l + 1e-10)^p - 1e-10^p), p = 1/4).
        free: as above.

    Returns:
        (B,) float64: ratios of these are clipped at 1e-5 and below.

    Raises:
        ValueError: unknown `weighting`.

    Example:
        >>> x = torch.zeros(1, 3)
        >>> awm_log_prob(x + 2, x, x, 0.5, weighting="t").tolist()
        [-2.0]
    """
    loss = sample_mean(torch.square(v.double() - velocity_target(x0, noise).double()), free)
    sigma = torch.as_tensor(sigma, dtype=torch.float64, device=loss.device)
    if weighting == "uniform":
        return -loss
    if weighting == "t":
        return -sigma * loss
    if weighting == "t2":
        return -(sigma**2) * loss
    if weighting == "huber":
        return -sigma * (torch.sqrt(loss + 1e-10) - 1e-5)
    if weighting == "ghuber":
        return -sigma * ((loss + 1e-10) ** 0.25 - 1e-10**0.25) / 0.25
    raise ValueError(f"awm weighting must be 'uniform', 't', 't2', 'huber' or 'ghuber', got {weighting!r}.")


def _normalized_error(v: Tensor, x_t: Tensor, x0: Tensor, sigma: float | Tensor, free: Tensor | None) -> Tensor:
    error = x0_from_velocity(x_t, v, sigma) - x0
    scale = sample_mean(error.detach().double().abs(), free).clamp(min=1e-5)
    return sample_mean(torch.square(error) / _like(scale, error), free)
