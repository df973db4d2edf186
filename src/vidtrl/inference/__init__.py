"""Sampling a distilled student: its scheduler, the causal pipeline, export to diffusers, and what makes it fast."""

import importlib
from typing import TYPE_CHECKING


_EXPORTS = {
    "CausalVideoPipeline": "causal_pipeline",
    "FewStepFlowScheduler": "scheduler",
    "FewStepVPScheduler": "scheduler",
    "InferenceOptimization": "optimization",
    "StreamingDecoder": "streaming_vae",
    "StudentConfig": "distill_config",
    "VideoStream": "causal_pipeline",
    "read_distill_config": "distill_config",
    "write_distill_config": "distill_config",
    "export_student": "export",
    "load_student": "export",
}
__all__ = list(_EXPORTS)


def __getattr__(name):
    if name in _EXPORTS:
        return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module 'vidtrl.inference' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)


if TYPE_CHECKING:
    from .causal_pipeline import CausalVideoPipeline, VideoStream
    from .distill_config import StudentConfig, read_distill_config, write_distill_config
    from .export import export_student, load_student
    from .optimization import InferenceOptimization
    from .scheduler import FewStepFlowScheduler, FewStepVPScheduler
    from .streaming_vae import StreamingDecoder
