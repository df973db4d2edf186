"""Reward functions: each scores every video of a batch in [0, 1] from its pixels. No downloads."""

import importlib
from typing import TYPE_CHECKING


_EXPORTS = {
    "RemoteReward": "remote",
    "RemoteRewardError": "remote",
    "RewardError": "runner",
    "RewardRunner": "runner",
    "RewardServer": "server",
    "RewardUnavailable": "runner",
    "builtin_rewards": "builtin",
    "get_reward": "builtin",
    "get_motion_direction_reward": "motion",
    "get_motion_magnitude_reward": "motion",
    "motion_smoothness_reward": "motion",
    "motion_velocity": "motion",
    "optical_flow": "motion",
    "prompt_direction": "motion",
    "get_prompt_ocr_reward": "ocr",
    "quoted_text": "ocr",
    "text_similarity": "ocr",
    "clipped_light": "quality",
    "colorfulness": "quality",
    "flicker": "quality",
    "flicker_reward": "quality",
    "get_colorfulness_reward": "quality",
    "get_exposure_reward": "quality",
    "jpeg_bits_per_pixel": "quality",
    "jpeg_compressibility_reward": "quality",
    "jpeg_incompressibility_reward": "quality",
    "temporal_roughness": "quality",
    "temporal_smoothness_reward": "quality",
}
__all__ = [*_EXPORTS]


def __getattr__(name):
    if name in _EXPORTS:
        return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module 'vidtrl.rewards' has no attribute {name!r}")


if TYPE_CHECKING:
    from .builtin import builtin_rewards, get_reward
    from .motion import (
        get_motion_direction_reward,
        get_motion_magnitude_reward,
        motion_smoothness_reward,
        motion_velocity,
        optical_flow,
        prompt_direction,
    )
    from .ocr import (
        get_prompt_ocr_reward,
        quoted_text,
        text_similarity,
    )
    from .quality import (
        clipped_light,
        colorfulness,
        flicker,
        flicker_reward,
        get_colorfulness_reward,
        get_exposure_reward,
        jpeg_bits_per_pixel,
        jpeg_compressibility_reward,
        jpeg_incompressibility_reward,
        temporal_roughness,
        temporal_smoothness_reward,
    )
    from .remote import RemoteReward, RemoteRewardError
    from .runner import RewardError, RewardRunner, RewardUnavailable
    from .server import RewardServer
