"""Causal sampling: one block of frames after another, each denoised in a few steps upon the cached past.

Self Forcing (https://huggingface.co/papers/2506.08009, algorithm 1): training rolls out exactly as inference does, so one
function serves both. Keys and values of finished blocks are constants; a gradient reaches only the one step of a block
whose clean estimate is its output. Left out: rolling noise windows, and re-encoding the first frame of a continued video.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..diffusion import flow
from ..models.capture import Condition
from ..models.causal import CausalAttention, KVCache
from ..models.video_model import VideoModel


Denoiser = nn.Module | dict[str, nn.Module] | None
SAMPLERS = ("renoise", "ode")


def causal_rollout(
    model: VideoModel,
    causal: CausalAttention,
    condition: Condition,
    noise: Tensor | Iterable[Tensor],
    sigmas: Sequence[float],
    *,
    frames_per_block: int,
    draw: Callable[[int, int], Tensor] | None = None,
    context_noise: float = 0.0,
    cache: KVCache | None = None,
    window: int | None = None,
    sink: int = 0,
    exit_step: int | None = None,
    grad_frames: int = 0,
    sampler: str = "renoise",
    negative_condition: Condition | None = None,
    guidance_scale: float = 1.0,
    store_last: bool = False,
    denoiser: Denoiser = None,
) -> Iterator[Tensor]:
    """Generate clean latents block by block.

    Step i of a block estimates x0 = x - sigma_i v(x, sigma_i, past); the next noise level is reached by
    x' = (1 - sigma_{i+1}) x0 + sigma_{i+1} e, with e fresh noise ("renoise") or the predicted one ("ode", Euler's step).
    Between two blocks one pass without gradients stores keys and values of the finished block. Nothing is computed before
    the block is asked for, and all of it in float32 except the denoiser.

    Args:
        model: the model.
        causal: its causal attention.
        condition: what to generate, B clips, or one for all; its number of frames does not matter.
        noise: unit noise (B, C, f, h, w), f a multiple of `frames_per_block`; or an iterable of blocks
            (B, C, frames_per_block, h, w), which may be endless.
        sigmas: noise levels of the steps, descending, the first one that of `noise` and the last one above 0, such as
            [1.0, 0.9375, 0.8333, 0.625].
        frames_per_block: latent frames of a block.
        draw: `draw(block, step)` returns unit noise (B, C, frames_per_block, h, w) that takes block `block` (from 0 on in
            this call) to `sigmas[step]`, and with `step == len(sigmas)` to `context_noise`. Not needed by "ode" with
            `context_noise=0`.
        context_noise: noise level in [0, 1) at which finished blocks enter the cache.
        cache: what came before, to continue it; a new one with `window` and `sink` by default.
        window, sink: of the new cache, in latent frames; see `KVCache`.
        exit_step: index of the step whose x0 is the block's output; the last by default. Equal on all processes.
        grad_frames: gradients flow in the blocks within the last so many frames, each through its own exit step alone.
        sampler: "renoise" or "ode".
        negative_condition: the unconditional branch, of 1 or B clips; needed when `guidance_scale` is not 1.
        guidance_scale: classifier-free guidance in its standard form; 1 turns it off (what distilled models expect).
        store_last: store the last block too, so that a later call with the same `cache` continues behind it.
        denoiser: as in `VideoModel.velocity`.

    Returns:
        An iterator over float32 canonical latents (B, C, frames_per_block, h, w).

    Raises:
        ValueError: frames that do not divide into blocks, or arguments that do not fit together.

    Example:
        >>> draw = lambda block, step: torch.randn(noise[:, :, :3].shape)
        >>> sigmas = [1.0, 0.9375, 0.8333, 0.625]
        >>> blocks = causal_rollout(model, causal, condition, noise, sigmas, frames_per_block=3, draw=draw)
        >>> latents = torch.cat(list(blocks), dim=2)
    """
    sigmas = [float(s) for s in sigmas]
    if not sigmas or sorted(set(sigmas), reverse=True) != sigmas or not 0 < sigmas[-1] <= sigmas[0] <= 1:
        raise ValueError(f"sigmas must descend within (0, 1], without the final 0; got {sigmas}.")
    exit_step = len(sigmas) - 1 if exit_step is None else exit_step
    if not 0 <= exit_step < len(sigmas):
        raise ValueError(f"exit_step must be in 0 ... {len(sigmas) - 1}, got {exit_step}.")
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}.")
    if draw is None and (context_noise > 0 or (sampler == "renoise" and exit_step > 0)):
        raise ValueError("This rollout needs fresh noise: pass draw, or sampler='ode' with context_noise=0.")
    if not 0 <= context_noise < 1:
        raise ValueError(f"context_noise is a noise level in [0, 1), got {context_noise}.")
    if cache is not None and (window is not None or sink):
        raise ValueError("window and sink belong to the cache; pass them to KVCache(window, sink) or leave cache out.")
    if guidance_scale != 1.0 and negative_condition is None:
        raise ValueError("guidance_scale other than 1 needs negative_condition.")
    if isinstance(noise, Tensor):
        causal.check_frames(noise.shape[2], frames_per_block)
        first_with_gradient = noise.shape[2] - grad_frames
        noise = noise.split(frames_per_block, 2)
    elif grad_frames:
        raise ValueError("grad_frames counts from the end, so noise must be a tensor of all frames.")
    else:
        first_with_gradient = float("inf")
    cache = KVCache(window, sink) if cache is None else cache
    evaluate = _Evaluator(model, causal, cache, condition, negative_condition, guidance_scale, denoiser)

    def store(x0: Tensor, block: int) -> None:
        if context_noise:
            x0 = flow.add_noise(x0, draw(block, len(sigmas)).to(x0.device), context_noise)
        evaluate.store(x0, context_noise)

    def blocks() -> Iterator[Tensor]:
        finished = None
        for block, x in enumerate(noise):
            if x.shape[2] != frames_per_block:
                raise ValueError(
                    f"noise has a block of {x.shape[2]} frames, not of frames_per_block={frames_per_block}."
                )
            if finished is not None:
                store(finished, block - 1)
            x = x.to(model.device, torch.float32)
            for i, sigma in enumerate(sigmas[: exit_step + 1]):
                grad = i == exit_step and block * frames_per_block >= first_with_gradient
                if grad:  # up to torch 2.10 the weights that were cast for the steps before have no graph
                    torch.clear_autocast_cache()
                with contextlib.nullcontext() if grad else torch.no_grad():
                    velocity = evaluate(x, sigma)
                    x0 = flow.x0_from_velocity(x, velocity, sigma)
                    if i < exit_step:
                        renoise = sampler == "renoise"
                        e = (
                            draw(block, i + 1).to(x.device)
                            if renoise
                            else flow.noise_from_velocity(x, velocity, sigma)
                        )
                        x = flow.add_noise(x0, e, sigmas[i + 1])
            finished = x0.detach()
            yield x0
        if store_last and finished is not None:
            store(finished, block)

    return blocks()


def recache(
    model: VideoModel,
    causal: CausalAttention,
    condition: Condition,
    latents: Tensor,
    cache: KVCache,
    *,
    frames_per_block: int,
    start: int,
    negative_condition: Condition | None = None,
    guidance_scale: float = 1.0,
    denoiser: Denoiser = None,
) -> None:
    """Fill a cache anew with the last clean frames, under another prompt.

    LongLive (https://huggingface.co/papers/2509.22622) calls it KV-recache: what a cache remembers was computed under the prompt of its time, and keeps generating it after a switch. The next
    `causal_rollout` with this cache and the new condition continues the video with the new prompt.

    Args:
        model, causal, denoiser: as in `causal_rollout`.
        condition: the new prompt.
        latents: the clean latents (B, C, n, h, w) that precede the next block, whole blocks; as many as the window holds.
        cache: is emptied, and holds `latents` afterwards.
        frames_per_block: latent frames of a block.
        start: position of the first frame of `latents`: the number of latent frames generated before it. 0 restarts the
            count, for streams longer than the model has positions.
        negative_condition, guidance_scale: as in the `causal_rollout` that follows.

    Raises:
        ValueError: frames that do not divide into blocks.
    """
    causal.check_frames(latents.shape[2], frames_per_block)
    cache.reset(start)
    evaluate = _Evaluator(model, causal, cache, condition, negative_condition, guidance_scale, denoiser)
    for block in latents.split(frames_per_block, 2):
        evaluate.store(block, 0.0)


class _Evaluator:
    """The velocity of the next block, with guidance in one batch of both branches, so that one cache serves both."""

    def __init__(self, model, causal, cache, condition, negative_condition, guidance_scale, denoiser):
        self.model, self.causal, self.cache, self.denoiser = model, causal, cache, denoiser
        self.guidance_scale = guidance_scale
        # moved and joined once: the cache knows by their identity that the prompt's tensors are the same at every step
        place = model.device, next(iter(model.denoisers.values())).dtype
        branches = [condition] if guidance_scale == 1.0 else [condition, negative_condition]
        self.branches = [branch.to(*place) for branch in branches]
        self.condition: Condition | None = None

    def __call__(self, x: Tensor, sigma: float, store: bool = False) -> Tensor:
        if self.condition is None:
            self.condition = Condition.cat([c[[0] * len(x)] if len(c) == 1 else c for c in self.branches])
        x = torch.cat([x] * len(self.branches))
        with self.causal.cached(self.cache, store):
            velocity = self.model.velocity(x, sigma, self.condition, denoiser=self.denoiser)
        if len(self.branches) == 1:
            return velocity
        conditional, unconditional = velocity.chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)

    @torch.no_grad()
    def store(self, x: Tensor, sigma: float) -> None:
        """Put keys and values of a finished block into the cache."""
        self(x, sigma, store=True)
