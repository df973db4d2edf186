"""Distribution matching: train a few-step generator with the difference of two scores.

DMD (https://huggingface.co/papers/2311.18828), DMD2 (https://huggingface.co/papers/2405.14867), Self Forcing
(https://huggingface.co/papers/2506.08009) and SiD (https://huggingface.co/papers/2404.04057) as pure functions. Three roles:
the generator makes x; the frozen real score and the trained fake score (a model of the generator's own samples) both
estimate x0 from one noised x. Where they agree, the generator's distribution is the real one.

`free` is broadcastable to x, 1 for coordinates that the generator makes and 0 for those that a condition fixes (the first
frame of image-to-video); it makes all by default. Means are over the free ones.

A generator step: `score_sigma` -> `flow.add_noise` -> both estimates, the real one `guided` -> `dmd_loss` or `sid_loss`.
A critic step: the same noise level on a fresh sample -> `critic_loss`. The GAN terms of DMD2 and Self Forcing are left out.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .flow import _like, sample_mean, shift_sigma, velocity_target


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (https://huggingface.co/papers/2207.12598) in the standard form of diffusers.

    unconditional + scale (conditional - unconditional): 1 is the conditional estimate, 0 the unconditional one. The
    configurations of Self Forcing, CausVid, LongLive and rCM write conditional + g (conditional - unconditional), which
    is this with scale = g + 1: their 3.0 is 4.0 here.

    Args:
        conditional, unconditional: (B, ...) estimates (x0 or velocity) of one model at one input.
        scale: strength of the guidance.

    Returns:
        (B, ...) float32.

    Example:
        >>> guided(torch.ones(1), torch.zeros(1), scale=4.0).tolist()
        [4.0]
    """
    conditional, unconditional = conditional.float(), unconditional.float()
    return unconditional + scale * (conditional - unconditional)


def few_step_sigmas(denoising_steps: Sequence[float], shift: float = 1.0, num_train_timesteps: int = 1000) -> Tensor:
    """The noise levels at which a few-step generator is called (Self Forcing's `denoising_step_list` after warping).

    Args:
        denoising_steps: timesteps in (0, num_train_timesteps], strictly decreasing, without the final 0.
        shift: resolution shift applied to them (`flow.shift_sigma`); 1 for a list that is shifted already, such as
            CausVid's [1000, 757, 522].
        num_train_timesteps: timestep of pure noise.

    Returns:
        (S,) float32 in (0, 1], strictly decreasing.

    Raises:
        ValueError: an empty list, a step outside the range, or steps that do not decrease.

    Example:
        >>> few_step_sigmas([1000, 750, 500, 250], shift=5.0).tolist()
        [1.0, 0.9375, 0.8333333134651184, 0.625]
    """
    steps = [float(step) for step in denoising_steps]
    if not steps:
        raise ValueError("denoising_steps is empty; give at least one timestep, e.g. [1000, 750, 500, 250].")
    if not all(0 < step <= num_train_timesteps for step in steps):
        raise ValueError(
            f"denoising_steps must lie in (0, {num_train_timesteps}], got {steps}; leave the final 0 out, the last step "
            "always ends there."
        )
    if any(later >= earlier for earlier, later in zip(steps, steps[1:], strict=False)):
        raise ValueError(
            f"denoising_steps must be strictly decreasing, got {steps}; sort them and drop repeated ones."
        )
    return shift_sigma(torch.tensor(steps, dtype=torch.float64) / num_train_timesteps, shift).float()


def score_sigma(u: Tensor, shift: float = 1.0, low: float = 0.02, high: float = 0.98) -> Tensor:
    """The noise level at which the scores are compared (DMD, section 3.2: t in [0.02 T, 0.98 T]).

    clamp(shift u / (1 + (shift - 1) u), low, high), the clamp after the shift as in Self Forcing.

    Args:
        u: (B,) uniform in [0, 1]; one value per sample, shared by all of its frames.
        shift: resolution shift of the noise levels.
        low, high: ends of the range; beyond them a score says nothing about x or nothing about its distribution.

    Returns:
        (B,) float32.

    Example:
        >>> score_sigma(torch.tensor([0.0, 0.5, 1.0]), shift=3.0).tolist()
        [0.019999999552965164, 0.75, 0.9800000190734863]
    """
    return shift_sigma(u.float(), shift).clamp(low, high)


def dmd_gradient(x: Tensor, fake_x0: Tensor, real_x0: Tensor, free: Tensor | None = None) -> Tensor:
    """The normalised score difference (DMD, https://huggingface.co/papers/2311.18828, eqs. 7 and 8, per sample).

    (fake_x0 - real_x0) / mean |x - real_x0|, the mean over all coordinates of a sample: of the order of 1 whatever the
    noise level. It needs many coordinates: with one, the normaliser cancels the size of the difference and the method
    does not converge. A sample that equals its real estimate gets no gradient.

    Args:
        x: (B, ...) generated sample.
        fake_x0, real_x0: (B, ...) estimates from the noised x.
        free: as above; the gradient is 0 elsewhere.

    Returns:
        (B, ...) float32, without gradient.

    Example:
        >>> dmd_gradient(torch.zeros(1, 2), torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, -1.0]])).tolist()
        [[0.0, 4.0]]
    """
    x, fake_x0, real_x0 = (t.detach().float() for t in (x, fake_x0, real_x0))
    gradient = torch.nan_to_num((fake_x0 - real_x0) / _scale(x, real_x0, free), nan=0.0, posinf=0.0, neginf=0.0)
    return gradient if free is None else gradient * free


def dmd_loss(
    x: Tensor,
    fake_x0: Tensor,
    real_x0: Tensor,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    free: Tensor | None = None,
) -> Tensor:
    """A loss whose gradient is DMD's: d loss / d x = weight `dmd_gradient` / number of counted elements.

    0.5 mean(weight (x - stop_gradient(x - dmd_gradient))^2). Its value is half the mean squared gradient: a diagnostic,
    which does not fall the way a loss does.

    Args:
        x: (B, ...) generated sample, with gradient.
        fake_x0, real_x0: (B, ...) estimates of the fake and the (guided) real score from the noised x.
        mask: broadcastable to x, 1 for elements that count; the mean is over these (0 if there are none). The first
            frame of a rolled-out long video is left out this way. The normaliser of the gradient does not know it.
        weight: (B,) factor per sample, such as a reward's.
        free: as above.

    Returns:
        scalar float64.

    Example:
        >>> x = torch.zeros(1, 2, requires_grad=True)
        >>> dmd_loss(x, torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, -1.0]])).backward()
        >>> x.grad.tolist()
        [[0.0, 2.0]]
    """
    target = x.detach().double() - dmd_gradient(x, fake_x0, real_x0, free)
    error = 0.5 * torch.square(x.double() - target)
    if weight is not None:
        error = error * _like(weight, error)
    return _masked_mean(error, mask, free)


def sid_loss(
    x: Tensor,
    fake_x0: Tensor,
    real_x0: Tensor,
    alpha: float = 1.0,
    mask: Tensor | None = None,
    free: Tensor | None = None,
) -> Tensor:
    """Score identity distillation (https://huggingface.co/papers/2404.04057), normalised as in Self Forcing.

    mean((real - fake) ((real - x) - alpha (real - fake)) / stop_gradient(mean |x - real|)).

    Unlike DMD's, its gradient flows through both scores, so they must be evaluated with gradient towards their input
    (and keep their activations); their parameters stay fixed. With an exact fake score and alpha = 1, up to the
    normaliser, a step moves the fake score that the generator would have towards the real one, yet the expected value
    of the loss is (1 - alpha) E|fake - real|^2 = 0 everywhere: do not read progress off it. With scores that are
    constants its gradient is DMD's again.

    Args:
        x: (B, ...) generated sample, with gradient.
        fake_x0, real_x0: (B, ...) estimates of the fake and the (guided) real score from the noised x, with gradient.
        alpha: weight of the squared difference of the scores; 1 to 1.2 in the papers.
        mask: as in `dmd_loss`.
        free: as above.

    Returns:
        scalar float64.

    Example:
        >>> sid_loss(torch.zeros(1, 2), torch.ones(1, 2), torch.full((1, 2), 2.0), alpha=1.0).item()
        0.5
    """
    x, fake_x0, real_x0 = x.double(), fake_x0.double(), real_x0.double()
    difference = real_x0 - fake_x0
    error = difference * ((real_x0 - x) - alpha * difference)
    return _masked_mean(error / _scale(x.detach(), real_x0.detach(), free), mask, free)


def critic_loss(
    velocity: Tensor, x0: Tensor, noise: Tensor, weight: Tensor | None = None, free: Tensor | None = None
) -> Tensor:
    """Flow matching of the fake score on the generator's samples (https://huggingface.co/papers/2210.02747).

    weight mean((velocity - (noise - x0))^2) per sample.

    Args:
        velocity: (B, ...) of the fake score at (1 - sigma) x0 + sigma noise, with gradient.
        x0: (B, ...) generated sample; no gradient reaches it.
        noise: (B, ...) standard normal.
        weight: (B,), such as `training_weight`; 1 if None.
        free: as above.

    Returns:
        (B,) float32.

    Example:
        >>> critic_loss(torch.ones(1, 3), torch.zeros(1, 3), torch.full((1, 3), 3.0)).tolist()
        [4.0]
    """
    loss = sample_mean(torch.square(velocity.float() - velocity_target(x0.detach(), noise)), free)
    return loss if weight is None else weight * loss


def training_weight(sigma: Tensor, num_train_timesteps: int = 1000, shift: float = 1.0) -> Tensor:
    """The bell-shaped weight of the velocity error that Wan-based trainings use (CausVid, Self Forcing).

    (exp(-2 (sigma - 1/2)^2) - exp(-1/2)) / c, with c such that its mean over the shifted training grid
    `shift_sigma(i / num_train_timesteps, shift)`, i = 1 ... num_train_timesteps, is 1. It is 0 at both ends and largest at
    sigma = 1/2.

    Args:
        sigma: noise levels in [0, 1], any shape.
        num_train_timesteps: size of the grid.
        shift: resolution shift of the grid (5 in Self Forcing).

    Returns:
        float32, of sigma's shape.

    Example:
        >>> [round(w, 3) for w in training_weight(torch.tensor([0.0, 0.5, 1.0]), shift=5.0).tolist()]
        [0.0, 2.076, 0.0]
    """
    grid = torch.arange(1, num_train_timesteps + 1, dtype=torch.float64, device=sigma.device) / num_train_timesteps
    return (_bell(sigma.double()) / _bell(shift_sigma(grid, shift)).mean()).float()


def _bell(sigma: Tensor) -> Tensor:
    return torch.exp(-2 * torch.square(sigma - 0.5)) - math.exp(-0.5)


def _scale(x: Tensor, real_x0: Tensor, free: Tensor | None) -> Tensor:
    """mean |x - real_x0| per sample, shaped to broadcast over x."""
    return sample_mean((x - real_x0).abs(), free).reshape(-1, *[1] * (x.ndim - 1))


def _masked_mean(error: Tensor, mask: Tensor | None, free: Tensor | None) -> Tensor:
    if mask is None and free is None:
        return error.mean()
    mask = torch.ones((), device=error.device) if mask is None else mask
    mask = (mask if free is None else mask * free).to(error.dtype).expand_as(error)
    return (error * mask).sum() / mask.sum().clamp(min=1)
