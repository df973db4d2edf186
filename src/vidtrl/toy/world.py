"""The toy world: captioned clips of one moving shape, drawn from a seed.

6 colours x 3 shapes x 4 directions = 72 captions such as "a red circle moving right"; 17 frames of 64x64 pixels. Two
qualities: `clean`, and `raw` with brightness flicker, a wobbling path and unreliable captions. A base model pretrained
on raw clips has headroom on purpose: post-training can raise its prompt following and remove its flicker, and both are
measured from pixels (`vidtrl.toy.measure`), so that every stage of vidtrl has a true reward on a laptop.
"""

import itertools
import json
import os
from pathlib import Path

import numpy as np
import torch


NUM_FRAMES, SIZE, FPS = 17, 64, 8
BACKGROUND = 16  # grey level of 255
COLORS = {
    "red": (230, 40, 40),
    "green": (40, 200, 60),
    "blue": (50, 80, 240),
    "yellow": (240, 220, 40),
    "purple": (170, 50, 210),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}  # image axes: y points down
QUALITIES = ("clean", "raw")

RAW_PERIOD = (6.0, 9.0)  # raw clips flicker and wobble with a period of so many frames,
RAW_FLICKER = (0.25, 0.6)  # losing up to this share of their brightness,
RAW_WOBBLE = (0.5, 2.5)  # and swaying by so many pixels across their way; each drawn once a clip
RAW_WRONG_SHAPE = 0.5  # share of raw captions that name another shape
RAW_VAGUE = 0.1  # share of raw captions that leave an attribute out


def captions() -> list[str]:
    """All 72 captions, in a fixed order."""
    return [f"a {c} {s} moving {d}" for c, s, d in itertools.product(COLORS, SHAPES, DIRECTIONS)]


def parse_caption(caption: str) -> dict[str, str | None]:
    """Return the `color`, `shape` and `direction` that a caption names; `None` for one that it does not name."""
    words = caption.lower().replace(",", " ").replace(".", " ").split()
    return {
        "color": next((w for w in words if w in COLORS), None),
        "shape": next((w for w in words if w in SHAPES), None),
        "direction": next((w for w in words if w in DIRECTIONS), None),
    }


def render(caption: str, quality: str = "clean", seed: int = 0) -> torch.Tensor:
    """
    Draw one clip. The seed sets size, start, travel and, for `raw`, flicker and wobble.

    Args:
        caption (`str`): One of [`captions`] (any text that names a colour, a shape and a direction).
        quality (`str`, *optional*, defaults to `"clean"`): `"clean"` or `"raw"`.
        seed (`int`, *optional*, defaults to `0`): Equal arguments draw equal clips.

    Returns:
        `torch.Tensor`: uint8 tensor of shape (17, 3, 64, 64).

    Raises:
        `ValueError`: If the caption misses an attribute or the quality is unknown.
    """
    want = parse_caption(caption)
    if None in want.values():
        missing = [k for k, v in want.items() if v is None]
        raise ValueError(f"cannot draw {caption!r}: it names no {', '.join(missing)}; see vidtrl.toy.captions()")
    if quality not in QUALITIES:
        raise ValueError(f"quality must be one of {QUALITIES}, not {quality!r}")
    rng = np.random.default_rng([seed, 7])
    frames, size = NUM_FRAMES, SIZE
    radius = rng.uniform(0.21, 0.26) * size
    low, high = radius + 1, size - radius - 1  # where the centre may be
    travel = rng.uniform(0.7, 1.0) * (high - low)
    start, across = rng.uniform(low, high - travel), rng.uniform(low, high)
    along = start + travel * np.linspace(0, 1, frames)
    dx, dy = DIRECTIONS[want["direction"]]
    if dx + dy < 0:
        along = size - along
    cx, cy = (along, np.full(frames, across)) if dx else (np.full(frames, across), along)
    brightness = np.ones(frames)
    if quality == "raw":
        wave = 2 * np.pi * np.arange(frames) / rng.uniform(*RAW_PERIOD)
        sway = rng.uniform(*RAW_WOBBLE) * np.sin(wave + rng.uniform(0, 2 * np.pi))
        cx, cy = (cx, cy + sway) if dx else (cx + sway, cy)
        brightness -= rng.uniform(*RAW_FLICKER) * (0.5 + 0.5 * np.sin(wave + rng.uniform(0, 2 * np.pi)))

    yy, xx = np.mgrid[0:size, 0:size] + 0.5
    x, y = xx[None] - cx[:, None, None], yy[None] - cy[:, None, None]
    if want["shape"] == "circle":
        distance = np.hypot(x, y) - radius
    elif want["shape"] == "square":
        distance = np.maximum(abs(x), abs(y)) - 0.95 * radius
    else:  # an upright triangle
        distance = np.maximum(y - 0.8 * radius, (abs(x) * 1.8 - (y + radius)) / 2.06)
    mask = np.clip(0.5 - distance, 0, 1)[..., None]  # (F, H, W, 1), antialiased
    clip = BACKGROUND * (1 - mask) + mask * np.array(COLORS[want["color"]])
    clip = (clip * brightness[:, None, None, None]).round().clip(0, 255).astype(np.uint8)
    return torch.from_numpy(clip).permute(0, 3, 1, 2).contiguous()


def raw_caption(caption: str, seed: int, wrong_shape: float = RAW_WRONG_SHAPE) -> str:
    """The unreliable caption a raw clip carries: often another shape, sometimes an attribute missing."""
    rng = np.random.default_rng([seed, 11])
    want = parse_caption(caption)
    if rng.random() < wrong_shape:
        want["shape"] = str(rng.choice([s for s in SHAPES if s != want["shape"]]))
    color, moving = f"{want['color']} ", f" moving {want['direction']}"
    if rng.random() < RAW_VAGUE:
        drop = rng.integers(3)
        color = "" if drop == 0 else color
        moving = "" if drop == 1 else moving
        want["shape"] = "shape" if drop == 2 else want["shape"]
    return f"a {color}{want['shape']}{moving}"


def write_dataset(
    directory: str | os.PathLike, num_clips: int = 216, quality: str = "clean", seed: int = 0, fps: int = FPS
) -> Path:
    """
    Write clips as real h264 mp4 files with a `metadata.jsonl`: what `load_dataset("videofolder", ...)` reads.

    Args:
        directory (`str` or `PathLike`): Created if missing.
        num_clips (`int`, *optional*, defaults to `216`): The 72 captions are used in turn.
        quality (`str`, *optional*, defaults to `"clean"`): `"clean"` or `"raw"`. Raw captions are unreliable.
        seed (`int`, *optional*, defaults to `0`): Datasets of different seeds share no clip.
        fps (`int`, *optional*, defaults to `8`): Frame rate written into the files.

    Returns:
        `Path`: The directory.
    """
    from ..data.video import write_video

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    every, rows = captions(), []
    for i in range(num_clips):
        clip_seed, caption = seed * 1_000_003 + i, every[i % len(every)]
        name = f"{quality}_{i:05d}.mp4"
        write_video(directory / name, render(caption, quality, clip_seed), fps=fps)
        rows.append({"file_name": name, "prompt": raw_caption(caption, clip_seed) if quality == "raw" else caption})
    (directory / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory
