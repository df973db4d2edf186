"""Flow matching (https://huggingface.co/papers/2210.02747, 2209.03003) and its exact relation to VP diffusion.

Everything outside a `VideoModel` speaks one language, the straight path of rectified flow:

    x_sigma = (1 - sigma) x0 + sigma noise,     velocity = d x_sigma / d sigma = noise - x0,     sigma in [0, 1].

A variance-preserving model (alpha, beta with alpha^2 + beta^2 = 1) is the same process in other coordinates:
x_flow = x_vp / (alpha + beta) and sigma = beta / (alpha + beta). In them a deterministic DDIM step is an Euler step.

All functions take and return float32; sigma is a float or a tensor of shape (B,).
"""

import math

import torch
from torch import Tensor


def _like(sigma: float | Tensor, x: Tensor) -> Tensor:
    """Bring `sigma` (float or (B,)) to a shape that broadcasts over the (B, ...) tensor `x`."""
    sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device)
    return sigma.reshape(-1, *[1] * (x.ndim - 1)) if sigma.ndim else sigma


def sample_mean(x: Tensor, free: Tensor | None = None) -> Tensor:
    """The mean of each sample over its coordinates, (B,).

    Args:
        x: (B, ...).
        free: broadcastable to x, 1 for coordinates that count and 0 for those that a condition fixes (the first frame of
            image-to-video); all count by default.

    Example:
        >>> sample_mean(torch.tensor([[1.0, 5.0]]), free=torch.tensor([[0.0, 1.0]])).tolist()
        [5.0]
    """
    if free is None:
        return x.flatten(1).mean(1)
    free = free.to(x.dtype).expand_as(x).flatten(1)
    return (x.flatten(1) * free).sum(1) / free.sum(1).clamp(min=1)


def add_noise(x0: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
    """x_sigma = (1 - sigma) x0 + sigma noise.

    Example:
        >>> x = add_noise(torch.zeros(2, 3), torch.ones(2, 3), torch.tensor([0.0, 0.25]))
        >>> x[:, 0].tolist()
        [0.0, 0.25]
    """
    sigma = _like(sigma, x0)
    return (1 - sigma) * x0.float() + sigma * noise.float()


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """The regression target noise - x0 of flow matching."""
    return noise.float() - x0.float()


def x0_from_velocity(x: Tensor, velocity: Tensor, sigma: float | Tensor) -> Tensor:
    """x0 = x_sigma - sigma velocity."""
    return x.float() - _like(sigma, x) * velocity.float()


def noise_from_velocity(x: Tensor, velocity: Tensor, sigma: float | Tensor) -> Tensor:
    """noise = x_sigma + (1 - sigma) velocity."""
    return x.float() + (1 - _like(sigma, x)) * velocity.float()


def dpm_solver_step(
    x: Tensor, x0: Tensor, sigma: float, sigma_next: float, previous: tuple[Tensor, float] | None = None
) -> Tensor:
    """One deterministic step of DPM-Solver++ (2M) (https://huggingface.co/papers/2211.01095, algorithm 2).

    With alpha = 1 - sigma, lambda = log(alpha / sigma) and h = lambda_next - lambda. Without `previous`, and at the end of
    the grid, it is the first-order step, which for flow matching is Euler's.

    Args:
        x: x_sigma, (B, ...).
        x0: the model's clean estimate at sigma, (B, ...).
        sigma, sigma_next: in [0, 1], descending.
        previous: the clean estimate and the sigma of the step before.
    """
    estimate = x0
    if previous is not None and sigma_next > 0 and previous[1] < 1:
        log_snr = [math.log((1 - s) / s) for s in (previous[1], sigma, sigma_next)]
        ratio = (log_snr[1] - log_snr[0]) / (log_snr[2] - log_snr[1])
        estimate = x0 + (x0 - previous[0]) / (2 * ratio)
    keep = sigma_next / sigma  # alpha' (exp(-h) - 1) = keep (1 - sigma) - (1 - sigma')
    return keep * x + ((1 - sigma_next) - keep * (1 - sigma)) * estimate


def shift_sigma(u: float | Tensor, shift: float) -> float | Tensor:
    """sigma = shift u / (1 + (shift - 1) u): the resolution shift of SD3 (https://huggingface.co/papers/2403.03206, eq. 23).

    Args:
        u: float or tensor in [0, 1].
        shift: positive number; 1 is the identity, larger values spend more time at high noise.
    """
    if not shift > 0:
        raise ValueError(f"shift must be positive, got {shift}.")
    return shift * u / (1 + (shift - 1) * u)


def sequence_mu(sequence_length: int, base_len: int, max_len: int, base_shift: float, max_shift: float) -> float:
    """Log-shift that grows linearly with the number of latent tokens (the dynamic shift of Flux, LTX and Motif)."""
    slope = (max_shift - base_shift) / (max_len - base_len)
    return slope * (sequence_length - base_len) + base_shift


def linear_quadratic_sigmas(num_steps: int, threshold: float = 0.025) -> Tensor:
    """Mochi's inference grid: linear in sigma down to 1 - threshold for the first half of the steps, then quadratic.

    Returns:
        (num_steps,) float64, descending from 1; the final 0 is not included.
    """
    if num_steps == 1:
        return torch.ones(1, dtype=torch.float64)
    linear = num_steps // 2
    quadratic = num_steps - linear
    done = torch.arange(linear, dtype=torch.float64) * threshold / linear
    i = torch.arange(linear, num_steps, dtype=torch.float64)
    difference = linear - threshold * num_steps
    a = difference / (linear * quadratic**2)
    b = threshold / linear - 2 * difference / quadratic**2
    c = a * linear**2
    return 1 - torch.cat([done, a * i**2 + b * i + c])


def sample_u(
    distribution: str,
    n: int,
    generator: torch.Generator | None = None,
    *,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    mode_scale: float = 1.29,
) -> Tensor:
    """Draw n training times u in [0, 1) (SD3, https://huggingface.co/papers/2403.03206, section 3.1).

    Args:
        distribution: "uniform", "logit_normal" (eq. 19) or "mode" (eq. 20, heavy tails).
        n: number of draws.
        generator: a CPU generator; the draw is made on the CPU so that it does not depend on the device.
        logit_mean, logit_std: location and scale of "logit_normal".
        mode_scale: s of "mode", in [-1, 2 / (pi - 2)].

    Returns:
        (n,) float32 on the CPU.
    """
    if distribution == "logit_normal":
        u = torch.sigmoid(logit_mean + logit_std * torch.randn(n, generator=generator))
    else:
        u = torch.rand(n, generator=generator)
        if distribution == "mode":
            u = 1 - u - mode_scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
        elif distribution != "uniform":
            raise ValueError(f"sigma_sampling must be 'uniform', 'logit_normal' or 'mode', got {distribution!r}.")
    return u.clamp(0, 1 - 2**-24)


def loss_weight(scheme: str, sigma: Tensor, gamma: float = 5.0) -> Tensor:
    """Weight of the velocity MSE at `sigma`.

    Args:
        scheme: "none" (1 everywhere); "cosmap" (SD3, https://huggingface.co/papers/2403.03206, section 3.1: the cosine
            schedule's density, 2 / (pi (1 - 2 sigma + 2 sigma^2))); "min_snr" (https://huggingface.co/papers/2303.09556:
            min(SNR, gamma) times the x0 error, where SNR = ((1 - sigma) / sigma)^2 and the x0 error is sigma^2 times
            the velocity error).
        sigma: (B,) in [0, 1].
        gamma: clamp of "min_snr".

    Returns:
        (B,) float32.
    """
    sigma = sigma.float()
    if scheme == "none":
        return torch.ones_like(sigma)
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    if scheme == "min_snr":
        return torch.minimum((1 - sigma) ** 2, gamma * sigma**2)
    raise ValueError(f"loss_weighting must be 'none', 'cosmap' or 'min_snr', got {scheme!r}.")


def vp_to_flow_sigma(alphas_cumprod: Tensor) -> Tensor:
    """sigma = sqrt(1 - ab) / (sqrt(ab) + sqrt(1 - ab)) for a VP table `alphas_cumprod` (any shape)."""
    alpha, beta = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    return beta / (alpha + beta)


def vp_coefficients(sigma: float | Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, beta) with alpha^2 + beta^2 = 1 of the VP process at flow time `sigma`; inverse of `vp_to_flow_sigma`."""
    sigma = torch.as_tensor(sigma, dtype=torch.float32)
    norm = torch.sqrt((1 - sigma) ** 2 + sigma**2)
    return (1 - sigma) / norm, sigma / norm


def vp_output_to_velocity(output: Tensor, x: Tensor, sigma: float | Tensor, prediction: str) -> Tensor:
    """Turn a VP model's output into the flow velocity.

    Args:
        output: the model's prediction, (B, ...).
        x: x_vp = alpha x0 + beta noise, what the model saw, (B, ...).
        sigma: flow time, float or (B,).
        prediction: "v_prediction" (v = alpha noise - beta x0) or "epsilon" (noise; needs sigma < 1).
    """
    alpha, beta = (_like(c, x) for c in vp_coefficients(sigma))
    if prediction == "v_prediction":  # x0 = alpha x - beta v, noise = beta x + alpha v
        return (beta - alpha) * x + (alpha + beta) * output
    assert prediction == "epsilon", prediction
    return output - (x - beta * output) / alpha


def velocity_to_vp_output(velocity: Tensor, x: Tensor, sigma: float | Tensor, prediction: str) -> Tensor:
    """Inverse of `vp_output_to_velocity` (same arguments)."""
    alpha, beta = (_like(c, x) for c in vp_coefficients(sigma))
    if prediction == "v_prediction":
        return (velocity - (beta - alpha) * x) / (alpha + beta)
    assert prediction == "epsilon", prediction
    return (alpha * velocity + x) / (alpha + beta)


def vp_native_weight(sigma: Tensor, prediction: str) -> Tensor:
    """w with w * MSE(velocity) == MSE of the VP model's own prediction at the same x.

    d velocity = (alpha + beta) d v, and = (alpha + beta) / alpha d epsilon.
    """
    alpha, beta = vp_coefficients(sigma)
    scale = 1.0 if prediction == "v_prediction" else alpha
    return (scale / (alpha + beta)) ** 2
