"""Load a model as a configuration says, and take from it what the configuration leaves open."""

import inspect
import os
from typing import Any

import torch
from diffusers import DiffusionPipeline
from transformers.utils import logging

from ..models import VideoModel
from .base_config import VideoTrainingConfig


logger = logging.get_logger(__name__)


def weights_dtype(args: VideoTrainingConfig, adapter: bool) -> torch.dtype:
    """
    In which precision a model is loaded to be trained: as `model_init_kwargs` says, or what training needs.

    Args:
        args ([`VideoTrainingConfig`]): The run's.
        adapter (`bool`): An adapter is trained, and the model's own weights are frozen.
    """
    asked = args.model_init_kwargs or {}
    dtype = asked.get("dtype", asked.get("torch_dtype"))
    if isinstance(dtype, str):
        return getattr(torch, dtype)
    if dtype is not None:
        return dtype
    # trained weights stay in float32 (autocast runs them in bfloat16); frozen ones need no more than bfloat16
    return torch.bfloat16 if args.bf16 and adapter else torch.float32


def load_model(
    model: str | os.PathLike | DiffusionPipeline,
    args: VideoTrainingConfig,
    quantization_config: Any = None,
    adapter: bool = False,
) -> VideoModel:
    """
    Load what a trainer is given as its model, or take a pipeline as it is.

    Args:
        model (`str`, `PathLike` or `DiffusionPipeline`): Hub id, local path, or a loaded pipeline.
        args ([`VideoTrainingConfig`]): `model_init_kwargs` and the precision count.
        quantization_config (*optional*): A diffusers quantisation configuration.
        adapter (`bool`, *optional*, defaults to `False`): As in [`weights_dtype`].

    Raises:
        `ValueError`: If a loaded pipeline was to be quantised, or a quantisation is given twice.
    """
    load_kwargs = dict(args.model_init_kwargs or {})
    if isinstance(model, DiffusionPipeline):
        if quantization_config is not None:
            raise ValueError(
                "quantization_config is used while loading: pass the model's id or path instead of a pipeline, or "
                "load the pipeline quantised and leave quantization_config out"
            )
        if load_kwargs:
            logger.warning("model_init_kwargs is ignored: the model is already loaded")
        return VideoModel.from_pretrained(model)
    if quantization_config is not None and "quantization_config" in load_kwargs:
        raise ValueError("quantization_config is given twice: as an argument and in model_init_kwargs")
    quantization_config = load_kwargs.pop("quantization_config", quantization_config)
    for name in ("dtype", "torch_dtype"):
        load_kwargs.pop(name, None)
    return VideoModel.from_pretrained(
        model, torch_dtype=weights_dtype(args, adapter), quantization_config=quantization_config, **load_kwargs
    )


def fill_shape(args: VideoTrainingConfig, model: VideoModel) -> None:
    """
    Take the pipeline's own size for what is not set of height, width and num_frames.

    Args:
        args ([`VideoTrainingConfig`]): Filled in place.
        model ([`VideoModel`]): What is trained.

    Raises:
        `ValueError`: If the pipeline has none.
    """
    parameters = inspect.signature(type(model.pipe).__call__).parameters
    for name, argument in (("height",) * 2, ("width",) * 2, ("num_frames", model.family.frames_argument)):
        if getattr(args, name) is None:
            default = parameters[argument].default
            if not isinstance(default, int):
                raise ValueError(f"set {name}: {type(model.pipe).__name__} has no size of its own")
            setattr(args, name, default)


def condition_kwargs(args: VideoTrainingConfig) -> dict[str, Any]:
    """What a pipeline is told besides prompt and size when it encodes a prompt."""
    kwargs = dict(args.pipeline_kwargs or {})
    if args.max_sequence_length is not None:
        kwargs["max_sequence_length"] = args.max_sequence_length
    return kwargs
