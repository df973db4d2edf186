"""The embedded default: captioned clips of moving shapes, a tiny pretrained `WanPipeline`, pixel-measured rewards."""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING


_EXPORTS = {
    "captions": "world",
    "parse_caption": "world",
    "render": "world",
    "write_dataset": "world",
    "Measurement": "measurement",
    "measure": "measurement",
    "score": "measurement",
    "accuracy_reward": "rewards",
    "attributes_reward": "rewards",
    "color_reward": "rewards",
    "direction_reward": "rewards",
    "presence_reward": "rewards",
    "shape_reward": "rewards",
    "smoothness_reward": "rewards",
    "steadiness_reward": "rewards",
}
__all__ = ["pipeline_path", *_EXPORTS]


def pipeline_path() -> str:
    """
    Folder of the tiny pretrained `WanPipeline` (64x64, 17 frames) that ships with vidtrl.

    ```python
    >>> from diffusers import WanPipeline
    >>> from vidtrl.toy import pipeline_path

    >>> pipe = WanPipeline.from_pretrained(pipeline_path())
    >>> pipe("a red circle moving right", height=64, width=64, num_frames=17, guidance_scale=3.0).frames[0].shape
    (17, 64, 64, 3)
    ```
    """
    return str(Path(__file__).parent / "pipeline")


def __getattr__(name):
    if name in _EXPORTS:
        return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module 'vidtrl.toy' has no attribute {name!r}")


if TYPE_CHECKING:
    from .measurement import Measurement, measure, score
    from .rewards import (
        accuracy_reward,
        attributes_reward,
        color_reward,
        direction_reward,
        presence_reward,
        shape_reward,
        smoothness_reward,
        steadiness_reward,
    )
    from .world import captions, parse_caption, render, write_dataset
