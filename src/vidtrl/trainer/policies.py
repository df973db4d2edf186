"""From a loaded pipeline to what is trained: which denoisers, on top of which adapters, as which roles."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from diffusers import DiffusionPipeline
from peft import PeftConfig
from torch import nn

from ..models import VideoModel
from ..models.roles import Roles, checkpoint_under
from .base_config import VideoTrainingConfig
from .experts import EXPERTS, Experts, ExpertSwap
from .lora import active_adapters, add_lora, repeated_blocks


def check_arguments(
    args: VideoTrainingConfig, model: Any, train_dataset: Any, eval_dataset: Any, peft_config: Any
) -> None:
    """
    Refuse what a trainer cannot take, before anything is loaded.

    Args:
        args, model, train_dataset, eval_dataset, peft_config: As [`VideoTrainer`] takes them.

    Raises:
        `TypeError`, `ValueError`: Says what to pass or set.
    """
    if not isinstance(model, (str, os.PathLike, DiffusionPipeline)):
        raise TypeError(
            f"model must be a Hub id, a path or a DiffusionPipeline, not {type(model).__name__}. Pass the whole "
            "pipeline, not its transformer."
        )
    if peft_config is not None and not isinstance(peft_config, PeftConfig):
        raise TypeError(f"peft_config must be a peft.LoraConfig, not {type(peft_config).__name__}")
    for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
        each = dataset.values() if name == "eval_dataset" and isinstance(dataset, dict) else [dataset]
        for one in each:
            if one is not None and not isinstance(one, (Dataset, IterableDataset, torch.utils.data.Dataset)):
                raise TypeError(
                    f"{name} must be a datasets.Dataset, not {type(one).__name__}; see datasets.load_dataset"
                )
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process and nn.DataParallel is not supported: start with "
            "`accelerate launch`, or show one GPU through CUDA_VISIBLE_DEVICES"
        )


def trained_denoisers(args: VideoTrainingConfig, model: VideoModel) -> tuple[list[str], tuple[float, float]]:
    """
    What is trained: the denoiser, or of a two-expert model both or one.

    Args:
        args ([`VideoTrainingConfig`]): `experts` counts.
        model ([`VideoModel`]): The run's.

    Returns:
        `tuple[list[str], tuple[float, float]]`: Names of the denoisers, and the noise levels between which they are used.

    Raises:
        `ValueError`: If one of two is asked for and there is one.
    """
    for name in ("experts", "guidance_scale_2"):
        if getattr(args, name) is not None and len(model.denoisers) == 1:
            raise ValueError(
                f"{name}={getattr(args, name)!r} needs a model with two denoisers; {type(model.pipe).__name__} has one"
            )
    if args.experts not in EXPERTS:
        return list(model.denoisers), (0.0, 1.0)
    # the noisy expert is used above the boundary, the other one below
    used = (0.0, model.boundary) if args.experts == "low" else (model.boundary, 1.0)
    return [EXPERTS[args.experts]], used


def adapters_below(denoisers: Sequence[nn.Module], adapter: bool) -> tuple[str, ...]:
    """
    Adapters of earlier stages, that stay under what is trained now.

    Args:
        denoisers (`Sequence[nn.Module]`): What will be trained.
        adapter (`bool`): By an adapter on top.

    Raises:
        `ValueError`: If there are some, and all weights are to be trained.
    """
    below = tuple(dict.fromkeys(name for module in denoisers for name in active_adapters(module)))
    if below and not adapter:
        raise ValueError(
            f"the model carries the adapter{'s' if len(below) > 1 else ''} {', '.join(below)}: pass a peft_config to train "
            "another one on top, or merge with pipe.fuse_lora() and pipe.unload_lora_weights() to train all weights"
        )
    return below


def place(model: VideoModel, device: torch.device, swap: ExpertSwap, first: str, sharded: bool = False) -> None:
    """
    Bring a pipeline to the device, all but the expert that is not in use and what is sharded.

    Args:
        model ([`VideoModel`]): Whose pipeline.
        device (`torch.device`): Where it computes.
        swap ([`ExpertSwap`]): Of its denoisers.
        first (`str`): The expert that is in use where none has been called.
        sharded (`bool`, *optional*, defaults to `False`): The denoisers are where their shards belong.
    """
    if not swap.enabled and not sharded:
        model.pipe.to(device)
        return
    for name, module in model.pipe.components.items():
        if isinstance(module, nn.Module) and name not in model.denoisers:
            module.to(device)
    if swap.enabled:
        swap.use(swap.current or first)


def make_policies(
    denoisers: dict[str, nn.Module],
    peft_config: PeftConfig | None,
    role: str,
    below: tuple[str, ...] = (),
    placed: bool = False,
) -> tuple[nn.Module, Roles]:
    """
    Inject the adapter to train, if there is one, and name the policies that there are now.

    Args:
        denoisers (`dict[str, nn.Module]`): What is trained, frozen so far.
        peft_config (`LoraConfig`, *optional*): The adapter's; `None` trains all weights.
        role (`str`): What the trained policy is called.
        below (`tuple[str, ...]`, *optional*): From [`adapters_below`]; with an adapter on top, the role `"base"`.
        placed (`bool`, *optional*, defaults to `False`): As [`Experts`] takes it.

    Returns:
        `tuple[nn.Module, Roles]`: The module that is trained, and its roles.
    """
    policies, each = Roles(), denoisers
    if peft_config is not None:
        each = {name: add_lora(module, peft_config) for name, module in denoisers.items()}
    trained = next(iter(each.values())) if len(each) == 1 else Experts(each, placed=placed)
    if peft_config is not None:
        policies.add(role, trained, (*below, "default"), trained=True)
        policies.add("base", trained, below)
    else:
        policies.add(role, trained, trained=True)
    return trained, policies


def set_up_forward(denoisers: Sequence[nn.Module], args: VideoTrainingConfig, states: list) -> None:
    """
    Gradient checkpointing and compilation of denoisers, as the configuration says.

    Args:
        denoisers (`Sequence[nn.Module]`): The pipeline's own, that are trained.
        args ([`VideoTrainingConfig`]): `gradient_checkpointing` and `compile_repeated_blocks` count.
        states (`list`): What a forward depends on besides its arguments; see [`checkpoint_under`].
    """
    for module in denoisers:
        # diffusers' method has another name and signature than the one that Trainer.train() would call
        if args.gradient_checkpointing:
            module.enable_gradient_checkpointing(checkpoint_under(*states))
        if args.compile_repeated_blocks:
            for stack in repeated_blocks(module).values():
                for block in stack:
                    block.compile()
