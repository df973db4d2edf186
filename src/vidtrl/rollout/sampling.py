"""Deterministic sampling: float32 Euler steps along the pipeline's own sigma grid."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..models.capture import Condition
from ..models.video_model import VideoModel


@torch.no_grad()
def sample(
    model: VideoModel,
    condition: Condition,
    negative_condition: Condition | None = None,
    *,
    guidance_scale: float | dict[str, float] = 1.0,
    num_inference_steps: int,
    generator: torch.Generator | list[torch.Generator] | None = None,
    latents: Tensor | None = None,
    latent_shape: tuple[int, int, int, int] | None = None,
    denoiser: nn.Module | dict[str, nn.Module] | None = None,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Sample clean latents for each clip of `condition`.

    x_{i+1} = x_i + (sigma_{i+1} - sigma_i) v(x_i, sigma_i), with v = v_neg + guidance_scale (v_cond - v_neg) when
    `guidance_scale` is not 1: the pipeline's own trajectory under a first-order scheduler (`check_model` proves it).

    Args:
        model: the model.
        condition: what to generate, B clips.
        negative_condition: the unconditional branch (`model.condition("", ..., negative=True)`), of 1 or B clips;
            needed when `guidance_scale` is not 1.
        guidance_scale: classifier-free guidance; 1 turns it off. With two experts also a dict by expert name (the
            pipeline's `guidance_scale` and `guidance_scale_2`).
        num_inference_steps: number of denoiser evaluations (times two under guidance).
        generator: one generator, or one per clip; without it the global random state is used.
        latents: starting noise of unit variance (B, C, f, h, w) instead of drawing it.
        latent_shape: (C, f, h, w), when it is not the condition's own.
        denoiser: the wrapped module to call instead of the model's own; with two experts a dict by expert name.
        callback: called as `callback(step, latents)` after every step (step counts from 0).

    Returns:
        (B, C, f, h, w) float32 canonical latents; `model.decode` turns them into videos.

    Example:
        >>> condition = model.condition("a red circle moving right", height=64, width=64, num_frames=17)
        >>> video = model.decode(sample(model, condition, num_inference_steps=20))[0]
    """
    batch, shape = len(condition), tuple(latent_shape or condition.latent_shape)
    if latents is None:
        latents = draw_noise(batch, shape, generator).to(model.device)
    elif latents.shape != (batch, *shape):
        raise ValueError(f"latents must have shape {(batch, *shape)} for this condition, got {tuple(latents.shape)}.")
    condition = condition.to(model.device)
    if negative_condition is not None:
        negative_condition = negative_condition.to(model.device)
    sigmas = model.sigmas(num_inference_steps, shape).tolist()
    x = condition.with_fixed(latents.float() * model.noise_scale(sigmas[0]))
    for i in range(num_inference_steps):
        scale = guidance_at(model, sigmas[i], guidance_scale)
        velocity = guided_velocity(model, x, sigmas[i], condition, negative_condition, scale, denoiser=denoiser)
        x = x + (sigmas[i + 1] - sigmas[i]) * velocity
        if callback is not None:
            callback(i, x)
    return x


def guidance_at(model: VideoModel, sigma: float, guidance_scale: float | dict[str, float]) -> float:
    """The scale at a noise level, where each expert may have its own."""
    return guidance_scale[model.expert(sigma)] if isinstance(guidance_scale, dict) else guidance_scale


def guided_velocity(
    model: VideoModel,
    x: Tensor,
    sigma: float | Tensor,
    condition: Condition,
    negative_condition: Condition | None,
    guidance_scale: float | dict[str, float],
    *,
    batched: bool = False,
    denoiser: nn.Module | dict[str, nn.Module] | None = None,
) -> Tensor:
    """v_neg + guidance_scale (v_cond - v_neg), or v_cond alone when the scale is 1. Gradients flow.

    Args:
        model: the model.
        x: x_sigma, (B, C, f, h, w).
        sigma: float or (B,).
        condition: of B clips.
        negative_condition: of 1 or B clips.
        guidance_scale: classifier-free guidance in its standard form; with two experts also a dict by expert name.
        batched: both branches in one denoiser call of 2B, instead of two calls of B with half the memory.
        denoiser: as in `VideoModel.velocity`.
    """
    if isinstance(guidance_scale, dict):
        guidance_scale = guidance_at(model, float(torch.as_tensor(sigma).flatten()[0]), guidance_scale)
    if guidance_scale == 1.0:
        return model.velocity(x, sigma, condition, denoiser=denoiser)
    if negative_condition is None:
        raise ValueError(
            "guidance_scale other than 1 needs negative_condition; pass model.condition('', ..., negative=True)."
        )
    negative = negative_condition[[0] * len(x)] if len(negative_condition) == 1 else negative_condition
    if batched:
        sigma = torch.cat([sigma, sigma]) if isinstance(sigma, Tensor) and sigma.ndim else sigma
        both = model.velocity(torch.cat([x, x]), sigma, Condition.cat([condition, negative]), denoiser=denoiser)
        conditional, unconditional = both.chunk(2)
    else:
        conditional = model.velocity(x, sigma, condition, denoiser=denoiser)
        unconditional = model.velocity(x, sigma, negative, denoiser=denoiser)
    return unconditional + guidance_scale * (conditional - unconditional)


def draw_noise(
    batch: int, shape: tuple[int, ...], generator: torch.Generator | list[torch.Generator] | None = None
) -> Tensor:
    """Unit noise (batch, *shape) on the CPU; a list of generators gives each clip its own stream."""
    if isinstance(generator, list):
        if len(generator) != batch:
            raise ValueError(f"Got {len(generator)} generators for {batch} clips; pass one, or one per clip.")
        return torch.stack([torch.randn(shape, generator=g, device=g.device).cpu() for g in generator])
    device = generator.device if generator is not None else "cpu"
    return torch.randn(batch, *shape, generator=generator, device=device).cpu()
