"""Reward functions: each scores every video of a batch in [0, 1] from its pixels. No downloads."""

import importlib
from typing import TYPE_CHECKING


_EXPORTS = {
    "RewardError": "runner",
    "RewardRunner": "runner",
    "builtin_rewards": "builtin",
    "get_reward": "builtin",
}
__all__ = [*_EXPORTS]


def __getattr__(name):
    if name in _EXPORTS:
        return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module 'vidtrl.rewards' has no attribute {name!r}")


if TYPE_CHECKING:
    from .builtin import builtin_rewards, get_reward
    from .runner import RewardError, RewardRunner
