"""Few-step sampling of a bidirectional student: a handful of estimates of x0, noised again in between."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..diffusion import flow
from ..models.capture import Condition
from ..models.video_model import VideoModel


def few_step_rollout(
    model: VideoModel,
    condition: Condition,
    noise: Tensor,
    sigmas: Sequence[float],
    *,
    draw: Callable[[int], Tensor] | None = None,
    sampler: str = "renoise",
    exit_step: int | None = None,
    grad: bool = False,
    denoiser: nn.Module | None = None,
) -> Tensor:
    """Sample as DMD2 does, and train its backward simulation (https://huggingface.co/papers/2405.14867, section 4.5).

    x0_i = x_i - sigma_i v(x_i, sigma_i); x_{i+1} = (1 - sigma_{i+1}) x0_i + sigma_{i+1} e, with new noise e ("renoise") or
    the noise that the model predicts ("ode", an Euler step). The output is x0 of the exit step, and only that step has a
    gradient: what it sees is what it will see in sampling.

    Args:
        model: the model; `denoiser` is called instead of its own.
        condition: of B clips.
        noise: (B, C, f, h, w) unit noise, where sampling starts.
        sigmas: noise levels of the steps, descending, without the final 0 (`distribution_matching.few_step_sigmas`).
        draw: step -> (B, C, f, h, w) unit noise with which that step's x0 is noised again; for "renoise".
        sampler: "renoise" or "ode".
        exit_step: index of the step whose x0 is returned; the last by default.
        grad: whether that step has a gradient.
        denoiser: the wrapped module to call instead of the model's own.

    Returns:
        (B, C, f, h, w) float32 clean latents.

    Example:
        >>> noise = torch.randn(len(condition), *condition.latent_shape)
        >>> x0 = few_step_rollout(model, condition, noise, [1.0, 0.75, 0.5, 0.25], draw=lambda step: torch.randn_like(noise))
    """
    assert sampler in ("renoise", "ode"), sampler
    last = len(sigmas) - 1 if exit_step is None else exit_step
    x = condition.with_fixed(noise.float() * model.noise_scale(float(sigmas[0])))
    for i in range(last + 1):
        sigma = float(sigmas[i])
        with torch.set_grad_enabled(grad and i == last):
            velocity = model.velocity(x, sigma, condition, denoiser=denoiser)
            x0 = flow.x0_from_velocity(x, velocity, sigma)
        if i == last:
            break
        e = draw(i) if sampler == "renoise" else flow.noise_from_velocity(x, velocity, sigma)
        x = condition.with_fixed(flow.add_noise(x0, e, float(sigmas[i + 1])))
    return x0
