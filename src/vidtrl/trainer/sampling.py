"""How trainers call the stock pipeline."""

from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..models import VideoModel
from .base_config import VideoTrainingConfig


def pipeline_call(args: VideoTrainingConfig, model: VideoModel, shape: tuple[int, int, int]) -> dict[str, Any]:
    """
    Arguments of the pipeline for validation videos, all but prompt, image and generator.

    Args:
        args ([`VideoTrainingConfig`]): `pipeline_kwargs`, `max_sequence_length` and the `validation_*` fields count.
        model ([`VideoModel`]): Whose pipeline is called.
        shape (`tuple[int, int, int]`): (height, width, num_frames).
    """
    height, width, num_frames = shape
    call = {**model.family.call, **(args.pipeline_kwargs or {}), "height": height, "width": width, "output_type": "pt"}
    call[model.family.frames_argument] = num_frames
    return call | sampling_arguments(args)


def sampling_arguments(args: VideoTrainingConfig) -> dict[str, Any]:
    """Steps, guidance and text length of validation videos, as far as they are set."""
    arguments = {
        "num_inference_steps": args.validation_num_inference_steps,
        "guidance_scale": args.validation_guidance_scale,
        "guidance_scale_2": args.guidance_scale_2,
        "max_sequence_length": args.max_sequence_length,
    }
    return {name: value for name, value in arguments.items() if value is not None}


def sample_videos(
    pipe: DiffusionPipeline,
    prompts: list[str],
    seeds: list[int],
    images: list | None = None,
    batch_size: int = 1,
    **call: Any,
) -> list[Tensor]:
    """
    Sample one video per prompt.

    Args:
        pipe (`DiffusionPipeline`): A stock pipeline.
        prompts, seeds, images, batch_size: As in [`VideoTrainer.generate_videos`].
        **call: Further arguments of the pipeline, such as those of [`pipeline_call`].

    Returns:
        `list[torch.Tensor]`: float32 tensors (F, C, H, W) in [0, 1] on the CPU.
    """
    videos = []
    pipe.set_progress_bar_config(disable=True)
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        batch = {"prompt": prompts[part], "generator": [torch.Generator().manual_seed(s) for s in seeds[part]]}
        if images is not None:
            batch["image"] = images[part]
        if batch_size == 1:  # not every pipeline takes lists
            batch = {name: values[0] for name, values in batch.items()}
        videos += pipe(**batch, **call).frames.float().cpu()
    return videos
