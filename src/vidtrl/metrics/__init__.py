"""Rewards as 🤗 evaluate metrics: what a reward measures in training, measured on video files."""

import importlib
from typing import TYPE_CHECKING


_EXPORTS = {"VideoMetric": "video_metric", "load": "video_metric", "script_path": "video_metric"}
__all__ = [*_EXPORTS]


def __getattr__(name):
    if name in _EXPORTS:
        return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module 'vidtrl.metrics' has no attribute {name!r}")


if TYPE_CHECKING:
    from .video_metric import VideoMetric, load, script_path
