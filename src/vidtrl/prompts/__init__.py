"""Prompt enhancement: a language model that rewrites what users type into what a video model understands, and the rewards
with which stock TRL trainers teach it."""

import importlib
from typing import TYPE_CHECKING


_EXPORTS = {
    "EnhancedPipeline": "pipeline",
    "Enhancement": "enhancer",
    "PromptEnhancer": "enhancer",
    "PromptFallbackWarning": "enhancer",
    "PromptTemplate": "template",
    "builtin_templates": "template",
    "clean_output": "text",
    "missing_words": "text",
    "required_words": "text",
    "pairs_dataset": "training",
    "prompts_dataset": "training",
    "score_original": "rewards",
    "structure_reward": "rewards",
    "video_reward": "rewards",
}
__all__ = [*_EXPORTS]


def __getattr__(name):
    if name in _EXPORTS:
        return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module 'vidtrl.prompts' has no attribute {name!r}")


if TYPE_CHECKING:
    from .enhancer import Enhancement, PromptEnhancer, PromptFallbackWarning
    from .pipeline import EnhancedPipeline
    from .rewards import score_original, structure_reward, video_reward
    from .template import PromptTemplate, builtin_templates
    from .text import clean_output, missing_words, required_words
    from .training import pairs_dataset, prompts_dataset
