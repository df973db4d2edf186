"""vidtrl: TRL-style trainers for video diffusion models."""

import importlib
from typing import TYPE_CHECKING


__version__ = "0.1.0.dev0"

# name -> module; resolved on first use, so that `import vidtrl` loads neither torch nor diffusers
_EXPORTS = {
    "Condition": "vidtrl.models",
    "VideoModel": "vidtrl.models",
    "check_model": "vidtrl.models",
    "CausalVideoPipeline": "vidtrl.inference",
    "FewStepFlowScheduler": "vidtrl.inference",
    "InferenceOptimization": "vidtrl.inference",
    "export_student": "vidtrl.inference",
    "load_student": "vidtrl.inference",
    "PromptEnhancer": "vidtrl.prompts",
    "VideoDistillConfig": "vidtrl.trainer",
    "VideoDistillTrainer": "vidtrl.trainer",
    "VideoGRPOConfig": "vidtrl.trainer",
    "VideoGRPOTrainer": "vidtrl.trainer",
    "VideoSFTConfig": "vidtrl.trainer",
    "VideoSFTTrainer": "vidtrl.trainer",
}
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name):
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'vidtrl' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)


if TYPE_CHECKING:
    from .inference import (
        CausalVideoPipeline,
        FewStepFlowScheduler,
        InferenceOptimization,
        export_student,
        load_student,
    )
    from .models import Condition, VideoModel, check_model
    from .prompts import PromptEnhancer
    from .trainer import (
        VideoDistillConfig,
        VideoDistillTrainer,
        VideoGRPOConfig,
        VideoGRPOTrainer,
        VideoSFTConfig,
        VideoSFTTrainer,
    )
