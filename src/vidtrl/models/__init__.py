"""A diffusers video pipeline seen as a trainable model."""

import importlib
from typing import TYPE_CHECKING


_EXPORTS = {
    "VideoModel": "video_model",
    "Condition": "capture",
    "Family": "families",
    "FAMILIES": "families",
    "UNSUPPORTED": "families",
    "check_model": "check",
    "CheckReport": "check",
    "CausalAttention": "causal",
    "KVCache": "causal",
}
__all__ = list(_EXPORTS)


def __getattr__(name):
    if name in _EXPORTS:
        return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module 'vidtrl.models' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)


if TYPE_CHECKING:
    from .capture import Condition
    from .causal import CausalAttention, KVCache
    from .check import CheckReport, check_model
    from .families import FAMILIES, UNSUPPORTED, Family
    from .video_model import VideoModel
