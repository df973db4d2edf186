"""Rewards of the toy world, measured from pixels. Each follows vidtrl's reward contract: keyword-only call with
`prompts` and `videos` (list of float tensors (F, 3, H, W) in [0, 1]), one float in [0, 1] a video, 1 is best.

None of them is differentiable. Failure modes are stated, because a policy will find them.
"""

import torch

from .measurement import FILL, FILL_BOUNDS, Measurement, measure, palette
from .world import COLORS, DIRECTIONS, parse_caption


def color_reward(prompts, videos, **kwargs) -> list[float | None]:
    """1 where the clip shows the prompt's colour; `None` for a prompt that names none. Ignores shape and motion."""
    return _compare(prompts, videos, "color", lambda seen, want: float(seen.color == want))


def shape_reward(prompts, videos, **kwargs) -> list[float | None]:
    """Soft: falls linearly with the distance of the filled share of the bounding box from the shape's own. Any blob
    that fills its box as a circle does counts as a circle."""
    return _compare(
        prompts,
        videos,
        "shape",
        lambda seen, want: max(0.0, 1 - abs(seen.fill - FILL[want]) / 0.2) if seen.present else 0.0,
    )


def direction_reward(prompts, videos, **kwargs) -> list[float | None]:
    """Soft: travel along the prompt's direction, full marks from a quarter of the side on; 0 for standing still or
    moving away. Sideways drift costs nothing."""
    return _compare(prompts, videos, "direction", _travel)


def attributes_reward(prompts, videos, **kwargs) -> list[float]:
    """Share of the attributes that the prompt names which the clip shows: 0, 1/3, 2/3 or 1 for a full caption."""
    rewards = []
    for prompt, video in zip(prompts, videos, strict=True):
        seen = measure(video)
        want = {k: v for k, v in parse_caption(prompt).items() if v is not None}
        rewards.append(sum(getattr(seen, k) == v for k, v in want.items()) / max(1, len(want)))
    return rewards


def accuracy_reward(prompts, videos, **kwargs) -> list[float]:
    """Soft: how safely the clip shows everything that the prompt names, the product of one factor an attribute: no
    attribute can be traded for another. Each is 1 where the attribute is clearly right and 0 where it is clearly wrong, so
    that it has a slope while the attribute still counts as right. A clip that is wrong altogether has no slope."""
    factors = {"color": _color_margin, "shape": _shape_margin, "direction": _travel}
    rewards = []
    for prompt, video in zip(prompts, videos, strict=True):
        seen = measure(video)
        reward = float(seen.present)
        for attribute, want in parse_caption(prompt).items():
            if want is not None and seen.present:
                reward *= factors[attribute](seen, want)
        rewards.append(reward)
    return rewards


def presence_reward(prompts, videos, **kwargs) -> list[float]:
    """1 where a shape is visible in most frames. Never trained on in our experiments: reward hacking shows here."""
    return [float(measure(video).present) for video in videos]


def steadiness_reward(prompts, videos, **kwargs) -> list[float]:
    """1 for constant brightness, 0 where it varies by 30 % (standard deviation) or more, and for an empty clip. A frozen
    clip is steady."""
    return [max(0.0, 1 - measure(video).flicker / 0.3) for video in videos]


def smoothness_reward(prompts, videos, **kwargs) -> list[float]:
    """1 for uniform motion, 0 for a trembling or empty clip. A frozen clip is smooth: pair with `direction_reward`."""
    return [measure(video).smoothness for video in videos]


def _travel(seen: Measurement, want: str) -> float:
    """Travel along a direction, as a share of a quarter of the side."""
    dx, dy = DIRECTIONS[want]
    return min(1.0, max(0.0, (seen.motion[0] * dx + seen.motion[1] * dy) / 0.25))


def _color_margin(seen: Measurement, want: str) -> float:
    """How much nearer the hue is to the wanted colour than to any other: 1 from a cosine of 0.08 on, 1/2 at a tie."""
    cosine = dict(zip(COLORS, (palette() @ torch.tensor(seen.hue)).tolist(), strict=True))
    own = cosine.pop(want)
    return min(1.0, max(0.0, (own - max(cosine.values()) + 0.08) / 0.16))


def _shape_margin(seen: Measurement, want: str) -> float:
    """How far the filled share is inside the bounds of the shape: 1 from 0.05 inside on, 0 from 0.15 outside on."""
    low, high = FILL_BOUNDS
    inside = {
        "triangle": low - seen.fill,
        "circle": min(seen.fill - low, high - seen.fill),
        "square": seen.fill - high,
    }
    return min(1.0, max(0.0, (inside[want] + 0.15) / 0.2))


def _compare(prompts, videos, attribute, judge):
    rewards = []
    for prompt, video in zip(prompts, videos, strict=True):
        want = parse_caption(prompt)[attribute]
        rewards.append(None if want is None else judge(measure(video), want))
    return rewards
