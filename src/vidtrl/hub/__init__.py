"""Adapters, students and datasets on the Hugging Face Hub, their cards, and files for other tools."""

import importlib
from typing import TYPE_CHECKING


_EXPORTS = {
    "HubError": ".upload",
    "build_model_card": ".model_card",
    "export_comfyui": ".comfyui",
    "pull_from_hub": ".upload",
    "push_preferences": ".datasets",
    "push_rollouts": ".datasets",
    "push_sft": ".datasets",
    "push_to_hub": ".upload",
}
__all__ = [*_EXPORTS]


def __getattr__(name):
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(__all__)


if TYPE_CHECKING:
    from .comfyui import export_comfyui
    from .datasets import push_preferences, push_rollouts, push_sft
    from .model_card import build_model_card
    from .upload import HubError, pull_from_hub, push_to_hub
