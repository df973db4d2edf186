"""Rewards for motion, measured by optical flow. In [0, 1], 1 is best; a frozen clip gets 0 from each of them.

The flow is pyramidal Lucas-Kanade (B. Lucas and T. Kanade, "An iterative image registration technique with an
application to stereo vision", IJCAI 1981), dense, in plain torch. It counts where three things hold: it explains the
change between two frames, the flow back agrees with it, and the motion goes on into the following frame. So noise,
changes of light and trembling are not motion. None of this is differentiable.
"""

import re
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .checks import check_video


LEVELS, ITERATIONS = 4, 3
WORKING_SIZE = 128  # the short side is reduced to this many pixels
MIN_CONTRAST = 0.03  # surroundings with a smaller standard deviation are flat; their noise is not blown up
MIN_CHANGE = 0.05  # in units of the local contrast: a smaller change is no evidence of motion
RIDGE = 1e-2  # steps stay small where the texture is weaker than this, in squared contrast per pixel
MIN_AREA = 0.02  # share of the frame that must move for full marks: the edges of an object 1/7 of the frame wide
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}  # image axes: y points down


@torch.no_grad()
def optical_flow(video: torch.Tensor) -> torch.Tensor:
    """
    Where each pixel of a frame moves in the next one.

    Args:
        video (`torch.Tensor`): Float tensor of shape (F, 3, H, W) in [0, 1], F >= 2.

    Returns:
        `torch.Tensor`: float32 of shape (F - 1, 2, h, w): (x, y) in shares of the short side per frame, y pointing
        down, at a resolution of h, w with a short side of at most 128. Zero where no motion can be seen: flat regions,
        and changes that moving pixels do not explain.
    """
    flow, seen = _flow(check_video(video, 2))
    return flow * seen / min(flow.shape[2:])


def _flow(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Flow in pixels of the working resolution (F - 1, 2, h, w), and where it can be trusted (F - 1, 1, h, w)."""
    gray = torch.einsum("fchw,c->fhw", x, torch.tensor([0.299, 0.587, 0.114], device=x.device)).unsqueeze(1)
    height, width = gray.shape[2:]
    scale = min(1.0, WORKING_SIZE / min(height, width))
    if scale < 1:
        gray = F.interpolate(gray, size=(round(height * scale), round(width * scale)), mode="area")
    brightness = gray.mean((2, 3), keepdim=True).clamp(min=1 / 255)
    gray = _equalise(_blur(gray) * (brightness.mean() / brightness))  # light that changes everywhere is no motion
    flows, seen = [], []
    for a, b in zip(gray[:-1].split(16), gray[1:].split(16), strict=True):
        there, back = _lucas_kanade(a, b), _lucas_kanade(b, a)
        before, after = _window((a - b).abs()), _window((a - _warp(b, there)).abs())
        gap = (there + _warp(back, there)).norm(dim=1, keepdim=True)
        flows.append(there)
        seen.append(
            (before > MIN_CHANGE) & (after < 0.5 * before) & (gap < 0.25 * there.norm(dim=1, keepdim=True) + 0.1)
        )
    return torch.cat(flows), torch.cat(seen)


def _equalise(x):
    """Each pixel relative to its surroundings, so that light that changes in places is not taken for motion either."""
    local = lambda v: F.avg_pool2d(F.pad(v, (7, 7, 7, 7), mode="replicate"), 15, stride=1)  # noqa: E731
    mean = local(x)
    return (x - mean) / (local((x - mean) ** 2) + MIN_CONTRAST**2).sqrt()


def _lucas_kanade(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Flow in pixels, (B, 2, h, w), from frames (B, 1, h, w)."""
    pyramid = [(a, b)]
    while len(pyramid) < LEVELS and min(pyramid[-1][0].shape[2:]) >= 16:
        pyramid.append(tuple(F.avg_pool2d(frame, 2, ceil_mode=True, count_include_pad=False) for frame in pyramid[-1]))
    flow = None
    for a, b in reversed(pyramid):
        size = a.shape[2:]
        flow = a.new_zeros(len(a), 2, *size) if flow is None else 2 * F.interpolate(flow, size=size, mode="bilinear")
        gx, gy = _gradient(a)
        # the ridge keeps the step small where there is no texture: such pixels keep what the coarser level found
        xx, xy, yy = _window(gx * gx) + RIDGE, _window(gx * gy), _window(gy * gy) + RIDGE
        for _ in range(ITERATIONS):
            error = a - _warp(b, flow)
            ex, ey = _window(gx * error), _window(gy * error)
            step = torch.cat([yy * ex - xy * ey, xx * ey - xy * ex], 1) / (xx * yy - xy * xy)
            flow = flow + step.clamp(-1, 1)
    return flow


def _blur(x):
    return _filter(_filter(x, [1, 4, 6, 4, 1], 3), [1, 4, 6, 4, 1], 2)


def _window(x):
    weights = [1, 2, 3, 4, 5, 6, 7, 6, 5, 4, 3, 2, 1]
    return _filter(_filter(x, weights, 3), weights, 2)


def _filter(x, weights, dim):
    kernel = torch.tensor(weights, dtype=x.dtype, device=x.device) / sum(weights)
    half = len(weights) // 2
    pad, shape = ((half, half, 0, 0), (1, 1, 1, -1)) if dim == 3 else ((0, 0, half, half), (1, 1, -1, 1))
    return F.conv2d(F.pad(x, pad, mode="replicate"), kernel.view(shape))


def _gradient(x):
    padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
    return (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2, (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2


def _warp(x, flow):
    height, width = x.shape[2:]
    rows = torch.arange(height, device=x.device, dtype=x.dtype).view(-1, 1) + flow[:, 1]
    columns = torch.arange(width, device=x.device, dtype=x.dtype) + flow[:, 0]
    grid = torch.stack([columns * 2 / max(1, width - 1) - 1, rows * 2 / max(1, height - 1) - 1], -1)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=True)


def _steady_flow(video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Flow (F - 2, 2, P) in shares of the short side; the steadiness (F - 2, P) of each pixel's motion, 1 where the next
    flow on its path equals this one, falling to 0 where it differs by half, 0 where nothing moves; and the trust
    (F - 2,) in both: full where 2 % of the frame and half of what moves are steady."""
    flow, seen = _flow(check_video(video, 3))
    now = (flow * seen)[:-1]
    change = (_warp(flow[1:], now) - now).norm(dim=1)
    speed = now.norm(dim=1)
    steadiness = (1 - 2 * change / speed.clamp(min=1e-6)).clamp(0, 1) * (speed > 0)
    steady, moving = (steadiness > 0).flatten(1).sum(1), (speed > 0).flatten(1).sum(1)
    area = steadiness.flatten(1).mean(1) / MIN_AREA
    agreement = 2 * steady / moving.clamp(min=1)  # a part of any noise agrees by chance
    return now.flatten(2) / min(flow.shape[2:]), steadiness.flatten(1), area.clamp(max=1) * agreement.clamp(max=1)


@torch.no_grad()
def motion_velocity(video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    How what moves in a clip moves, frame by frame. Only motion that goes on into the next frame counts.

    Args:
        video (`torch.Tensor`): Float tensor of shape (F, 3, H, W) in [0, 1], F >= 3.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: float32. The mean (x, y) flow of what moves, of shape
        (F - 2, 2), and its median length, of shape (F - 2,), in shares of the short side per frame; and the trust in
        both, of shape (F - 2,) in [0, 1]: full where 2 % of the frame and half of what moves keep their motion.
    """
    flow, steadiness, trust = _steady_flow(video)
    steady = steadiness > 0
    mean = (flow * steady.unsqueeze(1)).sum(2) / steady.sum(1, keepdim=True).clamp(min=1)
    speed = flow.norm(dim=1).masked_fill(~steady, float("nan")).nanmedian(1).values.nan_to_num(0.0)
    return mean, speed, trust


def get_motion_magnitude_reward(target: float = 0.005) -> Callable:
    """
    Mean over the frames of `min(1, speed / target)`, where speed is the median speed of what moves, less where under
    2 % of the frame moves. 0 for a frozen clip, and little for noise, flicker and trembling; a clip that moves in one frame out of ten gets 0.1.

    Failure mode: a moving camera over a still scene counts in full, and above the target more speed is free: pair it
    with `"motion-smoothness"`. Not differentiable.

    Args:
        target (`float`, *optional*, defaults to `0.005`): Speed that earns 1, in shares of the short side per frame.
            With the default something crosses half the frame in 100 frames.

    Returns:
        `Callable`: The reward function.

    ```python
    >>> from vidtrl import toy
    >>> from vidtrl.rewards import get_motion_magnitude_reward

    >>> clip = toy.render("a red square moving up") / 255
    >>> get_motion_magnitude_reward(target=0.01)(videos=[clip, clip[:1].repeat(17, 1, 1, 1)])
    [1.0, 0.0]
    ```
    """
    _check_target(target)

    def motion_magnitude_reward(videos, **kwargs) -> list[float]:
        rewards = []
        for video in videos:
            _, speed, trust = motion_velocity(video)
            rewards.append(float(((speed / target).clamp(max=1) * trust).mean()))
        return rewards

    return motion_magnitude_reward


def get_motion_direction_reward(target: float = 0.005) -> Callable:
    """
    `cos * min(1, along / target)`: `along` is the mean speed in the wanted direction, `cos` its share of the mean
    motion. 0 for standing still, for moving across and for moving away.

    The wanted direction is the dataset column `direction` (`"left"`, `"right"`, `"up"`, `"down"`, or `None` for not
    applicable) where there is one, else what the prompt says ([`prompt_direction`]); `None` where it says nothing.

    Failure mode: motion is relative to the frame. A camera that follows its subject shows the background moving the
    other way, and panning the other way earns the reward. Not differentiable.

    Args:
        target (`float`, *optional*, defaults to `0.005`): Speed that earns 1, in shares of the short side per frame.

    Returns:
        `Callable`: The reward function.
    """
    _check_target(target)

    def motion_direction_reward(prompts, videos, direction=None, **kwargs) -> list[float | None]:
        wanted = [prompt_direction(p) for p in prompts] if direction is None else direction
        rewards = []
        for name, video in zip(wanted, videos, strict=True):
            if name is None:
                rewards.append(None)
                continue
            if name not in DIRECTIONS:
                raise ValueError(f"the column 'direction' holds {name!r}; use one of {', '.join(DIRECTIONS)} or None")
            velocity, _, trust = motion_velocity(video)
            mean = (velocity * trust.unsqueeze(1)).mean(0)
            along = mean @ torch.tensor(DIRECTIONS[name], dtype=mean.dtype, device=mean.device)
            cos = along / mean.norm().clamp(min=1e-9)
            rewards.append(float(cos.clamp(min=0) * (along / target).clamp(0, 1)))
        return rewards

    return motion_direction_reward


@torch.no_grad()
def motion_smoothness_reward(videos, **kwargs) -> list[float]:
    """
    How steadily what moves keeps moving: the steadiness of each moving pixel, which falls from 1 to 0 as its flow
    changes by half from one frame to the next, averaged with the speeds as weights. 0 for a frozen clip.

    Failure mode: a slow even pan is the cheapest way to the top; quick but natural changes of direction cost. Values of
    different scenes do not compare: small objects score lower than pans. Not differentiable.
    """
    rewards = []
    for video in videos:
        flow, steadiness, trust = _steady_flow(video)
        speed = flow.norm(dim=1)
        rewards.append(float((trust.unsqueeze(1) * steadiness * speed).sum() / speed.sum().clamp(min=1e-9)))
    return rewards


_MOVING = r"mov|go|fly|flies|run|walk|driv|rid|slid|roll|fall|ris|float|travel|swim|drift|climb|jump|head|sail|march|turn|glid"
_DIRECTION = re.compile(
    rf"\b(?:{_MOVING})\w*\s+(?:\w+\s+){{0,3}}?(left|right|up|down)(?:wards?)?\b|\b(left|right|up|down)wards?\b", re.I
)


def prompt_direction(prompt: str) -> str | None:
    """
    The direction of motion that a prompt names, in the image: `"left"`, `"right"`, `"up"` or `"down"`.

    A direction must follow a verb of motion ("a boat sailing slowly to the left") or end in -ward(s). `None` where
    there is none, where there are several ("from left to right" counts as right), and for a prompt about the camera,
    whose motion moves the scene the other way.
    """
    text = re.sub(r"\bfrom (?:the )?(?:left|right|top|bottom) ", "", prompt, flags=re.I)
    if re.search(r"\b(?:camera|pan|pans|panning|tilts?|tilting)\b", text, re.I):
        return None
    found = {(a or b).lower() for a, b in _DIRECTION.findall(text)}
    return found.pop() if len(found) == 1 else None


def _check_target(target):
    if not target > 0:
        raise ValueError(f"target must be a positive speed in shares of the short side per frame, not {target}")
