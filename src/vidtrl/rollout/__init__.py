"""Sampling loops over a `VideoModel`."""

import importlib
from typing import TYPE_CHECKING


_EXPORTS = {"sample": "sampling", "few_step_rollout": "few_step", "causal_rollout": "causal", "recache": "causal"}
__all__ = list(_EXPORTS)


def __getattr__(name):
    if name in _EXPORTS:
        return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module 'vidtrl.rollout' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)


if TYPE_CHECKING:
    from .causal import causal_rollout, recache
    from .few_step import few_step_rollout
    from .sampling import sample
