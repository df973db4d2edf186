"""Trainers: `transformers.Trainer` over a diffusers video pipeline."""

import importlib
from typing import TYPE_CHECKING


_EXPORTS = {
    "EMACallback": ".callbacks",
    "ValidationVideoCallback": ".callbacks",
    "VideoDistillConfig": ".distill_config",
    "VideoDistillTrainer": ".distill_trainer",
    "VideoGRPOConfig": ".grpo_config",
    "VideoGRPOTrainer": ".grpo_trainer",
    "VideoProgressCallback": ".callbacks",
    "VideoSFTConfig": ".sft_config",
    "VideoSFTTrainer": ".sft_trainer",
    "VideoTrainer": ".base_trainer",
    "VideoTrainingConfig": ".base_config",
}
__all__ = [*_EXPORTS]


def __getattr__(name):
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(__all__)


if TYPE_CHECKING:
    from .base_config import VideoTrainingConfig
    from .base_trainer import VideoTrainer
    from .callbacks import EMACallback, ValidationVideoCallback, VideoProgressCallback
    from .distill_config import VideoDistillConfig
    from .distill_trainer import VideoDistillTrainer
    from .grpo_config import VideoGRPOConfig
    from .grpo_trainer import VideoGRPOTrainer
    from .sft_config import VideoSFTConfig
    from .sft_trainer import VideoSFTTrainer
