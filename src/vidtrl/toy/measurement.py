"""What a toy clip shows, measured from its pixels."""

from dataclasses import dataclass

import torch

from .world import BACKGROUND, COLORS, DIRECTIONS, SHAPES, parse_caption


FOREGROUND = 60 / 255  # a shape's strongest channel differs at least this much from the background
FILL = {"triangle": 0.525, "circle": 0.79, "square": 1.0}  # share of its bounding box that each shape fills
FILL_BOUNDS = (0.73, 0.867)  # triangle below the first, square above the second; a VAE rounds corners a little


@dataclass
class Measurement:
    """
    Args:
        present (`bool`): A shape is visible in at least 60 % of the frames.
        color (`str` or `None`): Nearest palette colour by chromaticity, so that brightness does not matter.
        hue (`tuple[float, float, float]`): Mean chromaticity (red, green, blue) of the shape, a unit vector.
        shape (`str` or `None`): From the median share of the bounding box that is filled.
        direction (`str` or `None`): From the slope of the centroid; `"still"` below 8 % of the side.
        fill (`float`): The median filled share, in [0, 1].
        motion (`tuple[float, float]`): Fitted travel of the centroid (x, y) over the clip, as a share of the side.
        flicker (`float`): Standard deviation over time of the shape's brightness, relative to its mean. 0 is steady.
        smoothness (`float`): In [0, 1]; 1 for uniform motion, 0 where the centroid's mean |second difference| reaches
            3 % of the side.
    """

    present: bool
    color: str | None = None
    hue: tuple[float, float, float] = (0.0, 0.0, 0.0)
    shape: str | None = None
    direction: str | None = None
    fill: float = 0.0
    motion: tuple[float, float] = (0.0, 0.0)
    flicker: float = 1.0
    smoothness: float = 0.0


def measure(video: torch.Tensor) -> Measurement:
    """
    Measure one clip.

    Args:
        video (`torch.Tensor`): Float tensor of shape (F, 3, H, W) in [0, 1].

    Returns:
        [`Measurement`]

    Raises:
        `ValueError`: If the tensor has another shape or range.
    """
    if video.ndim != 4 or video.shape[1] != 3:
        raise ValueError(f"measure() takes one clip of shape (F, 3, H, W), got {tuple(video.shape)}")
    if not video.is_floating_point() or video.min() < -0.01 or video.max() > 1.01:
        raise ValueError("measure() takes floats in [0, 1]; divide uint8 frames by 255")
    x = video.detach().float().cpu()
    frames, _, height, width = x.shape
    contrast = (x - BACKGROUND / 255).abs().amax(1)  # (F, H, W)
    peak = contrast.flatten(1).topk(height * width // 100).values.mean(1)
    # the outline is where contrast falls to half: a blurred edge stays in its place, and so does a dim shape's
    mask = contrast > (peak / 2).clamp(min=FOREGROUND / 2).view(-1, 1, 1)
    area = mask.flatten(1).sum(1)
    good = (area > 0.01 * height * width) & (peak > FOREGROUND)
    if good.sum() < max(3, 0.6 * frames):
        return Measurement(present=False)
    x, mask, area, contrast = x[good], mask[good], area[good].float(), contrast[good]
    time = torch.arange(frames, dtype=torch.float32)[good]

    weights = mask.float()
    columns, rows = weights.sum(1), weights.sum(2)  # (F, W), (F, H)
    soft = contrast * (contrast > peak[good].view(-1, 1, 1) / 6)  # antialiased edges carry the subpixel position
    soft = soft / soft.flatten(1).sum(1).view(-1, 1, 1)
    cx = (soft.sum(1) * torch.arange(width)).sum(1) / width
    cy = (soft.sum(2) * torch.arange(height)).sum(1) / height
    centred = time - time.mean()
    slope = lambda c: float((centred * (c - c.mean())).sum() / centred.square().sum() * (frames - 1))  # noqa: E731
    dx, dy = slope(cx), slope(cy)
    direction = ("right" if dx > 0 else "left") if abs(dx) > abs(dy) else ("down" if dy > 0 else "up")
    if max(abs(dx), abs(dy)) < 0.08:
        direction = "still"

    pixels = x.permute(0, 2, 3, 1)[mask]  # (N, 3)
    pixels = pixels / pixels.norm(dim=1, keepdim=True)
    votes = (pixels @ palette().T).argmax(1).bincount(minlength=len(COLORS))
    hue = pixels.mean(0) / pixels.mean(0).norm()

    def extent(line):  # (F, L) occupancy -> (F,) length of the occupied range
        on = line > 0
        first, last = on.float().argmax(1), line.shape[1] - 1 - on.flip(1).float().argmax(1)
        return last - first + 1

    fill = float((area / (extent(columns) * extent(rows))).median())
    shape = "triangle" if fill < FILL_BOUNDS[0] else "circle" if fill < FILL_BOUNDS[1] else "square"

    second = lambda v: (v[2:] - 2 * v[1:-1] + v[:-2]).abs().mean()  # noqa: E731
    brightness = (x.amax(1) * weights).flatten(1).sum(1) / area  # (F,)
    jerk = float(second(cx) + second(cy)) / 2
    return Measurement(
        present=True,
        color=list(COLORS)[int(votes.argmax())],
        hue=tuple(hue.tolist()),
        shape=shape,
        direction=direction,
        fill=fill,
        motion=(dx, dy),
        flicker=float(brightness.std() / brightness.mean()),
        smoothness=max(0.0, 1 - jerk / 0.03),
    )


def palette() -> torch.Tensor:
    """The chromaticities of `COLORS`, unit vectors (6, 3)."""
    colors = torch.tensor(list(COLORS.values()), dtype=torch.float32)
    return colors / colors.norm(dim=1, keepdim=True)


def score(videos: list[torch.Tensor], prompts: list[str]) -> dict[str, float]:
    """
    Share of clips that show what their prompts ask for.

    Args:
        videos (`list[torch.Tensor]`): Clips of shape (F, 3, H, W) in [0, 1].
        prompts (`list[str]`): One prompt a clip, each naming a colour, a shape and a direction.

    Returns:
        `dict[str, float]`: Means over the clips: `present`, `color`, `shape`, `direction`, `all` (all three right),
        `flicker`, `smoothness`; and `n`.
    """
    if len(videos) != len(prompts):
        raise ValueError(f"{len(videos)} videos but {len(prompts)} prompts")
    found, want = [measure(v) for v in videos], [parse_caption(p) for p in prompts]
    right = {k: [getattr(f, k) == w[k] for f, w in zip(found, want, strict=True)] for k in want[0]}
    out = {k: sum(v) / len(v) for k, v in right.items()}
    out["all"] = sum(all(hit) for hit in zip(*right.values(), strict=True)) / len(found)
    for name in ("present", "flicker", "smoothness"):
        out[name] = sum(float(getattr(f, name)) for f in found) / len(found)
    return {**out, "n": len(found)}


assert set(FILL) == set(SHAPES) and len(DIRECTIONS) == 4
